"""Mixtures of experts as published, brought to the one form in which gates are found: a sum of products.

Row dispatch runs an expert on the rows that chose it (``index = gates[:, e].nonzero()``, ``x[index]``, ``index_add``).
Its row count depends on the data, which no static graph has. On the rows that chose the expert it computes what
``y + where(chosen, expert(x), 0)`` computes, and that has a gate. A mask of rows (``y[m] = f(x[m])``) is the same. A
dispatcher that sorts all pairs of row and expert (``nonzero(gates).sort(0)``), splits them by expert and adds them back
together is the same for all experts at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from edgekit.exporters.graph import ancestors
from edgekit.exporters.hard import operator_name, stripped
from edgekit.exporters.pairs import pairs_as_rows
from edgekit.exporters.products import plain_numbers, plain_products
from edgekit.exporters.rewrite import drop_unread, made_before, remember

__all__ = ["mixtures_as_sums"]

_INDICES = frozenset({"squeeze", "view", "reshape", "flatten", "select", "getitem", "alias", "unbind", "_to_copy"})
"""What code does with the result of ``nonzero`` to get a list of rows."""
_CHECKS = frozenset({"_assert_scalar", "sym_constrain_range_for_size", "sym_constrain_range", "_assert_async"})


def mixtures_as_sums(program: ExportedProgram) -> None:
    """Rewrite row dispatch, products and selections, in place; other graphs stay as they are."""
    graph = program.graph
    plain_numbers(program)
    pairs_as_rows(program)
    _one_for_equal_masks(program)
    done = [_dispatch(program, rows, *listed) for rows, listed in _listed(program).items()]
    done += [_sorted_dispatch(program, node) for node in list(graph.nodes) if operator_name(node) == "index_add"]
    done.append(plain_products(program))
    if any(done):
        drop_unread(program)
        graph.lint()
        program.graph_module.recompile()


def _one_for_equal_masks(program: ExportedProgram) -> None:
    """One node for equal masks of rows: code writes ``y[~m] = f(x[~m])`` with two complements."""
    seen: dict[tuple[object, ...], Node] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and _is_row_mask(node):
            first = seen.setdefault((node.target, str(node.args), str(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)


def _is_row_mask(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.dtype == torch.bool and value.ndim == 1


def _listed(program: ExportedProgram) -> dict[Node, tuple[set[Node], set[Any]]]:
    """What lists rows, by ``nonzero(m)`` or as ``m`` in ``x[m]``: the list in all its shapes, and how many they are.

    Where two lists must be of one length, as the rows of one are added to those of the other, neither is given.
    """
    found: dict[Node, tuple[set[Node], set[Any]]] = {}
    for node in program.graph.nodes:
        indices: Any = node.args[1] if operator_name(node) == "index" else ()
        if len(indices) == 1 and _is_row_mask(indices[0]):
            rows, listing = indices[0], {indices[0]}
        elif _lists_rows(node) and _chosen(node) is not None:
            rows, listing = node.args[0], _listing(node)
        else:
            continue
        known = found.setdefault(rows, (set(), set()))
        known[0].update(listing)
        known[1].update(_counts(node))
    lengths = Counter(count for _, counts in found.values() for count in counts)
    return {rows: listed for rows, listed in found.items() if all(lengths[count] == 1 for count in listed[1])}


def _lists_rows(node: Node) -> bool:
    """``nonzero(x)``, also in the form ``where(x)``."""
    name = operator_name(node)
    return name in ("nonzero", "nonzero_numpy") or (name == "where" and len(node.args) == 1)


def _chosen(nonzero: Node) -> Node | None:
    """The rows that a ``nonzero`` lists: a tensor ``(batch,)``."""
    source = nonzero.args[0]
    return source if isinstance(source, Node) and source.meta["val"].ndim == 1 else None


def _counts(node: Node) -> set[Any]:
    """How many rows are listed or taken, as a symbol; none where that is a number."""
    value = node.meta["val"]
    size = (value[0] if isinstance(value, tuple | list) else value).shape[0]
    return {size.node.expr} if isinstance(size, torch.SymInt) else set()


def _dispatch(program: ExportedProgram, rows: Node, listing: set[Node], counts: set[Any]) -> bool:
    """Run on all rows what ran on those listed, and keep the result where they were listed.

    Args:
        program: to rewrite.
        rows: a number for each row, zero for those that are not listed.
        listing: the list of rows, or their mask, in all its shapes.
        counts: expressions of how many rows that are.
    """
    inside = [node for node in program.graph.nodes if node not in listing and _mentions(node, counts)]
    ends = [node for node in program.graph.nodes if _puts_back(node, listing)]
    if not counts or not ends or not _work_row_by_row(inside, ends, listing, counts):
        return False
    size = _size_of(program, rows)
    for node in [*inside, *ends]:
        name = operator_name(node)
        if name in ("index_select", "index", "gather") and _lists(node, listing):
            _take_all(program, node, listing)
        elif node in ends:
            _put_where_chosen(program, node, rows)
        else:
            node.args = pytree.tree_map(lambda arg: size if _is_count(arg, counts) else arg, node.args)
            remember(node)
    return True


def _work_row_by_row(inside: Sequence[Node], ends: Sequence[Node], listing: set[Node], counts: set[Any]) -> bool:
    """Whether some nodes can work on all rows: they read no other list, and the ends alone read what they give."""
    inner = {*inside, *ends, *listing}
    readers = (node for node in (*inside, *ends) if operator_name(node) not in _CHECKS)
    read = {source for node in readers for source in node.all_input_nodes}
    values = (source.meta.get("val") for source in read)
    if any(free_unbacked_symbols(value) - counts for value in values if isinstance(value, Tensor)):
        return False
    for node in inside:
        if operator_name(node) in _CHECKS:
            continue
        others = (user for user in node.users if user not in inner)
        if not _understood(node) or any(isinstance(user.meta.get("val"), Tensor) for user in others):
            return False
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


def _mentions(node: Node, counts: set[Any]) -> bool:
    symbols = {symbol for count in counts for symbol in count.free_symbols}
    values = [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor | torch.SymInt)]
    sizes = [size for value in values for size in (value.shape if isinstance(value, Tensor) else [value])]
    return any(isinstance(size, torch.SymInt) and size.node.expr.free_symbols & symbols for size in sizes)


def _understood(node: Node) -> bool:
    """Whether a node inside works row by row once it gets all rows: rows are its dimension 0 and nothing else."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt) or operator_name(node) in ("sym_size", "ge", "le", "gt"):
        return True
    if isinstance(value, Tensor):
        return value.ndim > 0 and not any(isinstance(size, torch.SymInt) for size in value.shape[1:])
    return all(isinstance(part, Tensor | None) for part in pytree.tree_leaves(value))


def _is_count(value: Any, counts: set[Any]) -> bool:
    known = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(known, torch.SymInt) and known.node.expr in counts


def _size_of(program: ExportedProgram, rows: Node) -> Node:
    with program.graph.inserting_after(rows):
        size = program.graph.call_function(torch.ops.aten.sym_size.int, (rows, 0))
    size.meta["val"] = rows.meta["val"].shape[0]
    return size


def _take_all(program: ExportedProgram, node: Node, listing: set[Node]) -> None:
    """``x[index]`` is ``x``; ``gates[index, e]`` is ``gates[:, e]``."""
    aten = torch.ops.aten
    source: Any = node.args[0]
    indices: Any = node.args[1] if operator_name(node) == "index" else [node.args[2]]
    for dimension, index in reversed(list(enumerate(indices))):
        if index is None or index in listing:
            continue
        flat = made_before(program, node, aten.view.default, index, [-1])
        source = made_before(program, node, aten.index_select.default, source, dimension, flat)
        if index.meta["val"].numel() == 1:
            source = made_before(program, node, aten.squeeze.dim, source, dimension)
    node.replace_all_uses_with(source)


def _put_where_chosen(program: ExportedProgram, node: Node, rows: Node) -> None:
    """``y.index_add(0, index, out)`` is ``y + where(chosen, out, 0)``; without adding, ``where(chosen, out, y)``."""
    aten = torch.ops.aten
    name = operator_name(node)
    target: Any = stripped(node.args[0])
    value: Any = node.args[2] if name == "index_put" else node.args[3]
    adds = name == "index_add" or (name == "index_put" and len(node.args) > 3 and bool(node.args[3]))
    shape = [-1] + [1] * (target.meta["val"].ndim - 1)
    chosen = made_before(program, node, aten.view.default, made_before(program, node, aten.ne.Scalar, rows, 0), shape)
    if adds:
        zero = made_before(program, node, aten.zeros_like.default, target)
        kept = made_before(program, node, aten.where.self, chosen, value, zero)
        made = made_before(program, node, aten.add.Tensor, target, kept)
    else:
        made = made_before(program, node, aten.where.self, chosen, value, target)
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
            part = made_before(program, end, node.target, part, *node.args[1:])
        gate = made_before(program, end, aten.select.int, gates, 1, expert)
        gate = made_before(program, end, aten.view.default, gate, [-1] + [1] * (part.meta["val"].ndim - 1))
        if weighted:
            part = made_before(program, end, aten.mul.Tensor, gate, part)
        else:
            zero = made_before(program, end, aten.zeros_like.default, part)
            part = made_before(
                program, end, aten.where.self, made_before(program, end, aten.ne.Scalar, gate, 0), part, zero
            )
        total = made_before(program, end, aten.add.Tensor, total, part)
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
            remember(node)


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
