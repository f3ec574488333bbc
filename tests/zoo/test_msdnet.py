from __future__ import annotations

import pytest
import torch

from edgekit.zoo.msdnet import MSDNet, MSDNetConfig, cifar10_config, digits_config


@pytest.mark.parametrize(
    ("config", "shape"), [(cifar10_config(), (3, 32, 32)), (digits_config(), (1, 8, 8))], ids=["cifar10", "digits"]
)
def test_every_exit_gives_logits(config, shape):
    model = MSDNet(config).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, *shape))
    assert [tuple(each.shape) for each in logits] == [(2, config.classes)] * config.exits
    assert all(torch.isfinite(each).all() for each in logits)


@pytest.mark.parametrize(("config", "parameters"), [(cifar10_config(), 1_899_170), (digits_config(), 39_996)])
def test_parameter_count(config, parameters):
    """Pinned: another count would make every trained weight file useless."""
    assert sum(weight.numel() for weight in MSDNet(config).parameters()) == parameters


def test_a_row_does_not_depend_on_its_batch():
    model = MSDNet(digits_config()).eval()
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        whole, alone = model(x), model(x[2:3])
    for batched, single in zip(whole, alone, strict=True):
        torch.testing.assert_close(batched[2:3], single, rtol=1e-4, atol=1e-5)


def test_later_blocks_do_not_reach_earlier_exits():
    model = MSDNet(digits_config()).eval()
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        before = model(x)
        for weight in model.blocks[1].parameters():
            weight.add_(1.0)
        after = model(x)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_scales_are_dropped_on_the_way():
    config = MSDNetConfig(base=3, step=3, exits=3)
    model = MSDNet(config).eval()
    with torch.no_grad():
        maps = model.stem(torch.randn(1, 3, 32, 32))
        counts = []
        for block in model.blocks:
            maps = block(maps)
            counts.append([tuple(each.shape[2:]) for each in maps])
    assert counts == [[(32, 32), (16, 16), (8, 8)], [(16, 16), (8, 8)], [(8, 8)]]
