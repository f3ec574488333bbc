"""Joins two ways through a forward: what both compute stays once, what differs is chosen by the decision between them.

Where the operand of a node that both ways have differs, they have met again after the decision, and the operand becomes
``torch.where(decision, one, other)``. A later decision that both ways take is then taken on whatever the earlier ones
left, so that every combination of outcomes is in the graph after one join for each decision.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.utils import _pytree as pytree

from edgekit.errors import CaptureError
from edgekit.exporters.graph import ancestors
from edgekit.exporters.ways import Joint, Match, Way, leaves

__all__ = ["AmbiguousJoinError", "join"]


class AmbiguousJoinError(CaptureError):
    """Two values that are one and the same on a way differ on the other, and it shows not which a later one reads."""


def join(way: Way, other: Way, index: int, match: Match) -> None:
    """Add what only ``other`` computes to ``way``, and let decision ``index`` choose where they meet.

    Raises:
        AmbiguousJoinError: what a later way reads could be either of two values.
    """
    _Joiner(way, other, index, match).join()
    way.others[index] = other
    other.parent = way


class _Joiner:
    def __init__(self, way: Way, other: Way, index: int, match: Match) -> None:
        self.way = way
        self.other = other
        self.index = index
        self.match = match
        self.graph = way.program.graph
        self.mode = _fake_mode(way.program)
        self.later = len(way.places) - other.tail
        self.copies = dict(match.same)
        self.conditions: dict[int, Node] = {}
        self.made: dict[tuple[Node, Node], Node] = {}

    def join(self) -> None:
        joined: dict[Node, set[Node]] = defaultdict(set)
        unchanged: set[Node] = set()
        later = {node for node, index in self.way.added.items() if index >= self.later}
        handled: dict[tuple[Node, int], Node] = {}
        pairs = {mine: theirs for theirs, mine in self.match.same.items() if theirs in self.other.traced}
        for reader, slot, traced in (*self.match.edges, *self.match.equal):
            chain = self._chain(*self._opposite(reader, slot, pairs))
            holder, place = self._place(reader, slot, len(self.way.places) - self._met(chain))
            value = leaves(holder)[place]
            opposite = self._other_value(traced, chain, handled.get((holder, place), value))
            if (holder, place) in handled:
                if value is not opposite and value is not self.made.get((handled[holder, place], opposite)):
                    raise self._ambiguous()
                continue
            handled[holder, place] = value
            if opposite is value:
                unchanged.add(value)
                continue
            made = self._where(value, opposite, self._met(chain))
            joined[value].add(made)
            _set_leaf(holder, place, made)
        for node in later:
            self._follow(node, handled, joined, unchanged)
        self._relocate(self.other)
        _sort(self.way.program)

    def _opposite(self, reader: Node, slot: int, pairs: Mapping[Node, Node]) -> tuple[Node, int]:
        """Where the other way reads an operand."""
        if reader is self.way.output:
            return self.other.output, self.other.results[self.way.results.index(slot)]
        return pairs[reader], slot

    def _chain(self, reader: Node, slot: int) -> list[Node]:
        """What the other way reads: joins with the ways that it leads to, then its own value."""
        chain = [leaves(reader)[slot]]
        while chain[-1] in self.other.joins:
            chain.append(leaves(chain[-1])[self.other.joins[chain[-1]].side])
        return chain

    def _met(self, chain: Sequence[Node]) -> int:
        """How many decisions at the end are taken after all these have met."""
        return min([self.other.tail, *(self.other.joins[node].met for node in chain[:-1])])

    def _place(self, reader: Node, slot: int, first: int) -> tuple[Node, int]:
        """Where an operand is read when the ways have met: by the join of a later decision, if there is one."""
        value = leaves(reader)[slot]
        while value in self.way.joins and self.way.added[value] >= first:
            reader, slot = value, self.way.joins[value].side
            value = leaves(reader)[slot]
        return reader, slot

    def _other_value(self, traced: Node, chain: Sequence[Node], value: Node) -> Node:
        """What stands on the other way for a value of this one."""
        opposite = self._copy(chain[0])
        while value in self.way.joins and self.way.added[value] < self.later:
            # A decision that only this way takes.
            value = self._own(value)
        own = self.copies[chain[-1]]
        if value is own or value not in self.way.joins:
            return opposite
        if self.match.same.get(traced) is not own:
            # A later decision that the other way takes, too, has nothing to choose from there.
            raise self._ambiguous()
        if len(chain) == 1:
            return value
        self._wrap(self.copies[chain[0]], own, value)
        return opposite

    def _own(self, node: Node) -> Node:
        """The operand of a join that was there before it."""
        return leaves(node)[self.way.joins[node].side]

    def _wrap(self, node: Node, own: Node, value: Node) -> None:
        """Let a join read ``value``, which later decisions chose from ``own``, where they are taken after it."""
        first, inner = len(self.way.places), value
        while inner is not own:
            first, inner = min(first, self.way.added[inner]), self._own(inner)
        joint = self.way.joins[node]
        sides = [joint.side] if joint.tail < len(self.way.places) - first else [joint.side, 3 - joint.side]
        for side in sides:
            leaf = leaves(node)[side]
            if leaf is own:
                _set_leaf(node, side, value)
            elif leaf in self.way.joins and self.way.added[leaf] == self.index:
                self._wrap(leaf, own, value)
            elif leaf is not value:
                raise self._ambiguous()

    def _follow(
        self,
        node: Node,
        handled: Collection[tuple[Node, int]],
        joined: Mapping[Node, set[Node]],
        unchanged: set[Node],
    ) -> None:
        """What a later decision chose from reads what this one left."""
        for slot, leaf in enumerate(leaves(node)):
            if not isinstance(leaf, Node) or leaf not in joined or (node, slot) in handled:
                continue
            if len(joined[leaf]) > 1 or leaf in unchanged:
                raise self._ambiguous()
            _set_leaf(node, slot, next(iter(joined[leaf])))

    def _ambiguous(self) -> AmbiguousJoinError:
        return AmbiguousJoinError(
            f"a Python branch depends on tensor values{self.way.places[self.index]}, and which of two values a later "
            "branch goes on with cannot be told"
        )

    def _copy(self, wanted: Node) -> Node:
        """A node of the other way in this one."""
        if wanted not in self.copies:
            needed = ancestors([wanted], stop=self.copies.__contains__)
            with self.graph.inserting_before(self.way.output):
                for node in self.other.program.graph.nodes:
                    if node in needed and node not in self.copies:
                        self._add(node)
        return self.copies[wanted]

    def _add(self, node: Node) -> None:
        if node.op == "placeholder":
            self.copies[node] = _constant(self.way.program, self.other.program, node)
        else:
            self.copies[node] = self.graph.node_copy(node, lambda source: self.copies[source])
        made = self.copies[node]
        made.meta = {**node.meta, "val": pytree.tree_map(self._fake, node.meta.get("val"))}
        self.way.added[made] = self.index
        if node in self.other.joins:
            self.way.joins[made] = self.other.joins[node]

    def _fake(self, value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return value
        with self.mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)

    def _where(self, value: Node, opposite: Node, met: int) -> Node:
        if (value, opposite) not in self.made:
            outcome = self.way.outcomes[self.index]
            ways = (value, opposite) if outcome else (opposite, value)
            condition = self._condition(value.meta["val"].ndim)
            made = self._call(torch.ops.aten.where.self, (condition, *ways), like=value)
            made.meta["val"] = self._fake(value.meta["val"])
            self.way.joins[made] = Joint(1 if outcome else 2, self.other.tail, met)
            self.made[value, opposite] = made
        return self.made[value, opposite]

    def _condition(self, rank: int) -> Node:
        """The decision as a tensor with this many dimensions."""
        marker = self.way.markers[self.index]
        assert marker is not None
        if rank == 1:
            return marker
        if rank not in self.conditions:
            made = self._call(torch.ops.aten.view.default, (marker, [1] * rank), like=marker)
            with self.mode:
                made.meta["val"] = torch.empty([1] * rank, dtype=torch.bool)
            self.conditions[rank] = made
        return self.conditions[rank]

    def _call(self, target: Any, args: tuple[Any, ...], *, like: Node) -> Node:
        marker = self.way.markers[self.index]
        assert marker is not None
        with self.graph.inserting_before(self.way.output):
            made = self.graph.call_function(target, args)
        made.meta = {key: item for key, item in like.meta.items() if key in ("nn_module_stack", "from_node")}
        made.meta["stack_trace"] = marker.meta.get("stack_trace")
        self.way.added[made] = self.index
        return made

    def _relocate(self, way: Way) -> None:
        way.markers = [None if marker is None else self.copies.get(marker) for marker in way.markers]
        for inner in way.others.values():
            self._relocate(inner)


def _set_leaf(node: Node, slot: int, value: Node) -> None:
    arguments, spec = pytree.tree_flatten((node.args, node.kwargs))
    arguments[slot] = value
    node.args, node.kwargs = pytree.tree_unflatten(arguments, spec)


def _fake_mode(program: ExportedProgram) -> FakeTensorMode:
    values = (node.meta.get("val") for node in program.graph.nodes)
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def _constant(program: ExportedProgram, source: ExportedProgram, node: Node) -> Node:
    """A tensor that the forward made from numbers on another way, as one more input of a graph."""
    signature = program.graph_signature
    target = source.graph_signature.inputs_to_lifted_tensor_constants[node.name]
    kinds = [spec.kind for spec in signature.input_specs]
    place = kinds.index(InputKind.USER_INPUT)
    first_input = [each for each in program.graph.nodes if each.op == "placeholder"][place]
    # A trace renames its inputs behind the graph's back, which then gives their names out again.
    taken = {each.name for each in program.graph.nodes}
    unused = next(name for name in (f"{node.name}_{number}" for number in itertools.count(1)) if name not in taken)
    with program.graph.inserting_before(first_input):
        made = program.graph.placeholder(unused)
    name = f"{target}_{made.name}"
    argument = TensorArgument(name=made.name)
    signature.input_specs.insert(place, InputSpec(InputKind.CONSTANT_TENSOR, argument, name))
    program.constants[name] = source.constants[target]
    return made


def _sort(program: ExportedProgram) -> None:
    """Put every node after those that it reads.

    Raises:
        AmbiguousJoinError: two read each other's results.
    """
    graph = program.graph
    placed: set[Node] = set()
    for node in list(graph.nodes):
        for made in _pending(node, placed):
            graph.output_node().prepend(made)
    graph.lint()


def _pending(node: Node, placed: set[Node]) -> Iterator[Node]:
    """A node after its sources, each once."""
    waiting: list[tuple[Node, bool]] = [(node, False)]
    open_nodes: set[Node] = set()
    while waiting:
        current, done = waiting.pop()
        if current in placed:
            continue
        if done:
            placed.add(current)
            open_nodes.discard(current)
            if current.op not in ("output", "placeholder"):
                yield current
            continue
        if current in open_nodes:
            raise AmbiguousJoinError("two ways through the forward compute the same results in another order")
        open_nodes.add(current)
        waiting.append((current, True))
        waiting.extend((source, False) for source in reversed(current.all_input_nodes) if source not in placed)
