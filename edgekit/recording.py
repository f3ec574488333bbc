"""A runtime that shows what every stage was given and what it made, whatever runtime computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgekit.interfaces import Buffer, Runtime, StageRunner
from edgekit.plan import Stage
from edgekit.tensors import TensorSpec

__all__ = ["Keep", "Recording"]

Keep = Callable[[Stage, dict[str, NDArray[Any]]], None]
"""Given a stage, and the tensors of one run of it by their names in the stage: all inputs, and the outputs asked for.

Arrays are its own to keep: ``(rows, ...)`` with as many rows as the run had; tensors that are not batched are whole. A
stage that several runs share comes as often, under the names of its own inputs and outputs.
"""


class Recording:
    """Computes with another runtime and hands every run of a stage to ``keep``, after it.

    Outputs that nothing asked for are not computed, and so not shown.

    Args:
        runtime: what computes; it stays open when this one closes.
        keep: told of every run; what it raises stops the run.
    """

    def __init__(self, runtime: Runtime, keep: Keep) -> None:
        self.name = runtime.name
        self.target = runtime.target
        self._runtime = runtime
        self._keep = keep

    def open(self, stage: Stage, artifact: Path) -> RecordingRunner:
        """The runtime's runner of the stage, and its errors."""
        return RecordingRunner(self._runtime.open(stage, artifact), stage, self._keep)

    def allocate(self, spec: TensorSpec, rows: int) -> Buffer:
        """The runtime's memory."""
        return self._runtime.allocate(spec, rows)

    def describe(self) -> dict[str, Any]:
        """What the runtime says of itself."""
        return self._runtime.describe()

    def close(self) -> None:
        """Holds nothing of its own."""


class RecordingRunner:
    """One stage of a :class:`Recording`."""

    def __init__(self, runner: StageRunner, stage: Stage, keep: Keep) -> None:
        self._runner = runner
        self._stage = stage
        self._keep = keep

    def bind(self, buffers: Mapping[str, Buffer], *, rows: int, outputs: Sequence[str]) -> Callable[[], None]:
        """See :meth:`edgekit.interfaces.StageRunner.bind`."""
        inner = self._runner.bind(buffers, rows=rows, outputs=outputs)
        stage, keep = self._stage, self._keep
        shown = {name: buffers[name] for name in (*stage.inputs, *outputs)}

        def run() -> None:
            inner()
            # No output lies where an input does, so both can be read now. A read may be a view of shared memory.
            keep(stage, {name: buffer.read(rows).copy() for name, buffer in shown.items()})

        return run

    def close(self) -> None:
        """Close the stage."""
        self._runner.close()
