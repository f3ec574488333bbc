"""One graph of an open LiteRT file: its tensors, and what copies rows in, runs it and copies rows out.

LiteRT's Python interpreter runs the first graph of a file, or any by copies of all that goes in and out. So its inner
object is used, which the class wraps since there has been one, and which takes the number of a graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BundleError
from edgekit.plan import Stage

__all__ = ["Graph", "OpenFile"]


class OpenFile:
    """A file's interpreter, and what its graphs share with it.

    Args:
        interpreter: just made.

    Attributes:
        interpreter: of the file.
        inner: what it wraps.
        signatures: of the file.
        lock: held by whoever runs a graph: graphs have their memory to themselves, but sessions share graphs.
    """

    def __init__(self, interpreter: Any) -> None:
        interpreter.allocate_tensors()  # tflite-runtime hands graphs to XNNPACK here and nowhere else
        self.interpreter = interpreter
        self.inner = interpreter._interpreter
        self.signatures = list(interpreter.get_signature_list())
        self.lock = Lock()

    def give_memory(self, signature: str) -> None:
        """Allocate the tensors of a signature's graph; where they are already, they stay where they are."""
        with self.lock:
            self.inner.AllocateTensors(self.place(signature))

    def place(self, signature: str) -> int:
        """The number of a signature's graph."""
        return int(self.inner.GetSubgraphIndexFromSignature(signature))


def _bytes(array: NDArray[Any]) -> memoryview:
    return (array if array.ndim else array.reshape(1)).data.cast("B")


class Graph:
    """A graph that has its memory.

    Args:
        file: open.
        signature: of the graph.
        stage: that it must be of.
        path: for errors.
        outputs: that it must compute.
        rows: that it takes at once.

    Raises:
        BundleError: its inputs and outputs are not the stage's.
    """

    def __init__(
        self, file: OpenFile, signature: str, stage: Stage, path: Path, *, outputs: Sequence[str], rows: int
    ) -> None:
        self.rows = rows
        self._file = file
        self._place = file.place(signature)
        self._stage = stage
        self._path = path
        runner = file.interpreter.get_signature_runner(signature)
        given, made = runner.get_input_details(), runner.get_output_details()
        del runner  # which the interpreter would take for somebody who looks at its memory
        if set(given) != {f"args_{place}" for place in range(len(stage.inputs))}:
            raise self._wrong(f"it takes {len(given)} inputs, the plan says {len(stage.inputs)}")
        differing = sorted(set(outputs) ^ set(made))
        if differing:
            side = "plan but not the file" if differing[0] in outputs else "file but not the plan"
            raise self._wrong(f"output '{differing[0]}' is in the {side}")
        details = {name: given[f"args_{place}"] for place, name in enumerate(stage.inputs)} | made
        self._tensors = {name: self._memory(name, found["index"]) for name, found in details.items()}

    def bind(self, memory: Mapping[str, NDArray[Any]], *, batched: Collection[str], rows: range) -> Callable[[], None]:
        """What runs the graph on rows of arrays, as many at a time as it takes.

        Args:
            memory: of each input, and of each output asked for, as it lies between stages.
            batched: names of the tensors that have rows.
            rows: at least one, in steps of :attr:`rows`, the last one whole.

        Raises:
            BundleError: a tensor has another dtype or shape in the file.
        """
        for name, array in memory.items():
            self._check(name, array[: self.rows] if name in batched else array)
        into = [(self._tensors[name], memory[name], name in batched) for name in memory if name in self._stage.inputs]
        out = [(memory[name], self._tensors[name]) for name in memory if name not in self._stage.inputs]
        invoke, lock = partial(self._file.inner.Invoke, self._place), self._file.lock
        if len(rows) == 1:
            # As bytes: of small arrays, most of an assignment's time is finding out what they are.
            part = slice(rows[0], rows[0] + self.rows)
            given = [(_bytes(place), _bytes(array[part] if has_rows else array)) for place, array, has_rows in into]
            made = [(_bytes(array[part]), _bytes(place)) for array, place in out]

            def run() -> None:
                with lock:
                    for place, array in given:
                        place[:] = array
                    invoke()
                    for array, place in made:
                        array[:] = place

            return run

        fixed = [(place, array) for place, array, has_rows in into if not has_rows]
        moving = [(place, array) for place, array, has_rows in into if has_rows]

        def run_in_turn() -> None:
            with lock:
                for place, array in fixed:
                    place[...] = array
                for row in rows:
                    part = slice(row, row + self.rows)
                    for place, array in moving:
                        place[...] = array[part]
                    invoke()
                    for array, place in out:
                        array[part] = place

        return run_in_turn

    def _check(self, name: str, array: NDArray[Any]) -> None:
        """Compare rows of a tensor with what the file takes or makes; a single number is ``(1,)`` there."""
        place = self._tensors[name]
        if place.dtype != array.dtype or place.shape != (array.shape or (1,)):
            raise BundleError(
                f"{self._path}: stage '{self._stage.name}': tensor '{name}' is {place.dtype} {place.shape} in the "
                f"file, {array.dtype} {array.shape} in the plan, images channel-last; export again"
            )

    def _memory(self, name: str, index: int) -> NDArray[Any]:
        """A tensor's memory. What the interpreter itself gives must not be held while it runs: it counts references.

        Nothing is resized here, so the memory stays where it is for as long as the interpreter lives.
        """
        try:
            view = self._file.inner.tensor(self._file.inner, index, self._place)
            raw = (ctypes.c_char * view.nbytes).from_address(view.ctypes.data)
        except (ValueError, AttributeError) as error:
            raise self._wrong(f"tensor '{name}' has no fixed size") from error
        return np.frombuffer(raw, dtype=view.dtype).reshape(view.shape)

    def _wrong(self, what: str) -> BundleError:
        return BundleError(f"{self._path}: is not stage '{self._stage.name}' ({what}); export again")
