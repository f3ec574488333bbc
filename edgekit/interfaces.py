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

from edgekit.plan import Stage
from edgekit.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Buffer", "Meter", "Reading", "Runtime", "StageRunner", "Target"]


class Target(Protocol):
    """Writes one stage for one kind of device. Made without arguments."""

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
        """``time.perf_counter_ns`` at the reading."""
        ...

    @property
    def energy_j(self) -> float:
        """Energy since the meter was opened."""
        ...


@runtime_checkable
class Meter(Protocol):
    """Reads cumulative energy. Made with ``root``, the folder that stands for ``/``, and options of its own."""

    name: str
    quantity: str
    """``"counter"`` for a hardware counter, ``"integrated"`` for sampled power, ``"replay"`` for a recording."""
    scope: str
    """What the figure covers: socket, module, board, wall."""

    def unavailable(self) -> str | None:
        """Why it cannot measure here, with what would fix it; ``None`` when it can."""
        ...

    def open(self) -> None:
        """Start; energy counts from here."""
        ...

    def read(self) -> Reading:
        """Energy since :meth:`open`."""
        ...

    def close(self) -> None:
        """Stop."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, quantity, unit, scope, resolution and update interval; ``replay: True`` when it is a recording."""
        ...
