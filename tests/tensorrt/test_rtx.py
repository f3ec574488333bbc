"""Every stage of the zoo, built into a real engine by TensorRT-RTX's builder, through edgekit's own; nothing is run."""

from __future__ import annotations

import json

import pytest

from edgekit.bundle import Bundle
from edgekit.runtimes.variants import variants

pytest.importorskip("torch", reason="exporting needs the export extra")

from edgekit.zoo.registry import NETWORKS

TYPES = {"float32": "FLOAT", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
MOST = 8


@pytest.fixture
def built(prepared):
    """Builds every file of a bundle's stages; gives what came of each, by file name."""

    def build(bundle, artifacts="onnx"):
        files = {}
        for stage in bundle.plan.stages:
            for outputs, file in variants(stage, bundle.artifact(artifacts, stage.name)).items():
                files[str(file)] = (stage, outputs)
        told = prepared("rtx", "build_rtx.py", MOST, *files)
        return [(*files[file], facts) for file, facts in told["files"].items()]

    return build


def check(bundle, engines):
    fixed = bundle.plan.inputs[0].shape[0] == 1
    for stage, outputs, facts in engines:
        assert facts["size_bytes"] > 1000
        assert facts["steps"] == sorted(facts["steps"])
        assert set(facts["inputs"]) == set(stage.inputs)
        assert tuple(facts["outputs"]) == outputs
        for name, (dtype, shape) in {**facts["inputs"], **facts["outputs"]}.items():
            spec = bundle.plan.tensors[name]
            assert dtype == TYPES[spec.dtype], name
            if not fixed and name in facts["inputs"]:
                assert shape == [-1 if isinstance(size, str) else size for size in spec.shape], name


def test_digits(exported_digits, built):
    with Bundle.open(exported_digits) as bundle:
        engines = built(bundle)
        check(bundle, engines)
        assert len(engines) > len(bundle.plan.stages), "variants are engines too"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "int8-symmetric"])
def test_lower_precision(precision, digits_bundle, built):
    """Tensors that cross stay float32, so stages of any precision fit together."""
    import edgekit
    from edgekit.zoo.digits import calibration_set

    edgekit.quantize(digits_bundle, calibration_set(), precision=precision)
    with Bundle.open(digits_bundle) as bundle:
        check(bundle, built(bundle, f"onnx-{precision}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"msdnet-digits"}))
def test_every_network_of_the_zoo(name, built, tmp_path):
    import edgekit
    from edgekit.zoo.registry import WEIGHTS, load

    network = NETWORKS[name]
    if not (WEIGHTS / f"{name}.safetensors").exists():
        pytest.skip(f"{name} comes without weights")
    with edgekit.export(load(name), (network.example(),), tmp_path / "net.edgekit") as bundle:
        engines = built(bundle)
        check(bundle, engines)
        total = sum(facts["size_bytes"] for _, _, facts in engines)
        seconds = sum(facts["seconds"] for _, _, facts in engines)
        print(json.dumps({"network": name, "stages": len(bundle.plan.stages), "engines": len(engines),
                          "bytes": total, "seconds": round(seconds, 1)}))  # fmt: skip
