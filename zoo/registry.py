"""The zoo's networks by name: how each is built, what it was trained on, and where its weights lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edgekit.data import Dataset, Preprocess, load_dataset
from edgekit.errors import TrainingError
from edgekit.progress import Progress, silent
from edgekit.zoo import digits
from edgekit.zoo.msdnet import MSDNet, MSDNetConfig, cifar10_config, digits_config
from edgekit.zoo.training import Recipe
from edgekit.zoo.weight_files import load_weights

__all__ = ["NETWORKS", "WEIGHTS", "Network", "find", "load"]

WEIGHTS = Path(__file__).parent / "weights"
"""Trained weights that come with edgekit: ``NAME.safetensors``, and ``NAME.md``, the model card."""

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Class names in label order: alphabetical, as image folders are read."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """One trainable network.

    Attributes:
        name: what the command line calls it.
        summary: what it is, in a line.
        config: its sizes.
        input_shape: of one sample: ``(channels, height, width)``, float32.
        preprocess: how images become its input.
        classes: class names in label order.
        recipe: how it is trained.
        files: what the folder given as ``--data`` must hold, training set first; empty when no folder is needed.
        read: training set and test set, from that folder.
        source: where the data come from and under which licence.
        caveat: what makes the card's accuracies less than a fair estimate, in a sentence.
    """

    name: str
    summary: str
    config: MSDNetConfig
    input_shape: tuple[int, int, int]
    preprocess: Preprocess
    classes: tuple[str, ...]
    recipe: Recipe
    files: tuple[str, ...] = ()
    read: Callable[[Path, Progress], tuple[Dataset, Dataset]]
    source: str
    caveat: str = ""

    def build(self) -> nn.Module:
        """The untrained network; its weights depend on the recipe's seed alone."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.recipe.seed)
            return MSDNet(self.config)

    def data(self, folder: Path | None, *, progress: Progress = silent) -> tuple[Dataset, Dataset]:
        """Training set and test set.

        Raises:
            TrainingError: ``folder`` is missing, is not needed, or does not hold what it must.
            DataError: a file in it cannot be read.
        """
        if not self.files:
            if folder is not None:
                raise TrainingError(f"{self.name} is trained on {self.source.partition(',')[0]}: leave out --data")
            return self.read(Path(), progress)
        if folder is None:
            raise TrainingError(f"{self.name} needs --data FOLDER, which holds {' and '.join(self.files)}")
        missing = [file for file in self.files if not (folder / file).exists()]
        if missing:
            raise TrainingError(f"{folder}: holds no {missing[0]}, which {self.name} is trained on")
        return self.read(folder, progress)

    def example(self) -> torch.Tensor:
        """Two samples of noise, ``(2, channels, height, width) float32``: what an export traces with."""
        return torch.randn((2, *self.input_shape), generator=torch.Generator().manual_seed(0))


_CIFAR10_PREPROCESS = Preprocess(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), size=(32, 32))


def _read_cifar10(folder: Path, progress: Progress) -> tuple[Dataset, Dataset]:
    train, test = (
        load_dataset(folder / file, preprocess=_CIFAR10_PREPROCESS, progress=progress)
        for file in ("train.tar.gz", "test.tar.gz")
    )
    return train, test


NETWORKS = {
    network.name: network
    for network in (
        Network(
            name="msdnet-cifar10",
            summary="MSDNet with 5 exits for 32x32 colour images",
            config=cifar10_config(),
            input_shape=(3, 32, 32),
            preprocess=_CIFAR10_PREPROCESS,
            classes=CIFAR10_CLASSES,
            recipe=Recipe(epochs=12, batch=128, peak_learning_rate=0.1, crop=4, flip=True, bfloat16=True, seed=0),
            files=("train.tar.gz", "test.tar.gz"),
            read=_read_cifar10,
            source="CIFAR-10 (A. Krizhevsky, 'Learning Multiple Layers of Features from Tiny Images', 2009), "
            "as image folders in class-name/image.png order; the dataset's authors state no licence",
        ),
        Network(
            name="msdnet-digits",
            summary="MSDNet with 3 exits for 8x8 grey digits",
            config=digits_config(),
            input_shape=(1, 8, 8),
            preprocess=digits.PREPROCESS,
            classes=digits.CLASSES,
            recipe=Recipe(epochs=40, batch=64, peak_learning_rate=0.1, crop=1, seed=0),
            read=lambda folder, progress: (digits.training_set(), digits.test_set()),
            source="scikit-learn's bundled digits, from 'Optical Recognition of Handwritten Digits' "
            "(E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998; CC BY 4.0)",
            caveat="The network's sizes were chosen among eight tried, looking at the accuracies of its exits, and of "
            "policies calibrated on it, on these same test images: take the figures, and what a demo measures on "
            "these images, as optimistic.",
        ),
    )
}
"""Every network, by name."""


def find(name: str) -> Network:
    """The network of that name.

    Raises:
        TrainingError: there is none.
    """
    try:
        return NETWORKS[name]
    except KeyError:
        raise TrainingError(f"the zoo has no network '{name}' (it has {', '.join(NETWORKS)})") from None


def load(name: str, *, weights: str | Path | None = None) -> nn.Module:
    """A trained network in evaluation mode.

    Args:
        name: of the network.
        weights: a ``.safetensors`` file; the one that comes with edgekit where not given.

    Raises:
        TrainingError: no such network, or no weights; the message says how to train them.
    """
    network = find(name)
    path = WEIGHTS / f"{name}.safetensors" if weights is None else Path(weights)
    if not path.exists():
        data = " --data FOLDER" if network.files else ""
        raise TrainingError(f"{path}: no such weights; train them: edgekit zoo train {name}{data} --output FOLDER")
    model = network.build()
    load_weights(model, path)
    return model.eval()
