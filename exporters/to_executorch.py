"""Lowers a stage to ExecuTorch: one ``.pte`` file of several methods, over one copy of the weights.

XNNPACK, ExecuTorch's kernels for the CPU, computes what it can, portable kernels the rest. The methods of a file::

    forward    live tensors, and logits where the stage ends in an exit
    trunk      live tensors only, for an exit that is never taken; none for a last stage
    max_prob   that score of an exit, from its logits and temperature; likewise margin and neg_entropy
    tensors    JSON: how many rows at once, names of inputs and outputs of the methods above, which are channel-last

A file takes one sample, since XNNPACK takes a stage in one piece only where shapes are known. A stage in which samples
need one another takes up to :data:`ROWS_TOGETHER`. Feature maps cross the boundary channel-last, as XNNPACK computes
them; it would turn them around twice at each boundary otherwise. Scores are methods of their own because their small
operators would break that one piece up.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind

from edgekit.errors import EdgekitError, LoweringError, require
from edgekit.exporters.capture import quiet
from edgekit.exporters.stages import confidence
from edgekit.plan import SCORES, Stage
from edgekit.tensors import TensorSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["ROWS_TOGETHER", "ExecuTorchTarget"]

ROWS_TOGETHER = 64
"""Most rows of a stage in which samples need one another: ExecuTorch plans the memory for a largest batch."""

IMAGE_CHANNELS = 4
"""Tensors of four dimensions with no more channels stay channel-first: what a camera gives is turned around by XNNPACK
faster than by whoever writes it into the buffer. :mod:`edgekit.runtimes.executorch` has the same number."""


class ExecuTorchTarget:
    """ExecuTorch with XNNPACK. See :class:`edgekit.interfaces.Target`."""

    name = "executorch"
    suffix = ".pte"
    runtime = "executorch"

    def __init__(self) -> None:
        # Not executorch.exir, which takes seconds to import and is needed when something is written only.
        _module("version")

    def lower(self, program: ExportedProgram, stage: Stage, path: Path, *, specs: Mapping[str, TensorSpec]) -> None:
        """Write a stage. See :meth:`edgekit.interfaces.Target.lower`."""
        with quiet(), _logging_as_it_was():
            try:
                content = _content(program, stage, specs)
            except EdgekitError:
                raise
            except Exception as error:  # torch.export and ExecuTorch raise whatever they come across
                raise LoweringError(f"stage '{stage.name}' cannot be written for ExecuTorch: {_line(error)}") from error
        path.write_bytes(content)

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that write the artifact."""
        return {name: version(name) for name in ("executorch", "torch")}


def _content(program: ExportedProgram, stage: Stage, specs: Mapping[str, TensorSpec]) -> bytes:
    """The file of a stage."""
    exir, passes = _module("exir"), _module("exir.passes")
    xnnpack = _module("backends.xnnpack.partition.xnnpack_partitioner")
    rows = ROWS_TOGETHER if stage.whole else 1
    inputs = stage.inputs[:-1] if stage.exit else stage.inputs
    outputs = {"forward": (*stage.live, *stage.head[:1])}
    if stage.exit and stage.live:
        outputs["trunk"] = stage.live
    methods = {name: _traced(_Body(program, stage, made), inputs, specs, rows) for name, made in outputs.items()}
    tensors = {name: {"inputs": inputs, "outputs": made} for name, made in outputs.items()}
    partitioners = {name: [xnnpack.XnnpackPartitioner()] for name in methods}
    if stage.exit:
        logits, *scores = stage.head
        for place, (score, name) in enumerate(zip(SCORES, scores, strict=True)):
            given = (logits, stage.inputs[-1])
            methods[score] = _traced(_Score(place), given, specs, rows)
            tensors[score] = {"inputs": given, "outputs": (name,)}
    turned = [name for name in (*stage.inputs, *stage.outputs) if _is_map(specs[name].shape)]
    manager = exir.to_edge_transform_and_lower(
        methods,
        partitioner=partitioners,
        constant_methods={"tensors": json.dumps({"rows": rows, "methods": tensors, "channels_last": turned})},
    )
    # Inputs stay where the caller has them; outputs have a place in the file's own plan of its memory.
    planning = passes.MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=True)
    made: bytes = manager.to_executorch(exir.ExecutorchBackendConfig(memory_planning_pass=planning)).buffer
    return made


class _Body(nn.Module):
    """Some of a stage's outputs, from inputs and to outputs that lie as they cross the boundary."""

    def __init__(self, program: ExportedProgram, stage: Stage, outputs: Sequence[str]) -> None:
        super().__init__()
        self.body = _ranked(program).module()
        self.exit = stage.exit
        self.count = len(outputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = [_laid_out(tensor, torch.contiguous_format) for tensor in tensors]
        if self.exit:
            given.append(torch.ones(()))  # a temperature, which none of these outputs hangs on
        made: tuple[Tensor, ...] = self.body(*given)[: self.count]
        # An input that is handed through is no place to leave an output in.
        made = tuple(tensor.clone() if any(tensor is each for each in given) else tensor for tensor in made)
        return tuple(_laid_out(tensor, torch.channels_last) for tensor in made)


class _Score(nn.Module):
    """One score of an exit."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, logits: Tensor, temperature: Tensor) -> Tensor:
        return confidence(logits, temperature)[self.place]


def _traced(module: nn.Module, inputs: Sequence[str], specs: Mapping[str, TensorSpec], rows: int) -> ExportedProgram:
    """A method's program: one row, or any number up to ``rows``."""
    given = [specs[name] for name in inputs]
    # As many rows as there can be: PyTorch picks a convolution's algorithm by them, and takes its choice for a bound.
    example = [torch.zeros(spec.concrete(rows), dtype=getattr(torch, spec.dtype)) for spec in given]
    shapes = None
    if rows > 1:
        dim = Dim("batch", min=1, max=rows)
        shapes = (tuple({0: dim} if spec.batched else None for spec in given),)
    laid_out = tuple(_laid_out(tensor, torch.channels_last) for tensor in example)
    with torch.no_grad():
        program = torch.export.export(module, laid_out, dynamic_shapes=shapes, strict=False)
    _drop_unused_weights(program)
    return program


def _is_map(shape: Sequence[Any]) -> bool:
    """Whether a tensor crosses the boundary channel-last."""
    return len(shape) == 4 and shape[1] > IMAGE_CHANNELS


def _laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """A tensor copied to another layout, where that is another. Written so that XNNPACK's passes see two cancel out."""
    if not _is_map(tensor.shape) or tensor.shape[2] == tensor.shape[3] == 1:
        return tensor
    copied: Tensor = torch.ops.aten._to_copy.default(tensor, memory_format=layout)
    return copied


def _ranked(program: ExportedProgram) -> ExportedProgram:
    """Without the operator of :mod:`edgekit.exporters.ranking`, which ExecuTorch does not have."""
    return program.run_decompositions({torch.ops.edgekit.topk.default: _topk})


def _topk(x: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """As :func:`edgekit.exporters.ranking.topk`: the place of a value is how many come before it.

    ExecuTorch has no sort, and its own top-k leaves it open which of equal values it takes.
    """
    values = x.movedim(dim, -1)
    size = values.shape[-1]
    one, other = values[..., :, None], values[..., None, :]
    index = torch.arange(size)
    larger = (other > one) | (other.isnan() & ~one.isnan())
    equal = (other == one) | (other.isnan() & one.isnan())
    place = (larger | (equal & (index[None, :] < index[:, None]))).to(torch.int64).sum(-1)
    chosen = place[..., None, :] == torch.arange(k)[:, None]
    indices = torch.where(chosen, index, torch.zeros_like(index)).sum(-1)
    return values.gather(-1, indices).movedim(-1, dim), indices.movedim(-1, dim)


def _drop_unused_weights(program: ExportedProgram) -> None:
    """Leave out weights that no output hangs on: ExecuTorch would write them all the same."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # it keeps what it looks at
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    signature = program.graph_signature
    weights = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in list(signature.input_specs):
        if spec.kind in weights and not placeholders[spec.arg.name].users:
            program.graph.erase_node(placeholders[spec.arg.name])
            signature.input_specs.remove(spec)
            for held in (program.state_dict, program.constants):
                held.pop(str(spec.target), None)
    program.graph_module.recompile()


def _module(name: str) -> Any:
    return require(f"executorch.{name}", extra="executorch", purpose="Exporting to ExecuTorch")


@contextmanager
def _logging_as_it_was() -> Iterator[None]:
    """ExecuTorch's partitioner configures the root logger when it is imported."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _line(error: Exception) -> str:
    """The first line of an error that says something, and the next where it only announces that."""
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {others[0]}" if first.endswith(":") and others else first
