"""A CUDA runtime in plain memory, as cuda-python shows it. Work is queued and done only when somebody waits for it.

So a result that is read too early, memory that is given back too early, and a copy beyond its tensor are found.
"""

from __future__ import annotations

import ctypes
import enum
from types import SimpleNamespace

ALIGNMENT = 256


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureInvalidated = 901


class Kind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class Mode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


class Stream:
    """A queue of what is to be done."""

    def __init__(self, number):
        self.number = number
        self.queue = []
        self.captured = None

    def __int__(self):
        return self.number

    def add(self, work):
        (self.queue if self.captured is None else self.captured).append(work)


class Block:
    """Memory that was given out."""

    def __init__(self, size):
        self.raw = (ctypes.c_uint8 * (size + ALIGNMENT)).from_buffer(bytearray(b"\xaa" * (size + ALIGNMENT)))
        start = ctypes.addressof(self.raw)
        self.address = start + -start % ALIGNMENT
        self.size = size


class FakeCuda:
    """Stands for the module ``cuda.bindings.runtime``.

    Attributes:
        capacity: bytes of device memory.
        copies: every copy that was done, as (kind, bytes).
        calls: names of all calls, in order.
        fails: error by name of the call that gives it.
        clock_ns: of the device; kernels move it.
    """

    cudaError_t = Error
    cudaMemcpyKind = Kind
    cudaStreamCaptureMode = Mode
    cudaStreamNonBlocking = 1

    def __init__(self, *, name="Fake GPU", capability=(8, 7), capacity=1 << 30, version=12060):
        self.capacity = capacity
        self.facts = SimpleNamespace(name=name.encode(), major=capability[0], minor=capability[1])
        self.version = version
        self.device = {}
        self.host = {}
        self.streams = {}
        self.copies = []
        self.calls = []
        self.fails = {}
        self.clock_ns = 0
        self.graphs = 0

    def __getattribute__(self, name):
        found = object.__getattribute__(self, name)
        if name.startswith("cuda") and callable(found) and not isinstance(found, type):
            calls, fails = object.__getattribute__(self, "calls"), object.__getattribute__(self, "fails")

            def call(*arguments):
                calls.append(name)
                result = found(*arguments)
                return (fails[name], *[None] * (len(result) - 1)) if name in fails else result

            return call
        return found

    def used(self):
        return sum(block.size for block in self.device.values())

    def _give(self, blocks, size):
        block = Block(size)
        blocks[block.address] = block
        return Error.cudaSuccess, block.address

    def inside(self, blocks, address, size):
        """Raise when a stretch of memory is not wholly inside something that is given out."""
        for block in blocks.values():
            if block.address <= address and address + size <= block.address + block.size:
                return
        raise AssertionError(f"{size} bytes at {address:#x} are outside all that was given out")

    def cudaSetDevice(self, device):
        return (Error.cudaSuccess if device == 0 else Error.cudaErrorNoDevice,)

    def cudaGetDeviceProperties(self, device):
        return Error.cudaSuccess, self.facts

    def cudaRuntimeGetVersion(self):
        return Error.cudaSuccess, self.version

    def cudaMemGetInfo(self):
        return Error.cudaSuccess, self.capacity - self.used(), self.capacity

    def cudaMalloc(self, size):
        if self.used() + size > self.capacity:
            return Error.cudaErrorMemoryAllocation, None
        return self._give(self.device, size)

    def cudaFree(self, address):
        for stream in self.streams.values():  # as the real one does, it waits for what is queued
            self.cudaStreamSynchronize(stream)
        del self.device[address]
        return (Error.cudaSuccess,)

    def cudaMallocHost(self, size):
        return self._give(self.host, size)

    def cudaFreeHost(self, address):
        del self.host[address]
        return (Error.cudaSuccess,)

    def cudaMemsetAsync(self, address, value, size, stream):
        def work():
            self.inside(self.device, address, size)
            ctypes.memset(address, value, size)

        stream.add(work)
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        to = self.host if kind == Kind.cudaMemcpyDeviceToHost else self.device
        of = self.host if kind == Kind.cudaMemcpyHostToDevice else self.device

        def work():
            self.inside(to, target, size)
            self.inside(of, source, size)
            assert target >= source + size or source >= target + size, "a copy onto itself"
            ctypes.memmove(target, source, size)
            self.copies.append((kind, size))

        stream.add(work)
        return (Error.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking
        stream = Stream(1000 + len(self.streams))
        self.streams[stream.number] = stream
        return Error.cudaSuccess, stream

    def cudaStreamDestroy(self, stream):
        del self.streams[stream.number]
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        assert stream.captured is None, "waited for while it was captured"
        queue, stream.queue = stream.queue, []
        for work in queue:
            work()
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert mode == Mode.cudaStreamCaptureModeThreadLocal
        stream.captured = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        captured, stream.captured = stream.captured, None
        self.graphs += "cudaStreamEndCapture" not in self.fails
        return Error.cudaSuccess, captured

    def cudaGetLastError(self):
        return (Error.cudaSuccess,)

    def cudaGraphInstantiate(self, graph, flags):
        assert flags == 0
        return Error.cudaSuccess, list(graph)

    def cudaGraphDestroy(self, graph):
        self.graphs -= 1
        graph.clear()
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, graph, stream):
        assert graph, "an empty graph, or one that was given back"
        for work in graph:
            stream.add(work)
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph):
        graph.clear()
        return (Error.cudaSuccess,)

    def cudaEventCreate(self):
        return Error.cudaSuccess, SimpleNamespace(at_ns=None)

    def cudaEventDestroy(self, event):
        return (Error.cudaSuccess,)

    def cudaEventRecord(self, event, stream):
        def work():
            event.at_ns = self.clock_ns

        stream.add(work)
        return (Error.cudaSuccess,)

    def cudaEventElapsedTime(self, begin, end):
        if begin.at_ns is None or end.at_ns is None:
            return Error.cudaErrorInvalidValue, None
        return Error.cudaSuccess, (end.at_ns - begin.at_ns) / 1e6
