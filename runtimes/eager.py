"""The reference: stages as PyTorch modules, run as they are."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edgekit.errors import BundleError, InputError, MeasurementError
from edgekit.interfaces import Buffer
from edgekit.measured import OperatorTime
from edgekit.plan import Stage
from edgekit.runtimes.host import HostBuffer
from edgekit.runtimes.operators import operator_times
from edgekit.tensors import TensorSpec

__all__ = ["EagerRuntime"]

_Recorded = defaultdict[tuple[str, str, str], list[float]]


class EagerRuntime:
    """Runs each stage's module on the CPU; opens no artifacts.

    Args:
        modules: by stage; each takes the stage's inputs in order and returns a tuple of its outputs in order.
        threads: of PyTorch, for the whole process, until :meth:`close` restores what was; ``None`` leaves them.
    """

    name = "eager"
    target = ""

    def __init__(self, modules: Mapping[str, torch.nn.Module], *, threads: int | None = None) -> None:
        self._modules = dict(modules)
        self._calls: _Recorded | None = None
        self._before = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)

    def open(self, stage: Stage, artifact: Path) -> EagerRunner:
        """The stage's module; the artifact is not looked at.

        Raises:
            BundleError: there is no module for this stage.
        """
        if stage.name not in self._modules:
            raise BundleError(
                f"stage '{stage.name}': there is no module for it (modules: {', '.join(self._modules) or 'none'})"
            )
        module = self._modules[stage.name]
        return EagerRunner(stage, module if self._calls is None else _timed(stage.name, module, self._calls))

    def allocate(self, spec: TensorSpec, rows: int) -> HostBuffer:
        """Host memory, which PyTorch tensors look into."""
        return HostBuffer(spec, rows)

    def describe(self) -> dict[str, Any]:
        """Name, version and threads."""
        return {"name": self.name, "version": torch.__version__, "device": "cpu", "threads": torch.get_num_threads()}

    def timing_operators(self) -> EagerRuntime:
        """A runtime of the same modules that reads the clock around every operator.

        Not by ``torch.profiler``, of which a process can have but one, and which writes to the terminal.
        """
        made = EagerRuntime(self._modules)
        made._calls = defaultdict(list)
        return made

    def operator_times(self) -> tuple[OperatorTime, ...]:
        """Every operator as a module called it, the first few calls left out; what it calls in turn is its own time.

        Operators have no names, so they are numbered by kind, in the order of one run: ``"aten.conv2d 2"``.

        Raises:
            MeasurementError: this runtime does not record.
        """
        if self._calls is None:
            raise MeasurementError("runtime 'eager' records no operators; use what its timing_operators() gives")
        found = operator_times(self._calls)
        self._calls.clear()
        return found

    def close(self) -> None:
        """Restore the number of threads."""
        torch.set_num_threads(self._before)


class EagerRunner:
    """One stage's module."""

    def __init__(self, stage: Stage, module: Callable[..., Any]) -> None:
        self._stage = stage
        self._module = module

    def bind(self, buffers: Mapping[str, Buffer], *, rows: int, outputs: Sequence[str]) -> Callable[[], None]:
        """See :meth:`edgekit.interfaces.StageRunner.bind`. The module computes all its outputs, asked for or not."""
        stage, module = self._stage, self._module
        given = [torch.from_numpy(buffers[name].read(rows)) for name in stage.inputs]
        wanted = [(stage.outputs.index(name), torch.from_numpy(buffers[name].read(rows))) for name in outputs]

        def run() -> None:
            with torch.inference_mode():
                made = module(*given)
                if not isinstance(made, tuple) or len(made) != len(stage.outputs):
                    raise InputError(f"stage '{stage.name}': its module must return a tuple of {len(stage.outputs)}")
                for position, target in wanted:
                    if made[position].shape != target.shape:
                        raise InputError(
                            f"stage '{stage.name}': its module returned '{stage.outputs[position]}' as "
                            f"{tuple(made[position].shape)}, the plan says {tuple(target.shape)}"
                        )
                    target.copy_(made[position])

        return run

    def close(self) -> None:
        """Let go of the module."""


class _Operators(TorchDispatchMode):
    """Reads the clock around each operator of one run of a stage."""

    def __init__(self, stage: str, calls: _Recorded) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stage = stage
        self._calls = calls
        self._counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        begin = time.perf_counter_ns()
        made = func(*args, **(kwargs or {}))
        spent_ns = time.perf_counter_ns() - begin
        kind = str(func.overloadpacket)
        self._counts[kind] += 1
        self._calls[self._stage, f"{kind} {self._counts[kind]}", kind].append(spent_ns * 1e-9)
        return made


def _timed(stage: str, module: Callable[..., Any], calls: _Recorded) -> Callable[..., Any]:
    def run(*given: torch.Tensor) -> Any:
        with _Operators(stage, calls):
            return module(*given)

    return run
