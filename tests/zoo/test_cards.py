"""The networks trained on CIFAR-10 do on the test images what their cards say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import edgekit
from edgekit.data import load_dataset
from edgekit.zoo import registry
from edgekit.zoo.cascade import with_nights
from edgekit.zoo.moe import measure_routing
from edgekit.zoo.skipping import measure_skips
from edgekit.zoo.training import evaluate

DATA = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "test.tar.gz"
SKIPPING = ["skipnet38-cifar10", "skipnet38-rnn-cifar10", "blockdrop-cifar10"]

pytestmark = [
    pytest.mark.cifar,
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.exists(), reason="CIFAR-10 test images are not beside the project (shared/data)"),
]


@pytest.fixture(scope="module")
def images():
    return load_dataset(DATA, preprocess=registry.find(SKIPPING[0]).preprocess)


def on_the_card(name, what):
    """The number in the card's row ``what``, percentages as shares."""
    card = (registry.WEIGHTS / f"{name}.md").read_text()
    value, percent = re.search(rf"^\| {re.escape(what)} \| ([0-9.]+)(%?) \|$", card, re.MULTILINE).groups()
    return float(value) / (100 if percent else 1)


def accuracy(name, images):
    return evaluate(registry.load(name), images, objective=registry.find(name).objective)[-1]


def test_backbone(images):
    backbone = accuracy("resnet38-cifar10", images)
    assert backbone == pytest.approx(on_the_card("resnet38-cifar10", "1"), abs=1e-3)
    assert backbone >= 0.85


@pytest.mark.parametrize("name", SKIPPING)
def test_blocks_are_left_out_at_little_loss(name, images):
    skipping = accuracy(name, images)
    figures = measure_skips(registry.load(name), images)
    assert skipping == pytest.approx(on_the_card(name, "1"), abs=1e-3)
    for what, value in figures.items():
        assert value == pytest.approx(on_the_card(name, what), abs=2e-3)
    assert skipping >= on_the_card("resnet38-cifar10", "1") - 0.01
    assert figures["gated blocks left out, share"] >= 0.3
    assert skipping >= figures["accuracy of the same weights with every block run"] - 0.01


def test_experts(images):
    model = registry.load("moe-cifar10")
    figures = measure_routing(model, images)
    given = accuracy("moe-cifar10", images)
    assert given >= 0.7
    assert given == pytest.approx(on_the_card("moe-cifar10", "1"), abs=1e-3)
    shares = {what: value for what, value in figures.items() if "share" in what}
    for what, value in shares.items():
        assert value == pytest.approx(on_the_card("moe-cifar10", what), abs=2e-3)
    assert all(0.1 <= share <= 0.9 for share in shares.values()), "no expert is idle, none takes everything"


@pytest.fixture(scope="module")
def days_and_nights():
    network = registry.find("cascade-cifar10")
    return with_nights(load_dataset(DATA, preprocess=network.preprocess), seed=1)


def test_cascade(days_and_nights):
    network = registry.find("cascade-cifar10")
    accuracies = evaluate(registry.load(network.name), days_and_nights, objective=network.objective)
    assert accuracies[0] == pytest.approx(on_the_card(network.name, "1"), abs=1e-3)
    assert accuracies[1] == pytest.approx(on_the_card(network.name, "2"), abs=1e-3)
    assert accuracies[1] >= 0.9


def test_int8_of_a_cascade_is_nearer_to_float_when_calibrated_on_what_its_detector_lets_pass(days_and_nights, tmp_path):
    network = registry.find("cascade-cifar10")
    policy = edgekit.Policy.fixed([0.9])
    objects = days_and_nights.take((days_and_nights.labels < 10).nonzero()[0][:500])
    samples, off = days_and_nights.take(slice(-1000, None)), {}
    with (
        edgekit.export(
            registry.load(network.name), (network.example(),), tmp_path / "net.edgekit", preprocess=network.preprocess
        ) as bundle,
        edgekit.load(bundle, policy=policy) as session,
    ):
        expected = session.run(objects.batch(slice(0, 500)))
    assert expected.exit.all(), "objects are let pass"
    for way in ("survivors", "all"):
        edgekit.quantize(tmp_path / "net.edgekit", samples, policy=policy, calibrate_on=way)
        with edgekit.load(tmp_path / "net.edgekit", policy=policy, precision="int8") as session:
            off[way] = abs(session.run(objects.batch(slice(0, 500))).logits - expected.logits).mean()
    assert off["survivors"] < off["all"] / 2, off
