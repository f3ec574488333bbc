"""Latency of every forced exit and of the thresholded stream, one inference at a time, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgekit.data import Dataset
from edgekit.profiles.protocol import Protocol
from edgekit.profiles.system import collector_off
from edgekit.progress import Progress
from edgekit.records import Closure, LatencySummary

if TYPE_CHECKING:
    from edgekit.session import Session

__all__ = ["Timings", "close_latency", "latency_warnings", "measure_latency"]

VARIATION = 0.10
"""Standard deviation over mean that makes a figure doubtful (pyperf)."""
MISMATCH = 0.10
"""How far the stream may be from the sum of its parts."""


@dataclass(kw_only=True)
class Timings:
    """Raw samples in the order in which they were taken.

    Attributes:
        exits_ns: nanoseconds of each forced exit.
        stream_ns: of the stream.
        stream_samples: which sample of the data each inference of the stream saw.
        stream_exits: at which exit it left.
        rounds: how many rounds.
        seconds: how long they took.
    """

    exits_ns: tuple[list[int], ...]
    stream_ns: list[int] = field(default_factory=list)
    stream_samples: list[int] = field(default_factory=list)
    stream_exits: list[int] = field(default_factory=list)
    rounds: int = 0
    seconds: float = 0.0


class _Turns:
    """Runs rounds: all exits and the stream in random order, so that whatever drifts hits them alike."""

    def __init__(self, session: Session, data: Dataset, *, rng: np.random.Generator, clock: Callable[[], int]) -> None:
        self._session = session
        self._data = data
        self._rng = rng
        self._clock = clock
        self._exits = len(session.plan.exits)

    def round(self, timings: Timings, passes: Iterator[int]) -> None:
        """One round: each exit once on a random sample, the stream on the next samples of its pass."""
        for turn in self._rng.permutation(2 * self._exits):
            if turn < self._exits:
                self._forced(int(turn), timings)
            else:
                self._streamed(next(passes), timings)
        timings.rounds += 1

    def passes(self) -> Iterator[int]:
        """Every sample in random order, again and again."""
        while True:
            yield from self._rng.permutation(len(self._data)).tolist()

    def _forced(self, exit_index: int, timings: Timings) -> None:
        sample = int(self._rng.integers(len(self._data)))
        inputs = self._data.batch(slice(sample, sample + 1))
        run, clock = self._session.run, self._clock
        start = clock()
        run(inputs, exit=exit_index)
        stop = clock()
        timings.exits_ns[exit_index].append(stop - start)

    def _streamed(self, sample: int, timings: Timings) -> None:
        inputs = self._data.batch(slice(sample, sample + 1))
        run, clock = self._session.run, self._clock
        start = clock()
        result = run(inputs)
        stop = clock()
        timings.stream_ns.append(stop - start)
        timings.stream_samples.append(sample)
        timings.stream_exits.append(int(result.exit[0]))


def measure_latency(
    session: Session,
    data: Dataset,
    *,
    protocol: Protocol,
    rng: np.random.Generator,
    clock: Callable[[], int],
    progress: Progress,
) -> Timings:
    """Warm up, then measure in rounds until the protocol is met; the garbage collector is off meanwhile.

    A sample's time is from just before ``session.run`` to just after, batch 1: checking and copying the input in, the
    stages, the decisions and copying the answer out. Preprocessing happens before.
    """
    exits = len(session.plan.exits)
    turns = _Turns(session, data, rng=rng, clock=clock)
    with collector_off():
        start = clock()
        thrown_away = Timings(exits_ns=tuple([] for _ in range(exits)))
        passes = turns.passes()
        while thrown_away.rounds < protocol.warmup_rounds or (clock() - start) * 1e-9 < protocol.warmup_s:
            turns.round(thrown_away, passes)

        timings = Timings(exits_ns=tuple([] for _ in range(exits)))
        start, passes, told = clock(), turns.passes(), -1
        while True:
            turns.round(timings, passes)
            timings.seconds = (clock() - start) * 1e-9
            done = _done_percent(timings, protocol, samples=len(data))
            if done > told:  # seldom, so that whoever draws does not run between the samples
                progress("measure latency", done, 100)
                told = done
            if done >= 100:
                return timings


def _done_percent(timings: Timings, protocol: Protocol, *, samples: int) -> int:
    """How much of what the protocol asks for there is."""
    passed = max(len(timings.stream_ns) / samples, timings.seconds / max(protocol.max_seconds, 1e-9))
    counted = timings.rounds / protocol.min_samples
    lasted = timings.seconds / protocol.min_seconds if protocol.min_seconds else 1.0
    return int(100 * min(passed, counted, lasted, 1.0))


def close_latency(timings: Timings) -> Closure:
    """``sum_k share_k * mean latency_k`` over the stream's own exits, against the stream's mean latency."""
    counts = np.bincount(timings.stream_exits, minlength=len(timings.exits_ns))
    means_s = np.array([np.mean(latency_ns) for latency_ns in timings.exits_ns]) * 1e-9
    return Closure(
        predicted_s=float(counts @ means_s / counts.sum()),
        measured_s=float(np.mean(timings.stream_ns) * 1e-9),
    )


def latency_warnings(summaries: dict[str, LatencySummary], closure: Closure) -> Iterator[str]:
    """What about the samples makes the figures less certain, and what to change.

    Args:
        summaries: by exit name, and the stream's.
        closure: of the stream.
    """
    unsteady = [
        f"{name} {summary.sd_s / summary.mean_s:.0%}"
        for name, summary in summaries.items()
        if summary.mean_s > 0 and summary.sd_s / summary.mean_s > VARIATION
    ]
    if unsteady:
        yield (
            f"latency varies by more than {VARIATION:.0%} of its mean ({', '.join(unsteady)}); "
            "read medians, pin threads to one kind of core, fix the frequency, and measure longer"
        )
    for level, key in (("90th", "p90_s"), ("99th", "p99_s")):
        few = [name for name, summary in summaries.items() if getattr(summary, key) is None]
        if few:
            yield (
                f"too few samples for a {level} percentile ({', '.join(few)}); measure longer: the protocol 'standard'"
            )
    if closure.predicted_s > 0 and abs(closure.ratio - 1) > MISMATCH:
        yield (
            f"the stream took {closure.ratio:.2f} times what its exits explain "
            f"({closure.measured_s * 1e3:.3f} ms against {closure.predicted_s * 1e3:.3f} ms); "
            "measure longer on a quiet machine before trusting either"
        )
