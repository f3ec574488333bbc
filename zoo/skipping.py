"""What networks that skip blocks share: the hard choice, the price of running a block, and how much is left out."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.data import Dataset
from edgekit.errors import TrainingError
from edgekit.zoo.training import Objective

__all__ = ["Skipping", "hard", "measure_skips", "skip_objective"]


class Skipping(Protocol):
    """A network whose gates or policy leave blocks out.

    Attributes:
        force_open: run every block, whatever gates or policy say: the all-on reference that skipping is compared with.
    """

    force_open: bool

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Answers and decisions.

        Args:
            x: images ``(batch, channels, height, width) float32``.

        Returns:
            Logits ``(batch, classes) float32``, and ``(batch, gates) float32``: 1 where a gated block ran, 0 where it
            was left out, in order of execution.
        """


def hard(probability: Tensor) -> Tensor:
    """1 above a half, else 0, with the gradient of the probability itself: the straight-through estimator.

    Source: Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
    Computation", 2013 (arXiv 1308.3432).
    """
    return (probability > 0.5).float().detach() - probability.detach() + probability


def skip_objective(*, target: float, weight: float) -> Objective:
    """Cross-entropy plus a price on every block that runs beyond a share of ``target``.

    SkipNet's hybrid objective (Wang et al. 2018, section 3.2) and BlockDrop's reward (Wu et al. 2018) price
    running blocks without end. A price that stops at a target needs no search for the weight between that which
    skips nothing and that which skips everything.

    Args:
        target: share of the gated blocks that may run for nothing, 0 to 1, as a mean over the batch.
        weight: price of running all blocks when ``target`` is 0.
    """

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits, decisions = cast("Skipping", model).routed(images)
        price = weight * functional.relu(decisions.mean() - target)
        return functional.cross_entropy(logits.float(), labels) + price

    return Objective(
        summary=f"Cross-entropy + {weight:g} max(0, share of gated blocks run - {target:g}), gates straight-through",
        loss=loss,
        logits=_logits,
    )


def _logits(outputs: Any) -> list[Tensor]:
    """A skipping network's forward returns its logits alone, or before what its gates say."""
    return [outputs if isinstance(outputs, Tensor) else outputs[0]]


@torch.no_grad()
def measure_skips(model: nn.Module, data: Dataset) -> dict[str, float]:
    """What a skipping network leaves out, and what the same weights do when they leave out nothing.

    In evaluation mode and float32. A block that runs on a share of 0 or 1 has a gate that decides alike for all.
    """
    if data.labels is None:
        raise TrainingError("evaluation needs labels")
    labels = torch.from_numpy(data.labels)
    skipping = cast("Skipping", model.eval())
    _, decisions = _routed(skipping, data)
    skipping.force_open = True
    try:
        all_on, _ = _routed(skipping, data)
    finally:
        skipping.force_open = False
    figures = {
        "gated blocks left out, share": 1 - float(decisions.mean()),
        "accuracy of the same weights with every block run": float((all_on.argmax(1) == labels).float().mean()),
    }
    for number, share in enumerate(decisions.mean(0).tolist(), start=1):
        figures[f"gated block {number}, share of images that it runs on"] = share
    return figures


def _routed(model: Skipping, data: Dataset) -> tuple[Tensor, Tensor]:
    parts = [model.routed(torch.from_numpy(inputs)) for inputs in data.batches(250)]
    return torch.cat([logits for logits, _ in parts]), torch.cat([decisions for _, decisions in parts])
