"""``edgekit build``, on stand-ins of TensorRT's and CUDA's libraries."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

STANDINS = Path(__file__).parents[1] / "tensorrt"


def _standin(name):
    spec = importlib.util.spec_from_file_location(name, STANDINS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake_cuda, fake_trt = _standin("fake_cuda"), _standin("fake_trt")


@pytest.fixture
def gpu(monkeypatch):
    def use(**facts):
        cuda = fake_cuda.FakeCuda()
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
        trt = fake_trt.fake_tensorrt(cuda, **facts)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        return trt

    return use


def test_builds_then_reuses_then_says_why_it_builds_again(shell, gpu, digits_bundle):
    trt = gpu()
    first = shell.json("build", digits_bundle)
    assert {each["state"] for each in first["engines"]} == {"built"}
    assert first["built"] == len(first["engines"]) == len(trt.built)
    assert first["size_bytes"] == sum(each["size_bytes"] for each in first["engines"]) > 0
    assert first["runtime"]["device"] == "Fake GPU"
    assert digits_bundle.with_name("digits.edgekit.engines").is_dir()
    again = shell.json("build", digits_bundle)
    assert {each["state"] for each in again["engines"]} == {"reused"}
    assert again["built"] == 0
    gpu(version="10.7.0")
    text = " ".join(shell.works("build", digits_bundle).stdout.split())
    assert "rebuilt: it was built for something else: library is TensorRT 10.7.0 and was TensorRT 10.3.0" in text
    assert f"{len(first['engines'])} engines, {len(first['engines'])} built now" in text


def test_options_reach_the_builder(shell, gpu, digits_bundle):
    trt = gpu()
    told = shell.json("build", digits_bundle, "--max-batch", "8", "--workspace", "64MiB")
    assert told["runtime"]["batch"] == [1, 8, 8]
    assert {each.workspace for each in trt.built} == {64 << 20}
    assert trt.built[0].profile["x"][2][0] == 8


def test_a_packed_bundle_has_its_engines_beside_it(shell, gpu, digits_bundle, tmp_path):
    from edgekit.bundle import Bundle

    gpu()
    with Bundle.open(digits_bundle) as bundle:
        packed = bundle.pack(tmp_path / "packed.edgekit")
    shell.works("build", packed)
    assert list((tmp_path / "packed.edgekit.engines").glob("*.engine"))
    assert {each["state"] for each in shell.json("build", packed)["engines"]} == {"reused"}


def test_what_cannot_be_built(shell, gpu, digits_bundle):
    gpu(refuses=("Conv",))
    assert "TensorRT 10.3.0 cannot take Conv" in shell.fails("build", digits_bundle)
    assert "--runtime onnxruntime: builds no engines" in shell.fails("build", digits_bundle, "--runtime", "onnxruntime")
    assert "'much' is no size in bytes" in shell.fails("build", digits_bundle, "--workspace", "much")
    assert "no such bundle" in shell.fails("build", digits_bundle.with_name("nothing.edgekit"))
    assert "holds no 'onnx-int8' artifact" in shell.fails("build", digits_bundle, "--precision", "int8")
