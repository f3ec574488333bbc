"""The cache of engines: what it gives back, what it never gives back, and two processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from edgekit.bundle import Bundle
from edgekit.engines import (
    Built,
    EngineBuilder,
    EngineCache,
    EngineKey,
    Instead,
    build_engines,
    built_or_instead,
    engines_beside,
    read_size,
)
from edgekit.errors import BundleError, InputError, LoweringError, PluginError
from edgekit.plan import Stage
from edgekit.runtimes.ort import OrtRuntime

KEY = EngineKey(
    library="TensorRT 10.3.0",
    device="Orin",
    compute_capability="8.7",
    artifacts="onnx",
    precision="",
    batch=(1, 8, 8),
    stage="ab" * 32,
)


class Builder:
    """Counts how often it builds."""

    def __init__(self, content=b"engine"):
        self.content = content
        self.builds = 0

    def __call__(self):
        self.builds += 1
        return self.content


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "net.edgekit.engines")


def get(cache, build, key=KEY, name="s0"):
    content, built = cache.get(name, key, build, stage="s0")
    return content, built.state, built.why


def engine_file(cache):
    (file,) = cache.folder.glob("*.engine")
    return file


def test_built_once(cache):
    build = Builder()
    assert get(cache, build) == (b"engine", "built", "")
    assert get(cache, build) == (b"engine", "reused", "")
    assert build.builds == 1
    assert sorted(path.suffix for path in cache.folder.iterdir()) == [".engine", ".json", ".lock"]
    told = json.loads(engine_file(cache).with_suffix(".json").read_text())
    assert msgspec.convert(told["key"], EngineKey) == KEY
    assert told["size_bytes"] == 6


def test_what_was_built_says_how_long_and_how_large(cache):
    _, built = cache.get("s0-trunk", KEY, Builder(b"123"), stage="s0")
    assert (built.stage, built.engine, built.size_bytes) == ("s0", "s0-trunk", 3)
    assert built.seconds > 0
    assert cache.get("s0-trunk", KEY, Builder(), stage="s0")[1].seconds == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"library": "TensorRT 10.7.0"}, "library is TensorRT 10.7.0 and was TensorRT 10.3.0"),
        ({"device": "Xavier"}, "device is Xavier and was Orin"),
        ({"compute_capability": "7.2"}, "compute capability is 7.2 and was 8.7"),
        ({"stage": "cd" * 32}, "the stage's files have changed"),
        ({"device": "A", "stage": "0"}, "device is A and was Orin; the stage's files have changed"),
    ],
)
def test_what_was_built_for_something_else_is_built_again(cache, change, why):
    get(cache, Builder(b"old"))
    key = msgspec.structs.replace(KEY, **change)
    assert get(cache, Builder(b"new"), key) == (b"new", "rebuilt", f"it was built for something else: {why}")
    assert get(cache, Builder(), key) == (b"new", "reused", "")
    assert len(list(cache.folder.glob("*.engine"))) == 1, "the old one is gone"


@pytest.mark.parametrize("change", [{"batch": (1, 1, 1)}, {"precision": "float16"}, {"artifacts": "onnx-int8"}])
def test_settings_lie_side_by_side(cache, change):
    other = msgspec.structs.replace(KEY, **change)
    get(cache, Builder(b"one"))
    assert get(cache, Builder(b"two"), other) == (b"two", "built", "")
    assert get(cache, Builder()) == (b"one", "reused", "")
    assert get(cache, Builder(), other) == (b"two", "reused", "")


def damage(kind, cache):
    engine = engine_file(cache)
    sidecar = engine.with_suffix(".json")
    if kind == "a changed byte":
        engine.write_bytes(b"engone")
    elif kind == "half an engine":
        engine.write_bytes(b"eng")
    elif kind == "no engine":
        engine.unlink()
    elif kind == "no sidecar":
        sidecar.unlink()
    elif kind == "half a sidecar":
        sidecar.write_bytes(sidecar.read_bytes()[:40])
    else:
        sidecar.write_text('{"key": 3}')


@pytest.mark.parametrize(
    "kind", ["a changed byte", "half an engine", "no engine", "no sidecar", "half a sidecar", "another sidecar"]
)
def test_what_is_damaged_is_built_again(cache, kind):
    get(cache, Builder())
    damage(kind, cache)
    content, state, why = get(cache, Builder())
    assert (content, state) == (b"engine", "rebuilt")
    assert why.startswith("it was damaged (")
    assert "\n" not in why
    assert get(cache, Builder())[1] == "reused"


def test_a_build_that_fails_leaves_nothing(cache):
    def fail():
        raise LoweringError("stage 's0': no")

    with pytest.raises(LoweringError, match="stage 's0': no"):
        get(cache, fail)
    assert [path.suffix for path in cache.folder.iterdir()] == [".lock"]
    assert get(cache, Builder()) == (b"engine", "built", "")


def test_a_build_that_fails_keeps_what_was_there(cache):
    get(cache, Builder(b"old"))

    def fail():
        raise LoweringError("no")

    with pytest.raises(LoweringError):
        get(cache, fail, msgspec.structs.replace(KEY, device="Other"))
    assert get(cache, Builder()) == (b"old", "reused", "")


def test_a_write_that_is_cut_short_leaves_the_old_one(cache, monkeypatch):
    get(cache, Builder(b"old"))

    def cut(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", cut)
    with pytest.raises(BundleError, match=r"engines cannot be kept there \(No space left on device\); .*cache="):
        get(cache, Builder(b"new"), msgspec.structs.replace(KEY, device="Other"))
    monkeypatch.undo()
    assert get(cache, Builder()) == (b"old", "reused", "")
    assert not [path for path in cache.folder.iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"file/engines: engines cannot be kept there"):
        get(EngineCache(tmp_path / "file" / "engines"), Builder())


def test_forgotten(cache):
    get(cache, Builder())
    cache.forget("s0", KEY)
    assert get(cache, Builder()) == (b"engine", "built", "")


PROCESS = """
import sys, time
from pathlib import Path
import msgspec
from edgekit.engines import EngineCache, EngineKey
folder, key, log = sys.argv[1:]
def build():
    with open(log, "a") as file:
        file.write("begin\\n")
    time.sleep(1.5)
    with open(log, "a") as file:
        file.write("end\\n")
    return b"engine"
waited = []
found = EngineCache(Path(folder)).get("s0", msgspec.json.decode(key.encode(), type=EngineKey), build, stage="s0",
                                      progress=lambda task, done, total: waited.append(task))
print(found[0].decode(), found[1].state, *waited, flush=True)
"""


def start(cache, log):
    key = msgspec.json.encode(KEY).decode()
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(cache.folder), key, str(log)], stdout=subprocess.PIPE, text=True
    )


def wait_for(log):
    until = time.monotonic() + 60
    while not log.exists():
        assert time.monotonic() < until, "the process never began to build"
        time.sleep(0.02)


def test_two_processes_build_it_once(cache, tmp_path):
    log = tmp_path / "log"
    first = start(cache, log)
    wait_for(log)
    second = start(cache, log)
    told = [process.communicate(timeout=60)[0].split(maxsplit=2) for process in (first, second)]
    assert told[0] == ["engine", "built"]
    assert told[1] == ["engine", "reused", "wait for another process that builds s0\n"]
    assert log.read_text() == "begin\nend\n"


def test_a_process_that_dies_while_it_builds_holds_nobody_up(cache, tmp_path):
    log = tmp_path / "log"
    first = start(cache, log)
    wait_for(log)
    first.kill()
    first.communicate(timeout=60)
    assert get(cache, Builder()) == (b"engine", "built", "")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1GiB", 1 << 30), ("512MiB", 512 << 20), ("1.5 MB", 1_500_000), (4096, 4096), ("7b", 7), ("64", 64)],
)
def test_sizes(text, size_bytes):
    assert read_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "much", "1 parsec", "-1", "0", "1e3", "0.1B"])
def test_no_sizes(text):
    with pytest.raises(InputError, match="is no size in bytes: write 1GiB"):
        read_size(text)


def test_engines_lie_beside_the_bundle(digits_bundle, tmp_path, monkeypatch):
    beside = tmp_path / "digits.edgekit.engines"
    assert engines_beside(digits_bundle) == beside
    with Bundle.open(digits_bundle) as bundle:
        assert engines_beside(bundle.artifact("onnx", bundle.plan.stages[0].name)) == beside
        packed = bundle.pack(tmp_path / "packed.edgekit")
    assert engines_beside(packed) == tmp_path / "packed.edgekit.engines"
    monkeypatch.chdir(digits_bundle)
    assert engines_beside(Path(".")) == beside


class Scripted:
    """A runtime that builds engines, or cannot build some."""

    name = "scripted"
    target = "onnx"

    def __init__(self, *, fails_at=None, fallback=None):
        self.fails_at = fails_at
        self.fallback = fallback
        self.asked = []

    def keep_engines(self, folder):
        self.folder = folder

    def unused(self, *_):
        raise AssertionError("nothing is opened")

    open = allocate = describe = close = unused

    def build(self, stage, artifact, *, progress):
        self.asked.append((stage.name, artifact))
        if stage.name == self.fails_at:
            raise LoweringError(f"stage '{stage.name}': cannot take Einsum 'e'")
        progress(f"build {stage.name}", 1, 1)
        return (Built(stage=stage.name, engine=stage.name, state="built", size_bytes=1),)


STAGES = [Stage(name=name, inputs=("x",), outputs=("y",), macs=None, weight_bytes=0) for name in ("a", "b")]
FILES = {"a": Path("a.onnx"), "b": Path("b.onnx")}


def test_every_stage_is_built_and_told():
    runtime, told = Scripted(), []
    built = build_engines(runtime, STAGES, FILES, progress=lambda *each: told.append(each))
    assert [each.stage for each in built] == ["a", "b"]
    assert runtime.asked == [("a", FILES["a"]), ("b", FILES["b"])]
    assert told[0] == ("engines", 0, 2)
    assert told[-1] == ("engines", 2, 2)


def test_a_runtime_whose_engines_can_be_built_is_taken():
    runtime = Scripted(fallback="onnxruntime")
    assert built_or_instead(runtime, STAGES, FILES) == (runtime, None)


def test_the_whole_network_goes_to_the_other_runtime():
    with pytest.warns(RuntimeWarning, match=r"stage 'b': cannot .* 'e'; the whole network runs on onnxruntime"):
        found, why = built_or_instead(Scripted(fails_at="b", fallback="onnxruntime"), STAGES, FILES, threads=2)
    assert isinstance(found, OrtRuntime)
    assert found.describe()["threads"] == 2
    assert why == Instead(asked="scripted", reason="stage 'b': cannot take Einsum 'e'")


def test_without_a_fallback_it_is_an_error():
    with pytest.raises(LoweringError, match="stage 'b': cannot take Einsum 'e'"):
        built_or_instead(Scripted(fails_at="b"), STAGES, FILES)
    with pytest.raises(PluginError, match="no runtime is called 'nothing'"):
        built_or_instead(Scripted(fails_at="a", fallback="nothing"), STAGES, FILES)


def test_which_runtimes_build_engines():
    assert isinstance(Scripted(), EngineBuilder)
    assert not isinstance(OrtRuntime(), EngineBuilder)
