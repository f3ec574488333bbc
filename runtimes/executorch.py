"""ExecuTorch, PyTorch's own runtime for devices. Feature maps lie channel-last between stages, as XNNPACK wants them.

A file takes one sample: a batch runs row by row, so a row's answer never depends on its batch. A stage in which samples
need one another takes a batch at once, of as many rows as its file says.

ExecuTorch's Python library takes and gives torch tensors, so a device needs torch beside it. They look into the memory
of the buffers: nothing is copied on the way in, and each output once on the way out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BundleError, InputError, MeasurementError, PluginError
from edgekit.interfaces import Buffer
from edgekit.measured import OperatorTime
from edgekit.plan import SCORES, Stage
from edgekit.runtimes.executorch_library import (
    first_line,
    hold_threads,
    listening,
    load_library,
    recorded_operators,
    set_threads,
)
from edgekit.runtimes.host import ChannelsLastBuffer, HostBuffer
from edgekit.runtimes.operators import operator_times
from edgekit.tensors import TensorSpec

__all__ = ["ExecuTorchRuntime"]

DTYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
    27: "uint16",
    28: "uint32",
    29: "uint64",
}
"""Numpy's dtypes by ExecuTorch's numbers for them (its ``ScalarType``)."""

IMAGE_CHANNELS = 4
"""Tensors of four dimensions with no more channels lie channel-first; :mod:`edgekit.exporters.to_executorch` says why,
and has the same number."""


class ExecuTorchRuntime:
    """Opens ``executorch`` artifacts, which XNNPACK computes.

    ExecuTorch has one pool of threads for the process, and what has been loaded holds it: to replace it then is a
    crash. It is set when a stage is bound and none is open, and not put back. So stages of two runtimes with different
    ``threads`` cannot be open at a time; and whoever loads ExecuTorch programs past edgekit must do it after edgekit
    has set the pool, or with the same number of threads.

    Args:
        threads: that compute inside an operator, for the process.

    Raises:
        MissingExtraError: executorch, or torch, is not installed.
        PluginError: one is installed and does not load, or there cannot be so many threads.
    """

    name = "executorch"
    target = "executorch"

    def __init__(self, *, threads: int = 1) -> None:
        if threads < 1:
            raise PluginError(f"runtime 'executorch': threads cannot be {threads}; give 1 or more")
        self._threads = threads
        self.torch, self.library = load_library()
        self._recorded: list[tuple[str, str, Any]] | None = None

    def open(self, stage: Stage, artifact: Path) -> ExecuTorchRunner:
        """One stage; each of its methods is loaded when its outputs are first bound.

        Raises:
            BundleError: ExecuTorch does not take the file, or its inputs and outputs are not the stage's.
        """
        return ExecuTorchRunner(self, stage, artifact)

    def allocate(self, spec: TensorSpec, rows: int) -> HostBuffer | ChannelsLastBuffer:
        """Host memory; feature maps lie there channel-last."""
        return ChannelsLastBuffer(spec, rows) if _is_map(spec.shape) else HostBuffer(spec, rows)

    def load(self, stage: Stage, file: Path) -> Any:
        """An ExecuTorch program of a file.

        Raises:
            BundleError: ExecuTorch does not take it.
        """
        try:
            with listening() as said:
                return self.library._load_program(
                    str(file),
                    enable_etdump=self._recorded is not None,
                    program_verification=self.library.Verification.InternalConsistency,
                )
        except Exception as error:  # RuntimeError, by pybind11
            raise _does_not_open(stage, file, error, said) from error

    def load_method(self, name: str, program: Any, stage: Stage, file: Path) -> Any:
        """A method of a stage's program, or, where operators are recorded, of a program of its own.

        Raises:
            BundleError: ExecuTorch does not take it.
            PluginError: stages are open that hold another number of threads.
        """
        set_threads(self.library, self._threads)
        if self._recorded is not None:  # a recording does not tell methods apart
            program = self.load(stage, file)
            self._recorded.append((stage.name, name, program))
        try:
            with listening() as said:
                return program.load_method(name)
        except Exception as error:
            raise _does_not_open(stage, file, error, said) from error

    def describe(self) -> dict[str, Any]:
        """Name, version, device, kernels and threads."""
        return {
            "name": self.name,
            "version": version("executorch"),
            "device": "cpu",
            "backend": "XNNPACK",
            "threads": self._threads,
        }

    def timing_operators(self) -> ExecuTorchRuntime:
        """A runtime with the same options in whose stages ExecuTorch's tracer is on.

        XNNPACK's operators are timed in whole microseconds. What is recorded grows with every run, in memory.
        """
        made = ExecuTorchRuntime(threads=self._threads)
        made._recorded = []
        return made

    def operator_times(self) -> tuple[OperatorTime, ...]:
        """Every operator that ran since :meth:`timing_operators`, the first few calls left out; ends the recording.

        Named after the method, the number of the instruction in it, and what XNNPACK or the kernel calls itself.

        Raises:
            MeasurementError: this runtime does not record, or a recording cannot be read.
        """
        if self._recorded is None:
            raise MeasurementError("runtime 'executorch' records no operators; use what its timing_operators() gives")
        calls: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
        while self._recorded:
            stage, method, program = self._recorded.pop(0)
            for place, kind, seconds in recorded_operators(self.library, program):
                calls[stage, f"{method} {place}", kind].append(seconds)
        return operator_times(calls)

    def close(self) -> None:
        """Nothing to give back: stages hold their own memory, and the pool of threads stays as it is."""


class _Names(msgspec.Struct):
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


class _Tensors(msgspec.Struct):
    """What the method ``tensors`` of a file says: see :mod:`edgekit.exporters.to_executorch`."""

    rows: int
    methods: dict[str, _Names]
    channels_last: tuple[str, ...]


class ExecuTorchRunner:
    """One stage: a program, and those of its methods that have been bound."""

    def __init__(self, runtime: ExecuTorchRuntime, stage: Stage, file: Path) -> None:
        self._runtime = runtime
        self._stage = stage
        self._file = file
        self._program: Any = runtime.load(stage, file)
        self._methods: dict[str, _Method] = {}
        self._tensors = self._read_tensors()
        self._require_names()

    def bind(self, buffers: Mapping[str, Buffer], *, rows: int, outputs: Sequence[str]) -> Callable[[], None]:
        """See :meth:`edgekit.interfaces.StageRunner.bind`.

        Raises:
            BundleError: ExecuTorch does not take the file, or its tensors are not the plan's.
            PluginError: stages are open that hold another number of threads.
            InputError: more rows than a stage in which samples need one another takes.
        """
        most = self._tensors.rows
        if rows > most > 1:
            raise InputError(
                f"stage '{self._stage.name}' takes {most} samples at once in ExecuTorch, not {rows}: "
                "run smaller batches"
            )
        asked = self._methods_for(outputs)
        logits = self._stage.head[:1]
        if logits and len(asked) > 1 and logits[0] not in buffers:
            buffers = {**buffers, logits[0]: self._place_for_logits()}
        methods = [(self._method(name), names) for name, names in asked.items()]
        for method, names in methods:
            method.require_alike(buffers, names, rows=most)
        if rows == 1 or most > 1:
            return _in_turn([method.bind(buffers, slice(0, rows), names) for method, names in methods])

        def run() -> None:
            # Bound anew each time: a few microseconds beside a stage, where keeping all would hold rows² bindings.
            for row in range(rows):
                for method, names in methods:
                    method.bind(buffers, slice(row, row + 1), names)()

        return run

    def close(self) -> None:
        """Give back the methods; what was bound must not run any more."""
        self._methods.clear()

    def _methods_for(self, outputs: Sequence[str]) -> dict[str, list[str]]:
        """Methods that compute these outputs, in order, each with those that it computes."""
        logits, *scores = self._stage.head or ("",)
        asked = {score: [name] for score, name in zip(SCORES, scores, strict=False) if name in outputs}
        body = [name for name in outputs if name not in scores]
        if asked and logits not in body:  # scores are computed from it
            body.append(logits)
        whole = logits in body or "trunk" not in self._tensors.methods
        return {"forward" if whole else "trunk": body, **asked}

    def _method(self, name: str) -> _Method:
        if name not in self._methods:
            loaded = self._runtime.load_method(name, self._program, self._stage, self._file)
            owner = f"{self._file}: stage '{self._stage.name}'"
            self._methods[name] = _Method(loaded, self._runtime.torch, self._tensors, name, owner)
        return self._methods[name]

    def _place_for_logits(self) -> HostBuffer:
        """Memory for the logits of one row, where nobody asks for them."""
        sizes = self._program.method_meta(SCORES[0]).input_tensor_meta(0).sizes()
        return HostBuffer(TensorSpec(self._stage.head[0], "float32", tuple(sizes)), 1)

    def _read_tensors(self) -> _Tensors:
        """What the file says of itself.

        Raises:
            BundleError: nothing, so edgekit did not write it.
        """
        try:
            with listening():
                method = self._program.load_method("tensors")
            method.execute()
            return msgspec.json.decode(method.get_outputs()[0], type=_Tensors)
        except Exception as error:  # whatever a foreign file has there
            raise BundleError(
                f"{self._file}: edgekit did not write this file of stage '{self._stage.name}' ({first_line(error)}); "
                "export again"
            ) from error

    def _require_names(self) -> None:
        """Raise where methods, inputs or outputs are not the stage's, or not in its order."""
        stage = self._stage
        inputs = stage.inputs[:-1] if stage.exit else stage.inputs
        expected = {"forward": _Names(inputs, (*stage.live, *stage.head[:1]))}
        for score, name in zip(SCORES, stage.head[1:], strict=False):
            expected[score] = _Names((stage.head[0], stage.inputs[-1]), (name,))
        if stage.exit and stage.live:
            expected["trunk"] = _Names(inputs, stage.live)
        for method, names in expected.items():
            given = self._tensors.methods.get(method, _Names())
            sides = (("input", names.inputs, given.inputs), ("output", names.outputs, given.outputs))
            for kind, mine, others in sides:
                differing = sorted(set(mine) ^ set(others))
                if differing:
                    where = "plan but not the file" if differing[0] in mine else "file but not the plan"
                    raise BundleError(
                        f"{self._file}: {kind} '{differing[0]}' of stage '{stage.name}' is in the {where}; export again"
                    )
            meta = self._program.method_meta(method)
            if (meta.num_inputs(), meta.num_outputs(), names) != (len(names.inputs), len(names.outputs), given):
                raise BundleError(
                    f"{self._file}: method '{method}' of stage '{stage.name}' has its tensors in another order than "
                    "the plan, or not all of them; export again"
                )


class _Method:
    """One loaded method. Its outputs have places of their own in ExecuTorch's memory, which every run writes again."""

    def __init__(self, loaded: Any, torch: Any, tensors: _Tensors, name: str, owner: str) -> None:
        self._loaded = loaded
        self._torch = torch
        self._tensors = tensors
        self._names = tensors.methods[name]
        self._owner = owner
        self._given: object = None
        """What its inputs look at."""
        self._made: dict[str, NDArray[Any]] = {}
        hold_threads(self)

    def require_alike(self, buffers: Mapping[str, Buffer], outputs: Iterable[str], *, rows: int) -> None:
        """Raise where tensors are not the plan's, for so many rows, or ExecuTorch would not leave them where they are.

        Raises:
            BundleError: naming the first.
        """
        meta = self._loaded.method_meta()
        infos = {name: meta.input_tensor_meta(place) for place, name in enumerate(self._names.inputs)}
        made = {name: meta.output_tensor_meta(place) for place, name in enumerate(self._names.outputs)}
        for name, info in {**infos, **{name: made[name] for name in outputs}}.items():
            spec = buffers[name].spec
            dtype, sizes = DTYPES.get(info.dtype(), f"ScalarType {info.dtype()}"), tuple(info.sizes())
            if (dtype, sizes) != (spec.dtype, spec.concrete(rows)):
                raise BundleError(
                    f"{self._owner}: tensor '{name}' is {dtype} {sizes} in the file, "
                    f"{spec.dtype} {spec.concrete(rows)} in the plan; export again"
                )
            if _is_map(spec.shape) != (name in self._tensors.channels_last):
                raise BundleError(f"{self._owner}: tensor '{name}' lies otherwise in the file; export again")
            if info.is_memory_planned() != (name in made):
                raise BundleError(f"{self._owner}: the file does not plan memory for its outputs alone; export again")
        if not self._made:
            arrays = [tensor.numpy() for tensor in self._loaded.get_outputs(False)]
            self._made = dict(zip(self._names.outputs, arrays, strict=True))

    def bind(self, buffers: Mapping[str, Buffer], rows: slice, outputs: Sequence[str]) -> Callable[[], None]:
        """What runs it on these rows of its tensors."""
        given = [self._torch.from_numpy(_part(buffers[name], rows)) for name in self._names.inputs]
        pairs = []
        for name in outputs:
            target, made = _part(buffers[name], rows), self._made[name]
            pairs.append((target, made[: len(target)] if buffers[name].spec.batched else made))
        set_inputs, execute, copy = self._loaded.set_inputs, self._loaded.execute, np.copyto

        def run() -> None:
            if self._given is not given:
                self._given = None
                set_inputs(given)
                self._given = given
            execute()
            for target, made in pairs:
                copy(target, made)

        return run


def _does_not_open(stage: Stage, file: Path, error: Exception, said: Sequence[str]) -> BundleError:
    reason = (said[0] if said else first_line(error)).rstrip(".")
    remedy = "export again"
    if "kernel" in reason and "not found" in reason:
        remedy = "ExecuTorch has no kernel for it: write the network without it, or export it for another target"
    return BundleError(f"{file}: stage '{stage.name}' does not open in ExecuTorch ({reason}); {remedy}")


def _is_map(shape: Sequence[int | str]) -> bool:
    """Whether a tensor lies channel-last."""
    return len(shape) == 4 and isinstance(shape[1], int) and shape[1] > IMAGE_CHANNELS


def _part(buffer: Buffer, rows: slice) -> NDArray[Any]:
    array = buffer.read(rows.stop)
    return array[rows] if buffer.spec.batched else array


def _in_turn(runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """One call for several; a single one is itself."""
    if len(runs) == 1:
        return runs[0]

    def run() -> None:
        for each in runs:
            each()

    return run
