"""LiteRT, once TensorFlow Lite. Images lie channel-last between stages, as its kernels want them.

A graph takes one sample, so a batch runs row by row inside each stage; or as many at a time as the file has graphs for
(see :mod:`edgekit.exporters.to_litert`), and what is left row by row.
One file holds all stages of a network: they share an interpreter, and with it a pool of threads.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

from numpy.typing import NDArray

from edgekit.artifacts import batch_of, trunk_of, unbatched
from edgekit.errors import BundleError, PluginError, require
from edgekit.interfaces import Buffer
from edgekit.plan import Stage
from edgekit.runtimes.host import ChannelsLastBuffer, HostBuffer
from edgekit.runtimes.litert_graph import Graph, OpenFile
from edgekit.streams import unheard
from edgekit.tensors import TensorSpec

__all__ = ["LIBRARIES", "LiteRTRuntime"]

LIBRARIES = {
    "ai-edge-litert": "ai_edge_litert.interpreter",
    "tflite-runtime": "tflite_runtime.interpreter",
    "tensorflow": "tensorflow.lite.python.interpreter",
}
"""Packages that bring the interpreter, and the module where it is, the preferred one first."""


class LiteRTRuntime:
    """Opens ``litert`` artifacts in the first of :data:`LIBRARIES` that is installed.

    Args:
        threads: that compute inside an operator.
        xnnpack: whether XNNPACK, whose kernels are the fast ones, computes what it can.
        library: one of :data:`LIBRARIES`; ``None`` takes the first that is installed.

    Raises:
        MissingExtraError: no such library is installed.
        PluginError: it is installed and does not load, or an option cannot be.
    """

    name = "litert"
    target = "litert"

    def __init__(self, *, threads: int = 1, xnnpack: bool = True, library: str | None = None) -> None:
        if threads < 1:
            raise PluginError(f"runtime 'litert': threads cannot be {threads}; give 1 or more")
        self._threads = threads
        self._xnnpack = xnnpack
        self._files: WeakValueDictionary[tuple[str, int, int, int], OpenFile] = WeakValueDictionary()
        self._library, self._module = _find(library)
        self._version = _version(self._library, self._module)

    def open(self, stage: Stage, artifact: Path) -> LiteRTRunner:
        """One stage. Its graph, or that without its exit's head, is allocated when its outputs are first bound.

        Stages of one file that are open at a time share an interpreter, whichever session they belong to: in threads,
        one waits for the other.

        Raises:
            BundleError: LiteRT does not take it, or its inputs and outputs are not the stage's.
        """
        return LiteRTRunner(self, stage, artifact)

    @contextmanager
    def opening(self, stage: Stage, file: Path) -> Iterator[None]:
        """Have LiteRT say nothing inside, and its errors name stage and file.

        Raises:
            BundleError: LiteRT does not take the file.
        """
        try:
            with unheard():
                yield
        except Exception as error:  # ValueError or RuntimeError, by where it fails
            line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise BundleError(
                f"{file}: stage '{stage.name}' does not open in {self._library} {self._version} ({line}); "
                "export again, or install a newer ai-edge-litert"
            ) from error

    def file(self, file: Path) -> OpenFile:
        """A file, open, which all its stages share."""
        state = file.stat()
        known = (str(file), state.st_ino, state.st_mtime_ns, state.st_size)
        opened = self._files.get(known)
        if opened is None:
            kind = self._module.OpResolverType
            resolver = kind.AUTO if self._xnnpack else kind.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            interpreter = self._module.Interpreter(
                model_path=str(file), num_threads=self._threads, experimental_op_resolver_type=resolver
            )
            self._files[known] = opened = OpenFile(interpreter)
        return opened

    def allocate(self, spec: TensorSpec, rows: int) -> HostBuffer | ChannelsLastBuffer:
        """Host memory; a tensor of four dimensions lies there channel-last."""
        return ChannelsLastBuffer(spec, rows) if len(spec.shape) == 4 else HostBuffer(spec, rows)

    def describe(self) -> dict[str, Any]:
        """Name, library and its version, device, threads and options."""
        return {
            "name": self.name,
            "version": self._version,
            "library": self._library,
            "device": "cpu",
            "threads": self._threads,
            "xnnpack": self._xnnpack,
        }

    def close(self) -> None:
        """Nothing to give back: stages hold their file."""


class LiteRTRunner:
    """One stage: its graph, and that without its exit's head. See :mod:`edgekit.exporters.to_litert`."""

    def __init__(self, runtime: LiteRTRuntime, stage: Stage, artifact: Path) -> None:
        self._runtime = runtime
        self._stage = stage
        self._artifact = artifact
        self._graphs: dict[tuple[str, int], Graph] = {}
        self._has_trunk = bool(stage.exit and stage.live)
        self._file: OpenFile | None = None
        with runtime.opening(stage, artifact):
            self._file = runtime.file(artifact)
        for signature in (stage.name, *([trunk_of(stage.name)] * self._has_trunk)):
            if signature not in self._file.signatures:
                holds = ", ".join(self._file.signatures[:3]) + ", ..." * (len(self._file.signatures) > 3)
                raise BundleError(
                    f"{artifact}: is not stage '{stage.name}' (it holds {holds or 'no signature'}, and no "
                    f"'{signature}'); export again"
                )
        if not self._has_trunk:
            self._graph(stage.name, stage.outputs, rows=1)

    def bind(self, buffers: Mapping[str, Buffer], *, rows: int, outputs: Sequence[str]) -> Callable[[], None]:
        """See :meth:`edgekit.interfaces.StageRunner.bind`.

        Raises:
            BundleError: LiteRT does not take the file, or it is not the stage's.
        """
        if self._has_trunk and set(outputs) <= set(self._stage.live):
            signature, made = trunk_of(self._stage.name), self._stage.live
        else:
            signature, made = self._stage.name, self._stage.outputs
        sizes, names = self._sizes(signature), (*self._stage.inputs, *outputs)
        memory = {name: _memory(buffers[name], rows) for name in names}
        batched = {name for name in names if buffers[name].spec.batched}
        runs, done = [], 0
        for at_once in sizes:
            whole = range(done, rows - (rows - done) % at_once, at_once)
            if whole:
                runs.append(self._graph(signature, made, rows=at_once).bind(memory, batched=batched, rows=whole))
                done = whole.stop
        return runs[0] if len(runs) == 1 else partial(_each, runs)

    def _sizes(self, signature: str) -> list[int]:
        """How many rows at once the file has graphs for, the most first."""
        known = map(unbatched, self._opened().signatures)
        return sorted((rows for name, rows in known if name == signature), reverse=True)

    def _graph(self, signature: str, outputs: Sequence[str], *, rows: int) -> Graph:
        key = (signature, rows)
        if key not in self._graphs:
            file, name = self._opened(), signature if rows == 1 else batch_of(signature, rows)
            with self._runtime.opening(self._stage, self._artifact):
                file.give_memory(name)
            self._graphs[key] = Graph(file, name, self._stage, self._artifact, outputs=outputs, rows=rows)
        return self._graphs[key]

    def _opened(self) -> OpenFile:
        if self._file is None:
            raise PluginError(f"stage '{self._stage.name}' is closed; open it again")
        return self._file

    def close(self) -> None:
        """Give back the graphs; what was bound must not run any more."""
        self._graphs.clear()
        self._file = None


def _each(runs: Sequence[Callable[[], None]]) -> None:
    for run in runs:
        run()


def _memory(buffer: Buffer, rows: int) -> NDArray[Any]:
    return buffer.stored(rows) if isinstance(buffer, ChannelsLastBuffer) else buffer.read(rows)


def _find(library: str | None) -> tuple[str, ModuleType]:
    """The name of the library's package, and its module."""
    if library is not None and library not in LIBRARIES:
        raise PluginError(f"runtime 'litert': no library '{library}' (there are {', '.join(LIBRARIES)})")
    names = [library] if library is not None else [name for name in LIBRARIES if _is_installed(LIBRARIES[name])]
    package = names[0] if names else next(iter(LIBRARIES))
    mend = "install the one made for this Python and processor, or name another library"
    with unheard():
        return package, require(LIBRARIES[package], extra="litert", purpose="Running on LiteRT", mend=mend)


def _is_installed(module: str) -> bool:
    """Whether a module's package is there, not whether it loads."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def _version(package: str, module: ModuleType) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # another package that brings the same, as tensorflow-cpu
        root = sys.modules[module.__name__.partition(".")[0]]
        return str(getattr(root, "__version__", "unknown"))
