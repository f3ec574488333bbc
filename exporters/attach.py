"""Exits for a network that has none: heads on named modules, trained while the network itself stays as it is."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.data import Dataset
from edgekit.errors import DataError, DecisionError
from edgekit.progress import Progress, silent

__all__ = ["ExitHead", "WithExits", "add_exits", "train_exits"]


class ExitHead(nn.Module):
    """The default head: the mean of each channel, then a linear classifier.

    Args:
        classes: number of classes; without it there is no classifier, and the channels' means are the logits.

    The classifier gets its weights with the first forward, which shows how many channels there are.
    """

    def __init__(self, classes: int | None = None) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lazy modules call themselves new
            self.classifier = nn.Identity() if classes is None else nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes) float32`` of features ``(batch, channels, ...) float32``."""
        return self.classifier(x.flatten(2).mean(2) if x.ndim > 2 else x)


class WithExits(nn.Module):
    """A network with heads on some of its modules. What :func:`add_exits` makes.

    Args:
        backbone: the network. Its weights are shared and nothing of it is changed.
        heads: by the name of the module whose output they read.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.names = tuple(heads)
        self.heads = nn.ModuleList(heads.values())
        # The heads follow the network's mode, not the reverse.
        self.training = backbone.training
        self.heads.train(backbone.training)

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Logits of the attached exits ``(batch, classes)``, in order, then what the network itself returns.

        Raises:
            DecisionError: a module does not give one tensor in one call.
        """
        logits: dict[str, Tensor] = {}
        heads = dict(zip(self.names, self.heads, strict=True))
        # Hooks for this call only; each head runs at once, before anything can write into what it reads.
        handles = [
            self.backbone.get_submodule(name).register_forward_hook(_reader(name, head, logits))
            for name, head in heads.items()
        ]
        try:
            own = self.backbone(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        missing = next((name for name in self.names if name not in logits), None)
        if missing is not None:
            raise DecisionError(f"module '{missing}' is not called by the forward: attach the exit to one that is")
        return [*(logits[name] for name in self.names), *(own if isinstance(own, list | tuple) else [own])]


def _reader(name: str, head: nn.Module, logits: dict[str, Tensor]) -> Any:
    """A forward hook that puts the head's answer under the module's name."""

    def read(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise DecisionError(
                f"module '{name}' gives a {type(output).__name__}, an exit needs one tensor: name a module inside it"
            )
        if name in logits:
            raise DecisionError(f"module '{name}' is called more than once in a forward: an exit needs one place")
        # What comes next may write into the output, and a head that learns may still need it for its gradient.
        logits[name] = head(output.clone() if torch.is_grad_enabled() else output)

    return read


def add_exits(
    model: nn.Module, exits: Mapping[str, nn.Module | None] | Sequence[str], *, classes: int | None = None
) -> WithExits:
    """Attach exit heads. Arguments and errors as in :func:`edgekit.add_exits`."""
    if isinstance(exits, str) or not exits:
        raise DecisionError(
            "exits must be module names, as ['layer1', 'layer2'], or heads by them, as {'layer1': head}"
        )
    chosen = dict(exits) if isinstance(exits, Mapping) else dict.fromkeys(exits)
    known = [name for name, _ in model.named_modules() if name]
    for name in chosen:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            listing = ", ".join(f"'{each}'" for each in close or known[:5])
            hint = f"; {'close to it are' if close else 'it has'} {listing}" if listing else ""
            raise DecisionError(f"{type(model).__name__} has no module '{name}'{hint}")
    return WithExits(model, {name: ExitHead(classes) if head is None else head for name, head in chosen.items()})


def train_exits(
    model: nn.Module,
    data: Dataset,
    *,
    epochs: int = 20,
    batch: int = 128,
    learning_rate: float = 0.01,
    seed: int = 0,
    progress: Progress = silent,
) -> WithExits:
    """Train the attached heads alone. Arguments and errors as in :func:`edgekit.train_exits`."""
    if not isinstance(model, WithExits):
        raise DecisionError(f"{type(model).__name__} has no attached exits to train: make them with edgekit.add_exits")
    if data.labels is None:
        raise DataError(f"{data.source}: training exits needs labels")
    labels = torch.from_numpy(data.labels)
    with _frozen(model.backbone), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model.heads.train()
        with torch.no_grad():
            model(torch.from_numpy(data.batch(slice(0, 2))))  # a default head gets its weights here
        optimizer = torch.optim.Adam(model.heads.parameters(), lr=learning_rate)
        for epoch in range(epochs):
            progress("train exits", epoch, epochs)
            for rows in torch.randperm(len(data)).split(batch):
                logits = model(torch.from_numpy(data.batch(rows.numpy())))[: len(model.names)]
                loss = torch.stack([functional.cross_entropy(each, labels[rows]) for each in logits]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        progress("train exits", epochs, epochs)
    model.heads.train(model.training)
    return model


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; modes and gradients as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for weight, gradient in wanted:
            weight.requires_grad_(gradient)
