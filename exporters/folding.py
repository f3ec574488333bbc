"""What a network computes from its weights alone, computed once: weights that are normalised or standardised, masks.

A device would compute it in every run, and neither a quantiser nor a kernel takes a weight that is not there yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from edgekit.exporters.capture import Captured
from edgekit.exporters.graph import ancestors
from edgekit.exporters.hard import VIEWS, operator_name

__all__ = ["Folding", "weight_of"]

MORE_BYTES = 1 << 20
"""That a result may have beyond the weights it is made of: an outer product stays one."""


def weight_of(captured: Captured, node: Node) -> tuple[str, Tensor] | None:
    """A weight or constant that a placeholder of the captured graph stands for, and its name; ``None`` for others."""
    program, signature = captured.program, captured.program.graph_signature
    for table in (
        signature.inputs_to_parameters,
        signature.inputs_to_buffers,
        signature.inputs_to_lifted_tensor_constants,
    ):
        if node.name in table:
            target = table[node.name]
            return target, program.state_dict[target] if target in program.state_dict else program.constants[target]
    return None


class Folding:
    """Values of nodes that no input reaches. Nodes that compute the same from the same weights have one tensor.

    Args:
        captured: the graph, with its weights.
    """

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self._numbers: dict[str, int] = {}
        self._values: dict[int, Tensor] = {}

    def value(self, node: Node) -> Tensor | None:
        """What a node is, where that is worth keeping: it is computed, not only moved, and from weights.

        Args:
            node: that depends on no input.
        """
        value, found = node.meta.get("val"), ancestors([node])
        if not isinstance(value, Tensor) or any(map(_sized, found)):
            return None
        weights = [weight_of(self.captured, each) for each in found if each.op == "placeholder"]
        operators = [each for each in found if each.op == "call_function"]
        if not weights or None in weights or all(operator_name(each) in VIEWS for each in operators):
            return None
        given = {each[0]: each[1].nbytes for each in weights if each is not None}
        if value.numel() * value.element_size() > sum(given.values()) + MORE_BYTES:
            return None
        number = self._number(node)
        if number not in self._values:
            with torch.no_grad():
                self._values[number] = self._computed(node, {}).detach().contiguous()
        return self._values[number]

    def _number(self, node: Node) -> int:
        """The same for all nodes that compute the same."""
        weight = weight_of(self.captured, node) if node.op == "placeholder" else None
        told = (
            ("weight", weight[0])
            if weight is not None
            else (str(node.target), map_arg(node.args, self._name), map_arg(node.kwargs, self._name))
        )
        return self._numbers.setdefault(repr(told), len(self._numbers))

    def _name(self, node: Node) -> str:
        return f"node {self._number(node)}"

    def _computed(self, node: Node, known: dict[Node, Any]) -> Any:
        def value(source: Node) -> Any:
            return self._computed(source, known)

        if node not in known:
            weight = weight_of(self.captured, node) if node.op == "placeholder" else None
            if weight is not None:
                known[node] = weight[1]
            else:
                assert callable(node.target)
                known[node] = node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))
        return known[node]


def _sized(node: Node) -> bool:
    """Whether a node is a size or has one that depends on the batch."""
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else (value,)
    return any(
        isinstance(part, torch.SymInt)
        or (isinstance(part, Tensor) and any(isinstance(size, torch.SymInt) for size in part.shape))
        for part in parts
    )
