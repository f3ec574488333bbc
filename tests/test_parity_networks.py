"""Parity of real networks: trained weights, real samples, eager PyTorch as the other side."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgekit
from edgekit.gate_ways import GateWays
from edgekit.parity import compare_runtimes
from edgekit.parity_records import Budget
from edgekit.session import Session
from edgekit.shares import gate_shares

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "test.tar.gz"


def eager_session(bundle, name):
    """The zoo's network of that name, cut again, run by PyTorch."""
    pytest.importorskip("torch", reason="eager needs the export extra")
    from edgekit.exporters import stage_model
    from edgekit.exporters.stages import stage_module
    from edgekit.runtimes.eager import EagerRuntime
    from edgekit.zoo import registry

    made = stage_model(registry.load(name), (registry.find(name).example(),))
    assert made.plan == bundle.plan
    return Session(made.plan, EagerRuntime({cut.name: stage_module(cut) for cut in made.cuts}), {})


@pytest.mark.slow
def test_digits_on_onnxruntime_against_eager(exported_digits):
    torch = pytest.importorskip("torch")
    from edgekit.zoo import digits, registry

    data = digits.test_set()
    with (
        edgekit.Bundle.open(exported_digits) as bundle,
        edgekit.load(bundle) as session,
        eager_session(bundle, "msdnet-digits") as eager,
    ):
        parity = compare_runtimes({"eager": eager, "onnxruntime": session}, data)
    assert parity.exceeded == ()
    assert (parity.samples, parity.reference, parity.labelled) == (len(data), "eager", True)
    (run,) = parity.runs
    assert [stage.name for stage in run.stages] == [stage.name for stage in bundle.plan.stages]
    every = {each.name for stage in run.stages for each in stage.tensors}
    assert every == {name for stage in bundle.plan.stages for name in stage.outputs}
    assert all(each.spread.relative < 1e-5 for stage in run.stages for each in stage.tensors)
    assert run.decisions == 9 * len(data)
    assert run.flips <= 1
    with torch.inference_mode():
        whole = registry.load("msdnet-digits")(torch.from_numpy(data.batch(slice(None))))
    for step, logits in zip(run.exits, whole, strict=True):
        assert step.spread.scale == pytest.approx(float(logits.abs().max()), rel=1e-5)
        assert step.accuracy_reference == pytest.approx(float((logits.argmax(1).numpy() == data.labels).mean()))
    # The median of one setting against scores of the whole model, in double precision.
    first = next(each for each in run.policies if each.policy == "margin-q50")
    top = [torch.softmax(logits.double(), 1).topk(2, 1).values for logits in whole]
    margins = [(each[:, 0] - each[:, 1]).numpy() for each in top]
    leaves = margins[0] >= first.thresholds[0]
    assert first.exits[0].compared == len(data)
    assert first.exits[1].compared == int((~leaves).sum())
    assert leaves.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
def test_ways_through_gates_are_those_of_the_stages_that_ran(tmp_path):
    pytest.importorskip("torch", reason="exporting needs the export extra")
    from edgekit.zoo import digits, registry

    data = digits.test_set().take(slice(0, 40))
    network = registry.find("moe-digits")
    path = tmp_path / "moe.edgekit"
    with (
        edgekit.export(registry.load(network.name), (network.example(),), path, preprocess=network.preprocess) as made,
        edgekit.load(made) as session,
        GateWays(session, {}) as ways,
    ):
        result = session.run(data.batch(slice(None)))
        expected = {each.name: each.open for each in gate_shares(made.plan, result.exit.tolist(), result.executed)}
        found = [ways.of(sample) for sample in data.batches(1)]
        opened = {name: sum(each[name] for each, _ in found) for name in expected}
        assert opened == expected
        assert [answer for _, answer in found] == result.logits.argmax(1).tolist()
        parity = compare_runtimes({"a": session, "b": session}, data)
    (run,) = parity.runs
    assert [gate.name for gate in run.gates[0].gates] == [gate.name for gate in made.plan.gates]
    assert (run.flips, run.decisions, parity.exceeded) == (0, 40, ())


@pytest.mark.slow
@pytest.mark.cifar
@pytest.mark.skipif(not CIFAR.exists(), reason="CIFAR-10 test images are not beside the project (shared/data)")
def test_five_thousand_images_decide_alike(tmp_path):
    """What is promised: logits within 1e-4 of their scale, 99.98 % of the decisions, flips within 1e-4.

    The other runtimes have tests of their own on the same images.
    """
    from edgekit.data import load_dataset
    from edgekit.zoo import registry

    network = registry.find("msdnet-cifar10")
    data = load_dataset(CIFAR, preprocess=network.preprocess)
    assert len(data) == 5000
    with (
        edgekit.export(registry.load(network.name), (network.example(),), tmp_path / "net.edgekit") as made,
        edgekit.load(made) as session,
        eager_session(made, network.name) as eager,
    ):
        parity = compare_runtimes({"eager": eager, "onnxruntime": session}, data, budget=Budget(flip_share=2e-4))
    assert parity.exceeded == ()
    (run,) = parity.runs
    assert run.decisions == 9 * 5000
    for each in run.policies:
        assert len({count.name for count in each.exits}) == 4
