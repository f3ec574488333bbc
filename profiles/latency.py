"""Latency of every forced exit, path and the thresholded stream, one inference at a time, in turns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgekit.data import Dataset
from edgekit.errors import MeasurementError
from edgekit.interfaces import DeviceClock
from edgekit.measured import Closure
from edgekit.profiles.protocol import Protocol
from edgekit.profiles.reference import Reference
from edgekit.profiles.system import collector_off
from edgekit.profiles.workloads import STREAM, Workload
from edgekit.progress import Progress
from edgekit.stats import median_half_width

if TYPE_CHECKING:
    from edgekit.session import Session

__all__ = ["Timed", "Timings", "close_latency", "measure_latency"]

STEADY = 0.02
"""How near two stretches of warm-up must be to each other."""
MOST_TIMES = 5
"""How many times the seconds asked for a measurement lasts at most for the sake of its medians."""
LOOK_EVERY_S = 5.0
"""How often a measurement that lasts for its medians' sake looks at them, between two rounds."""


class Timed(NamedTuple):
    """One inference.

    Attributes:
        host_ns: from just before ``session.run`` to just after.
        sample: of the data.
        exit: index of the exit where it left.
        device_ns: on the device's clock; ``None`` where there is none.
    """

    host_ns: int
    sample: int
    exit: int
    device_ns: int | None = None


@dataclass(kw_only=True)
class Timings:
    """Raw samples in the order in which they were taken; a measurement that is stopped leaves what it has.

    Attributes:
        taken: by name of the workload.
        rounds: how many rounds.
        seconds: how long they took.
        steady: whether the warm-up became steady; ``None`` before it ended.
        reference_ns: of the work that is the same in every round, done before the others.
    """

    taken: dict[str, list[Timed]]
    rounds: int = 0
    seconds: float = 0.0
    steady: bool | None = None
    reference_ns: list[int] = field(default_factory=list)

    @classmethod
    def nothing(cls, works: Sequence[Workload]) -> Timings:
        """None yet of any workload."""
        return cls(taken={work.name: [] for work in works})

    def host_ns(self, name: str) -> list[int]:
        """Of one workload."""
        return [each.host_ns for each in self.taken[name]]

    def device_ns(self, name: str) -> list[int]:
        """Of one workload on the device's clock; empty where it has none."""
        return [each.device_ns for each in self.taken[name] if each.device_ns is not None]


@dataclass
class _Turns:
    """Runs rounds: every workload in random order, so that whatever drifts hits them alike."""

    session: Session
    data: Dataset
    works: Sequence[Workload]
    rng: np.random.Generator
    clock: Callable[[], int]

    def __post_init__(self) -> None:
        runtime = self.session.runtime
        self.device = runtime if isinstance(runtime, DeviceClock) else None
        exits = len(self.session.plan.exits)
        self.turns = [work for work in self.works for _ in range(exits if work.kind == "stream" else 1)]
        self.reference = Reference()
        self.begin_pass(())

    def begin_pass(self, taken: Sequence[Timed]) -> None:
        """Let the stream see every sample again, after those that it has seen less often than others."""
        self._passes = self._samples(Counter(each.sample for each in taken))

    def _samples(self, seen: Counter[int]) -> Iterator[int]:
        """Every sample in random order, again and again; what an earlier part left of its pass comes first."""
        order = self.rng.permutation(len(self.data)).tolist()
        least = min(seen[sample] for sample in order)
        yield from (sample for sample in order if seen[sample] == least)
        while True:
            yield from self.rng.permutation(len(self.data)).tolist()

    def round(self, timings: Timings) -> None:
        """The reference; then each exit and path once on a random sample, the stream on the next ones of its pass."""
        begin = self.clock()
        self.reference()
        timings.reference_ns.append(_forward(self.clock() - begin, "the reference work"))
        for turn in self.rng.permutation(len(self.turns)):
            work = self.turns[turn]
            sample = next(self._passes) if work.kind == "stream" else int(self.rng.integers(len(self.data)))
            timings.taken[work.name].append(self._timed(work, sample))
        timings.rounds += 1

    def _timed(self, work: Workload, sample: int) -> Timed:
        inputs = self.data.batch(slice(sample, sample + 1))
        run, clock, device, gates = self.session.run, self.clock, self.device, work.gates or None
        if device is None:
            start = clock()
            result = run(inputs, exit=work.exit, gates=gates)
            host_ns, device_ns = clock() - start, None
        else:
            device.synchronize()
            start, begin = clock(), device.device_mark()
            result = run(inputs, exit=work.exit, gates=gates)
            end = device.device_mark()
            device.synchronize()
            host_ns = clock() - start
            device_ns = device.device_ns(begin, end)
        return Timed(_forward(host_ns, f"an inference of '{work.name}'"), sample, int(result.exit[0]), device_ns)


def _forward(took_ns: int, what: str) -> int:
    if took_ns < 0:
        raise MeasurementError(
            f"the clock went back by {-took_ns} ns during {what}; "
            "see that nothing sets the machine's monotonic clock, and measure again"
        )
    return took_ns


def measure_latency(
    session: Session,
    data: Dataset,
    works: Sequence[Workload],
    timings: Timings,
    *,
    protocol: Protocol,
    rng: np.random.Generator,
    clock: Callable[[], int],
    progress: Progress,
) -> None:
    """Warm up until steady, then add rounds to ``timings`` until the protocol is met; the garbage collector is off.

    A sample's time is from just before ``session.run`` to just after, batch 1: checking and copying the input in, the
    stages, the decisions and copying the answer out. Preprocessing happens before. Where the device has a clock, both
    end when the device has done everything.

    Raises:
        MeasurementError: the clock went back.
    """
    turns = _Turns(session, data, works, rng, clock)
    with collector_off():
        # An earlier part that never became steady stays so.
        timings.steady = _warm_up(turns, protocol, progress) and timings.steady is not False
        turns.begin_pass(timings.taken[STREAM])
        before_s, start, told = timings.seconds, clock(), -1
        medians = _Medians(works, protocol)
        while True:
            done = min(_done_percent(timings, protocol, samples=len(data)), medians.known_percent(timings))
            if done > told:  # seldom, so that whoever draws does not run between the samples
                progress("measure latency", done, 100)
                told = done
            if done >= 100:
                return
            turns.round(timings)
            timings.seconds = before_s + (clock() - start) * 1e-9


def _warm_up(turns: _Turns, protocol: Protocol, progress: Progress) -> bool:
    """Rounds thrown away until the last two stretches take the same, and whether they came to."""
    thrown_away, lasted_s = Timings.nothing(turns.works), list[float]()
    start = turns.clock()
    while True:
        begin = turns.clock()
        turns.round(thrown_away)
        now = turns.clock()
        lasted_s.append((now - begin) * 1e-9)
        elapsed_s = (now - start) * 1e-9
        if len(lasted_s) % 16 == 1:
            progress("warm up", int(100 * min(1.0, elapsed_s / max(protocol.warmup_s, 1e-9))), 100)
        enough = len(lasted_s) >= protocol.warmup_rounds and elapsed_s >= protocol.warmup_s
        if enough and _is_steady(lasted_s, protocol):
            return True
        if enough and elapsed_s >= protocol.max_warmup_s:
            return protocol.max_warmup_s == 0


def _is_steady(lasted_s: Sequence[float], protocol: Protocol) -> bool:
    """Whether medians of the last two stretches, each a third of what was run, are within :data:`STEADY`."""
    length = max(len(lasted_s) // 3, min(protocol.warmup_rounds, 2))
    if length == 0 or len(lasted_s) < 2 * length:
        return length == 0
    before, after = np.median(lasted_s[-2 * length : -length]), np.median(lasted_s[-length:])
    return bool(abs(after - before) <= STEADY * before)


def _done_percent(timings: Timings, protocol: Protocol, *, samples: int) -> int:
    """How much of what the protocol asks for there is."""
    passed = max(len(timings.taken[STREAM]) / samples, timings.seconds / max(protocol.max_seconds, 1e-9))
    counted = timings.rounds / protocol.min_samples
    lasted = timings.seconds / protocol.min_seconds if protocol.min_seconds else 1.0
    return math.floor(100 * min(passed, counted, lasted, 1.0))


class _Medians:
    """How well medians of the exits are known, as far as the protocol asks; looked at every now and then."""

    def __init__(self, works: Sequence[Workload], protocol: Protocol) -> None:
        self._exits = [work.name for work in works if work.kind == "exit"]
        self._protocol = protocol
        self._next_s, self._percent = protocol.min_seconds, 100  # no look before that
        self._most_s = min(protocol.max_seconds, MOST_TIMES * protocol.min_seconds)

    def known_percent(self, timings: Timings) -> int:
        """Of the samples that are needed; an interval shrinks as the root of their number grows."""
        if self._protocol.median_within == 0 or timings.seconds >= self._most_s:
            return 100
        if timings.seconds >= self._next_s:
            self._next_s = timings.seconds + LOOK_EVERY_S
            half = max(median_half_width(np.array(timings.host_ns(name), dtype=np.float64)) for name in self._exits)
            known = half <= self._protocol.median_within
            self._percent = 100 if known else int(99 * (self._protocol.median_within / half) ** 2)
        return self._percent


def close_latency(timings: Timings, works: Sequence[Workload]) -> Closure:
    """``sum_k share_k * mean latency_k`` over the stream's own exits, against the stream's mean latency."""
    exits = [work.name for work in works if work.kind == "exit"]
    counts = np.bincount([each.exit for each in timings.taken[STREAM]], minlength=len(exits))
    means_s = np.array([np.mean(timings.host_ns(name)) for name in exits]) * 1e-9
    return Closure(
        predicted=float(counts @ means_s / counts.sum()), measured=float(np.mean(timings.host_ns(STREAM)) * 1e-9)
    )
