"""An open TensorRT engine: bound to buffers, run kernel by kernel or as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import BundleError, EdgekitError
from edgekit.interfaces import Buffer
from edgekit.plan import Stage
from edgekit.runtimes.cuda import DeviceBuffer, Graph
from edgekit.tensors import BATCH, TensorSpec

if TYPE_CHECKING:
    from edgekit.runtimes.trt import TensorRTRuntime

__all__ = ["Engine"]

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""numpy's names of TensorRT's types."""


class Engine:
    """The engine of one of a stage's files.

    Args:
        runtime: whose device it runs on.
        engine: TensorRT's.
        stage: what it computes.
        file: that it was built from, for messages.
        outputs: that the file computes.

    Raises:
        BundleError: its inputs and outputs are not the stage's.
    """

    def __init__(
        self, runtime: TensorRTRuntime, engine: Any, *, stage: Stage, file: Path, outputs: Sequence[str]
    ) -> None:
        trt = runtime.trt
        self._runtime = runtime
        self._engine = engine
        self._stage = stage
        self._file = file
        self.doing = f"stage '{stage.name}'"
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        # An input that the file has and nothing in it reads may be gone.
        self.inputs = tuple(name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)
        self.outputs = tuple(name for name in names if name not in self.inputs)
        differing = sorted({*self.inputs} - {*stage.inputs} | {*self.outputs} ^ {*outputs})
        if differing:
            raise BundleError(
                f"{file}: '{differing[0]}' is not in both the engine and the plan of stage '{stage.name}'; export again"
            )
        for name in names:
            if engine.get_tensor_location(name) == trt.TensorLocation.HOST:
                raise BundleError(
                    f"{file}: stage '{stage.name}' computes a shape from '{name}', which TensorRT wants on the host; "
                    "run this network on another runtime, as onnxruntime"
                )
        self._types = {name: str(engine.get_tensor_dtype(name).name) for name in names}
        self._shared: Any = None
        self._spare: dict[str, int] = {}
        self._rows: dict[tuple[int, ...], tuple[dict[str, DeviceBuffer], Call]] = {}

    def _context(self, *, own: bool) -> Any:
        """What runs the engine: it remembers shapes and addresses, and has scratch memory of its own.

        Args:
            own: a new one that nothing else changes, as a CUDA graph needs; else the one for all other calls.

        Raises:
            EdgekitError: there is no device memory for it.
        """
        if self._shared is not None and not own:
            return self._shared
        trt, engine = self._runtime.trt, self._engine
        self._runtime.log.last = ""
        context = engine.create_execution_context()
        if context is None:
            if hasattr(trt.ICudaEngine, "device_memory_size_v2"):
                size_bytes = engine.device_memory_size_v2
            else:
                size_bytes = engine.device_memory_size
            reason = self._runtime.log.last or "TensorRT gives no reason"
            raise EdgekitError(
                f"{self.doing} needs {size_bytes:,} bytes of device memory to run in, and "
                f"{self._runtime.cuda.free_bytes():,} are free ({reason}); "
                "build for fewer rows: edgekit build BUNDLE --max-batch 1"
            )
        if not own:
            self._shared = context
        return context

    def bind(self, buffers: Mapping[str, Buffer], *, rows: int, outputs: Sequence[str]) -> Callable[[], None]:
        """See :meth:`edgekit.interfaces.StageRunner.bind`.

        Raises:
            InputError: more rows than the engine takes at once.
            BundleError: a tensor's dtype is not the plan's.
        """
        bound = {name: _on_device(buffers[name]) for name in (*self.inputs, *outputs)}
        for name, buffer in bound.items():
            self._require_type(buffer.spec, name)
        has_rows = rows > 1 and any(buffer.spec.batched for buffer in bound.values())
        if has_rows and self._runtime.row_by_row and not self._stage.whole:
            return self._bind_each_row(bound, rows=rows)
        if has_rows:
            self._runtime.require_rows(self._stage, rows)
        call = self._call(bound, rows=rows, as_graph=rows == 1 and self._runtime.cuda_graphs)
        cuda = self._runtime.cuda

        def run() -> None:
            call.start()
            cuda.wait(self.doing)
            if call.to_capture:
                call.capture()

        return run

    def _bind_each_row(self, bound: Mapping[str, DeviceBuffer], *, rows: int) -> Callable[[], None]:
        """Each row through one place, where addresses, and so kernels, are the same as those of a row alone."""
        cuda, doing = self._runtime.cuda, self.doing
        whole = {name: buffer for name, buffer in bound.items() if not buffer.spec.batched}
        places, call = self._one_place(bound, whole)
        given = [(places[name], bound[name]) for name in self.inputs if name not in whole]
        made = [(places[name], bound[name]) for name in self.outputs if name in bound and name not in whole]

        def run() -> None:
            for row in range(rows):
                for place, buffer in given:
                    size = buffer.row_bytes
                    cuda.on_device(place.address, buffer.address + row * size, size, what=doing)
                call.start()
                if call.to_capture:
                    cuda.wait(doing)
                    call.capture()
                for place, buffer in made:
                    size = buffer.row_bytes
                    cuda.on_device(buffer.address + row * size, place.address, size, what=doing)
            cuda.wait(doing)

        return run

    def _one_place(
        self, bound: Mapping[str, DeviceBuffer], whole: Mapping[str, DeviceBuffer]
    ) -> tuple[dict[str, DeviceBuffer], Call]:
        """Buffers of one row for all that has rows, and the call that is bound to them; kept, whatever the batch."""
        key = tuple(buffer.address for buffer in whole.values())
        if key not in self._rows:
            named = {name: buffer.spec for name, buffer in bound.items() if name not in whole}
            named |= {name: self._spec(name) for name in self.outputs if name not in bound}
            places = {name: DeviceBuffer(self._runtime.cuda, spec, 1) for name, spec in named.items()}
            self._rows[key] = places, self._call({**places, **whole}, rows=1, as_graph=self._runtime.cuda_graphs)
        return self._rows[key]

    def _call(self, bound: Mapping[str, DeviceBuffer], *, rows: int, as_graph: bool) -> Call:
        shapes = {name: bound[name].spec.concrete(rows) for name in self.inputs if bound[name].spec.batched}
        addresses = {name: buffer.address for name, buffer in bound.items()}
        for name in self.outputs:
            if name not in addresses:
                addresses[name] = self._nowhere(name)
        return Call(
            self._runtime,
            self._context(own=as_graph),
            stage=self._stage.name,
            shapes=shapes,
            addresses=addresses,
            as_graph=as_graph,
            buffers=tuple(bound.values()),
        )

    def _nowhere(self, name: str) -> int:
        """Memory for an output that nobody asked for, which TensorRT writes all the same."""
        if name not in self._spare:
            spec, rows = self._spec(name), self._runtime.batch[2]
            size_bytes = spec.row_bytes * (rows if spec.batched else 1)
            what = f"{self.doing}, output '{name}',"
            self._spare[name] = self._runtime.cuda.allocate(size_bytes, what=what, owner=self)
        return self._spare[name]

    def _spec(self, name: str) -> TensorSpec:
        """A tensor as the engine has it."""
        sizes = tuple(self._engine.get_tensor_shape(name))
        return TensorSpec(name, _DTYPES[self._types[name]], tuple(BATCH if size == -1 else size for size in sizes))

    def _require_type(self, spec: TensorSpec, name: str) -> None:
        found = self._types[name]
        if found not in _DTYPES or np.dtype(_DTYPES[found]) != np.dtype(spec.dtype):
            raise BundleError(
                f"{self._file}: tensor '{name}' of stage '{self._stage.name}' is {found} in TensorRT "
                f"{self._runtime.trt.__version__} and {spec.dtype} in the plan; "
                "use TensorRT 10 or newer, or another runtime, as onnxruntime"
            )


class Call:
    """An engine with shapes and addresses set. What it starts is queued, not waited for.

    Args:
        runtime: whose stream it is queued on.
        context: TensorRT's; its own when it is to become a graph.
        stage: name of the stage.
        shapes: of the inputs that have rows.
        addresses: of every input and output.
        as_graph: whether it is to become a CUDA graph.
        buffers: what lies at the addresses, kept for as long as this is.

    Attributes:
        to_capture: whether it should be captured, now that it has run: until then TensorRT has work to do that is for
            the host, and a run before its time would write to memory that others still read.
    """

    def __init__(
        self,
        runtime: TensorRTRuntime,
        context: Any,
        *,
        stage: str,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        as_graph: bool,
        buffers: tuple[DeviceBuffer, ...],
    ) -> None:
        self._runtime = runtime
        self._buffers = buffers
        self._context = context
        self._stage = stage
        self._shapes = tuple(shapes.items())
        self._addresses = tuple(addresses.items())
        self._graph: Graph | None = None
        self.to_capture = as_graph
        self._doing = f"stage '{stage}'"

    def start(self) -> None:
        """Queue the stage.

        Raises:
            EdgekitError: TensorRT or CUDA does not take it.
        """
        if self._graph is not None:
            self._graph.launch(self._doing)
            return
        context = self._context
        for name, shape in self._shapes:
            if not context.set_input_shape(name, shape):
                raise self._failure(f"input '{name}' cannot be {shape}")
        for name, address in self._addresses:
            if not context.set_tensor_address(name, address):
                raise self._failure(f"'{name}' cannot be at its address")
        self._enqueue()

    def capture(self) -> None:
        """Make a graph of what it queues; where that fails it goes on without, and the runtime knows why."""
        self.to_capture = False
        try:
            self._graph = self._runtime.cuda.capture(self._enqueue)
        except EdgekitError as error:
            self._runtime.not_captured[self._stage] = str(error)

    def _enqueue(self) -> None:
        context = self._context
        self._runtime.cuda.queued += 1
        if not context.execute_async_v3(self._runtime.cuda.stream):
            raise self._failure("it does not start")

    def _failure(self, what: str) -> EdgekitError:
        reason = self._runtime.log.last or "it gives no reason"
        return EdgekitError(f"{self._doing} failed in TensorRT: {what} ({reason})")


def _on_device(buffer: Buffer) -> DeviceBuffer:
    assert isinstance(buffer, DeviceBuffer)
    return buffer
