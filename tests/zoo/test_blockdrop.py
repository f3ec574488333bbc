from __future__ import annotations

import pytest
import torch

from edgekit.zoo.blockdrop import BlockDrop, BlockDropConfig
from edgekit.zoo.resnet import ResNet, ResNetConfig
from edgekit.zoo.skipping import skip_objective

SIZES = {"blocks": (2, 2, 2), "widths": (4, 8, 12)}


def small(execution="masked"):
    torch.manual_seed(0)
    return BlockDrop(BlockDropConfig(**SIZES, execution=execution)).eval()


def images(rows=6):
    return torch.randn((rows, 3, 32, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [1, 6])
@torch.no_grad()
def test_logits_and_decisions(rows):
    model, x = small(), images(rows)
    assert model(x).shape == (rows, 10)
    probability, decisions = model.policy(x), model.routed(x)[1]
    assert probability.shape == decisions.shape == (rows, 6)
    assert torch.equal(decisions, (probability > 0.5).float())


def test_parameter_count():
    """Pinned: another count would make every trained weight file useless."""
    model = BlockDrop(BlockDropConfig())
    assert sum(weight.numel() for weight in model.parameters()) == 642_684
    assert sum(weight.numel() for weight in model.policy.parameters()) == 78_562


@torch.no_grad()
def test_both_published_forwards_agree():
    masked, branch = small(), small("branch")
    x = images()
    torch.testing.assert_close(branch(x), masked(x))
    for policy in (torch.zeros(1, 6), torch.ones(1, 6), torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0, 1.0]])):
        torch.testing.assert_close(branch.resnet(x[:1], policy), masked.resnet(x[:1], policy))
        torch.testing.assert_close(branch.resnet(x, policy.expand(6, -1)), masked.resnet(x, policy.expand(6, -1)))


@pytest.mark.parametrize(("execution", "calls"), [("masked", 1), ("branch", 0)])
@torch.no_grad()
def test_the_branch_leaves_a_block_out_that_no_row_needs(execution, calls):
    model = small(execution)
    seen = []
    model.resnet.blocks[1][0].register_forward_hook(lambda *_: seen.append(1))
    policy = torch.ones(2, 6)
    policy[:, 2] = 0
    model.resnet(images(2), policy)
    assert len(seen) == calls
    policy[0, 2] = 1
    model.resnet(images(2), policy)
    assert len(seen) == calls + 1


@torch.no_grad()
def test_a_dropped_block_changes_nothing():
    model, x = small(), images(2)
    policy = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    before = model.resnet(x, policy)
    for weight in model.resnet.blocks[1][0].parameters():
        weight.add_(1.0)
    after = model.resnet(x, policy)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_from_a_backbone_every_block_runs_and_the_answers_are_its():
    torch.manual_seed(1)
    backbone = ResNet(ResNetConfig(**SIZES)).eval()
    model = small()
    model.start_from(backbone)
    with torch.no_grad():
        assert model.routed(images())[1].min() == 1
        torch.testing.assert_close(model(images()), backbone(images()))
    assert torch.equal(model.policy.features.layer3[0].conv1.weight, backbone.layer3[0].conv1.weight)


@torch.no_grad()
def test_forced_open_runs_every_block():
    model = small()
    assert model.routed(images())[1].min() == 0
    model.force_open = True
    assert model.routed(images())[1].min() == 1
    torch.testing.assert_close(model(images()), model.resnet(images(), torch.ones(6, 6)))


def test_training_is_straight_through_and_the_price_stops_at_the_target():
    model = small()
    model.start_from(ResNet(ResNetConfig(**SIZES)))
    model.train()
    labels = torch.arange(6)
    assert set(model.routed(images())[1].detach().flatten().tolist()) == {1.0}
    free, priced, reached = (
        skip_objective(target=target, weight=weight).loss(model, images(), labels)
        for target, weight in [(0.0, 0.0), (0.5, 3.0), (1.0, 3.0)]
    )
    assert (priced - free).item() == pytest.approx(1.5, abs=1e-5)
    assert reached.item() == pytest.approx(free.item(), abs=1e-5)
    (priced - free).backward()
    assert (model.policy.features.fc.bias.grad > 0).all()
