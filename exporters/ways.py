"""Ways through a forward as graphs, and which nodes of two of them are the same.

Before the decision that two ways differ in they are equal. After it, nodes are matched backwards from what both return:
same operator, same constants, same weights.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from edgekit.errors import CaptureError
from edgekit.exporters.graph import ancestors
from edgekit.exporters.source import Place

__all__ = ["Joint", "Match", "Way", "align", "leaves"]


@dataclass(frozen=True)
class Joint:
    """What ``torch.where(decision, one, other)`` stands for.

    Attributes:
        side: place of the value among its arguments that was there before.
        tail: decisions at the end that the way with the other value shares with the one that it was joined to.
        met: those of them that are taken after all ways have met that the other value was joined of.
    """

    side: int
    tail: int
    met: int


@dataclass(eq=False)
class Way:
    """A forward with the outcome of every decision fixed, as a graph, and what was joined to it since.

    Attributes:
        program: returns the model's tensors, then one marker ``(1,) bool`` for each decision, made where it was taken.
        places: of the decisions in the model's source, in order.
        outcomes: of the decisions.
        structure: of what the model returns.
        markers: nodes of the decisions; ``None`` where a joined way lost its marker, which nothing reads then.
        tail: decisions at the end that the way which this one was joined to takes as well.
        others: the ways on which the outcome of one decision is another.
        parent: the way that this one was joined to.
    """

    program: ExportedProgram
    places: Sequence[Place]
    outcomes: Sequence[bool]
    structure: pytree.TreeSpec
    tail: int = 0
    others: dict[int, Way] = field(default_factory=dict)
    parent: Way | None = None
    markers: list[Node | None] = field(init=False)

    def __post_init__(self) -> None:
        output = self.program.graph.output_node()
        kinds = [spec.kind for spec in self.program.graph_signature.output_specs]
        returned = [slot for slot, kind in enumerate(kinds) if kind is OutputKind.USER_OUTPUT]
        self.results = returned[: len(returned) - len(self.places)]
        self.markers = [output.args[0][slot] for slot in returned[len(self.results) :]]
        self.order = {node: place for place, node in enumerate(self.program.graph.nodes)}
        self.traced = {node: leaves(node) for node in self.order}
        self.shape = {node: repr(pytree.tree_structure((node.args, node.kwargs))) for node in self.order}
        self.dynamic = _dynamic(self.program)
        self.epoch = self._epochs()
        self.added: dict[Node, int] = {}
        """Nodes that were joined to this way, with the decision that chooses."""
        self.joins: dict[Node, Joint] = {}
        """Operands that were joined."""

    @property
    def output(self) -> Node:
        """The node that returns."""
        return self.program.graph.output_node()

    @property
    def shared(self) -> int:
        """The first decision that the way which this one was joined to takes as well."""
        return len(self.places) - self.tail

    def fills(self, node: Node) -> bool:
        """Whether a tensor was made from numbers alone."""
        return node not in self.dynamic and all(source.op == "call_function" for source in ancestors([node]))

    def _epochs(self) -> dict[Node, int]:
        """How many decisions were taken before each node; constants are there from the start."""
        taken, epochs, markers = 0, {}, set(self.markers)
        for node in self.order:
            epochs[node] = taken if node in self.dynamic else 0
            taken += node in markers
        return epochs


def _dynamic(program: ExportedProgram) -> set[Node]:
    names = set(program.graph_signature.user_inputs)
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.name in names or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def leaves(node: Node) -> tuple[Any, ...]:
    """A node's arguments, flattened."""
    return tuple(pytree.tree_leaves((node.args, node.kwargs)))


@dataclass
class Match:
    """Which nodes of another way are which of this one.

    Attributes:
        same: nodes of this way by nodes of the other one.
        edges: operands that differ: a node of this way, the place among its arguments, and the other way's operand.
        equal: operands that do not: a node of this way and the place among its arguments, and the other way's operand.
    """

    same: dict[Node, Node]
    edges: list[tuple[Node, int, Node]]
    equal: list[tuple[Node, int, Node]]


def align(way: Way, other: Way, index: int, *, shared: int | None = None) -> Match:
    """Match two ways that differ in the outcome of decision ``index``; ``other.tail`` becomes what they share after it.

    Args:
        way: that ``other`` is to be joined to.
        other: equal to it up to the decision.
        index: of the decision.
        shared: decisions at the end that may be taken as shared; as many as the two have in common when ``None``.

    Raises:
        CaptureError: they return what cannot be joined.
    """
    if way.structure != other.structure:
        raise CaptureError(
            f"a Python branch depends on tensor values{way.places[index]}: its two ways return other things, "
            f"{way.structure.num_leaves} on one and {other.structure.num_leaves} on the other; return the same on both"
        )
    matcher = _Matcher(way, other, index)
    tail = _common_tail(way, other, index) if shared is None else shared
    while True:
        match, tail_that_fits = matcher.match(tail)
        if tail_that_fits == tail:
            other.tail = tail
            return match
        tail = tail_that_fits


def _common_tail(way: Way, other: Way, index: int) -> int:
    """Decisions at the end that both ways take, with the same outcomes."""
    longest = min(len(way.places), len(other.places)) - index - 1
    pairs = zip(
        zip(reversed(way.places), reversed(way.outcomes), strict=True),
        zip(reversed(other.places), reversed(other.outcomes), strict=True),
        strict=False,
    )
    count = 0
    for one, two in pairs:
        if count == longest or one != two:
            break
        count += 1
    return count


class _Matcher:
    def __init__(self, way: Way, other: Way, index: int) -> None:
        self.way = way
        self.other = other
        self.index = index
        self.before = self._before()

    def _before(self) -> dict[Node, Node]:
        """Nodes before the decision, and constants: equal to those of the same name for the same thing."""
        known: dict[Node, Node] = {}
        table: dict[Any, list[Node]] = defaultdict(list)
        for node in self.way.order:
            if self.way.epoch[node] <= self.index:
                table[self._key(self.way, node, lambda source: source)].append(node)
        used: Counter[Any] = Counter()
        for node in self.other.order:
            if self.other.epoch[node] > self.index:
                continue
            key = self._key(self.other, node, known.get)
            alike = table.get(key)
            if alike:
                known[node] = alike[min(used[key], len(alike) - 1)]
                used[key] += 1
        return known

    def _key(self, way: Way, node: Node, named: Callable[[Node], Node | None]) -> Any:
        if node.op == "placeholder":
            return _held(way.program, node)
        leaves = tuple(
            (named(leaf) or object()) if isinstance(leaf, Node) else (type(leaf).__name__, str(leaf))
            for leaf in way.traced[node]
        )
        return node.op, node.target, way.shape[node], leaves

    def match(self, tail: int) -> tuple[Match, int]:
        """Nodes that are the same with ``tail`` decisions shared, and how many of these can be shared at most."""
        banned: set[tuple[Node, Node]] = set()
        while True:
            same, roots = self._walk(tail, banned)
            before = len(banned)
            match = self._edges(same, roots, banned)
            if len(banned) == before:
                break
        return match, self._fitting(match, tail)

    def _roots(self, tail: int) -> list[tuple[Node, Node]]:
        count, others = len(self.way.markers), len(self.other.markers)
        pairs = [(self.way.markers[count - n], self.other.markers[others - n]) for n in range(tail, 0, -1)]
        return [(one, two) for one, two in pairs if one is not None and two is not None]

    def _walk(self, tail: int, banned: set[tuple[Node, Node]]) -> tuple[dict[Node, Node], list[tuple[Node, Node]]]:
        same, taken = dict(self.before), set(self.before.values())
        roots = self._roots(tail)
        waiting = deque(roots)
        one, two = self.way.traced[self.way.output], self.other.traced[self.other.output]
        for slot, place in zip(self.way.results, self.other.results, strict=True):
            if isinstance(one[slot], Node) and isinstance(two[place], Node):
                waiting.append((one[slot], two[place]))
        while waiting:
            mine, theirs = waiting.popleft()
            if theirs in same or mine in taken or (mine, theirs) in banned or not self._alike(mine, theirs, same):
                continue
            same[theirs] = mine
            taken.add(mine)
            for leaf, opposite in zip(self.way.traced[mine], self.other.traced[theirs], strict=True):
                if isinstance(leaf, Node) and isinstance(opposite, Node):
                    waiting.append((leaf, opposite))
        return same, roots

    def _alike(self, mine: Node, theirs: Node, same: Mapping[Node, Node]) -> bool:
        """Whether two nodes after the decision do the same, if with other operands."""
        if self.way.epoch[mine] <= self.index or self.other.epoch[theirs] <= self.index:
            return False
        if mine.target != theirs.target or self.way.shape[mine] != self.other.shape[theirs]:
            return False
        for leaf, opposite in zip(self.way.traced[mine], self.other.traced[theirs], strict=True):
            if isinstance(leaf, Node) != isinstance(opposite, Node):
                return False
            if not isinstance(leaf, Node):
                if type(leaf) is not type(opposite) or str(leaf) != str(opposite):
                    return False
            elif not self._may_differ(leaf, opposite) and same.get(opposite) is not leaf:
                return False
        return True

    def _may_differ(self, leaf: Node, opposite: Node) -> bool:
        """Features may; of weights the ways meet after what reads them. Zeros to add to are features like others."""
        features = leaf in self.way.dynamic, opposite in self.other.dynamic
        return all(features) or (any(features) and (self.way.fills(leaf) or self.other.fills(opposite)))

    def _edges(
        self, same: dict[Node, Node], roots: Sequence[tuple[Node, Node]], banned: set[tuple[Node, Node]]
    ) -> Match:
        """Operands of matched nodes; a pair of nodes whose operands cannot be joined is banned."""
        match = Match(same, [], [])
        pairs = [(mine, theirs) for theirs, mine in same.items() if theirs not in self.before]
        for mine, theirs in sorted(pairs, key=lambda pair: self.way.order[pair[0]]):
            for slot, (leaf, opposite) in enumerate(zip(self.way.traced[mine], self.other.traced[theirs], strict=True)):
                if isinstance(leaf, Node):
                    fits = self._edge(match, mine, slot, leaf, opposite)
                    if not fits:
                        banned.add((mine, theirs))
        one, two = self.way.traced[self.way.output], self.other.traced[self.other.output]
        for number, (slot, place) in enumerate(zip(self.way.results, self.other.results, strict=True)):
            self._result(match, number, slot, (one[slot], two[place]))
        return match

    def _edge(self, match: Match, mine: Node, slot: int, leaf: Node, opposite: Node) -> bool:
        if match.same.get(opposite) is leaf:
            match.equal.append((mine, slot, opposite))
            return True
        match.edges.append((mine, slot, opposite))
        return _joinable(leaf, opposite)

    def _result(self, match: Match, number: int, slot: int, pair: tuple[Any, Any]) -> None:
        place = self.way.places[self.index]
        if not isinstance(pair[0], Node) and not isinstance(pair[1], Node):
            # A number of Python's own, as which exit was taken: no output of a graph.
            return
        if not all(isinstance(value, Node) for value in pair) or not self._edge(match, self.way.output, slot, *pair):
            raise CaptureError(
                f"a Python branch depends on tensor values{place}: its two ways cannot be joined, as output {number} "
                f"is {_described(pair[0])} on one and {_described(pair[1])} on the other; return tensors alike on both"
            )

    def _fitting(self, match: Match, tail: int) -> int:
        """Decisions that are taken after the two ways have met: at least those after all that differs."""
        mine = [self.way.traced[reader][slot] for reader, slot, _ in match.edges]
        theirs = [opposite for _, _, opposite in match.edges]
        apart = ancestors(theirs, stop=match.same.__contains__, sources=lambda n: _nodes(self.other.traced[n]))
        late = max((self.other.epoch[node] for node in (*theirs, *(apart - match.same.keys()))), default=0)
        for one, two in self._roots(tail):
            if match.same.get(two) is not one:
                late = max(late, self.other.epoch[two] + 1)
        here = max((self.way.epoch[node] for node in mine), default=0)
        return min(tail, len(self.other.places) - late, len(self.way.places) - here)


def _nodes(leaves: Iterable[Any]) -> list[Node]:
    return [leaf for leaf in leaves if isinstance(leaf, Node)]


def _joinable(one: Node, two: Node) -> bool:
    first, second = one.meta.get("val"), two.meta.get("val")
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    return first.shape == second.shape and first.dtype == second.dtype


def _described(value: Any) -> str:
    value = value.meta.get("val") if isinstance(value, Node) else value
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _held(program: ExportedProgram, node: Node) -> tuple[Any, ...]:
    """What a placeholder stands for, in words that are the same in another graph of the model."""
    signature = program.graph_signature
    for table in (signature.inputs_to_parameters, signature.inputs_to_buffers):
        if node.name in table:
            return "state", table[node.name]
    if node.name in signature.inputs_to_lifted_tensor_constants:
        value = program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
        data = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return "constant", str(value.dtype), tuple(value.shape), data.numpy().tobytes()
    return "input", signature.user_inputs.index(node.name)
