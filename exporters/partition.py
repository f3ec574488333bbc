"""Cuts a graph at its decisions: a stage is what the next decision needs and nothing before it has computed.

Where a boundary has slack it lies on the cheapest cut: a minimum cut over the bytes that cross, in which cheap
operators may be computed again on the far side instead of carrying their result (as rematerialisation does in
training, Chen et al. 2016, arXiv 1604.06174; the min-cut form is that of functorch's partitioner).

What a gate guards is cut in the same way, as a graph of its own that reads tensors from outside.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx
import torch
from torch.fx import GraphModule, Node

from edgekit.errors import PartitionError
from edgekit.exporters.builder import Builder, unused
from edgekit.exporters.capture import Captured
from edgekit.exporters.decisions import ExitPoint
from edgekit.exporters.folding import Folding
from edgekit.exporters.gates import GatePoint, Gates
from edgekit.exporters.graph import ancestors, batch_dimension, row_bytes
from edgekit.exporters.hard import Hard
from edgekit.exporters.simplify import Value, View

__all__ = ["Cut", "Fork", "Part", "partition"]

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
        module: takes ``inputs`` and returns ``outputs``, then the logits of its exit, as a tuple.
        inputs: nodes of the captured graph that it reads, network inputs among them, then constants of gates.
        outputs: nodes that later stages and gates read.
        point: the exit that it ends in, if any.
        macs: for one sample; ``None`` when uncounted.
    """

    name: str
    module_path: str
    module: GraphModule
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    point: ExitPoint | None
    macs: int | None


@dataclass(frozen=True, kw_only=True)
class Fork:
    """A gate between stages.

    Attributes:
        gate: what decides.
        open: stages and gates that are run when it is open.
        closed: when it is closed.
        outputs: what it gives, by node: the node that it is when open and when closed, or zeros.
    """

    gate: GatePoint
    open: tuple[Part, ...]
    closed: tuple[Part, ...]
    outputs: dict[Node, tuple[Value, Value]]


Part = Cut | Fork


def partition(
    captured: Captured,
    exits: Sequence[ExitPoint],
    gates: Gates,
    macs: Mapping[Node, int] | None,
    constants: Collection[Node] = (),
) -> tuple[Part, ...]:
    """Stages and gates in the order in which they are run; the stages that end in an exit in the order of exits.

    Args:
        captured: the model's graph.
        exits: to cut at.
        gates: to cut out.
        macs: of each node, where they could be counted.
        constants: placeholders of gates' constants, which stages take as inputs.

    Raises:
        PartitionError: a tensor without the batch as dimension 0 would have to cross a boundary.
    """
    shared = _Shared(captured, macs, gates.hard, constants, Folding(captured))
    for point in exits:
        if point.node not in gates.view.dynamic:
            raise PartitionError(f"exit '{point.name}' does not depend on the input: it is no decision")
    points = _in_order(exits, gates.gates, gates.view)
    return _Level(shared, gates.view, points, set(captured.inputs)).parts()


@dataclass(frozen=True)
class _Return:
    """The end of a way through a gate: what it gives."""

    nodes: tuple[Node, ...]


Point = ExitPoint | GatePoint | _Return


def _in_order(ends: Sequence[ExitPoint | _Return], gates: Sequence[GatePoint], view: View) -> list[Point]:
    """Each gate before the first end that needs what it gives, after the gates that it needs itself."""
    points: list[Point] = []
    made = {node for gate in gates for node in gate.nodes}

    def need(nodes: Iterable[Node]) -> None:
        needed = view.ancestors(nodes, stop=made.__contains__)
        for gate in gates:
            if gate not in points and not needed.isdisjoint(gate.nodes):
                need(gate.needs(view))
                points.append(gate)

    for end in ends:
        need([end.node] if isinstance(end, ExitPoint) else end.nodes)
        points.append(end)
    return points


@dataclass
class _Shared:
    """What all levels of one partition share."""

    captured: Captured
    macs: Mapping[Node, int] | None
    hard: Mapping[Node, Hard]
    constants: Collection[Node]
    folding: Folding
    names: set[str] = field(default_factory=set)


class _Level:
    """The whole graph, or what one way through a gate runs.

    Args:
        shared: by all levels.
        view: the graph as it is at this level.
        points: decisions in the order in which they are taken.
        given: nodes that are there from the start.
    """

    def __init__(self, shared: _Shared, view: View, points: Sequence[Point], given: Collection[Node]) -> None:
        self.shared = shared
        self.captured = shared.captured
        self.macs = shared.macs
        self.view = view
        self.points = points
        self.given = set(given)
        self.maker = {node: point for point in points if isinstance(point, GatePoint) for node in point.nodes}
        self.needs = [self._needed_at(point) for point in points]
        self.ends = {node: index for index, needed in enumerate(self.needs) for node in needed}
        self.fixed = self._fixed()
        self.stage = self._earliest()

    def parts(self) -> tuple[Part, ...]:
        live = set(self.given)
        parts: list[Part] = []
        for index, point in enumerate(self.points):
            carried = self._boundary(index, live)
            if not isinstance(point, ExitPoint) and carried <= live:
                live = carried
            else:
                parts.append(self._cut(index, live, carried))
                live = carried
            if isinstance(point, GatePoint):
                parts.append(self._fork(point, live))
                live |= set(point.outputs)
        return tuple(parts)

    def _cut(self, index: int, live: set[Node], carried: set[Node]) -> Cut:
        point = self.points[index]
        made = sorted(carried - live, key=self.view.order.__getitem__)
        ends = [*made, self.view.at(point.node)] if isinstance(point, ExitPoint) else made
        body = self._body(ends, live)
        inputs = sorted((node for node in body if node in live), key=self.view.order.__getitem__)
        path = self._module_path(body, index, point)
        name = unused(path or f"stage{len(self.shared.names) + 1}", self.shared.names)
        self.shared.names.add(name)
        module, constants = self._module(body, inputs, ends, name)
        return Cut(
            name=name,
            module_path=path,
            module=module,
            inputs=(*inputs, *constants),
            outputs=tuple(made),
            point=point if isinstance(point, ExitPoint) else None,
            macs=None if self.macs is None else sum(self.macs.get(node, 0) for node in body - live),
        )

    def _fork(self, gate: GatePoint, live: set[Node]) -> Fork:
        ways = []
        for way in (gate.open, gate.closed):
            ends = tuple(dict.fromkeys(node for node in way.outputs if isinstance(node, Node) and node not in live))
            points = _in_order([_Return(ends)], way.gates, way.view) if ends else []
            ways.append(_Level(self.shared, way.view, points, live).parts())
        outputs = dict(zip(gate.outputs, zip(gate.open.outputs, gate.closed.outputs, strict=True), strict=True))
        return Fork(gate=gate, open=ways[0], closed=ways[1], outputs=outputs)

    def _needed_at(self, point: Point) -> set[Node]:
        """What a decision reads, and what is handed through it as it is."""
        if isinstance(point, ExitPoint):
            return {self.view.at(point.node)}
        return point.needs(self.view) if isinstance(point, GatePoint) else set(point.nodes)

    def _fixed(self) -> set[Node]:
        """Nodes that must be there as they are: a gate's value, and what a gate hands through."""
        found: set[Node] = set()
        for point in self.points:
            if isinstance(point, _Return):
                found |= set(point.nodes)
            elif isinstance(point, GatePoint):
                handed = (node for way in (point.open, point.closed) for node in way.outputs)
                found |= {node for node in handed if isinstance(node, Node) and node not in point.nodes}
                found.add(point.value)
        return found

    def _sources(self, node: Node) -> list[Node]:
        """What a node is computed from at this level: for what a gate gives, all that the gate needs."""
        gate = self.maker.get(node)
        if gate is not None:
            return sorted(gate.needs(self.view), key=self.view.order.__getitem__)
        return self.view.sources(node)

    def _earliest(self) -> dict[Node, int]:
        """The first point that needs each node; what is given is there from the start."""
        stage = dict.fromkeys(self.given, 0)
        for index, point in enumerate(self.points):
            for node in ancestors(list(self.needs[index]), stop=self.given.__contains__, sources=self._sources):
                stage.setdefault(node, index)
            if isinstance(point, GatePoint):
                self._advance(point, index, stage)
                stage.update(dict.fromkeys(point.outputs, index))
        for node in self.view.order:
            # What can be read of something that cannot cross is read at once, as the parts of a tuple.
            if node in stage and node not in self.maker and node not in self.given:
                sources = self._sources(node)
                readable = node.target is operator.getitem or self._cheap(node)
                if readable and len(sources) == 1 and not self._carriable(sources[0]):
                    stage[node] = stage[sources[0]]
        return stage

    def _advance(self, gate: GatePoint, index: int, stage: dict[Node, int]) -> None:
        """Work out what a gate needs where its sources are, if that takes no MACs: it is not worth a stage."""
        own = {node for node, at in stage.items() if at == index and node not in self.given and node not in self.maker}
        if any((self.macs or {}).get(node, 0) for node in own) or self.macs is None:
            return
        sources = {source for node in own for source in self._sources(node)} - own
        after = max((stage[node] + (node in self.maker) for node in sources), default=0)
        if not any(isinstance(point, ExitPoint) for point in self.points[after:index]):
            stage.update(dict.fromkeys(own, min(after, index)))

    def _boundary(self, index: int, live: set[Node]) -> set[Node]:
        """What crosses from stages up to ``index`` to later ones, of all that is alive or was just computed."""
        at_point = set() if isinstance(self.points[index], ExitPoint) else self.needs[index]
        needed = [
            node
            for node, stage in self.stage.items()
            if stage <= index
            and (node in live or node not in self.maker)
            and (node in at_point or self._is_read_after(node, index))
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
                f"tensor '{stuck.name}' {shape} is needed after {self._described(index)} "
                "but has no dimension that is the batch, so rows cannot leave there"
            )
        return {node for node in seen if (node, "in") in near and (node, "out") not in near}

    def _described(self, index: int) -> str:
        point = self.points[index]
        if isinstance(point, _Return):
            return "a gate"
        return f"{'exit' if isinstance(point, ExitPoint) else 'gate'} '{point.name}'"

    def _is_read_after(self, node: Node, index: int) -> bool:
        """Whether a later stage reads a tensor's values, or ends in it. Reading its size alone does not count."""
        if self.ends.get(node, -1) > index:
            return True
        return any(self.stage.get(user, -1) > index for user in self.readers.get(node, ()))

    @functools.cached_property
    def readers(self) -> dict[Node, list[Node]]:
        """Nodes of this level that read each node's values."""
        found: dict[Node, list[Node]] = {}
        for node in self.stage:
            if node in self.maker or node in self.given:
                continue
            for source in self.view.sources(node):
                found.setdefault(source, []).append(node)
        return found

    def _add(self, network: networkx.DiGraph, node: Node, *, given: bool, index: int) -> None:
        size = row_bytes(node, self.captured.rows)
        network.add_edge((node, "in"), (node, "out"), capacity=size if self._carriable(node) else _UNCARRIED)
        if given or not self._cheap(node):
            network.add_edge("source", (node, "in"))
        else:
            network.add_edge("source", (node, "in"), capacity=RECOMPUTE_WEIGHT * size)

    def _carriable(self, node: Node) -> bool:
        return batch_dimension(node, self.captured.rows) is not None

    def _cheap(self, node: Node) -> bool:
        if node.op != "call_function" or node in self.fixed or node in self.maker:
            return False
        if node.target is operator.getitem:
            return self._cheap(node.all_input_nodes[0])
        return isinstance(node.target, torch._ops.OpOverload) and node.target._opname in _CHEAP

    def _body(self, targets: Sequence[Node], live: set[Node]) -> set[Node]:
        """Every node that a stage holds, the live tensors it reads included; constants and sizes follow later."""
        return ancestors(targets, stop=lambda node: node in live, sources=self._sources)

    def _module_path(self, body: set[Node], index: int, point: Point) -> str:
        """The deepest module that more than half of the stage's trunk comes from, its exit head left aside."""
        own = [node for node in body if self.stage.get(node) == index and node.op == "call_function"]
        if isinstance(point, ExitPoint):
            leads_on = ancestors([node for node in own if self._is_read_after(node, index)])
            nodes = [node for node in own if node in leads_on] or own
        else:
            nodes = own
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

    def _module(
        self, body: set[Node], inputs: Sequence[Node], outputs: Sequence[Node], name: str
    ) -> tuple[GraphModule, tuple[Node, ...]]:
        """The stage as a module, and the constants of gates that it takes after its inputs."""
        nodes = sorted(body, key=self.view.order.__getitem__)
        builder = Builder(self.captured, self.view, inputs, self.shared.constants, self.shared.folding)
        return builder.build(nodes, outputs, name), tuple(builder.read)


_UNCARRIED = 2.0**60
"""Capacity of a tensor that must not cross: more than any sum of real sizes."""


def _child_path(node: Node, path: str) -> str | None:
    """The module path one level below ``path`` on the way to a node."""
    stack = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    names = [name for name in stack if name != path and (not path or name.startswith(path + "."))]
    return min(names, key=len) if any(names) else None
