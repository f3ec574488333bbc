"""Multi-Scale Dense Networks: early exits at every depth, on features that are coarse enough to classify.

Source: Huang, Chen, Li, Wu, van der Maaten, Weinberger, "Multi-Scale Dense Networks for Resource Efficient
Image Classification", ICLR 2018 (arXiv 1703.09844). Section 3 gives the architecture, section 4 the block and
pruning schedule, appendix A the sizes used on CIFAR.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["MSDNet", "MSDNetConfig", "cifar10_config", "digits_config"]


@dataclass(frozen=True, kw_only=True)
class MSDNetConfig:
    """Sizes of an MSDNet.

    Args:
        in_channels: channels of the input image.
        classes: number of classes.
        channels: channels of the finest scale after the stem.
        growth: channels that a layer adds to the finest scale.
        growth_factors: multiple of ``growth`` (and of ``channels``) at each scale, finest first.
        bottleneck_factors: width of a layer's 1x1 bottleneck at each scale, as a multiple of its output width.
        base: layers before the first exit.
        step: layers between two exits.
        exits: number of exits.
        head_channels: width of the two convolutions in an exit head.
        reduction: share of the channels that a transition keeps when the finest scale is dropped.
    """

    in_channels: int = 3
    classes: int = 10
    channels: int = 16
    growth: int = 6
    growth_factors: tuple[int, ...] = (1, 2, 4)
    bottleneck_factors: tuple[int, ...] = (1, 2, 4)
    base: int = 4
    step: int = 2
    exits: int = 5
    head_channels: int = 128
    reduction: float = 0.5


def cifar10_config() -> MSDNetConfig:
    """Five exits on 32x32 colour images: the paper's CIFAR network with an exit every two layers."""
    return MSDNetConfig()


def digits_config() -> MSDNetConfig:
    """Three exits on scikit-learn's 8x8 grey digits: two scales, an exit after 1, 4 and 7 layers."""
    return MSDNetConfig(
        in_channels=1,
        channels=2,
        growth=8,
        growth_factors=(1, 2),
        bottleneck_factors=(1, 2),
        base=1,
        step=3,
        exits=3,
        head_channels=6,
    )


def _conv(inputs: int, outputs: int, *, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation and ReLU, the unit that the paper builds everything from."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _bottlenecked(inputs: int, outputs: int, *, factor: int, stride: int) -> nn.Sequential:
    width = min(inputs, factor * outputs)
    return nn.Sequential(_conv(inputs, width, kernel=1), _conv(width, outputs, kernel=3, stride=stride))


class _Stem(nn.Module):
    """First layer: one feature map per scale, each half as large as the one before."""

    def __init__(self, config: MSDNetConfig) -> None:
        super().__init__()
        widths = [config.channels * factor for factor in config.growth_factors]
        self.scales = nn.ModuleList(
            _conv(before, width, kernel=3, stride=1 if scale == 0 else 2)
            for scale, (before, width) in enumerate(zip([config.in_channels, *widths], widths, strict=False))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for scale in self.scales:
            x = scale(x)
            maps.append(x)
        return maps


class _Layer(nn.Module):
    """One dense layer: every scale keeps its features and gains new ones from itself and the finer scale.

    ``first`` is the finest scale that this layer still produces; its finer neighbour is read, when there is
    one, and then dropped.
    """

    def __init__(self, config: MSDNetConfig, widths: Sequence[int], *, first: int, dropped: bool) -> None:
        super().__init__()
        self.dropped = dropped
        self.same = nn.ModuleList()
        self.down = nn.ModuleList()
        finer: list[int | None] = [None, *range(len(widths) - 1)]
        for index in range(1 if dropped else 0, len(widths)):
            scale = first + index - (1 if dropped else 0)
            added = config.growth * config.growth_factors[scale]
            source = finer[index]
            from_same = added if source is None else added - added // 2
            factor = config.bottleneck_factors[scale]
            self.same.append(_bottlenecked(widths[index], from_same, factor=factor, stride=1))
            if source is not None:
                below = config.bottleneck_factors[scale - 1]
                self.down.append(_bottlenecked(widths[source], added // 2, factor=below, stride=2))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        kept = maps[1:] if self.dropped else maps
        result = []
        for index, (x, same) in enumerate(zip(kept, self.same, strict=True)):
            finer = index if self.dropped else index - 1
            new = [x, same(x)]
            if finer >= 0:
                new.append(self.down[finer](maps[finer]))
            result.append(torch.cat(new, dim=1))
        return result


class _Transition(nn.Module):
    """1x1 convolutions that halve the channels of every scale, after a scale was dropped."""

    def __init__(self, widths: Sequence[int], reduction: float) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_conv(width, int(width * reduction), kernel=1) for width in widths)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [scale(x) for scale, x in zip(self.scales, maps, strict=True)]


class _Head(nn.Module):
    """Exit head on the coarsest scale: two strided convolutions, pooling, a linear classifier."""

    def __init__(self, inputs: int, config: MSDNetConfig) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv(inputs, config.head_channels, kernel=3, stride=2),
            _conv(config.head_channels, config.head_channels, kernel=3, stride=2),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(config.head_channels, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class MSDNet(nn.Module):
    """Multi-scale dense network whose forward returns the logits of every exit.

    Args:
        config: the sizes.

    The network's depth is cut into as many equal parts as there are scales; at the start of each later part the
    finest remaining scale is dropped and a transition halves the channels (the paper's network reduction).
    """

    def __init__(self, config: MSDNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = _Stem(config)
        widths = [config.channels * factor for factor in config.growth_factors]
        depth = config.base + config.step * (config.exits - 1)
        scales = len(config.growth_factors)
        interval = math.ceil(depth / scales)
        self.blocks = nn.ModuleList()
        self.heads = nn.ModuleList()
        layer = 0
        for exit_index in range(config.exits):
            block = nn.Sequential()
            for _ in range(config.base if exit_index == 0 else config.step):
                first = min(layer // interval, scales - 1)
                dropped = len(widths) > scales - first
                block.append(_Layer(config, widths, first=first, dropped=dropped))
                widths = widths[1:] if dropped else widths
                widths = [
                    width + config.growth * config.growth_factors[first + index] for index, width in enumerate(widths)
                ]
                if dropped:
                    block.append(_Transition(widths, config.reduction))
                    widths = [int(width * config.reduction) for width in widths]
                layer += 1
            self.blocks.append(block)
            self.heads.append(_Head(widths[-1], config))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits of every exit, shallowest first.

        Args:
            x: images ``(batch, in_channels, height, width) float32``, normalised as the model card says.

        Returns:
            One ``(batch, classes) float32`` tensor per exit.
        """
        maps = self.stem(x)
        logits = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            maps = block(maps)
            logits.append(head(maps[-1]))
        return logits
