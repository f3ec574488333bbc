"""The model card: what a trained network is, what it was trained on and how, and how well every exit does."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path

import msgspec
import torch

from edgekit.errors import TrainingError
from edgekit.zoo.registry import Network
from edgekit.zoo.training import Recipe

__all__ = ["Training", "shown", "write_card"]


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished training leaves for the record.

    Attributes:
        network: name in the registry.
        accuracy: of every exit on the test set, after the last epoch.
        parameters: trainable weights.
        training_samples: images trained on.
        test_samples: images that the accuracy was taken on.
        duration_s: seconds of training, those before a resume included.
        measures: other figures on those images, by what they count.
    """

    network: str
    accuracy: tuple[float, ...]
    parameters: int
    training_samples: int
    test_samples: int
    duration_s: float
    measures: dict[str, float] = {}


def write_card(network: Network, training: Training, path: Path, *, recipe: Recipe) -> Path:
    """Write the card as Markdown, aside and renamed.

    Args:
        network: what was trained.
        training: how it went.
        path: file to write.
        recipe: as it was used.

    Raises:
        TrainingError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(_markdown(network, training, recipe), encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def _markdown(network: Network, training: Training, recipe: Recipe) -> str:
    exits = "\n".join(f"| {index} | {value:.2%} |" for index, value in enumerate(training.accuracy, start=1))
    settings = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in asdict(recipe).items())
    normalisation = f"`(pixel / 255 - mean) / std`, mean {network.preprocess.mean}, std {network.preprocess.std}"
    data = " --data FOLDER" if network.files else ""
    epochs = "" if recipe == network.recipe else f" --epochs {recipe.epochs}"
    caveat = f"\n\n{network.caveat}" if network.caveat else ""
    start = f", from the weights of {network.backbone}" if network.backbone else ""
    return f"""# {network.name}

{network.summary}. Architecture: {network.architecture.__module__.rpartition(".")[2]}.py, after {network.paper}.
It is a reference network for trying edgekit, not a product.

| | |
|---|---|
| parameters | {training.parameters:,} |
| input | `(batch, {", ".join(map(str, network.input_shape))}) float32`, {normalisation} |
| classes | {", ".join(network.classes)} |
| exits | {len(training.accuracy)}, each `(batch, {len(network.classes)}) float32` logits |

## Accuracy on the {training.test_samples:,} test images

| exit | accuracy |
|---:|---:|
{exits}

The weights are those of the last epoch, whatever its accuracy. Evaluated in float32.{caveat}
{_measures(training)}
## Data

{network.source}. {training.training_samples:,} images for training, {training.test_samples:,} for the test.

## Recipe

{network.objective.summary}, stochastic gradient descent with Nesterov momentum, one learning-rate cycle{start}.

| setting | value |
|---|---|
{settings}

Seed {recipe.seed} fixes the weights before training, the order of the images and their augmentation. Training took
{training.duration_s:,.0f} s on a CPU ({_machine()}). Do it again with

```
edgekit zoo train {network.name}{data}{epochs} --output FOLDER
```

## Licence

The weights come with edgekit under Apache-2.0. The data keep the terms of their source, named above.
"""


def shown(value: float) -> str:
    """A figure as the card has it: four digits, large counts whole."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _measures(training: Training) -> str:
    if not training.measures:
        return ""
    rows = "\n".join(f"| {what} | {shown(value)} |" for what, value in training.measures.items())
    return f"\n| on the {training.test_samples:,} test images | |\n|---|---:|\n{rows}\n"


def _machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__.partition('+')[0]}"
