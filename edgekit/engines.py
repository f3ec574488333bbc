"""Engines that a device builds for itself, and the folder that keeps them.

Building takes seconds to minutes for each stage, so it is done once. Beside ``net.edgekit`` lies
``net.edgekit.engines/``::

    blocks.1-max_prob.6f0c2a91.engine   what the builder gave, for one setting of batch and precision
    blocks.1-max_prob.6f0c2a91.json     what it was built for, and its sha256
    blocks.1-max_prob.6f0c2a91.lock     held by the process that builds it

Written aside and renamed into place, the engine first. An engine is given out only when its digest and everything that
it was built for are right; one that is damaged, or of another GPU, library or network, is built again, and
:attr:`Built.why` says so. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import msgspec

from edgekit import plugins
from edgekit.errors import BundleError, InputError, LoweringError
from edgekit.interfaces import Runtime
from edgekit.manifest import MANIFEST
from edgekit.plan import Stage
from edgekit.progress import Progress, silent

__all__ = [
    "Built",
    "EngineBuilder",
    "EngineCache",
    "EngineKey",
    "Instead",
    "build_engines",
    "built_or_instead",
    "engines_beside",
    "read_size",
]

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class EngineKey(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an engine depends on.

    Attributes:
        library: name and version of what builds it, as ``"TensorRT 10.3.0"``.
        device: the GPU's name.
        compute_capability: the GPU's, as ``"8.7"``.
        artifacts: the set of artifacts that it is built from, as ``"onnx-int8"``.
        precision: lower precision that the builder may choose, ``""`` for none.
        batch: least, best and largest number of rows.
        stage: sha256 of the stage's files.
    """

    library: str
    device: str
    compute_capability: str
    artifacts: str
    precision: str
    batch: tuple[int, int, int]
    stage: str

    @property
    def setting(self) -> str:
        """Digest of what is asked for, other than the stage: engines of several settings lie side by side."""
        asked = msgspec.json.encode((self.artifacts, self.precision, self.batch))
        return hashlib.sha256(asked).hexdigest()[:8]

    def unlike(self, other: EngineKey) -> str:
        """How the other differs, in words; empty when it does not."""
        found = []
        for name, now, then in zip(self.__struct_fields__, msgspec.structs.astuple(self),
                                   msgspec.structs.astuple(other), strict=True):  # fmt: skip
            if now != then and name == "stage":
                found.append("the stage's files have changed")
            elif now != then:
                found.append(f"{name.replace('_', ' ')} is {now} and was {then}")
        return "; ".join(found)


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one engine.

    Attributes:
        stage: name of the stage.
        engine: name of its file that the engine is of: the stage's, or that of a variant.
        state: ``"built"`` for the first time, ``"reused"``, or ``"rebuilt"`` although one was there.
        why: what was wrong with the one that was there; empty unless rebuilt.
        size_bytes: of the engine.
        seconds: that building it took; 0 when it was reused.
    """

    stage: str
    engine: str
    state: Literal["built", "reused", "rebuilt"]
    why: str = ""
    size_bytes: int
    seconds: float = 0.0


class _Sidecar(msgspec.Struct, frozen=True, kw_only=True):
    """What is written beside an engine."""

    key: EngineKey
    sha256: str
    size_bytes: int
    built: str


@runtime_checkable
class EngineBuilder(Runtime, Protocol):
    """A runtime that builds engines of a stage's artifacts, on the device that it runs on."""

    fallback: str | None
    """Name of the runtime for the whole network where an engine cannot be built; ``None`` makes that an error."""

    def keep_engines(self, folder: Path) -> None:
        """Where to keep them, unless its own options say where."""
        ...

    def build(self, stage: Stage, artifact: Path, *, progress: Progress = silent) -> tuple[Built, ...]:
        """Build every engine of a stage that is not there already.

        Raises:
            LoweringError: the library cannot take the stage.
        """
        ...


class EngineCache:
    """A folder of engines. Several processes may use it at once.

    Args:
        folder: made when the first engine is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self, name: str, key: EngineKey, build: Callable[[], bytes], *, stage: str, progress: Progress = silent
    ) -> tuple[bytes, Built]:
        """An engine that is there, or that is built now: by one process, while others wait and then read it.

        Args:
            name: of the file that the engine is of.
            key: what it must have been built for.
            build: makes it.
            stage: name of the stage.
            progress: told when another process is building it.

        Raises:
            BundleError: the folder cannot be written.
            Exception: whatever ``build`` raises; nothing is left behind then.
        """
        content, why = self.read(name, key)
        if content is not None:
            return content, Built(stage=stage, engine=name, state="reused", size_bytes=len(content))
        with self._locked(name, key, progress):
            content, why = self.read(name, key)  # somebody else may have built it by now
            if content is not None:
                return content, Built(stage=stage, engine=name, state="reused", size_bytes=len(content))
            begin = time.perf_counter_ns()
            content = build()
            seconds = (time.perf_counter_ns() - begin) / 1e9
            self.write(name, key, content)
        state: Literal["built", "rebuilt"] = "rebuilt" if why else "built"
        return content, Built(stage=stage, engine=name, state=state, why=why, size_bytes=len(content), seconds=seconds)

    def read(self, name: str, key: EngineKey) -> tuple[bytes | None, str]:
        """An engine that is there and right, or why the one that is there is not; no reason when none is there."""
        engine, sidecar = self._files(name, key)
        if not engine.exists() and not sidecar.exists():
            return None, ""
        try:
            told = msgspec.json.decode(sidecar.read_bytes(), type=_Sidecar)
            if key.unlike(told.key):
                return None, f"it was built for something else: {key.unlike(told.key)}"
            content = engine.read_bytes()
        except (OSError, msgspec.DecodeError) as error:
            return None, f"it was damaged ({_one_line(error)})"
        if hashlib.sha256(content).hexdigest() != told.sha256:
            return None, "it was damaged (its sha256 differs)"
        return content, ""

    def write(self, name: str, key: EngineKey, content: bytes) -> None:
        """Keep an engine, in place of the one of the same setting.

        Raises:
            BundleError: the folder cannot be written.
        """
        engine, sidecar = self._files(name, key)
        told = _Sidecar(
            key=key,
            sha256=hashlib.sha256(content).hexdigest(),
            size_bytes=len(content),
            built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        with self._writing():
            _put(engine, content)
            _put(sidecar, msgspec.json.format(msgspec.json.encode(told), indent=1))

    def forget(self, name: str, key: EngineKey) -> None:
        """Take an engine out of the cache that the library does not take back."""
        with self._writing():
            for file in self._files(name, key):
                file.unlink(missing_ok=True)

    def _files(self, name: str, key: EngineKey) -> tuple[Path, Path]:
        stem = f"{name}.{key.setting}"
        return self.folder / f"{stem}.engine", self.folder / f"{stem}.json"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise BundleError(
                f"{self.folder}: engines cannot be kept there ({error.strerror or error}); "
                "give another folder: cache=..."
            ) from error

    @contextmanager
    def _locked(self, name: str, key: EngineKey, progress: Progress) -> Iterator[None]:
        """Hold the engine's lock. The system lets go of it when a process dies, so none is ever stale."""
        import fcntl  # not on Windows, where only this needs it

        with self._writing():
            file = (self.folder / f"{name}.{key.setting}.lock").open("wb")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(f"wait for another process that builds {name}", 0, 1)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def engines_beside(bundle: Path) -> Path:
    """Where the engines of a bundle lie: of ``net.edgekit``, ``net.edgekit.engines``.

    Args:
        bundle: folder or packed file, or a file inside a bundle's folder.
    """
    bundle = bundle.absolute()
    inside = next((path for path in (bundle, *bundle.parents) if (path / MANIFEST).is_file()), bundle)
    return inside.with_name(f"{inside.name}.engines")


def build_engines(
    runtime: EngineBuilder, stages: Iterable[Stage], artifacts: Mapping[str, Path], *, progress: Progress = silent
) -> tuple[Built, ...]:
    """Build every engine of a network that is not there already.

    Raises:
        LoweringError: the library cannot take a stage.
        BundleError: the cache cannot be written.
    """
    stages = list(stages)
    found: list[Built] = []
    for number, stage in enumerate(stages):
        progress("engines", number, len(stages))
        found += runtime.build(stage, artifacts[stage.name], progress=progress)
    progress("engines", len(stages), len(stages))
    return tuple(found)


class Instead(msgspec.Struct, frozen=True, kw_only=True):
    """That another runtime runs a session than was asked for.

    Attributes:
        asked: the runtime's name.
        reason: why it does not run.
    """

    asked: str
    reason: str


def built_or_instead(
    runtime: EngineBuilder, stages: Iterable[Stage], artifacts: Mapping[str, Path], *, threads: int = 1
) -> tuple[Runtime, Instead | None]:
    """The runtime when all its engines can be built, else its fallback, for the whole network, with a warning.

    Args:
        runtime: that was asked for; left as it is.
        stages: of the network.
        artifacts: each stage's file, by name.
        threads: of the other.

    Returns:
        What to run on, and why it is not what was asked for; ``None`` when it is.

    Raises:
        LoweringError: an engine cannot be built, and the runtime has no fallback.
        PluginError: there is no runtime of the fallback's name.
        MissingExtraError: the other runtime's library is not installed.
    """
    try:
        build_engines(runtime, stages, artifacts)
    except LoweringError as error:
        if runtime.fallback is None:
            raise
        other: Runtime = plugins.create("runtimes", runtime.fallback, threads=threads)
        warnings.warn(f"{error}; the whole network runs on {runtime.fallback} instead", RuntimeWarning, stacklevel=2)
        return other, Instead(asked=runtime.name, reason=str(error))
    return runtime, None


def read_size(text: str | int) -> int:
    """Bytes: ``"1GiB"`` is 1,073,741,824, ``"512 MB"`` is 512,000,000; a number is bytes.

    Raises:
        InputError: something else, or not above 0.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise InputError(f"'{text}' is no size in bytes: write 1GiB, 512MiB or a whole number")
    return size


def _put(path: Path, content: bytes) -> None:
    """Write a file aside and rename it into place, on the disk before its name is."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(0o644)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _one_line(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{Path(str(error.filename)).name} is missing"
    return " ".join(str(error).split()) or type(error).__name__
