from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_model

from edgekit.data import Dataset
from edgekit.errors import InputError, TrainingError
from edgekit.zoo import produce, registry
from edgekit.zoo.blockdrop import BlockDropConfig
from edgekit.zoo.resnet import ResNetConfig
from edgekit.zoo.skipnet import SkipNetConfig
from edgekit.zoo.skipping import hard, measure_skips
from edgekit.zoo.training import Recipe
from edgekit.zoo.weight_files import load_weights, save_weights

SIZES = {"blocks": (2, 2, 2), "widths": (4, 8, 12)}
SMALL = {
    "resnet38-cifar10": ResNetConfig(**SIZES),
    "skipnet38-cifar10": SkipNetConfig(gate="ff1", **SIZES),
    "skipnet38-rnn-cifar10": SkipNetConfig(gate="rnn", **SIZES),
    "blockdrop-cifar10": BlockDropConfig(**SIZES),
}
SKIPPING = [name for name in SMALL if name != "resnet38-cifar10"]
RECIPE = Recipe(epochs=2, batch=20, peak_learning_rate=0.05, bfloat16=True, channels_last=True)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The networks at a few channels and blocks, noise instead of images, and a folder for weights."""
    random = np.random.default_rng(0)
    labels = np.arange(60, dtype=np.int64) % 10
    data = Dataset(inputs=random.standard_normal((60, 3, 32, 32), dtype=np.float32), labels=labels)
    for name, config in SMALL.items():
        changed = replace(registry.find(name), config=config, files=(), read=lambda *_: (data, data), recipe=RECIPE)
        monkeypatch.setitem(registry.NETWORKS, name, changed)
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path / "weights")
    return data


@pytest.fixture
def backbone(small):
    return produce.produce("resnet38-cifar10", registry.WEIGHTS)


def test_the_backbone_is_needed(small, tmp_path):
    with pytest.raises(TrainingError, match=r"no such weights; train them: edgekit zoo train resnet38-cifar10"):
        produce.produce("skipnet38-cifar10", tmp_path)


@pytest.mark.parametrize("name", SKIPPING)
def test_trained_from_the_backbone_with_a_card(name, small, backbone, tmp_path):
    training = produce.produce(name, tmp_path)
    model = registry.load(name, weights=tmp_path / f"{name}.safetensors")
    assert measure_skips(model, small) == training.measures
    card = (tmp_path / f"{name}.md").read_text()
    assert "from the weights of resnet38-cifar10" in card
    assert f"| gated blocks left out, share | {training.measures['gated blocks left out, share']:.4g} |" in card
    assert len(re.findall(r"^\| \d+ \| [0-9.]+% \|$", card, re.MULTILINE)) == 1


@pytest.mark.parametrize("name", SKIPPING)
@torch.no_grad()
def test_measures_are_those_of_the_decisions(name, small):
    model = registry.find(name).build().eval()
    figures = measure_skips(model, small)
    x, labels = torch.from_numpy(small.inputs), torch.from_numpy(small.labels)
    run = model.routed(x)[1]
    assert figures["gated blocks left out, share"] == pytest.approx(1 - run.mean().item(), abs=1e-6)
    for gate in range(run.shape[1]):
        share = figures[f"gated block {gate + 1}, share of images that it runs on"]
        assert share == pytest.approx(run[:, gate].mean().item(), abs=1e-6)
    assert not model.force_open
    model.force_open = True
    all_on = (model.routed(x)[0].argmax(1) == labels).float().mean().item()
    assert figures["accuracy of the same weights with every block run"] == pytest.approx(all_on, abs=1e-6)


@pytest.mark.parametrize("name", SKIPPING)
@torch.no_grad()
def test_forward_and_routed_agree(name, small):
    network = registry.find(name)
    model, x = network.build().eval(), torch.from_numpy(small.inputs[:4])
    assert torch.equal(network.objective.logits(model(x))[0], model.routed(x)[0])


def test_a_hard_gate_passes_the_gradient_of_its_probability():
    probability = torch.tensor([0.2, 0.5, 0.7], requires_grad=True)
    mask = hard(probability)
    torch.testing.assert_close(mask.detach(), torch.tensor([0.0, 0.0, 1.0]))
    (mask * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert probability.grad.tolist() == [1.0, 2.0, 3.0]


def test_weights_registered_twice_are_stored_once(small, tmp_path):
    path = tmp_path / "w.safetensors"
    model, other = (registry.find("skipnet38-cifar10").build() for _ in range(2))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.5)
    save_weights(model, path, metadata={})
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    assert len(names & {"group2_ds0.0.weight", "group2_layer0.downsample.0.weight"}) == 1
    load_weights(other, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    # safetensors' own writer chooses for itself under which name it stores a shared tensor.
    save_model(model, str(path))
    load_weights(registry.find("skipnet38-cifar10").build(), path)


def test_a_shared_weight_that_lacks_altogether_is_named(small, tmp_path):
    path = tmp_path / "w.safetensors"
    network = registry.find("skipnet38-cifar10")
    model = network.build()
    model.group2_ds0 = None
    model.group2_layer0.downsample = None
    save_weights(model, path, metadata={})
    with pytest.raises(InputError, match=r"lacks 'group2_ds0\.0\.weight', which the model has \(12 of"):
        load_weights(network.build(), path)
