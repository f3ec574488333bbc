"""Lowers a stage to LiteRT, the format once called TensorFlow Lite, by litert-torch.

A graph takes one sample. Tensors of four dimensions are channel-last, ``(1, height, width, channels)``, as LiteRT's
kernels want them, so that nothing is transposed where stages meet; a single number is ``(1,)``. A stage is one or two
signatures, which share their weights::

    blocks.1          live tensors, logits and all scores, which cost little beside a stage
    blocks.1:trunk    live tensors only, for an exit that is never taken; only where a stage has both
    blocks.1@8        the same for eight samples at once, where a batch was asked for; so for the trunk

Their inputs are ``args_0``, ``args_1`` and so on in the stage's order, their outputs have the names of the plan. All
stages of a network are then joined in one file, ``network.tflite``, for one interpreter and one pool of threads:
between files, threads of one pool that still spin take the cores from the next one's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgekit.artifacts import batch_of, trunk_of
from edgekit.errors import LoweringError, PluginError
from edgekit.exporters.litert_files import LiteRTFiles
from edgekit.exporters.litert_operators import rewrite_operators
from edgekit.exporters.litert_quiet import converter, undisturbed
from edgekit.plan import Stage
from edgekit.tensors import TensorSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["LiteRTTarget"]


class LiteRTTarget(LiteRTFiles):
    """LiteRT through litert-torch. See :class:`edgekit.interfaces.Target` and :class:`edgekit.interfaces.Batching`.

    Args:
        batch: samples that a stage can also take at once. A batch then runs so many at a time, and what is left one by
            one: faster the more threads there are, for as much memory again and twice the time to export.

    Raises:
        PluginError: a batch below 1.
        MissingExtraError: litert-torch is not installed.
    """

    name = "litert"
    suffix = ".tflite"
    runtime = "litert"

    def __init__(self, *, batch: int = 1) -> None:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise PluginError(f"target 'litert': batch cannot be {batch!r}; give 1 or more samples")
        self.batch = batch
        self._litert_torch = converter()

    def lower(self, program: ExportedProgram, stage: Stage, path: Path, *, specs: Mapping[str, TensorSpec]) -> None:
        """Write a stage. See :meth:`edgekit.interfaces.Target.lower`.

        Raises:
            LoweringError: an operator that LiteRT does not have, or samples of a batch that need one another.
        """
        if stage.whole:
            raise LoweringError(
                f"stage '{stage.name}' cannot be written for LiteRT: samples of a batch need one another in it, and a "
                "LiteRT file takes one at a time; export it for onnx"
            )
        try:
            body = _body(program)
            asked = {stage.name: stage.outputs}
            if stage.exit and stage.live:
                asked[trunk_of(stage.name)] = stage.live
            at_once = (1, self.batch) if any(specs[name].batched for name in stage.inputs) else (1,)
            graphs = [(name, rows) for rows in dict.fromkeys(at_once) for name in asked]
            with TemporaryDirectory(prefix="edgekit-") as folder:
                files = [Path(folder) / f"{number}{self.suffix}" for number in range(len(graphs))]
                for file, (name, rows) in zip(files, graphs, strict=True):
                    module = _ChannelsLast(body, stage, asked[name], specs)
                    example = tuple(_example(specs[given], rows) for given in stage.inputs)
                    self._write(module, batch_of(name, rows) if rows > 1 else name, example, file)
                self.join(files, path)
        except OSError:
            raise
        except Exception as error:  # of the tracer, of a lowering or of the converter: nothing below Exception
            raise LoweringError(f"stage '{stage.name}' cannot be written for LiteRT: {_reason(error)}") from error

    def _write(self, module: nn.Module, name: str, example: tuple[Tensor, ...], path: Path) -> None:
        with undisturbed():
            # 64-bit tensors would else become 32-bit ones where stages meet.
            made = self._litert_torch.signature(name, module, example).convert(enable_x64=True)
            content = made.model_content()  # its own writer ends the process when the disk is full
        path.write_bytes(content)

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that write the artifact."""
        return {name: version(name) for name in ("litert-torch", "litert-converter", "jax", "torch")}


class _ChannelsLast(nn.Module):
    """A stage as it is written: images channel-last, numbers ``(1,)``, and what is asked for by its name."""

    def __init__(self, body: nn.Module, stage: Stage, asked: Sequence[str], specs: Mapping[str, TensorSpec]) -> None:
        super().__init__()
        self.body = body
        self.ranks = [len(specs[name].shape) for name in stage.inputs]
        self.names = stage.outputs
        self.asked = asked
        self.training = False

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The stage's outputs by name."""
        given = [_as_traced(tensor, rank) for tensor, rank in zip(tensors, self.ranks, strict=True)]
        made = dict(zip(self.names, self.body(*given), strict=True))
        return {name: _channels_last(made[name]) for name in self.asked}


def _as_traced(tensor: Tensor, rank: int) -> Tensor:
    if rank == 0:
        return tensor.reshape(())
    return tensor.permute(0, 3, 1, 2) if rank == 4 else tensor


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def _example(spec: TensorSpec, rows: int) -> Tensor:
    zeros = torch.zeros(spec.concrete(rows), dtype=getattr(torch, spec.dtype))
    return _channels_last(zeros).contiguous() if spec.shape else zeros.reshape(1)


def _body(program: ExportedProgram) -> nn.Module:
    """The stage as a module that litert-torch can take."""
    module = program.module(check_guards=False)
    rewrite_operators(module)
    for each in module.modules():
        tables: tuple[dict[str, Any], ...] = (each._parameters, each._buffers, vars(each))
        for table in tables:
            table.update({name: _plain(value) for name, value in table.items() if isinstance(value, Tensor)})
    return module


def _plain(tensor: Tensor) -> Tensor:
    """A constant as litert-torch can take it.

    It tells constants apart by their address (0.10): of two that are not contiguous, of which it makes copies, it would
    take the second for the first. And it overwrites infinities in place, which would be in the model itself.
    """
    if tensor.is_contiguous() and bool(tensor.isfinite().all()):
        return tensor
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _reason(error: Exception) -> str:
    """What went wrong, in one line, with the operator where the converter says which it was at."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    operator = re.search(r"target=torch\.ops\.([\w.]+)", str(error))
    return f"{operator[1]}: {lines[0]}" if operator and operator[1] not in lines[0] else lines[0]
