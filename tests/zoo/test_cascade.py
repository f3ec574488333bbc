from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

import edgekit
from edgekit.data import Dataset
from edgekit.zoo import registry
from edgekit.zoo.cascade import HOT_PIXELS, PASSED_ON, Cascade, CascadeConfig, night_frames, standardise, with_nights
from edgekit.zoo.resnet import ResNetConfig

SMALL = CascadeConfig(channels=4, recogniser=ResNetConfig(blocks=(1, 1, 1), widths=(4, 4, 8)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Cascade(SMALL).eval()


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def as_input(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(registry.find("cascade-cifar10").preprocess(images))


def test_logits_are_logarithms_of_probabilities(model):
    x = as_input(frames(5))
    with torch.no_grad():
        detector, both = (logits.double().exp() for logits in model(x))
        something, nothing = model.detector(x).exp().unbind(1)
        which = functional.softmax(model.recogniser(standardise(x)), dim=1)
    for probabilities in (detector, both):
        torch.testing.assert_close(probabilities.sum(1), torch.ones(5, dtype=torch.float64), atol=1e-6, rtol=0)
        torch.testing.assert_close(probabilities[:, 10].float(), nothing)
    torch.testing.assert_close(detector[:, :10].float(), (something / 10)[:, None].expand(-1, 10))
    torch.testing.assert_close(both[:, :10].float(), something[:, None] * which)


def test_standardised_as_numpy_does():
    x = as_input(frames(3))
    expected = [(each - each.mean()) / each.std() for each in x.numpy()]
    np.testing.assert_allclose(standardise(x), expected, atol=1e-5)


def test_a_plain_frame_becomes_zero():
    plain = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), 0.5)])
    assert torch.equal(standardise(plain), torch.zeros_like(plain))


def test_one_hot_pixel_is_far_from_everything_in_a_photograph():
    night = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    night[0, 4, 9] = 255
    # One value in 1024 of height h: mean h/1024, deviation h/32 but for a thousandth.
    assert standardise(as_input(night)).max().item() == pytest.approx(math.sqrt(1023), rel=1e-5)


def test_night_frames():
    nights = night_frames(200, size=32, seed=3)
    assert (nights == night_frames(200, size=32, seed=3)).all()
    lit = nights[nights.any(axis=3)]
    assert lit.min() >= 128
    assert (lit == lit[:, :1]).all()
    assert set(nights.any(axis=3).sum(axis=(1, 2))) == set(range(1, HOT_PIXELS + 1))


def test_nights_are_a_class_of_their_own():
    days = Dataset(
        inputs=frames(40), labels=np.arange(40) % 2, classes=("cat", "dog"), source="two",
        preprocess=registry.find("cascade-cifar10").preprocess,
    )  # fmt: skip
    both = with_nights(days, seed=0)
    assert both.classes == ("cat", "dog", "nothing")
    assert np.bincount(both.labels).tolist() == [20, 20, 40]
    dark = (both.inputs > 0).mean(axis=(1, 2, 3)) < 0.01
    assert (dark == (both.labels == 2)).all()
    kept = both.inputs[~dark]
    assert sorted(map(bytes, kept)) == sorted(map(bytes, days.inputs))


def test_the_recogniser_learns_from_objects_that_are_let_pass_alone(model):
    x, seen = as_input(np.concatenate([frames(4), night_frames(2, size=32, seed=0)])), []
    labels = torch.tensor([1, 2, 3, 4, 10, 10])
    model.train()
    model.recogniser.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model.detector.fc.weight.zero_()
        model.detector.fc.bias.copy_(torch.tensor([1.0, 0.0]))  # all are let pass
        loss = PASSED_ON.loss(model, x, labels)
        torch.testing.assert_close(seen[0], standardise(x[:4]))
        turned_away = functional.cross_entropy(torch.tensor([[1.0, 0.0]] * 6), torch.tensor([0, 0, 0, 0, 1, 1]))
        model.eval()
        model.detector.fc.bias.copy_(torch.tensor([0.0, 1.0]))  # all are turned away
        torch.testing.assert_close(
            PASSED_ON.loss(model, x, labels),
            functional.cross_entropy(torch.tensor([[0.0, 1.0]] * 6), torch.tensor([0, 0, 0, 0, 1, 1])),
        )
    assert len(seen) == 1
    assert loss > turned_away


def test_staged_as_eager_with_nights_turned_away(tmp_path, model):
    days, nights = as_input(frames(6)), as_input(night_frames(6, size=32, seed=1))
    with torch.no_grad():
        # Batch normalisation has seen nothing: the thumbnail's brightness decides.
        model.detector.features = torch.nn.AvgPool2d(2).eval()
        model.detector.fc = torch.nn.Linear(3 * 16, 2).eval()
        model.detector.fc.weight.copy_(torch.stack([torch.ones(48), -torch.ones(48)]))
        model.detector.fc.bias.copy_(torch.tensor([-8.0, 8.0]))
        expected = model(torch.cat([days, nights]))
    with edgekit.export(model, (days[:2],), tmp_path / "cascade.edgekit") as bundle:
        assert len(bundle.plan.exits) == 2
        with edgekit.load(bundle, policy=edgekit.Policy.fixed([0.9])) as session:
            result = session.run(torch.cat([days, nights]).numpy())
    assert result.exit.tolist() == [1] * 6 + [0] * 6
    np.testing.assert_allclose(result.logits[:6], expected[1][:6], atol=1e-4)
    np.testing.assert_allclose(result.logits[6:], expected[0][6:], atol=1e-4)
