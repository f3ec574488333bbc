from __future__ import annotations

import pytest
import torch

from edgekit.zoo.resnet import ResNet, ResNetConfig


@pytest.mark.parametrize(("blocks", "layers"), [((6, 6, 6), 38), ((18, 18, 18), 110)])
def test_depth_is_what_the_paper_counts(blocks, layers):
    model = ResNet(ResNetConfig(blocks=blocks))
    weighted = [name for name, each in model.named_modules() if isinstance(each, torch.nn.Conv2d | torch.nn.Linear)]
    assert len([name for name in weighted if "downsample" not in name]) == layers


def test_parameter_count():
    """Pinned: another count would make every trained weight file useless."""
    assert sum(weight.numel() for weight in ResNet(ResNetConfig()).parameters()) == 564_122


def test_logits_of_any_batch():
    model = ResNet(ResNetConfig(blocks=(1, 1, 1), widths=(4, 8, 12), classes=7)).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        whole, alone = model(x), model(x[1:2])
    assert whole.shape == (3, 7)
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-5)
