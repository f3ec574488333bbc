"""Where the time of an inference goes: traced runs, with the heads of the exits and without, taken apart by stage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.data import Dataset
from edgekit.errors import MeasurementError
from edgekit.measured import Interval, StageTime, TracedRun
from edgekit.plan import Gate, Plan, Run, Step, walk
from edgekit.profiles.system import collector_off
from edgekit.progress import Progress
from edgekit.session import Session
from edgekit.stats import difference_interval, quantile_interval

__all__ = ["Stages", "every_stage", "measure_stages"]

PASSES = 4
"""Of every kind of run in a round, after one that is thrown away: what the other session left is in the caches."""
FEWEST_ROUNDS = 5
MOST_ROUNDS = 1000
"""More would only take memory: a median of thousands moves no more."""
FEWEST_DECISIONS = 6
"""From which on a median has an interval; see :func:`edgekit.stats.quantile_interval`."""
KEPT = 3
"""Traces of each exit and of the stream that are kept for a timeline."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Where the time goes.

    Attributes:
        stages: in the order of their first run; those that nothing reads never run, and are left out.
        traces: some, of every exit and of the stream.
        tracing_overhead: median traced time over median untraced time of the same runs; 1 when tracing costs nothing.
    """

    stages: tuple[StageTime, ...]
    traces: tuple[TracedRun, ...]
    tracing_overhead: float


def measure_stages(
    session: Session,
    data: Dataset,
    *,
    seconds: float,
    rng: np.random.Generator,
    clock: Callable[[], int],
    progress: Progress,
    zero_ns: int = 0,
) -> Stages:
    """Trace real samples, every kind of run in turns, and take the traces apart.

    Compute, boundary and share are of runs to the last exit that decide at every exit and in which all gates are open;
    a stage that these leave out is looked at where a gate is closed. A head is what such runs spend in a stage more
    than runs of a second session, which asks for no head: in one session, runtimes take what is open already, heads
    and all. It holds the stages once more, so look at memory before. A runtime that computes what nobody asks for shows
    heads that cost about nothing.

    Decisions are of runs to the last exit whose gates fall as they fall: ``None`` where a stage ran in too few.
    A stage that runs several times in an inference counts with their sum. Where samples are too few for an interval,
    its ends are the smallest and the largest.

    Args:
        session: an open bundle.
        data: real samples.
        seconds: how long, at least; no more than :data:`MOST_ROUNDS` rounds.
        rng: of samples and turns.
        clock: nanoseconds.
        progress: told where it stands.
        zero_ns: what ``start_s`` of the traces counts from.

    Raises:
        MeasurementError: the clock stands still.
    """
    with _never_leaving(session) as bare, collector_off():
        turns = _Turns(session, bare, data, rng=rng, clock=clock, zero_ns=zero_ns)
        start, told = clock(), -1
        while (done := _done_percent((clock() - start) * 1e-9, turns.rounds, seconds=seconds)) < 100:
            if done > told:
                progress("see where the time goes", done, 100)
                told = done
            turns.round()
    progress("see where the time goes", 100, 100)
    plain, full = np.median(turns.plain.total_ns), np.median(turns.full[0].total_ns)
    if not (plain > 0 and full > 0):
        raise MeasurementError("the clock stood still during inferences: give one that tells nanoseconds")
    return Stages(
        stages=tuple(_stage_times(session.plan, turns)),
        traces=tuple(turns.kept),
        tracing_overhead=float(full / plain),
    )


def _never_leaving(session: Session) -> Session:
    """The network opened once more, by a policy of the same score under which no exit but the last decides."""
    never = (np.inf,) * (len(session.plan.exits) - 1)
    policy = msgspec.structs.replace(session.policy, thresholds=never, name="never-exit", provenance=None)
    return session.again(policy=policy)


def _done_percent(lasted_s: float, rounds: int, *, seconds: float) -> int:
    passed = max(lasted_s / seconds if seconds > 0 else 1.0, rounds / MOST_ROUNDS)
    return int(100 * min(passed, rounds / FEWEST_ROUNDS, 1.0))


@dataclass(kw_only=True, eq=False)
class _Kind:
    """A kind of run, and what was taken of it.

    Attributes:
        exit: forced; ``None`` leaves it to the policy.
        gates: forced outcomes by name.
        session: that runs it.
        traced: or only timed.
        runs: its traces.
        total_ns: how long each run took.
    """

    session: Session
    exit: int | None
    gates: Mapping[str, bool] = field(default_factory=dict)
    traced: bool = True
    runs: list[TracedRun] = field(default_factory=list)
    total_ns: list[int] = field(default_factory=list)


class _Turns:
    """Runs rounds: every kind of run in random order, so that whatever drifts hits them alike.

    Attributes:
        full: runs to the last exit, for each of :func:`every_stage`.
        free: runs to the last exit whose gates fall as they fall; the first of ``full`` where there are no gates.
        bare: as the first of ``full``, without the heads of the exits before the last.
        plain: as the first of ``full``, untraced.
        kept: traces for a timeline.
        rounds: how many.
    """

    def __init__(
        self,
        session: Session,
        bare: Session,
        data: Dataset,
        *,
        rng: np.random.Generator,
        clock: Callable[[], int],
        zero_ns: int,
    ) -> None:
        self._session, self._data, self._rng, self._clock, self._zero_ns = session, data, rng, clock, zero_ns
        self._exits = len(session.plan.exits)
        last, ways = self._exits - 1, every_stage(session.plan)
        self.full = [_Kind(session=session, exit=last, gates=way) for way in ways]
        self.free = _Kind(session=session, exit=last) if session.plan.gates else self.full[0]
        self.plain = _Kind(session=session, exit=last, gates=ways[0], traced=False)
        self.bare = _Kind(session=bare, exit=None, gates=ways[0])
        self._with_heads = list(dict.fromkeys([*self.full, self.free, self.plain]))
        self.kept: list[TracedRun] = []
        self.rounds = 0

    def round(self) -> None:
        """Some runs of each kind, those of one session together, whichever comes first."""
        for bare in self._rng.permutation(2):
            self._take([self.bare] if bare else self._with_heads, PASSES)
        if not self.kept:
            shown = [_Kind(session=self._session, exit=index) for index in (*range(self._exits), None)]
            self._take(shown, KEPT)
            self.kept = [trace for kind in shown for trace in kind.runs]
        self.rounds += 1

    def _take(self, kinds: Sequence[_Kind], passes: int) -> None:
        for number in range(passes + 1):
            for place in self._rng.permutation(len(kinds)):
                kind = kinds[place]
                trace, total_ns = self._run(kind)
                if number == 0:
                    continue
                kind.total_ns.append(total_ns)
                if trace is not None:
                    kind.runs.append(trace)

    def _run(self, kind: _Kind) -> tuple[TracedRun | None, int]:
        sample = int(self._rng.integers(len(self._data)))
        inputs = self._data.batch(slice(sample, sample + 1))
        begin = self._clock()
        if not kind.traced:
            kind.session.run(inputs, exit=kind.exit, gates=kind.gates)
            return None, self._clock() - begin
        trace = kind.session.trace(inputs, exit=kind.exit, gates=kind.gates, clock=self._clock)
        return msgspec.structs.replace(trace, start_s=(begin - self._zero_ns) * 1e-9), trace.total_ns


@dataclass(kw_only=True)
class _Piece:
    """Nanoseconds of a stage in one inference, summed where it ran several times."""

    compute: int = 0
    boundary: int = 0
    decision: int | None = None

    @property
    def whole(self) -> int:
        return self.compute + self.boundary + (self.decision or 0)


def _pieces(trace: TracedRun) -> dict[str, _Piece]:
    """By stage; what is decided before the first stage is part of its boundary."""
    found: dict[str, _Piece] = {}
    here, before_ns = None, trace.spans[0].start_ns
    for span in trace.spans:
        length = span.stop_ns - span.start_ns
        if span.kind == "compute":
            here = found.setdefault(span.name, _Piece())
            here.compute += length
            here.boundary += span.start_ns - before_ns
        elif span.kind == "decision" and here is not None:
            here.decision = (here.decision or 0) + length
        if here is not None:
            before_ns = span.stop_ns
    return found


def _stage_times(plan: Plan, turns: _Turns) -> Iterator[StageTime]:
    full = [([_pieces(trace) for trace in kind.runs], np.array(kind.total_ns)) for kind in turns.full]
    bare = [_pieces(trace) for trace in turns.bare.runs]
    free = [_pieces(trace) for trace in turns.free.runs]
    optional = _optional_heads(plan)
    for name in (stage.name for stage in plan.stages):
        runs, totals_ns = next((each for each in full if name in each[0][0]), (None, None))
        if runs is None or totals_ns is None:
            continue
        pieces = [run[name] for run in runs]
        others_ns = np.array([sum(piece.compute for piece in run.values()) - run[name].compute for run in runs])
        compute_s = _seconds([piece.compute for piece in pieces])
        decided = [run[name].decision for run in free if name in run]
        decision_s = _seconds([each for each in decided if each is not None])
        bare_s = _seconds([run[name].compute for run in bare if name in run])
        yield StageTime(
            name=name,
            compute=_middle(compute_s),
            head=_head(compute_s, bare_s) if name in optional and runs is full[0][0] else None,
            decision=_middle(decision_s) if decision_s.size >= FEWEST_DECISIONS else None,
            boundary=_middle(_seconds([piece.boundary for piece in pieces])),
            share=float(np.median([piece.whole for piece in pieces]) / np.median(totals_ns)),
            relative=_middle(compute_s * 1e9 / others_ns) if np.all(others_ns > 0) else None,
        )


def _seconds(samples_ns: Sequence[int]) -> NDArray[np.float64]:
    return np.array(samples_ns, dtype=np.float64) * 1e-9


def _middle(samples: NDArray[np.float64]) -> Interval:
    """The median and its interval, or the range where there is none."""
    low, high = quantile_interval(samples, 0.5) or (samples.min(), samples.max())
    return Interval(value=float(np.median(samples)), low=float(low), high=float(high))


def _head(with_it: NDArray[np.float64], without: NDArray[np.float64]) -> Interval:
    """What a head adds; all that the stage takes where it is not run without."""
    return difference_interval(with_it, without) if without.size else _middle(with_it)


def _optional_heads(plan: Plan) -> set[str]:
    """Stages that make the logits of an exit, though not of the last, where the head always runs."""
    early, last = {step.logits for step in plan.exits[:-1]}, plan.exits[-1].logits
    made: defaultdict[str, set[str]] = defaultdict(set)
    for step in walk(plan.steps):
        if isinstance(step, Run):
            made[step.stage].update(step.called(plan.stage(step.stage).outputs))
    return {stage for stage, names in made.items() if names & early and last not in names}


def every_stage(plan: Plan) -> tuple[dict[str, bool], ...]:
    """Outcomes of all gates, as few as will do, so that every stage is on the way of one; all open comes first."""
    runs = list(_runs(plan.steps, {}))
    opened = {gate.name: True for gate in plan.gates}
    chosen: list[dict[str, bool]] = []
    seen: set[str] = set()
    for way in (opened, dict.fromkeys(opened, False), *(opened | path for _, path in runs)):
        reached = {stage for stage, path in runs if path.items() <= way.items()}
        if not chosen or not reached <= seen:
            chosen.append(way)
            seen |= reached
    return tuple(chosen)


def _runs(steps: Sequence[Step], path: dict[str, bool]) -> Iterator[tuple[str, dict[str, bool]]]:
    """Every run of a stage with the outcomes that lead to it."""
    for step in steps:
        if isinstance(step, Run):
            yield step.stage, path
        elif isinstance(step, Gate):
            yield from _runs(step.steps, {**path, step.name: True})
            yield from _runs(step.otherwise, {**path, step.name: False})
