"""What a network computes from its weights alone, computed once: weights that are normalised or standardised.

A device would compute it in every run, and neither a quantiser nor a kernel takes a weight that is not there yet. What
only moves a weight, as a transposition does, stays as it is, so that the weight is kept once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from edgekit.exporters.capture import Captured
from edgekit.exporters.graph import ancestors, weight_of
from edgekit.exporters.hard import VIEWS, operator_name

__all__ = ["Folding"]

MORE_BYTES = 1 << 20
"""That a result may have beyond the weights it is made of: an outer product stays one."""
LARGEST_BYTES = 1 << 28
"""That a result on the way may have beyond them."""


class Folding:
    """Values of nodes that no input reaches. Nodes that compute the same from the same weights have one tensor.

    Args:
        captured: the graph, with its weights.
    """

    def __init__(self, captured: Captured) -> None:
        self.program = captured.program
        self._order = {node: place for place, node in enumerate(self.program.graph.nodes)}
        self._numbers: dict[Node, int] = {}
        self._known: dict[str, int] = {}
        self._values: dict[int, Tensor] = {}
        weights = self.program.state_dict.values()
        self._room = sum(each.nbytes for each in weights if isinstance(each, Tensor)) + MORE_BYTES

    def value(self, node: Node) -> tuple[int, Tensor] | None:
        """What a node is, and a number for it, where that is worth keeping: it is computed, not only moved.

        Nothing is kept that is larger than its weights by more than :data:`MORE_BYTES`, and of all no more than the
        network has weights.

        Args:
            node: that depends on no input.
        """
        found = sorted(ancestors([node]), key=self._order.__getitem__)
        if not isinstance(node.meta.get("val"), Tensor) or any(map(_sized, found)):
            return None
        weights = {each: weight_of(self.program, each) for each in found if each.op == "placeholder"}
        operators = [each for each in found if each.op == "call_function"]
        if not weights or None in weights.values() or all(operator_name(each) in VIEWS for each in operators):
            return None
        given = {each[0]: each[1] for each in weights.values() if each is not None}
        size, most = _bytes(node), sum(tensor.nbytes for tensor in given.values()) + MORE_BYTES
        if size > most or max(map(_bytes, operators)) > most + LARGEST_BYTES:
            return None
        number = [self._number(each) for each in found][-1]
        if number not in self._values:
            if size > self._room:
                return None
            self._room -= size
            self._values[number] = self._computed(found)
        return number, self._values[number]

    def _number(self, node: Node) -> int:
        """The same for all nodes that compute the same; those it is computed from have theirs."""
        if node not in self._numbers:
            weight = weight_of(self.program, node) if node.op == "placeholder" else None
            told = (
                ("weight", weight[0])
                if weight is not None
                else (str(node.target), map_arg(node.args, self._name), map_arg(node.kwargs, self._name))
            )
            self._numbers[node] = self._known.setdefault(repr(told), len(self._known))
        return self._numbers[node]

    def _name(self, node: Node) -> str:
        return f"node {self._numbers[node]}"

    def _computed(self, nodes: Sequence[Node]) -> Tensor:
        """The last of some nodes, each of which comes after what it reads."""
        values: dict[Node, Any] = {}
        with torch.no_grad():
            for node in nodes:
                weight = weight_of(self.program, node) if node.op == "placeholder" else None
                if weight is not None:
                    values[node] = weight[1]
                else:
                    assert callable(node.target)
                    args, kwargs = map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)
                    values[node] = node.target(*args, **kwargs)
            # A copy, lest a small part keep the whole that it was taken from.
            return values[nodes[-1]].detach().clone(memory_format=torch.contiguous_format)


def _bytes(node: Node) -> int:
    return sum(part.numel() * part.element_size() for part in _made(node) if isinstance(part, Tensor))


def _sized(node: Node) -> bool:
    """Whether a node is a size or has one that depends on the batch."""
    sizes = [size for part in _made(node) for size in (part.shape if isinstance(part, Tensor) else (part,))]
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _made(node: Node) -> Sequence[Any]:
    """What a node makes: some operators make several tensors."""
    value = node.meta.get("val")
    return value if isinstance(value, tuple | list) else (value,)
