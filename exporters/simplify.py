"""What a graph becomes when a gate's value is known: partial evaluation with zeros and ones.

``0 * f + (1 - 0) * x`` is ``x``: with the value known, some tensors are zero, some are another tensor, and what nothing
reads any more need not be computed. That holds for finite ``f``; a NaN or an infinity that is multiplied by zero is not
reproduced.
"""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from edgekit.exporters.hard import VIEWS, Hard, operator_name

__all__ = ["Known", "View"]


class Known(enum.Enum):
    """A tensor filled with one number."""

    ZERO = 0
    ONE = 1


Value = Node | Known
# fmt: off
_ZERO_FROM_FIRST = frozenset({
    "relu", "neg", "abs", "sqrt", "square", "sum", "mean", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "tanh",
    "gelu", "silu", "leaky_relu", "hardswish", "dropout", "div", "upsample_nearest2d", "upsample_bilinear2d", "cumsum",
    "avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "sin", "erf", "amax", "amin",
})
"""Operators whose result is zero where their first argument is zero everywhere."""
# fmt: on
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
}


class View:
    """A graph in which some tensors are known, or are other tensors.

    Args:
        order: every node, in topological order, with its place.
        dynamic: nodes whose values depend on the network's inputs.
        known: what is known already.
    """

    def __init__(
        self, order: Mapping[Node, int], dynamic: set[Node], known: Mapping[Node, Value] | None = None
    ) -> None:
        self.order = order
        self.dynamic = dynamic
        self._known: dict[Node, Value] = dict(known or {})

    def at(self, value: Any) -> Any:
        """What an argument is, in this view: itself, another node, or a known number."""
        while isinstance(value, Node) and value in self._known:
            value = self._known[value]
        return value

    def sources(self, node: Node) -> list[Node]:
        """The tensors that a node reads and that differ from run to run."""
        found = (self.at(source) for source in node.all_input_nodes)
        return list(dict.fromkeys(each for each in found if isinstance(each, Node) and each in self.dynamic))

    def ancestors(self, values: Iterable[Any], *, stop: Callable[[Node], bool] = lambda node: False) -> set[Node]:
        """Every dynamic node that these are computed from, themselves included; not beyond where ``stop`` holds."""
        waiting = [value for value in map(self.at, values) if isinstance(value, Node) and value in self.dynamic]
        found: set[Node] = set()
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                if not stop(node):
                    waiting.extend(self.sources(node))
        return found

    def given(self, known: Mapping[Node, Known], hard: Mapping[Node, Hard]) -> View:
        """The view in which these are known as well, and all that follows from them.

        Args:
            known: numbers that tensors are filled with.
            hard: the graph's hard values.
        """
        made = View(self.order, self.dynamic, {**self._known, **known})
        first = min((self.order[node] for node in known), default=len(self.order))
        for other, place in self.order.items():
            if place <= first or other in made._known or other.op != "call_function":
                continue
            through = hard[other].straight_through if other in hard else None
            sources = other.all_input_nodes if through is None else (through,)
            if any(made._is_changed(source, self) for source in sources):
                value = made._evaluate(other, hard)
                if value is not None:
                    made._known[other] = value
        return made

    def _is_changed(self, source: Node, before: View) -> bool:
        return self.at(source) is not before.at(source)

    def _evaluate(self, node: Node, hard: Mapping[Node, Hard]) -> Value | None:
        """What a node is, if it is a known number or another tensor."""
        through = hard[node].straight_through if node in hard else None
        if through is not None and isinstance(value := self.at(through), Known):
            return value
        name = operator_name(node)
        args = [_number(self.at(arg)) for arg in node.args]
        first = args[0] if args else None
        if name in VIEWS:
            return first if isinstance(first, Known) else None
        rule = _RULES.get(name)
        if rule is not None:
            found = rule(node, args)
            return found if isinstance(found, Known) or _fits(found, node) else None
        if name in ("cat", "stack"):
            return Known.ZERO if all(self.at(part) is Known.ZERO for part in node.all_input_nodes) else None
        if name in _ZERO_FROM_FIRST:
            return Known.ZERO if first is Known.ZERO else None
        if name in ("clamp", "hardtanh"):
            low, high = ([*args[1:3], None, None])[:2]
            inside = all(bound in (None, Known.ZERO) or _sign(bound) == sign for bound, sign in ((low, -1), (high, 1)))
            return Known.ZERO if first is Known.ZERO and inside else None
        if name in _COMPARE and isinstance(first, Known) and len(args) == 2:
            other = args[1].value if isinstance(args[1], Known) else args[1]
            if isinstance(other, int | float):
                return Known.ONE if _COMPARE[name](first.value, other) else Known.ZERO
        return None


def _number(value: Any) -> Any:
    """Numbers 0 and 1 as what they are known to be."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return Known(int(value))
    return value


def _sign(value: Any) -> int:
    number = value.value if isinstance(value, Known) else value
    return int(math.copysign(1, number)) if isinstance(number, int | float) and number else 0


def _fits(value: Any, node: Node) -> bool:
    """Whether another tensor can stand for a node: same shape, same dtype."""
    if not isinstance(value, Node):
        return False
    one, two = value.meta.get("val"), node.meta.get("val")
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.dtype != two.dtype or one.ndim != two.ndim:
        return False
    return all(str(a) == str(b) for a, b in zip(one.shape, two.shape, strict=True))


def _mul(node: Node, args: Sequence[Any]) -> Any:
    if Known.ZERO in args[:2]:
        return Known.ZERO
    if Known.ONE in args[:2]:
        return args[1] if args[0] is Known.ONE else args[0]
    return None


def _add(node: Node, args: Sequence[Any]) -> Any:
    if node.kwargs.get("alpha", 1) != 1:
        return None
    if args[0] is Known.ZERO:
        return args[1]
    return args[0] if args[1] is Known.ZERO else None


def _sub(node: Node, args: Sequence[Any]) -> Any:
    if node.kwargs.get("alpha", 1) != 1:
        return None
    if args[1] is Known.ZERO:
        return args[0]
    return Known.ZERO if args[0] is Known.ONE and args[1] is Known.ONE else None


def _rsub(node: Node, args: Sequence[Any]) -> Any:
    return _sub(node, [args[1], args[0]])


def _where(node: Node, args: Sequence[Any]) -> Any:
    if isinstance(args[0], Known) and len(args) == 3:
        return args[1] if args[0] is Known.ONE else args[2]
    return None


def _masked_fill(node: Node, args: Sequence[Any]) -> Any:
    if isinstance(args[1], Known):
        return args[2] if args[1] is Known.ONE else args[0]
    return None


def _not(node: Node, args: Sequence[Any]) -> Any:
    return {Known.ZERO: Known.ONE, Known.ONE: Known.ZERO}.get(args[0])


def _and(node: Node, args: Sequence[Any]) -> Any:
    return _mul(node, args)


def _or(node: Node, args: Sequence[Any]) -> Any:
    if Known.ONE in args[:2]:
        return Known.ONE
    return _add(node, args)


def _product(node: Node, args: Sequence[Any]) -> Any:
    return Known.ZERO if Known.ZERO in args[:2] else None


def _affine(node: Node, args: Sequence[Any]) -> Any:
    """A convolution or linear layer without a bias."""
    bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
    return Known.ZERO if args[0] is Known.ZERO and bias is None else None


def _index_add(node: Node, args: Sequence[Any]) -> Any:
    return args[0] if args[3] is Known.ZERO else None


_RULES: dict[str, Callable[[Node, Sequence[Any]], Any]] = {
    "mul": _mul,
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "where": _where,
    "masked_fill": _masked_fill,
    "logical_not": _not,
    "bitwise_not": _not,
    "logical_and": _and,
    "bitwise_and": _and,
    "logical_or": _or,
    "bitwise_or": _or,
    "mm": _product,
    "bmm": _product,
    "matmul": _product,
    "conv2d": _affine,
    "conv1d": _affine,
    "convolution": _affine,
    "linear": _affine,
    "index_add": _index_add,
}
