"""The verb: measure what each exit of a session costs, and say how sure that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.data import Dataset
from edgekit.environment import Environment
from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.policy import Policy
from edgekit.profiles.answers import check_answers, require_usable
from edgekit.profiles.assemble import Assembler, as_read
from edgekit.profiles.energy import EnergyWindows, Inference, long_enough
from edgekit.profiles.find import find_meter
from edgekit.profiles.inputs import Inputs
from edgekit.profiles.integrate import Series, power_of
from edgekit.profiles.latency import Timings, measure_latency
from edgekit.profiles.operators import time_operators
from edgekit.profiles.paced import Paced, measure_paced
from edgekit.profiles.protocol import Protocol, ProtocolName, as_protocol
from edgekit.profiles.raw import Measured, require_same, require_same_meter, resumed
from edgekit.profiles.recorder import Recorder, Repeat, in_background
from edgekit.profiles.stages import measure_stages
from edgekit.profiles.system import hottest_c, peak_rss_bytes, steady_rss_bytes
from edgekit.profiles.workloads import STREAM, Workload, workloads
from edgekit.progress import Progress, silent
from edgekit.records import Profile

if TYPE_CHECKING:
    from edgekit.session import Session

__all__ = ["ProfileStopped", "profile"]

KEEP_EVERY_S = 60.0
"""How often whoever asks is given what there is, so that a dead battery does not take all of it."""
OPERATOR_RUNS = 50
SAME_STATE = (
    "host", "system", "processor", "cores", "affinity", "governors", "frequency_limits_hz", "boost", "power_mode",
)  # fmt: skip
"""What of the machine must be as it was for a measurement to go on."""


class ProfileStopped(KeyboardInterrupt):
    """A measurement was stopped by Ctrl-C.

    Attributes:
        profile: what there is, incomplete; give it to ``profile(resume=...)`` to go on.
    """

    def __init__(self, profile: Profile) -> None:
        super().__init__("the measurement was stopped")
        self.profile = profile


def profile(
    session: Session,
    data: Dataset,
    *,
    policy: Policy | None = None,
    protocol: Protocol | ProtocolName = "quick",
    meter: Meter | None = None,
    operators: bool = False,
    resume: Profile | None = None,
    keep: Callable[[Profile], object] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    root: Path = Path("/"),
    clock: Callable[[], int] = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
    repeat: Repeat = in_background,
) -> Profile:
    """Measure latency, energy, memory and answers of every exit and of the thresholded stream.

    Writes nothing of its own; the session has its own policy again afterwards.

    Args:
        session: an open bundle.
        data: real samples: what the inputs hold changes time and power.
        policy: of the stream; the session's own when not given.
        protocol: how long to measure; see :class:`edgekit.profiles.protocol.Protocol`.
        meter: of energy; when not given, the registered one of the widest scope that can measure here.
        operators: whether to time every operator as well, by the runtime's own profiler.
        resume: a profile of the same measurement that was stopped; what it has is not measured again.
        keep: given what there is about every minute between two windows, incomplete.
        seed: of samples, turns and the bootstrap.
        progress: told where it stands.
        root: the folder that stands for ``/`` when the machine is looked at.
        clock: nanoseconds.
        sleep: seconds of doing nothing.
        repeat: how a meter is read meanwhile.

    Raises:
        PolicyError: the policy does not fit the network.
        MeasurementError: the data, the protocol or the given meter can give no meaningful figure, or what is to be
            resumed is another measurement.
        InputError: the samples do not have the network's shape or dtype.
        ProfileStopped: Ctrl-C, when there is something to keep.
    """
    settings = as_protocol(protocol)
    chosen = policy or session.policy
    chosen.require_fits(session.plan)
    require_usable(data, classes=session.plan.classes)
    works = workloads(session.plan)
    before = Environment.take(root=root)
    if resume is not None:
        _require_resumable(resume, session, data, chosen, settings, before)
    found = Measured(timings=Timings.nothing(works)) if resume is None else resumed(resume, works)
    meter, found.no_energy = _usable_meter(meter, session, protocol=settings, root=root, clock=clock)
    found.facts = meter.facts() if meter is not None else None
    if resume is not None:
        require_same_meter(resume, found.facts)
    run = _Run(
        found=found,
        assembler=Assembler(
            session=session,
            data=data,
            works=works,
            policy=chosen,
            protocol=settings,
            meter=meter,
            before=resume.before if resume is not None else before,
            resumed=before,
            created=resume.created if resume is not None else datetime.now(timezone.utc).isoformat(timespec="seconds"),
            earlier=resume.checks if resume is not None else (),
            seed=seed,
        ),
        operators=operators,
        keep=keep,
        rng=np.random.default_rng([seed, found.parts]),
        progress=progress,
        root=root,
        clock=clock,
        sleep=sleep,
        repeat=repeat,
    )
    with _using(session, chosen):
        try:
            run.all()
        except KeyboardInterrupt:
            if not all(found.timings.taken.values()):
                raise
            raise ProfileStopped(run.profile(done=False)) from None
    return run.profile(done=True)


@dataclass(kw_only=True)
class _Run:
    """The parts of a measurement, one after the other; each leaves what it has in ``found``."""

    found: Measured
    assembler: Assembler
    operators: bool
    keep: Callable[[Profile], object] | None
    rng: np.random.Generator
    progress: Progress
    root: Path
    clock: Callable[[], int]
    sleep: Callable[[float], None]
    repeat: Repeat
    _zero_ns: int = field(init=False)
    _kept_ns: int = field(init=False)

    def __post_init__(self) -> None:
        self.session, self.data = self.assembler.session, self.assembler.data
        self.protocol, self.works = self.assembler.protocol, self.assembler.works
        self._kept_ns = self.clock()
        self._zero_ns = self._kept_ns - int(self.found.zero_s * 1e9)
        self._inputs: Inputs | None = None

    def all(self) -> None:
        """Everything that is not there yet."""
        found = self.found
        if not self.session.has_run and found.first_run_s is None:
            found.first_run_s = self._first_run_s()
        measure_latency(
            self.session, self.data, self.works, found.timings,
            protocol=self.protocol, rng=self.rng, clock=self.clock, progress=self.progress,
        )  # fmt: skip
        found.peak_rss_bytes, found.steady_rss_bytes = peak_rss_bytes(root=self.root), steady_rss_bytes(root=self.root)
        self._offer()
        if self.protocol.stages_s and not found.stages:
            looked = measure_stages(
                self.session, self.data, seconds=self.protocol.stages_s, zero_ns=self._zero_ns,
                rng=self.rng, clock=self.clock, progress=self.progress,
            )  # fmt: skip
            found.stages, found.traces, found.tracing_overhead = looked.stages, looked.traces, looked.tracing_overhead
        if self.operators and not found.operators:
            found.operators = time_operators(
                self.session, self.data, runs=OPERATOR_RUNS, rng=self.rng, progress=self.progress
            )
        if self.assembler.meter is not None:
            self._energy(self.assembler.meter)
        self._paced(None)
        found.answers = check_answers(self.session, self.data, progress=self.progress)

    def profile(self, *, done: bool) -> Profile:
        """Of what there is."""
        return self.assembler.profile(self.found, after=Environment.take(root=self.root), done=done)

    def _offer(self, *, every_s: float = 0.0) -> None:
        """Give what there is to whoever asked for it, unless that was a short while ago."""
        if self.keep is not None and self.clock() - self._kept_ns >= every_s * 1e9:
            self.keep(self.profile(done=False))
            self._kept_ns = self.clock()

    def _first_run_s(self) -> float:
        """Time of the session's first inference of all, to the last exit."""
        inputs = self.data.batch(slice(0, 1))
        start = self.clock()
        self.session.run(inputs, exit=len(self.session.plan.exits) - 1)
        return (self.clock() - start) * 1e-9

    def _energy(self, meter: Meter) -> None:
        """Windows, then paced streams, while the meter is read; one that fails becomes the reason."""
        found, earlier = self.found, self.found.power
        measured = {work: self._inference(work) for work in self.works if work.metered}
        try:
            with Recorder(meter, zero_ns=self._zero_ns, repeat=self.repeat) as recorder:
                try:
                    EnergyWindows(
                        recorder=recorder,
                        works=measured,
                        protocol=self.protocol,
                        rng=self.rng,
                        clock=self.clock,
                        sleep=self.sleep,
                        temperature=lambda: hottest_c(root=self.root),
                        start_c=max((self.assembler.before.temperatures_c or {}).values(), default=None),
                        progress=self.progress,
                        renewed=self._ready().renew,
                        kept=lambda: self._offer(every_s=KEEP_EVERY_S),
                        windows=found.windows,
                        costs=found.costs,
                    ).run()
                    self._paced(recorder)
                finally:
                    found.readings = recorder.series()
                    now = power_of(found.readings, recorder.facts)
                    found.power = Series(
                        np.concatenate([earlier.times_s, now.times_s]), np.concatenate([earlier.values, now.values])
                    )
        except MeasurementError as error:
            found.no_energy = str(error)

    def _paced(self, recorder: Recorder | None) -> None:
        """The stream at each rate that was not measured yet."""
        run = self._inference(self.works[-1])
        for rate_hz in self.protocol.paced_hz:
            if all(each.rate_hz != rate_hz for each in self.found.paced):
                paced = self._at_rate(run, rate_hz, recorder)
                self.found.paced.append(paced)
                if paced.window is not None:
                    self.found.windows.append(paced.window)

    def _at_rate(self, run: Inference, rate_hz: float, recorder: Recorder | None) -> Paced:
        seconds = self.protocol.paced_s
        self._ready().renew()
        return measure_paced(
            run,
            rate_hz=rate_hz,
            seconds=seconds if recorder is None else long_enough(seconds, recorder.facts),
            recorder=recorder,
            clock=self.clock,
            sleep=self.sleep,
            progress=self.progress,
        )

    def _ready(self) -> Inputs:
        """Inputs of windows and rates, whose exits are those of the timed stream."""
        if self._inputs is None:
            exits = {each.sample: each.exit for each in self.found.timings.taken[STREAM]}
            self._inputs = Inputs(self.data, exits, rng=self.rng)
        return self._inputs

    def _inference(self, work: Workload) -> Inference:
        """What runs a workload once."""
        inputs, run, gates = self._ready(), self.session.run, work.gates or None
        return lambda: int(run(next(inputs), exit=work.exit, gates=gates).exit[0])


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


def _usable_meter(
    meter: Meter | None, session: Session, *, protocol: Protocol, root: Path, clock: Callable[[], int]
) -> tuple[Meter | None, str]:
    """The given meter or one that is found, else why there is none.

    Raises:
        MeasurementError: the given one cannot measure here.
    """
    if protocol.energy_window_s == 0:
        return None, "the protocol measures no energy; give it an energy_window_s"
    if meter is None:
        told = session.runtime.describe()
        device = f"{told.get('name', '')} {told.get('device', '')} {told.get('provider', '')}".lower()
        return find_meter(root=root, clock=clock, on_gpu="cuda" in device or "tensorrt" in device)
    reason = meter.unavailable()
    if reason is not None:
        raise MeasurementError(f"meter '{meter.name}' cannot measure here: {reason}")
    return meter, ""


def _require_resumable(
    earlier: Profile, session: Session, data: Dataset, policy: Policy, protocol: Protocol, now: Environment
) -> None:
    artifacts = session.bundle.artifact_digests(session.target) if session.bundle is not None else {}
    same: dict[str, Any] = {
        "plan": session.plan.fingerprint,
        "artifacts": artifacts,
        "runtime": as_read(session.running),
        "policy": as_read(policy.to_mapping()),
        "data_sha256": data.sha256,
        "settings.protocol": as_read(asdict(protocol)),
    }
    same |= {f"before.{name}": getattr(now, name) for name in SAME_STATE}
    told = earlier.before.versions  # which libraries are loaded is no difference
    same |= {f"before.versions.{name}": version for name, version in now.versions.items() if name in told}
    require_same(earlier, same)
