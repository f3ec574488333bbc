"""The trained CIFAR network on real images: staged on ONNX Runtime against eager PyTorch, values and decisions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import edgekit
from edgekit.calibration import study
from edgekit.data import load_dataset
from edgekit.policy import Policy
from edgekit.zoo import registry

DATA = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "test.tar.gz"
NAME = "msdnet-cifar10"
SETTINGS = {
    "eager to leave": ("max_prob", (0.6, 0.6, 0.6, 0.6)),
    "in between": ("margin", (0.8, 0.7, 0.6, 0.5)),
    "hesitant": ("neg_entropy", (-0.05, -0.1, -0.1, -0.2)),
}

pytestmark = [
    pytest.mark.cifar,
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.exists(), reason="CIFAR-10 test images are not beside the project (shared/data)"),
]


@pytest.fixture(scope="module")
def images():
    return load_dataset(DATA, preprocess=registry.find(NAME).preprocess)


@pytest.fixture(scope="module")
def eager(images):
    """Logits of every exit, ``(exits, samples, classes)``, from the model itself."""
    model = registry.load(NAME)
    with torch.inference_mode():
        parts = [torch.stack(model(torch.from_numpy(batch))) for batch in images.batches(250)]
    return torch.cat(parts, dim=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, images):
    example = torch.from_numpy(images.batch(slice(0, 8)))
    path = tmp_path_factory.mktemp("cifar") / "net.edgekit"
    preprocess = registry.find(NAME).preprocess
    with edgekit.export(registry.load(NAME), (example,), path, golden=(example,), preprocess=preprocess) as made:
        yield made


def test_certificates_hold_on_a_thousand_draws_and_cost_little_more_than_knowing(bundle):
    """The whole study on real images: validity, controls that must fail, and power at epsilon = 0.02."""
    assert study.main(["--bundle", str(bundle.path), "--data", str(DATA), "--floor", "1.25"]) == 0


def decisions(logits, score, thresholds):
    """Exits taken, with scores in double precision."""
    probabilities = torch.softmax(logits.double(), dim=2)
    top = probabilities.topk(2, dim=2).values
    scores = {
        "max_prob": top[..., 0],
        "margin": top[..., 0] - top[..., 1],
        "neg_entropy": (probabilities * torch.log_softmax(logits.double(), dim=2)).sum(dim=2),
    }[score].numpy()
    taken = np.full(logits.shape[1], len(logits) - 1)
    for index in reversed(range(len(thresholds))):
        taken[scores[index] >= np.float32(thresholds[index])] = index
    return taken


def test_accuracy_is_what_the_card_says(images, eager):
    card = (registry.WEIGHTS / f"{NAME}.md").read_text()
    for exit_logits in eager:
        accuracy = float((exit_logits.argmax(1).numpy() == images.labels).mean())
        assert f"{accuracy:.2%}" in card
    assert float((eager[0].argmax(1).numpy() == images.labels).mean()) >= 0.60
    assert float((eager[-1].argmax(1).numpy() == images.labels).mean()) >= 0.80


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("setting", SETTINGS)
def test_values_and_decisions_on_every_test_image(bundle, images, eager, setting, batch):
    score, thresholds = SETTINGS[setting]
    expected = decisions(eager, score, thresholds)
    assert len(set(expected.tolist())) >= 4, "the setting must exercise the exits"
    with edgekit.load(bundle, policy=Policy.fixed(thresholds, score=score)) as session:
        results = [session.run(inputs) for inputs in images.batches(batch)]
    taken = np.concatenate([result.exit for result in results])
    logits = np.concatenate([result.logits for result in results])
    np.testing.assert_array_equal(taken, expected)
    np.testing.assert_allclose(logits, eager.numpy()[expected, np.arange(len(expected))], atol=1e-4, rtol=0)


def test_every_exit_forced(bundle, images, eager):
    with edgekit.load(bundle) as session:
        for index in range(len(eager)):
            logits = np.concatenate([session.run(inputs, exit=index).logits for inputs in images.batches(64)])
            np.testing.assert_allclose(logits, eager[index].numpy(), atol=1e-4, rtol=0)
