"""ExecuTorch on stages of trained networks, against eager PyTorch; files that are no such stage; threads; operators."""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgekit.data import Dataset, load_dataset
from edgekit.errors import BundleError, MeasurementError, MissingExtraError, PluginError
from edgekit.plan import SCORES, Run, Stage
from edgekit.policy import Policy
from edgekit.profiles.operators import time_operators
from edgekit.progress import silent
from edgekit.runtimes import executorch_library
from edgekit.runtimes.executorch import ExecuTorchRuntime
from edgekit.session import Session
from edgekit.tensors import TensorSpec

torch = pytest.importorskip("torch", reason="ExecuTorch's library needs torch")
pytest.importorskip("executorch.version", reason="running on ExecuTorch needs the executorch extra")

import edgekit  # noqa: E402
from edgekit.exporters import export_bundle, stage_model  # noqa: E402
from edgekit.zoo import digits, registry  # noqa: E402

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "test.tar.gz"


def exported(name, folder):
    network = registry.find(name)
    export_bundle(
        registry.load(name),
        (network.example(),),
        folder / f"{name}.edgekit",
        targets=("executorch",),
        preprocess=network.preprocess,
    ).close()
    return folder / f"{name}.edgekit"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The trained MSDNet on digits."""
    return exported("msdnet-digits", tmp_path_factory.mktemp("executorch"))


@pytest.fixture(scope="module")
def images():
    return digits.test_set().batch(slice(0, 40))


@pytest.fixture(scope="module")
def eager(images):
    """Logits of every exit, from the model itself."""
    with torch.inference_mode():
        return [logits.numpy() for logits in registry.load("msdnet-digits")(torch.from_numpy(images))]


@pytest.fixture
def first(bundle):
    """The first stage of the digits network, its file, and the tensors of the plan."""
    with edgekit.Bundle.open(bundle) as opened:
        stage = opened.plan.stages[0]
        return stage, opened.artifact("executorch", stage.name), opened.plan.tensors


def load(bundle, policy=None, **options):
    return edgekit.load(bundle, runtime="executorch", policy=policy, **options)


def scores_by_hand(logits, temperature):
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    ranked = np.sort(p, axis=1)
    return {
        "max_prob": ranked[:, -1],
        "margin": ranked[:, -1] - ranked[:, -2],
        "neg_entropy": (p * np.log(p)).sum(1),
    }


@pytest.mark.parametrize("score", SCORES)
def test_logits_and_scores_of_every_exit_forced(bundle, images, eager, score):
    temperatures = (1.0, 2.0, 0.5)
    policy = Policy.fixed([0.5, 0.5], score=score, temperatures=temperatures)
    with load(bundle, policy) as session:
        for index, each in enumerate(session.run_exits(images)):
            np.testing.assert_allclose(each, eager[index], rtol=0, atol=1e-4)
            for rows in (images[:7], images[:1]):
                forced = session.run(rows, exit=index)
                np.testing.assert_array_equal(forced.logits, each[: len(rows)])
                by_hand = scores_by_hand(eager[index][: len(rows)], temperatures[index])[score]
                np.testing.assert_allclose(forced.score, by_hand, rtol=0, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("score", SCORES)
def test_decisions_are_the_models_and_the_same_bits_in_every_batch(bundle, images, eager, score, threads):
    found = [scores_by_hand(logits, 1.0)[score] for logits in eager]
    thresholds = [float(np.sort(each)[18:20].mean()) for each in found[:-1]]
    expected = np.where(found[0] >= thresholds[0], 0, np.where(found[1] >= thresholds[1], 1, 2))
    assert np.bincount(expected, minlength=3).min() > 0
    with load(bundle, Policy.fixed(thresholds, score=score), threads=threads) as session:
        alone = [session.run(images[row : row + 1]) for row in range(len(images))]
        for size in (40, 7, 2):
            parts = [session.run(images[at : at + size]) for at in range(0, len(images), size)]
            for field in ("logits", "exit", "score"):
                one, other = (np.concatenate([getattr(each, field) for each in way]) for way in (alone, parts))
                np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(np.concatenate([each.exit for each in alone]), expected)


def test_nan_and_infinity_never_leave_early(bundle, images):
    poisoned = images[:5].copy()
    poisoned[1, 0, 3, 3], poisoned[2], poisoned[3, 0, 0, 0] = np.nan, np.nan, np.inf
    with load(bundle, Policy.fixed([0.0, 0.0])) as session:
        together = session.run(poisoned)
        np.testing.assert_array_equal(together.exit, [0, 2, 2, 2, 0])
        assert np.isnan(together.score[1:4]).all()
        assert np.isfinite(together.score[[0, 4]]).all()
        for row in range(5):
            assert session.run(poisoned[row : row + 1]).exit[0] == together.exit[row]


def test_an_exit_that_is_never_taken_pays_no_head(bundle, images, eager):
    inf = float("inf")
    with load(bundle, Policy.fixed([inf, 0.0])) as session:
        timing = session.runtime.timing_operators()
        with session.again(timing) as again:
            results = [again.run(images[row : row + 1]) for row in range(8)]
        operators = timing.operator_times()
    for row, result in enumerate(results):
        assert result.exit[0] == 1
        np.testing.assert_allclose(result.logits[0], eager[1][row], rtol=0, atol=1e-4)
    stages = [stage.name for stage in session.plan.stages]
    methods = {stage: {each.name.split()[0] for each in operators if each.stage == stage} for stage in stages}
    assert methods == {stages[0]: {"trunk"}, stages[1]: {"forward", "max_prob"}, stages[2]: set()}


def test_larger_and_smaller_batches_in_turn(bundle, images):
    with load(bundle, Policy.fixed([0.9, 0.9])) as used:
        for size in (1, 3, 9, 2, 1, 9):
            with load(bundle, Policy.fixed([0.9, 0.9])) as fresh:
                np.testing.assert_array_equal(used.run(images[-size:]).logits, fresh.run(images[-size:]).logits)


@pytest.fixture(scope="module")
def act(tmp_path_factory):
    """The trained network with gates, whose steps share a stage, and what the whole graph gives, gates forced too."""
    model = registry.load("act-digits")
    staged = stage_model(model, (registry.find("act-digits").example(),))
    x = digits.test_set().batch(slice(0, 12))
    return exported("act-digits", tmp_path_factory.mktemp("gates")), staged, x


@pytest.mark.slow
def test_gates_free_and_forced(act):
    path, staged, x = act
    inputs = [torch.from_numpy(x)]
    expected = staged.eager(inputs)[-1].numpy()
    with load(path) as session:
        assert len({step.stage for gate in session.plan.gates for step in gate.steps if isinstance(step, Run)}) < len(
            session.plan.gates
        )
        runs = []
        for rows in (slice(0, 12), *(slice(row, row + 1) for row in range(12))):
            result = session.run(x[rows])
            np.testing.assert_allclose(result.logits, expected[rows], rtol=0, atol=1e-4)
            runs.append(result.executed)
        assert runs[0] == {stage: sum(alone[stage] for alone in runs[1:]) for stage in runs[0]}
        assert len({tuple(alone.values()) for alone in runs[1:]}) > 1, "samples must take different ways"
        for gates, whole in staged.forced(inputs):
            few = x[: len(whole[-1])]
            for rows in (few, few[:1]):
                result = session.run(rows, gates=gates)
                np.testing.assert_allclose(result.logits, whole[-1].numpy()[: len(rows)], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["switch-digits", "moe-digits"])
def test_trained_experts(name, tmp_path):
    x = digits.test_set().batch(slice(0, 60))
    with torch.inference_mode():
        expected = registry.load(name)(torch.from_numpy(x))
    expected = expected[-1] if isinstance(expected, list | tuple) else expected
    with load(exported(name, tmp_path)) as session:
        for size in (60, 1):
            parts = [session.run(x[at : at + size]).logits for at in range(0, 60, size)]
            np.testing.assert_allclose(np.concatenate(parts), expected.numpy(), rtol=0, atol=1e-4)


def buffers_of(runtime, stage, tensors, rows):
    made = {name: runtime.allocate(tensors[name], rows) for name in (*stage.inputs, *stage.outputs)}
    made[stage.inputs[-1]].write(np.float32(1))
    return made


def test_only_what_is_asked_for_is_written(first, images, eager):
    stage, file, tensors = first
    runtime = ExecuTorchRuntime()
    runner = runtime.open(stage, file)
    buffers = buffers_of(runtime, stage, tensors, 4)
    buffers[stage.inputs[0]].write(images[:2])
    logits, *scores = stage.head
    runner.bind(buffers, rows=2, outputs=[stage.live[1]])()
    assert buffers[stage.live[1]].read(2).any()
    assert not buffers[stage.live[1]].read(4)[2:].any()
    assert not any(buffers[name].read(4).any() for name in (stage.live[0], *stage.head))
    del buffers[logits]
    runner.bind(buffers, rows=2, outputs=[scores[1]])()
    expected = scores_by_hand(eager[0][:2], 1.0)["margin"]
    np.testing.assert_allclose(buffers[scores[1]].read(2), expected, rtol=0, atol=1e-4)
    assert not buffers[scores[0]].read(4).any()


def test_what_is_bound_to_other_tensors_is_not_disturbed(first, images):
    stage, file, tensors = first
    runtime = ExecuTorchRuntime()
    runner = runtime.open(stage, file)
    both = [buffers_of(runtime, stage, tensors, 1) for _ in range(2)]
    runs = [runner.bind(buffers, rows=1, outputs=stage.outputs) for buffers in both]
    expected = []
    for buffers, run, image in zip(both, runs, images, strict=False):
        buffers[stage.inputs[0]].write(image[None])
        run()
        expected.append({name: buffers[name].read(1).copy() for name in stage.outputs})
    for _ in range(3):
        for buffers, run, answers in zip(both, runs, expected, strict=True):
            for name in stage.outputs:
                buffers[name].read(1)[...] = 0
            run()
            for name, answer in answers.items():
                np.testing.assert_array_equal(buffers[name].read(1), answer)


def test_what_is_bound_outlives_every_other_reference(first, images):
    stage, file, tensors = first
    runtime = ExecuTorchRuntime()
    buffers = buffers_of(runtime, stage, tensors, 1)
    buffers[stage.inputs[0]].write(images[:1])
    runner = runtime.open(stage, file)
    run = runner.bind(buffers, rows=1, outputs=stage.outputs)
    logits = buffers[stage.head[0]].read(1)
    run()
    expected = logits.copy()
    runner.close()
    del runner, runtime
    buffers.clear()
    gc.collect()
    logits[:] = 0
    for _ in range(20):
        np.full((1, 1, 8, 8), 7, np.float32)
        run()
    np.testing.assert_array_equal(logits, expected)


def test_threads_are_one_pool_for_the_process(bundle, images):
    library = ExecuTorchRuntime().library
    with load(bundle, threads=2) as session:
        expected = session.run(images[:1]).logits
        assert library._threadpool_get_thread_count() == 2
        with pytest.raises(PluginError, match=r"hold ExecuTorch's one pool of 2 threads; close .* threads=1"):
            load(bundle, threads=1)
        with load(bundle, threads=2) as other:
            np.testing.assert_array_equal(other.run(images[:1]).logits, expected)
        np.testing.assert_array_equal(session.run(images[:1]).logits, expected)
    assert library._threadpool_get_thread_count() == 2
    with load(bundle, threads=1) as session:
        session.run(images[:1])
    assert library._threadpool_get_thread_count() == 1


def test_no_threads():
    with pytest.raises(PluginError, match="threads cannot be 0; give 1 or more"):
        ExecuTorchRuntime(threads=0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[:7],
        lambda content: content[:3000],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"not a network",
        lambda content: bytes(len(content)),
        None,
    ],
)
def test_a_file_that_is_truncated_or_no_network(first, spoil, tmp_path, capfd):
    stage, file, _ = first
    path = tmp_path / "s.pte"
    if spoil is not None:
        path.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(BundleError, match=rf"s.pte: stage '{stage.name}' does not open in ExecuTorch") as caught:
        ExecuTorchRuntime().open(stage, path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_program_that_edgekit_did_not_write(first, tmp_path):
    exir = importlib.import_module("executorch.exir")
    program = torch.export.export(torch.nn.Linear(3, 3), (torch.zeros(1, 3),))
    path = tmp_path / "s.pte"
    path.write_bytes(exir.to_edge_transform_and_lower(program).to_executorch().buffer)
    with pytest.raises(BundleError, match=r"s.pte: edgekit did not write this file of stage 'blocks.0.0'"):
        ExecuTorchRuntime().open(first[0], path)


def renamed(stage, old, new):
    return msgspec.structs.replace(
        stage,
        inputs=tuple(new if name == old else name for name in stage.inputs),
        outputs=tuple(new if name == old else name for name in stage.outputs),
    )


def test_the_file_of_another_stage(bundle):
    with edgekit.Bundle.open(bundle) as opened:
        first, second, _ = opened.plan.stages
        file = opened.artifact("executorch", second.name)
        with pytest.raises(BundleError, match=r"pte: input '.+' of stage 'blocks.0.0' is in the (plan|file) but not"):
            ExecuTorchRuntime().open(first, file)
        name = second.inputs[0]
        with pytest.raises(BundleError, match=rf"input '{name}' of stage 'blocks.1' is in the file but not the plan"):
            ExecuTorchRuntime().open(renamed(second, name, "zzz"), file)
        turned = msgspec.structs.replace(second, inputs=(second.inputs[1], second.inputs[0], second.inputs[2]))
        with pytest.raises(BundleError, match=r"method 'forward' of stage 'blocks.1' has its tensors in another order"):
            ExecuTorchRuntime().open(turned, file)


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("float32", ("batch", 1, 8, 9), r"tensor 'x' is float32 \(1, 1, 8, 8\) in the file, float32 \(1, 1, 8, 9\) in"),
        ("float64", ("batch", 1, 8, 8), r"tensor 'x' is float32 \(1, 1, 8, 8\) in the file, float64 \(1, 1, 8, 8\) in"),
        ("float32", ("batch", 64), r"tensor 'x' is float32 \(1, 1, 8, 8\) in the file, float32 \(1, 64\) in"),
    ],
)
def test_tensors_that_are_not_the_plans(first, dtype, shape, message):
    stage, file, tensors = first
    runtime = ExecuTorchRuntime()
    runner = runtime.open(stage, file)
    buffers = buffers_of(runtime, stage, {**tensors, "x": TensorSpec("x", dtype, shape)}, 1)
    with pytest.raises(BundleError, match=rf"pte: stage 'blocks.0.0': {message} the plan; export again"):
        runner.bind(buffers, rows=1, outputs=stage.outputs)


@pytest.mark.parametrize("missing", ["executorch", "torch"])
def test_a_missing_library_names_the_install_line(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "executorch.version", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[executorch\]'"):
        ExecuTorchRuntime()


def test_a_library_that_does_not_load(monkeypatch):
    load = importlib.import_module

    def broken(name):
        if name == "executorch.extension.pybindings._C":
            raise ImportError("libtorch_cpu.so: undefined symbol\nand more")
        return load(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    message = r"executorch, which is installed but .* undefined symbol\); install"
    with pytest.raises(PluginError, match=message) as caught:
        ExecuTorchRuntime()
    assert "\n" not in str(caught.value)


def test_what_others_write_meanwhile_is_passed_on(capsys):
    with executorch_library.listening() as said:
        print("[method.cpp:7] of ExecuTorch", file=sys.stderr)
        print("of somebody else", file=sys.stderr)
    assert said == ["of ExecuTorch"]
    assert capsys.readouterr().err == "of somebody else\n"


def test_provenance():
    runtime = ExecuTorchRuntime(threads=2)
    said = runtime.describe()
    assert (said["name"], said["device"], said["backend"], said["threads"]) == ("executorch", "cpu", "XNNPACK", 2)
    assert said["version"].startswith("1.")
    assert "scripted" not in said
    assert runtime.timing_operators().describe() == said


def test_operators_of_every_stage(bundle, images):
    with load(bundle) as session:
        data = Dataset(inputs=images)
        found = time_operators(session, data, runs=10, rng=np.random.default_rng(0), progress=silent)
    assert {each.stage for each in found} == {stage.name for stage in session.plan.stages}
    assert len({(each.stage, each.name) for each in found}) == len(found)
    assert {"forward", "max_prob"} == {each.name.split()[0] for each in found}
    assert {each.calls for each in found} == {10}
    kinds = {each.kind for each in found}
    assert any("Convolution" in kind for kind in kinds)
    assert {"_softmax.out", "amax.out"} <= kinds
    for stage in session.plan.stages:
        assert sum(each.share for each in found if each.stage == stage.name) == pytest.approx(1)


def test_only_a_runtime_that_records_tells_operators(monkeypatch, first, images):
    runtime = ExecuTorchRuntime()
    with pytest.raises(MeasurementError, match="runtime 'executorch' records no operators"):
        runtime.operator_times()
    stage, file, tensors = first
    timing = runtime.timing_operators()
    buffers = buffers_of(timing, stage, tensors, 1)
    timing.open(stage, file).bind(buffers, rows=1, outputs=stage.outputs)()
    monkeypatch.setattr("subprocess.run", lambda *_, **__: None)
    with pytest.raises(MeasurementError, match="ExecuTorch's recording cannot be read"):
        timing.operator_times()


SETTINGS = {
    "max_prob": (0.6, 0.6, 0.6, 0.6),
    "margin": (0.8, 0.7, 0.6, 0.5),
    "neg_entropy": (-0.05, -0.1, -0.1, -0.2),
}


@pytest.mark.slow
@pytest.mark.cifar
@pytest.mark.skipif(not CIFAR.exists(), reason="CIFAR-10 test images are not beside the project (shared/data)")
def test_values_and_decisions_on_every_cifar_image(tmp_path):
    """Prints what it measured (``-s``): largest difference relative to the logits' scale, agreement, flips."""
    images = load_dataset(CIFAR, preprocess=registry.find("msdnet-cifar10").preprocess)
    model = registry.load("msdnet-cifar10")
    with torch.inference_mode():
        parts = [torch.stack(model(torch.from_numpy(batch))) for batch in images.batches(250)]
    eager = torch.cat(parts, dim=1).numpy()
    count = eager.shape[1]
    path = exported("msdnet-cifar10", tmp_path)
    with load(path) as session:
        parts = [session.run_exits(batch) for batch in images.batches(50)]
    given = np.stack([np.concatenate(each) for each in zip(*parts, strict=True)])
    scale = np.abs(eager).max(axis=(1, 2))
    relative = np.abs(given - eager).max(axis=(1, 2)) / scale
    print("\nlargest difference of each exit, relative to its scale", relative, "scales", scale)
    assert (relative <= 1e-4).all()
    for score, thresholds in SETTINGS.items():
        found = np.stack([scores_by_hand(logits, 1.0)[score] for logits in eager])
        expected = np.full(count, len(eager) - 1)
        nearest = np.full(count, np.inf)
        for index in reversed(range(len(thresholds))):
            passes = found[index] >= np.float32(thresholds[index])
            expected[passes] = index
            distance = np.abs(found[index] - np.float32(thresholds[index]))
            nearest = np.where(passes, distance, np.minimum(distance, nearest))
        assert len(set(expected.tolist())) >= 4, "the setting must exercise the exits"
        with load(path, Policy.fixed(thresholds, score=score)) as session:
            taken = np.concatenate([session.run(batch).exit for batch in images.batches(64)])
            alone = [int(session.run(images.batch(slice(row, row + 1))).exit[0]) for row in range(count)]
        np.testing.assert_array_equal(taken, alone)
        flips = np.flatnonzero(taken != expected)
        print(score, thresholds, "exits", np.bincount(expected).tolist(), "agreement", 1 - len(flips) / count,
              "flips", len(flips), "nearest threshold", nearest[flips].tolist())  # fmt: skip
        assert len(flips) <= 0.0002 * count
        assert (nearest[flips] <= 1e-4).all()


def test_a_session_of_ready_stages(bundle, images):
    """As a device does that has the plan and the files alone."""
    with edgekit.Bundle.open(bundle) as opened:
        files = {stage.name: opened.artifact("executorch", stage.name) for stage in opened.plan.stages}
        with Session(opened.plan, ExecuTorchRuntime(), files, policy=Policy.never(3)) as session:
            assert (session.run(images[:3]).exit == 2).all()


def test_a_stage_without_an_exit_or_a_method_is_no_stage(first):
    stage, file, _ = first
    plain = Stage(name="s", inputs=stage.inputs, outputs=stage.outputs, macs=None, weight_bytes=0, exit=False)
    with pytest.raises(BundleError, match="of stage 's' is in the plan but not the file"):
        ExecuTorchRuntime().open(plain, file)
