"""What the builder of engines asks of TensorRT, version by version, on a stand-in of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit import plugins
from edgekit.errors import LoweringError, MissingExtraError, PluginError
from edgekit.exporters.to_tensorrt import TensorRTTarget
from edgekit.plan import Stage

STANDINS = Path(__file__).parents[1] / "tensorrt"
VERSIONS = ("8.6.1", "10.3.0", "11.4.0")


def _standin(name):
    spec = importlib.util.spec_from_file_location(name, STANDINS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake_cuda, fake_trt = _standin("fake_cuda"), _standin("fake_trt")


@pytest.fixture
def trt():
    return fake_trt.fake_tensorrt(fake_cuda.FakeCuda(), "10.3.0")


def written(folder, *nodes, shape=("batch", 2)):
    """``y = x``, by way of these nodes."""
    sides = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in "xy"]
    nodes = nodes or (helper.make_node("Neg", ["x"], ["y"], name="minus"),)
    scale = numpy_helper.from_array(np.array(1, np.float32), "scale")
    graph = helper.make_graph(nodes, "s", *sides, [scale])
    path = folder / "s.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


HALF = (
    helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
    helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
)
QUANTIZED = (
    helper.make_node("QuantizeLinear", ["x", "scale"], ["q"]),
    helper.make_node("DequantizeLinear", ["q", "scale"], ["y"]),
)


@pytest.mark.parametrize(
    ("version", "creation"),
    [("8.6.1", {"EXPLICIT_BATCH"}), ("10.3.0", {"EXPLICIT_BATCH", "STRONGLY_TYPED"}), ("11.4.0", {"STRONGLY_TYPED"})],
)
def test_precision_is_the_files_where_it_can_be(tmp_path, version, creation):
    trt = fake_trt.fake_tensorrt(fake_cuda.FakeCuda(), version)
    TensorRTTarget(trt).build(written(tmp_path), stage="s")
    assert trt.built[-1].creation == creation
    assert trt.built[-1].flags == set()


@pytest.mark.parametrize(("nodes", "flags"), [((), set()), (HALF, {"FP16"}), (QUANTIZED, {"INT8"})])
def test_before_10_flags_let_the_file_have_its_precision(tmp_path, nodes, flags):
    trt = fake_trt.fake_tensorrt(fake_cuda.FakeCuda(), "8.6.1")
    TensorRTTarget(trt).build(written(tmp_path, *nodes), stage="s")
    assert trt.built[-1].flags == flags


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_allowed_is_allowed(tmp_path, version):
    trt = fake_trt.fake_tensorrt(fake_cuda.FakeCuda(), version)
    TensorRTTarget(trt).build(written(tmp_path), stage="s", allow=("tf32",))
    assert trt.built[-1].flags == {"TF32"}
    if version == "11.4.0":
        with pytest.raises(PluginError, match=r"TensorRT 11.4.0 takes precision from the artifacts"):
            TensorRTTarget(trt).build(written(tmp_path), stage="s", allow=("float16",))
    else:
        TensorRTTarget(trt).build(written(tmp_path), stage="s", allow=("float16",))
        assert trt.built[-1].flags == {"FP16"}
        assert "STRONGLY_TYPED" not in trt.built[-1].creation


def test_what_cannot_be_allowed(trt, tmp_path):
    with pytest.raises(PluginError, match=r"choose 'int8' \(only tf32, float16\)"):
        TensorRTTarget(trt).build(written(tmp_path), stage="s", allow=("int8",))


def test_batches_workspace_and_settings_of_ones_own(trt, tmp_path):
    seen = []
    TensorRTTarget(trt).build(
        written(tmp_path), stage="s", batch=(1, 2, 8), workspace_bytes=4096, configure=seen.append
    )
    assert trt.built[-1].profile == {"x": ((1, 2), (2, 2), (8, 2))}
    assert trt.built[-1].workspace == 4096
    assert len(seen) == 1
    TensorRTTarget(trt).build(written(tmp_path, shape=(1, 2)), stage="s")
    assert trt.built[-1].profile == {}
    assert trt.built[-1].workspace is None


def test_a_size_that_is_left_open(trt, tmp_path):
    with pytest.raises(LoweringError, match=r"stage 's': input 'x' is \(-1, -1\), and only its first size"):
        TensorRTTarget(trt).build(written(tmp_path, shape=("batch", "width")), stage="s")
    with pytest.raises(LoweringError, match=r"stage 's': input 'x' is \(2, -1\)"):
        TensorRTTarget(trt).build(written(tmp_path, shape=(2, "width")), stage="s")


def test_what_was_timed_is_handed_on(trt, tmp_path):
    target = TensorRTTarget(trt)
    _, timing = target.build(written(tmp_path), stage="s")
    _, timing = target.build(written(tmp_path), stage="s", timing=timing)
    assert timing == b"++"
    _, timing = target.build(written(tmp_path), stage="s", timing=b"refused")
    assert timing == b"+", "of another version: begins anew"


def test_weights_beside_the_file_are_found(trt, tmp_path):
    path = written(tmp_path, helper.make_node("Mul", ["x", "scale"], ["y"]))
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full(2, 3, np.float32), "scale"))
    onnx.save_model(model, path, save_as_external_data=True, location="s-weights.bin", size_threshold=0)
    engine, _ = TensorRTTarget(trt).build(path, stage="s")
    assert np.full(2, 3, np.float32).tobytes() in engine


@pytest.mark.parametrize(
    ("version", "node"), [("8.6.1", "node 0"), ("10.3.0", "Neg 'minus'"), ("11.4.0", "Neg 'minus'")]
)
def test_a_node_that_tensorrt_has_not_is_named(tmp_path, version, node):
    trt = fake_trt.fake_tensorrt(fake_cuda.FakeCuda(), version, refuses=("Neg",))
    with pytest.raises(LoweringError) as told:
        TensorRTTarget(trt).build(written(tmp_path), stage="s")
    assert str(told.value) == (
        f"stage 's': TensorRT {version} cannot take {node} of s.onnx (Assertion failed: no importer for Neg); "
        "run the network on another runtime, as onnxruntime, or use a newer TensorRT"
    )


def test_int8_that_tensorrt_does_not_take(tmp_path):
    trt = fake_trt.fake_tensorrt(fake_cuda.FakeCuda(), refuses=("QuantizeLinear",))
    with pytest.raises(
        LoweringError, match=r"cannot take QuantizeLinear node 0 of s.onnx .*zero points of 0 and biases"
    ):
        TensorRTTarget(trt).build(written(tmp_path, *QUANTIZED), stage="s")


def test_a_file_that_is_no_network(trt, tmp_path):
    (tmp_path / "s.onnx").write_bytes(b"no network")
    with pytest.raises(LoweringError, match=r"stage 's': TensorRT 10.3.0 cannot read s.onnx \(could not read: "):
        TensorRTTarget(trt).build(tmp_path / "s.onnx", stage="s")


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("OutOfMemory: 3 GB of workspace", "--workspace 512MiB --max-batch 1"),
        ("Could not find any implementation for node minus", "run the network on another runtime"),
    ],
)
def test_an_engine_that_cannot_be_built(trt, tmp_path, reason, advice):
    trt.fails = reason
    with pytest.raises(LoweringError, match=f"stage 's': TensorRT 10.3.0 could not build .*{reason}.*{advice}"):
        TensorRTTarget(trt).build(written(tmp_path), stage="s")


def test_progress_is_told_from_10_on(trt, tmp_path):
    told = []
    TensorRTTarget(trt).build(written(tmp_path), stage="s", progress=lambda *each: told.append(each))
    assert told == [("build s", done, 100) for done in (25, 50, 75, 100, 100)]
    told.clear()
    old = fake_trt.fake_tensorrt(fake_cuda.FakeCuda(), "8.6.1")
    TensorRTTarget(old).build(written(tmp_path), stage="s", progress=lambda *each: told.append(each))
    assert told == [("build s", 0, 1)]


def test_ctrl_c_ends_the_build(trt, tmp_path):
    def stop(task, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TensorRTTarget(trt).build(written(tmp_path), stage="s", progress=stop)
    assert trt.built == []


def test_an_export_is_refused_with_what_to_do(tmp_path):
    target = plugins.create("targets", "tensorrt")
    stage = Stage(name="s", inputs=("x",), outputs=("y",), macs=None, weight_bytes=0)
    with pytest.raises(LoweringError, match=r"stage 's': .*targets=\('onnx',\), then run there: edgekit build"):
        target.lower(None, stage, tmp_path / "s.engine", specs={})
    assert target.versions() == {}
    assert (target.name, target.suffix, target.runtime) == ("tensorrt", ".engine", "tensorrt")


def test_without_tensorrt_the_install_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[tensorrt\]'"):
        TensorRTTarget().build(written(tmp_path), stage="s")


def test_a_device_needs_neither_torch_nor_onnx():
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'onnx_ir', 'onnxruntime'): sys.modules[name] = None\n"
        "import edgekit.exporters.to_tensorrt, edgekit.runtimes.trt, edgekit.engines, edgekit.cli.build\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
