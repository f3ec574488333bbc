"""Adaptive computation time: one step with shared weights, repeated until the network itself has had enough.

Source: Graves, "Adaptive Computation Time for Recurrent Neural Networks", 2016 (arXiv 1603.08983), section 2. Each
sample has a single input here, an image, so that the recurrent network reduces to its inner loop.

After every step a halting unit gives a probability; a sample stops when they sum to nearly one, and its answer is the
mean of its states under those probabilities. :class:`ACTNet` computes every step for every sample and multiplies the
updates by a 0/1 mask: the reference for what a sample's answer is. :class:`BreakingACTNet` leaves the loop once every
sample of the batch has halted. The weights are the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.data import Dataset
from edgekit.zoo.training import EXITS, Objective

__all__ = ["PONDERING", "ACTConfig", "ACTNet", "BreakingACTNet", "act_digits_config", "measure_steps"]

PONDER_WEIGHT = 0.05
"""Weight of the ponder cost beside the cross-entropy: the paper's time penalty (section 2.1)."""


@dataclass(frozen=True, kw_only=True)
class ACTConfig:
    """Sizes of an :class:`ACTNet`.

    Args:
        in_channels: channels of the input image.
        classes: number of classes.
        channels: of the state.
        hidden: channels inside a step.
        groups: of the step's normalisation.
        max_steps: after which every sample halts.
        epsilon: a sample halts once its probabilities sum to ``1 - epsilon``, so that one step can be enough.
    """

    in_channels: int = 1
    classes: int = 10
    channels: int = 16
    hidden: int = 32
    groups: int = 4
    max_steps: int = 6
    epsilon: float = 0.01

    @property
    def exits(self) -> int:
        """One: the classifier after the last step."""
        return 1


def act_digits_config() -> ACTConfig:
    """Up to six steps for scikit-learn's 8x8 grey digits."""
    return ACTConfig()


class _Step(nn.Module):
    """One residual step. Normalised over each sample alone: statistics of a batch would differ from step to step."""

    def __init__(self, config: ACTConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config.channels, config.hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(config.hidden, config.channels, 3, padding=1)
        self.norm = nn.GroupNorm(config.groups, config.channels)

    def forward(self, state: Tensor) -> Tensor:
        return functional.relu(self.norm(state + self.conv2(functional.relu(self.conv1(state)))))


class ACTNet(nn.Module):
    """Classifier that takes as many equal steps for a sample as its halting unit asks for; every step is computed.

    Args:
        config: the sizes.
    """

    def __init__(self, config: ACTConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.step = _Step(config)
        self.halting = nn.Linear(config.channels, 1)
        self.classifier = nn.Linear(config.channels, config.classes)
        nn.init.ones_(self.halting.bias)  # few steps at first, as in the paper's experiments

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes) float32`` of images ``(batch, in_channels, height, width) float32``."""
        return self.ponder(x)[0]

    def ponder(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and what they took.

        Args:
            x: images ``(batch, in_channels, height, width) float32``.

        Returns:
            Logits ``(batch, classes) float32``; steps ``N`` and remainder ``R`` of each sample, ``(batch, 1) float32``
            both, as the paper defines them.
        """
        enough = 1 - self.config.epsilon
        state = self.stem(x)
        cumulative = steps = remainder = x.new_zeros(x.shape[0], 1)
        still = torch.ones_like(cumulative)
        answer = x.new_zeros(x.shape[0], self.config.channels)
        for step in range(1, self.config.max_steps + 1):
            if step > 1:
                still = (cumulative < enough).float()
                if self.finished(still):
                    break
            candidate = self.step(state)
            features = candidate.mean((2, 3))
            probability = left = 1 - cumulative
            if step < self.config.max_steps:  # at the maximum a sample halts, whatever its halting unit says
                halt = torch.sigmoid(self.halting(features))
                probability = torch.where(cumulative + halt < enough, halt, left)
            answer = answer + still * probability * features
            cumulative = cumulative + still * probability
            steps = steps + still
            remainder = still * left + (1 - still) * remainder
            running = still.view(-1, 1, 1, 1)
            state = running * candidate + (1 - running) * state
        return self.classifier(answer), steps, remainder

    def finished(self, still: Tensor) -> bool:
        """Whether to leave the loop, from the mask ``(batch, 1) float32`` of samples that have not halted: never."""
        return False


class BreakingACTNet(ACTNet):
    """The same, written as a loop that ends when every sample of the batch has halted."""

    def finished(self, still: Tensor) -> bool:
        """Whether no sample is left."""
        return not still.any()


def _pondering_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    assert isinstance(model, ACTNet)
    logits, steps, remainder = model.ponder(images)
    # The number of steps is constant almost everywhere; the remainder is what has a gradient (section 2.2).
    cost = (steps + remainder).mean()
    return functional.cross_entropy(logits.float(), labels) + PONDER_WEIGHT * cost


PONDERING = Objective(
    summary=f"Cross-entropy and {PONDER_WEIGHT} times the ponder cost, steps and remainder",
    loss=_pondering_loss,
    logits=EXITS.logits,
)
"""Every further step has to earn its cost."""


@torch.no_grad()
def measure_steps(model: nn.Module, data: Dataset) -> dict[str, float]:
    """How many steps the samples take: the mean, and the share of samples that halt after each."""
    assert isinstance(model, ACTNet)
    steps = torch.cat([model.eval().ponder(torch.from_numpy(images))[1] for images in data.batches(250)])
    shares = {
        f"share of samples that halt after step {step}": float((steps == step).float().mean())
        for step in range(1, model.config.max_steps + 1)
    }
    return {"mean steps of a sample": float(steps.mean()), **shares}
