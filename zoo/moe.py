"""Mixtures of experts for images: a router opens a few of a layer's experts for each sample.

Sources: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", ICLR 2017
(arXiv 1701.06538), for :class:`TopKRouter`; Fedus, Zoph and Shazeer, "Switch Transformers: Scaling to Trillion
Parameter Models with Simple and Efficient Sparsity", JMLR 2022 (arXiv 2101.03961), for :class:`SwitchRouter`. Both
papers route tokens; here a sample is routed by the mean of its feature map.

Published code writes the layer in one of two ways. :class:`MaskedSum` computes every expert on every row and multiplies
by gates that are mostly zero: the reference for what a sample's answer is. :class:`RowDispatch` gathers the rows that
an expert was chosen for, runs it on those and adds the results back: the work is left out, at the price of row counts
that depend on the data. The weights are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from edgekit.data import Dataset
from edgekit.zoo.training import EXITS, Objective

__all__ = [
    "BALANCED",
    "MaskedSum",
    "Mixture",
    "MoEConfig",
    "MoENet",
    "RowDispatch",
    "SwitchRouter",
    "TopKRouter",
    "measure_routing",
    "moe_cifar10_config",
    "moe_digits_config",
    "switch_digits_config",
]

BALANCE_WEIGHT = 0.01
"""Of the balance loss beside the cross-entropy: the value of Fedus et al., section 2.2."""


class TopKRouter(nn.Module):
    """Noisy top-k gating (Shazeer et al., equations 3 to 5): the softmax over the ``active`` largest logits.

    Args:
        channels: of the feature map.
        experts: to choose from.
        active: experts that each sample goes to. Two at least: the softmax over one is 1 whatever its logit, so the
            router would learn nothing.

    Both weight matrices start at zero, as the paper's do (appendix A): at first the noise alone spreads the samples
    over the experts. Until trained, all logits are therefore tied in evaluation mode.

    Unlike the paper's, the router sees its features standardised over the training samples. Here they are means of
    feature maps, in which all samples have much in common; noise covers that in training, and without it the same few
    experts would be the largest for every sample.
    """

    def __init__(self, channels: int, experts: int, *, active: int = 2) -> None:
        super().__init__()
        self.active = active
        self.standardise = nn.BatchNorm1d(channels, affine=False)
        self.score = nn.Linear(channels, experts, bias=False)
        self.noise = nn.Linear(channels, experts, bias=False)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.noise.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gates, and how unevenly they load the experts.

        Args:
            x: feature maps ``(batch, channels, height, width) float32``.

        Returns:
            Gates ``(batch, experts) float32``, ``active`` of each row above zero with sum 1 and the others exactly
            zero; and the squared coefficient of variation of the experts' importance (equations 6 and 7), a scalar.
        """
        features = self.standardise(x.mean((2, 3)))
        logits = self.score(features).float()
        if self.training:
            logits = logits + torch.randn_like(logits) * functional.softplus(self.noise(features).float())
        largest, chosen = logits.topk(self.active, dim=1)
        gates = torch.zeros_like(logits).scatter(1, chosen, largest.softmax(dim=1))
        importance = gates.sum(0)
        return gates, importance.var(unbiased=False) / importance.mean().square()


class SwitchRouter(nn.Module):
    """Top-1 routing, the expert's output scaled by the router's probability (Fedus et al., equations 1 and 2).

    Nothing is dropped: an expert takes every sample that chose it, whatever the paper's capacity factor.

    Args:
        channels: of the feature map.
        experts: to choose from.
    """

    JITTER = 0.01
    """Training multiplies the router's input by noise of this half-width about 1 (Fedus et al., appendix C)."""

    def __init__(self, channels: int, experts: int) -> None:
        super().__init__()
        self.score = nn.Linear(channels, experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gates, and how unevenly they load the experts.

        Args:
            x: feature maps ``(batch, channels, height, width) float32``.

        Returns:
            Gates ``(batch, experts) float32``, the largest probability in each row and exactly zero elsewhere; and the
            auxiliary loss of equations 4 to 6 without its factor, a scalar: 1 when the load is even.
        """
        features = x.mean((2, 3))
        if self.training:
            features = features * torch.empty_like(features).uniform_(1 - self.JITTER, 1 + self.JITTER)
        probabilities = self.score(features).float().softmax(dim=1)
        largest, chosen = probabilities.max(dim=1, keepdim=True)
        gates = torch.zeros_like(probabilities).scatter(1, chosen, largest)
        share = (gates > 0).float().mean(0)
        return gates, probabilities.shape[1] * (share * probabilities.mean(0)).sum()


class Mixture(nn.Module):
    """Experts of one shape behind a router; subclasses say how their outputs are added up.

    Args:
        router: gives gates ``(batch, experts)`` and a balance loss.
        experts: modules that take and give ``(batch, channels, height, width)``.
    """

    def __init__(self, router: nn.Module, experts: list[nn.Module]) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gated sum of the experts ``(batch, channels, height, width) float32``, and the balance loss."""
        gates, balance = self.router(x)
        return self.combine(x, gates), balance

    def combine(self, x: Tensor, gates: Tensor) -> Tensor:
        """Sum over the experts ``e`` of ``gates[:, e]`` times expert ``e`` of ``x``."""
        raise NotImplementedError


class MaskedSum(Mixture):
    """Every expert on every row, times its gate: computes all, and is the reference for the answer."""

    def combine(self, x: Tensor, gates: Tensor) -> Tensor:
        """As :meth:`Mixture.combine`."""
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = y + gates[:, e].view(-1, 1, 1, 1) * expert(x)
        return y


class RowDispatch(Mixture):
    """Each expert on the rows whose gate for it is open, and on nothing when there are none."""

    def combine(self, x: Tensor, gates: Tensor) -> Tensor:
        """As :meth:`Mixture.combine`."""
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            index = gates[:, e].nonzero().squeeze(1)
            out = expert(x.index_select(0, index)) * gates[index, e].view(-1, 1, 1, 1)
            y = y.index_add(0, index, out.to(y.dtype))
        return y


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes of a :class:`MoENet`.

    Args:
        in_channels: channels of the input image.
        classes: number of classes.
        stem: channels at the input's resolution.
        widths: channels of each mixture layer; height and width are halved before each.
        experts: of each mixture layer.
        expansion: channels inside an expert, as a multiple of its width.
        router: makes a layer's router from its channels and its number of experts.
    """

    in_channels: int = 3
    classes: int = 10
    stem: int = 32
    widths: tuple[int, ...] = (32, 64)
    experts: int = 4
    expansion: int = 2
    router: Callable[[int, int], nn.Module] = TopKRouter

    @property
    def exits(self) -> int:
        """One: the classifier at the end."""
        return 1


def moe_cifar10_config() -> MoEConfig:
    """Two of four experts in each of two layers, for 32x32 colour images."""
    return MoEConfig()


def moe_digits_config() -> MoEConfig:
    """Two of four experts in each of two layers, for scikit-learn's 8x8 grey digits."""
    return MoEConfig(in_channels=1, stem=8, widths=(16, 32))


def switch_digits_config() -> MoEConfig:
    """One of four experts in each of two layers, for scikit-learn's 8x8 grey digits."""
    return MoEConfig(in_channels=1, stem=8, widths=(16, 32), router=SwitchRouter)


def _expert(width: int, expansion: int) -> nn.Module:
    """Two convolutions. No batch statistics inside: they would depend on which rows an expert was chosen for."""
    return nn.Sequential(
        nn.Conv2d(width, expansion * width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(expansion * width, width, 3, padding=1),
    )


def _conv(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class _Layer(nn.Module):
    """Halves the resolution, then adds the mixture's output to what it was given."""

    def __init__(self, inputs: int, width: int, config: MoEConfig, mixture: type[Mixture]) -> None:
        super().__init__()
        self.down = _conv(inputs, width, stride=2)
        self.mixture = mixture(
            config.router(width, config.experts), [_expert(width, config.expansion) for _ in range(config.experts)]
        )
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.down(x)
        y, balance = self.mixture(x)
        return functional.relu(self.norm(x + y)), balance


class MoENet(nn.Module):
    """Convolutional classifier whose work lies in its experts.

    Args:
        config: the sizes.
        mixture: how the experts are added up: :class:`MaskedSum` or :class:`RowDispatch`. The weights are the same.
    """

    def __init__(self, config: MoEConfig, *, mixture: type[Mixture] = MaskedSum) -> None:
        super().__init__()
        self.config = config
        self.stem = _conv(config.in_channels, config.stem, stride=1)
        before = (config.stem, *config.widths)
        self.layers = nn.ModuleList(
            _Layer(inputs, width, config, mixture) for inputs, width in zip(before, config.widths, strict=False)
        )
        self.classifier = nn.Linear(config.widths[-1], config.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes) float32`` of images ``(batch, in_channels, height, width) float32``."""
        return self.routed(x)[0]

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the sum of the layers' balance losses, a scalar."""
        x = self.stem(x)
        balances = []
        for layer in self.layers:
            x, balance = layer(x)
            balances.append(balance)
        return self.classifier(x.mean((2, 3))), torch.stack(balances).sum()


def _balanced_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    assert isinstance(model, MoENet)
    logits, balance = model.routed(images)
    return functional.cross_entropy(logits.float(), labels) + BALANCE_WEIGHT * balance


BALANCED = Objective(
    summary=f"Cross-entropy and {BALANCE_WEIGHT} times the balance losses of the routers",
    loss=_balanced_loss,
    logits=EXITS.logits,
)
"""Keeps the router from sending every sample to the experts that happened to learn first."""


@torch.no_grad()
def measure_routing(model: nn.Module, data: Dataset) -> dict[str, float]:
    """Where the samples go: each expert's share of them, and the work of a sample with and without closed experts."""
    assert isinstance(model, MoENet)
    gates: list[Tensor] = []
    mixtures = [module for module in model.modules() if isinstance(module, Mixture)]
    hooks = [each.router.register_forward_hook(lambda _, __, out: gates.append(out[0])) for each in mixtures]
    for images in data.batches(250):
        model.eval()(torch.from_numpy(images))
    for hook in hooks:
        hook.remove()
    figures = {}
    for number in range(len(mixtures)):
        opened = torch.cat(gates[number :: len(mixtures)]) > 0
        for e, share in enumerate(opened.float().mean(0).tolist()):
            figures[f"mixture {number + 1}, share of samples that expert {e} runs on"] = share
    for what, mixture in (("all experts", MaskedSum), ("open experts only", RowDispatch)):
        form = MoENet(model.config, mixture=mixture).eval()
        form.load_state_dict(model.state_dict())
        with FlopCounterMode(display=False) as counter:
            form(torch.from_numpy(data.batch(slice(0, 1))))
        figures[f"MACs of a sample, {what}"] = counter.get_total_flops() / 2
    return figures
