"""A plan under a policy as linked blocks: what is run up to each decision, and where every outcome leads.

A gate gives tensors that are one made inside it, or one made before it. Nothing is copied for that: the edge that leads
out of the gate says which tensor each name stands for from there on.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgekit.plan import ZERO, Exit, Gate, Plan, Run, Stage, Step, walk

__all__ = ["Block", "Call", "Edge", "Fork", "Leave", "asked_of", "route"]


@dataclass(frozen=True)
class Edge:
    """Where an outcome leads.

    Attributes:
        block: what comes next.
        stands_for: the tensor that each name given by a gate stands for from here on; :data:`~edgekit.plan.ZERO` for
            zeros.
    """

    block: Block
    stands_for: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Leave:
    """Rows leave whose score reaches the threshold; the last of a route lets all leave.

    Attributes:
        exit: its index.
        logits: name of its logits.
        score: name of its score; ``None`` where no stage computes it.
        threshold: NaN lets no row leave, and costs what any other threshold does.
        complete: no exit before it is passed by undecided: rows have met all of them.
    """

    exit: int
    logits: str
    score: str | None
    threshold: np.float32
    complete: bool


@dataclass(frozen=True)
class Fork:
    """Rows whose value is not zero take one way, the others another; both lead to ``after``.

    Attributes:
        gate: what it decides.
        open: first of the blocks when open.
        closed: first of the blocks when closed.
        forced: the way that every row takes, whatever the value; ``None`` leaves it to the value.
        after: the block that both ways lead to.
    """

    gate: Gate
    open: Edge
    closed: Edge
    forced: bool | None
    after: Block


@dataclass(frozen=True)
class Call:
    """A stage that is run.

    Attributes:
        stage: its name.
        inputs: tensors that it reads, each with its name in the stage.
        outputs: tensors asked of it, likewise.
        live: tensors that are read after it.
    """

    stage: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    live: frozenset[str]


@dataclass(eq=False)
class Block:
    """What is run up to a decision, the decision, and what follows.

    Attributes:
        calls: in order.
        decision: ``None`` where a way through a gate ends.
        next: where rows go that do not leave, and where a way through a gate ends; ``None`` after the last exit and
            at a fork, which has two.
        live: tensors that are read after the calls, by the decision or later.
        needed: tensors that must be there before them.
    """

    calls: tuple[Call, ...] = ()
    decision: Leave | Fork | None = None
    next: Edge | None = None
    live: frozenset[str] = frozenset()
    needed: frozenset[str] = frozenset()

    def prepend(self, stage: Stage, run: Run, asked: Container[str]) -> None:
        """Run a stage before all others, unless nothing is asked of it."""
        inputs = tuple(zip(run.called(stage.inputs), stage.inputs, strict=True))
        outputs = tuple(pair for pair in zip(run.called(stage.outputs), stage.outputs, strict=True) if pair[0] in asked)
        if outputs:
            self.calls = (Call(stage.name, inputs, outputs, self.needed), *self.calls)
            self.needed = self.needed.difference(name for name, _ in outputs).union(name for name, _ in inputs)


def route(
    plan: Plan, score: str | None, deciding: Mapping[int, float], forced: Mapping[str, bool] | None = None
) -> Block:
    """The first block of the steps up to the last deciding exit.

    Stages are asked for what any later stage reads, whether or not the route gets there: a row that leaves has paid
    for it.

    Args:
        plan: stages and steps.
        score: that decides; ``None`` asks the stages for none.
        deciding: thresholds by exit index, ascending; other exits are passed by.
        forced: outcome of gates by name, whatever their value.
    """
    return _Router(plan, score, deciding, forced or {}).route()


def asked_of(plan: Plan) -> set[str]:
    """Tensors that stages and gates read: what stages are asked for, logits and scores aside."""
    return _read_by(plan.steps, plan)


class _Router:
    def __init__(
        self, plan: Plan, score: str | None, deciding: Mapping[int, float], forced: Mapping[str, bool]
    ) -> None:
        self.plan = plan
        self.deciding = {plan.exits[index].name: (index, threshold) for index, threshold in deciding.items()}
        self.score = score
        self.forced = forced
        self.asked = asked_of(plan)
        for index in deciding:
            self.asked |= self._read_at(plan.exits[index])

    def route(self) -> Block:
        last = self.plan.exits[max(index for index, _ in self.deciding.values())]
        return self._blocks(self.plan.steps[: self.plan.steps.index(last) + 1], None)

    def _blocks(self, steps: Sequence[Step], end: Edge | None) -> Block:
        """The first of the blocks that do ``steps`` and then go to ``end``; built from the last to the first."""
        read = {end.stands_for.get(name, name) for name in end.block.needed} - {ZERO} if end else set()
        block = _block(None, end, read)
        for step in reversed(steps):
            if isinstance(step, Run):
                block.prepend(self.plan.stage(step.stage), step, self.asked)
            elif isinstance(step, Gate):
                block = self._fork(step, block)
            elif step.name in self.deciding:
                block = self._leave(step, block)
        return block

    def _leave(self, step: Exit, follows: Block) -> Block:
        index, threshold = self.deciding[step.name]
        score = None if self.score is None else step.scores[self.score]
        others = [other for other, _ in self.deciding.values()]
        complete = set(range(index)).issubset(others)
        decision = Leave(index, step.logits, score, np.float32(threshold), complete)
        is_last = index == max(others)
        return _block(decision, None if is_last else Edge(follows), follows.needed | self._read_at(step))

    def _read_at(self, step: Exit) -> set[str]:
        return {step.logits} if self.score is None else {step.logits, step.scores[self.score]}

    def _fork(self, gate: Gate, after: Block) -> Block:
        ways = []
        for way, steps in enumerate((gate.steps, gate.otherwise)):
            stands_for = {name: sources[way] for name, sources in gate.outputs.items() if name in after.needed}
            ways.append(Edge(self._blocks(steps, Edge(after, stands_for))))
        decision = Fork(gate, ways[0], ways[1], self.forced.get(gate.name), after)
        return _block(decision, None, ways[0].block.needed | ways[1].block.needed | {gate.value})


def _block(decision: Leave | Fork | None, following: Edge | None, live: Iterable[str]) -> Block:
    return Block(decision=decision, next=following, live=frozenset(live), needed=frozenset(live))


def _read_by(steps: Sequence[Step], plan: Plan) -> set[str]:
    read: set[str] = set()
    for step in walk(steps):
        if isinstance(step, Run):
            read.update(step.called(plan.stage(step.stage).inputs))
        elif isinstance(step, Gate):
            read.add(step.value)
            read.update(source for sources in step.outputs.values() for source in sources)
    return read
