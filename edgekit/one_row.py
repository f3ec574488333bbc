"""One sample: pre-bound stages in a flat loop, with a jump at every gate.

Where a tensor lives depends on the gates that were open before. Each combination of block and places is a node, bound
once; a node knows the next one for each outcome. The memory takes turns (:mod:`edgekit.slots`), so there are few
places, and the nodes of a chain of gates are two for each gate, not two to the power of their number.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import EdgekitError
from edgekit.interfaces import Buffer
from edgekit.measured import Span, TracedRun
from edgekit.route import Block, Edge, Fork, Leave
from edgekit.scoring import RowScores
from edgekit.slots import Places, Slots

__all__ = ["Mark", "Node", "OneRow", "traced"]

Mark = tuple[str, Literal["input", "compute", "decision", "answer"], int, int]
"""Name and kind of a span, and the clock before and after it, in nanoseconds."""

NODES_PER_STAGE = 8
"""Nodes bound beforehand for each stage; others are bound when a sample first gets there."""

_ONLY = np.zeros(1, dtype=np.intp)
"""The number of the only row."""


class Node:
    """A block bound to one row.

    Every Python instruction counts here: a stage leaves the processor's caches cold, and the interpreter with them.

    Attributes:
        run: the stages up to the decision.
        value: reads or computes the score, or reads the gate's value.
        threshold: from which the row leaves; NaN lets none leave.
        logits: reads the logits ``(1, classes)``.
        scores: reads the score ``(1,)``, once ``value`` was called.
        exit: its index ``(1,)``; ``None`` at a gate.
        calls: the stages, in order.
        parts: what runs each of them; ``run`` is these in turn.
        next: of a row that does not leave; when open, at a gate; ``None`` also where it is not bound yet.
        closed: of a row for which the gate is closed.
    """

    __slots__ = ("block", "calls", "closed", "exit", "last", "logits", "next", "parts", "places", "run", "scores",
                 "threshold", "value")  # fmt: skip

    def __init__(
        self,
        block: Block,
        places: Places,
        parts: Sequence[Callable[[], None]],
        calls: Sequence[str],
        scores: RowScores | None,
    ) -> None:
        self.block = block
        self.places = places
        self.run = _in_turn(parts)
        self.parts = tuple(parts)
        self.calls = tuple(calls)
        self.next: Node | None = None
        self.closed: Node | None = None
        decision = block.decision
        assert decision is not None
        if isinstance(decision, Fork):
            self.value = _reader(places[decision.gate.value])
            self.exit: NDArray[np.int64] | None = None
        else:
            self.threshold = float(decision.threshold)
            self.logits: Callable[[int], NDArray[Any]] = places[decision.logits].read
            self.scores: Callable[[int], NDArray[Any]]
            if decision.score is None:
                self.value, self.scores = _scorer(decision, self.logits, scores)
            else:
                self.value, self.scores = _reader(places[decision.score]), places[decision.score].read
            self.exit = np.array([decision.exit], dtype=np.int64)
            self.last = block.next is None


class OneRow:
    """Binds nodes and walks them.

    Args:
        slots: stages and memory.
        scores: of one row, where no stage computes them.
    """

    def __init__(self, slots: Slots, scores: RowScores | None) -> None:
        self._slots = slots
        self._scores = scores
        self._nodes: dict[tuple[object, ...], Node] = {}

    def start(self, block: Block) -> Node:
        """The node of a route's first block; those that follow are bound as well, up to a number."""
        first = self._node(Edge(block), self._slots.given)
        waiting, seen = deque([first]), {first}
        while waiting and len(seen) < NODES_PER_STAGE * len(self._slots.runners):
            node = waiting.popleft()
            for is_open in (True, False) if node.exit is None else (True,):
                follows = None if node.exit is not None and node.last else self._follow(node, is_open=is_open)
                if follows is not None and follows not in seen:
                    seen.add(follows)
                    waiting.append(follows)
        return first

    def run(self, node: Node) -> tuple[Node, bool, list[Node]]:
        """Walk from a node. Returns where the row leaves, whether its logits are finite there, and the way it took."""
        way = [node]
        try:
            while True:
                node.run()
                if node.exit is not None:
                    if node.value() >= node.threshold and _finite(node):
                        return node, True, way
                    if node.last:
                        return node, _finite(node), way
                    node = node.next or self._follow(node, is_open=True)
                elif node.value() != 0:
                    node = node.next or self._follow(node, is_open=True)
                else:
                    node = node.closed or self._follow(node, is_open=False)
                way.append(node)
        except EdgekitError:
            raise
        except Exception as error:
            raise self._slots.failure(node.calls, error) from error

    def trace(self, node: Node, clock: Callable[[], int]) -> tuple[Node, bool, list[Node], list[Mark]]:
        """As :meth:`run`, with the clock read around every stage and decision; returns what it said as well."""
        way, marks = [node], list[Mark]()
        try:
            while True:
                for stage, part in zip(node.calls, node.parts, strict=True):
                    begin = clock()
                    part()
                    end = clock()
                    marks.append((stage, "compute", begin, end))
                begin = clock()
                if node.exit is not None:
                    leaves = node.value() >= node.threshold and _finite(node)
                    finite = leaves or (node.last and _finite(node))
                    end = clock()
                    marks.append((self._decides(node), "decision", begin, end))
                    if leaves or node.last:
                        return node, finite, way, marks
                    node = node.next or self._follow(node, is_open=True)
                else:
                    is_open = node.value() != 0
                    end = clock()
                    marks.append((self._decides(node), "decision", begin, end))
                    node = (node.next if is_open else node.closed) or self._follow(node, is_open=is_open)
                way.append(node)
        except EdgekitError:
            raise
        except Exception as error:
            raise self._slots.failure(node.calls, error) from error

    def _decides(self, node: Node) -> str:
        """Name of the exit or gate where a node ends."""
        decision = node.block.decision
        assert decision is not None
        return decision.gate.name if isinstance(decision, Fork) else self._slots.plan.exits[decision.exit].name

    def executed(self, way: Sequence[Node]) -> dict[str, int]:
        """How often each stage ran on the way."""
        counted = dict.fromkeys(self._slots.runners, 0)
        for node in way:
            for stage in node.calls:
                counted[stage] += 1
        return counted

    def _follow(self, node: Node, *, is_open: bool) -> Node:
        """The node that follows an outcome, bound before or now, and remembered."""
        decision = node.block.decision
        if isinstance(decision, Fork):
            follows = self._node(decision.open if is_open else decision.closed, node.places)
        else:
            assert node.block.next is not None
            follows = self._node(node.block.next, node.places)
        if is_open:
            node.next = follows
        else:
            node.closed = follows
        return follows

    def _node(self, edge: Edge, places: Places) -> Node:
        """Bind what is run from an edge to the next decision that is open."""
        places = self._slots.follow(edge, places)
        key = (id(edge.block), *sorted((name, id(buffer)) for name, buffer in places.items()))
        if key not in self._nodes:
            runs: list[Callable[[], None]] = []
            calls: list[str] = []
            block = edge.block
            while True:
                for call in block.calls:
                    places = self._slots.place(call, places)
                    runs.append(self._slots.bind(call, places, 1))
                    calls.append(call.stage)
                passed = _only_way(block)
                if passed is None:
                    break
                places, block = self._slots.follow(passed, places), passed.block
            self._nodes[key] = Node(block, places, runs, calls, self._scores)
        return self._nodes[key]


def traced(name: str, exit: int, marks: Sequence[Mark]) -> TracedRun:  # noqa: A002
    """The record of a walk that lasted from the first mark's beginning to the last one's end."""
    begin, end = marks[0][2], marks[-1][3]
    spans = tuple(
        Span(name=of, kind=kind, start_ns=start - begin, stop_ns=stop - begin) for of, kind, start, stop in marks
    )
    return TracedRun(name=name, exit=exit, start_s=0.0, total_ns=end - begin, spans=spans)


def _only_way(block: Block) -> Edge | None:
    """Where a block leads when nothing is decided after it."""
    decision = block.decision
    if decision is None:
        return block.next
    if isinstance(decision, Fork) and decision.forced is not None:
        return decision.open if decision.forced else decision.closed
    return None


def _finite(node: Node) -> bool:
    # Kernels may drop a NaN on the way to the score, so the logits are looked at.
    return all(map(math.isfinite, node.logits(1)[0].tolist()))


def _reader(buffer: Buffer) -> Callable[[], float]:
    """What reads the one number of one row."""
    view = buffer.read(1)
    read: Callable[[], float] = view.item if buffer.shared else lambda: buffer.read(1).item()
    return read


def _scorer(
    decision: Leave, logits: Callable[[int], NDArray[Any]], scores: RowScores | None
) -> tuple[Callable[[], float], Callable[[int], NDArray[Any]]]:
    """What computes the one score of one row, and what reads it then; NaN where the row has not met every exit."""
    assert scores is not None
    found = np.full(1, np.nan, dtype=np.float32)

    def value() -> float:
        found[:] = scores.at(decision.exit, logits(1), _ONLY)
        return found.item()

    return value if decision.complete else found.item, lambda rows: found[:rows]


def _in_turn(runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """One call for several; a single one is itself."""
    if len(runs) == 1:
        return runs[0]

    def run() -> None:
        for each in runs:
            each()

    return run
