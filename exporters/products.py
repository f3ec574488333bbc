"""Products and selections as published, brought to the form in which gates are found.

``addcmul``, ``lerp`` and ``einsum`` hide a product in an operator of their own. A selection of one of several results
by its number (``torch.stack(results, 1)[rows, choice]``, ``gather``) is a sum of those results, each where it is
chosen. A product with stacked results that sums over them (``(torch.stack(results, 1) * weights).sum(1)``, ``einsum``,
``bmm``) is a sum of products.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgekit.exporters.hard import operator_name, stripped
from edgekit.exporters.rewrite import made_before, total

__all__ = ["plain_numbers", "plain_products", "stacked_parts"]

aten = torch.ops.aten


def plain_numbers(program: ExportedProgram) -> None:
    """``torch.tensor(0.0)`` in a forward as a number in the graph."""
    constants = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in list(program.graph.nodes):
        value = program.constants.get(constants.get(node.name, "")) if node.op == "placeholder" else None
        if not isinstance(value, torch.Tensor) or value.ndim:
            continue
        for user in list(node.users):
            if operator_name(user) in ("lift_fresh_copy", "clone", "detach", "alias"):
                user.target, user.args, user.kwargs = aten.full.default, ([], value.item()), {"dtype": value.dtype}


def plain_products(program: ExportedProgram) -> bool:
    """Rewrite products and selections, in place. Returns whether there were any."""
    made = False
    for node in list(program.graph.nodes):
        rule = _RULES.get(operator_name(node))
        found = rule(program, node) if rule is not None else None
        if found is not None:
            node.replace_all_uses_with(found)
            made = True
    return made


def stacked_parts(node: Any) -> tuple[list[Node], int] | None:
    """The tensors that are stacked, and along which dimension; also in the form ``cat([x.unsqueeze(1), …], 1)``."""
    node = stripped(node)
    if not isinstance(node, Node) or operator_name(node) not in ("stack", "cat"):
        return None
    parts: list[Any] = [stripped(part) for part in node.args[0]]  # type: ignore[union-attr]
    rank = node.meta["val"].ndim
    dim = int(node.args[1] if len(node.args) > 1 else 0) % rank  # type: ignore[arg-type]
    if operator_name(node) == "stack":
        return parts, dim
    if any(operator_name(part) != "unsqueeze" or part.args[1] % rank != dim for part in parts):
        return None
    return [part.args[0] for part in parts], dim


def _addcmul(program: ExportedProgram, node: Node) -> Node:
    """``x + value * a * b``."""
    x, one, two = node.args[:3]
    product = made_before(program, node, aten.mul.Tensor, one, two)
    if node.kwargs.get("value", 1) != 1:
        product = made_before(program, node, aten.mul.Tensor, product, node.kwargs["value"])
    return made_before(program, node, aten.add.Tensor, x, product)


def _lerp(program: ExportedProgram, node: Node) -> Node | None:
    """``(1 - weight) * x + weight * y``."""
    x, y, weight = node.args[:3]
    if not isinstance(weight, Node):
        return None
    rest = made_before(program, node, aten.rsub.Scalar, weight, 1)
    pairs = ((weight, y), (rest, x))
    return total(program, node, [made_before(program, node, aten.mul.Tensor, *pair) for pair in pairs])


@dataclass(frozen=True)
class _Factor:
    """A factor of a product whose dimensions have letters."""

    node: Node
    letters: str

    def select(self, program: ExportedProgram, at: Node, letter: str, place: int) -> _Factor:
        made = made_before(program, at, aten.select.int, self.node, self.letters.index(letter), place)
        return _Factor(made, self.letters.replace(letter, ""))

    def spread(self, program: ExportedProgram, at: Node, letters: str) -> Node:
        """The tensor with dimensions in this order, of size 1 where it has none."""
        order = [self.letters.index(letter) for letter in letters if letter in self.letters]
        made = self.node
        if order != sorted(order):
            made = made_before(program, at, aten.permute.default, made, order)
        for place, letter in enumerate(letters):
            if letter not in self.letters:
                made = made_before(program, at, aten.unsqueeze.default, made, place)
        return made


def _einsum(program: ExportedProgram, node: Node) -> Node | None:
    given: Any = node.args
    terms = re.fullmatch(r"(\w+),(\w+)->(\w*)", given[0].replace(" ", ""))
    if terms is None or any(len(set(term)) != len(term) for term in terms.groups()):
        return None
    one, two = (_Factor(operand, term) for operand, term in zip(given[1], terms.groups()[:2], strict=True))
    return _letter_product(program, node, one, two, terms[3])


def _matmul(program: ExportedProgram, node: Node) -> Node | None:
    """A row of weights times stacked results."""
    one, two = map(_Factor, cast("tuple[Node, Node]", node.args[:2]), ("nij", "njk"))
    if any(factor.node.meta["val"].ndim != 3 for factor in (one, two)):
        return None
    is_row = any(map(_is_one, node.meta["val"].shape[1:]))
    return _letter_product(program, node, one, two, "nik", sums=True) if is_row else None


def _letter_product(
    program: ExportedProgram, node: Node, one: _Factor, two: _Factor, letters: str, *, sums: bool = False
) -> Node | None:
    """A product by letters, if it sums over nothing but stacked results."""
    summed = (set(one.letters) | set(two.letters)) - set(letters)
    if not summed and not sums:
        return made_before(
            program, node, aten.mul.Tensor, *(factor.spread(program, node, letters) for factor in (one, two))
        )
    for stack, weights in ((two, one), (one, two)):
        found = stacked_parts(stack.node)
        if found is None or summed != {stack.letters[found[1]]} or not summed <= set(weights.letters):
            continue
        (letter,) = summed
        products = []
        for place, part in enumerate(found[0]):
            pair = (
                weights.select(program, node, letter, place),
                _Factor(part, stack.letters.replace(letter, "")),
            )
            spread = [factor.spread(program, node, letters) for factor in pair]
            products.append(made_before(program, node, aten.mul.Tensor, *spread))
        return total(program, node, products)
    return None


@dataclass(frozen=True)
class _Selection:
    """Some of several results, by their numbers, as ``gather`` has it.

    Attributes:
        parts: the results.
        dim: along which they are selected.
        index: numbers, with one for each sample and each that is selected, and as many dimensions as the stack.
    """

    parts: Sequence[Node]
    dim: int
    index: Node

    def chosen(self, program: ExportedProgram, at: Node, place: int) -> Node:
        """Where a result is chosen, in the shape of the index."""
        source: Any = self.index
        while operator_name(source) in ("view", "unsqueeze", "expand"):
            source = source.args[0]
        same = made_before(program, at, aten.eq.Scalar, source, place)
        shape = [size if isinstance(size, int) else -1 for size in self.index.meta["val"].shape]
        return made_before(program, at, aten.view.default, same, shape)


def _selection(program: ExportedProgram, node: Node) -> _Selection | None:
    """What ``gather``, or an index as ``[arange, choice]``, selects of stacked results."""
    found = stacked_parts(node.args[0]) if operator_name(node) in ("gather", "index") else None
    if found is None:
        return None
    parts, dim = found
    given: Any = node.args
    whole, value = given[0].meta["val"], node.meta["val"]
    if operator_name(node) == "gather":
        index = stripped(given[2])
        if operator_name(index) not in ("expand", "repeat") or given[1] % whole.ndim != dim:
            return None
        index = index.args[0]
        wide = [size for place, size in enumerate(index.meta["val"].shape) if place != dim and not _is_one(size)]
        others = [place for place in range(whole.ndim) if place != dim]
        same = index.meta["val"].ndim == whole.ndim and all(_equal(whole, value, place) for place in others)
        return _Selection(parts, dim, index) if same and len(wide) <= 1 else None
    indices = given[1]
    if len(indices) != 2 or dim > 1 or None in indices:
        return None
    rows, choice = _arange(indices[1 - dim]), indices[dim]
    known = choice.meta["val"]
    if rows is None or known.dtype == torch.bool or known.ndim not in (1, 2) or str(rows) != str(known.shape[0]):
        return None
    # An index may count from the end.
    choice = made_before(program, node, aten.remainder.Scalar, choice, len(parts)) if not _is_ranked(choice) else choice
    shape = [-1, known.shape[1] if known.ndim == 2 else 1] + [1] * (whole.ndim - 2)
    return _Selection(parts, 1, made_before(program, node, aten.view.default, choice, shape))


def _is_ranked(choice: Node) -> bool:
    """Whether numbers come from an argmax or a top-k, and so from zero upwards."""
    node: Any = stripped(choice)
    if operator_name(node) == "getitem":
        node = node.args[0]
    return operator_name(node) in ("argmax", "argmin", "max", "min", "topk", "sort")


def _equal(one: torch.Tensor, two: torch.Tensor, place: int) -> bool:
    """Compared as expressions: comparing sizes themselves could need the values of the data."""
    return str(one.shape[place]) == str(two.shape[place])


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _arange(node: Any) -> Any:
    """How many numbers from zero upwards this counts, as one column."""
    node = stripped(node)
    while operator_name(node) in ("unsqueeze", "view"):
        node = stripped(node.args[0])
    return node.meta["val"].shape[0] if operator_name(node) == "arange" and len(node.args) == 1 else None


def _selected(program: ExportedProgram, node: Node) -> Node | None:
    """One of several results: the sum of all, each where it is chosen."""
    found = _selection(program, node)
    if found is None or not _is_one(found.index.meta["val"].shape[found.dim]):
        return None
    kept = node.meta["val"].ndim > found.parts[0].meta["val"].ndim
    terms = []
    for place, part in enumerate(found.parts):
        chosen = found.chosen(program, node, place)
        if kept:
            part = made_before(program, node, aten.unsqueeze.default, part, found.dim)
        else:
            chosen = made_before(program, node, aten.squeeze.dim, chosen, found.dim)
        zero = made_before(program, node, aten.zeros_like.default, part)
        terms.append(made_before(program, node, aten.where.self, chosen, part, zero))
    return total(program, node, terms)


def _weighted_sum(program: ExportedProgram, node: Node) -> Node | None:
    """``(stack(parts, d) * weights).sum(d)``, or of a selection of the parts, as a sum of products."""
    dims: Any = node.args[1] if len(node.args) > 1 else None
    product = stripped(node.args[0])
    if not isinstance(dims, list | tuple) or len(dims) != 1 or len(node.args) > 2 or operator_name(product) != "mul":
        return None
    dim = dims[0] % product.meta["val"].ndim
    for one, weights in (product.args[:2], product.args[1::-1]):
        if not isinstance(weights, Node) or not isinstance(one, Node):
            continue
        parts, each = _weights(program, node, stripped(one), weights, dim)
        if parts:
            pairs = zip(each, parts, strict=True)
            return total(program, node, [made_before(program, node, aten.mul.Tensor, *pair) for pair in pairs])
    return None


def _weights(
    program: ExportedProgram, at: Node, one: Node, weights: Node, dim: int
) -> tuple[Sequence[Node], Sequence[Node]]:
    """The parts of a stack or of a selection, and the weight of each."""
    known = weights.meta["val"]
    if known.ndim != one.meta["val"].ndim:
        return (), ()
    stack = stacked_parts(one)
    if stack is not None and stack[1] == dim and known.shape[dim] == len(stack[0]):
        places = range(len(stack[0]))
        return stack[0], [made_before(program, at, aten.select.int, weights, dim, place) for place in places]
    chosen = _selection(program, one)
    if chosen is None or chosen.dim != dim or str(known.shape) != str(chosen.index.meta["val"].shape):
        return (), ()
    each = []
    for place in range(len(chosen.parts)):
        weight = made_before(program, at, aten.mul.Tensor, weights, chosen.chosen(program, at, place))
        each.append(made_before(program, at, aten.sum.dim_IntList, weight, [dim]))
    return chosen.parts, each


_RULES: dict[str, Callable[[ExportedProgram, Node], Node | None]] = {
    "addcmul": _addcmul,
    "lerp": _lerp,
    "einsum": _einsum,
    "bmm": _matmul,
    "matmul": _matmul,
    "gather": _selected,
    "index": _selected,
    "sum": _weighted_sum,
}
