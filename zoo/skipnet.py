"""SkipNet: a gate behind every residual block decides, image by image, whether the next block runs.

Source: Wang, Yu, Dou, Darrell, Gonzalez, "SkipNet: Learning Dynamic Routing in Convolutional Networks", ECCV 2018
(arXiv 1711.09485). Section 3.1 gives the gating modules, section 3.2 the straight-through supervised training. The
forward is written as the authors published it: every block is computed, and multiplied by a hard 0 or 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.zoo.resnet import BasicBlock, ResNet, ResNetConfig, conv3x3, downsampler, initialise
from edgekit.zoo.skipping import hard

__all__ = [
    "FeedforwardGateI",
    "FeedforwardGateII",
    "RNNGate",
    "SkipNet",
    "SkipNetConfig",
    "untrained_skipnet110",
]

EMBEDDING = 10
"""Width of the projection that the recurrent gate reads, and of its state (section 3.1)."""


@dataclass(frozen=True, kw_only=True)
class SkipNetConfig(ResNetConfig):
    """Sizes of a SkipNet: those of its ResNet, and the kind of gate.

    Args:
        gate: ``ff1``, two convolutions on max-pooled features; ``ff2``, one strided convolution, for very deep
            networks; ``rnn``, one LSTM for all blocks.
    """

    gate: Literal["ff1", "ff2", "rnn"] = "ff1"


class FeedforwardGate(nn.Module):
    """What both feed-forward gates end in: global pooling, two logits, a hard choice.

    Args:
        features: what comes before the pooling; keeps the number of channels.
        channels: of the block's output.
    """

    def __init__(self, features: nn.Module, channels: int) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear_layer = nn.Conv2d(channels, 2, kernel_size=1)

    def open(self) -> None:
        """Favour running, by two in the difference of the logits (a probability of 0.88), whatever the features."""
        nn.init.zeros_(self.linear_layer.weight)
        assert self.linear_layer.bias is not None
        with torch.no_grad():
            self.linear_layer.bias.copy_(torch.tensor([-1.0, 1.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the next block runs.

        Args:
            x: output of the block before, ``(batch, channels, height, width) float32``.

        Returns:
            Mask ``(batch, 1, 1, 1) float32`` of zeros and ones, and log-probabilities ``(batch, 2) float32`` of
            skipping and running.
        """
        # The published gate squeezes here, which takes the batch away too when it is 1.
        x = self.linear_layer(self.pool(self.features(x))).flatten(1)
        probability = functional.softmax(x, dim=1)
        logprob = functional.log_softmax(x, dim=1)
        return hard(probability[:, 1]).view(x.size(0), 1, 1, 1), logprob


def _normalised(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class FeedforwardGateI(FeedforwardGate):
    """Max pooling, then two convolutions of which the second is strided (figure 3a)."""

    def __init__(self, channels: int) -> None:
        convolutions = [*_normalised(channels, channels), *_normalised(channels, channels, stride=2)]
        super().__init__(nn.Sequential(nn.MaxPool2d(2), *convolutions), channels)


class FeedforwardGateII(FeedforwardGate):
    """One strided convolution (figure 3b)."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Sequential(*_normalised(channels, channels, stride=2)), channels)


class RNNGate(nn.Module):
    """Recurrent gate: one LSTM walks along the blocks and keeps its state in ``hidden`` (figure 3c).

    Attributes:
        hidden: hidden and cell state, each ``(1, batch, EMBEDDING) float32``; fresh at the start of every forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(EMBEDDING, EMBEDDING)
        self.hidden: tuple[Tensor, Tensor] | None = None
        self.proj = nn.Linear(EMBEDDING, 1)
        self.prob = nn.Sigmoid()

    def open(self) -> None:
        """Favour running, by two in the logit (a probability of 0.88), whatever the features."""
        nn.init.zeros_(self.proj.weight)
        nn.init.constant_(self.proj.bias, 2.0)

    def init_hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros, on the device of ``x`` and one row for each of its rows."""
        return (
            torch.zeros(1, x.size(0), EMBEDDING, device=x.device),
            torch.zeros(1, x.size(0), EMBEDDING, device=x.device),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the next block runs.

        Args:
            x: pooled and projected output of the block before, ``(batch, EMBEDDING, 1, 1) float32``.

        Returns:
            Mask ``(batch, 1, 1, 1) float32`` of zeros and ones, and the probability ``(batch, 1) float32`` of running.
        """
        batch_size = x.size(0)
        out, self.hidden = self.rnn(x.view(1, batch_size, -1), self.hidden)
        prob = self.prob(self.proj(out.view(batch_size, -1)))
        return hard(prob).view(batch_size, 1, 1, 1), prob


class SkipNet(nn.Module):
    """Residual network with a gate behind every block; forward returns logits, masks and gate probabilities.

    Blocks, gates and down-samplers are registered as the authors do: ``group1_layer0``, ``group1_gate0`` and
    ``group1_ds0`` for the first of each. A down-sampler is thus registered twice, in its block and in the network.

    Args:
        config: the sizes.

    Attributes:
        force_open: every mask is 1, whatever its gate says: the all-on reference that skipping is compared with.
    """

    group1_layer0: BasicBlock

    def __init__(self, config: SkipNetConfig) -> None:
        super().__init__()
        self.config = config
        self.force_open = False
        widths = config.widths
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self._make_group(widths[0], widths[0], group=1, stride=1)
        self._make_group(widths[0], widths[1], group=2, stride=2)
        self._make_group(widths[1], widths[2], group=3, stride=2)
        self.control = RNNGate() if config.gate == "rnn" else None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], config.classes)
        initialise(self)

    def _make_group(self, inputs: int, outputs: int, *, group: int, stride: int) -> None:
        for block in range(self.config.blocks[group - 1]):
            downsample = downsampler(inputs, outputs, stride) if block == 0 else None
            layer = BasicBlock(inputs, outputs, stride, downsample) if block == 0 else BasicBlock(outputs, outputs)
            setattr(self, f"group{group}_ds{block}", downsample)
            setattr(self, f"group{group}_layer{block}", layer)
            setattr(self, f"group{group}_gate{block}", self._make_gate(outputs))

    def _make_gate(self, channels: int) -> nn.Module:
        if self.config.gate == "rnn":
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, EMBEDDING, kernel_size=1))
        return FeedforwardGateI(channels) if self.config.gate == "ff1" else FeedforwardGateII(channels)

    def _gate(self, x: Tensor, *, group: int, block: int) -> tuple[Tensor, Tensor]:
        gate = getattr(self, f"group{group}_gate{block}")
        mask, gprob = gate(x) if self.control is None else self.control(gate(x))
        return (torch.ones_like(mask) if self.force_open else mask), gprob

    def start_from(self, backbone: ResNet) -> None:
        """Take over the weights of a plain ResNet of the same sizes, with every gate open.

        Gates that start at random would close half of the blocks of a network that was never trained without them.
        """
        for name in ("conv1", "bn1", "fc"):
            getattr(self, name).load_state_dict(getattr(backbone, name).state_dict())
        for group, layers in enumerate((backbone.layer1, backbone.layer2, backbone.layer3), start=1):
            for block, layer in enumerate(layers):
                getattr(self, f"group{group}_layer{block}").load_state_dict(layer.state_dict())
        for gate in self.modules():
            if isinstance(gate, FeedforwardGate | RNNGate):
                gate.open()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits, masks and gate outputs.

        Args:
            x: images ``(batch, 3, 32, 32) float32``, normalised as the model card says.

        Returns:
            Logits ``(batch, classes) float32``; for every block but the first its mask ``(batch,) float32``, 1 where
            it ran; and what each gate thought: log-probabilities ``(batch, 2) float32`` (feed-forward) or the
            probability of running ``(batch, 1) float32`` (recurrent). As published, the last block is followed by
            a gate whose probability is returned and whose mask nothing uses.
        """
        x = self.relu(self.bn1(self.conv1(x)))
        if self.control is not None:
            self.control.hidden = self.control.init_hidden(x)
        masks = []
        gprobs = []
        x = self.group1_layer0(x)
        mask, gprob = self._gate(x, group=1, block=0)
        masks.append(mask.flatten())
        gprobs.append(gprob)
        prev = x
        for group, blocks in enumerate(self.config.blocks, start=1):
            for block in range(1 if group == 1 else 0, blocks):
                downsample = getattr(self, f"group{group}_ds{block}")
                if downsample is not None:
                    prev = downsample(prev)
                x = getattr(self, f"group{group}_layer{block}")(x)
                prev = x = mask.expand_as(x) * x + (1 - mask).expand_as(prev) * prev
                mask, gprob = self._gate(x, group=group, block=block)
                masks.append(mask.flatten())
                gprobs.append(gprob)
        # The mask of the last gate has no block to be used on.
        del masks[-1]
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x), masks, gprobs

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(batch, classes) float32`` and masks ``(batch, gates) float32``, for training and measuring."""
        logits, masks, _ = self(x)
        return logits, torch.stack(masks, dim=1)


def untrained_skipnet110(*, seed: int = 0) -> SkipNet:
    """SkipNet of 110 layers, 54 blocks and gates, in evaluation mode: a deep graph to try tools on, never trained.

    The paper gives a network this deep the lighter gate. Weights are random; batch normalisation has the statistics
    of noise, without which activations would double from block to block.
    """
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(seed)
        model = SkipNet(SkipNetConfig(blocks=(18, 18, 18), gate="ff2"))
        normalisations = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [module.momentum for module in normalisations]
        for module in normalisations:
            module.momentum = 1.0
        model(torch.randn(8, 3, 32, 32))
        for module, momentum in zip(normalisations, momenta, strict=True):
            module.momentum = momentum
    return model.eval()
