"""Builds a stage's module: nodes of the captured graph copied into a graph of their own."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from edgekit.errors import PartitionError
from edgekit.exporters.capture import Captured
from edgekit.exporters.folding import Folding
from edgekit.exporters.graph import batch_dimension, weight_of
from edgekit.exporters.simplify import Known, View

__all__ = ["Builder", "unused"]


class Builder:
    """Copies nodes of the captured graph into a module of their own, with the weights and sizes they use.

    Args:
        captured: the graph, with its weights.
        view: the graph as it is at this level.
        inputs: nodes that the module takes as its inputs.
        constants: placeholders of gates' constants, which become inputs after all others where they are read.
        folding: of what is computed from weights alone.

    Attributes:
        read: the constants that were read, in the order of the inputs that they became.
    """

    def __init__(
        self,
        captured: Captured,
        view: View,
        inputs: Sequence[Node],
        constants: Collection[Node],
        folding: Folding,
    ) -> None:
        self.captured = captured
        self.folding = folding
        self.view = view
        self.constants = constants
        self.read: list[Node] = []
        self.graph = Graph()
        self.root = nn.Module()
        self.copies: dict[Node, Node] = {}
        self.sized: dict[Any, Node] = {}
        self.weights: dict[str | int, str] = {}
        self.placeholders = [(node, self.graph.placeholder(node.name)) for node in inputs]
        for node, copy in self.placeholders:
            copy.meta = dict(node.meta)
            self.copies[node] = self._swapped(node, copy)

    def build(self, nodes: Sequence[Node], outputs: Sequence[Node], name: str) -> GraphModule:
        """The module, in evaluation mode, after which a builder is done.

        Args:
            nodes: to copy, in an order in which each comes after what it reads.
            outputs: of these, what the module returns.
            name: its class's name is made of this.
        """
        for node in nodes:
            self._copy(node)
        self.graph.output(tuple(self._swapped(node, self.copies[node]) for node in outputs))
        module = GraphModule(self.root, self.graph, class_name="".join(c if c.isalnum() else "_" for c in name))
        module.eval()
        return module

    def _swapped(self, node: Node, copy: Node) -> Node:
        """A tensor crosses with the batch as dimension 0; a recurrent layer's state has it elsewhere."""
        batch = batch_dimension(node, self.captured.rows)
        return copy if not batch else self.graph.call_function(torch.ops.aten.transpose.int, (copy, 0, batch))

    def _copy(self, node: Node) -> Node:
        if node in self.copies:
            return self.copies[node]
        value = node.meta.get("val")
        seen = self.view.at(node)
        if seen is not node:
            made = self._copy(seen) if isinstance(seen, Node) else self._filled(node, seen)
            self.copies[node] = made
            return made
        if node in self.constants:
            made = self._constant(node)
        elif node.op == "placeholder":
            made = self._weight(node)
        elif isinstance(value, torch.SymInt):
            made = self._size(value)
        elif node not in self.view.dynamic and (folded := self.folding.value(node)) is not None:
            number, tensor = folded
            made = self._kept(node, number, f"folded_{node.name}", tensor)
        else:
            for source in node.all_input_nodes:
                self._copy(source)
            made = self.graph.node_copy(node, lambda source: self.copies[source])
        self.copies[node] = made
        return made

    def _filled(self, node: Node, known: Known) -> Node:
        """A tensor that is known to be one number everywhere."""
        value = node.meta["val"]
        shape = [self._size(size) if isinstance(size, torch.SymInt) else size for size in value.shape]
        made = self.graph.call_function(torch.ops.aten.full.default, (shape, known.value), {"dtype": value.dtype})
        made.meta = {key: value for key, value in node.meta.items() if key != "original_aten"}
        return made

    def _constant(self, node: Node) -> Node:
        """A constant of gates is an input, after all others."""
        last = [each for each in self.graph.nodes if each.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            made = self.graph.placeholder(node.name)
        made.meta = dict(node.meta)
        self.read.append(node)
        return made

    def _weight(self, node: Node) -> Node:
        weight = weight_of(self.captured.program, node)
        if weight is None:
            raise PartitionError(f"input '{node.name}' is read by a stage but is not a tensor of the network")
        name, tensor = weight
        return self._kept(node, name, name, tensor)

    def _kept(self, node: Node, origin: str | int, wish: str, tensor: Tensor) -> Node:
        """A tensor of the module's own, of the weight or the number that it is of; one for each."""
        if origin not in self.weights:
            self.weights[origin] = unused(wish.replace(".", "_"), self.weights.values())
            self.root.register_buffer(self.weights[origin], tensor.detach())
        made = self.graph.get_attr(self.weights[origin])
        made.meta = dict(node.meta)
        return made

    def _size(self, value: torch.SymInt) -> Node:
        """A size that depends on the batch, read off an input of this stage."""
        expression = value.node.expr
        if expression not in self.sized:
            rows = self.captured.inputs[0].meta["val"].shape[0].node.expr
            if rows not in self.sized:
                self.sized[rows] = self.graph.call_function(torch.ops.aten.sym_size.int, (self.placeholders[0][1], 0))
            factor = expression / rows
            if expression != rows:
                if not factor.is_Integer:
                    raise PartitionError(f"size {expression} is no multiple of the batch: edgekit cannot move it")
                self.sized[expression] = self.graph.call_function(operator.mul, (self.sized[rows], int(factor)))
        return self.sized[expression]


def unused(wish: str, taken: Collection[str]) -> str:
    """A name that is not taken yet and fit for a file."""
    wish = re.sub(r"[^\w.-]", "_", wish)
    numbered = (f"{wish}_{number}" for number in itertools.count(2))
    return wish if wish not in taken else next(name for name in numbered if name not in taken)
