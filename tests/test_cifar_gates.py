"""Trained CIFAR networks with gates on real images: staged on ONNX Runtime against the masked eager model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import edgekit
from edgekit.data import load_dataset
from edgekit.plan import Run
from edgekit.zoo import registry

DATA = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "test.tar.gz"
NETWORKS = ("skipnet38-cifar10", "skipnet38-rnn-cifar10", "blockdrop-cifar10")

pytestmark = [
    pytest.mark.cifar,
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.exists(), reason="CIFAR-10 test images are not beside the project (shared/data)"),
]


@pytest.fixture(scope="module")
def images():
    return load_dataset(DATA, preprocess=registry.find(NETWORKS[0]).preprocess)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return registry.load(request.param)


@pytest.fixture(scope="module")
def eager(network, images):
    """Logits ``(samples, classes)`` and open gates ``(samples, gates)`` of the masked model."""
    with torch.inference_mode():
        parts = [network.routed(torch.from_numpy(batch)) for batch in images.batches(250)]
    return tuple(torch.cat(part).numpy() for part in zip(*parts, strict=True))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, network, images):
    example = torch.from_numpy(images.batch(slice(0, 4)))
    with edgekit.export(network, (example,), tmp_path_factory.mktemp("gates") / "net.edgekit") as made:
        yield made


def guarded(bundle):
    """A stage that runs only where its gate is open, for each gate in order."""
    return [next(step.stage for step in gate.steps if isinstance(step, Run)) for gate in bundle.plan.gates]


def test_every_block_that_has_a_gate_is_found(bundle, eager):
    assert len(bundle.plan.gates) == eager[1].shape[1]


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_values_gates_and_predictions_on_every_test_image(bundle, images, eager, batch):
    expected, is_open = eager
    stages, begin = guarded(bundle), 0
    with edgekit.load(bundle) as session:
        for inputs in images.batches(batch):
            rows = slice(begin, begin + len(inputs))
            result = session.run(inputs)
            np.testing.assert_allclose(result.logits, expected[rows], atol=1e-4, rtol=0)
            np.testing.assert_array_equal(result.logits.argmax(1), expected[rows].argmax(1))
            assert [result.executed[stage] for stage in stages] == is_open[rows].sum(0).astype(int).tolist()
            begin += len(inputs)
    assert begin == len(expected)


def test_all_gates_open_and_all_closed(bundle, network, images):
    stages = guarded(bundle)
    names = [gate.name for gate in bundle.plan.gates]
    x = images.batch(slice(0, 64))
    network.force_open = True
    try:
        with torch.inference_mode():
            every = network.routed(torch.from_numpy(x))[0].numpy()
    finally:
        network.force_open = False
    with edgekit.load(bundle) as session:
        for rows in (x, x[:1]):
            result = session.run(rows, gates=dict.fromkeys(names, True))
            np.testing.assert_allclose(result.logits, every[: len(rows)], atol=1e-4, rtol=0)
            assert [result.executed[stage] for stage in stages] == [len(rows)] * len(stages)
            closed = session.run(rows, gates=dict.fromkeys(names, False))
            assert [closed.executed[stage] for stage in stages] == [0] * len(stages)
