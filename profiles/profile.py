"""The verb: measure what each exit of a session costs, and say how sure that is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.data import Dataset
from edgekit.environment import Environment
from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.policy import Policy
from edgekit.profiles.answers import BATCH_ROWS, Answers, check_answers, require_usable
from edgekit.profiles.energy import find_meter, measure_energy
from edgekit.profiles.latency import Timings, close_latency, latency_warnings, measure_latency
from edgekit.profiles.protocol import Protocol, as_protocol
from edgekit.profiles.stats import summarize
from edgekit.profiles.system import machine_warnings, peak_rss_bytes
from edgekit.progress import Progress, silent
from edgekit.records import Closure, Energy, ExitProfile, Profile, StreamProfile, gate_shares, mean_macs

if TYPE_CHECKING:
    from edgekit.session import Session

__all__ = ["profile"]

POOL_BYTES = 64 << 20
POOL_SAMPLES = 1024
"""Inputs made ready before an energy window, so that their preprocessing is in nobody's energy."""
IDLE_DRIFT = 0.10
"""How much idle power may change over the windows."""


def profile(
    session: Session,
    data: Dataset,
    *,
    policy: Policy | None = None,
    protocol: Protocol | Literal["quick", "standard"] = "quick",
    meter: Meter | None = None,
    seed: int = 0,
    progress: Progress = silent,
    root: Path = Path("/"),
    clock: Callable[[], int] = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> Profile:
    """Measure latency, energy, memory and answers of every exit and of the thresholded stream.

    Writes nothing; interrupted, it leaves nothing behind, and the session has its own policy again.

    Args:
        session: an open bundle.
        data: real samples: what the inputs hold changes time and power.
        policy: of the stream; the session's own when not given.
        protocol: how long to measure; see :class:`edgekit.profiles.protocol.Protocol`.
        meter: of energy; when not given, the first registered one that can measure here.
        seed: of samples, turns and the bootstrap.
        progress: told where it stands.
        root: the folder that stands for ``/`` when the machine is looked at.
        clock: nanoseconds.
        sleep: seconds of doing nothing, for the idle baseline.

    Raises:
        PolicyError: the policy does not fit the network.
        MeasurementError: the data, the protocol or the given meter can give no meaningful figure.
        InputError: the samples do not have the network's shape or dtype.
    """
    settings = as_protocol(protocol)
    chosen = policy or session.policy
    chosen.require_fits(session.plan)
    require_usable(data, classes=session.plan.classes)
    meter, no_energy = _usable_meter(meter, protocol=settings, root=root)
    rng = np.random.default_rng(seed)
    before = Environment.take(root=root)
    with _using(session, chosen):
        first_run_s = _first_run_s(session, data, clock=clock)
        timings = measure_latency(session, data, protocol=settings, rng=rng, clock=clock, progress=progress)
        peak = peak_rss_bytes(root=root)
        spent = _Spent.nothing(len(session.plan.exits), no_energy)
        if meter is not None:
            spent = _measure_spent(
                session, data, meter, protocol=settings, rng=rng, clock=clock, sleep=sleep, progress=progress
            )
        answers = check_answers(session, data, progress=progress)
    after = Environment.take(root=root)

    exits = _exit_profiles(session, timings, spent, answers, seed=seed)
    stream = StreamProfile(
        accuracy=answers.accuracy,
        exits=tuple(timings.stream_exits),
        latency_ns=tuple(timings.stream_ns),
        latency=summarize(timings.stream_ns, seed=seed),
        energy=spent.stream,
        macs=mean_macs(session.plan, answers.executed, samples=len(data)),
    )
    closure = close_latency(timings)
    summaries = {each.name: each.latency for each in exits} | {"stream": stream.latency}
    scripted = _scripted(session, meter)
    return Profile(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        network=session.bundle.manifest.name if session.bundle is not None else "",
        plan=session.plan.fingerprint,
        artifacts=session.bundle.artifact_digests(session.runtime.target) if session.bundle is not None else {},
        runtime=_as_read(session.runtime.describe()),
        policy=_as_read(chosen.to_mapping()),
        data=data.source,
        data_sha256=data.sha256,
        samples=len(data),
        settings=_as_read(_settings(settings, timings, spent, meter, seed=seed)),
        exits=exits,
        stream=stream,
        closure=closure,
        energy_closure=_close_energy(spent),
        load_s=session.load_s,
        first_run_s=first_run_s,
        peak_rss_bytes=peak,
        before=before,
        after=after,
        warnings=(
            *((f"not a measurement of a device: {scripted}",) if scripted else ()),
            *machine_warnings(before, after),
            *latency_warnings(summaries, closure),
            *_answer_warnings(timings, answers, samples=len(data)),
            *_other_warnings(spent, meter, first_run_s=first_run_s, peak=peak),
        ),
        scripted=scripted,
        gates=gate_shares(session.plan, answers.exits.tolist(), answers.executed),
    )


@dataclass(frozen=True, kw_only=True)
class _Spent:
    """Energy of every exit and of the stream.

    Attributes:
        exits: of each forced exit.
        stream: with the policy.
        shares: of the stream's inferences in its windows, by exit.
        idle_w: power of the idle machine before and after.
    """

    exits: tuple[Energy, ...]
    stream: Energy
    shares: NDArray[np.float64] | None = None
    idle_w: tuple[float, ...] = ()

    @classmethod
    def nothing(cls, exits: int, reason: str) -> _Spent:
        return cls(exits=(Energy(reason=reason),) * exits, stream=Energy(reason=reason))


@contextmanager
def _using(session: Session, policy: Policy) -> Iterator[None]:
    """The session with another policy inside the block."""
    own = session.policy
    if policy is not own:
        session.use(policy)
    try:
        yield
    finally:
        if policy is not own:
            session.use(own)


def _usable_meter(meter: Meter | None, *, protocol: Protocol, root: Path) -> tuple[Meter | None, str]:
    """The given meter or one that is found, else why there is none.

    Raises:
        MeasurementError: the given one cannot measure here.
    """
    if protocol.energy_window_s == 0:
        return None, "the protocol measures no energy; give it an energy_window_s"
    if meter is None:
        return find_meter(root=root)
    reason = meter.unavailable()
    if reason is not None:
        raise MeasurementError(f"meter '{meter.name}' cannot measure here: {reason}")
    return meter, ""


def _first_run_s(session: Session, data: Dataset, *, clock: Callable[[], int]) -> float | None:
    """Time of the session's first inference of all, to the last exit; ``None`` when it is not the first."""
    if session.has_run:
        return None
    inputs = data.batch(slice(0, 1))
    start = clock()
    session.run(inputs, exit=len(session.plan.exits) - 1)
    return (clock() - start) * 1e-9


def _measure_spent(
    session: Session,
    data: Dataset,
    meter: Meter,
    *,
    protocol: Protocol,
    rng: np.random.Generator,
    clock: Callable[[], int],
    sleep: Callable[[float], None],
    progress: Progress,
) -> _Spent:
    """Energy of every exit and of the stream, on inputs made ready before; a meter that fails becomes the reason."""
    exits = len(session.plan.exits)
    sample_bytes = max(1, data.batch(slice(0, 1)).nbytes)
    size = min(len(data), POOL_SAMPLES, max(1, POOL_BYTES // sample_bytes))
    rows = np.sort(rng.choice(len(data), size=size, replace=False))
    pool = [data.batch(slice(row, row + 1)) for row in rows.tolist()]
    inputs, left = cycle(pool), Counter[int]()

    def forced(index: int) -> Callable[[], object]:
        return lambda: session.run(next(inputs), exit=index)

    def stream() -> None:
        left[int(session.run(next(inputs)).exit[0])] += 1

    workloads = [*(forced(index) for index in range(exits)), stream]
    try:
        measured = measure_energy(
            meter, workloads, protocol=protocol, rng=rng, clock=clock, sleep=sleep, progress=progress
        )
    except MeasurementError as error:
        return _Spent.nothing(exits, str(error))
    return _Spent(
        exits=measured.energies[:-1],
        stream=measured.energies[-1],
        shares=np.array([left[index] for index in range(exits)]) / left.total(),
        idle_w=measured.idle_w,
    )


def _exit_profiles(
    session: Session, timings: Timings, spent: _Spent, answers: Answers, *, seed: int
) -> tuple[ExitProfile, ...]:
    macs = session.plan.exit_macs()
    return tuple(
        ExitProfile(
            name=step.name,
            macs=macs[index],
            accuracy=answers.exit_accuracy(index),
            share=answers.share(index),
            share_accuracy=answers.share_accuracy(index),
            latency_ns=tuple(timings.exits_ns[index]),
            latency=summarize(timings.exits_ns[index], seed=seed),
            energy=spent.exits[index],
        )
        for index, step in enumerate(session.plan.exits)
    )


def _close_energy(spent: _Spent) -> Closure | None:
    """``sum_k share_k * gross energy_k`` against the stream's, when all were measured."""
    each_j = [energy.gross_j for energy in spent.exits if energy.gross_j is not None]
    if spent.shares is None or spent.stream.gross_j is None or len(each_j) < len(spent.exits):
        return None
    return Closure(predicted_s=float(spent.shares @ np.array(each_j)), measured_s=spent.stream.gross_j)


def _scripted(session: Session, meter: Meter | None) -> str | None:
    """What was not real."""
    runtime = session.runtime.describe()
    parts = []
    if runtime.get("scripted"):
        parts.append(f"the runtime '{runtime.get('name', session.runtime.name)}' is scripted")
    if meter is not None and meter.describe().get("replay"):
        parts.append(f"the meter '{meter.name}' plays a recording")
    return "; ".join(parts) or None


def _settings(protocol: Protocol, timings: Timings, spent: _Spent, meter: Meter | None, *, seed: int) -> dict[str, Any]:
    return {
        "protocol": asdict(protocol),
        "seed": seed,
        "batch": 1,
        "rounds": timings.rounds,
        "timed_s": timings.seconds,
        "timed": "session.run: input check and copy, stages, decisions, answer; preprocessing is not in it",
        "interleaving": "in every round each forced exit once and the stream as often as there are exits, shuffled",
        "garbage_collector": "off while timing",
        "answers_batch": BATCH_ROWS,
        "meter": meter.describe() if meter is not None else None,
        "idle_w": list(spent.idle_w),
    }


def _as_read(mapping: dict[str, Any]) -> dict[str, Any]:
    """As whoever reads the profile's file will find it."""
    read: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(mapping))
    return read


def _answer_warnings(timings: Timings, answers: Answers, *, samples: int) -> Iterator[str]:
    """What the stream's decisions say about the figures."""
    seen = len(set(timings.stream_samples))
    if seen < samples:
        yield (
            f"the timed stream saw {seen} of {samples} samples; shares and accuracies are of all of them; "
            "give max_seconds more time to time them all"
        )
    one_by_one = np.array(timings.stream_exits)
    differ = int(np.count_nonzero(one_by_one != answers.exits[timings.stream_samples]))
    if differ:
        yield (
            f"{differ} of {len(one_by_one)} samples left elsewhere in a batch of {BATCH_ROWS} than one by one; "
            "scores so near a threshold are not reproducible here: move the threshold"
        )


def _other_warnings(
    spent: _Spent, meter: Meter | None, *, first_run_s: float | None, peak: int | None
) -> Iterator[str]:
    """What is missing, and an idle baseline that moved."""
    if first_run_s is None:
        yield "the session had run before, so its first run was not timed; profile a freshly loaded one"
    if peak is None:
        yield "this system does not tell the peak memory of a process"
    if meter is not None and spent.stream.reason is not None:
        yield f"energy was not measured although there is a meter: {spent.stream.reason}"
    if spent.idle_w and max(spent.idle_w) > (1 + IDLE_DRIFT) * min(spent.idle_w):
        yield (
            f"idle power went from {spent.idle_w[0]:.3g} W to {spent.idle_w[-1]:.3g} W, so net energy is doubtful; "
            "stop other work and let the device settle"
        )
