"""Dispatch by pairs of row and place among its choices, brought to dispatch by rows.

``rows, places = where(choices == expert)``, where ``choices (batch, k)`` come from a top-k: a row has an expert once at
most. So the rows are those with the expert at any place, and ``weights[rows, places]`` are, on these rows,
``sum(where(choices == expert, weights, 0), 1)``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgekit.exporters.hard import operator_name
from edgekit.exporters.rewrite import made_before

__all__ = ["pairs_as_rows"]

_KEEPS_ONCE = frozenset(
    {"eq", "one_hot", "select", "permute", "transpose", "t", "unsqueeze", "squeeze", "_to_copy", "alias", "ne"}
)
"""What leads from distinct choices to a mask that holds each expert once in a row at most."""


def pairs_as_rows(program: ExportedProgram) -> None:
    """Rewrite every ``where`` of a mask ``(batch, k)`` or ``(k, batch)``, in place; other graphs stay as they are."""
    for node in list(program.graph.nodes):
        if operator_name(node) in ("where", "nonzero_numpy") and len(node.args) == 1:
            _rewrite(program, node)


def _rewrite(program: ExportedProgram, pairs: Node) -> None:
    aten = torch.ops.aten
    mask: Any = pairs.args[0]
    sizes = mask.meta["val"].shape
    batch = [dim for dim, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
    if len(sizes) != 2 or len(batch) != 1 or not _once_in_a_row(mask):
        return
    taken = {node.args[1]: node for node in pairs.users if node.target is operator.getitem}
    rows, places = taken.get(batch[0]), taken.get(1 - batch[0])
    if rows is None:
        return
    readers = list(places.users) if places is not None else []
    by_both = [node for node in readers if node.args[1:] == ([rows, places],)]
    others = [node for node in readers if node not in by_both]
    if any(operator_name(node) != "sym_size" for node in others):
        return
    by_row = mask if batch == [0] else made_before(program, pairs, aten.permute.default, mask, [1, 0])
    by_row = made_before(program, pairs, aten.ne.Scalar, by_row, 0)
    chosen = made_before(program, pairs, aten.any.dim, by_row, 1)
    with program.graph.inserting_before(pairs):
        listed = program.graph.call_function(aten.where.default, (chosen,))
        listed.meta.update(pairs.meta, val=[rows.meta["val"]])
        row = program.graph.call_function(operator.getitem, (listed, 0))
        row.meta.update(rows.meta)
    for node in by_both:
        source: Any = node.args[0]
        shape = [-1, by_row.meta["val"].shape[1], *[1] * (source.meta["val"].ndim - 2)]
        here = made_before(program, node, aten.view.default, by_row, shape)
        zero = made_before(program, node, aten.zeros_like.default, source)
        kept = made_before(program, node, aten.where.self, here, source, zero)
        weight = made_before(program, node, aten.sum.dim_IntList, kept, [1])
        node.args = (weight, [row])
    for node in others:
        node.args = (row, *node.args[1:])
    rows.replace_all_uses_with(row)
    for node in list(row.users):
        _without_leading_one(program, node, row)


def _once_in_a_row(mask: Node) -> bool:
    """Whether a mask comes from the indices of a top-k, compared with one number."""
    node: Any = mask
    while isinstance(node, Node) and operator_name(node) in _KEEPS_ONCE and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if not isinstance(node, Node) or node.target is not operator.getitem or node.args[1] != 1:
        return False
    ranked: Any = node.args[0]
    return operator_name(ranked) == "topk"


def _without_leading_one(program: ExportedProgram, node: Node, row: Node) -> None:
    """``x[None, rows].reshape(-1, n)`` is ``x[rows]``."""
    if operator_name(node) != "index" or node.args[1] != [None, row]:
        return
    expanded: Any = node.args[0]
    if operator_name(expanded) != "unsqueeze" or expanded.args[1] != 0:
        return
    source = expanded.args[0]
    for view in list(node.users):
        value = view.meta.get("val")
        if operator_name(view) not in ("view", "reshape", "squeeze") or not isinstance(value, Tensor):
            continue
        if tuple(map(str, value.shape[1:])) == tuple(map(str, source.meta["val"].shape[1:])):
            view.replace_all_uses_with(_indexed(program, view, source, row))
            program.graph.erase_node(view)
    if not node.users:
        program.graph.erase_node(node)


def _indexed(program: ExportedProgram, view: Node, source: Node, row: Node) -> Node:
    with program.graph.inserting_before(view):
        made = program.graph.call_function(torch.ops.aten.index.Tensor, (source, [row]))
    made.meta.update(view.meta)
    return made
