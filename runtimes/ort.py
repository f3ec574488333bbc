"""ONNX Runtime. Stages read and write shared host memory; nothing is copied between them."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np

from edgekit.errors import BundleError, MeasurementError, PluginError, require
from edgekit.interfaces import Buffer
from edgekit.measured import OperatorTime
from edgekit.plan import Stage
from edgekit.runtimes.cuda import Cuda, DeviceBuffer, load_cuda
from edgekit.runtimes.host import HostBuffer
from edgekit.runtimes.operators import operator_times
from edgekit.runtimes.ort_providers import (
    CPU,
    NO_CPU,
    ON_CUDA,
    RECORD,
    Assigned,
    assigned,
    options_text,
    provider_name,
)
from edgekit.runtimes.ort_threads import require_own_threads, share_threads
from edgekit.runtimes.variants import serving, variants
from edgekit.tensors import TensorSpec

__all__ = ["OrtRuntime"]


ROW_BY_ROW = "edgekit.row_by_row"
"""Property of a file whose batches must run row by row. See :mod:`edgekit.exporters.quantize_onnx`."""
_OWN_OPTIONS = {"session.force_spinning_stop": "1", "session.use_env_allocators": "1"}
"""Threads of a stage that has ended must not keep spinning on the cores that the next stage's threads need. All stages
work in one arena, whose memory the last stage has left warm, instead of one each."""


class OrtRuntime:
    """Opens ``onnx`` artifacts in ONNX Runtime.

    With several threads, ONNX Runtime cuts the sum inside a convolution elsewhere for one image than for a batch,
    and the last bits of a row depend on its batch (seen in 1.32 with 94 channels and a 3x3 kernel on 8x8 pixels). The
    same input must decide the same way at every batch size, so a batch then runs row by row inside each stage.

    Args:
        threads: that compute inside an operator.
        shared_threads: let all stages work with one pool of threads, the process's, instead of one pool each: with
            several threads, that saves most of what the way from stage to stage costs. ONNX Runtime then refuses
            sessions with a pool of their own: everything in the process that runs on it must share.
        provider: execution provider, as ``"cuda"`` or ``"CUDAExecutionProvider"``.
        provider_options: of the provider, by its own names, as ``{"device_id": 0}``.
        device_memory: with ``"cuda"`` and ``"tensorrt"``, keep tensors on the GPU between stages, by cuda-python;
            ``False`` passes them through the host.
        fallback: let the CPU take nodes that the provider cannot; :meth:`describe` tells which. ``False`` refuses them.
        row_by_row: run a batch one row at a time inside each stage; ``None`` means with more than one thread. With
            one thread, convolutions, matrix products and softmax gave the same bits at every batch size;
            sums and means over unaligned rows did not, and a network whose scores hang on those wants ``True``.
        session_options: of ``onnxruntime.SessionOptions``, by name; a name with a dot is a session configuration
            entry, as ``"session.intra_op.allow_spinning": "0"``; an enumeration's member may be given by its name.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        PluginError: the provider or an option does not exist here, the provider's libraries do not load, or threads
            cannot be shared.
    """

    name = "onnxruntime"
    target = "onnx"

    def __init__(
        self,
        *,
        threads: int = 1,
        shared_threads: bool = False,
        provider: str = CPU,
        provider_options: Mapping[str, Any] | None = None,
        device_memory: bool = True,
        fallback: bool = True,
        row_by_row: bool | None = None,
        session_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.ort = require("onnxruntime", extra="ort", purpose="Running on ONNX Runtime")
        self._threads = threads
        self._provider = provider_name(provider, self.ort.get_available_providers())
        self._provider_options = options_text(provider_options)
        self._fallback = fallback
        self.cuda: Cuda | None = None
        if self._provider in ON_CUDA and device_memory:
            cudart = load_cuda("Keeping ONNX Runtime's tensors on the GPU")
            self.cuda = Cuda(cudart, device=int(self._provider_options.get("device_id", "0")))
            # On one stream, what a stage writes is there before the next reads it or rows of it are copied.
            stream = {"has_user_compute_stream": "1", "user_compute_stream": str(self.cuda.stream)}
            self._provider_options = stream | self._provider_options
        self._assigned: dict[str, Assigned] = {}
        self.row_by_row = threads > 1 if row_by_row is None else row_by_row
        self._given = {**_OWN_OPTIONS, **(session_options or {})}
        self._shared_threads = shared_threads
        if shared_threads:
            self._given = {"use_per_session_threads": False, **self._given}
        else:
            require_own_threads()
        if self._provider != CPU:
            self._given = {RECORD: "1", NO_CPU: str(int(not fallback)), **self._given}
        self._options = self._make_options()
        if shared_threads:
            share_threads(self.ort, threads)  # for good, so after all else that may be refused
        self._records: TemporaryDirectory[str] | None = None
        self._recording: list[tuple[str, Any]] = []
        arena = self.ort.OrtMemoryInfo(
            "Cpu", self.ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, self.ort.OrtMemType.DEFAULT
        )
        self.ort.create_and_register_allocator(arena, None)  # for the process; again changes nothing
        # Made once: ONNX Runtime would make its own for every run, which costs some microseconds.
        self.run_options = self.ort.RunOptions()

    def _make_options(self) -> Any:
        options = self.ort.SessionOptions()
        if not self._shared_threads:
            options.intra_op_num_threads = self._threads
            options.inter_op_num_threads = 1
        options.execution_mode = self.ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        for name, value in self._given.items():
            if "." in name:
                options.add_session_config_entry(name, str(value))
                continue
            if name.startswith("_") or not hasattr(options, name) or callable(getattr(options, name)):
                raise PluginError(f"runtime 'onnxruntime': onnxruntime.SessionOptions has no option '{name}'")
            names = getattr(type(getattr(options, name)), "__members__", {})
            try:
                setattr(options, name, names.get(value, value))
            except (TypeError, ValueError) as error:
                raise PluginError(f"runtime 'onnxruntime': option '{name}' cannot be {value!r}") from error
        return options

    def open(self, stage: Stage, artifact: Path) -> OrtRunner:
        """One stage. Of several files, each is read when its outputs are first bound; a single one is read now.

        Raises:
            BundleError: ONNX Runtime does not take it, or its inputs and outputs are not the stage's.
        """
        return OrtRunner(self, stage, artifact)

    def session(self, stage: Stage, file: Path, outputs: Sequence[str]) -> Any:
        """An ``onnxruntime.InferenceSession`` on a file that must have the stage's inputs and these outputs.

        Raises:
            BundleError: ONNX Runtime does not take it, or its inputs and outputs are others.
        """
        if self._records is not None:
            self._options.enable_profiling = True
            self._options.profile_file_prefix = str(Path(self._records.name) / f"{len(self._recording)}")
        try:
            session = self.ort.InferenceSession(
                str(file), self._options, providers=[(self._provider, self._provider_options)]
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common base below Exception
            raise BundleError(
                f"{file}: stage '{stage.name}' does not open in ONNX Runtime ({_one_line(error)}); export again"
            ) from error
        if self._records is not None:
            self._recording.append((stage.name, session))
        if session.get_providers()[0] != self._provider:
            raise PluginError(
                f"{file}: stage '{stage.name}' fell back from {self._provider} to {session.get_providers()[0]}: "
                "the provider's libraries do not load, and ONNX Runtime's own lines above say which"
            )
        self._note_assigned(stage.name, session)
        for kind, names, found in (
            ("input", stage.inputs, session.get_inputs()),
            ("output", outputs, session.get_outputs()),
        ):
            differing = sorted(set(names) ^ {item.name for item in found})
            if differing:
                raise BundleError(
                    f"{file}: {kind} '{differing[0]}' of stage '{stage.name}' is in the "
                    f"{'plan but not the file' if differing[0] in names else 'file but not the plan'}; export again"
                )
        return session

    def allocate(self, spec: TensorSpec, rows: int) -> Buffer:
        """Memory that every stage binds: the host's, or the GPU's where the provider computes there."""
        return HostBuffer(spec, rows) if self.cuda is None else DeviceBuffer(self.cuda, spec, rows)

    def describe(self) -> dict[str, Any]:
        """Name, version, provider, threads and options."""
        return {
            "name": self.name,
            "version": self.ort.__version__,
            "provider": self._provider,
            "provider_options": {k: v for k, v in self._provider_options.items() if k != "user_compute_stream"},
            "tensors": "host" if self.cuda is None else f"CUDA device {self.cuda.device}, {self.cuda.name}",
            "threads": self._threads,
            "row_by_row": self.row_by_row,
            "session_options": {name: str(value) for name, value in self._given.items()},
        }

    def _note_assigned(self, stage: str, session: Any) -> None:
        """Keep which nodes of a stage went to which provider; a stage's files count as one."""
        found = assigned(session) if self._provider != CPU else None
        for provider, nodes in (found or {}).items():
            kept = self._assigned.setdefault(stage, {})
            kept[provider] = tuple(dict.fromkeys((*kept.get(provider, ()), *nodes)))

    def nodes_elsewhere(self) -> dict[str, tuple[str, ...]] | None:
        """See :meth:`edgekit.interfaces.NodePlacement.nodes_elsewhere`. Of the files that are open by now."""
        if self._provider != CPU and not self._assigned:
            return None
        found = {
            stage: tuple(f"{node} on {name}" for name in nodes if name != self._provider for node in nodes[name])
            for stage, nodes in self._assigned.items()
        }
        return {stage: nodes for stage, nodes in found.items() if nodes}

    def timing_operators(self) -> OrtRuntime:
        """A runtime with the same options in whose stages ONNX Runtime's profiler is on, until it is closed.

        The profiler counts whole microseconds and adds one or two to each operator (seen in 1.32), so operators of
        that size look larger than they are, and together larger than their stage.
        """
        made = OrtRuntime(
            threads=self._threads,
            shared_threads=self._shared_threads,
            provider=self._provider,
            provider_options={k: v for k, v in self._provider_options.items() if "user_compute_stream" not in k},
            device_memory=self.cuda is not None,
            fallback=self._fallback,
            row_by_row=self.row_by_row,
            session_options=self._given,
        )
        made._records = TemporaryDirectory(prefix="edgekit-operators-")
        return made

    def operator_times(self) -> tuple[OperatorTime, ...]:
        """Every node that ran since :meth:`timing_operators`, the first few calls left out; ends the recording.

        Nodes are those of ONNX Runtime's optimised graph, under its names. A stage's files count as one.

        Raises:
            MeasurementError: this runtime does not record, or a recording cannot be read.
        """
        if self._records is None:
            raise MeasurementError("runtime 'onnxruntime' records no operators; use what its timing_operators() gives")
        calls: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
        while self._recording:
            stage, session = self._recording.pop(0)
            for name, kind, seconds in _nodes(Path(session.end_profiling())):
                calls[stage, name, kind].append(seconds)
        return operator_times(calls)

    def close(self) -> None:
        """Remove what was recorded, and give back the GPU's memory. Every stage has its own session."""
        if self.cuda is not None:
            self.cuda.close()
        while self._recording:
            self._recording.pop()[1].end_profiling()
        if self._records is not None:
            self._records.cleanup()


class OrtRunner:
    """One stage. Its graph is written with and without what is optional; the smallest that serves is opened.

    ONNX Runtime computes every node of a file (``RunOptions.only_execute_path_to_fetches`` has no effect in inference
    builds), so what is not asked for must not be in it. See :mod:`edgekit.exporters.to_onnx` for the files.
    """

    def __init__(self, runtime: OrtRuntime, stage: Stage, artifact: Path) -> None:
        self._runtime = runtime
        self._stage = stage
        self._variants = variants(stage, artifact)
        self._sessions: dict[tuple[str, ...], Any] = {}
        if len(self._variants) == 1:
            self._session(stage.outputs)

    def bind(self, buffers: Mapping[str, Buffer], *, rows: int, outputs: Sequence[str]) -> Callable[[], None]:
        """See :meth:`edgekit.interfaces.StageRunner.bind`.

        Raises:
            BundleError: ONNX Runtime does not take the file, or it is not the stage's.
        """
        session = self._session(outputs)
        if rows == 1 or self._stage.whole or not (self._runtime.row_by_row or _leans_on_batch(session)):
            return self._bind(session, buffers, slice(0, rows), outputs)

        def run() -> None:
            # Bound anew each time: a few microseconds beside a stage, where keeping all would hold rows² bindings.
            for row in range(rows):
                self._bind(session, buffers, slice(row, row + 1), outputs)()

        return run

    def _session(self, outputs: Sequence[str]) -> Any:
        """An open session that computes these outputs: the smallest there is, or one that is open already."""
        chosen = serving(self._stage, self._variants, outputs, opened=self._sessions)
        if chosen not in self._sessions:
            self._sessions[chosen] = self._runtime.session(self._stage, self._variants[chosen], chosen)
        return self._sessions[chosen]

    def _bind(
        self, session: Any, buffers: Mapping[str, Buffer], rows: slice, outputs: Sequence[str]
    ) -> Callable[[], None]:
        binding = session.io_binding()
        if self._runtime.cuda is not None:
            return self._bind_device(session, binding, buffers, rows, outputs)
        types = {item.name: item.type for item in (*session.get_inputs(), *session.get_outputs())}
        values = {name: self._value(buffers[name], rows, types[name]) for name in (*self._stage.inputs, *outputs)}
        for name in self._stage.inputs:
            binding.bind_ortvalue_input(name, values[name])
        for name in outputs:
            binding.bind_ortvalue_output(name, values[name])
        inner, inner_binding = getattr(session, "_sess", None), getattr(binding, "_iobinding", None)
        if inner is not None and inner_binding is not None:
            # What both classes wrap: a Python call less on the hot path.
            run = functools.partial(inner.run_with_iobinding, inner_binding, self._runtime.run_options)
        else:
            run = functools.partial(session.run_with_iobinding, binding, self._runtime.run_options)
        # Without them ONNX Runtime would write to freed memory.
        run.keep_alive = (session, binding, values)  # type: ignore[attr-defined]
        return run

    def _bind_device(
        self, session: Any, binding: Any, buffers: Mapping[str, Buffer], rows: slice, outputs: Sequence[str]
    ) -> Callable[[], None]:
        """By addresses in the GPU's memory, so that any rows of a buffer can be bound."""
        cuda = self._runtime.cuda
        assert cuda is not None
        count = rows.stop - rows.start
        for names, bind in ((self._stage.inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name in names:
                buffer = buffers[name]
                assert isinstance(buffer, DeviceBuffer)
                start = rows.start * buffer.row_bytes if buffer.spec.batched else 0
                dtype, shape = np.dtype(buffer.spec.dtype), buffer.spec.concrete(count)
                bind(name, "cuda", cuda.device, dtype, shape, buffer.address + start)
        run = functools.partial(session.run_with_iobinding, binding, self._runtime.run_options)
        run.keep_alive = (session, binding, dict(buffers))  # type: ignore[attr-defined]
        return run

    def _value(self, buffer: Buffer, rows: slice, expected: str) -> Any:
        array = buffer.read(rows.stop)
        value = self._runtime.ort.OrtValue.ortvalue_from_numpy(array[rows] if buffer.spec.batched else array)
        name = buffer.spec.name
        if value.data_type() != expected:
            raise BundleError(
                f"stage '{self._stage.name}': tensor '{name}' is {expected} in the file, "
                f"{buffer.spec.dtype} in the plan; export again"
            )
        return value

    def close(self) -> None:
        """Give back the sessions; what was bound must not run any more."""
        self._sessions.clear()


def _leans_on_batch(session: Any) -> bool:
    """Whether a file says that a row's answer hangs on the rows beside it, as where ranges are found in use."""
    return bool(session.get_modelmeta().custom_metadata_map.get(ROW_BY_ROW) == "1")


class _Event(msgspec.Struct):
    """Of a Chrome trace, as ONNX Runtime's profiler writes it; ``dur`` in microseconds."""

    cat: str = ""
    name: str = ""
    dur: float = 0.0
    args: dict[str, Any] = {}


def _nodes(file: Path) -> list[tuple[str, str, float]]:
    """Name, kind and seconds of every call of a node, in the order of a recording."""
    try:
        events = msgspec.json.decode(file.read_bytes(), type=list[_Event])
    except (OSError, msgspec.DecodeError) as error:
        raise MeasurementError(
            f"{file}: ONNX Runtime's recording cannot be read ({_one_line(error)}); measure fewer runs"
        ) from error
    names: dict[tuple[str, str, str], str] = {}
    taken: Counter[str] = Counter()
    found = []
    for event in events:
        if event.cat != "Node" or not event.name.endswith("_kernel_time"):
            continue
        kind, index = str(event.args.get("op_name", "")), str(event.args.get("node_index", ""))
        name = event.name.removesuffix("_kernel_time") or kind
        node = (name, kind, index)
        if node not in names:  # fused nodes may be nameless, or share a name
            taken[name] += 1
            names[node] = name if taken[name] == 1 else f"{name} #{taken[name]}"
        found.append((names[node], kind, event.dur * 1e-6))
    return found


def _one_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
