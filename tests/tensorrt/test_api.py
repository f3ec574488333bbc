"""Every class, method, member and argument that the adapter uses, against the real bindings of several versions.

What is used is read out of the source; what there is, out of the bindings, imported over a stub of the libraries.
"""

from __future__ import annotations

import enum
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TENSORRT = {
    "exporters/to_tensorrt.py": {
        "trt": "",
        "builder": "Builder",
        "network": "INetworkDefinition",
        "config": "IBuilderConfig",
        "parser": "OnnxParser",
        "error": "ParserError",
        "profile": "IOptimizationProfile",
        "cache": "ITimingCache",
        "tensor": "ITensor",
        "layer": "ILayer",
    },
    "runtimes/trt.py": {"trt": "", "_trt_runtime": "Runtime"},
    "runtimes/trt_engine.py": {
        "trt": "",
        "engine": "ICudaEngine",
        "_engine": "ICudaEngine",
        "context": "IExecutionContext",
    },
}
CUDA = {"runtimes/cuda.py": {"cudart": "", "errors": "cudaError_t", "facts": "cudaDeviceProp"}}
VERSIONS = ("8.6.1", "10.3.0", "11.4.0")
CUDA_VERSIONS = {"12.2": "cuda.cudart", "12.8": "cuda.bindings.runtime", "13.0": "cuda.bindings.runtime"}
ENOUGH = 40
"""Uses of each library that must be found, or the search for them is broken."""


def problems(found, api, signatures):
    """What of the uses is not in a version."""
    told = []
    for file, use in found:
        if any((guard.name in api.get(guard.owner, {})) != guard.has for guard in use.guards):
            continue
        where = f"{file}:{use.line}: {use.owner}.{use.name}"
        if use.name not in api.get(use.owner, {}):
            told.append(f"{where} is not there")
            continue
        # A class that is called is made: its constructor says with what.
        made = not use.owner and use.name in api
        known = signatures(api[use.name].get("__init__") if made else api[use.owner][use.name])
        if use.arguments is None or not known:
            continue
        if not any(
            use.arguments <= len(names)
            and use.arguments + len(use.keywords) >= needed
            and set(use.keywords) <= set(names[use.arguments :])
            for names, needed in known
        ):
            told.append(f"{where} is called with {use.arguments} arguments and {use.keywords}, and takes {known}")
    return told


def all_uses(uses, files):
    return [
        (file, use) for file, variables in files.items() for use in uses.find_uses((ROOT / file).read_text(), variables)
    ]


@pytest.fixture(scope="module")
def tensorrt_uses(uses):
    found = all_uses(uses, TENSORRT)
    assert len({(use.owner, use.name) for _, use in found}) >= ENOUGH
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_use_of_tensorrt_is_in(prepared, uses, tensorrt_uses, version):
    told = prepared(f"api-{version}", "dump_api.py", "tensorrt_bindings")
    assert told["version"].startswith(version)
    assert problems(tensorrt_uses, told["api"], uses.signatures) == []


@pytest.mark.parametrize(("version", "module"), CUDA_VERSIONS.items())
def test_every_use_of_cuda_python_is_in(prepared, uses, version, module):
    found = all_uses(uses, CUDA)
    assert len({use.name for _, use in found}) >= 25
    api = prepared(f"cuda-{version}", "dump_api.py", module)["api"]
    assert problems(found, api, uses.signatures) == []


@pytest.mark.parametrize(("version", "module"), CUDA_VERSIONS.items())
def test_a_machine_without_a_gpu_is_told_so(prepared, version, module):
    told = prepared(f"cuda-{version}", "no_gpu.py")
    assert told["module"] == module
    if told["error"] is None:
        pytest.skip("this machine has a GPU")
    assert told["error"].startswith("CUDA device 0 cannot be used (")
    assert told["error"].endswith("is this a machine with an NVIDIA GPU and its driver?")
    assert "libcuda" in told["error"] or "cudaError" in told["error"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_stand_in_has_nothing_that_the_real_one_has_not(prepared, standins, version):
    """Otherwise tests could pass on what no TensorRT has."""
    fake_cuda, fake_trt = standins
    real = prepared(f"api-{version}", "dump_api.py", "tensorrt_bindings")["api"]
    trt = fake_trt.fake_tensorrt(fake_cuda.FakeCuda(), version)
    for name, members in vars(trt).items():
        if name in ("built", "ran", "fails", "refuses_engines") or name.startswith("__"):
            continue
        assert name in real[""], name
        if isinstance(members, enum.EnumMeta):
            assert {member.name for member in members} - {"OTHER"} <= set(real[name]), name
    for name, kind in {"ICudaEngine": trt.ICudaEngine, "ParserError": trt.ParserError, "Builder": trt.Builder}.items():
        own = {each for each in vars(kind) if not each.startswith("_")} - {"run"}
        assert own <= set(real[name]), name
        absent = {"device_memory_size", "device_memory_size_v2", "node_operator"} - own
        assert {each for each in absent if each in real[name]} <= {"device_memory_size"}, name


def test_a_use_that_is_not_there_is_found(uses):
    """The search itself, on a source of its own."""
    source = """
def use(trt, config, flag):
    config.set_flag(trt.BuilderFlag.FP16)
    if hasattr(trt.BuilderFlag, "NEW") and flag:
        config.set_flag(trt.BuilderFlag.NEW)
    if not hasattr(trt, "Late"):
        return config.early()
    class Mine(trt.Late):
        def told(self): ...
    config.limit(1, size=2)
    return trt.Late.X if hasattr(trt.Late, "X") else trt.Late.Y
"""
    found = [("f", use) for use in uses.find_uses(source, {"trt": "", "config": "Config"})]
    old = {"": {"BuilderFlag": ""}, "BuilderFlag": {"FP16": ""}, "Config": {"set_flag": "set_flag(self: C, flag: F)"}}
    assert problems(found, old, uses.signatures) == ["f:7: Config.early is not there"]
    limit = "limit(self: Config, pool: Pool, size: int = 3) -> None"
    new = {
        "": {"BuilderFlag": "", "Late": ""},
        "BuilderFlag": {"NEW": ""},
        "Late": {"__init__": "", "Y": ""},
        "Config": {"set_flag": "", "limit": limit},
    }
    assert problems(found, new, uses.signatures) == [
        "f:3: BuilderFlag.FP16 is not there",
        "f:9: Late.told is not there",
    ]
    new["Config"]["limit"] = limit.replace("size", "pool_size")
    assert any("Config.limit is called with 1 arguments and ('size',)" in told
               for told in problems(found, new, uses.signatures))  # fmt: skip


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("f(self: m.C, flags: int = 0) -> m.N", [(("flags",), 0)]),
        ("f(self: m.C, a: Tuple[int, int], b: Callable[[int], str]) -> None\n\n  Says: f(x)", [(("a", "b"), 2)]),
        ("f(*args, **kwargs)\nOverloaded function.\n\n1. f(self: m.C, a: int) -> int\n\n2. f(self: m.C) -> int",
         [(("*args", "**kwargs"), 2), (("a",), 1), ((), 0)]),
        ("cudaMalloc(size_t size)\n\nAllocates.", [(("size",), 1)]),
        ("cudaGraphLaunch(graphExec, stream)", [(("graphExec", "stream"), 2)]),
        ("", []),
    ],
)  # fmt: skip
def test_signatures(uses, text, found):
    assert uses.signatures(text) == found
