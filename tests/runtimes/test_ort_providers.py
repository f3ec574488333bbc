"""Providers by name, with options; nodes that they leave to the CPU. Azure's takes none, and is in every wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edgekit.errors import BundleError, PluginError
from edgekit.interfaces import NodePlacement
from edgekit.plan import Stage
from edgekit.runtimes.host import HostBuffer
from edgekit.runtimes.ort import OrtRuntime
from edgekit.runtimes.ort_providers import CPU, options_text, provider_name
from edgekit.tensors import TensorSpec

_spec = importlib.util.spec_from_file_location("fake_cuda", Path(__file__).parents[1] / "tensorrt" / "fake_cuda.py")
_fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fake)

AZURE = "AzureExecutionProvider"
STAGE = Stage(name="s", inputs=("x",), outputs=("y",), macs=None, weight_bytes=0)

here = pytest.mark.skipif(
    AZURE not in onnxruntime.get_available_providers() or not hasattr(onnxruntime, "copy_tensors"),
    reason="this onnxruntime has no second provider, or cannot tell where nodes went",
)


@pytest.fixture
def artifact(tmp_path):
    nodes = [helper.make_node("Neg", ["x"], ["n"], name="minus"), helper.make_node("Abs", ["n"], ["y"], name="size")]
    sides = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", 2))] for name in "xy"]
    graph = helper.make_graph(nodes, "stage", *sides)
    path = tmp_path / "s.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def ran(runtime, artifact):
    runner = runtime.open(STAGE, artifact)
    buffers = {name: runtime.allocate(TensorSpec(name, "float32", ("batch", 2)), 1) for name in "xy"}
    buffers["x"].write(np.array([[-3, 4]], dtype=np.float32))
    runner.bind(buffers, rows=1, outputs=("y",))()
    return buffers["y"].read(1).copy()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("cpu", CPU),
        ("CUDA", "CUDAExecutionProvider"),
        ("tensorrt", "TensorrtExecutionProvider"),
        ("xnnpack", "XnnpackExecutionProvider"),
        ("acl", "ACLExecutionProvider"),
        ("coreml", "CoreMLExecutionProvider"),
        ("StrangeExecutionProvider", "StrangeExecutionProvider"),
    ],
)
def test_short_names(given, name):
    assert provider_name(given, [CPU, name]) == name


@pytest.mark.parametrize(
    ("given", "source"),
    [("cuda", "it comes with onnxruntime-gpu"), ("XnnpackExecutionProvider", "it comes with a build of ONNX Runtime")],
)
def test_a_provider_that_is_not_here_says_what_brings_it(given, source):
    with pytest.raises(PluginError, match=f"no provider '{given}' here .available: {CPU}.; {source}"):
        provider_name(given, [CPU])


def test_options_are_text():
    assert options_text({"device_id": 1, "enable_cuda_graph": True, "cudnn_conv_algo_search": "HEURISTIC"}) == {
        "device_id": "1",
        "enable_cuda_graph": "1",
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    assert options_text(None) == {}


def test_the_cpu_has_all_its_nodes(artifact):
    runtime = OrtRuntime(provider="cpu")
    assert isinstance(runtime, NodePlacement)
    np.testing.assert_array_equal(ran(runtime, artifact), [[3, 4]])
    assert runtime.nodes_elsewhere() == {}


@here
def test_every_node_that_fell_back_is_told(artifact):
    runtime = OrtRuntime(provider=AZURE)
    assert runtime.nodes_elsewhere() is None
    np.testing.assert_array_equal(ran(runtime, artifact), [[3, 4]])
    assert runtime.nodes_elsewhere() == {"s": (f"minus (Neg) on {CPU}", f"size (Abs) on {CPU}")}
    assert runtime.describe()["provider"] == AZURE


@here
def test_no_fallback_refuses(artifact):
    with pytest.raises(BundleError, match=r"stage 's' does not open in ONNX Runtime .*fallback"):
        ran(OrtRuntime(provider=AZURE, fallback=False), artifact)


def test_a_provider_whose_libraries_do_not_load_is_an_error(artifact, monkeypatch):
    """As onnxruntime-gpu does without CUDA: it says so on standard error and goes on on the CPU."""
    runtime = OrtRuntime()
    runtime._provider = "CUDAExecutionProvider"

    class Falling(onnxruntime.InferenceSession):
        def __init__(self, path, options, providers):
            super().__init__(path, options, providers=[CPU])

    monkeypatch.setattr(runtime.ort, "InferenceSession", Falling)
    with pytest.raises(PluginError, match=f"'s' fell back from CUDAExecutionProvider to {CPU}"):
        runtime.open(STAGE, artifact)


class Binding:
    """What ONNX Runtime is told of memory."""

    def __init__(self):
        self.bound = {}

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id, element_type) == ("cuda", 0, np.float32)
        self.bound[name] = (tuple(shape), buffer_ptr)

    bind_output = bind_input


class Session:
    """Stands for a session on a GPU."""

    made: ClassVar[list] = []

    def __init__(self, path, options, providers):
        self.providers, self.runs = providers, []
        Session.made.append(self)

    def get_providers(self):
        return [name for name, _ in self.providers]

    def get_inputs(self):
        return [SimpleNamespace(name="x", type="tensor(float)")]

    def get_outputs(self):
        return [SimpleNamespace(name="y", type="tensor(float)")]

    def get_modelmeta(self):
        return SimpleNamespace(custom_metadata_map={})

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding, options):
        self.runs.append(dict(binding.bound))


@pytest.fixture
def gpu(monkeypatch):
    cudart = _fake.FakeCuda()
    monkeypatch.setattr("edgekit.runtimes.ort.load_cuda", lambda purpose: cudart)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    Session.made = []
    return cudart


def test_on_cuda_tensors_stay_on_the_device(gpu, artifact):
    """A scripted GPU and a scripted session: what is bound where, not that it computes."""
    runtime = OrtRuntime(provider="cuda", provider_options={"gpu_mem_limit": 1 << 30})
    runner = runtime.open(STAGE, artifact)
    buffers = {name: runtime.allocate(TensorSpec(name, "float32", ("batch", 2)), 3) for name in "xy"}
    runner.bind(buffers, rows=2, outputs=("y",))()
    (session,) = Session.made
    (_, options), *_ = session.providers
    assert options["user_compute_stream"] == str(runtime.cuda.stream)
    assert options["gpu_mem_limit"] == str(1 << 30)
    assert session.runs == [{name: ((2, 2), buffers[name].address) for name in "xy"}]
    assert "user_compute_stream" not in runtime.describe()["provider_options"]
    assert runtime.describe()["tensors"] == "CUDA device 0, Fake GPU"
    runtime.close()
    assert gpu.used() == 0


def test_row_by_row_on_cuda_binds_each_row(gpu, artifact):
    runtime = OrtRuntime(provider="cuda", row_by_row=True)
    runner = runtime.open(STAGE, artifact)
    buffers = {name: runtime.allocate(TensorSpec(name, "float32", ("batch", 2)), 3) for name in "xy"}
    runner.bind(buffers, rows=3, outputs=("y",))()
    bound = [{name: place for name, (shape, place) in run.items()} for run in Session.made[0].runs]
    assert bound == [{name: buffers[name].address + 8 * row for name in "xy"} for row in range(3)]


def test_on_cuda_through_the_host(gpu, artifact):
    runtime = OrtRuntime(provider="cuda", device_memory=False)
    assert isinstance(runtime.allocate(TensorSpec("x", "float32", ("batch", 2)), 1), HostBuffer)
    assert gpu.calls == []
