"""Mixtures of experts as published, brought to the one form in which gates are found: a sum of products.

Row dispatch runs an expert on the rows that chose it (``index = gates[:, e].nonzero()``, ``x[index]``, ``index_add``).
Its row count depends on the data, which no static graph has. On the rows that chose the expert it computes what
``y + where(chosen, expert(x), 0)`` computes, and that has a gate. A dispatcher that sorts all pairs of row and expert
(``nonzero(gates).sort(0)``), splits them by expert and adds them back together is the same for all experts at once. A
weighted sum over stacked experts
(``(torch.stack(outputs, 1) * weights).sum(1)``) becomes a chain of additions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from edgekit.exporters.graph import ancestors
from edgekit.exporters.hard import operator_name, stripped

__all__ = ["mixtures_as_sums"]

_INDICES = frozenset({"squeeze", "view", "reshape", "flatten", "select", "getitem", "alias", "unbind", "_to_copy"})
"""What code does with the result of ``nonzero`` to get a list of rows."""
_CHECKS = frozenset({"_assert_scalar", "sym_constrain_range_for_size", "sym_constrain_range", "_assert_async"})


def mixtures_as_sums(program: ExportedProgram) -> None:
    """Rewrite row dispatch and weighted sums over stacked experts, in place; other graphs stay as they are."""
    graph = program.graph
    chosen = {node: _chosen(node) for node in graph.nodes if _lists_rows(node)}
    done = [_dispatch(program, index, rows) for index, rows in chosen.items() if rows is not None]
    done += [_sorted_dispatch(program, node) for node in list(graph.nodes) if operator_name(node) == "index_add"]
    done += [_unstacked(program, node) for node in list(graph.nodes) if operator_name(node) == "sum"]
    if any(done):
        _drop_unread(program)
        graph.lint()
        program.graph_module.recompile()


def _lists_rows(node: Node) -> bool:
    """``nonzero(x)``, also in the form ``where(x)``."""
    name = operator_name(node)
    return name in ("nonzero", "nonzero_numpy") or (name == "where" and len(node.args) == 1)


def _chosen(nonzero: Node) -> Node | None:
    """The rows that a ``nonzero`` lists: a tensor ``(batch,)``."""
    source = nonzero.args[0]
    return source if isinstance(source, Node) and source.meta["val"].ndim == 1 else None


def _dispatch(program: ExportedProgram, nonzero: Node, rows: Node) -> bool:
    """Run on all rows what ran on those listed, and keep the result where they were listed."""
    count = nonzero.meta["val"]
    count = (count[0] if isinstance(count, tuple | list) else count).shape[0]
    if not isinstance(count, torch.SymInt):
        return False
    listing = _listing(nonzero)
    inside = [node for node in program.graph.nodes if node not in listing and _mentions(node, count)]
    ends = [node for node in program.graph.nodes if _puts_back(node, listing)]
    if not ends or any(not _understood(node, listing) for node in inside if operator_name(node) not in _CHECKS):
        return False
    size = _size_of(program, rows)
    for node in [*inside, *ends]:
        name = operator_name(node)
        if name in ("index_select", "index", "gather") and _lists(node, listing):
            _take_all(program, node, listing)
        elif node in ends:
            _put_where_chosen(program, node, rows)
        else:
            node.args = pytree.tree_map(lambda arg: size if _is_count(arg, count) else arg, node.args)
            _remember(node)
    return True


def _listing(nonzero: Node) -> set[Node]:
    """The result of ``nonzero`` in all its shapes."""
    found, waiting = set(), [nonzero]
    while waiting:
        node = waiting.pop()
        found.add(node)
        waiting += [user for user in node.users if operator_name(user) in _INDICES and user not in found]
    return found


def _lists(node: Node, listing: set[Node]) -> bool:
    indices = node.args[1] if operator_name(node) == "index" else node.args[-1]
    return any(index in listing for index in (indices if isinstance(indices, list | tuple) else [indices]))


def _puts_back(node: Node, listing: set[Node]) -> bool:
    name = operator_name(node)
    if name in ("index_add", "index_copy"):
        return bool(node.args[1] == 0) and node.args[2] in listing
    if name == "index_put":
        indices = node.args[1]
        return isinstance(indices, list | tuple) and len(indices) == 1 and indices[0] in listing
    return False


def _mentions(node: Node, count: torch.SymInt) -> bool:
    symbols = count.node.expr.free_symbols
    values = [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor | torch.SymInt)]
    sizes = [size for value in values for size in (value.shape if isinstance(value, Tensor) else [value])]
    return any(isinstance(size, torch.SymInt) and size.node.expr.free_symbols & symbols for size in sizes)


def _understood(node: Node, listing: set[Node]) -> bool:
    """Whether a node inside works row by row once it gets all rows: rows are its dimension 0 and nothing else."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt) or operator_name(node) in ("sym_size", "ge", "le", "gt"):
        return True
    if isinstance(value, Tensor):
        return value.ndim > 0 and not any(isinstance(size, torch.SymInt) for size in value.shape[1:])
    return all(isinstance(part, Tensor | None) for part in pytree.tree_leaves(value))


def _is_count(value: Any, count: torch.SymInt) -> bool:
    known = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(known, torch.SymInt) and known.node.expr == count.node.expr


def _size_of(program: ExportedProgram, rows: Node) -> Node:
    with program.graph.inserting_after(rows):
        size = program.graph.call_function(torch.ops.aten.sym_size.int, (rows, 0))
    size.meta["val"] = rows.meta["val"].shape[0]
    return size


def _make(program: ExportedProgram, at: Node, operation: Any, *args: Any) -> Node:
    """A new node before another, which it comes from."""
    with program.graph.inserting_before(at):
        made = program.graph.call_function(operation, args)
    made.meta = {key: value for key, value in at.meta.items() if key != "val"}
    _remember(made)
    return made


def _take_all(program: ExportedProgram, node: Node, listing: set[Node]) -> None:
    """``x[index]`` is ``x``; ``gates[index, e]`` is ``gates[:, e]``."""
    aten = torch.ops.aten
    source: Any = node.args[0]
    indices: Any = node.args[1] if operator_name(node) == "index" else [node.args[2]]
    for dimension, index in reversed(list(enumerate(indices))):
        if index is None or index in listing:
            continue
        flat = _make(program, node, aten.view.default, index, [-1])
        source = _make(program, node, aten.index_select.default, source, dimension, flat)
        if index.meta["val"].numel() == 1:
            source = _make(program, node, aten.squeeze.dim, source, dimension)
    node.replace_all_uses_with(source)


def _put_where_chosen(program: ExportedProgram, node: Node, rows: Node) -> None:
    """``y.index_add(0, index, out)`` is ``y + where(chosen, out, 0)``; without adding, ``where(chosen, out, y)``."""
    aten = torch.ops.aten
    name = operator_name(node)
    target: Any = node.args[0]
    value: Any = node.args[2] if name == "index_put" else node.args[3]
    adds = name == "index_add" or (name == "index_put" and len(node.args) > 3 and bool(node.args[3]))
    shape = [-1] + [1] * (target.meta["val"].ndim - 1)
    chosen = _make(program, node, aten.view.default, _make(program, node, aten.ne.Scalar, rows, 0), shape)
    if adds:
        zero = _make(program, node, aten.zeros_like.default, target)
        kept = _make(program, node, aten.where.self, chosen, value, zero)
        made = _make(program, node, aten.add.Tensor, target, kept)
    else:
        made = _make(program, node, aten.where.self, chosen, value, target)
    node.replace_all_uses_with(made)


def _sorted_dispatch(program: ExportedProgram, end: Node) -> bool:
    """Rows sorted by expert, split, and put back in one ``index_add``, as a sum over experts of gate times expert."""
    rows: Any = end.args[2]
    listed = {node.args[0] for node in ancestors([rows]) if _lists_rows(node)}
    found = _joined_parts(end)
    if end.args[1] != 0 or len(listed) != 1 or found is None:
        return False
    (gates,) = listed
    parts, after, weighted = found
    splits = {node for node in ancestors(parts) if operator_name(node) in ("split_with_sizes", "split")}
    splits = {node for node in splits if (taken := _taken(node.args[0])) is not None and _lists(taken, {rows})}
    if len(splits) != 1 or not isinstance(gates, Node) or gates.meta["val"].ndim != 2:
        return False
    (split,) = splits
    _run_on_all_rows(program, split, parts)
    aten = torch.ops.aten
    total: Any = end.args[0]
    for expert, part in enumerate(parts):
        for node in after:
            part = _make(program, end, node.target, part, *node.args[1:])
        gate = _make(program, end, aten.select.int, gates, 1, expert)
        gate = _make(program, end, aten.view.default, gate, [-1] + [1] * (part.meta["val"].ndim - 1))
        if weighted:
            part = _make(program, end, aten.mul.Tensor, gate, part)
        else:
            zero = _make(program, end, aten.zeros_like.default, part)
            part = _make(program, end, aten.where.self, _make(program, end, aten.ne.Scalar, gate, 0), part, zero)
        total = _make(program, end, aten.add.Tensor, total, part)
    end.replace_all_uses_with(total)
    return True


def _joined_parts(end: Node) -> tuple[list[Node], list[Node], bool] | None:
    """What an ``index_add`` concatenates, the operators applied to all of it since, and whether it is weighted."""
    node = stripped(end.args[3])
    after: list[Node] = []
    weighted = False
    while isinstance(node, Node) and operator_name(node) != "cat":
        if operator_name(node) == "mul" and not weighted and not after:
            weights = [arg for arg in node.args if operator_name(stripped(arg)) in ("gather", "index", "unsqueeze")]
            if len(weights) != 1:
                return None
            weighted = True
            node = stripped(next(arg for arg in node.args if arg is not weights[0]))
        elif len(node.all_input_nodes) == 1:
            if operator_name(node) != "_to_copy":
                after.insert(0, node)
            node = stripped(node.args[0])
        else:
            return None
    parts: Any = node.args[0] if isinstance(node, Node) else None
    return (list(parts), after, weighted) if parts else None


def _taken(node: Any) -> Node | None:
    """The ``x[index]`` that a tensor is a view of."""
    while isinstance(node, Node) and operator_name(node) in _INDICES:
        node = node.args[0]
    return node if isinstance(node, Node) and operator_name(node) in ("index", "index_select") else None


def _run_on_all_rows(program: ExportedProgram, split: Node, parts: Sequence[Node]) -> None:
    """Give every expert all rows in the place of its own."""
    taken = _taken(split.args[0])
    assert taken is not None
    source: Any = taken.args[0]
    rows = source.meta["val"].shape[0]
    size = _size_of(program, source)
    pieces = list(split.users)
    inside = ancestors(parts) & set().union(*map(_descendants, pieces)) - set(pieces)
    for piece in pieces:
        piece.replace_all_uses_with(source)
    for node in program.graph.nodes:
        if node in inside:
            node.args = pytree.tree_map(lambda arg: size if _is_other_count(arg, rows) else arg, node.args)
            _remember(node)


def _descendants(node: Node) -> set[Node]:
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting.extend(each.users)
    return found


def _is_other_count(value: Any, rows: torch.SymInt) -> bool:
    known = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(known, torch.SymInt) and known.node.expr != rows.node.expr


def _unstacked(program: ExportedProgram, node: Node) -> bool:
    """``(stack(parts, d) * weights).sum(d)`` as a sum of products, one for each part."""
    dims: Any = node.args[1] if len(node.args) > 1 else None
    product = stripped(node.args[0])
    if not isinstance(dims, list | tuple) or len(dims) != 1 or len(node.args) > 2 or operator_name(product) != "mul":
        return False
    rank = product.meta["val"].ndim
    dim = dims[0] % rank
    for one, weights in (product.args[:2], product.args[1::-1]):
        stack = stripped(one)
        if not isinstance(stack, Node) or operator_name(stack) != "stack" or not isinstance(weights, Node):
            continue
        parts: Any = stack.args[0]
        place: Any = stack.args[1] if len(stack.args) > 1 else 0
        known = weights.meta["val"]
        if place % rank == dim and known.ndim == rank and known.shape[dim] == len(parts):
            node.replace_all_uses_with(_sum_of_products(program, node, parts, weights, dim))
            return True
    return False


def _sum_of_products(program: ExportedProgram, node: Node, parts: Sequence[Node], weights: Node, dim: int) -> Node:
    aten = torch.ops.aten
    products = [
        _make(program, node, aten.mul.Tensor, _make(program, node, aten.select.int, weights, dim, place), part)
        for place, part in enumerate(parts)
    ]
    return functools.reduce(lambda total, product: _make(program, node, aten.add.Tensor, total, product), products)


def _remember(node: Node) -> None:
    """Work out anew what a node's result looks like."""
    if node.op != "call_function":
        return
    target: Any = node.target
    values = pytree.tree_map(lambda arg: arg.meta["val"] if isinstance(arg, Node) else arg, (node.args, node.kwargs))
    fakes = [value for value in pytree.tree_leaves(values) if isinstance(value, torch._subclasses.FakeTensor)]
    if not fakes:
        node.meta["val"] = target(*values[0], **values[1])
        return
    with fakes[0].fake_mode, torch.no_grad():
        node.meta["val"] = target(*values[0], **values[1])


def _drop_unread(program: ExportedProgram) -> None:
    """Remove what nothing reads any more, checks of row counts among it."""
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and not node.users:
            program.graph.erase_node(node)
