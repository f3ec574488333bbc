"""Decisions of several runtimes on the same samples: exits under policies, ways through gates, and where they part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.data import Dataset
from edgekit.gate_ways import GateWays
from edgekit.parity_records import Count, Flip, GateFlip, GatesParity, PolicyParity
from edgekit.plan import Exit, Gate, Plan, walk
from edgekit.policy import Policy
from edgekit.progress import Progress
from edgekit.session import Session

__all__ = ["Held", "compare_gates", "compare_policies"]

Gates = Mapping[str, tuple[GatesParity, ...]]
NOT_REACHED = -1


@dataclass(frozen=True, kw_only=True)
class Held:
    """Runtimes held against one of them, and the samples that they run.

    Attributes:
        sessions: open, on one plan, by label; whoever compares may replace their policies.
        reference: label of the one that the others are held against.
        samples: to run.
        places: ``(samples,) intp``, of each in the data that it was taken from.
        batch: samples that run together.
        progress: told how many samples are done.
    """

    sessions: Mapping[str, Session]
    reference: str
    samples: Dataset
    places: NDArray[np.intp]
    batch: int
    progress: Progress

    @property
    def plan(self) -> Plan:
        """That all of them run."""
        return self.sessions[self.reference].plan

    @property
    def others(self) -> dict[str, Session]:
        """All but the reference, by label."""
        return {label: session for label, session in self.sessions.items() if label != self.reference}

    def accuracy(self, answers: NDArray[np.int64]) -> float | None:
        """Share of the samples whose class these ``(samples,)`` are; ``None`` without labels."""
        return None if self.samples.labels is None else float((answers == self.samples.labels).mean())

    def cost(self, sample: int, answer: int, other: int) -> int | None:
        """1 where ``answer`` is right and ``other`` is not, -1 for the reverse; ``None`` without labels."""
        if self.samples.labels is None:
            return None
        label = self.samples.labels[sample]
        return int(answer == label) - int(other == label)


@dataclass(frozen=True)
class _Taken:
    """``(samples,)`` each: index of the exit that was taken, and the class that is largest there."""

    exit: NDArray[np.int64]
    answer: NDArray[np.int64]


def compare_policies(held: Held, policies: Sequence[Policy], gates: Gates) -> dict[str, tuple[PolicyParity, ...]]:
    """Run all samples with each policy.

    Args:
        held: runtimes and samples.
        policies: that fit the plan; what they promise plays no part.
        gates: what :func:`compare_gates` found, for all constants of these policies.

    Returns:
        By label, in the order of the policies.
    """
    found: dict[str, list[PolicyParity]] = {label: [] for label in held.others}
    for number, policy in enumerate(policies):
        # A certificate binds a policy to the artifacts of one runtime.
        bare = msgspec.structs.replace(policy, provenance=None)
        taken = {}
        for turn, (label, session) in enumerate(held.sessions.items()):
            session.use(bare)
            results = [session.run(inputs) for inputs in held.samples.batches(held.batch)]
            taken[label] = _Taken(
                np.concatenate([result.exit for result in results]),
                np.concatenate([result.logits.argmax(axis=1) for result in results]),
            )
            done = number * len(held.sessions) + turn + 1
            held.progress("compare decisions", done, len(policies) * len(held.sessions))
        for label, parities in found.items():
            before = next((each for each in gates.get(label, ()) if each.constants == policy.constants), None)
            parities.append(_policy_parity(held, bare, label, taken, before))
    return {label: tuple(parities) for label, parities in found.items()}


def _policy_parity(
    held: Held, policy: Policy, label: str, taken: Mapping[str, _Taken], before: GatesParity | None
) -> PolicyParity:
    mine, theirs = taken[held.reference], taken[label]
    earlier = np.minimum(mine.exit, theirs.exit)
    exits = []
    for index, step in enumerate(held.plan.exits[:-1]):
        if policy.thresholds[index] != math.inf:
            compared = int((earlier >= index).sum())
            flipped = int(((earlier == index) & (mine.exit != theirs.exit)).sum())
            exits.append(Count(name=step.name, compared=compared, agreed=compared - flipped))
    return PolicyParity(
        policy=policy.name,
        score=policy.score,
        comparator=policy.comparator,
        thresholds=policy.thresholds,
        constants=policy.constants,
        samples=len(held.samples),
        exits=tuple(exits),
        flips=_flips(held, policy, label, taken, before),
        answers_changed=int((mine.answer != theirs.answer).sum()),
        accuracy_reference=held.accuracy(mine.answer),
        accuracy=held.accuracy(theirs.answer),
    )


def _flips(
    held: Held, policy: Policy, label: str, taken: Mapping[str, _Taken], before: GatesParity | None
) -> tuple[Flip, ...]:
    mine, theirs = taken[held.reference], taken[label]
    exits = [step.name for step in held.plan.exits]
    passed = _exits_before(held.plan)
    gates = {} if before is None else {flip.sample: flip.gate for flip in before.flips}
    flips = []
    for index in range(len(exits) - 1):
        rows = np.flatnonzero((mine.exit != theirs.exit) & (np.minimum(mine.exit, theirs.exit) == index))
        expected, given = (_scores(held, which, rows, index) for which in (held.reference, label))
        threshold = policy.thresholds[index]
        for row, score, other in zip(rows.tolist(), expected, given, strict=True):
            sample = int(held.places[row])
            gate = gates.get(sample)
            flips.append(
                Flip(
                    sample=sample,
                    reference_exit=exits[mine.exit[row]],
                    exit=exits[theirs.exit[row]],
                    at=exits[index],
                    threshold=threshold,
                    reference_score=score,
                    score=other,
                    margin=None if score is None else abs(score - threshold),
                    answer_changed=bool(mine.answer[row] != theirs.answer[row]),
                    cost=held.cost(row, mine.answer[row], theirs.answer[row]),
                    after_gate=gate if gate is not None and passed[gate] <= index else None,
                )
            )
    return tuple(sorted(flips, key=lambda flip: flip.sample))


def _scores(held: Held, label: str, rows: NDArray[np.intp], index: int) -> list[float | None]:
    """Of some samples at an exit, whether or not they would get there; ``None`` for NaN."""
    found: list[float | None] = []
    for start in range(0, len(rows), held.batch):
        chosen = rows[start : start + held.batch]
        scores = held.sessions[label].run(held.samples.batch(chosen), exit=index).score
        found += [None if math.isnan(value) else value for value in scores.tolist()]
    return found


def _exits_before(plan: Plan) -> dict[str, int]:
    """How many exits are passed before each gate."""
    found, passed = {}, 0
    for step in plan.steps:
        if isinstance(step, Exit):
            passed += 1
        for inner in walk((step,)):
            if isinstance(inner, Gate):
                found[inner.name] = passed
    return found


def compare_gates(held: Held, settings: Sequence[dict[str, float]]) -> dict[str, tuple[GatesParity, ...]]:
    """Run every sample alone to the last exit, and see which gates it finds open.

    Args:
        held: runtimes and samples.
        settings: of the gates' constants, those that are not as trained.

    Returns:
        By label, in the order of the settings.
    """
    found: dict[str, list[GatesParity]] = {label: [] for label in held.others}
    for constants in settings:
        walked = {label: _walk(held, label, session, constants) for label, session in held.sessions.items()}
        for label, parities in found.items():
            parities.append(_gates_parity(held, constants, walked[held.reference], walked[label]))
    return {label: tuple(parities) for label, parities in found.items()}


@dataclass(frozen=True)
class _Walked:
    """``(samples, gates) int8``: 1 open, 0 closed or :data:`NOT_REACHED`; ``(samples,)``: class at the last exit."""

    ways: NDArray[np.int8]
    answer: NDArray[np.int64]


def _walk(held: Held, label: str, session: Session, constants: Mapping[str, float]) -> _Walked:
    places = {gate.name: place for place, gate in enumerate(held.plan.gates)}
    ways = np.full((len(held.samples), len(places)), NOT_REACHED, dtype=np.int8)
    answers = np.zeros(len(held.samples), dtype=np.int64)
    with GateWays(session, constants) as walker:
        for row, sample in enumerate(held.samples.batches(1)):
            taken, answers[row] = walker.of(sample)
            for gate, is_open in taken.items():
                ways[row, places[gate]] = is_open
            held.progress(f"compare gates on {label}", row + 1, len(held.samples))
    return _Walked(ways, answers)


def _gates_parity(held: Held, constants: dict[str, float], mine: _Walked, theirs: _Walked) -> GatesParity:
    reached = (mine.ways != NOT_REACHED) & (theirs.ways != NOT_REACHED)
    differing = reached & (mine.ways != theirs.ways)
    gates = [gate.name for gate in held.plan.gates]
    flips = []
    for row in np.flatnonzero(differing.any(axis=1)).tolist():
        first = int(differing[row].argmax())
        flips.append(
            GateFlip(
                sample=int(held.places[row]),
                gate=gates[first],
                reference_open=bool(mine.ways[row, first]),
                later=int(differing[row].sum()) - 1,
                answer_changed=bool(mine.answer[row] != theirs.answer[row]),
                cost=held.cost(row, int(mine.answer[row]), int(theirs.answer[row])),
            )
        )
    return GatesParity(
        constants=constants,
        samples=len(held.samples),
        gates=tuple(
            Count(
                name=name,
                compared=int(reached[:, place].sum()),
                agreed=int((reached & ~differing)[:, place].sum()),
            )
            for place, name in enumerate(gates)
        ),
        flips=tuple(flips),
    )
