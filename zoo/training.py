"""Trains a zoo network: SGD with one learning-rate cycle, checkpoints, resume; the loss is the network's own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edgekit.data import Dataset
from edgekit.errors import TrainingError

__all__ = ["EXITS", "Objective", "Recipe", "TrainingState", "evaluate", "train"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a network is trained towards, and where the logits are among what its forward returns.

    Attributes:
        summary: the loss in words, for the model card.
        loss: of ``(model, images, labels)``, one number; calls the model itself, so that it may look into it.
        logits: from the forward's outputs, of every exit, each ``(batch, classes) float32``.
    """

    summary: str
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    logits: Callable[[Any], list[Tensor]]


def _exits(outputs: Tensor | list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _exit_losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    exits = _exits(model(images))
    return torch.stack([functional.cross_entropy(logits.float(), labels) for logits in exits]).sum()


EXITS = Objective(summary="Sum of the cross-entropies of all exits", loss=_exit_losses, logits=_exits)
"""For a network whose forward returns the logits of its exits, or of its only one, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained. Two runs with one recipe and one data set see the same batches.

    Args:
        epochs: passes over the training set.
        batch: images per step.
        peak_learning_rate: top of the one-cycle schedule (Smith and Topin 2018).
        momentum: Nesterov momentum.
        weight_decay: L2 penalty on every weight.
        crop: pixels of padding for random crops; 0 leaves images as they are.
        flip: mirror images left to right at random.
        bfloat16: run convolutions in bfloat16 (weights and sums stay in float32).
        channels_last: lay images and weights out channels last; on CPUs the small convolutions here run faster so.
        seed: of weights, order and augmentation.
    """

    epochs: int
    batch: int = 128
    peak_learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop: int = 0
    flip: bool = False
    bfloat16: bool = False
    channels_last: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a training stands: what progress displays show."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    elapsed_s: float
    accuracy: tuple[float, ...] | None = None
    """Accuracy of every exit on the test set, at the end of an epoch."""


def train(
    model: nn.Module,
    data: Dataset,
    *,
    recipe: Recipe,
    test: Dataset,
    checkpoint: Path,
    objective: Objective = EXITS,
    report: Callable[[TrainingState], None] = lambda state: None,
) -> float:
    """Train ``model`` in place.

    A checkpoint is written aside and renamed after each epoch. When ``checkpoint`` exists, training goes on from it.

    Returns:
        Seconds of training, those before a resume included.

    Raises:
        TrainingError: the checkpoint belongs to another recipe, or the loss is no longer finite.
    """
    if data.labels is None or test.labels is None:
        raise TrainingError("training needs labels in the training set and the test set")
    steps = -(-len(data) // recipe.batch)
    model.to(memory_format=_layout(recipe))  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.peak_learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.peak_learning_rate, total_steps=recipe.epochs * steps, pct_start=0.3
    )
    first, spent = 0, 0.0
    if checkpoint.exists():
        first, spent = _resume(checkpoint, recipe, model, optimizer, schedule)
    for epoch in range(first, recipe.epochs):
        started = time.perf_counter()
        model.train()
        for step, loss in enumerate(_losses(model, data, recipe, epoch, objective=objective), start=1):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            state = TrainingState(
                epoch=epoch + 1,
                epochs=recipe.epochs,
                step=step,
                steps=steps,
                loss=loss.item(),
                learning_rate=float(schedule.get_last_lr()[0]),
                elapsed_s=spent + time.perf_counter() - started,
            )
            report(state)
        accuracy = tuple(evaluate(model, test, objective=objective))
        spent += time.perf_counter() - started
        _save(checkpoint, recipe, model, optimizer, schedule, epoch=epoch + 1, elapsed_s=spent)
        report(replace(state, elapsed_s=spent, accuracy=accuracy))
    return spent


def _losses(model: nn.Module, data: Dataset, recipe: Recipe, epoch: int, *, objective: Objective) -> Iterator[Tensor]:
    """The loss of each batch of one epoch, weights as they are when it is asked for.

    Noise that the model or its loss draws depends on seed and epoch alone: a resumed training is the whole one's equal.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(recipe.seed + epoch)
        for images, labels in _augmented(data, recipe, epoch):
            with torch.autocast("cpu", torch.bfloat16) if recipe.bfloat16 else nullcontext():
                loss = objective.loss(model, images.contiguous(memory_format=_layout(recipe)), labels)
            if not torch.isfinite(loss):
                raise TrainingError(f"loss is {loss.item()} in epoch {epoch + 1}: lower the learning rate")
            yield loss


def _layout(recipe: Recipe) -> torch.memory_format:
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, *, objective: Objective = EXITS, batch: int = 250) -> list[float]:
    """Accuracy of every exit on ``data``, in evaluation mode and float32."""
    if data.labels is None:
        raise TrainingError("evaluation needs labels")
    model.eval()
    hits: NDArray[np.int64] | None = None
    for start, inputs in zip(range(0, len(data), batch), data.batches(batch), strict=True):
        logits = objective.logits(model(torch.from_numpy(inputs)))
        labels = torch.from_numpy(data.labels[start : start + batch])
        right = np.asarray([int((exit_logits.argmax(1) == labels).sum()) for exit_logits in logits])
        hits = right if hits is None else hits + right
    assert hits is not None
    return [float(count) / len(data) for count in hits]


def _augmented(data: Dataset, recipe: Recipe, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, augmented batches of one epoch; the same ones whenever the epoch is run again."""
    random = np.random.default_rng((recipe.seed, epoch))
    order = random.permutation(len(data))
    assert data.labels is not None
    for start in range(0, len(order), recipe.batch):
        rows = order[start : start + recipe.batch]
        images = torch.from_numpy(data.batch(rows))
        if recipe.crop:
            images = _random_crop(images, recipe.crop, random)
        if recipe.flip:
            mirrored = torch.from_numpy(random.random(len(rows)) < 0.5)
            images[mirrored] = images[mirrored].flip(-1)
        yield images, torch.from_numpy(data.labels[rows])


def _random_crop(images: Tensor, padding: int, random: np.random.Generator) -> Tensor:
    _, _, height, width = images.shape
    padded = functional.pad(images, [padding] * 4)
    corners = random.integers(0, 2 * padding + 1, size=(len(images), 2))
    return torch.stack(
        [image[:, top : top + height, left : left + width] for image, (top, left) in zip(padded, corners, strict=True)]
    )


def _save(
    path: Path,
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    epoch: int,
    elapsed_s: float,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    state = {
        "recipe": asdict(recipe),
        "epoch": epoch,
        "elapsed_s": elapsed_s,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }
    try:
        torch.save(state, aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _resume(
    path: Path,
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[int, float]:
    try:
        state = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise TrainingError(f"{path}: not a readable checkpoint ({reason}); delete it to start over") from error
    if not isinstance(state, dict) or state.get("recipe") != asdict(recipe):
        raise TrainingError(f"{path}: was trained with another recipe; delete it or choose another folder")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["epoch"], state["elapsed_s"]
