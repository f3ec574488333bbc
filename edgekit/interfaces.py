"""The contracts between the core and what can be plugged in. If you find yourself changing these, pause.

Four roles: a **target** writes one stage for one kind of device; a **runtime** opens what a target wrote and owns
memory; a **stage runner** is one open stage; a **meter** reads energy. Built-in ones register through the same entry
points as a plugin (see :mod:`edgekit.plugins`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from edgekit.measured import MeterFacts, OperatorTime
from edgekit.plan import Stage
from edgekit.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Batching",
    "Buffer",
    "DeviceClock",
    "Joining",
    "Meter",
    "NodePlacement",
    "OperatorTimer",
    "Reading",
    "Runtime",
    "StageRunner",
    "Target",
]


class Target(Protocol):
    """Writes one stage for one kind of device. Made without arguments, or with options that it names."""

    name: str
    """What ``export(targets=...)`` calls it, and the folder of its artifacts."""
    suffix: str
    """Of an artifact's file name, dot included."""
    runtime: str
    """Name of the runtime that opens its artifacts."""

    def lower(self, program: Any, stage: Stage, path: Path, *, specs: Mapping[str, TensorSpec]) -> None:
        """Write a stage to ``path``.

        Args:
            program: the stage's ``torch.export.ExportedProgram``, inputs and outputs in the stage's order.
            stage: names of its inputs and outputs, which the artifact must carry.
            path: file to write; may place weights beside it.
            specs: contract of every tensor by name.

        Raises:
            LoweringError: an operator that the target does not have; the message names it and the stage.
        """
        ...

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that write the artifact, by name."""
        ...


@runtime_checkable
class Joining(Protocol):
    """A target that keeps the stages of a network in one file, where its runtime finds each by its name."""

    def join(self, files: Sequence[Path], path: Path) -> None:
        """Write one file that holds every stage of several.

        Raises:
            LoweringError: they do not go into one.
        """
        ...

    def part(self, file: Path, stage: Stage, path: Path) -> None:
        """Write a file that holds one stage of several."""
        ...


@runtime_checkable
class Batching(Protocol):
    """A target whose artifacts take a fixed number of rows at once, besides one."""

    batch: int
    """That number; 1 where there is none."""


class Buffer(Protocol):
    """Memory for one tensor, up to a number of rows, where its runtime keeps tensors."""

    spec: TensorSpec
    rows: int
    """Rows that there is room for."""
    shared: bool
    """Whether :meth:`read` gives views of the memory itself, which show every later run."""

    def write(self, array: NDArray[Any]) -> None:
        """Copy an array in, from row 0."""
        ...

    def read(self, rows: int) -> NDArray[Any]:
        """The first ``rows`` rows on the host. May be a view that the next run overwrites."""
        ...

    def copy(self, source: Buffer, rows: NDArray[np.intp], places: NDArray[np.intp]) -> None:
        """Copy these rows of ``source``, a buffer of the same runtime and shape, to these places.

        ``source`` may be this buffer; then no place is among the rows.
        """
        ...


class StageRunner(Protocol):
    """One open stage."""

    def bind(self, buffers: Mapping[str, Buffer], *, rows: int, outputs: Sequence[str]) -> Callable[[], None]:
        """Fix where the stage reads and writes, and return what runs it.

        The returned function takes and returns nothing, reads the first ``rows`` rows of its inputs' buffers and
        writes the first ``rows`` rows of the outputs' buffers; it returns when they are written. Outputs that are
        not asked for need not be computed. It may raise anything; the session says which stage it was.
        """
        ...

    def close(self) -> None:
        """Give back what the stage holds."""
        ...


class Runtime(Protocol):
    """Opens artifacts and owns memory. Made with ``threads`` and options of its own, all keywords."""

    name: str
    target: str
    """Name of the target whose artifacts it opens; ``""`` when it opens none, and its stages come from elsewhere."""

    def open(self, stage: Stage, artifact: Path) -> StageRunner:
        """Open one stage.

        Raises:
            BundleError: the artifact is not one, or its inputs and outputs are not the stage's.
        """
        ...

    def allocate(self, spec: TensorSpec, rows: int) -> Buffer:
        """Memory for ``rows`` rows of a tensor."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, version, device and options, for provenance. ``scripted: True`` when its results are not real."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class Reading(Protocol):
    """One meter reading."""

    @property
    def time_ns(self) -> int:
        """``time.perf_counter_ns`` when the value was true; the middle of the call where reading takes long."""
        ...

    @property
    def value(self) -> float:
        """What the meter's facts say: joules since it was opened, or watts now."""
        ...


@runtime_checkable
class Meter(Protocol):
    """Reads a counter of energy or a gauge of power.

    Made with ``root``, the folder that stands for ``/``, ``clock``, nanoseconds as ``time.perf_counter_ns``, and
    options of its own, all keywords; discovers what is there when asked, never before. Whoever measures decides how
    often to read; a meter has no thread of its own unless its hardware streams.
    """

    name: str

    def unavailable(self) -> str | None:
        """Why it cannot measure here, with the command that would fix it; ``None`` when it can."""
        ...

    def facts(self) -> MeterFacts:
        """What it measures here. Only of a meter that is not unavailable."""
        ...

    def open(self) -> None:
        """Start; energy counts from here.

        Raises:
            MeasurementError: it cannot measure here.
        """
        ...

    def read(self) -> Reading:
        """Now.

        Raises:
            MeasurementError: it is not open, the sensor is gone, or what it says cannot be true.
        """
        ...

    def close(self) -> None:
        """Stop. Closing what is closed does nothing."""
        ...


@runtime_checkable
class OperatorTimer(Protocol):
    """A runtime that can tell the time of every operator, by a profiler of its own."""

    def timing_operators(self) -> Runtime:
        """A runtime with the same options whose stages record their operators; slower, so never for other figures."""
        ...

    def operator_times(self) -> tuple[OperatorTime, ...]:
        """What was recorded since, stage by stage; ends the recording."""
        ...


@runtime_checkable
class NodePlacement(Protocol):
    """A runtime whose device may refuse nodes, which then run elsewhere."""

    def nodes_elsewhere(self) -> Mapping[str, tuple[str, ...]] | None:
        """Nodes that do not run where they were asked to, by stage; ``None`` when that cannot be told."""
        ...


@runtime_checkable
class DeviceClock(Protocol):
    """A runtime whose device has a clock of its own, as a GPU has."""

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        ...

    def device_mark(self) -> Any:
        """Record a moment in the device's queue."""
        ...

    def device_ns(self, begin: Any, end: Any) -> int:
        """Nanoseconds of the device between two marks, both passed."""
        ...
