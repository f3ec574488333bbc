"""What a captured graph may hold: refusals that name the place in the model's source, and two normal forms."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgekit.errors import CaptureError
from edgekit.exporters.source import where

__all__ = [
    "ancestors",
    "batch_dimension",
    "drop_same_size",
    "drop_some_rows",
    "fills_by_mask",
    "keep_batch",
    "merge_views",
    "refuse_control_flow",
    "refuse_random",
    "refuse_state",
    "refuse_values",
    "row_bytes",
    "weight_of",
]


def refuse_control_flow(program: ExportedProgram) -> None:
    """Refuse branches and loops inside the graph."""
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"the model branches inside the graph with {node.target}{where(node)}: of such operators edgekit reads "
                "torch.cond and torch.while_loop, called by these names"
            )


def refuse_random(program: ExportedProgram) -> None:
    """Refuse operators that draw random numbers."""
    for node in program.graph.nodes:
        if node.op == "call_function" and _samples(node):
            raise CaptureError(
                f"the model samples at random in evaluation mode with {node.target}{where(node)}: "
                "replace it by its mean before export"
            )


def _samples(node: Node) -> bool:
    """Whether an operator draws random numbers. Attention and recurrent ones do with dropout only."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    training = given.get("train", given.get("training", True))
    rate = given.get("dropout_p", given.get("dropout", 0.0 if "dropout_p" in names else 1.0))
    return bool(training) and rate != 0


def keep_batch(program: ExportedProgram) -> None:
    """Keep ``squeeze`` away from the batch: of one row, it would take the batch for one more dimension of size 1."""
    aten = torch.ops.aten
    for node in program.graph.nodes:
        if node.target not in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):
            continue
        sizes = node.args[0].meta["val"].shape
        asked = node.args[1] if len(node.args) > 1 else range(len(sizes))
        asked = [dim % len(sizes) for dim in ([asked] if isinstance(asked, int) else asked)]
        gone = [dim for dim in asked if isinstance(sizes[dim], int) and sizes[dim] == 1]
        node.target, node.args = (
            (aten.squeeze.dims, (node.args[0], gone)) if gone else (aten.alias.default, (node.args[0],))
        )


def drop_some_rows(program: ExportedProgram) -> None:
    """Drop assertions that there are rows: a sample list by value may be empty."""
    for node in list(program.graph.nodes):
        if getattr(node.target, "_opname", "") != "_assert_scalar":
            continue
        condition: Any = node.args[0]
        if isinstance(condition, Node) and condition.target is torch.sym_not:
            condition = condition.args[0]
            if isinstance(condition, Node) and condition.target is operator.eq and condition.args[1] == 0:
                program.graph.erase_node(node)


def drop_same_size(program: ExportedProgram) -> None:
    """Resizing to the same size gives the same tensor. RANet does it with most of its features."""
    for node in program.graph.nodes:
        if getattr(node.target, "_opname", "").startswith("upsample_"):
            source = node.args[0]
            if tuple(node.meta["val"].shape[2:]) == tuple(source.meta["val"].shape[2:]):
                node.target, node.args, node.kwargs = torch.ops.aten.alias.default, (source,), {}


def fills_by_mask(program: ExportedProgram) -> None:
    """``x[mask] = number`` as a masked fill: policies are rounded that way."""
    aten = torch.ops.aten
    signature = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in program.graph.nodes:
        if node.target is not aten.index_put.default or len(node.args) > 3:
            continue
        target, indices, filling = node.args
        while getattr(filling.target, "_opname", "") in ("lift_fresh_copy", "clone", "detach", "alias", "_to_copy"):
            filling = filling.args[0]
        constant = program.constants.get(signature.get(filling.name, ""))
        is_mask = len(indices) == 1 and indices[0] is not None and indices[0].meta["val"].dtype == torch.bool
        if is_mask and isinstance(constant, torch.Tensor) and constant.ndim == 0:
            node.target, node.args = aten.masked_fill.Scalar, (target, indices[0], constant.item())


_WHOLE = 2**63 - 1
"""End of a slice that takes everything."""


def merge_views(program: ExportedProgram) -> None:
    """One node for equal selections of one tensor: a mixture reads its gate's column several times."""
    seen: dict[tuple[object, ...], Node] = {}
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.slice.Tensor and node.args[2:] == (0, _WHOLE):
            node.replace_all_uses_with(node.args[0])
        if getattr(node.target, "_opname", "") not in ("select", "view", "unsqueeze", "squeeze", "expand", "slice"):
            continue
        key = (node.target, str(node.args), str(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
        else:
            seen[key] = node


def refuse_values(inputs: Sequence[Node], outputs: Sequence[Node]) -> None:
    """Refuse outputs that hang on a value read into Python: it would be one number for all rows of a batch."""
    reads = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
    for node in ancestors(outputs):
        if node.target in reads and not ancestors([node]).isdisjoint(inputs):
            raise CaptureError(
                f"the forward reads a value out of a tensor with item(){where(node)}: compute with the tensor itself, "
                "so that every sample keeps its own value"
            )


def refuse_state(program: ExportedProgram, outputs: Sequence[Node]) -> None:
    """Refuse buffers that a forward both changes and reads: a staged run would not carry them."""
    changed = set(program.graph_signature.buffers_to_mutate.values())
    if not changed:
        return
    needed = ancestors(outputs)
    placeholders = program.graph_signature.inputs_to_buffers
    for node in program.graph.nodes:
        if node.op == "placeholder" and placeholders.get(node.name) in changed and node in needed:
            raise CaptureError(
                f"the forward changes buffer '{placeholders[node.name]}' that its outputs depend on: "
                "edgekit needs a forward without side effects in evaluation mode"
            )


def batch_dimension(node: Node, rows: Any) -> int | None:
    """Where a tensor has the batch: dimension 0, or else the only dimension of that size; ``None`` if nowhere.

    Args:
        node: of a captured graph.
        rows: expression that the batch has as a size, or 1 where the model bakes it in.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    # Compared as expressions: comparing the sizes themselves could need the values of the data.
    shape: Any = value.shape
    sizes = [size.node.expr if isinstance(size, torch.SymInt) else size for size in shape]
    places = [place for place, size in enumerate(sizes) if size == rows]
    if any(isinstance(size, torch.SymInt) for place, size in enumerate(shape) if place not in places[:1]):
        return None
    if places[:1] == [0] or len(places) == 1:
        return places[0]
    return None


def weight_of(program: ExportedProgram, node: Node) -> tuple[str, Tensor] | None:
    """The weight or constant that a placeholder stands for, with its name; ``None`` for other nodes."""
    signature = program.graph_signature
    for table in (
        signature.inputs_to_parameters,
        signature.inputs_to_buffers,
        signature.inputs_to_lifted_tensor_constants,
    ):
        if node.name in table:
            target = table[node.name]
            return target, program.state_dict[target] if target in program.state_dict else program.constants[target]
    return None


def row_bytes(node: Node, rows: Any) -> int:
    """Bytes that one sample has of a tensor with the batch as a dimension; 0 for what has none."""
    batch = batch_dimension(node, rows)
    if batch is None:
        return 0
    value = node.meta["val"]
    return math.prod(int(n) for place, n in enumerate(value.shape) if place != batch) * int(value.element_size())


def ancestors(
    nodes: Sequence[Node],
    *,
    stop: Callable[[Node], bool] = lambda node: False,
    sources: Callable[[Node], Iterable[Node]] = lambda node: node.all_input_nodes,
) -> set[Node]:
    """Every node that ``nodes`` are computed from, themselves included; not beyond nodes where ``stop`` holds."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if not stop(node):
            waiting.extend(sources(node))
    return found
