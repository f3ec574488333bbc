"""The zoo's networks by name: how each is built, what it was trained on, and where its weights lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from edgekit.data import Dataset, Preprocess, load_dataset
from edgekit.errors import TrainingError
from edgekit.progress import Progress, silent
from edgekit.zoo import digits
from edgekit.zoo.act import PONDERING, ACTNet, act_digits_config, measure_steps
from edgekit.zoo.blockdrop import BlockDrop, BlockDropConfig
from edgekit.zoo.cascade import NOTHING, PASSED_ON, Cascade, CascadeConfig, with_nights
from edgekit.zoo.moe import (
    BALANCED,
    MoENet,
    measure_routing,
    moe_cifar10_config,
    moe_digits_config,
    switch_digits_config,
)
from edgekit.zoo.msdnet import MSDNet, cifar10_config, digits_config
from edgekit.zoo.resnet import ResNet, ResNetConfig
from edgekit.zoo.skipnet import SkipNet, SkipNetConfig
from edgekit.zoo.skipping import measure_skips, skip_objective
from edgekit.zoo.training import EXITS, Objective, Recipe
from edgekit.zoo.weight_files import load_weights

__all__ = ["NETWORKS", "WEIGHTS", "Network", "find", "load"]

WEIGHTS = Path(__file__).parent / "weights"
"""Trained weights, ``NAME.safetensors``, and ``NAME.md``, the model card. A wheel holds those for digits only."""

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Class names in label order: alphabetical, as image folders are read."""


class Config(Protocol):
    """Sizes of a network; each architecture has its own."""

    @property
    def exits(self) -> int:
        """How many exits the network has."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """One trainable network.

    Attributes:
        name: what the command line calls it.
        summary: what it is, in a line.
        architecture: its class.
        config: its sizes, what the class is called with.
        paper: that describes it: authors, title, venue.
        objective: what it is trained towards.
        backbone: name of the network that it starts from, by its ``start_from``; empty when it starts at random.
        input_shape: of one sample: ``(channels, height, width)``, float32.
        preprocess: how images become its input.
        classes: class names in label order.
        recipe: how it is trained.
        files: what the folder given as ``--data`` must hold, training set first; empty when no folder is needed.
        read: training set and test set, from that folder.
        source: where the data come from and under which licence.
        caveat: what makes the card's accuracies less than a fair estimate, in a sentence.
        measures: figures beside the accuracies, of the trained model on the test set, by what they count.
    """

    name: str
    summary: str
    architecture: Callable[[Any], nn.Module]
    config: Config
    paper: str
    objective: Objective = EXITS
    backbone: str = ""
    input_shape: tuple[int, int, int]
    preprocess: Preprocess
    classes: tuple[str, ...]
    recipe: Recipe
    files: tuple[str, ...] = ()
    read: Callable[[Path, Progress], tuple[Dataset, Dataset]]
    source: str
    caveat: str = ""
    measures: Callable[[nn.Module, Dataset], Mapping[str, float]] = lambda model, data: {}

    def build(self) -> nn.Module:
        """The untrained network; its weights depend on the recipe's seed alone."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.recipe.seed)
            return self.architecture(self.config)

    def start(self) -> nn.Module:
        """What training starts from: the untrained network, with its backbone's weights where it has one.

        Raises:
            TrainingError: the backbone's weights are not there; the message says how to train them.
        """
        model: Any = self.build()
        if self.backbone:
            model.start_from(load(self.backbone))
        return model

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


_MSDNET_PAPER = (
    'Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification", ICLR 2018 '
    "(arXiv 1703.09844)"
)
_RESNET_PAPER = 'He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385)'
_SKIPNET_PAPER = (
    'Wang et al., "SkipNet: Learning Dynamic Routing in Convolutional Networks", ECCV 2018 (arXiv 1711.09485)'
)
_BLOCKDROP_PAPER = 'Wu et al., "BlockDrop: Dynamic Inference Paths in Residual Networks", CVPR 2018 (arXiv 1711.08393)'
_MOE_PAPER = (
    'Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", ICLR 2017 '
    "(arXiv 1701.06538)"
)
_SWITCH_PAPER = (
    'Fedus, Zoph and Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient '
    'Sparsity", JMLR 2022 (arXiv 2101.03961)'
)
_CASCADE_PAPER = 'Viola and Jones, "Rapid Object Detection using a Boosted Cascade of Simple Features", CVPR 2001'
_ACT_PAPER = 'Graves, "Adaptive Computation Time for Recurrent Neural Networks", 2016 (arXiv 1603.08983)'
_CIFAR10_SOURCE = (
    "CIFAR-10 (A. Krizhevsky, 'Learning Multiple Layers of Features from Tiny Images', 2009), "
    "as image folders in class-name/image.png order; the dataset's authors state no licence"
)
_DIGITS_SOURCE = (
    "scikit-learn's bundled digits, from 'Optical Recognition of Handwritten Digits' "
    "(E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998; CC BY 4.0)"
)
_CIFAR10_FILES = ("train.tar.gz", "test.tar.gz")
_CIFAR10_PREPROCESS = Preprocess(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), size=(32, 32))
_PIXELS = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), size=(32, 32))


def _read_cifar10(
    folder: Path, progress: Progress, preprocess: Preprocess = _CIFAR10_PREPROCESS
) -> tuple[Dataset, Dataset]:
    train, test = (load_dataset(folder / file, preprocess=preprocess, progress=progress) for file in _CIFAR10_FILES)
    return train, test


def _read_days_and_nights(folder: Path, progress: Progress) -> tuple[Dataset, Dataset]:
    train, test = _read_cifar10(folder, progress, _PIXELS)
    return with_nights(train, seed=0), with_nights(test, seed=1)


def _read_digits(folder: Path, progress: Progress) -> tuple[Dataset, Dataset]:
    return digits.training_set(), digits.test_set()


_FINETUNED = (
    "The weights were finetuned with blocks left out, so that with every block run they do worse than their backbone, "
    "resnet38-cifar10: compare with the accuracy on its card, too."
)
_FINETUNE = Recipe(
    epochs=7, batch=128, peak_learning_rate=0.05, crop=4, flip=True, bfloat16=True, channels_last=True, seed=0
)

NETWORKS = {
    network.name: network
    for network in (
        Network(
            name="msdnet-cifar10",
            summary="MSDNet with 5 exits for 32x32 colour images",
            architecture=MSDNet,
            config=cifar10_config(),
            paper=_MSDNET_PAPER,
            input_shape=(3, 32, 32),
            preprocess=_CIFAR10_PREPROCESS,
            classes=CIFAR10_CLASSES,
            recipe=Recipe(epochs=12, batch=128, peak_learning_rate=0.1, crop=4, flip=True, bfloat16=True, seed=0),
            files=_CIFAR10_FILES,
            read=_read_cifar10,
            source=_CIFAR10_SOURCE,
        ),
        Network(
            name="msdnet-digits",
            summary="MSDNet with 3 exits for 8x8 grey digits",
            architecture=MSDNet,
            config=digits_config(),
            paper=_MSDNET_PAPER,
            input_shape=(1, 8, 8),
            preprocess=digits.PREPROCESS,
            classes=digits.CLASSES,
            recipe=Recipe(epochs=40, batch=64, peak_learning_rate=0.1, crop=1, seed=0),
            read=_read_digits,
            source=_DIGITS_SOURCE,
            caveat="The network's sizes were chosen among eight tried, looking at the accuracies of its exits, and of "
            "policies calibrated on it, on these same test images: take the figures, and what a demo measures on "
            "these images, as optimistic.",
        ),
        Network(
            name="resnet38-cifar10",
            summary="Plain ResNet of 38 layers for 32x32 colour images, the backbone of SkipNet and BlockDrop",
            architecture=ResNet,
            config=ResNetConfig(),
            paper=_RESNET_PAPER,
            input_shape=(3, 32, 32),
            preprocess=_CIFAR10_PREPROCESS,
            classes=CIFAR10_CLASSES,
            recipe=Recipe(
                epochs=15,
                batch=128,
                peak_learning_rate=0.1,
                crop=4,
                flip=True,
                bfloat16=True,
                channels_last=True,
                seed=0,
            ),
            files=_CIFAR10_FILES,
            read=_read_cifar10,
            source=_CIFAR10_SOURCE,
        ),
        Network(
            name="skipnet38-cifar10",
            summary="SkipNet of 38 layers with feed-forward gates for 32x32 colour images",
            architecture=SkipNet,
            config=SkipNetConfig(gate="ff1"),
            paper=_SKIPNET_PAPER,
            objective=skip_objective(target=0.6, weight=2.0),
            backbone="resnet38-cifar10",
            input_shape=(3, 32, 32),
            preprocess=_CIFAR10_PREPROCESS,
            classes=CIFAR10_CLASSES,
            recipe=replace(_FINETUNE, epochs=5),
            files=_CIFAR10_FILES,
            read=_read_cifar10,
            source=_CIFAR10_SOURCE,
            caveat=_FINETUNED,
            measures=measure_skips,
        ),
        Network(
            name="skipnet38-rnn-cifar10",
            summary="SkipNet of 38 layers with a recurrent gate for 32x32 colour images",
            architecture=SkipNet,
            config=SkipNetConfig(gate="rnn"),
            paper=_SKIPNET_PAPER,
            objective=skip_objective(target=0.6, weight=2.0),
            backbone="resnet38-cifar10",
            input_shape=(3, 32, 32),
            preprocess=_CIFAR10_PREPROCESS,
            classes=CIFAR10_CLASSES,
            recipe=_FINETUNE,
            files=_CIFAR10_FILES,
            read=_read_cifar10,
            source=_CIFAR10_SOURCE,
            caveat=_FINETUNED,
            measures=measure_skips,
        ),
        Network(
            name="blockdrop-cifar10",
            summary="BlockDrop on a ResNet of 38 layers for 32x32 colour images",
            architecture=BlockDrop,
            config=BlockDropConfig(),
            paper=_BLOCKDROP_PAPER,
            objective=skip_objective(target=0.6, weight=2.0),
            backbone="resnet38-cifar10",
            input_shape=(3, 32, 32),
            preprocess=_CIFAR10_PREPROCESS,
            classes=CIFAR10_CLASSES,
            recipe=_FINETUNE,
            files=_CIFAR10_FILES,
            read=_read_cifar10,
            source=_CIFAR10_SOURCE,
            caveat=_FINETUNED,
            measures=measure_skips,
        ),
        Network(
            name="cascade-cifar10",
            summary="Detector, then recogniser, for 32x32 colour images among frames of the night",
            architecture=Cascade,
            config=CascadeConfig(),
            paper=_CASCADE_PAPER,
            objective=PASSED_ON,
            input_shape=(3, 32, 32),
            preprocess=_PIXELS,
            classes=(*CIFAR10_CLASSES, NOTHING),
            recipe=Recipe(
                epochs=10,
                batch=128,
                peak_learning_rate=0.1,
                crop=4,
                flip=True,
                bfloat16=True,
                channels_last=True,
                seed=0,
            ),
            files=_CIFAR10_FILES,
            read=_read_days_and_nights,
            source="Generated night frames, black with up to three hot pixels, among as many images of "
            f"{_CIFAR10_SOURCE}",
            caveat="Half of the images are generated night frames, which the detector tells from all others: of the "
            "objects alone, the second exit has twice its errors, and the first knows none from another.",
        ),
        Network(
            name="moe-cifar10",
            summary="Mixture of experts, 2 of 4 in each of 2 layers, for 32x32 colour images",
            architecture=MoENet,
            config=moe_cifar10_config(),
            paper=_MOE_PAPER,
            objective=BALANCED,
            input_shape=(3, 32, 32),
            preprocess=_CIFAR10_PREPROCESS,
            classes=CIFAR10_CLASSES,
            recipe=Recipe(epochs=10, batch=128, peak_learning_rate=0.1, crop=4, flip=True, bfloat16=True, seed=0),
            files=_CIFAR10_FILES,
            read=_read_cifar10,
            source=_CIFAR10_SOURCE,
            measures=measure_routing,
        ),
        Network(
            name="moe-digits",
            summary="Mixture of experts, 2 of 4 in each of 2 layers, for 8x8 grey digits",
            architecture=MoENet,
            config=moe_digits_config(),
            paper=_MOE_PAPER,
            objective=BALANCED,
            input_shape=(1, 8, 8),
            preprocess=digits.PREPROCESS,
            classes=digits.CLASSES,
            recipe=Recipe(epochs=40, batch=64, peak_learning_rate=0.1, crop=1, seed=0),
            read=_read_digits,
            source=_DIGITS_SOURCE,
            caveat="That the router standardises its features was decided after four tries, looking at the experts' "
            "shares and accuracies on these same test images: take the figures as optimistic.",
            measures=measure_routing,
        ),
        Network(
            name="switch-digits",
            summary="Switch layers, 1 of 4 experts in each of 2, for 8x8 grey digits",
            architecture=MoENet,
            config=switch_digits_config(),
            paper=_SWITCH_PAPER,
            objective=BALANCED,
            input_shape=(1, 8, 8),
            preprocess=digits.PREPROCESS,
            classes=digits.CLASSES,
            recipe=Recipe(epochs=40, batch=64, peak_learning_rate=0.1, crop=1, seed=0),
            read=_read_digits,
            source=_DIGITS_SOURCE,
            measures=measure_routing,
        ),
        Network(
            name="act-digits",
            summary="Adaptive computation time, up to 6 equal steps, for 8x8 grey digits",
            architecture=ACTNet,
            config=act_digits_config(),
            paper=_ACT_PAPER,
            objective=PONDERING,
            input_shape=(1, 8, 8),
            preprocess=digits.PREPROCESS,
            classes=digits.CLASSES,
            recipe=Recipe(epochs=60, batch=64, peak_learning_rate=0.05, crop=1, seed=0),
            read=_read_digits,
            source=_DIGITS_SOURCE,
            caveat="The weight of the ponder cost and the recipe were chosen among eleven tried, looking at accuracy "
            "and steps on these same test images: take the figures as optimistic.",
            measures=measure_steps,
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
        raise TrainingError(
            f"{path}: no such weights; train them: edgekit zoo train {name}{data} --output FOLDER, or take them from "
            "zoo/weights of edgekit's source, which has more than an installed wheel"
        )
    model = network.build()
    load_weights(model, path)
    return model.eval()
