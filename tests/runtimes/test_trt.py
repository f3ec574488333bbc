"""TensorRT on stand-ins of its libraries, which compute in memory of their own; against ONNX Runtime and numpy."""

from __future__ import annotations

import gc
import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.bundle import Bundle
from edgekit.engines import build_engines
from edgekit.errors import BundleError, EdgekitError, InputError, LoweringError, MissingExtraError, PluginError
from edgekit.interfaces import DeviceClock
from edgekit.plan import Stage
from edgekit.policy import Policy
from edgekit.runtimes.cuda import Cuda, DeviceBuffer, OutOfDeviceMemoryError
from edgekit.runtimes.trt import TensorRTRuntime
from edgekit.session import Session
from edgekit.tensors import TensorSpec

STANDINS = Path(__file__).parents[1] / "tensorrt"
KINDS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}


def _standin(name):
    spec = importlib.util.spec_from_file_location(name, STANDINS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake_cuda, fake_trt = _standin("fake_cuda"), _standin("fake_trt")
TO_DEVICE, TO_HOST, ON_DEVICE = fake_cuda.Kind


class Gpu:
    """A machine with a GPU and TensorRT, of a version."""

    def __init__(self, monkeypatch, folder):
        self._patch = monkeypatch
        self._folder = folder
        self.use()

    def use(self, version="10.3.0", *, refuses=(), no_memory=False, **facts):
        self.cuda = fake_cuda.FakeCuda(**facts)
        self.trt = fake_trt.fake_tensorrt(self.cuda, version, refuses=refuses, no_memory=no_memory)
        self._patch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda)
        self._patch.setitem(sys.modules, "tensorrt", self.trt)
        return self

    def runtime(self, **options):
        return TensorRTRuntime(**{"cache": self._folder / "engines", **options})


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    return Gpu(monkeypatch, tmp_path)


def write_stage(folder, *, given, made, nodes, weights=(), name="s"):
    """A stage's file; ``given`` and ``made`` are (name, dtype, shape)."""
    sides = [[helper.make_tensor_value_info(name, KINDS[kind], shape) for name, kind, shape in side]
             for side in (given, made)]  # fmt: skip
    held = [numpy_helper.from_array(array, name) for name, array in dict(weights).items()]
    graph = helper.make_graph(nodes, name, *sides, held)
    path = folder / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def stage_of(given, made, **facts):
    return Stage(
        name="s",
        inputs=tuple(name for name, *_ in given),
        outputs=tuple(name for name, *_ in made),
        macs=None,
        weight_bytes=0,
        exit=False,
        **facts,
    )


SCALED = [("x", "float32", ("batch", 3)), ("t", "float32", ())], [("y", "float32", ("batch", 3))]


def scaled(folder):
    """``y = x / t``."""
    return write_stage(folder, given=SCALED[0], made=SCALED[1], nodes=[helper.make_node("Div", ["x", "t"], ["y"])])


def opened(runtime, folder, *, rows=4, **facts):
    """``y = x / t`` open, and its buffers with ``x`` counting up and ``t`` 2."""
    runner = runtime.open(stage_of(*SCALED, **facts), scaled(folder))
    specs = [TensorSpec(*each) for side in SCALED for each in side]
    buffers = {spec.name: runtime.allocate(spec, rows) for spec in specs}
    buffers["x"].write(np.arange(3 * rows, dtype=np.float32).reshape(rows, 3))
    buffers["t"].write(np.array(2, np.float32))
    return runner, buffers


@pytest.fixture(scope="module")
def digits():
    from edgekit.zoo.digits import test_set

    return test_set().batch(slice(40))


def thresholds(session, x):
    """A policy that lets about half of those who are left leave at each exit."""
    scores = [session.run(x, exit=index).score for index in range(len(session.plan.exits) - 1)]
    return Policy.fixed([float(np.median(each)) for each in scores])


def one_by_one(session, x):
    runs = [session.run(x[row : row + 1]) for row in range(len(x))]
    return [np.concatenate([getattr(run, field) for run in runs]) for field in ("logits", "exit", "score")]


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "11.4.0"])
def test_a_network_answers_as_on_onnxruntime(gpu, exported_digits, digits, version):
    gpu.use(version)
    with edgekit.load(exported_digits, runtime="onnxruntime") as reference:
        policy = thresholds(reference, digits)
        reference.use(policy)
        expected = one_by_one(reference, digits)
        logits = reference.run_exits(digits[:3])
    assert set(expected[1]) == {0, 1, 2}
    with Session.open(exported_digits, runtime=gpu.runtime(), policy=policy) as session:
        for _ in range(3):  # kernel by kernel, captured, and as a graph
            for found, wanted in zip(one_by_one(session, digits), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)
        for size in (2, 7, 40):
            parts = [session.run(digits[at : at + size]) for at in range(0, len(digits), size)]
            for field, wanted in zip(("logits", "exit", "score"), expected, strict=True):
                np.testing.assert_array_equal(np.concatenate([getattr(part, field) for part in parts]), wanted)
        for found, wanted in zip(session.run_exits(digits[:3]), logits, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.slow
def test_gates_take_every_way(gpu, exported_moe_digits, digits):
    with edgekit.load(exported_moe_digits, runtime="onnxruntime") as reference:
        expected = one_by_one(reference, digits[:12])
        closed = {gate.name: False for gate in reference.plan.gates}
        none = reference.run(digits[:1], gates=closed).logits
    with Session.open(exported_moe_digits, runtime=gpu.runtime()) as session:
        for _ in range(2):
            np.testing.assert_array_equal(one_by_one(session, digits[:12])[0], expected[0])
        together = session.run(digits[:12])
        np.testing.assert_array_equal(together.logits, expected[0])
        np.testing.assert_array_equal(session.run(digits[:1], gates=closed).logits, none)


@pytest.fixture(scope="module")
def exported_moe_digits(tmp_path_factory):
    pytest.importorskip("torch", reason="exporting needs the export extra")
    from edgekit.zoo.registry import find, load

    network = find("moe-digits")
    path = tmp_path_factory.mktemp("moe") / "moe.edgekit"
    edgekit.export(load(network.name), (network.example(),), path).close()
    return path


def test_only_what_is_decided_on_crosses(gpu, exported_digits, digits):
    with Session.open(exported_digits, runtime=gpu.runtime(), policy=Policy.fixed([2, 2])) as session:
        for _ in range(3):
            session.run(digits[:1])
        gpu.cuda.copies.clear()
        session.run(digits[:1])
        sent = [size for kind, size in gpu.cuda.copies if kind == TO_DEVICE]
        read = [size for kind, size in gpu.cuda.copies if kind == TO_HOST]
        assert sent == [digits[:1].nbytes]
        assert sorted(read) == [4, 4, 4, 40], "three scores, and the logits of the last exit"
        gpu.cuda.copies.clear()
        session.run(digits[:8])
        sent = [size for kind, size in gpu.cuda.copies if kind == TO_DEVICE]
        read = [size for kind, size in gpu.cuda.copies if kind == TO_HOST]
        assert sent == [digits[:8].nbytes]
        assert sorted(read) == [32, 32, 32, 320, 320, 320], "scores and logits of eight rows at three exits"


def test_rows_that_stay_are_moved_on_the_device(gpu, exported_digits, digits):
    with Session.open(exported_digits, runtime=gpu.runtime()) as session:
        session.use(thresholds(session, digits))
        gpu.cuda.copies.clear()
        session.run(digits)
        assert any(kind == ON_DEVICE for kind, _ in gpu.cuda.copies)
        assert sum(size for kind, size in gpu.cuda.copies if kind == TO_HOST) < 44 * 3 * len(digits) + 1


def test_a_stage_is_a_graph_from_its_second_run_on(gpu, tmp_path):
    runtime = gpu.runtime()
    runner, buffers = opened(runtime, tmp_path)
    run = runner.bind(buffers, rows=1, outputs=["y"])
    assert gpu.trt.ran == [], "binding runs nothing: what is bound now may be for later"
    launched = []
    for _ in range(3):
        run()
        launched.append(gpu.cuda.calls.count("cudaGraphLaunch"))
        np.testing.assert_array_equal(buffers["y"].read(1), [[0, 0.5, 1]])
    assert launched == [0, 1, 2]
    assert runtime.describe()["not_captured"] == {}
    buffers["t"].write(np.array(4, np.float32))
    run()
    np.testing.assert_array_equal(buffers["y"].read(1), [[0, 0.25, 0.5]])


def test_what_is_bound_stays_as_it_was(gpu, tmp_path):
    runtime = gpu.runtime(max_batch=4)
    runner, buffers = opened(runtime, tmp_path)
    other = {**buffers, "y": runtime.allocate(buffers["y"].spec, 4)}
    runs = [runner.bind(b, rows=rows, outputs=["y"]) for b in (buffers, other) for rows in (1, 3, 4)]
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    for _ in range(3):
        for bound, rows, run in zip([buffers] * 3 + [other] * 3, [1, 3, 4] * 2, runs, strict=True):
            bound["y"].write(np.full((4, 3), -1, np.float32))
            run()
            np.testing.assert_array_equal(bound["y"].read(4)[:rows], x[:rows] / 2)
            np.testing.assert_array_equal(bound["y"].read(4)[rows:], -1)


def test_what_is_bound_outlives_every_other_reference(gpu, tmp_path):
    runtime = gpu.runtime()
    runner, buffers = opened(runtime, tmp_path)
    runs = [runner.bind(buffers, rows=rows, outputs=["y"]) for rows in (1, 4)]
    y = buffers["y"]
    buffers.clear()
    gc.collect()
    for run in runs * 3:
        run()
    np.testing.assert_array_equal(y.read(4)[3], [4.5, 5, 5.5])


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_stage_that_cannot_be_captured_runs_without(gpu, tmp_path, call):
    runtime = gpu.runtime()
    runner, buffers = opened(runtime, tmp_path)
    run = runner.bind(buffers, rows=1, outputs=["y"])
    gpu.cuda.fails[call] = fake_cuda.Error.cudaErrorStreamCaptureInvalidated
    if call == "cudaStreamBeginCapture":
        runtime.cuda._stream.captured = None
    for _ in range(3):
        run()
        gpu.cuda.fails.pop(call, None)
        runtime.cuda._stream.captured = None
    np.testing.assert_array_equal(buffers["y"].read(1), [[0, 0.5, 1]])
    assert "cudaGraphLaunch" not in gpu.cuda.calls
    assert "cudaErrorStreamCaptureInvalidated" in runtime.describe()["not_captured"]["s"]
    assert gpu.cuda.graphs == 0, "every graph that was captured is given back"


def test_graphs_can_be_switched_off(gpu, tmp_path):
    runtime = gpu.runtime(cuda_graphs=False)
    runner, buffers = opened(runtime, tmp_path)
    run = runner.bind(buffers, rows=1, outputs=["y"])
    run()
    run()
    assert "cudaStreamBeginCapture" not in gpu.cuda.calls
    np.testing.assert_array_equal(buffers["y"].read(1), [[0, 0.5, 1]])


def test_a_batch_runs_row_by_row_unless_engines_take_more(gpu, tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    for options, times in (({}, 4), ({"max_batch": 4}, 1), ({"max_batch": 4, "row_by_row": True}, 4)):
        runner, buffers = opened(gpu.runtime(**options), tmp_path)
        run = runner.bind(buffers, rows=4, outputs=["y"])
        for _ in range(2):
            gpu.trt.ran.clear()
            run()
            assert len(gpu.trt.ran) == times, options
            np.testing.assert_array_equal(buffers["y"].read(4), x / 2)


def test_more_rows_than_an_engine_takes(gpu, tmp_path):
    runner, buffers = opened(gpu.runtime(max_batch=3), tmp_path)
    with pytest.raises(InputError, match=r"stage 's': 4 rows are more than .*, 3: .*max_batch=4, or edgekit") as told:
        runner.bind(buffers, rows=4, outputs=["y"])
    assert "\n" not in str(told.value)


def test_a_stage_whose_rows_need_one_another_is_never_split(gpu, tmp_path):
    runner, buffers = opened(gpu.runtime(max_batch=4, row_by_row=True), tmp_path, whole=True)
    runner.bind(buffers, rows=4, outputs=["y"])()
    assert len(gpu.trt.ran) == 1
    runner, buffers = opened(gpu.runtime(), tmp_path, whole=True)
    with pytest.raises(InputError, match="4 rows are more than its engine takes at once, 1"):
        runner.bind(buffers, rows=4, outputs=["y"])


@pytest.mark.parametrize("rows", [1, 3])
def test_outputs_that_nobody_asks_for_go_nowhere(gpu, tmp_path, rows):
    given, made = [("x", "float32", ("batch", 2))], [("y", "float32", ("batch", 2)), ("z", "float32", ("batch", 2))]
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["z"])]
    path = write_stage(tmp_path, given=given, made=made, nodes=nodes)
    for options in ({}, {"max_batch": 3}):
        runtime = gpu.runtime(**options)
        buffers = {name: runtime.allocate(TensorSpec(name, "float32", ("batch", 2)), 3) for name in "xy"}
        buffers["x"].write(np.full((3, 2), -1, np.float32))
        runner = runtime.open(stage_of(given, made), path)
        runner.bind(buffers, rows=rows, outputs=["y"])()
        np.testing.assert_array_equal(buffers["y"].read(3)[:rows], 1)
        np.testing.assert_array_equal(buffers["y"].read(3)[rows:], 0)


def test_integers_and_truth_values_cross(gpu, tmp_path):
    given = [("x", "int64", ("batch", 2)), ("m", "bool", ("batch",))]
    made = [("y", "int64", ("batch", 2)), ("n", "bool", ("batch",))]
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Not", ["m"], ["n"])]
    path = write_stage(tmp_path, given=given, made=made, nodes=nodes)

    def bound(runtime):
        specs = [TensorSpec(*each) for each in (*given, *made)]
        buffers = {spec.name: runtime.allocate(spec, 3) for spec in specs}
        buffers["x"].write(np.array([[1, 2], [2**40, 3], [-1, 0]]))
        buffers["m"].write(np.array([True, False, True]))
        return buffers, runtime.open(stage_of(given, made), path).bind(buffers, rows=3, outputs=["y", "n"])

    buffers, run = bound(gpu.runtime())
    run()
    np.testing.assert_array_equal(buffers["y"].read(3), [[-1, -2], [-(2**40), -3], [1, 0]])
    np.testing.assert_array_equal(buffers["n"].read(3), [False, True, False])
    gpu.use("8.6.1")
    with pytest.raises(BundleError, match=r"tensor 'x' of stage 's' is INT32 in TensorRT 8.6.1 and int64 in the plan"):
        bound(gpu.runtime(cache=tmp_path / "others"))


def test_nan_stays_nan(gpu, tmp_path):
    runner, buffers = opened(gpu.runtime(), tmp_path)
    buffers["x"].write(np.full((4, 3), np.nan, np.float32))
    runner.bind(buffers, rows=4, outputs=["y"])()
    assert np.isnan(buffers["y"].read(4)).all()


def test_a_network_for_one_sample_has_no_profile(gpu, tmp_path):
    given, made = [("x", "float32", (1, 2))], [("y", "float32", (1, 2))]
    path = write_stage(tmp_path, given=given, made=made, nodes=[helper.make_node("Neg", ["x"], ["y"])])
    runtime = gpu.runtime()
    buffers = {name: runtime.allocate(TensorSpec(name, "float32", (1, 2)), 1) for name in "xy"}
    buffers["x"].write(np.ones((1, 2), np.float32))
    run = runtime.open(stage_of(given, made), path).bind(buffers, rows=1, outputs=["y"])
    run()
    run()
    np.testing.assert_array_equal(buffers["y"].read(1), [[-1, -1]])
    assert gpu.trt.built[-1].profile == {}


@pytest.mark.parametrize("shape", [("batch", 3), ("batch",), ("batch", 2, 5, 5)])
def test_rows_are_copied_on_the_device(gpu, shape):
    runtime = gpu.runtime()
    buffer = runtime.allocate(TensorSpec("t", "float32", shape), 6)
    np.testing.assert_array_equal(buffer.read(6), 0, "memory begins as zeros")
    rows = np.arange(6 * int(np.prod(shape[1:])), dtype=np.float32).reshape(6, *shape[1:])
    buffer.write(rows)
    buffer.copy(buffer, np.array([5, 4]), np.array([0, 3]))
    np.testing.assert_array_equal(buffer.read(6), rows[[5, 1, 2, 4, 4, 5]])
    other = runtime.allocate(buffer.spec, 8)
    gpu.cuda.copies.clear()
    other.copy(buffer, np.array([1, 2, 3, 0]), np.array([4, 5, 6, 0]))
    np.testing.assert_array_equal(other.read(8)[[4, 5, 6, 0, 7]], [*rows[[1, 2, 4, 5]], 0 * rows[0]])
    moved = [size for kind, size in gpu.cuda.copies if kind == ON_DEVICE]
    assert moved == [3 * buffer.row_bytes, buffer.row_bytes], "rows that lie together go together"


def test_what_was_written_is_safe_from_the_next_write(gpu):
    runtime = gpu.runtime()
    buffer, other = (runtime.allocate(TensorSpec("t", "float32", ("batch", 2)), 2) for _ in range(2))
    array = np.ones((2, 2), np.float32)
    buffer.write(array)
    other.copy(buffer, np.arange(2), np.arange(2))
    array[:] = 5
    buffer.write(array)
    np.testing.assert_array_equal(other.read(2), 1)
    np.testing.assert_array_equal(buffer.read(2), 5)


def test_a_scalar_has_no_rows(gpu):
    buffer = gpu.runtime().allocate(TensorSpec("t", "float32", ()), 6)
    buffer.write(np.array(2, np.float32))
    assert buffer.read(6).shape == ()
    assert buffer.read(1) == 2
    assert not buffer.shared


def test_memory_is_given_back(gpu):
    runtime = gpu.runtime()
    kept = runtime.allocate(TensorSpec("t", "float32", ("batch", 100)), 10)
    view = kept.read(10)
    before = gpu.cuda.used()
    runtime.allocate(TensorSpec("t", "float32", ("batch", 100)), 10)
    gc.collect()
    assert gpu.cuda.used() == before == 4000
    runtime.close()
    assert gpu.cuda.used() == 0
    assert gpu.cuda.streams == {}
    assert gpu.cuda.host, "a view of what was read lives on"
    np.testing.assert_array_equal(view, 0)
    del view, kept
    gc.collect()
    assert gpu.cuda.host == {}
    runtime.close()


def test_too_little_device_memory_for_a_tensor(gpu):
    gpu.use(capacity=10_000)
    with pytest.raises(OutOfDeviceMemoryError, match=r"'h' .64 rows of 400 bytes. needs 25,600 bytes .* 10,000 are"):
        gpu.runtime().allocate(TensorSpec("h", "float32", ("batch", 100)), 64)


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0"])
def test_too_little_device_memory_for_a_stage(gpu, tmp_path, version):
    gpu.use(version, no_memory=True)
    for options, rows in (({}, 1), ({}, 4), ({"max_batch": 4}, 4)):
        runner, buffers = opened(gpu.runtime(**options), tmp_path)
        with pytest.raises(EdgekitError, match=r"stage 's' needs 1,234 bytes .*OutOfMemory.*--max-batch 1"):
            runner.bind(buffers, rows=rows, outputs=["y"])


def test_the_device_has_a_clock(gpu, tmp_path):
    runtime = gpu.runtime()
    assert isinstance(runtime, DeviceClock)
    runner, buffers = opened(runtime, tmp_path)
    run = runner.bind(buffers, rows=4, outputs=["y"])
    begin = runtime.device_mark()
    run()
    end = runtime.device_mark()
    runtime.synchronize()
    assert runtime.device_ns(begin, end) == 4 * fake_trt.KERNEL_NS
    assert gpu.cuda.calls.count("cudaEventCreate") == 2
    del begin, end
    assert gpu.cuda.calls.count("cudaEventDestroy") == 2


def test_provenance(gpu):
    said = gpu.runtime(threads=2, max_batch=8, best_batch=4, allow="tf32", workspace="1GiB").describe()
    assert said == {
        "name": "tensorrt",
        "version": "10.3.0",
        "cuda": "12.6",
        "device": "Fake GPU",
        "compute_capability": "8.7",
        "threads": 2,
        "batch": [1, 4, 8],
        "row_by_row": False,
        "allow": "tf32",
        "workspace_bytes": 1 << 30,
        "cuda_graphs": True,
        "not_captured": {},
    }


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"best_batch": 2}, PluginError, "best_batch 2 must be from 1 to max_batch, 1"),
        ({"max_batch": 0}, PluginError, "best_batch 0 must be from 1 to max_batch, 0"),
        ({"workspace": "much"}, InputError, "'much' is no size in bytes"),
        ({"device": 3}, PluginError, "CUDA device 3 cannot be used .*cudaErrorNoDevice"),
    ],
)
def test_options_that_cannot_be(gpu, options, kind, message):
    with pytest.raises(kind, match=message):
        gpu.runtime(**options)


def test_what_may_not_be_allowed(gpu, tmp_path):
    with pytest.raises(PluginError, match=r"cannot be allowed to choose 'int8' .*precision='int8'"):
        gpu.runtime(allow="int8").open(stage_of(*SCALED), scaled(tmp_path))
    gpu.use("11.4.0")
    with pytest.raises(PluginError, match=r"TensorRT 11.4.0 takes precision from the artifacts"):
        gpu.runtime(allow="float16").open(stage_of(*SCALED), scaled(tmp_path))


@pytest.mark.parametrize("module", ["tensorrt", "cuda.bindings.runtime"])
def test_a_missing_library_names_the_install_line(gpu, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[tensorrt\]'") as told:
        gpu.runtime()
    assert ("JetPack" in str(told.value)) == (module == "tensorrt")


def test_the_older_cuda_python_will_do(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.cudart", gpu.cuda)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert gpu.runtime().describe()["device"] == "Fake GPU"


def test_libraries_that_do_not_load(gpu, monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text('raise ImportError("libnvinfer.so.10: cannot open shared object file")')
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=r"installed but does not load \(libnvinfer.so.10: .*LD_"):
        gpu.runtime()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("z", "y"), "'z' is not in both the engine and the plan of stage 's'"),
        (("x", "a"), "'a' is not in both"),
        (("shape", "y"), "computes a shape from 'shape'"),
    ],
)
def test_names_that_are_not_the_stages(gpu, tmp_path, names, message):
    given, made = [(names[0], "float32", ("batch", 2))], [(names[1], "float32", ("batch", 2))]
    path = write_stage(tmp_path, given=given, made=made, nodes=[helper.make_node("Neg", [names[0]], [names[1]])])
    wanted = [("shape" if names[0] == "shape" else "x", "", ())], [("y", "", ())]
    with pytest.raises(BundleError, match=message):
        gpu.runtime().open(stage_of(*wanted), path)


def test_an_operator_that_tensorrt_has_not(gpu, tmp_path):
    gpu.use(refuses=("Div",))
    with pytest.raises(
        LoweringError, match=r"stage 's': TensorRT 10.3.0 cannot take Div node 0 .*no importer for Div.*run"
    ):
        gpu.runtime().open(stage_of(*SCALED), scaled(tmp_path))
    assert not list((tmp_path / "engines").glob("*.engine"))


def test_a_file_that_is_gone(gpu, tmp_path):
    with pytest.raises(BundleError, match="stage 's' cannot be read"):
        gpu.runtime().open(stage_of(*SCALED), tmp_path / "s.onnx")


def state(runtime, folder):
    (built,) = runtime.build(stage_of(*SCALED), folder / "s.onnx")
    return built.state, built.why


def test_engines_are_kept(gpu, tmp_path):
    scaled(tmp_path)
    assert state(gpu.runtime(), tmp_path) == ("built", "")
    assert state(gpu.runtime(), tmp_path) == ("reused", "")
    assert state(gpu.runtime(max_batch=4), tmp_path) == ("built", ""), "of another setting: both are kept"
    assert state(gpu.runtime(), tmp_path) == ("reused", "")
    assert len(gpu.trt.built) == 2
    gpu.runtime().open(stage_of(*SCALED), tmp_path / "s.onnx")
    assert len(gpu.trt.built) == 2


def test_precisions_lie_side_by_side_however_often_they_are_written(gpu, tmp_path):
    for folder, expected in (
        ("onnx", "built"),
        ("onnx-int8-0123456789ab", "built"),
        ("onnx", "reused"),
        ("onnx-int8-ba9876543210", "reused"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        scaled(tmp_path / folder)
        assert state(gpu.runtime(), tmp_path / folder)[0] == expected


@pytest.mark.parametrize(
    ("machine", "difference"),
    [
        ({"version": "10.7.0"}, "library is TensorRT 10.7.0 and was TensorRT 10.3.0"),
        ({"name": "Other GPU"}, "device is Other GPU and was Fake GPU"),
        ({"capability": (9, 0)}, "compute capability is 9.0 and was 8.7"),
    ],
)
def test_an_engine_of_another_machine_is_never_loaded(gpu, tmp_path, machine, difference):
    opened(gpu.runtime(), tmp_path)
    gpu.use(**machine)
    with pytest.warns(RuntimeWarning, match=f"stage 's': its engine is built again: .*: {difference}"):
        opened(gpu.runtime(), tmp_path)
    gpu.use()
    assert state(gpu.runtime(), tmp_path)[0] == "rebuilt"
    gpu.use(**machine)
    assert state(gpu.runtime(), tmp_path) == ("rebuilt", f"it was built for something else: {difference}")
    assert state(gpu.runtime(), tmp_path) == ("reused", "")


def test_an_engine_of_another_network_is_never_loaded(gpu, tmp_path):
    scaled(tmp_path)
    state(gpu.runtime(), tmp_path)
    write_stage(tmp_path, given=SCALED[0], made=SCALED[1], nodes=[helper.make_node("Mul", ["x", "t"], ["y"])])
    assert state(gpu.runtime(), tmp_path) == (
        "rebuilt",
        "it was built for something else: the stage's files have changed",
    )


def test_weights_beside_the_file_are_part_of_it(gpu, tmp_path):
    scaled(tmp_path)
    (tmp_path / "s-weights.bin").write_bytes(b"1")
    state(gpu.runtime(), tmp_path)
    assert state(gpu.runtime(), tmp_path) == ("reused", "")
    (tmp_path / "s-weights.bin").write_bytes(b"2")
    assert state(gpu.runtime(), tmp_path)[0] == "rebuilt"


def test_an_engine_that_is_not_taken_back_is_built_again_once(gpu, tmp_path):
    runtime = gpu.runtime()
    scaled(tmp_path)
    state(runtime, tmp_path)
    taken = runtime._trt_runtime.deserialize_cuda_engine
    answers = [None]
    runtime._trt_runtime.deserialize_cuda_engine = lambda content: answers.pop() if answers else taken(content)
    with pytest.warns(RuntimeWarning, match="stage 's': its engine is built again: TensorRT did not take it back"):
        opened(runtime, tmp_path)
    assert len(gpu.trt.built) == 2
    gpu.trt.refuses_engines = True
    with (
        pytest.warns(RuntimeWarning, match="did not take it back"),
        pytest.raises(EdgekitError, match=r"stage 's': TensorRT cannot open its engine .*not compatible"),
    ):
        gpu.runtime().open(stage_of(*SCALED), tmp_path / "s.onnx")


def test_the_builder_is_told_what_was_asked_for(gpu, tmp_path):
    runtime = gpu.runtime(max_batch=8, best_batch=2, workspace="64MiB")
    scaled(tmp_path)
    state(runtime, tmp_path)
    built = gpu.trt.built[-1]
    assert built.profile == {"x": ((1, 3), (2, 3), (8, 3))}
    assert built.workspace == 64 << 20
    assert built.flags == set(), "no TF32 unless it is allowed"
    assert built.timing == b"+"
    write_stage(tmp_path, given=SCALED[0], made=SCALED[1], nodes=[helper.make_node("Mul", ["x", "t"], ["y"])])
    state(runtime, tmp_path)
    assert gpu.trt.built[-1].timing == b"++", "what was timed before is not timed again"


def test_a_bundle_keeps_its_engines_beside_it(gpu, digits_bundle):
    with Bundle.open(digits_bundle) as bundle:
        runtime = TensorRTRuntime()
        artifacts = {stage.name: bundle.artifact("onnx", stage.name) for stage in bundle.plan.stages}
        built = build_engines(runtime, bundle.plan.stages, artifacts)
        count = sum(path.suffix == ".onnx" for path in (digits_bundle / "stages" / "onnx").iterdir())
    assert {each.state for each in built} == {"built"}
    assert len(built) == count
    beside = digits_bundle.with_name("digits.edgekit.engines")
    assert len(list(beside.glob("*.engine"))) == len(built) + 1  # and the timings
    with edgekit.load(digits_bundle, runtime="tensorrt") as session:
        session.run(np.zeros((1, *session.plan.inputs[0].shape[1:]), np.float32))
    assert len(gpu.trt.built) == count


def test_a_call_that_fails_names_its_stage(gpu, tmp_path):
    runner, buffers = opened(gpu.runtime(), tmp_path)
    run = runner.bind(buffers, rows=1, outputs=["y"])
    gpu.cuda.fails["cudaStreamSynchronize"] = fake_cuda.Error.cudaErrorInvalidValue
    with pytest.raises(EdgekitError, match="stage 's': CUDA says cudaErrorInvalidValue"):
        run()


def test_cuda_errors_name_what_was_done(gpu):
    cuda = Cuda(gpu.cuda)
    gpu.cuda.fails["cudaMemcpyAsync"] = fake_cuda.Error.cudaErrorInvalidValue
    with pytest.raises(EdgekitError, match=r"tensor 't' .1 rows of 8 bytes.: CUDA says cudaErrorInvalidValue"):
        DeviceBuffer(cuda, TensorSpec("t", "float32", ("batch", 2)), 1).write(np.zeros((1, 2), np.float32))


def test_another_runtime_takes_the_whole_network_when_asked_to(gpu, digits_bundle, digits):
    gpu.use(refuses=("Conv",))
    with pytest.raises(LoweringError, match=r"TensorRT 10.3.0 cannot take Conv"):
        edgekit.load(digits_bundle, runtime="tensorrt")
    with pytest.warns(RuntimeWarning, match=r"cannot take Conv .*; the whole network runs on onnxruntime instead"):
        session = edgekit.load(digits_bundle, runtime="tensorrt", fallback="onnxruntime")
    with session:
        assert session.runtime.name == session.running["name"] == "onnxruntime"
        assert session.running["instead_of"]["asked"] == "tensorrt"
        assert "cannot take Conv" in session.running["instead_of"]["reason"]
        assert len(session.run(digits).exit) == len(digits)
    gpu.use()
    with edgekit.load(digits_bundle, runtime="tensorrt", fallback="onnxruntime") as session:
        assert session.runtime.name == "tensorrt"
        assert "instead_of" not in session.running


def test_a_packed_bundle_keeps_its_engines_beside_it(gpu, digits_bundle, tmp_path):
    with Bundle.open(digits_bundle) as bundle:
        packed = bundle.pack(tmp_path / "packed.edgekit")
    edgekit.load(packed, runtime="tensorrt").close()
    assert list((tmp_path / "packed.edgekit.engines").glob("*.engine"))
    count = len(gpu.trt.built)
    edgekit.load(packed, runtime="tensorrt").close()
    assert len(gpu.trt.built) == count
