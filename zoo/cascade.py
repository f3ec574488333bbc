"""A cascade: a small detector that turns most frames away, and a recogniser that sees only what it lets pass.

Source: Viola and Jones, "Rapid Object Detection using a Boosted Cascade of Simple Features", CVPR 2001: section 4
trains every stage of a cascade on the samples that the stages before it let pass. Here the stages are convolutional,
and there are two, as in a camera that wakes a larger network when there is something to see.

The recogniser standardises each image by itself, as Krizhevsky's CIFAR networks do. What is turned away, black frames
with a few hot pixels, would be far from anything that it was trained on: a hot pixel is up to 32 standard deviations
from the mean, where a photograph's pixels stay within 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.data import Dataset
from edgekit.zoo.resnet import ResNet, ResNetConfig, conv3x3
from edgekit.zoo.training import EXITS, Objective

__all__ = ["NOTHING", "PASSED_ON", "Cascade", "CascadeConfig", "night_frames", "standardise", "with_nights"]

NOTHING = "nothing"
"""Name of the class of frames without an object; its label is the last."""
HOT_PIXELS = 3
"""At most, in a night frame; one at least."""


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """Sizes of a :class:`Cascade`.

    Args:
        thumbnail: height and width of the image that the detector looks at.
        channels: of the detector's convolutions.
        recogniser: sizes of the recogniser; its classes are those of objects.
    """

    thumbnail: int = 8
    channels: int = 8
    recogniser: ResNetConfig = field(default_factory=lambda: ResNetConfig(blocks=(2, 2, 2)))

    @property
    def exits(self) -> int:
        """Two: the detector and the recogniser."""
        return 2


class Detector(nn.Module):
    """Whether there is anything in a frame, from a thumbnail of it."""

    def __init__(self, config: CascadeConfig) -> None:
        super().__init__()
        self.thumbnail = nn.AdaptiveAvgPool2d(config.thumbnail)
        self.features = nn.Sequential(
            conv3x3(3, config.channels),
            nn.BatchNorm2d(config.channels),
            nn.ReLU(),
            conv3x3(config.channels, config.channels, stride=2),
            nn.BatchNorm2d(config.channels),
            nn.ReLU(),
        )
        self.fc = nn.Linear(config.channels * ((config.thumbnail + 1) // 2) ** 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logarithms of the probabilities of something and of nothing, ``(batch, 2) float32``."""
        return functional.log_softmax(self.fc(self.features(self.thumbnail(x)).flatten(1)), dim=1)


def standardise(x: Tensor) -> Tensor:
    """Each image with mean 0 and variance 1 over all its pixels; a plain one becomes 0.

    The standard deviation counts as at least one over the root of the number of values, as in TensorFlow's
    ``per_image_standardization``.

    Args:
        x: ``(batch, channels, height, width) float32``, pixels over 255.
    """
    centred = x - x.mean((1, 2, 3), keepdim=True)
    deviation = torch.sqrt((centred * centred).mean((1, 2, 3), keepdim=True))
    return centred / torch.clamp(deviation, min=1 / math.sqrt(math.prod(x.shape[1:])))


class Cascade(nn.Module):
    """Forward returns the logits of the detector and of both together: logarithms of the classes' probabilities.

    The detector tells no object from another, so that to it all are as likely. The last logits are of the joint
    probability: something, and which.

    Args:
        config: the sizes.
    """

    def __init__(self, config: CascadeConfig) -> None:
        super().__init__()
        self.config = config
        self.detector = Detector(config)
        self.recogniser = ResNet(config.recogniser)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(batch, classes + 1) float32`` of images ``(batch, 3, height, width) float32``, nothing last."""
        something, nothing = self.detector(x).split(1, dim=1)
        classes = self.config.recogniser.classes
        any_object = (something - math.log(classes)).expand(-1, classes)
        objects = something + functional.log_softmax(self.recogniser(standardise(x)), dim=1)
        return [torch.cat([any_object, nothing], dim=1), torch.cat([objects, nothing], dim=1)]


def _passed_on(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    assert isinstance(model, Cascade)
    detected = model.detector(images)
    empty = (labels == model.config.recogniser.classes).long()
    loss = functional.nll_loss(detected.float(), empty)
    # Objects alone have a class; a night that is let pass has none to learn.
    rows = ((detected[:, 1] < math.log(0.5)) & (empty == 0)).nonzero()[:, 0]
    if len(rows) < 2:  # too few to normalise over
        return loss
    recognised = model.recogniser(standardise(images[rows]))
    return loss + functional.cross_entropy(recognised.float(), labels[rows])


PASSED_ON = Objective(
    summary="Cross-entropy of the detector, and of the recogniser on the objects that the detector lets pass",
    loss=_passed_on,
    logits=EXITS.logits,
)
"""How a cascade is trained: each stage on what reaches it."""


def night_frames(count: int, *, size: int, seed: int) -> np.ndarray:
    """Generated frames of a camera in the dark: black, with one to :data:`HOT_PIXELS` hot pixels of its sensor.

    Returns:
        ``(count, size, size, 3) uint8``; hot pixels are grey, between 128 and 255.
    """
    rng = np.random.default_rng(seed)
    frames = np.zeros((count, size, size, 3), dtype=np.uint8)
    for frame in frames:
        many = rng.integers(1, HOT_PIXELS + 1)
        rows, columns = rng.integers(0, size, (2, many))
        frame[rows, columns] = rng.integers(128, 256, (many, 1))
    return frames


def with_nights(data: Dataset, *, seed: int) -> Dataset:
    """The images, and among them as many night frames, whose label is one above the last class; in random order."""
    images, labels = np.asarray(data.inputs), data.labels
    assert labels is not None
    nights = night_frames(len(images), size=images.shape[1], seed=seed)
    order = np.random.default_rng(seed).permutation(2 * len(images))
    return Dataset(
        inputs=np.concatenate([images, nights])[order],
        labels=np.concatenate([labels, np.full(len(nights), len(data.classes), dtype=labels.dtype)])[order],
        classes=(*data.classes, NOTHING),
        source=f"{data.source} and as many generated night frames",
        preprocess=data.preprocess,
    )
