"""Hard values: tensors that are exactly zero for some samples because something was compared, ranked or rounded.

A gate is a multiplication by such a value. Soft attention (a sigmoid, a softmax) is never exactly zero and is no gate.
"""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgekit.exporters.graph import batch_dimension

__all__ = ["VIEWS", "Hard", "Kind", "filling", "hard_values", "is_mask", "operator_name", "stripped"]

# fmt: off
VIEWS = frozenset({
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "expand_as",
    "broadcast_to", "select", "slice", "narrow", "permute", "transpose", "t", "movedim", "alias", "clone", "detach",
    "contiguous", "_to_copy", "to", "lift_fresh_copy", "repeat", "split", "split_with_sizes", "chunk", "unbind",
    "getitem", "view_as", "type_as", "gather", "index_select", "index",
})
"""Operators that move elements and change none of them (but their dtype)."""
_COPIES = frozenset({"alias", "clone", "detach", "contiguous", "lift_fresh_copy"})
_ROUNDED = frozenset({"round", "sign", "sgn", "floor", "ceil", "trunc", "fix", "heaviside"})
_ZERO_PRESERVING = frozenset({
    "relu", "neg", "abs", "sqrt", "square", "clamp", "hardtanh", "tanh", "sum", "clamp_min", "cumprod",
})
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros", "zero"})
_ONES = frozenset({"ones", "ones_like", "new_ones"})
_FILLS = frozenset({"full", "full_like", "new_full", "scalar_tensor", "fill"})
_PRODUCTS = frozenset({"mul", "div", "logical_and", "bitwise_and"})
# fmt: on


class Kind(enum.Enum):
    """What a hard value can be."""

    BINARY = "0 or 1"
    SPARSE = "0 or any number"


@dataclass(frozen=True)
class Hard:
    """A hard value.

    Attributes:
        kind: what it can be.
        origin: node that made it hard: a comparison, a one-hot, a scatter into zeros, a rounding.
        root: the first node on the way from the origin that has one number for each sample and that this value follows
            from; ``None`` while it has more.
        straight_through: the hard value whose gradient this straight-through form replaces.
    """

    kind: Kind
    origin: Node
    root: Node | None
    straight_through: Node | None = None


def hard_values(nodes: Sequence[Node], *, rows: Any) -> dict[Node, Hard]:
    """Every hard value among nodes in topological order.

    Args:
        nodes: of a captured graph.
        rows: expression or number that the batch has as a size.
    """
    found: dict[Node, Hard] = {}
    for node in nodes:
        if node.op != "call_function":
            continue
        through = _straight_through(node, found)
        known = found[through] if through is not None else _hard(node, found)
        if known is None:
            continue
        root = known.root
        if root is not None and through is None and not _follows(node, root, found, rows):
            root = None
        if root is None and one_for_each_sample(node, rows):
            root = node
        found[node] = Hard(known.kind, known.origin, root, through)
    return found


def one_for_each_sample(node: Node, rows: Any) -> bool:
    """Whether a tensor has the batch as dimension 0 and one element for each sample."""
    return batch_dimension(node, rows) == 0 and math.prod(node.meta["val"].shape[1:]) == 1


def _follows(node: Node, root: Node, found: Mapping[Node, Hard], rows: Any) -> bool:
    """Whether a value follows from a root and from numbers alone, and is not a product with features."""
    others = (arg for arg in node.all_input_nodes if arg not in found or found[arg].root is not root)
    return all(not isinstance(other.meta.get("val"), Tensor) or one_for_each_sample(other, rows) for other in others)


def operator_name(node: Node) -> str:
    """Name of an ATen operator without its overload; empty for what is none."""
    if node.target is operator.getitem:
        return "getitem"
    return getattr(node.target, "_opname", "")


def stripped(node: Any) -> Any:
    """What a node is a mere copy of."""
    while isinstance(node, Node) and operator_name(node) in _COPIES:
        node = node.args[0]
    return node


def _straight_through(node: Node, found: dict[Node, Hard]) -> Node | None:
    """The hard value of ``hard - soft + soft``, whose value is ``hard`` and whose gradient is that of ``soft``."""
    name = operator_name(node)
    if name not in ("add", "sub") or len(node.args) < 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    one, two = (stripped(arg) for arg in node.args[:2])
    for inner, soft in ((one, two), (two, one)) if name == "add" else ((one, two),):
        opposite = "sub" if name == "add" else "add"
        if not isinstance(inner, Node) or operator_name(inner) != opposite or len(inner.args) < 2:
            continue
        first, second = (stripped(arg) for arg in inner.args[:2])
        pairs = ((first, second),) if opposite == "sub" else ((first, second), (second, first))
        for hard, other in pairs:
            if other is soft and isinstance(hard, Node) and hard in found:
                return hard
    return None


def _hard(node: Node, found: dict[Node, Hard]) -> Hard | None:
    name = operator_name(node)
    args = [arg for arg in node.args if isinstance(arg, Node)]
    known = [found[arg] for arg in args if arg in found]
    value = node.meta.get("val")
    first = node.args[0] if node.args else None
    if name in VIEWS:
        return found.get(first) if isinstance(first, Node) else None
    if name in _PRODUCTS and known:
        return _product(node, known)
    if name in ("rsub", "sub") and _is_complement(node, name):
        source = next((arg for arg in args if arg in found), None)
        if source is not None and found[source].kind is Kind.BINARY:
            return found[source]
        return None
    if name in ("logical_not", "bitwise_not") and known:
        return known[0]
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        roots = {hard.root for hard in known if hard.root is not None}
        compared = (
            name in ("eq", "ne", "gt", "ge", "lt", "le") and len(args) == 1 and len(known) == 1 and len(roots) == 1
        )
        compared = compared and operator_name(known[0].origin) != "argmax"
        if compared and (known[0].kind is Kind.BINARY or (name == "ne" and node.args[1] == 0)):
            return Hard(Kind.BINARY, known[0].origin, known[0].root)
        return Hard(Kind.BINARY, node, None)
    if name in _ZERO_PRESERVING and known and isinstance(first, Node) and first in found:
        # These can be zero where what they come from is not, as a sum, or a ReLU of a sign.
        return Hard(Kind.SPARSE, found[first].origin, found[first].root if name in ("neg", "abs", "sqrt") else None)
    return _made_hard(node, name, found)


def _made_hard(node: Node, name: str, found: dict[Node, Hard]) -> Hard | None:
    """Operators that make a hard value out of a soft one."""
    if name == "one_hot":
        return Hard(Kind.BINARY, node, None)
    if name in _ROUNDED or _is_shifted_sign(node, name):
        return Hard(Kind.SPARSE, node, None)
    if _is_rectified(node, name) or (name == "threshold" and node.args[2] == 0):
        return Hard(Kind.SPARSE, node, None)
    if name in ("stack", "cat") and all(part in found for part in node.all_input_nodes):
        binary = all(found[part].kind is Kind.BINARY for part in node.all_input_nodes)
        return Hard(Kind.BINARY if binary else Kind.SPARSE, found[node.all_input_nodes[0]].origin, None)
    if name == "argmax" and _chooses_of_two(node):
        return Hard(Kind.BINARY, node, None)
    if name in ("scatter", "scatter_add", "index_put") and _is_zero(node.args[0]):
        filled = node.args[-1]
        return Hard(Kind.BINARY if name == "scatter" and filled == 1 else Kind.SPARSE, node, None)
    if name == "where" and len(node.args) == 3:
        zeros = [_is_zero(arg) for arg in node.args[1:]]
        if any(zeros) and isinstance(node.args[0], Node) and node.args[0] in found:
            ones = [_is_constant(arg, 1) for arg in node.args[1:]]
            known = found[node.args[0]]
            return Hard(Kind.BINARY if any(ones) else Kind.SPARSE, known.origin, known.root)
    if name == "masked_fill":
        return _filled(node, found)
    if name in ("softmax", "_softmax") and isinstance(node.args[0], Node) and _minus_infinity(node.args[0], found):
        return Hard(Kind.SPARSE, node, None)
    return None


def _is_shifted_sign(node: Node, name: str) -> bool:
    """``sign(x) + 1``: 0, 1 or 2."""
    return name == "add" and _is_constant(node.args[1], 1) and operator_name(stripped(node.args[0])) in ("sign", "sgn")


def _is_rectified(node: Node, name: str) -> bool:
    """``relu(x)``, also as ``maximum(x, 0)`` or clamped, of numbers for a whole sample: a router's soft gates."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or any(not isinstance(size, int) or size != 1 for size in value.shape[2:]):
        return False
    if name in ("maximum", "max") and len(node.all_input_nodes) < 2:
        return False
    bounded = name in ("maximum", "max", "clamp", "clamp_min", "hardtanh") and len(node.args) > 1
    return name == "relu" or (bounded and _is_zero(node.args[1]))


def is_mask(node: Node) -> bool:
    """Whether a hard value's origin says where something is left out; what a ReLU leaves is an activation."""
    return not _is_rectified(node, operator_name(node))


def _chooses_of_two(argmax: Node) -> bool:
    source, dim = argmax.args[0], argmax.args[1] if len(argmax.args) > 1 else None
    return isinstance(source, Node) and isinstance(dim, int) and source.meta["val"].shape[dim] == 2


def _filled(node: Node, found: dict[Node, Hard]) -> Hard | None:
    """Zeros where a mask says so; or what is hard already, filled with a number elsewhere."""
    x, mask, number = (stripped(arg) for arg in node.args)
    if _is_constant(number, 0) and mask in found:
        return Hard(Kind.SPARSE, found[mask].origin, found[mask].root)
    if x not in found:
        return None
    # policy[policy < t] = 0; policy[policy >= t] = 1
    low = stripped(x.args[1]) if operator_name(x) == "masked_fill" and _is_constant(x.args[2], 0) else None
    rounded = (
        _is_constant(number, 1)
        and low is not None
        and (operator_name(low), operator_name(mask)) in (("lt", "ge"), ("le", "gt"))
        and stripped(low.args[0]) is stripped(x.args[0])
        and stripped(mask.args[0]) in (x, stripped(x.args[0]))
        and low.args[1] == mask.args[1]
    )
    return Hard(Kind.BINARY if rounded else Kind.SPARSE, found[x].origin, None)


def _product(node: Node, known: Sequence[Hard]) -> Hard:
    """Zero where any factor is."""
    roots = {hard.root for hard in known}
    binary = all(hard.kind is Kind.BINARY for hard in known) and len(known) == len(node.args) == 2
    if operator_name(node) == "div":
        binary = False
    root = next(iter(roots)) if len(roots) == 1 else None
    same = root is not None or not any(is_mask(hard.origin) for hard in known)
    return Hard(Kind.BINARY if binary else Kind.SPARSE, known[0].origin if same else node, root)


def _is_complement(node: Node, name: str) -> bool:
    """``1 - x``."""
    one = node.args[1] if name == "rsub" else node.args[0]
    return _is_constant(one, 1) and bool(node.kwargs.get("alpha", 1) == 1)


def _minus_infinity(node: Node, found: dict[Node, Hard]) -> bool:
    """Whether a softmax's input is minus infinity where a hard value says so."""
    name = operator_name(node)
    if name == "masked_fill":
        return node.args[1] in found and _is_constant(node.args[2], -math.inf)
    if name == "where":
        return node.args[0] in found and any(_is_constant(arg, -math.inf) for arg in node.args[1:])
    return name == "scatter" and _is_constant(node.args[0], -math.inf)


def _is_zero(value: Any) -> bool:
    return _is_constant(value, 0)


def _is_constant(value: Any, wanted: float) -> bool:
    """Whether a number, or a tensor filled with one, is this one."""
    while isinstance(value, Node) and operator_name(value) in (*_COPIES, "expand", "_to_copy", "view", "unsqueeze"):
        value = value.args[0]
    value = filling(value) if isinstance(value, Node) else value
    return isinstance(value, int | float) and value == wanted


def filling(node: Node) -> Any:
    """The number that an operator fills a new tensor with; ``None`` for other operators."""
    name = operator_name(node)
    if name in _FILLS:
        return node.args[{"scalar_tensor": 0, "new_full": 2}.get(name, 1)]
    return 0 if name in _ZEROS else 1 if name in _ONES else None
