"""Finds gates: parts of a network that need not run for a sample because they are multiplied by a hard zero.

For every hard value with one number for each sample, the graph is evaluated with that number known to be zero, and, if
it can only be 0 or 1, known to be one. What nothing reads any more in the first case is what the gate guards; what
nothing reads any more in the second is what runs only when it is closed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.fx import Node

from edgekit.exporters.capture import Captured
from edgekit.exporters.decisions import ExitPoint
from edgekit.exporters.graph import batch_dimension, row_bytes
from edgekit.exporters.hard import Hard, Kind, filling, hard_values, is_mask, operator_name
from edgekit.exporters.simplify import Known, Value, View
from edgekit.exporters.source import where

__all__ = ["SMALLEST_GATE", "Finding", "GatePoint", "Gates", "Way", "find_gates", "gate_values"]

SMALLEST_GATE = 10_000
"""MACs that a gate must guard. Starting one more stage takes microseconds, in which a small core does this much."""

BYTES_LIKE_A_START = 10_000
"""Bytes across a gate's boundary that cost what starting its stage does: rows are gathered, layouts changed."""


@dataclass(frozen=True)
class Way:
    """What is run when a gate is open, or closed.

    Attributes:
        view: the graph as it is then.
        outputs: what each output of the gate is then.
        gates: those inside.
    """

    view: View
    outputs: tuple[Value, ...]
    gates: tuple[GatePoint, ...]


@dataclass(frozen=True, kw_only=True)
class GatePoint:
    """A gate.

    Attributes:
        name: after the module that it guards.
        value: node with one number for each sample; zero means closed.
        binary: whether that can be 0 and 1 only.
        nodes: what only the gate's outputs need.
        outputs: nodes among these that others read.
        open: what is run when it is open.
        closed: what is run when it is closed.
        macs: guarded, for one sample; ``None`` when uncounted.
    """

    name: str
    value: Node
    binary: bool
    nodes: frozenset[Node]
    outputs: tuple[Node, ...]
    open: Way
    closed: Way
    macs: int | None

    def needs(self, view: View) -> set[Node]:
        """Nodes outside that the gate reads, on either way, and its value."""
        needed = {self.value}
        for way in (self.open, self.closed):
            reached = way.view.ancestors(way.outputs, stop=lambda node: node not in self.nodes)
            needed |= reached - self.nodes
        return needed


@dataclass(frozen=True)
class Finding:
    """A product with a hard value, and whether it is a gate.

    Attributes:
        product: what was looked at, with its place in the source.
        gate: name of the gate that it belongs to; ``None`` when it is none.
        reason: why, or why not.
    """

    product: str
    gate: str | None
    reason: str


@dataclass(frozen=True)
class Gates:
    """The gates of a network, and why.

    Attributes:
        gates: outermost ones, in topological order.
        findings: one for each hard value that was looked at, and for masks that guard nothing.
        view: the graph, with nothing known.
        hard: its hard values.
    """

    gates: tuple[GatePoint, ...]
    findings: tuple[Finding, ...]
    view: View
    hard: Mapping[Node, Hard]

    def all(self) -> Iterator[GatePoint]:
        """Every gate, nested ones after the one that holds them."""
        return _all(self.gates)

    def reached(self, outcomes: Mapping[str, bool]) -> list[GatePoint]:
        """The gates that are asked when gates have these outcomes: those on a way that is not taken are not."""
        return list(_reached(self.gates, outcomes))


def _reached(gates: Sequence[GatePoint], outcomes: Mapping[str, bool]) -> Iterator[GatePoint]:
    for gate in gates:
        yield gate
        yield from _reached((gate.open if outcomes[gate.name] else gate.closed).gates, outcomes)


def _all(gates: Sequence[GatePoint]) -> Iterator[GatePoint]:
    for gate in gates:
        yield gate
        yield from _all((*gate.open.gates, *gate.closed.gates))


def find_gates(
    captured: Captured,
    exits: Sequence[ExitPoint],
    macs: Mapping[Node, int] | None,
    *,
    smallest: int = SMALLEST_GATE,
) -> Gates:
    """The gates on the way to the exits.

    Args:
        captured: the model's graph.
        exits: whose logits are needed.
        macs: of each node; where they could not be counted, a gate must guard a heavy operator.
        smallest: MACs that starting a stage costs. A gate must guard as many, and in proportion for the bytes that
            cross its boundary (:data:`BYTES_LIKE_A_START`); what guards less stays part of the stage around it.
    """
    return _Finder(captured, macs, smallest).find(exits)


def gate_values(captured: Captured) -> tuple[Node, ...]:
    """Hard values with one number for each sample, wherever they lead."""
    roots = (hard.root for hard in _hard_values(captured).values())
    return tuple(dict.fromkeys(root for root in roots if root is not None))


def _hard_values(captured: Captured) -> dict[Node, Hard]:
    return hard_values(list(captured.program.graph.nodes), rows=captured.rows)


@dataclass
class _Level:
    """A graph to look for gates in: all of it, or what one way through a gate runs."""

    view: View
    outputs: tuple[Value, ...]
    nodes: list[Node]
    used: frozenset[Node]
    taken: set[Node] = field(default_factory=set)


class _Finder:
    def __init__(self, captured: Captured, macs: Mapping[Node, int] | None, smallest: int) -> None:
        self.captured = captured
        self.macs = macs
        self.smallest = smallest
        self.order = {node: place for place, node in enumerate(captured.program.graph.nodes)}
        self.rows = captured.rows
        self.hard = _hard_values(captured)
        self.view = View(self.order, dynamic_nodes(captured)).given(_filled(self.order), self.hard)
        self.told: list[tuple[Node, tuple[Node, ...] | None, str]] = []
        self.names: set[str] = set()

    def find(self, exits: Sequence[ExitPoint]) -> Gates:
        outputs = tuple(point.node for point in exits)
        gates = self._named(self._level(self.view, outputs, frozenset(), lambda node: False))
        names = {gate.outputs: gate.name for gate in _all(gates)}
        findings = [
            Finding(_described(self.hard[root].origin), None if made is None else names[made], reason)
            for root, made, reason in self.told
        ]
        return Gates(gates, (*findings, *self._masks(outputs)), self.view, self.hard)

    def _named(self, gates: Sequence[GatePoint]) -> tuple[GatePoint, ...]:
        """The gates with names of their own, in the order in which they are run."""
        named = []
        for gate in gates:
            name, number = gate.name, 2
            while name in self.names:
                name, number = f"{gate.name}_{number}", number + 1
            self.names.add(name)
            opened, closed = (replace(way, gates=self._named(way.gates)) for way in (gate.open, gate.closed))
            named.append(replace(gate, name=name, open=opened, closed=closed))
        return tuple(named)

    def _level(
        self, view: View, outputs: tuple[Value, ...], used: frozenset[Node], outside: Callable[[Node], bool]
    ) -> tuple[GatePoint, ...]:
        nodes = sorted(view.ancestors(outputs, stop=outside), key=self.order.__getitem__)
        level = _Level(view, outputs, [node for node in nodes if not outside(node)], used)
        candidates = [self._candidate(level, root) for root in self._roots(level)]
        ranked = sorted(
            (each for each in candidates if each is not None),
            key=lambda each: (-self._weight(each[1]), -self.order[each[0]]),
        )
        found: list[GatePoint] = []
        for root, _ in ranked:
            found += self._gates_of(level, root, found)
        return tuple(sorted(found, key=lambda gate: max(self.order[node] for node in gate.outputs)))

    def _roots(self, level: _Level) -> list[Node]:
        """Values that could open and close something at this level."""
        roots = {self.hard[node].root for node in level.nodes if node in self.hard}
        roots |= {
            self.hard[source].root for node in level.nodes for source in level.view.sources(node) if source in self.hard
        }
        known = [root for root in roots if root is not None and root not in level.used and level.view.at(root) is root]
        return sorted(known, key=self.order.__getitem__)

    def _candidate(self, level: _Level, root: Node) -> tuple[Node, set[Node]] | None:
        guarded = self._guarded(level, root)[0]
        return (root, guarded) if guarded else None

    def _guarded(self, level: _Level, root: Node) -> tuple[set[Node], View, View]:
        """Nodes that need not run in one of the two cases, and the views in both."""
        view = level.view
        closed = view.given({root: Known.ZERO}, self.hard)
        binary = self.hard[root].kind is Kind.BINARY
        opened = view.given({root: Known.ONE}, self.hard) if binary else view
        needed = {node for node in level.nodes if node.op == "call_function"}
        spared = needed - closed.ancestors(level.outputs)
        if binary:
            spared |= needed - opened.ancestors(level.outputs)
        asked = view.ancestors([root])
        for node in sorted(spared - asked, key=self.order.__getitem__):
            # Views and complements of the value itself are no work: they are made wherever they are read.
            if node in self.hard and self.hard[node].root is root and asked.issuperset(view.sources(node)):
                asked.add(node)
        return spared - asked, opened, closed

    def _gates_of(self, level: _Level, root: Node, before: Sequence[GatePoint]) -> list[GatePoint]:
        """One gate for each connected part that a value guards."""
        spared, opened, closed = self._guarded(level, root)
        spared -= level.taken
        found: list[GatePoint] = []
        for part in sorted(_connected(spared, level.view), key=self._weight, reverse=True):
            outputs = self._outputs(level, part)
            cheap = self._too_cheap(level, root, part, outputs)
            if cheap is not None:
                if all(other is not root for other, _, _ in self.told):
                    self._tell(root, None, cheap)
                continue
            gate = self._gate(level, root, part, outputs, opened, closed, [*before, *found])
            if gate is not None:
                found.append(gate)
                level.taken |= part
        return found

    def _outputs(self, level: _Level, part: set[Node]) -> tuple[Node, ...]:
        """What others read of a part."""
        users = _users(level.nodes, level.view)
        ends = set(map(level.view.at, level.outputs))
        read = (node for node in part if node in ends or not users.get(node, set()) <= part)
        return tuple(sorted(read, key=self.order.__getitem__))

    def _too_cheap(self, level: _Level, root: Node, part: set[Node], outputs: Sequence[Node]) -> str | None:
        """Why a part does not pay a stage of its own, if so."""
        if self.macs is None:
            return None if _heavy(part) else "it guards no heavy operator"
        read = {source for node in part for source in level.view.sources(node)} - part
        # The value crosses, and its views and complements are made from it.
        read = {node for node in read if node not in self.hard or self.hard[node].root is not root} | {root}
        crossing = sum(row_bytes(node, self.rows) for node in (*read, *outputs))
        least = self.smallest + self.smallest * crossing // BYTES_LIKE_A_START
        weight = self._weight(part)
        if weight >= least:
            return None
        return (
            f"it guards {weight} MACs, fewer than a stage of its own and the {crossing} bytes that a sample would "
            f"carry across its boundary cost ({least})"
        )

    def _gate(
        self,
        level: _Level,
        root: Node,
        part: set[Node],
        outputs: tuple[Node, ...],
        opened: View,
        closed: View,
        before: Sequence[GatePoint],
    ) -> GatePoint | None:
        given = [tuple(view.at(node) for node in outputs) for view in (opened, closed)]
        problem = self._problem(level, part, outputs, given, (opened, closed), root)
        if problem is not None:
            self._tell(root, None, problem)
            return None
        used = level.used | {root}

        def outside(node: Node) -> bool:
            return node not in part

        probe = GatePoint(
            name=self._name(self._when(part, opened, given[0]) or self._when(part, closed, given[1]), outputs),
            value=root,
            binary=self.hard[root].kind is Kind.BINARY,
            nodes=frozenset(part),
            outputs=outputs,
            open=Way(opened, given[0], ()),
            closed=Way(closed, given[1], ()),
            macs=None if self.macs is None else self._weight(part),
        )
        if not _acyclic([*before, probe], level.view):
            self._tell(root, None, "it and another gate each need what the other gives")
            return None
        self._tell(root, outputs, f"{len(part)} operators reach the outputs only through products with it")
        ways = [
            replace(way, gates=self._level(way.view, way.outputs, used, outside)) for way in (probe.open, probe.closed)
        ]
        return replace(probe, open=ways[0], closed=ways[1])

    def _when(self, part: set[Node], view: View, values: Sequence[Value]) -> set[Node]:
        """What of a part is run one way, if that is any work."""
        run = view.ancestors(values, stop=lambda node: node not in part) & part
        return run if self._weight(run) or (self.macs is None and _heavy(run)) else set()

    def _problem(
        self,
        level: _Level,
        part: set[Node],
        outputs: Sequence[Node],
        ways: Sequence[Sequence[Value]],
        views: Sequence[View],
        root: Node,
    ) -> str | None:
        """Why a part cannot be a gate of its own, if so."""
        if any(value is Known.ONE for values in ways for value in values):
            return "a tensor would be one everywhere when it is closed"
        stuck = next((node for node in outputs if batch_dimension(node, self.rows) is None), None)
        if stuck is not None:
            return f"tensor '{stuck.name}' has no dimension that is the batch"
        needed = {root}
        for view, values in zip(views, ways, strict=True):
            for value in values:
                if isinstance(value, Node) and value not in self.view.dynamic:
                    return f"tensor '{value.name}' does not depend on the input"
            needed |= view.ancestors(values, stop=lambda node: node not in part) - part
        if not level.view.ancestors(needed).isdisjoint(part):
            return "what it guards also leads to what it needs"
        return None

    def _weight(self, nodes: Iterable[Node]) -> int:
        return sum((self.macs or {}).get(node, 0) for node in nodes)

    def _name(self, part: Collection[Node], outputs: Sequence[Node]) -> str:
        """The deepest module that most of the work of a part comes from, or the one of its first heavy operator."""
        weights: Counter[str] = Counter()
        total = 0.0
        for node in sorted(part, key=self.order.__getitem__):
            weight = (self.macs or {}).get(node, 0) + 1e-3
            total += weight
            for path, _ in (node.meta.get("nn_module_stack") or {}).values():
                weights[path] += weight  # type: ignore[assignment]
        del weights[""]
        if not weights:
            return str(outputs[-1].name)
        most = max(weights.values())
        share = next((share for share in (0.9, 0.5) if most > share * total), None)
        if share is None:
            return max(weights, key=weights.__getitem__)
        return max((path for path, weight in weights.items() if weight > share * total), key=len)

    def _tell(self, root: Node, outputs: tuple[Node, ...] | None, reason: str) -> None:
        """Remember what became of a hard value: the gate with these outputs, or none."""
        self.told.append((root, outputs, reason))

    def _masks(self, outputs: Sequence[Node]) -> Iterator[Finding]:
        """Masks with more than one number for each sample: they save nothing, whatever is zero in them."""
        for node in sorted(self.view.ancestors(outputs), key=self.order.__getitem__):
            if operator_name(node) != "mul":
                continue
            known = [each for each in node.all_input_nodes if each in self.hard and self.hard[each].root is None]
            masks = [each for each in known if is_mask(self.hard[each].origin)]
            if masks and not all(each in self.hard for each in node.all_input_nodes):
                shape = tuple(masks[0].meta["val"].shape[1:])
                reason = f"a mask of shape {shape} for each sample, not one number: everything is computed"
                yield Finding(_described(node), None, reason)


def _filled(nodes: Iterable[Node]) -> dict[Node, Known]:
    """Tensors that the forward fills with zeros or ones, to add something to them."""
    return {node: Known(int(filling(node))) for node in nodes if filling(node) in (0, 1)}


def dynamic_nodes(captured: Captured) -> set[Node]:
    """Tensors that are computed from the network's inputs; the rest is constant, and copied where it is used."""
    found: set[Node] = set(captured.inputs)
    for node in captured.program.graph.nodes:
        value = node.meta.get("val")
        sized = value is not None and not isinstance(value, Tensor | tuple | list)
        if not sized and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _described(node: Node) -> str:
    return f"{operator_name(node) or node.name} '{node.name}'{where(node)}"


def _users(nodes: Sequence[Node], view: View) -> dict[Node, set[Node]]:
    found: dict[Node, set[Node]] = {}
    for node in nodes:
        for source in view.sources(node):
            found.setdefault(source, set()).add(node)
    return found


def _connected(nodes: set[Node], view: View) -> list[set[Node]]:
    """Parts that read from one another."""
    neighbours: dict[Node, set[Node]] = {node: set() for node in nodes}
    for node in nodes:
        for source in view.sources(node):
            if source in nodes:
                neighbours[node].add(source)
                neighbours[source].add(node)
    parts: list[set[Node]] = []
    left = set(nodes)
    while left:
        part, waiting = set(), [next(iter(left))]
        while waiting:
            node = waiting.pop()
            if node not in part:
                part.add(node)
                waiting.extend(neighbours[node])
        parts.append(part)
        left -= part
    return sorted(parts, key=lambda part: min(view.order[node] for node in part))


def _heavy(part: Iterable[Node]) -> bool:
    return any(
        operator_name(n) in ("conv1d", "conv2d", "conv3d", "convolution", "linear", "mm", "bmm", "addmm", "matmul")
        for n in part
    )


def _acyclic(gates: Sequence[GatePoint], view: View) -> bool:
    """Whether the last of some gates can be run as a whole besides the others."""
    last = gates[-1]
    member = {node: gate for gate in gates for node in gate.nodes}
    waiting, seen = list(last.needs(view)), set()
    while waiting:
        node = waiting.pop()
        gate = member.get(node)
        if gate is last:
            return False
        key = gate or node
        if key in seen:
            continue
        seen.add(key)
        waiting.extend(gate.needs(view) if gate else view.sources(node))
    return True
