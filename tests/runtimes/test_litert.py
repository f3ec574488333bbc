"""LiteRT on stages of its own format: rows, buffers, files that are none, libraries; and CIFAR images against eager."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit.data import load_dataset
from edgekit.errors import BundleError, MissingExtraError, PluginError
from edgekit.exporters import export_bundle
from edgekit.exporters.to_litert import LiteRTTarget
from edgekit.interfaces import OperatorTimer
from edgekit.plan import Stage
from edgekit.policy import Policy
from edgekit.runtimes.host import ALIGNMENT
from edgekit.runtimes.litert import LIBRARIES, LiteRTRuntime
from edgekit.runtimes.litert_graph import OpenFile
from edgekit.tensors import TensorSpec
from edgekit.zoo import registry

pytest.importorskip("ai_edge_litert", reason="running on LiteRT needs the litert extra")
pytest.importorskip("litert_torch", reason="writing for LiteRT needs the export-litert extra")

ROWS = 12


class Net(nn.Module):
    """Three exits; the middle one's head reads what nothing else does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2), nn.Conv2d(8, 4, 3)
        self.early, self.inner, self.middle, self.last = (
            nn.Linear(6, 5),
            nn.Conv2d(8, 7, 1),
            nn.Linear(7, 5),
            nn.Linear(4, 5),
        )

    def forward(self, x):
        first = self.a(x).relu()
        second = self.b(first).relu()
        third = self.c(second)
        return [
            self.early(first.mean((2, 3))),
            self.middle(self.inner(second).mean((2, 3))),
            self.last(third.mean((2, 3))),
        ]


@pytest.fixture(scope="module")
def net():
    return Net().eval()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).standard_normal((ROWS, 3, 9, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def bundle(net, images, tmp_path_factory):
    path = tmp_path_factory.mktemp("litert") / "n.edgekit"
    with export_bundle(net, torch.from_numpy(images[:2]), path, targets=("litert",)) as made:
        yield made


@pytest.fixture(scope="module")
def files(bundle):
    return {stage.name: bundle.artifact("litert", stage.name) for stage in bundle.plan.stages}


@pytest.mark.parametrize("options", [{}, {"threads": 2}, {"xnnpack": False}])
@pytest.mark.parametrize("score", ["max_prob", "margin", "neg_entropy"])
def test_a_row_is_the_same_bits_in_every_batch(bundle, images, score, options):
    with edgekit.load(bundle, runtime="litert", policy=Policy.fixed([0, 0], score=score), **options) as session:
        limits = [float(np.quantile(session.run(images, exit=index).score, 0.6)) for index in range(2)]
        session.use(Policy.fixed(limits, score=score))
        single = [session.run(images[row : row + 1]) for row in range(ROWS)]
        expected = {field: np.concatenate([getattr(r, field) for r in single]) for field in ("logits", "exit", "score")}
        assert np.bincount(expected["exit"], minlength=3).min() > 0
        for size in (2, 5, ROWS, 3):
            parts = [session.run(images[at : at + size]) for at in range(0, ROWS, size)]
            for field, values in expected.items():
                np.testing.assert_array_equal(np.concatenate([getattr(part, field) for part in parts]), values)


def test_logits_and_scores_as_by_hand(bundle, net, images):
    temperatures = (1.0, 2.0, 0.5)
    with torch.no_grad():
        expected = [logits.double().numpy() for logits in net(torch.from_numpy(images))]
    for score in ("max_prob", "margin", "neg_entropy"):
        policy = Policy.fixed([0.5, 0.5], score=score, temperatures=temperatures)
        with edgekit.load(bundle, runtime="litert", policy=policy) as session:
            for index, logits in enumerate(session.run_exits(images)):
                np.testing.assert_allclose(logits, expected[index], atol=1e-5, rtol=0)
                z = expected[index] / temperatures[index]
                p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
                ranked = np.sort(p)
                by_hand = {
                    "max_prob": ranked[:, -1],
                    "margin": ranked[:, -1] - ranked[:, -2],
                    "neg_entropy": (p * np.log(p)).sum(1),
                }
                forced = session.run(images, exit=index)
                np.testing.assert_array_equal(forced.logits, logits)
                np.testing.assert_allclose(forced.score, by_hand[score], atol=1e-5, rtol=0)


def test_an_exit_that_is_never_taken_runs_no_head(bundle, images, monkeypatch):
    read = []
    give = OpenFile.give_memory
    monkeypatch.setattr(OpenFile, "give_memory", lambda self, name: read.append(name) or give(self, name))
    names = [stage.name for stage in bundle.plan.stages]
    with edgekit.load(bundle, runtime="litert", policy=Policy.fixed([np.inf, -np.inf])) as session:
        result = session.run(images)
        assert set(read) == {f"{names[0]}:trunk", names[1], names[2]}
        np.testing.assert_array_equal(result.exit, 1)
        np.testing.assert_array_equal(result.logits, session.run(images, exit=1).logits)
        assert names[0] in read, "one that is forced pays for every head on the way"


def test_a_nan_never_leaves_early(bundle, images):
    given = images[:4].copy()
    given[2] = np.nan
    with edgekit.load(bundle, runtime="litert", policy=Policy.fixed([-np.inf, -np.inf])) as session:
        for batch in (given, given[2:3], given[1:3]):
            result = session.run(batch)
            spoilt = np.isnan(batch).any((1, 2, 3))
            np.testing.assert_array_equal(result.exit[~spoilt], 0)
            np.testing.assert_array_equal(np.isfinite(result.logits).all(1), ~spoilt)
            np.testing.assert_array_equal(result.exit[spoilt], 2)
            assert np.isnan(result.score[spoilt]).all()


def test_a_larger_batch_then_smaller_ones(bundle, images):
    with edgekit.load(bundle, runtime="litert", policy=Policy.fixed([0.3, 0.3])) as used:
        for size in (1, 3, 9, 2, 1, 9):
            with edgekit.load(bundle, runtime="litert", policy=Policy.fixed([0.3, 0.3])) as fresh:
                one, other = used.run(images[-size:]), fresh.run(images[-size:])
            np.testing.assert_array_equal(one.logits, other.logits)
            np.testing.assert_array_equal(one.exit, other.exit)


def test_only_the_rows_and_outputs_that_are_bound_are_written(bundle, files):
    plan, runtime = bundle.plan, LiteRTRuntime()
    stage = plan.stages[0]
    buffers = {name: runtime.allocate(spec, 4) for name, spec in plan.tensors.items()}
    buffers[plan.exits[0].temperature].write(np.array(1, np.float32))
    buffers[plan.inputs[0].name].write(np.ones((4, 3, 9, 12), np.float32))
    (live, logits) = stage.live[0], stage.head[0]
    runtime.open(stage, files[stage.name]).bind(buffers, rows=2, outputs=[live])()
    assert buffers[live].read(2).any(axis=(1, 2, 3)).all()
    assert not buffers[live].read(4)[2:].any()
    assert not buffers[logits].read(4).any()


def test_what_is_bound_outlives_every_other_reference(bundle, files):
    plan, runtime = bundle.plan, LiteRTRuntime()
    stage = plan.stages[0]
    runner = runtime.open(stage, files[stage.name])
    buffers = {name: runtime.allocate(plan.tensors[name], 2) for name in (*stage.inputs, *stage.outputs)}
    buffers[plan.exits[0].temperature].write(np.array(1, np.float32))
    buffers[plan.inputs[0].name].write(np.ones((2, 3, 9, 12), np.float32))
    runs = [runner.bind(buffers, rows=rows, outputs=stage.outputs) for rows in (1, 2)]
    logits = buffers[stage.head[0]].read(2)
    runs[1]()
    expected = logits.copy()
    runner.close()
    buffers.clear()
    for run in runs * 10:
        logits[:] = 0
        np.full((2, 3, 9, 12), 7, np.float32)
        run()
        np.testing.assert_array_equal(logits[0], expected[0])
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize("shape", [("batch", 3), ("batch",), ("batch", 2, 5, 7), ("batch", 9, 11, 13), (1, 2, 3, 4)])
def test_buffers_look_alike_whatever_lies_in_memory(shape):
    buffer = LiteRTRuntime().allocate(TensorSpec("t", "float32", shape), 6)
    count = 6 if shape[0] == "batch" else 1
    rows = np.arange(count * int(np.prod(shape[1:])), dtype=np.float32).reshape(count, *shape[1:])
    buffer.write(rows)
    assert buffer.read(6).ctypes.data % ALIGNMENT == 0
    np.testing.assert_array_equal(buffer.read(6), rows)
    if count == 1:
        return
    buffer.copy(buffer, np.array([5, 4]), np.array([0, 3]))
    np.testing.assert_array_equal(buffer.read(6), rows[[5, 1, 2, 4, 4, 5]])
    other = LiteRTRuntime().allocate(buffer.spec, 8)
    other.copy(buffer, np.array([1, 4]), np.array([7, 0]))
    np.testing.assert_array_equal(other.read(8)[[7, 0, 1]], [rows[1], rows[4], 0 * rows[0]])
    view = buffer.read(2)
    buffer.write(rows[:2] + 1)
    np.testing.assert_array_equal(view, rows[:2] + 1)


def test_threads_that_share_a_runtime_wait_for_each_other(bundle, images):
    runtime, wrong = LiteRTRuntime(), []
    with edgekit.load(bundle, runtime=runtime) as one, edgekit.load(bundle, runtime=runtime) as other:
        given = [(one, images), (other, images[::-1].copy())]
        expected = [session.run(x, exit=2).logits for session, x in given]

        def work(number):
            session, x = given[number]
            answers = (session.run(x, exit=2).logits for _ in range(100))
            wrong.extend(not np.array_equal(each, expected[number]) for each in answers)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(wrong), sum(wrong)) == (200, 0)


def test_graphs_are_handed_to_xnnpack_before_they_have_memory(bundle, files, monkeypatch):
    """tflite-runtime does that when all is allocated, and not when one graph is."""
    done = []
    runtime = LiteRTRuntime()
    made = runtime._module.Interpreter

    class Told(made):
        def allocate_tensors(self):
            done.append("all")
            super().allocate_tensors()

    monkeypatch.setattr(runtime._module, "Interpreter", Told)
    give = OpenFile.give_memory
    monkeypatch.setattr(OpenFile, "give_memory", lambda self, name: done.append(name) or give(self, name))
    stage = bundle.plan.stages[-1]
    runner = runtime.open(stage, files[stage.name])
    assert done == ["all", stage.name]
    runner.close()
    with pytest.raises(PluginError, match=rf"stage '{stage.name}' is closed; open it again"):
        runner.bind({}, rows=1, outputs=stage.outputs)


@pytest.mark.parametrize("content", [b"", b"not a network", b"\x1c\0\0\0TFL3" + bytes(100), None])
def test_a_file_that_is_no_network(tmp_path, content):
    path = tmp_path / "s.tflite"
    if content is not None:
        path.write_bytes(content)
    stage = Stage(name="s", inputs=("x",), outputs=("y",), macs=None, weight_bytes=0, exit=False)
    with pytest.raises(
        BundleError, match=r"s\.tflite: stage 's' does not open in ai-edge-litert [\d.]+ \(.+\); export again"
    ) as caught:
        LiteRTRuntime().open(stage, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.999])
def test_a_file_that_was_cut_short(bundle, files, tmp_path, share):
    stage = bundle.plan.stages[-1]
    path = tmp_path / "s.tflite"
    content = files[stage.name].read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(BundleError, match="does not open in ai-edge-litert"):
        LiteRTRuntime().open(stage, path)


def test_a_file_of_another_stage(bundle, files):
    stages = bundle.plan.stages
    other = Stage(name="other", inputs=("x",), outputs=("y",), macs=None, weight_bytes=0, exit=False)
    held = f"{stages[0].name}, {stages[0].name}:trunk, {stages[1].name}, ..."
    with pytest.raises(BundleError, match=rf"is not stage 'other' \(it holds {held}, and no 'other'\); export again"):
        LiteRTRuntime().open(other, files[stages[0].name])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A stage ``(x, y) -> (z, w)`` on disk, its specs, and the file."""

    class Sum(nn.Module):
        def forward(self, x, y):
            return x + y, x - y

    specs = {name: TensorSpec(name, "float32", ("batch", 4)) for name in "xyzw"}
    stage = Stage(name="s", inputs=("x", "y"), outputs=("z", "w"), macs=None, weight_bytes=0, exit=False)
    program = torch.export.export(Sum().eval(), (torch.zeros(1, 4), torch.zeros(1, 4)))
    path = tmp_path_factory.mktemp("plain") / "s.tflite"
    LiteRTTarget().lower(program, stage, path, specs=specs)
    return stage, specs, path


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (("x",), ("z", "w"), r"is not stage 's' \(it takes 2 inputs, the plan says 1\); export again"),
        (("x", "y", "v"), ("z", "w"), r"it takes 2 inputs, the plan says 3"),
        (("x", "y"), ("z", "w", "u"), r"output 'u' is in the plan but not the file"),
        (("x", "y"), ("w",), r"output 'z' is in the file but not the plan"),
    ],
)
def test_a_file_with_other_tensors(plain, inputs, outputs, message):
    stage = Stage(name="s", inputs=inputs, outputs=outputs, macs=None, weight_bytes=0, exit=False)
    with pytest.raises(BundleError, match=message):
        LiteRTRuntime().open(stage, plain[2])


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "message"),
    [
        ("x", "float64", ("batch", 4), r"tensor 'x' is float32 \(1, 4\) in the file, float64 \(1, 4\) in the plan"),
        ("y", "float32", ("batch", 5), r"tensor 'y' is float32 \(1, 4\) in the file, float32 \(1, 5\) in the plan"),
        ("w", "int32", ("batch", 4), r"tensor 'w' is float32 \(1, 4\) in the file, int32 \(1, 4\) in the plan"),
        ("z", "float32", (), r"tensor 'z' is float32 \(1, 4\) in the file, float32 \(\) in the plan"),
    ],
)
def test_tensors_that_are_not_the_plans(plain, name, dtype, shape, message):
    stage, specs, path = plain
    runtime = LiteRTRuntime()
    buffers = {each: runtime.allocate(spec, 1) for each, spec in specs.items()}
    buffers[name] = runtime.allocate(TensorSpec(name, dtype, shape), 1)
    with pytest.raises(BundleError, match=rf"s\.tflite: stage 's': {message}"):
        runtime.open(stage, path).bind(buffers, rows=1, outputs=stage.outputs)


def test_provenance_and_silence(plain, capfd):
    runtime = LiteRTRuntime(threads=2, xnnpack=False)
    runtime.open(plain[0], plain[2])
    said = runtime.describe()
    assert (said["name"], said["library"], said["threads"], said["xnnpack"]) == ("litert", "ai-edge-litert", 2, False)
    assert said["version"][0].isdigit()
    assert "scripted" not in said
    assert not isinstance(runtime, OperatorTimer)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"threads": 0}, "threads cannot be 0"), ({"library": "tfgo"}, r"no library 'tfgo' \(there are ai-edge-litert, ")],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(PluginError, match=message):
        LiteRTRuntime(**options)


def hide(monkeypatch, *packages):
    for package in packages:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)


def test_a_library_that_is_missing_or_broken(monkeypatch, tmp_path):
    hide(monkeypatch, "ai_edge_litert", "tflite_runtime", "tensorflow")
    with pytest.raises(MissingExtraError, match=r"Running on LiteRT needs ai_edge_litert.*edgekit\[litert\]"):
        LiteRTRuntime()
    with pytest.raises(MissingExtraError, match="needs tensorflow"):
        LiteRTRuntime(library="tensorflow")
    package = tmp_path / "tflite_runtime"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "interpreter.py").write_text("raise OSError('libc.so.99: version GLIBC_9.9 not found')")
    monkeypatch.delitem(sys.modules, "tflite_runtime")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=r"tflite_runtime, which is installed but does not load \(libc.so.99"):
        LiteRTRuntime()


def test_the_library_that_is_there_is_taken(monkeypatch, tmp_path, plain):
    """tflite-runtime has the same interface: here it is ai-edge-litert under that name."""
    import ai_edge_litert.interpreter

    package = tmp_path / "tflite_runtime"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '2.99'")
    (package / "interpreter.py").write_text(
        "from builtins import taken_for_tflite_runtime as made\nInterpreter, OpResolverType = made"
    )
    found = ai_edge_litert.interpreter
    monkeypatch.setattr("builtins.taken_for_tflite_runtime", (found.Interpreter, found.OpResolverType), raising=False)
    hide(monkeypatch, "ai_edge_litert")
    monkeypatch.syspath_prepend(tmp_path)
    runtime = LiteRTRuntime()
    assert (runtime.describe()["library"], runtime.describe()["version"]) == ("tflite-runtime", "2.99")
    assert next(iter(LIBRARIES)) == "ai-edge-litert"
    stage, specs, path = plain
    buffers = {name: runtime.allocate(spec, 1) for name, spec in specs.items()}
    buffers["x"].write(np.ones((1, 4), np.float32))
    runtime.open(stage, path).bind(buffers, rows=1, outputs=["z"])()
    np.testing.assert_array_equal(buffers["z"].read(1), np.ones((1, 4)))


CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "test.tar.gz"
SETTINGS = {
    "max_prob": (0.6, 0.6, 0.6, 0.6),
    "margin": (0.8, 0.7, 0.6, 0.5),
    "neg_entropy": (-0.05, -0.1, -0.1, -0.2),
}


def exact_scores(logits, score):
    """In double precision, ``(exits, samples)``."""
    probabilities = torch.softmax(logits.double(), dim=2)
    top = probabilities.topk(2, dim=2).values
    return {
        "max_prob": top[..., 0],
        "margin": top[..., 0] - top[..., 1],
        "neg_entropy": (probabilities * torch.log_softmax(logits.double(), dim=2)).sum(dim=2),
    }[score].numpy()


@pytest.mark.slow
@pytest.mark.cifar
@pytest.mark.skipif(not CIFAR.exists(), reason="CIFAR-10 test images are not beside the project (shared/data)")
def test_values_and_decisions_on_every_cifar_image(tmp_path):
    """Logits within 1e-4 of their scale; at most 2 of 10,000 decisions differ, and those by less than 1e-4."""
    network = registry.find("msdnet-cifar10")
    model = registry.load(network.name)
    images = load_dataset(CIFAR, preprocess=network.preprocess)
    with torch.inference_mode():
        eager = torch.cat([torch.stack(model(torch.from_numpy(x))) for x in images.batches(250)], dim=1)
    scale = eager.abs().amax(dim=(1, 2)).numpy()
    example = torch.from_numpy(images.batch(slice(0, 8)))
    with (
        export_bundle(model, example, tmp_path / "net.edgekit", targets=("litert",)) as bundle,
        edgekit.load(bundle, runtime="litert") as session,
    ):
        for index, expected in enumerate(eager):
            logits = np.concatenate([session.run(x, exit=index).logits for x in images.batches(250)])
            assert np.abs(logits - expected.numpy()).max() <= 1e-4 * scale[index]
        for score, thresholds in SETTINGS.items():
            scores = exact_scores(eager, score)
            distances = np.abs(scores[:4] - np.array(thresholds)[:, None])
            passed = scores[:4] >= np.array(thresholds, np.float32)[:, None]
            decided = np.where(passed.any(0), passed.argmax(0), 4)
            assert np.bincount(decided, minlength=5).min() > 0
            session.use(Policy.fixed(thresholds, score=score))
            results = [session.run(x) for x in images.batches(1)]
            taken = np.concatenate([result.exit for result in results])
            differing = np.flatnonzero(taken != decided)
            assert len(differing) <= 0.0002 * len(images)
            for row in differing:
                assert distances[min(taken[row], decided[row]), row] < 1e-4
            batched = np.concatenate([session.run(x).exit for x in images.batches(64)])
            np.testing.assert_array_equal(batched, taken)
