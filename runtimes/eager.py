"""The reference: stages as PyTorch modules, run as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edgekit.errors import BundleError, InputError
from edgekit.interfaces import Buffer
from edgekit.plan import Stage
from edgekit.runtimes.host import HostBuffer
from edgekit.tensors import TensorSpec

__all__ = ["EagerRuntime"]


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
        return EagerRunner(stage, self._modules[stage.name])

    def allocate(self, spec: TensorSpec, rows: int) -> HostBuffer:
        """Host memory, which PyTorch tensors look into."""
        return HostBuffer(spec, rows)

    def describe(self) -> dict[str, Any]:
        """Name, version and threads."""
        return {"name": self.name, "version": torch.__version__, "device": "cpu", "threads": torch.get_num_threads()}

    def close(self) -> None:
        """Restore the number of threads."""
        torch.set_num_threads(self._before)


class EagerRunner:
    """One stage's module."""

    def __init__(self, stage: Stage, module: torch.nn.Module) -> None:
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
