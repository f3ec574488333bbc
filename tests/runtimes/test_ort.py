"""ONNX Runtime on stages written node by node, against numpy."""

from __future__ import annotations

import json
import tempfile

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.data import Dataset
from edgekit.errors import BundleError, MeasurementError, MissingExtraError, PluginError
from edgekit.plan import SCORES, Exit, Plan, Run, Stage
from edgekit.policy import Policy
from edgekit.profiles.operators import time_operators
from edgekit.progress import silent
from edgekit.runtimes.host import ALIGNMENT, HostBuffer
from edgekit.runtimes.ort import OrtRuntime, _nodes
from edgekit.session import Session
from edgekit.tensors import TensorSpec

WIDTH, CHANNELS, CLASSES, EXITS = 70, 24, 10, 3
"""70 and 94 channels to 24, 3x3, on 8x8 pixels: with two threads, ONNX Runtime adds up such a convolution in another
order for one image than for several."""
KINDS = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "int64": TensorProto.INT64}


def write_onnx(path, nodes, *, inputs, outputs, weights):
    values = [
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in side] for side in (inputs, outputs)
    ]
    graph = helper.make_graph(
        nodes, "stage", *values, [numpy_helper.from_array(array, name) for name, array in weights.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def stage_nodes(index):
    """A convolution of the image and what came before, its ReLU, an exit head on its mean, all three scores."""
    make = helper.make_node
    logits, p, log_p, top = f"logits{index}", "p", "log_p", "top"
    return [
        make("Concat", ["x"] if index == 0 else ["x", f"h{index - 1}"], ["joined"], axis=1),
        make("Conv", ["joined", "w", "b"], ["conv"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        make("Relu", ["conv"], [f"h{index}"]),
        make("GlobalAveragePool", [f"h{index}"], ["pooled"]),
        make("Flatten", ["pooled"], ["flat"]),
        make("Gemm", ["flat", "v", "c"], [logits], transB=1),
        make("Div", [logits, f"t{index}"], ["scaled"]),
        make("Softmax", ["scaled"], [p], axis=-1),
        make("LogSoftmax", ["scaled"], [log_p], axis=-1),
        make("TopK", [p, "two"], [top, "places"]),
        make("Gather", [top, "zero"], [f"max_prob{index}"], axis=1),
        make("Gather", [top, "one"], ["second"], axis=1),
        make("Sub", [f"max_prob{index}", "second"], [f"margin{index}"]),
        make("Unsqueeze", [p, "axis1"], ["row"]),
        make("Unsqueeze", [log_p, "axis2"], ["column"]),
        make("MatMul", ["row", "column"], ["product"]),
        make("Squeeze", ["product", "axes12"], [f"neg_entropy{index}"]),
    ]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Three convolutional stages on disk: plan, artifacts, and weights by stage."""
    folder = tmp_path_factory.mktemp("stages")
    rng = np.random.default_rng(0)
    tensors = {"x": TensorSpec("x", "float32", ("batch", WIDTH, 8, 8))}
    stages, steps, artifacts, weights = [], [], {}, []
    for index in range(EXITS):
        made = {
            f"h{index}": ("batch", CHANNELS, 8, 8),
            f"logits{index}": ("batch", CLASSES),
            **{f"{score}{index}": ("batch",) for score in SCORES},
        }
        given = {"x": ("batch", WIDTH, 8, 8), f"h{index - 1}": ("batch", CHANNELS, 8, 8), f"t{index}": ()}
        if index == 0:
            del given["h-1"]
        tensors.update({name: TensorSpec(name, "float32", shape) for name, shape in {**made, **given}.items()})
        weights.append(
            {
                "w": rng.standard_normal((CHANNELS, WIDTH + (CHANNELS if index else 0), 3, 3)).astype(np.float32) / 20,
                "b": rng.standard_normal(CHANNELS).astype(np.float32) / 10,
                "v": rng.standard_normal((CLASSES, CHANNELS)).astype(np.float32),
                "c": rng.standard_normal(CLASSES).astype(np.float32),
            }
        )
        constants = {
            "two": np.array([2]),
            "zero": np.array(0),
            "one": np.array(1),
            "axis1": np.array([1]),
            "axis2": np.array([2]),
            "axes12": np.array([1, 2]),
        }
        artifacts[f"s{index}"] = write_onnx(
            folder / f"s{index}.onnx",
            stage_nodes(index),
            inputs=[(name, TensorProto.FLOAT, shape) for name, shape in given.items()],
            outputs=[(name, TensorProto.FLOAT, shape) for name, shape in made.items()],
            weights={**weights[-1], **constants},
        )
        stages.append(Stage(name=f"s{index}", inputs=tuple(given), outputs=tuple(made), macs=None, weight_bytes=0))
        steps += [
            Run(f"s{index}"),
            Exit(
                name=f"e{index}",
                logits=f"logits{index}",
                temperature=f"t{index}",
                scores={score: f"{score}{index}" for score in SCORES},
            ),
        ]
    plan = Plan(inputs=(tensors["x"],), tensors=tensors, stages=tuple(stages), steps=tuple(steps))
    return plan, artifacts, weights


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).standard_normal((64, WIDTH, 8, 8)).astype(np.float32)


def by_hand(weights, x):
    """Logits of every exit in float64."""
    x = x.astype(np.float64)
    features, logits = x[:, :0], []
    for layer in weights:
        padded = np.pad(np.concatenate([x, features], axis=1), ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        summed = np.einsum("nchwij,ocij->nohw", windows, layer["w"], optimize=True)
        features = np.maximum(summed + layer["b"][:, None, None], 0)
        logits.append(features.mean((2, 3)) @ layer["v"].T + layer["c"])
    return logits


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


SCORE_BY_HAND = {
    "max_prob": lambda p: p.max(-1),
    "margin": lambda p: np.sort(p)[:, -1] - np.sort(p)[:, -2],
    "neg_entropy": lambda p: (p * np.log(p)).sum(-1),
}


@pytest.mark.parametrize("score", SCORES)
def test_logits_and_scores_as_by_hand(network, images, score):
    plan, artifacts, weights = network
    x = images[:5]
    expected = by_hand(weights, x)
    temperatures = (1.0, 2.0, 0.5)
    policy = Policy.fixed([0.5, 0.5], score=score, temperatures=temperatures)
    with Session(plan, OrtRuntime(), artifacts, policy=policy) as session:
        for index, logits in enumerate(session.run_exits(x)):
            np.testing.assert_allclose(logits, expected[index], atol=1e-4)
            forced = session.run(x, exit=index)
            np.testing.assert_array_equal(forced.logits, logits)
            by_formula = SCORE_BY_HAND[score](softmax(expected[index] / temperatures[index]))
            np.testing.assert_allclose(forced.score, by_formula, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("score", SCORES)
def test_a_row_is_the_same_bits_in_every_batch(network, images, score, threads):
    plan, artifacts, _ = network
    with Session(plan, OrtRuntime(threads=threads), artifacts, policy=Policy.fixed([0, 0], score=score)) as session:
        limits = [float(np.median(session.run(images, exit=index).score)) for index in range(EXITS - 1)]
        session.use(Policy.fixed(limits, score=score))
        single = [session.run(images[row : row + 1]) for row in range(len(images))]
        expected = {field: np.concatenate([getattr(r, field) for r in single]) for field in ("logits", "exit", "score")}
        assert np.bincount(expected["exit"], minlength=EXITS).min() > 0
        for size in (2, 7, 64):
            parts = [session.run(images[at : at + size]) for at in range(0, len(images), size)]
            for field, values in expected.items():
                np.testing.assert_array_equal(np.concatenate([getattr(part, field) for part in parts]), values)


def test_a_larger_batch_then_smaller_ones(network, images):
    plan, artifacts, _ = network
    with Session(plan, OrtRuntime(), artifacts, policy=Policy.fixed([0.5, 0.5])) as used:
        for size in (1, 3, 9, 2, 1, 9):
            with Session(plan, OrtRuntime(), artifacts, policy=Policy.fixed([0.5, 0.5])) as fresh:
                a, b = used.run(images[-size:]), fresh.run(images[-size:])
            np.testing.assert_array_equal(a.logits, b.logits)
            np.testing.assert_array_equal(a.exit, b.exit)


def test_stages_share_memory(network):
    plan, artifacts, _ = network
    runtime = OrtRuntime()
    buffers = {name: runtime.allocate(spec, 4) for name, spec in plan.tensors.items()}
    first = runtime.open(plan.stages[0], artifacts["s0"])
    view = buffers["h0"].read(2)
    buffers["t0"].write(np.float32(1))
    buffers["x"].write(np.ones((2, WIDTH, 8, 8), np.float32))
    run = first.bind(buffers, rows=2, outputs=["h0"])
    run()
    assert view.any()
    assert not buffers["h0"].read(4)[2:].any(), "rows beyond those bound are not touched"
    assert not buffers["logits0"].read(4).any(), "outputs not asked for are not written"


def test_what_is_bound_outlives_every_other_reference(network):
    plan, artifacts, _ = network
    runtime = OrtRuntime()
    runner = runtime.open(plan.stages[0], artifacts["s0"])
    buffers = {name: runtime.allocate(plan.tensors[name], 2) for name in (*plan.stages[0].inputs, "logits0")}
    buffers["t0"].write(np.float32(1))
    buffers["x"].write(np.ones((2, WIDTH, 8, 8), np.float32))
    run = runner.bind(buffers, rows=2, outputs=["logits0"])
    logits = buffers["logits0"].read(2)
    run()
    expected = logits.copy()
    buffers.clear()
    logits[:] = 0
    for _ in range(20):
        np.full((2, WIDTH, 8, 8), 7, np.float32)
        run()
    np.testing.assert_array_equal(logits, expected)


def test_provenance():
    runtime = OrtRuntime(threads=2, session_options={"enable_mem_pattern": False})
    said = runtime.describe()
    assert (said["name"], said["provider"], said["threads"]) == ("onnxruntime", "CPUExecutionProvider", 2)
    assert said["row_by_row"] is True
    assert said["session_options"]["enable_mem_pattern"] == "False"
    assert "scripted" not in said
    assert OrtRuntime().describe()["row_by_row"] is False


def test_options_reach_onnxruntime():
    options = OrtRuntime(
        threads=3,
        session_options={
            "graph_optimization_level": "ORT_DISABLE_ALL",
            "enable_cpu_mem_arena": False,
            "session.intra_op.allow_spinning": 0,
        },
    )._options
    assert options.intra_op_num_threads == 3
    assert options.graph_optimization_level.name == "ORT_DISABLE_ALL"
    assert options.enable_cpu_mem_arena is False
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"session_options": {"colour": 1}}, "has no option 'colour'"),
        ({"session_options": {"add_session_config_entry": 1}}, "has no option 'add_session_config_entry'"),
        ({"session_options": {"enable_mem_pattern": "perhaps"}}, "option 'enable_mem_pattern' cannot be 'perhaps'"),
        ({"provider": "AbacusProvider"}, "no provider 'AbacusProvider' here"),
    ],
)
def test_what_onnxruntime_does_not_have(arguments, message):
    with pytest.raises(PluginError, match=message):
        OrtRuntime(**arguments)


def test_a_missing_library_names_the_install_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[ort\]'"):
        OrtRuntime()


@pytest.mark.parametrize("reason", ["ImportError('libonnxruntime.so.9: cannot open')", "ModuleNotFoundError(name='x')"])
def test_a_library_that_does_not_load(monkeypatch, tmp_path, reason):
    import sys

    (tmp_path / "onnxruntime.py").write_text(f"raise {reason}")
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=r"needs onnxruntime, which is installed but does not load \(.*install the"):
        OrtRuntime()


SHARING = """
import sys
import numpy as np
import edgekit
from edgekit.errors import PluginError
from edgekit.runtimes.ort import OrtRuntime

x = np.random.default_rng(0).standard_normal((7, 1, 8, 8)).astype(np.float32)
with edgekit.load(sys.argv[1], runtime="onnxruntime", threads=2) as session:
    own = session.run_exits([x])
with edgekit.load(sys.argv[1], runtime="onnxruntime", threads=2, shared_threads=True) as session:
    assert session.runtime.describe()["session_options"]["use_per_session_threads"] == "False"
    for one, other in zip(own, session.run_exits([x]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert session.runtime.timing_operators() is not None
for options in ({"threads": 3, "shared_threads": True}, {"threads": 2}):
    try:
        OrtRuntime(**options)
    except PluginError as error:
        print(error)
"""


def test_threads_are_shared_by_all_stages(exported_digits, tmp_path):
    """In a process of its own, which never gets rid of the pool again."""
    import subprocess
    import sys

    command = [sys.executable, "-c", SHARING, str(exported_digits)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ignored" not in done.stderr
    other, own = done.stdout.splitlines()
    assert "the one pool of this process has 2 threads and cannot have 3" in other
    assert "give shared_threads=True and threads=2" in own


def test_a_library_without_threads_to_share(monkeypatch):
    import onnxruntime

    monkeypatch.delattr(onnxruntime, "set_global_thread_pool_sizes", raising=False)
    with pytest.raises(PluginError, match=r"onnxruntime 1\.\S+ has no threads to share"):
        OrtRuntime(threads=2, shared_threads=True)


def small_stage(folder, *, given="x", made="y", kind="float32"):
    nodes = [helper.make_node("Neg", [given], [made])]
    side = KINDS[kind]
    return write_onnx(
        folder / "s.onnx", nodes, inputs=[(given, side, ("batch", 2))], outputs=[(made, side, ("batch", 2))], weights={}
    )


STAGE = Stage(name="s", inputs=("x",), outputs=("y",), macs=None, weight_bytes=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": "z"}, "input 'x' of stage 's' is in the plan but not the file; export again"),
        ({"made": "a"}, "output 'a' of stage 's' is in the file but not the plan; export again"),
    ],
)
def test_names_that_are_not_the_stages(tmp_path, options, message):
    with pytest.raises(BundleError, match=message):
        OrtRuntime().open(STAGE, small_stage(tmp_path, **options))


def test_dtypes_that_are_not_the_plans(tmp_path):
    runtime = OrtRuntime()
    runner = runtime.open(STAGE, small_stage(tmp_path, kind="float64"))
    buffers = {name: runtime.allocate(TensorSpec(name, "float32", ("batch", 2)), 1) for name in "xy"}
    with pytest.raises(
        BundleError, match=r"stage 's': tensor 'x' is tensor\(double\) in the file, float32 in the plan"
    ):
        runner.bind(buffers, rows=1, outputs=["y"])


@pytest.mark.parametrize("content", [b"", b"not a network", None])
def test_a_file_that_is_no_network(tmp_path, content):
    path = tmp_path / "s.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match="stage 's' does not open in ONNX Runtime") as caught:
        OrtRuntime().open(STAGE, path)
    assert "\n" not in str(caught.value)


def test_a_stage_that_fails_while_running_raises(tmp_path):
    nodes = [helper.make_node("Gather", ["x", "x"], ["y"])]
    side = [("x", TensorProto.INT64, ("batch",))]
    path = write_onnx(
        tmp_path / "s.onnx", nodes, inputs=side, outputs=[("y", TensorProto.INT64, ("batch",))], weights={}
    )
    runtime = OrtRuntime()
    buffers = {name: runtime.allocate(TensorSpec(name, "int64", ("batch",)), 1) for name in "xy"}
    run = runtime.open(STAGE, path).bind(buffers, rows=1, outputs=["y"])
    run()
    buffers["x"].write(np.array([5]))
    with pytest.raises(Exception, match="indices element out of data bounds"):
        run()


@pytest.mark.parametrize("shape", [("batch", 3), ("batch",), ("batch", 2, 5, 5), ("batch", 9, 11, 13)])
def test_host_buffers_are_aligned_and_copy_rows(shape):
    buffer = HostBuffer(TensorSpec("t", "float32", shape), 6)
    rows = np.arange(6 * int(np.prod(shape[1:])), dtype=np.float32).reshape(6, *shape[1:])
    buffer.write(rows)
    assert buffer.read(6).ctypes.data % ALIGNMENT == 0
    buffer.copy(buffer, np.array([5, 4]), np.array([0, 3]))
    np.testing.assert_array_equal(buffer.read(6), rows[[5, 1, 2, 4, 4, 5]])
    other = HostBuffer(buffer.spec, 8)
    other.copy(buffer, np.array([1, 4]), np.array([7, 0]))
    np.testing.assert_array_equal(other.read(8)[[7, 0, 1]], [rows[1], rows[4], 0 * rows[0]])


def test_a_scalar_host_buffer():
    buffer = HostBuffer(TensorSpec("t", "float32", ()), 6)
    buffer.write(np.array(2, np.float32))
    assert buffer.read(6).shape == ()
    assert buffer.read(1) == 2


def large(folder):
    """A network of one stage, whose operators are large beside what a profiler adds to each."""
    channels, size = 48, 32
    rng = np.random.default_rng(0)
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w"], ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        make("Relu", ["a"], ["b"]),
        make("Conv", ["b", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        make("GlobalAveragePool", ["c"], ["d"]),
        make("Flatten", ["d"], ["e"]),
        make("Div", ["e", "t"], ["logits"]),
        make("ReduceMax", ["logits", "axis"], ["max_prob"], keepdims=0),
        make("Neg", ["max_prob"], ["margin"]),
        make("Abs", ["max_prob"], ["neg_entropy"]),
    ]
    weights = {
        "w": rng.standard_normal((channels, channels, 3, 3)).astype(np.float32) / 20,
        "axis": np.array([1]),
    }
    shapes = {"x": ("batch", channels, size, size), "t": (), "logits": ("batch", channels)}
    shapes |= dict.fromkeys(SCORES, ("batch",))
    sides = [[(name, TensorProto.FLOAT, shape) for name, shape in shapes.items() if (name in "xt") == given]
             for given in (True, False)]  # fmt: skip
    file = write_onnx(folder / "s.onnx", nodes, inputs=sides[0], outputs=sides[1], weights=weights)
    tensors = {name: TensorSpec(name, "float32", shape) for name, shape in shapes.items()}
    outputs = tuple(name for name in shapes if name not in "xt")
    stage = Stage(name="s", inputs=("x", "t"), outputs=outputs, macs=None, weight_bytes=0)
    end = Exit(name="e", logits="logits", temperature="t", scores={score: score for score in SCORES})
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=(stage,), steps=(Run("s"), end)), {"s": file}


def test_operators_add_up_to_their_stage(tmp_path):
    plan, artifacts = large(tmp_path)
    inputs = np.random.default_rng(0).standard_normal((4, *plan.inputs[0].shape[1:])).astype(np.float32)
    ratios = []
    with Session(plan, OrtRuntime(), artifacts) as session:
        for _ in range(20):  # others may use the processor at any one time
            found = time_operators(
                session, Dataset(inputs=inputs), runs=20, rng=np.random.default_rng(0), progress=silent
            )
            traces = [session.trace(inputs[:1]) for _ in range(23)][3:]
            computed = [span.stop_ns - span.start_ns for trace in traces for span in trace.spans if span.name == "s"]
            ratios.append(sum(each.mean_s for each in found) / (np.mean(computed) * 1e-9))
            if 0.7 < ratios[-1] < 1.3:
                break
    assert 0.7 < ratios[-1] < 1.3, ratios
    assert sum(each.share for each in found if "Conv" in each.kind) > 0.5


def test_only_a_runtime_that_records_tells_operators(network, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plan, artifacts, _ = network
    runtime = OrtRuntime(threads=2, session_options={"enable_mem_pattern": False})
    with pytest.raises(MeasurementError, match="runtime 'onnxruntime' records no operators"):
        runtime.operator_times()
    timing = runtime.timing_operators()
    assert timing.describe() == runtime.describe()
    with Session(plan, timing, artifacts):
        pass
    assert list(tmp_path.iterdir()), "a recording that nobody asked for"
    timing.close()
    timing.close()
    assert list(tmp_path.iterdir()) == []


def test_a_recording_is_read_whatever_fusion_did_to_names(tmp_path):
    def event(name, kind, index, micros, cat="Node"):
        return {"cat": cat, "name": name, "dur": micros, "ts": 0, "args": {"op_name": kind, "node_index": index}}

    file = tmp_path / "0.json"
    file.write_text(
        json.dumps(
            [
                event("model_run", "", "", 99, cat="Session"),
                event("a_fence_before", "Conv", "1", 99),
                event("a_kernel_time", "Conv", "1", 2),
                event("_kernel_time", "FusedConv", "2", 3),
                event("_kernel_time", "FusedConv", "3", 4),
                event("a_kernel_time", "Conv", "1", 5),
                event("_kernel_time", "FusedConv", "3", 6),
                {"cat": "Node", "name": "old_kernel_time", "dur": 7, "args": {}},
            ]
        )
    )
    assert [(name, kind, round(seconds * 1e6)) for name, kind, seconds in _nodes(file)] == [
        ("a", "Conv", 2),
        ("FusedConv", "FusedConv", 3),
        ("FusedConv #2", "FusedConv", 4),
        ("a", "Conv", 5),
        ("FusedConv #2", "FusedConv", 6),
        ("old", "", 7),
    ]


@pytest.mark.parametrize("content", [None, "", '[{"cat": "Node", "na', '{"cat": 3}'])
def test_a_recording_that_cannot_be_read(tmp_path, content):
    file = tmp_path / "0.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(MeasurementError, match="recording cannot be read") as caught:
        _nodes(file)
    assert "\n" not in str(caught.value)
