from __future__ import annotations

import pytest
import torch

from edgekit.zoo.resnet import ResNet, ResNetConfig
from edgekit.zoo.skipnet import FeedforwardGateI, SkipNet, SkipNetConfig, untrained_skipnet110
from edgekit.zoo.skipping import skip_objective

SIZES = {"blocks": (2, 2, 2), "widths": (4, 8, 12)}
GATES = ["ff1", "ff2", "rnn"]


def small(gate, *, seed=0):
    torch.manual_seed(seed)
    return SkipNet(SkipNetConfig(gate=gate, **SIZES)).eval()


def images(rows=6):
    return torch.randn((rows, 3, 32, 32), generator=torch.Generator().manual_seed(0))


def force(model, masks):
    """Make the gates answer what ``masks``, one number for each gate, say."""
    answers = iter(masks)
    gate = SkipNet._gate

    def forced(x, *, group, block):
        mask, gprob = gate(model, x, group=group, block=block)
        return torch.full_like(mask, next(answers, 1.0)), gprob

    model._gate = forced


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rows", [1, 6])
@torch.no_grad()
def test_logits_masks_and_probabilities(gate, rows):
    logits, masks, gprobs = small(gate)(images(rows))
    assert logits.shape == (rows, 10)
    assert [mask.shape for mask in masks] == [(rows,)] * 5
    assert [gprob.shape for gprob in gprobs] == [(rows, 1) if gate == "rnn" else (rows, 2)] * 6
    assert set(torch.stack(masks).flatten().tolist()) <= {0.0, 1.0}


@torch.no_grad()
def test_38_layers_have_17_masks():
    _, masks, gprobs = SkipNet(SkipNetConfig()).eval()(images(1))
    assert (len(masks), len(gprobs)) == (17, 18)


@torch.no_grad()
def test_110_layers_have_54_gates_and_sane_activations():
    model, again = untrained_skipnet110(), untrained_skipnet110()
    logits, masks, gprobs = model(images(4))
    assert (len(masks), len(gprobs)) == (53, 54)
    assert logits.abs().max() < 100
    assert 0 < torch.stack(masks).mean() < 1
    assert torch.equal(again(images(4))[0], logits)
    assert {each.momentum for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize(("gate", "parameters"), [("ff1", 1_148_798), ("ff2", 857_150), ("rnn", 571_913)])
def test_parameter_count(gate, parameters):
    """Pinned: another count would make every trained weight file useless."""
    assert sum(weight.numel() for weight in SkipNet(SkipNetConfig(gate=gate)).parameters()) == parameters


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(gate):
    model, x = small(gate), images()
    logits, masks, _ = model(x)
    for row in range(len(x)):
        alone, alone_masks, _ = model(x[row : row + 1])
        assert torch.equal(torch.stack(masks)[:, row], torch.cat(alone_masks))
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_closed_gate_leaves_exactly_its_block_out():
    model, x = small("ff1"), images(2)
    force(model, [1, 0, 1, 1, 1])
    before = model(x)[0]
    for weight in model.group2_layer0.conv1.parameters():
        weight.add_(1.0)
    force(model, [1, 0, 1, 1, 1])
    assert torch.equal(model(x)[0], before)
    force(model, [1, 1, 1, 1, 1])
    assert not torch.allclose(model(x)[0], before)


@torch.no_grad()
def test_all_gates_closed_still_down_samples():
    model, x = small("rnn"), images(2)
    force(model, [0] * 5)
    logits, masks, _ = model(x)
    assert sum(mask.sum() for mask in masks) == 0
    x = model.group1_layer0(model.relu(model.bn1(model.conv1(x))))
    x = model.group3_ds0(model.group2_ds0(x))
    torch.testing.assert_close(logits, model.fc(model.avgpool(x).flatten(1)))


@pytest.mark.parametrize("gate", GATES)
def test_from_a_backbone_every_gate_is_open_and_the_answers_are_its(gate):
    torch.manual_seed(1)
    backbone = ResNet(ResNetConfig(**SIZES)).eval()
    model = small(gate)
    model.start_from(backbone)
    with torch.no_grad():
        logits, masks, gprobs = model(images())
        torch.testing.assert_close(logits, backbone(images()))
    assert all(mask.min() == 1 for mask in masks)
    running = gprobs[0] if gate == "rnn" else gprobs[0][:, 1:].exp()
    torch.testing.assert_close(running, torch.full_like(running, 0.8808), rtol=1e-3, atol=0)


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_forced_open_runs_every_block(gate):
    model = small(gate, seed=2)
    assert model.routed(images())[1].min() == 0
    model.force_open = True
    assert model.routed(images())[1].min() == 1


@torch.no_grad()
def test_the_recurrent_state_is_fresh_in_every_forward():
    model = small("rnn")
    first = model(images())[2]
    assert model.control.hidden[0].shape == (1, 6, 10)
    again = model(images())[2]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_down_samplers_are_registered_twice_and_shared():
    model = small("ff1")
    assert model.group2_ds0 is model.group2_layer0.downsample
    assert model.group1_ds0 is None
    assert {"group2_ds0.0.weight", "group2_layer0.downsample.0.weight"} <= set(model.state_dict())


def test_log_probabilities_are_of_skipping_and_running():
    torch.manual_seed(0)
    mask, logprob = FeedforwardGateI(4).eval()(torch.randn(5, 4, 8, 8))
    torch.testing.assert_close(logprob.exp().sum(1), torch.ones(5))
    torch.testing.assert_close(mask.flatten(), (logprob[:, 1] > logprob[:, 0]).float())


@pytest.mark.parametrize("gate", GATES)
def test_the_price_of_running_blocks_reaches_the_gates_and_stops_at_the_target(gate):
    model = small(gate)
    model.start_from(ResNet(ResNetConfig(**SIZES)))
    labels = torch.arange(6)
    free, priced, reached = (
        skip_objective(target=target, weight=weight).loss(model, images(), labels)
        for target, weight in [(0.0, 0.0), (0.5, 3.0), (1.0, 3.0)]
    )
    assert (priced - free).item() == pytest.approx(1.5, abs=1e-5)
    assert reached.item() == free.item()
    (priced - free).backward()
    gate_bias = model.control.proj.bias if gate == "rnn" else model.group1_gate0.linear_layer.bias
    assert gate_bias.grad[-1] > 0
