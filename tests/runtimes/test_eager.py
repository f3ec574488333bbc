"""The eager runtime against the module as a whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgekit.data import Dataset
from edgekit.errors import BundleError, InputError, MeasurementError
from edgekit.plan import SCORES, Exit, Plan, Run, Stage
from edgekit.policy import Policy
from edgekit.profiles.operators import time_operators
from edgekit.progress import silent
from edgekit.runtimes.eager import EagerRuntime
from edgekit.session import Session
from edgekit.tensors import TensorSpec


class Part(nn.Module):
    """A layer and an exit head with its scores."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x, temperature):
        hidden = self.body(x).relu()
        logits = self.head(hidden)
        p = torch.softmax(logits / temperature, -1)
        top = p.topk(2).values
        return hidden, logits, top[:, 0], top[:, 0] - top[:, 1], (p * p.log()).sum(-1)


@pytest.fixture
def network():
    torch.manual_seed(0)
    modules = {f"s{index}": Part().eval() for index in range(2)}
    tensors = {"x": TensorSpec("x", "float32", ("batch", 6))}
    stages, steps = [], []
    for index in range(2):
        scores = {score: f"{score}{index}" for score in SCORES}
        shapes = {f"h{index}": (6,), f"logits{index}": (4,), **dict.fromkeys(scores.values(), ())}
        tensors.update({name: TensorSpec(name, "float32", ("batch", *shape)) for name, shape in shapes.items()})
        tensors[f"t{index}"] = TensorSpec(f"t{index}", "float32", ())
        inputs = ("x" if index == 0 else "h0", f"t{index}")
        stages.append(Stage(name=f"s{index}", inputs=inputs, outputs=tuple(shapes), macs=None, weight_bytes=0))
        steps.append(Run(f"s{index}"))
        steps.append(Exit(name=f"e{index}", logits=f"logits{index}", temperature=f"t{index}", scores=scores))
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=tuple(stages), steps=tuple(steps)), modules


def test_as_the_modules_themselves(network):
    plan, modules = network
    x = torch.randn(6, 6)
    with torch.no_grad():
        first = modules["s0"](x, torch.tensor(2.0))
        second = modules["s1"](first[0], torch.tensor(1.0))
    threshold = float(first[2].median())
    policy = Policy.fixed([threshold], temperatures=[2, 1])
    leaves = (first[2] >= np.float32(threshold)).numpy()
    with Session(plan, EagerRuntime(modules), {}, policy=policy) as session:
        result = session.run(x.numpy())
        np.testing.assert_array_equal(result.exit, np.where(leaves, 0, 1))
        expected = np.where(leaves[:, None], first[1].numpy(), second[1].numpy())
        np.testing.assert_allclose(result.logits, expected, atol=1e-6)
        np.testing.assert_allclose(result.score, np.where(leaves, first[2], second[2]), atol=1e-6)
        assert result.executed == {"s0": 6, "s1": int((~leaves).sum())}
        for logits, whole in zip(session.run_exits(x.numpy()), (first[1], second[1]), strict=True):
            np.testing.assert_allclose(logits, whole.numpy(), atol=1e-6)


def test_threads_are_set_and_restored(network):
    _, modules = network
    before = torch.get_num_threads()
    runtime = EagerRuntime(modules, threads=before + 1)
    assert torch.get_num_threads() == runtime.describe()["threads"] == before + 1
    runtime.close()
    assert torch.get_num_threads() == before
    assert EagerRuntime(modules).describe() == {
        "name": "eager",
        "version": torch.__version__,
        "device": "cpu",
        "threads": before,
    }


def test_a_stage_without_a_module(network):
    plan, modules = network
    with pytest.raises(BundleError, match=r"stage 's1': there is no module for it \(modules: s0\)"):
        Session(plan, EagerRuntime({"s0": modules["s0"]}), {})


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, *_):
        return self.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1, 6), "stage 's0': its module must return a tuple of 5"),
        ((torch.zeros(1, 6),), "stage 's0': its module must return a tuple of 5"),
        ((torch.zeros(1, 7),) * 5, r"returned 'h0' as \(1, 7\), the plan says \(1, 6\)"),
    ],
)
def test_a_module_that_is_not_the_stage(network, value, message):
    plan, modules = network
    with (
        Session(plan, EagerRuntime({**modules, "s0": Returns(value)}), {}) as session,
        pytest.raises(InputError, match=message),
    ):
        session.run(np.zeros((1, 6), np.float32))


def test_operators_of_every_stage(network):
    plan, modules = network
    data = Dataset(inputs=np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32))
    with Session(plan, EagerRuntime(modules), {}) as session:
        found = time_operators(session, data, runs=8, rng=np.random.default_rng(0), progress=silent)
    assert [each.stage for each in found] == sorted(each.stage for each in found)
    for stage in modules:
        here = {each.name: each for each in found if each.stage == stage}
        assert {"aten.linear 1", "aten.relu 1", "aten.linear 2", "aten.softmax 1", "aten.topk 1"} <= set(here)
        assert here["aten.linear 2"].kind == "aten.linear"
        assert {each.calls for each in here.values()} == {8}
        assert sum(each.share for each in here.values()) == pytest.approx(1)
        assert all(0 < each.mean_s < 0.1 for each in here.values())


def test_only_a_runtime_that_records_tells_operators(network):
    _, modules = network
    runtime = EagerRuntime(modules)
    with pytest.raises(MeasurementError, match="runtime 'eager' records no operators"):
        runtime.operator_times()
    assert runtime.timing_operators().operator_times() == ()
