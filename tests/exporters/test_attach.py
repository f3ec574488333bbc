"""Exits attached to a plain network: found, trained with the network frozen, exported like any others."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgekit
from edgekit.errors import CaptureError, DataError, DecisionError, MissingExtraError
from edgekit.zoo import digits


class Plain(nn.Module):
    """A classifier as anyone writes one: a batch normalisation, a block that works in place, one output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.layer2 = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU())
        self.unused = nn.Linear(3, 3)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu_(self.layer1(x))
        return self.fc(self.layer3(self.layer2(x)).amax((2, 3)))


@pytest.fixture(scope="module")
def trained() -> Plain:
    torch.manual_seed(0)
    model, data = Plain(), digits.training_set()
    x, y = torch.from_numpy(data.batch(slice(None))), torch.from_numpy(data.labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for rows in torch.arange(len(y)).repeat(12).split(128):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def plain() -> Plain:
    torch.manual_seed(0)
    return Plain().eval()


def heads():
    return {"layer1": nn.Sequential(nn.Flatten(), nn.Linear(16 * 64, 10)), "layer2": None}


def test_trained_exported_and_run(trained, tmp_path):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    torch.manual_seed(1)
    model = edgekit.add_exits(trained, heads(), classes=10)
    told = []
    edgekit.train_exits(model, digits.training_set(), progress=lambda *state: told.append(state))
    assert told[0] == ("train exits", 0, 20)
    assert told[-1] == ("train exits", 20, 20)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    test = digits.test_set()
    with torch.no_grad():
        eager = model(torch.from_numpy(test.batch(slice(None))))
        assert torch.equal(eager[-1], trained(torch.from_numpy(test.batch(slice(None)))))
    with edgekit.export(model, test.batch(slice(0, 2)), tmp_path / "net.edgekit") as bundle:
        assert [stage.name for stage in bundle.plan.stages] == [
            "backbone.layer1.0",
            "backbone.layer2.0",
            "backbone.layer3.0",
        ]
    with edgekit.load(tmp_path / "net.edgekit") as session:
        given = session.run_exits(test.batch(slice(None)))
        result = session.run(test.batch(slice(0, 16)), exit=0)
    accuracies = [float((logits.argmax(1) == test.labels).mean()) for logits in given]
    assert accuracies[0] >= 0.9
    assert accuracies[1] >= 0.5, "means of 32 channels tell less"
    assert accuracies[2] >= 0.95
    assert list(result.executed.values()) == [16, 0, 0]
    for logits, expected in zip(given, eager, strict=True):
        np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_the_network_is_not_changed(plain):
    modules, hooks = list(plain.named_modules()), [len(module._forward_hooks) for module in plain.modules()]
    x = torch.randn(3, 1, 8, 8)
    expected = plain(x)
    model = edgekit.add_exits(plain, ["layer1", "layer2"], classes=10)
    *early, own = model(x)
    assert torch.equal(own, expected)
    assert [tuple(logits.shape) for logits in early] == [(3, 10), (3, 10)]
    assert list(plain.named_modules()) == modules
    assert [len(module._forward_hooks) for module in plain.modules()] == hooks
    assert model.backbone is plain


@pytest.mark.parametrize("training", [True, False])
def test_new_heads_are_in_the_mode_of_the_network(plain, training):
    plain.train(training)
    model = edgekit.add_exits(plain, {"layer1": nn.Dropout()})
    assert {module.training for module in model.modules()} == {training}


def test_a_head_reads_what_the_module_gave_though_it_is_written_over(plain):
    """The network's ReLU works in place on the features of the first exit."""
    seen = []

    class Head(nn.Module):
        def forward(self, x):
            seen.append(x.min().item())
            return x.mean((2, 3))

    edgekit.add_exits(plain, {"layer1": Head()})(torch.randn(3, 1, 8, 8))
    assert seen[0] < 0


def test_the_default_head():
    model = edgekit.add_exits(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)), ["0"])
    x = torch.randn(5, 4)
    assert torch.equal(model(x)[0], model.backbone[0](x)), "without classes, the channels' means are the logits"
    model = edgekit.add_exits(nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten()), ["0"], classes=3)
    x = torch.randn(2, 1, 5, 5)
    head = model(x)[0]
    torch.testing.assert_close(head, model.heads[0].classifier(model.backbone[0](x).mean((2, 3))))
    assert head.shape == (2, 3)


def test_exits_of_a_network_that_has_some(trunk):
    model = edgekit.add_exits(trunk(), ["a"], classes=5)
    assert [tuple(logits.shape) for logits in model(torch.randn(2, 8))] == [(2, 5)] * 4


def test_modes_and_gradients_come_back(plain):
    plain.train()
    plain.layer1.eval()
    plain.fc.bias.requires_grad_(False)
    wanted = {name: weight.requires_grad for name, weight in plain.named_parameters()}
    modes = {name: module.training for name, module in plain.named_modules()}
    model = edgekit.add_exits(plain, ["layer2"], classes=10)
    statistics = plain.layer1[1].running_mean.clone()
    edgekit.train_exits(model, digits.training_set().take(slice(40)), epochs=1)
    assert {name: weight.requires_grad for name, weight in plain.named_parameters()} == wanted
    assert {name: module.training for name, module in plain.named_modules()} == modes
    assert all(weight.grad is None for weight in plain.parameters())
    assert torch.equal(plain.layer1[1].running_mean, statistics)


def test_training_again_with_a_seed_gives_the_same_heads(plain):
    data = digits.training_set().take(slice(60))
    twice = []
    for _ in range(2):
        model = edgekit.add_exits(plain, ["layer1"], classes=10)
        edgekit.train_exits(model, (data.batch(slice(None)), data.labels), epochs=2, seed=4)
        twice.append(model.heads.state_dict())
    assert all(torch.equal(value, twice[1][name]) for name, value in twice[0].items())


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        (["layr2"], r"Plain has no module 'layr2'; close to it are 'layer2'"),
        ({"zzz": None}, r"Plain has no module 'zzz'; it has 'layer1', 'layer1.0', "),
        ([], "exits must be module names"),
        ("layer1", "exits must be module names"),
    ],
)
def test_names_that_are_none(plain, exits, message):
    with pytest.raises(DecisionError, match=message) as raised:
        edgekit.add_exits(plain, exits)
    assert "\n" not in str(raised.value)


def test_modules_that_give_no_exit(plain, tmp_path):
    x = torch.randn(2, 1, 8, 8)
    with pytest.raises(DecisionError, match="module 'unused' is not called by the forward"):
        edgekit.add_exits(plain, ["unused"])(x)
    with pytest.raises(CaptureError, match="module 'unused' is not called by the forward"):
        edgekit.export(edgekit.add_exits(plain, ["unused"]), x, tmp_path / "n.edgekit")
    shared = nn.Linear(4, 4)
    with pytest.raises(DecisionError, match="module '0' is called more than once"):
        edgekit.add_exits(nn.Sequential(shared, shared), ["0"])(torch.randn(2, 4))
    with pytest.raises(DecisionError, match="module '0' gives a tuple"):
        edgekit.add_exits(nn.Sequential(nn.LSTM(4, 4)), ["0"])(torch.randn(2, 3, 4))


def test_what_cannot_be_trained(plain):
    data = digits.training_set()
    with pytest.raises(DecisionError, match=r"Plain has no attached exits to train: make them with edgekit\.add_exits"):
        edgekit.train_exits(plain, data)
    with pytest.raises(DataError, match="training exits needs labels"):
        edgekit.train_exits(edgekit.add_exits(plain, ["layer1"], classes=10), data.batch(slice(0, 4)))


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for verb in (edgekit.add_exits, edgekit.train_exits):
        with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[export\]'"):
            verb(None, digits.test_set())
