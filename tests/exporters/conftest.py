"""Small networks, and the eager model against its own stages run one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekit.exporters import Staged, stage_model
from edgekit.exporters.stages import stage_module
from edgekit.runtimes.eager import EagerRuntime
from edgekit.session import Session

ROWS = 9


class Trunk(nn.Module):
    """Three layers and a head for each; a test gives the forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.h1, self.h2, self.h3 = nn.Linear(16, 5), nn.Linear(16, 5), nn.Linear(16, 5)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = F.relu(self.a(x))
        second = F.relu(self.b(first))
        return first, second, F.relu(self.c(second))

    def forward(self, x: Tensor) -> Any:
        first, second, third = self.features(x)
        return [self.h1(first), self.h2(second), self.h3(third)]


def _chain(staged: Staged, inputs: list[Tensor]) -> list[Tensor]:
    known = {spec.name: tensor for spec, tensor in zip(staged.plan.inputs, inputs, strict=True)}
    known.update({step.temperature: torch.ones(()) for step in staged.plan.exits})
    with torch.no_grad():
        for cut, stage in zip(staged.cuts, staged.plan.stages, strict=True):
            outputs = stage_module(cut)(*(known[name] for name in stage.inputs))
            assert len(outputs) == len(stage.outputs)
            known.update(zip(stage.outputs, outputs, strict=True))
    for name, spec in staged.plan.tensors.items():
        assert tuple(known[name].shape) == spec.concrete(len(inputs[0])), name
        assert str(known[name].dtype) == f"torch.{spec.dtype}", name
    logits = [known[step.logits] for step in staged.plan.exits]
    return [
        value.softmax(1) if step.probabilities else value for step, value in zip(staged.plan.exits, logits, strict=True)
    ]


class _Net(nn.Module):
    """Layers to write a forward with."""

    def __init__(self, forward: Callable[..., Any] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.g, self.h = (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3))
        self.ask, self.ask2 = nn.Linear(8, 2), nn.Linear(8, 2)
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4))
        self.head, self.early = nn.Linear(8, 3), nn.Linear(8, 3)
        self.squeeze = nn.Linear(8, 8)
        self.write = forward

    def hard(self, x: Tensor) -> Tensor:
        return (self.ask(x)[:, 0] > 0).float()

    def forward(self, x: Tensor) -> Any:
        return self.write(self, x)


def _staged(model: nn.Module, *, smallest: int = 1, rows: int = ROWS, exits: Any = None) -> Staged:
    """Stages a network and compares it, alone and in batches, free and with its gates forced."""
    torch.manual_seed(1)
    x = torch.randn(rows, 8)
    made = stage_model(model.eval(), x[:2], exits=exits, smallest_gate=smallest)
    expected = made.eager([x])
    runtime = EagerRuntime({cut.name: stage_module(cut) for cut in made.cuts})
    with Session(made.plan, runtime, {}) as session:
        for batch in (slice(0, rows), slice(3, 5), *(slice(row, row + 1) for row in range(rows))):
            given_rows = x[batch].numpy()
            for one, other in zip(session.run_exits(given_rows), expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(one), other[batch], rtol=1e-5, atol=1e-5)
            last = torch.from_numpy(session.run(given_rows).logits)
            torch.testing.assert_close(last, expected[-1][batch], rtol=1e-5, atol=1e-5)
        for gates, whole in made.forced([x]):
            few = x[: len(whole[-1])].numpy()
            for rows_given, answer in ((few, whole[-1]), (few[:1], whole[-1][:1])):
                last = torch.from_numpy(session.run(rows_given, exit=len(made.exits) - 1, gates=gates).logits)
                torch.testing.assert_close(last, answer, rtol=1e-5, atol=1e-5)
        made.executed = session.run(x.numpy()).executed
    return made


@pytest.fixture
def trunk() -> Callable[..., Trunk]:
    """Makes a :class:`Trunk` in evaluation mode with this forward and these attributes."""

    def make(forward: Callable[..., Any] | None = None, **attributes: Any) -> Trunk:
        made = type("Net", (Trunk,), {"forward": forward} if forward else {})()
        for name, value in attributes.items():
            setattr(made, name, value)
        return made.eval()

    return make


@pytest.fixture
def staged_equals_eager() -> Callable[..., Staged]:
    """Stages a model, runs the stages in turn on one and on three samples, and compares every exit."""

    def check(model: nn.Module, args: Any, kwargs: Any = None, *, exits: Any = None) -> Staged:
        staged = stage_model(model.eval(), args, kwargs, exits=exits)
        generator = torch.Generator().manual_seed(1)
        for rows in (1, 3):
            inputs = []
            for example in staged.captured.example:
                shape = (rows, *example.shape[1:])
                noise = torch.randn(shape, generator=generator)
                picked = example.reshape(-1)[torch.randint(example.numel(), shape, generator=generator)]
                inputs.append(noise.to(example.dtype) if example.is_floating_point() else picked)
            expected = staged.eager(inputs)
            if staged.captured.batch == 1:
                parts = [_chain(staged, [tensor[row : row + 1] for tensor in inputs]) for row in range(rows)]
                given = [torch.cat(part) for part in zip(*parts, strict=True)]
            else:
                given = _chain(staged, inputs)
            assert len(given) == len(expected)
            for point, one, other in zip(staged.exits, given, expected, strict=True):
                other = other.reshape(one.shape)
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=f"exit {point.name}")
        return staged

    return check


# Made once: hypothesis refuses fixtures that are made for each test, as it runs a test many times.


@pytest.fixture(scope="session", name="Net")
def net_class() -> type[_Net]:
    """The class :class:`_Net`, to write a forward for."""
    return _Net


@pytest.fixture(scope="session")
def staged() -> Callable[..., Staged]:
    """Stages a network with gates and compares it; see :func:`_staged`."""
    return _staged


@pytest.fixture(scope="session")
def rows() -> int:
    """How many samples ``staged`` runs unless told."""
    return ROWS
