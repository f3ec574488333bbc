"""Residual networks for 32x32 images: the plain backbone that the layer-skipping networks start from.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385), section 4.2,
with 1x1 convolutions where the shape changes (the paper's option B), as Wang et al. (arXiv 1711.09485) use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["BasicBlock", "ResNet", "ResNetConfig", "conv3x3", "downsampler", "initialise"]


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Sizes of a residual network of ``2 * sum(blocks) + 2`` layers.

    Args:
        blocks: in each of the three groups; the second and third group halve height and width.
        widths: channels of each group.
        classes: number of classes.
    """

    blocks: tuple[int, int, int] = (6, 6, 6)
    widths: tuple[int, int, int] = (16, 32, 64)
    classes: int = 10

    @property
    def exits(self) -> int:
        """One: the classifier at the end."""
        return 1


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution with padding and no bias."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)


def downsampler(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """1x1 convolution and batch normalisation for a shortcut whose shape changes; ``None`` where it does not."""
    if stride == 1 and inputs == outputs:
        return None
    convolution = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def initialise(model: nn.Module) -> None:
    """He initialisation of every convolution; batch normalisation starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; the ReLU comes after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, inputs, height, width) float32`` to ``(batch, outputs, height / stride, width / stride)``."""
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class ResNet(nn.Module):
    """Plain residual network: a stem, three groups of blocks, pooling, a linear classifier.

    Args:
        config: the sizes.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        blocks, widths = config.blocks, config.widths
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _group(widths[0], widths[0], blocks[0], stride=1)
        self.layer2 = _group(widths[0], widths[1], blocks[1], stride=2)
        self.layer3 = _group(widths[1], widths[2], blocks[2], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], config.classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes) float32`` of images ``(batch, 3, 32, 32) float32``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _group(inputs: int, outputs: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride, downsampler(inputs, outputs, stride))
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))
