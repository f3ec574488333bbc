"""One CUDA device through cuda-python: memory, copies, events and graphs, all in the order of one stream."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import EdgekitError, MissingExtraError, PluginError, require
from edgekit.interfaces import Buffer
from edgekit.tensors import TensorSpec

__all__ = ["Cuda", "DeviceBuffer", "Graph", "Mark", "OutOfDeviceMemoryError", "load_cuda"]


class OutOfDeviceMemoryError(EdgekitError):
    """The device has not as much memory as was asked for."""


def load_cuda(purpose: str) -> ModuleType:
    """The CUDA runtime's module of cuda-python: ``cuda.bindings.runtime``, or ``cuda.cudart`` before 12.6.

    Raises:
        MissingExtraError: cuda-python is not installed.
        PluginError: it is, but does not load.
    """
    try:
        return require("cuda.bindings.runtime", extra="tensorrt", purpose=purpose)
    except (MissingExtraError, PluginError):
        with suppress(MissingExtraError, PluginError):
            return require("cuda.cudart", extra="tensorrt", purpose=purpose)
        raise


class Cuda:
    """A device and a stream on it. Everything is queued on that stream, so that it happens in the order of the calls.

    Args:
        cudart: what :func:`load_cuda` gives.
        device: number of the device.

    Attributes:
        stream: the stream's handle.
        name: of the device.
        capability: its compute capability, as ``"8.7"``.
        version: of the CUDA runtime, as ``"12.6"``.
        waits: how often the host has waited for the stream.
        queued: how much was queued; whoever queues work on the stream by other means adds to it.

    Raises:
        PluginError: there is no such device, or no driver for it.
    """

    def __init__(self, cudart: Any, *, device: int = 0) -> None:
        self.cudart = cudart
        self.device = device
        self.waits = 0
        self.queued = 0
        self._numbers = count()
        self._held: dict[int, Callable[[], object]] = {}
        try:
            self.check(cudart.cudaSetDevice(device), "choosing the device")
            facts = self.check(cudart.cudaGetDeviceProperties(device), "asking the device what it is")
            number = int(self.check(cudart.cudaRuntimeGetVersion(), "asking for the version"))
            stream = self.check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking), "making a stream")
        except (EdgekitError, RuntimeError) as error:  # cuda-python's own, where it finds no library
            raise PluginError(
                f"CUDA device {device} cannot be used ({error}); is this a machine with an NVIDIA GPU and its driver?"
            ) from error
        self.name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        self.capability = f"{facts.major}.{facts.minor}"
        self.version = f"{number // 1000}.{number % 1000 // 10}"
        self._stream = stream
        self.stream = int(stream)

    def check(self, result: tuple[Any, ...], doing: str) -> Any:
        """What a call of cuda-python gave, without its error code.

        Raises:
            OutOfDeviceMemoryError: there is not enough memory.
            EdgekitError: any other error.
        """
        code, *values = result
        errors = self.cudart.cudaError_t
        if code != errors.cudaSuccess:
            kind = OutOfDeviceMemoryError if code == errors.cudaErrorMemoryAllocation else EdgekitError
            raise kind(f"{doing}: CUDA says {getattr(code, 'name', code)}")
        return values[0] if len(values) == 1 else tuple(values)

    def allocate(self, size_bytes: int, *, what: str, owner: object) -> int:
        """Device memory, aligned to 256 bytes and filled with zeros, given back when its owner is no more.

        Args:
            size_bytes: at least one byte is taken.
            what: it is for, for messages.
            owner: a weak reference is kept.

        Raises:
            OutOfDeviceMemoryError: there is not enough; the message says how much there is.
        """
        size_bytes = max(1, size_bytes)
        try:
            address = int(self.check(self.cudart.cudaMalloc(size_bytes), what))
        except OutOfDeviceMemoryError as error:
            raise OutOfDeviceMemoryError(
                f"{what} needs {size_bytes:,} bytes of device memory, and {self.free_bytes():,} are free: "
                "use smaller batches, or build for fewer rows (max_batch)"
            ) from error
        self._hold(owner, partial(self.cudart.cudaFree, address))
        self.check(self.cudart.cudaMemsetAsync(address, 0, size_bytes, self._stream), what)
        return address

    def pinned(self, size_bytes: int, *, what: str) -> NDArray[np.uint8]:
        """Host memory that the device copies from and to without a detour, for as long as any view of it lives."""
        address = int(self.check(self.cudart.cudaMallocHost(max(1, size_bytes)), what))
        block = (ctypes.c_uint8 * size_bytes).from_address(address)
        weakref.finalize(block, self.cudart.cudaFreeHost, address).atexit = False
        return np.ctypeslib.as_array(block)

    def free_bytes(self) -> int:
        """Device memory that nobody uses."""
        return int(self.check(self.cudart.cudaMemGetInfo(), "asking for free memory")[0])

    def to_device(self, target: int, source: int, size_bytes: int, *, what: str) -> None:
        """Queue a copy from the host."""
        self.queued += 1
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.check(self.cudart.cudaMemcpyAsync(target, source, size_bytes, kind, self._stream), what)

    def to_host(self, target: int, source: int, size_bytes: int, *, what: str) -> None:
        """Queue a copy to the host."""
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.check(self.cudart.cudaMemcpyAsync(target, source, size_bytes, kind, self._stream), what)

    def on_device(self, target: int, source: int, size_bytes: int, *, what: str) -> None:
        """Queue a copy that stays on the device."""
        self.queued += 1
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.check(self.cudart.cudaMemcpyAsync(target, source, size_bytes, kind, self._stream), what)

    def wait(self, doing: str) -> None:
        """Wait until all that is queued is done."""
        self.check(self.cudart.cudaStreamSynchronize(self._stream), doing)
        self.waits += 1

    def mark(self) -> Mark:
        """A moment in the stream."""
        return Mark(self)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """What ``enqueue`` queues, as a graph that is started as one; nothing is run.

        Raises:
            EdgekitError: something in it cannot be captured; the stream is as before.
        """
        mode = self.cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.check(self.cudart.cudaStreamBeginCapture(self._stream, mode), "beginning a CUDA graph")
        failed: BaseException | None = None
        try:
            enqueue()
        except BaseException as error:
            failed = error
        ended = self.cudart.cudaStreamEndCapture(self._stream)  # leaves the mode, whatever happened in it
        if failed is not None and ended[0] == self.cudart.cudaError_t.cudaSuccess:
            self.cudart.cudaGraphDestroy(ended[1])
        try:
            if failed is not None:
                raise failed
            return Graph(self, self.check(ended, "ending a CUDA graph"))
        except BaseException:
            self.cudart.cudaGetLastError()  # which the next call would find otherwise
            raise

    def launch(self, graph: Any, doing: str) -> None:
        """Queue a graph."""
        self.queued += 1
        self.check(self.cudart.cudaGraphLaunch(graph, self._stream), doing)

    def _hold(self, owner: object, give_back: Callable[[], object]) -> None:
        number = next(self._numbers)
        self._held[number] = give_back
        weakref.finalize(owner, _let_go, self._held, number).atexit = False

    def close(self) -> None:
        """Give back the stream and all memory, also what still has an owner, which must not be used any more."""
        if self._stream is None:
            return
        self.cudart.cudaStreamSynchronize(self._stream)
        while self._held:
            self._held.popitem()[1]()
        self.cudart.cudaStreamDestroy(self._stream)
        self._stream = None


def _let_go(held: dict[int, Callable[[], object]], number: int) -> None:
    give_back = held.pop(number, None)
    if give_back is not None:
        give_back()


class Mark:
    """A moment in a stream: a CUDA event."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.event = cuda.check(cuda.cudart.cudaEventCreate(), "making an event")
        cuda._hold(self, partial(cuda.cudart.cudaEventDestroy, self.event))
        cuda.check(cuda.cudart.cudaEventRecord(self.event, cuda._stream), "recording an event")

    def ns_until(self, end: Mark) -> int:
        """Nanoseconds of the device's clock, which counts in about half a microsecond; both moments have passed."""
        cudart = self._cuda.cudart
        elapsed_ms = float(self._cuda.check(cudart.cudaEventElapsedTime(self.event, end.event), "reading events"))
        return round(elapsed_ms * 1e6)


class Graph:
    """Captured work, ready to be started again and again.

    Args:
        cuda: whose stream it was captured from.
        captured: the graph's handle, which is given back.
    """

    def __init__(self, cuda: Cuda, captured: Any) -> None:
        try:
            self._handle = cuda.check(cuda.cudart.cudaGraphInstantiate(captured, 0), "making a CUDA graph")
        finally:
            cuda.cudart.cudaGraphDestroy(captured)
        cuda._hold(self, partial(cuda.cudart.cudaGraphExecDestroy, self._handle))
        self._cuda = cuda

    def launch(self, doing: str) -> None:
        """Queue it."""
        self._cuda.launch(self._handle, doing)


class DeviceBuffer:
    """One tensor in device memory, up to a number of rows. Only what is written or read passes through the host.

    Args:
        cuda: the device.
        spec: the tensor.
        rows: rows to make room for; a tensor that is not batched has its own size.
    """

    shared = False

    def __init__(self, cuda: Cuda, spec: TensorSpec, rows: int) -> None:
        self.spec = spec
        self.rows = rows
        self._cuda = cuda
        self._shape = spec.concrete(rows)
        self._what = f"tensor '{spec.name}' ({rows} rows of {spec.row_bytes:,} bytes)"
        self.row_bytes = spec.row_bytes
        self.size_bytes = spec.row_bytes * (rows if spec.batched else 1)
        self.address = cuda.allocate(self.size_bytes, what=self._what, owner=self)
        self._host: NDArray[Any] | None = None
        self._host_address = 0
        self._written_at = -1
        self._read: tuple[int, int] | None = None

    def write(self, array: NDArray[Any]) -> None:
        """Copy an array in, from row 0; it may be changed as soon as this returns."""
        host = self._mirror()
        if self._written_at == self._cuda.waits:  # what was written before may not have been copied yet
            self._cuda.wait(self._what)
        rows = len(array) if self.spec.batched else 1
        self._part(host, rows)[...] = array
        self._cuda.to_device(self.address, self._host_address, self._bytes(rows), what=self._what)
        self._written_at = self._cuda.waits

    def read(self, rows: int) -> NDArray[Any]:
        """The first ``rows`` rows on the host: a view that the next read or write overwrites.

        They are copied when something was queued since the last read, and that crossing is not made twice.
        """
        host = self._mirror()
        if self._read == (self._cuda.queued, rows):
            return self._part(host, rows)
        self._cuda.to_host(self._host_address, self.address, self._bytes(rows), what=self._what)
        self._cuda.wait(self._what)
        self._read = (self._cuda.queued, rows)
        return self._part(host, rows)

    def copy(self, source: Buffer, rows: NDArray[np.intp], places: NDArray[np.intp]) -> None:
        """Copy rows of another buffer of this device, or of this one, to places here, on the device."""
        assert isinstance(source, DeviceBuffer)
        for row, place, length in _stretches(rows.tolist(), places.tolist()):
            self._cuda.on_device(
                self.address + place * self.row_bytes,
                source.address + row * self.row_bytes,
                length * self.row_bytes,
                what=self._what,
            )

    def _mirror(self) -> NDArray[Any]:
        """Host memory of the same size, made when it is first needed: features of inner stages never need any."""
        if self._host is None:
            raw = self._cuda.pinned(self.size_bytes, what=self._what)
            self._host_address = raw.ctypes.data
            self._host = raw.view(self.spec.dtype).reshape(self._shape)
        return self._host

    def _part(self, host: NDArray[Any], rows: int) -> NDArray[Any]:
        return host[:rows] if self.spec.batched else host

    def _bytes(self, rows: int) -> int:
        return rows * self.row_bytes if self.spec.batched else self.size_bytes


def _stretches(rows: list[int], places: list[int]) -> list[tuple[int, int, int]]:
    """Rows that lie together and go together, as (first row, first place, how many)."""
    found: list[tuple[int, int, int]] = []
    for row, place in zip(rows, places, strict=True):
        if found:
            first, to, length = found[-1]
            if (row, place) == (first + length, to + length):
                found[-1] = (first, to, length + 1)
                continue
        found.append((row, place, 1))
    return found
