"""Cuts a graph at its exits: stage k is what exit k needs and no earlier exit has computed.

Where a boundary has slack it lies on the cheapest cut: a minimum cut over the bytes that cross, in which cheap
operators may be computed again on the far side instead of carrying their result (as rematerialisation does in
training, Chen et al. 2016, arXiv 1604.06174; the min-cut form is that of functorch's partitioner).
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from edgekit.errors import PartitionError
from edgekit.exporters.capture import Captured
from edgekit.exporters.decisions import ExitPoint
from edgekit.exporters.graph import ancestors
from edgekit.tensors import BATCH

__all__ = ["Cut", "partition"]

RECOMPUTE_WEIGHT = 0.25
"""Cost of computing one byte of a cheap result again, against carrying it across a boundary."""

# fmt: off
_CHEAP = frozenset({
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice",
    "select", "narrow", "split", "split_with_sizes", "chunk", "cat", "stack", "clone", "alias", "contiguous", "detach",
    "lift_fresh_copy", "_unsafe_view", "_to_copy", "relu", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid",
    "clamp", "neg", "add", "sub", "mul", "div",
})
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One stage as a module.

    Attributes:
        name: unique, after the module path that most of its work comes from.
        module_path: that path.
        module: takes ``inputs`` and returns ``outputs`` then the exit's logits, as a tuple.
        inputs: nodes of the captured graph that it reads, network inputs among them.
        outputs: nodes that later stages read.
        point: the exit that it ends in.
        macs: for one sample; ``None`` when uncounted.
    """

    name: str
    module_path: str
    module: GraphModule
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    point: ExitPoint
    macs: int | None


def partition(captured: Captured, exits: Sequence[ExitPoint], macs: Mapping[Node, int] | None) -> tuple[Cut, ...]:
    """One cut per exit, in order.

    Raises:
        PartitionError: a tensor without the batch as dimension 0 would have to cross a boundary.
    """
    return _Partition(captured, exits, macs).cuts()


class _Partition:
    def __init__(self, captured: Captured, exits: Sequence[ExitPoint], macs: Mapping[Node, int] | None) -> None:
        self.captured = captured
        self.exits = exits
        self.macs = macs
        self.order = {node: position for position, node in enumerate(captured.program.graph.nodes)}
        self.inputs = set(captured.inputs)
        self.exit_nodes = {point.node: index for index, point in enumerate(exits)}
        self.dynamic = self._depends_on_inputs()
        self.stage = self._earliest()
        for point in exits:
            if point.node not in self.dynamic:
                raise PartitionError(f"exit '{point.name}' does not depend on the input: it is no decision")

    def cuts(self) -> tuple[Cut, ...]:
        live: set[Node] = set(self.inputs)
        names: set[str] = set()
        cuts = []
        for index, point in enumerate(self.exits):
            carried = self._boundary(index, live)
            made = sorted(carried - live, key=self.order.__getitem__)
            body = self._body([*made, point.node], live)
            inputs = sorted((node for node in body if node in live), key=self.order.__getitem__)
            path = self._module_path(body, index, point)
            name = _unused(path or f"stage{index + 1}", names)
            names.add(name)
            cuts.append(
                Cut(
                    name=name,
                    module_path=path,
                    module=self._module(body, inputs, [*made, point.node], name),
                    inputs=tuple(inputs),
                    outputs=tuple(made),
                    point=point,
                    macs=None if self.macs is None else sum(self.macs.get(node, 0) for node in body - live),
                )
            )
            live = carried
        return tuple(cuts)

    def _earliest(self) -> dict[Node, int]:
        """The first stage that needs each node; the network's inputs are there from the start."""
        stage = dict.fromkeys(self.inputs, 0)
        for index, point in enumerate(self.exits):
            for node in ancestors([point.node]):
                stage.setdefault(node, index)
        for node in self.order:
            # What can be read of something that cannot cross is read at once, as the parts of a tuple.
            sources = self._sources(node)
            readable = node.target is operator.getitem or self._cheap(node)
            if node in stage and readable and len(sources) == 1 and not self._carriable(sources[0]):
                stage[node] = stage[sources[0]]
        return stage

    def _depends_on_inputs(self) -> set[Node]:
        """Tensors that are computed from the network's inputs; the rest is constant, and copied where it is used."""
        found: set[Node] = set(self.inputs)
        for node in self.order:
            sized = isinstance(node.meta.get("val"), (torch.SymInt, int, float, bool))
            if not sized and any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def _sources(self, node: Node) -> list[Node]:
        """The tensors that a node reads and that differ from run to run."""
        return [source for source in node.all_input_nodes if source in self.dynamic]

    def _boundary(self, index: int, live: set[Node]) -> set[Node]:
        """What crosses from stages up to ``index`` to later ones, of all that is alive or was just computed."""
        needed = [
            node
            for node in self.dynamic
            if self.stage.get(node, math.inf) <= index and self._is_read_after(node, index)
        ]
        if not needed:
            return set()
        network = networkx.DiGraph()
        waiting, seen = list(needed), set()
        for node in needed:
            network.add_edge((node, "out"), "sink")
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            self._add(network, node, given=node in live, index=index)
            if node not in live and self._cheap(node):
                sources = self._sources(node)
                network.add_edges_from(((source, "out"), (node, "in")) for source in sources)
                waiting.extend(sources)
        value, (near, _) = networkx.minimum_cut(network, "source", "sink")
        if value >= _UNCARRIED:
            stuck = next(node for node in needed if not self._carriable(node))
            shape = tuple(getattr(stuck.meta["val"], "shape", ()))
            raise PartitionError(
                f"tensor '{stuck.name}' {shape} is needed after exit "
                f"'{self.exits[index].name}' but does not have the batch as dimension 0, so rows cannot leave there"
            )
        return {node for node in seen if (node, "in") in near and (node, "out") not in near}

    def _is_read_after(self, node: Node, index: int) -> bool:
        """Whether a later stage reads a tensor's values, or ends in it. Reading its size alone does not count."""
        readers = (user for user in node.users if not isinstance(user.meta.get("val"), (torch.SymInt, int)))
        return self.exit_nodes.get(node, -1) > index or any(self.stage.get(user, -1) > index for user in readers)

    def _add(self, network: networkx.DiGraph, node: Node, *, given: bool, index: int) -> None:
        size = _row_bytes(node) if self._carriable(node) else 0
        network.add_edge((node, "in"), (node, "out"), capacity=size if self._carriable(node) else _UNCARRIED)
        if given or not self._cheap(node):
            network.add_edge("source", (node, "in"))
        else:
            network.add_edge("source", (node, "in"), capacity=RECOMPUTE_WEIGHT * size)

    def _carriable(self, node: Node) -> bool:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim == 0:
            return False
        if self.captured.batch != BATCH:
            return len(value) == 1
        if any(isinstance(size, torch.SymInt) for size in value.shape[1:]):
            return False
        # Compared as expressions: comparing the sizes themselves could need the values of the data.
        rows = self.captured.inputs[0].meta["val"].shape[0]
        return _expression(value.shape[0]) == _expression(rows)

    def _cheap(self, node: Node) -> bool:
        if node.op != "call_function":
            return False
        if node.target is operator.getitem:
            return self._cheap(node.all_input_nodes[0])
        return isinstance(node.target, torch._ops.OpOverload) and node.target._opname in _CHEAP

    def _body(self, targets: Sequence[Node], live: set[Node]) -> set[Node]:
        """Every node that a stage holds, the live tensors it reads included; constants and sizes follow later."""
        return ancestors(targets, stop=lambda node: node in live, sources=self._sources)

    def _module_path(self, body: set[Node], index: int, point: ExitPoint) -> str:
        """The deepest module that more than half of the stage's trunk comes from, its exit head left aside."""
        own = [node for node in body if self.stage.get(node) == index and node.op == "call_function"]
        leads_on = ancestors([node for node in own if self._is_read_after(node, index)])
        nodes = [node for node in own if node in leads_on] or own
        weight = {node: (self.macs or {}).get(node, 0) + 1e-6 for node in nodes}
        path = ""
        while True:
            shares: Counter[str] = Counter()
            for node in nodes:
                child = _child_path(node, path)
                if child:
                    shares[child] += weight[node]  # type: ignore[assignment]
            if not shares:
                return path
            best, share = shares.most_common(1)[0]
            if share <= 0.5 * sum(weight.values()):
                return path
            path = best

    def _module(self, body: set[Node], inputs: Sequence[Node], outputs: Sequence[Node], name: str) -> GraphModule:
        return _Builder(self.captured, inputs).build(sorted(body, key=self.order.__getitem__), outputs, name)


_UNCARRIED = 2.0**60
"""Capacity of a tensor that must not cross: more than any sum of real sizes."""


class _Builder:
    """Copies nodes of the captured graph into a module of their own, with the weights and sizes they use."""

    def __init__(self, captured: Captured, inputs: Sequence[Node]) -> None:
        self.captured = captured
        self.graph = Graph()
        self.root = nn.Module()
        self.copies: dict[Node, Node] = {}
        self.sized: dict[Any, Node] = {}
        self.weights: dict[str, str] = {}
        self.placeholders = [(node, self.graph.placeholder(node.name)) for node in inputs]
        for node, copy in self.placeholders:
            copy.meta = dict(node.meta)
            self.copies[node] = copy

    def build(self, nodes: Sequence[Node], outputs: Sequence[Node], name: str) -> GraphModule:
        for node in nodes:
            self._copy(node)
        self.graph.output(tuple(self.copies[node] for node in outputs))
        module = GraphModule(self.root, self.graph, class_name="".join(c if c.isalnum() else "_" for c in name))
        module.eval()
        return module

    def _copy(self, node: Node) -> Node:
        if node in self.copies:
            return self.copies[node]
        value = node.meta.get("val")
        if node.op == "placeholder":
            made = self._weight(node)
        elif isinstance(value, torch.SymInt):
            made = self._size(value)
        else:
            for source in node.all_input_nodes:
                self._copy(source)
            made = self.graph.node_copy(node, lambda source: self.copies[source])
        self.copies[node] = made
        return made

    def _weight(self, node: Node) -> Node:
        signature = self.captured.program.graph_signature
        for table in (
            signature.inputs_to_parameters,
            signature.inputs_to_buffers,
            signature.inputs_to_lifted_tensor_constants,
        ):
            if node.name in table:
                target = table[node.name]
                break
        else:
            raise PartitionError(f"input '{node.name}' is read by a stage but is not a tensor of the network")
        state = self.captured.program.state_dict
        tensor = state[target] if target in state else self.captured.program.constants[target]
        if target not in self.weights:
            self.weights[target] = _unused(target.replace(".", "_"), self.weights.values())
            self.root.register_buffer(self.weights[target], tensor.detach())
        made = self.graph.get_attr(self.weights[target])
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


def _unused(wish: str, taken: Collection[str]) -> str:
    """A name that is not taken yet and fit for a file."""
    wish = re.sub(r"[^\w.-]", "_", wish)
    numbered = (f"{wish}_{number}" for number in itertools.count(2))
    return wish if wish not in taken else next(name for name in numbered if name not in taken)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _row_bytes(node: Node) -> int:
    value = node.meta["val"]
    return math.prod(int(size) for size in value.shape[1:]) * value.element_size()


def _child_path(node: Node, path: str) -> str | None:
    """The module path one level below ``path`` on the way to a node."""
    stack = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    names = [name for name in stack if name != path and (not path or name.startswith(path + "."))]
    return min(names, key=len) if any(names) else None
