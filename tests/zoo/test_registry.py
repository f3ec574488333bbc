from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from edgekit.cli import app
from edgekit.data import Preprocess
from edgekit.errors import InputError, TrainingError
from edgekit.zoo import digits, produce, registry
from edgekit.zoo.training import Recipe, evaluate
from edgekit.zoo.weight_files import load_weights, save_weights

TRAINED = [name for name in registry.NETWORKS if (registry.WEIGHTS / f"{name}.safetensors").exists()]


def card_accuracies(path: Path) -> list[float]:
    return [float(value) / 100 for value in re.findall(r"^\| \d+ \| ([0-9.]+)% \|$", path.read_text(), re.MULTILINE)]


def test_digits_weights_do_what_their_card_says():
    accuracy = evaluate(registry.load("msdnet-digits"), digits.test_set())
    assert card_accuracies(registry.WEIGHTS / "msdnet-digits.md") == pytest.approx(accuracy, abs=0.003)
    assert accuracy[-1] >= 0.97
    assert accuracy[-1] - accuracy[0] >= 0.03


@pytest.mark.parametrize("name", TRAINED)
def test_every_weight_file_loads_and_has_a_card(name):
    network = registry.find(name)
    path = registry.WEIGHTS / f"{name}.safetensors"
    model = registry.load(name)
    assert not model.training
    assert path.stat().st_size <= 8_000_000
    assert len(card_accuracies(path.with_suffix(".md"))) == network.config.exits
    with torch.no_grad():
        logits = network.objective.logits(model(network.example()))
    assert [tuple(each.shape) for each in logits] == [(2, len(network.classes))] * network.config.exits


def test_cifar_recipe():
    network = registry.find("msdnet-cifar10")
    assert network.recipe == Recipe(
        epochs=12, batch=128, peak_learning_rate=0.1, crop=4, flip=True, bfloat16=True, seed=0
    )
    assert network.preprocess == Preprocess(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), size=(32, 32))
    assert list(network.classes) == sorted(network.classes)


def test_build_depends_on_the_seed_alone():
    network = registry.find("msdnet-digits")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = network.build().state_dict(), network.build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_weights_say_how_to_train(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    with pytest.raises(TrainingError, match="edgekit zoo train msdnet-cifar10 --data FOLDER --output FOLDER"):
        registry.load("msdnet-cifar10")


def test_data_folder(tmp_path):
    with pytest.raises(TrainingError, match=r"needs --data FOLDER, which holds train\.tar\.gz and test\.tar\.gz"):
        registry.find("msdnet-cifar10").data(None)
    with pytest.raises(TrainingError, match=r"holds no train\.tar\.gz"):
        registry.find("msdnet-cifar10").data(tmp_path)
    with pytest.raises(TrainingError, match="leave out --data"):
        registry.find("msdnet-digits").data(tmp_path)


def test_weights_go_to_disk_and_back(tmp_path):
    network = registry.find("msdnet-digits")
    model, other = network.build(), network.build()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.5)
    save_weights(model, tmp_path / "new" / "w.safetensors", metadata={"seed": 0})
    load_weights(other, tmp_path / "new" / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with safe_open(tmp_path / "new" / "w.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["edgekit"]) == {"seed": 0}


def test_damaged_weights_are_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"not a readable \.safetensors file"):
        registry.load("msdnet-digits", weights=tmp_path / "w.safetensors")


@pytest.fixture
def few_images(monkeypatch):
    """The digits network, trained on 80 images for two epochs."""
    full = registry.NETWORKS["msdnet-digits"]
    data = (digits.training_set().take(slice(80)), digits.test_set().take(slice(40)))
    small = {key: getattr(full, key) for key in full.__dataclass_fields__} | {"read": lambda folder, progress: data}
    monkeypatch.setitem(registry.NETWORKS, "msdnet-digits", registry.Network(**small))


def zoo_train(output, *more):
    return CliRunner().invoke(app, ["zoo", "train", "msdnet-digits", "--epochs", "2", "--output", str(output), *more])


def test_ctrl_c_says_how_to_resume_and_the_weights_come_out_the_same(few_images, tmp_path, monkeypatch):
    assert zoo_train(tmp_path / "whole").exit_code == 0
    train = produce.train

    def interrupted(*arguments, report, **keywords):
        def stop(state):
            report(state)
            if state.epoch == 2:
                raise KeyboardInterrupt

        return train(*arguments, report=stop, **keywords)

    monkeypatch.setattr(produce, "train", interrupted)
    done = zoo_train(tmp_path / "cut")
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == (
        f"edgekit: training interrupted; run it again to go on from {tmp_path / 'cut' / 'checkpoint.pt'}"
    )
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint.pt"]
    monkeypatch.setattr(produce, "train", train)
    done = zoo_train(tmp_path / "cut")
    assert done.exit_code == 0
    assert "epoch 2/2" in done.stderr
    assert "epoch 1/2" not in done.stderr
    weights = [(tmp_path / name / "msdnet-digits.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_a_finished_checkpoint_is_evaluated_and_written(few_images, tmp_path):
    assert zoo_train(tmp_path).exit_code == 0
    weights, card = tmp_path / "msdnet-digits.safetensors", tmp_path / "msdnet-digits.md"
    before = weights.read_bytes()
    text = card.read_text()
    weights.unlink()
    card.unlink()
    done = zoo_train(tmp_path, "--json")
    assert done.exit_code == 0
    assert "epoch" not in done.stderr
    assert weights.read_bytes() == before
    assert card.read_text() == text
    assert "--epochs 2" in text
    assert "| epochs | 2 |" in text
    assert "80 images for training, 40 for the test" in text
