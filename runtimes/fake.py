"""A scripted runtime: a function stands for the stages. For tests, and to try plans that nothing was exported for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError
from edgekit.interfaces import Buffer
from edgekit.plan import Stage
from edgekit.runtimes.host import HostBuffer
from edgekit.tensors import TensorSpec

__all__ = ["FakeDevice", "FakeRuntime", "Handler"]

Handler = Callable[[str, Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]
"""Given a stage's name and its inputs' rows by name, its outputs' rows by name (those asked for at least)."""


class FakeRuntime:
    """Calls ``handler`` where another runtime would compute; opens no artifacts.

    Args:
        handler: what stands for the stages.
        threads: only told again by :meth:`describe`.

    Attributes:
        calls: how often each stage ran, by name.
        rows: on how many rows in all, by stage.
        asked: outputs that the latest binding of a stage asked for.
    """

    name = "fake"
    target = ""

    def __init__(self, handler: Handler, *, threads: int = 1) -> None:
        self.handler = handler
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.asked: dict[str, tuple[str, ...]] = {}
        self._threads = threads

    def open(self, stage: Stage, artifact: Path) -> FakeRunner:
        """A runner for any stage; the artifact is not looked at."""
        return FakeRunner(self, stage)

    def allocate(self, spec: TensorSpec, rows: int) -> HostBuffer:
        """Host memory."""
        return HostBuffer(spec, rows)

    def describe(self) -> dict[str, Any]:
        """Says that it is scripted."""
        return {"name": self.name, "version": "", "threads": self._threads, "scripted": True}

    def close(self) -> None:
        """Holds nothing."""


class FakeDevice(FakeRuntime):
    """A scripted runtime that also has a scripted clock of its device; see :class:`edgekit.interfaces.DeviceClock`.

    Args:
        handler: what stands for the stages.
        device_clock: the device's nanoseconds; the handler may move them.
        threads: only told again by :meth:`describe`.

    Attributes:
        waits: how often it was synchronized.
    """

    def __init__(self, handler: Handler, *, device_clock: Callable[[], int], threads: int = 1) -> None:
        super().__init__(handler, threads=threads)
        self.waits = 0
        self._device_clock = device_clock

    def synchronize(self) -> None:
        """Counts: what is scripted is done at once."""
        self.waits += 1

    def device_mark(self) -> int:
        """The device's clock now."""
        return self._device_clock()

    def device_ns(self, begin: int, end: int) -> int:
        """Nanoseconds between two marks."""
        return end - begin


class FakeRunner:
    """One stage of a :class:`FakeRuntime`."""

    def __init__(self, runtime: FakeRuntime, stage: Stage) -> None:
        self._runtime = runtime
        self._stage = stage

    def bind(self, buffers: Mapping[str, Buffer], *, rows: int, outputs: Sequence[str]) -> Callable[[], None]:
        """See :meth:`edgekit.interfaces.StageRunner.bind`; what the handler returns is checked at every run."""
        runtime, stage = self._runtime, self._stage
        runtime.asked[stage.name] = tuple(outputs)

        def run() -> None:
            runtime.calls[stage.name] += 1
            runtime.rows[stage.name] += rows
            made = runtime.handler(stage.name, {name: buffers[name].read(rows) for name in stage.inputs})
            for name in outputs:
                if name not in made:
                    raise InputError(f"stage '{stage.name}': the handler returned no '{name}'")
                spec, array = buffers[name].spec, np.asarray(made[name])
                if array.shape != spec.concrete(rows) or array.dtype != np.dtype(spec.dtype):
                    raise InputError(
                        f"stage '{stage.name}': the handler returned '{name}' as {array.dtype} {array.shape}, "
                        f"the plan says {spec.dtype} {spec.concrete(rows)}"
                    )
                buffers[name].write(array)

        return run

    def close(self) -> None:
        """Holds nothing."""
