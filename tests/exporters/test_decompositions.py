"""Operators that few targets have: decomposed as eager PyTorch computes them, and left where they cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from edgekit.errors import CaptureError
from edgekit.exporters.capture import capture
from edgekit.exporters.decompositions import decompositions


class Behind(nn.Module):
    """A layer between a convolution and a head; ``pair`` gives it two inputs."""

    def __init__(self, layer, *, pair=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.layer, self.head, self.pair = nn.Conv2d(3, 6, 3), layer, nn.LazyLinear(5), pair

    def forward(self, x):
        y = self.conv(x)
        if self.pair:
            y = y.mean((2, 3))
            return self.head(self.layer(y, y * 2))
        return self.head(self.layer(y).flatten(1))


X = torch.randn(3, 3, 11, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("layer", "operator"),
    [
        (nn.AdaptiveMaxPool2d(3), "adaptive_max_pool2d"),
        (nn.AdaptiveMaxPool2d((4, 7)), "adaptive_max_pool2d"),
        (nn.AdaptiveMaxPool2d((13, 2)), "adaptive_max_pool2d"),
        (nn.LocalResponseNorm(3), "avg_pool3d"),
        (nn.LocalResponseNorm(4, alpha=0.5, beta=0.6, k=2.0), "avg_pool3d"),
        (nn.RReLU(), "rrelu"),
        (nn.RReLU(0.05, 0.6), "rrelu"),
        (nn.Bilinear(6, 6, 4), "bilinear"),
        (nn.Bilinear(6, 6, 4, bias=False), "bilinear"),
    ],
)
def test_the_graph_is_without_it_and_answers_the_same(layer, operator):
    model = Behind(layer, pair=isinstance(layer, nn.Bilinear)).eval()
    with torch.no_grad():
        expected = model(X)
    captured = capture(model, (X[:2],), {})
    assert operator not in str(captured.program.graph)
    with torch.no_grad():
        (made,) = pytree.tree_leaves(captured.program.module()(X))
    torch.testing.assert_close(made, expected)


def exported(module, x):
    return torch.export.export(module.eval(), (x,), strict=False).graph


def test_places_that_are_read_are_not_taken_away():
    class Places(nn.Module):
        def forward(self, x):
            return nn.functional.adaptive_max_pool2d(x, 3, return_indices=True)

    assert not decompositions(exported(Places(), X))
    assert decompositions(exported(nn.AdaptiveMaxPool2d(3), X))


def test_a_mean_over_more_than_channels_stays():
    volume = torch.randn(2, 3, 6, 7, 8)
    assert not decompositions(exported(nn.AvgPool3d(2), volume))
    assert not decompositions(exported(nn.AvgPool3d((3, 1, 1), stride=(2, 1, 1)), volume))
    assert not decompositions(exported(nn.AvgPool3d((3, 1, 1), stride=1, padding=(1, 0, 0)), volume))
    assert decompositions(exported(nn.AvgPool3d((3, 1, 1), stride=1), volume))


def test_random_slopes_are_refused_as_before():
    class Random(nn.Module):
        def forward(self, x):
            return nn.functional.rrelu(x, training=True)

    with pytest.raises(CaptureError, match="samples at random"):
        capture(Behind(Random()).eval(), (X[:2],), {})
