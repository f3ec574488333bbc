from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekit.errors import TrainingError
from edgekit.zoo import digits
from edgekit.zoo.msdnet import MSDNet, digits_config
from edgekit.zoo.training import Recipe, evaluate, train

RECIPE = Recipe(epochs=2, batch=40, peak_learning_rate=0.05, crop=1, flip=True)


@pytest.fixture(scope="module")
def tiny():
    return digits.training_set().take(slice(120)), digits.test_set().take(slice(40))


def fresh():
    torch.manual_seed(0)
    return MSDNet(digits_config())


def trained(tiny, checkpoint, *, recipe=RECIPE, report=lambda state: None):
    model = fresh()
    train(model, tiny[0], recipe=recipe, test=tiny[1], checkpoint=checkpoint, report=report)
    return model


def test_training_reduces_the_loss(tiny, tmp_path):
    states = []
    trained(tiny, tmp_path / "c.pt", recipe=replace(RECIPE, epochs=8, batch=20), report=states.append)
    losses = [state.loss for state in states if state.accuracy is None]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    ends = [state for state in states if state.accuracy is not None]
    assert [state.epoch for state in ends] == list(range(1, 9))
    assert all(len(state.accuracy) == 3 for state in ends)


@pytest.mark.parametrize("step", [1, 3])
def test_interrupted_and_resumed_is_bitwise_the_same(step, tiny, tmp_path):
    whole = trained(tiny, tmp_path / "whole.pt").state_dict()

    def interrupt(state):
        if (state.epoch, state.step) == (2, step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tiny, tmp_path / "cut.pt", report=interrupt)
    seen = []
    resumed = trained(tiny, tmp_path / "cut.pt", report=lambda state: seen.append(state.epoch)).state_dict()
    assert set(seen) == {2}
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.pt", "whole.pt"]


def test_a_finished_training_is_only_loaded(tiny, tmp_path):
    model = trained(tiny, tmp_path / "c.pt")
    again = trained(tiny, tmp_path / "c.pt", report=lambda state: pytest.fail("trained again"))
    assert evaluate(model, tiny[1]) == evaluate(again, tiny[1])


def test_checkpoint_of_another_recipe_is_refused(tiny, tmp_path):
    trained(tiny, tmp_path / "c.pt")
    with pytest.raises(TrainingError, match="another recipe"):
        trained(tiny, tmp_path / "c.pt", recipe=replace(RECIPE, batch=60))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_damaged_checkpoint_is_refused(content, tiny, tmp_path):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(TrainingError, match="not a readable checkpoint"):
        trained(tiny, tmp_path / "c.pt")


def test_diverging_training_says_so(tiny, tmp_path):
    with pytest.raises(TrainingError, match="lower the learning rate"):
        trained(tiny, tmp_path / "c.pt", recipe=replace(RECIPE, peak_learning_rate=1e30))
    assert not (tmp_path / "c.pt").exists()


def test_labels_are_needed(tiny, tmp_path):
    blind = replace(tiny[0], labels=None)
    with pytest.raises(TrainingError, match="needs labels"):
        train(fresh(), blind, recipe=RECIPE, test=tiny[1], checkpoint=tmp_path / "c.pt")
