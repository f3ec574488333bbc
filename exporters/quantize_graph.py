"""Which nodes of a stage's graph take lower precision, and which decide and stay in float; the same for every target.

Kinds of nodes have ONNX's names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["CARRIED", "WEIGHTED", "Graph", "Node"]

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators whose weights are worth 8 bits."""
CARRIED = frozenset({
    "Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "MaxPool", "Pad", "Relu", "Reshape",
    "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Operators that go on in 8 bits what came in 8 bits."""
_JOINING = frozenset({"Add", "Concat"})
_SAME = frozenset({"AveragePool", "Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators whose output has the scale of their input."""
_ACTIVATIONS = frozenset({"Clip", "Relu"})
"""Computed by the product before them, in its own rounding."""
_IMAGE = 4
"""Dimensions of what is added or joined in 8 bits: sums of vectors are cheap, and often the state of a gate."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator: a name that no other has, its kind, and the tensors it takes and makes."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Graph:
    """A stage's graph.

    Args:
        nodes: each after those whose outputs it takes.
        floats: dimensions of every tensor of floats, by name; constants are among them.
        constants: names of the tensors that are no activations.
        deciding: outputs that decide, by name.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        *,
        floats: Mapping[str, int],
        constants: Collection[str],
        deciding: Collection[str],
    ) -> None:
        self.nodes = nodes
        self._floats = floats
        self._constants = constants
        self._deciding = self._decided_by(deciding)

    def lowered(self, *, every: bool = False) -> frozenset[str]:
        """Names of the nodes that take lower precision: products with weights and what carries on; or all others."""
        chosen: set[str] = set()
        carried: set[str] = set()
        for node in self.nodes:
            if node.name in self._deciding:
                continue
            if every or self._has_weights(node) or self._carries(node, carried):
                chosen.add(node.name)
                carried.update(node.outputs)
        return frozenset(chosen)

    def others(self, chosen: Collection[str]) -> list[str]:
        """Names of the nodes that are not among these."""
        return [node.name for node in self.nodes if node.name not in chosen]

    def with_weights(self, chosen: Collection[str]) -> list[str]:
        """Names of those among these that have weights."""
        return [node.name for node in self._nodes(chosen) if self._has_weights(node)]

    def activations(self, chosen: Collection[str]) -> list[str]:
        """Floating tensors that these nodes take and make, constants aside."""
        names = (name for node in self._nodes(chosen) for name in (*node.inputs, *node.outputs))
        return [name for name in dict.fromkeys(names) if name in self._floats and name not in self._constants]

    def joined(self, chosen: Collection[str]) -> list[list[str]]:
        """Activations that are pieces of one another: what is concatenated, with what that is concatenated to next."""
        groups: list[set[str]] = []
        for node in self._nodes(chosen):
            if node.kind == "Concat":
                group = {*node.inputs, *node.outputs}
            elif node.kind in _SAME:
                group = {node.inputs[0], node.outputs[0]}
            else:
                continue
            touching = [other for other in groups if group & other]
            groups = [other for other in groups if other not in touching] + [group.union(*touching)]
        return [sorted(group) for group in groups]

    def _nodes(self, chosen: Collection[str]) -> Iterator[Node]:
        return (node for node in self.nodes if node.name in chosen)

    def _has_weights(self, node: Node) -> bool:
        if node.kind not in WEIGHTED or len(node.inputs) < 2:
            return False
        return node.inputs[1] in self._constants and node.inputs[1] in self._floats

    def _carries(self, node: Node, carried: Collection[str]) -> bool:
        if node.kind not in CARRIED or node.outputs[0] not in self._floats:
            return False
        inputs = node.inputs if node.kind in _JOINING else node.inputs[:1]
        if node.kind in _JOINING and any(
            name in self._constants or self._floats.get(name) != _IMAGE for name in node.inputs
        ):
            return False
        return any(name in carried for name in inputs)

    def _decided_by(self, outputs: Collection[str]) -> frozenset[str]:
        """Nodes from these outputs back to the last product with weights, it included, and pooling before it."""
        producer = {name: node for node in self.nodes for name in node.outputs}
        found: set[str] = set()
        waiting = [(name, False) for name in outputs]
        while waiting:
            name, passed = waiting.pop()
            node = producer.get(name)
            if node is None or node.name in found:
                continue
            if passed and (self._has_weights(node) or node.kind in _ACTIVATIONS or node.kind in _JOINING):
                continue
            found.add(node.name)
            waiting += [(before, passed or self._has_weights(node)) for before in node.inputs]
        return frozenset(found)
