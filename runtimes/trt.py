"""TensorRT. Tensors stay in device memory from stage to stage; only what is decided on crosses to the host.

Engines are built on the device from the bundle's ONNX stages (``edgekit.exporters.to_tensorrt``) and kept beside the
bundle (:mod:`edgekit.engines`).
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekit import plugins
from edgekit.engines import Built, EngineCache, EngineKey, engines_beside, read_size
from edgekit.errors import BundleError, EdgekitError, InputError, MissingExtraError, PluginError, require
from edgekit.interfaces import Buffer
from edgekit.plan import Stage
from edgekit.progress import Progress, silent
from edgekit.runtimes.cuda import Cuda, DeviceBuffer, Mark, load_cuda
from edgekit.runtimes.trt_engine import Engine
from edgekit.runtimes.variants import serving, variants
from edgekit.tensors import TensorSpec

__all__ = ["TensorRTRuntime"]

_PURPOSE = "Running on TensorRT"
_MEND = "install the libraries of the same version, and put their folder on LD_LIBRARY_PATH"


class TensorRTRuntime:
    """Opens ``onnx`` artifacts in TensorRT: builds an engine of each, once, and runs it on one CUDA stream.

    One row at a time, each stage is a CUDA graph, from its second run on. A batch runs row by row inside each stage
    unless ``max_batch`` says that engines take several rows at once: TensorRT's kernels may then sum in another order
    for other numbers of rows, so that a row's last bits, and with them its decision, can depend on its batch.

    Args:
        threads: told again by :meth:`describe`; the device has its own.
        max_batch: rows that an engine takes at once.
        best_batch: rows that it is fastest for; ``max_batch`` if ``None``.
        row_by_row: run a batch one row at a time inside each stage; ``None`` means where ``max_batch`` is 1. A stage
            whose samples need one another always runs whole.
        allow: lower precision that TensorRT may choose for float32 stages: ``"tf32"``, ``"float16"`` (not in TensorRT
            11), or both with ``+`` between them. Decisions may differ from those of other runtimes then.
        workspace: memory that a layer may use for scratch while building and running, as ``"1GiB"`` or in bytes.
        cache: folder for the engines; beside the bundle if ``None``.
        fallback: name of the runtime for the whole network where an engine cannot be built, as ``"onnxruntime"``; see
            :func:`edgekit.engines.built_or_instead`. ``None`` makes that an error.
        cuda_graphs: start each stage as one graph instead of kernel by kernel.
        device: number of the GPU.

    Raises:
        MissingExtraError: tensorrt or cuda-python is not installed.
        PluginError: TensorRT cannot load its libraries, there is no such GPU, or an option cannot be.
    """

    name = "tensorrt"
    target = "onnx"

    def __init__(
        self,
        *,
        threads: int = 1,
        max_batch: int = 1,
        best_batch: int | None = None,
        row_by_row: bool | None = None,
        allow: str = "",
        workspace: str | int | None = None,
        cache: str | Path | None = None,
        fallback: str | None = None,
        cuda_graphs: bool = True,
        device: int = 0,
    ) -> None:
        best = max_batch if best_batch is None else best_batch
        if not 1 <= best <= max_batch:
            raise PluginError(f"runtime 'tensorrt': best_batch {best} must be from 1 to max_batch, {max_batch}")
        self.trt = _load_tensorrt()
        self.cuda = Cuda(load_cuda(_PURPOSE), device=device)
        self.batch = (1, best, max_batch)
        self.row_by_row = max_batch == 1 if row_by_row is None else row_by_row
        self.cuda_graphs = cuda_graphs
        self.fallback = fallback
        self.not_captured: dict[str, str] = {}
        self._threads = threads
        self._allow = tuple(name for name in allow.split("+") if name)
        self._workspace_bytes = None if workspace is None else read_size(workspace)
        self._folder = None if cache is None else Path(cache)
        self._beside: Path | None = None
        self._digests: dict[tuple[Path, int, int], str] = {}
        self._builder = plugins.load("targets", "tensorrt")(self.trt)
        self.log = self._builder.log
        self._trt_runtime = self.trt.Runtime(self.log)

    def keep_engines(self, folder: Path) -> None:
        """See :meth:`edgekit.engines.EngineBuilder.keep_engines`."""
        self._beside = folder

    def build(self, stage: Stage, artifact: Path, *, progress: Progress = silent) -> tuple[Built, ...]:
        """Build the engines of a stage, one for each of its files, that are not there already.

        Raises:
            LoweringError: TensorRT cannot take the stage.
            BundleError: the cache cannot be written.
        """
        files = variants(stage, artifact).values()
        return tuple(self._cached(stage, artifact, file, progress=progress)[1] for file in files)

    def open(self, stage: Stage, artifact: Path) -> TensorRTRunner:
        """One stage. Of several files, an engine is opened when its outputs are first bound; a single one is now.

        Raises:
            LoweringError: TensorRT cannot take it.
            BundleError: the cache cannot be written, or the artifact's inputs and outputs are not the stage's.
        """
        return TensorRTRunner(self, stage, artifact)

    def engine(self, stage: Stage, artifact: Path, file: Path, outputs: Sequence[str]) -> Engine:
        """The engine of a stage's file, ready to run; built before if need be.

        Warns when one that was there is not used, and why: building it again takes its time.
        """
        content, built = self._cached(stage, artifact, file)
        if built.state == "rebuilt":
            self._warn(stage, built.why)
        self.log.last = ""
        found = self._trt_runtime.deserialize_cuda_engine(content)
        if found is None and built.state == "reused" and "memory" not in self.log.last.lower():
            # Its digest and key are right, and yet: what the key does not tell, as a driver, has changed.
            self._warn(stage, f"TensorRT did not take it back ({self.log.last or 'it gives no reason'})")
            self._cache(artifact).forget(file.stem, self._key(artifact, file))
            content, built = self._cached(stage, artifact, file)
            found = self._trt_runtime.deserialize_cuda_engine(content)
        if found is None:
            raise EdgekitError(
                f"stage '{stage.name}': TensorRT cannot open its engine of {len(content):,} bytes, with "
                f"{self.cuda.free_bytes():,} bytes of device memory free ({self.log.last or 'it gives no reason'}); "
                "build for fewer rows: edgekit build BUNDLE --max-batch 1"
            )
        return Engine(self, found, stage=stage, file=file, outputs=outputs)

    def allocate(self, spec: TensorSpec, rows: int) -> DeviceBuffer:
        """Device memory.

        Raises:
            EdgekitError: there is not enough.
        """
        return DeviceBuffer(self.cuda, spec, rows)

    def require_rows(self, stage: Stage, rows: int) -> None:
        """Refuse more rows than engines take at once.

        Raises:
            InputError: there are more.
        """
        if rows > self.batch[2]:
            option = f"max_batch={rows}, or edgekit build BUNDLE --max-batch {rows}"
            raise InputError(
                f"stage '{stage.name}': {rows} rows are more than its engine takes at once, {self.batch[2]}: "
                f"run smaller batches, or build engines for more ({option})"
            )

    def describe(self) -> dict[str, Any]:
        """Name, versions, GPU and options; stages that could not be captured as CUDA graphs, and why."""
        return {
            "name": self.name,
            "version": self.trt.__version__,
            "cuda": self.cuda.version,
            "device": self.cuda.name,
            "compute_capability": self.cuda.capability,
            "threads": self._threads,
            "batch": list(self.batch),
            "row_by_row": self.row_by_row,
            "allow": "+".join(self._allow),
            "workspace_bytes": self._workspace_bytes,
            "cuda_graphs": self.cuda_graphs,
            "not_captured": dict(self.not_captured),
        }

    def synchronize(self) -> None:
        """Wait until the GPU has done all that it was given."""
        self.cuda.wait("waiting for the device")

    def device_mark(self) -> Mark:
        """A moment in the stream."""
        return self.cuda.mark()

    def device_ns(self, begin: Mark, end: Mark) -> int:
        """Nanoseconds of the GPU's clock between two marks; it counts in about half a microsecond."""
        return begin.ns_until(end)

    def close(self) -> None:
        """Give back the stream and all device memory; no buffer may be used after."""
        self.cuda.close()

    def _warn(self, stage: Stage, why: str) -> None:
        warnings.warn(f"stage '{stage.name}': its engine is built again: {why}", RuntimeWarning, stacklevel=2)

    def _cache(self, artifact: Path) -> EngineCache:
        return EngineCache(self._folder or self._beside or engines_beside(artifact))

    def _key(self, artifact: Path, file: Path) -> EngineKey:
        beside = [path for path in artifact.parent.iterdir() if path.name.startswith(f"{artifact.stem}-")]
        weights = sorted(path for path in beside if path.suffix != artifact.suffix)
        return self._key_of(artifact.parent.name, "".join(map(self._digest, (file, *weights))))

    def _key_of(self, artifacts: str, content: str) -> EngineKey:
        return EngineKey(
            library=f"TensorRT {self.trt.__version__}",
            device=self.cuda.name,
            compute_capability=self.cuda.capability,
            artifacts=re.sub(r"-[0-9a-f]{12}$", "", artifacts),  # "onnx-int8", whenever it was written
            precision="+".join(sorted(self._allow)),
            batch=self.batch,
            stage=hashlib.sha256(content.encode()).hexdigest(),
        )

    def _digest(self, file: Path) -> str:
        """sha256 of a file; variants of a stage share one of weights, which is read once."""
        facts = file.stat()
        known = (file, facts.st_mtime_ns, facts.st_size)
        if known not in self._digests:
            self._digests[known] = hashlib.sha256(file.read_bytes()).hexdigest()
        return self._digests[known]

    def _cached(self, stage: Stage, artifact: Path, file: Path, *, progress: Progress = silent) -> tuple[bytes, Built]:
        """The engine of a file, out of the cache or built."""
        cache = self._cache(artifact)

        def build() -> bytes:
            # One for all stages of a setting: what was timed for one helps the next.
            timings = self._key_of("", "timing")
            engine, timing = self._builder.build(
                file,
                stage=stage.name,
                batch=self.batch,
                allow=self._allow,
                workspace_bytes=self._workspace_bytes,
                timing=cache.read("timing", timings)[0] or b"",
                progress=progress,
            )
            if timing:
                cache.write("timing", timings, timing)
            return bytes(engine)

        try:
            key = self._key(artifact, file)
        except OSError as error:
            raise BundleError(
                f"{file}: stage '{stage.name}' cannot be read ({error.strerror}); export again"
            ) from error
        return cache.get(file.stem, key, build, stage=stage.name, progress=progress)


class TensorRTRunner:
    """One stage: an engine for each of its files, opened when something first asks for it."""

    def __init__(self, runtime: TensorRTRuntime, stage: Stage, artifact: Path) -> None:
        self._runtime = runtime
        self._stage = stage
        self._artifact = artifact
        self._variants = variants(stage, artifact)
        self._engines: dict[tuple[str, ...], Engine] = {}
        if len(self._variants) == 1:
            self._engine(stage.outputs)

    def bind(self, buffers: Mapping[str, Buffer], *, rows: int, outputs: Sequence[str]) -> Callable[[], None]:
        """See :meth:`edgekit.interfaces.StageRunner.bind`.

        Raises:
            InputError: more rows than an engine takes at once.
            LoweringError: TensorRT cannot take the file.
            BundleError: it is not the stage's.
        """
        return self._engine(outputs).bind(buffers, rows=rows, outputs=outputs)

    def _engine(self, outputs: Sequence[str]) -> Engine:
        chosen = serving(self._stage, self._variants, outputs, opened=self._engines)
        if chosen not in self._engines:
            self._engines[chosen] = self._runtime.engine(self._stage, self._artifact, self._variants[chosen], chosen)
        return self._engines[chosen]

    def close(self) -> None:
        """Let go of the engines; what was bound must not run any more."""
        self._engines.clear()


def _load_tensorrt() -> Any:
    try:
        return require("tensorrt", extra="tensorrt", purpose=_PURPOSE, mend=_MEND)
    except MissingExtraError as error:
        raise MissingExtraError(
            f"{_PURPOSE} needs tensorrt, which is not installed: on a Jetson it comes with JetPack (sudo apt install "
            "nvidia-jetpack; a virtual environment needs --system-site-packages), elsewhere: pip install tensorrt. "
            "What it needs besides: pip install 'edgekit[tensorrt]'"
        ) from error
