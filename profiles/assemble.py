"""Raw figures to a profile: summaries, intervals, checks and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgekit.data import Dataset
from edgekit.environment import Environment
from edgekit.interfaces import Meter, NodePlacement, Runtime
from edgekit.measured import Check, Closure, Energy, Interval, LatencySummary, PowerTrace
from edgekit.policy import Policy
from edgekit.profiles.answers import BATCH_ROWS, Answers
from edgekit.profiles.checks import energy_checks, latency_checks, latency_warnings
from edgekit.profiles.energy import difference, energy_of, idle_w
from edgekit.profiles.latency import Timings, close_latency
from edgekit.profiles.paced import paced_profile
from edgekit.profiles.protocol import Protocol
from edgekit.profiles.raw import Measured
from edgekit.profiles.system import machine_checks, machine_warnings
from edgekit.profiles.workloads import STREAM, Workload, path_macs
from edgekit.records import ExitProfile, PacedProfile, PathProfile, Profile, StreamProfile
from edgekit.shares import gate_shares, mean_macs
from edgekit.stats import difference_interval, median_half_width, summarize

if TYPE_CHECKING:
    from edgekit.session import Session

__all__ = ["Assembler", "as_read"]

OPEN = "all gates open"
NOT_METERED = (
    "windows are taken with all gates open and with all closed, not with each closed alone; "
    "'saved_s' says what closing it saves in latency"
)
MOST_POWER = 50_000
"""Points of power over time that a file keeps."""


def as_read(mapping: dict[str, Any]) -> dict[str, Any]:
    """As whoever reads the profile's file will find it."""
    read: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(mapping))
    return read


@dataclass(kw_only=True)
class Assembler:
    """Makes profiles of what there is so far.

    Attributes:
        session: open.
        data: of the measurement.
        works: what was run.
        policy: of the stream.
        protocol: what was asked for.
        meter: of energy.
        before: the machine before the measurement.
        resumed: the machine before this part of it.
        created: UTC, ISO 8601.
        earlier: checks of a part that was resumed.
        seed: of the measurement.
    """

    session: Session
    data: Dataset
    works: Sequence[Workload]
    policy: Policy
    protocol: Protocol
    meter: Meter | None
    before: Environment
    resumed: Environment
    created: str
    earlier: tuple[Check, ...]
    seed: int

    def profile(self, found: Measured, *, after: Environment, done: bool) -> Profile:
        """The profile.

        Args:
            found: raw; every workload has a sample.
            after: the machine now.
            done: whether nothing is left to measure.
        """
        session, manifest = self.session, self.session.bundle.manifest if self.session.bundle is not None else None
        summaries = {work.name: summarize(found.timings.host_ns(work.name), seed=self.seed) for work in self.works}
        energies = {work.name: self._energy(work, found) for work in self.works}
        closure = close_latency(found.timings, self.works)
        energy_closure = self._close_energy(found, energies)
        scripted = self._scripted(found)
        return Profile(
            created=self.created,
            network=manifest.name if manifest is not None else "",
            plan=session.plan.fingerprint,
            artifacts=session.bundle.artifact_digests(session.target) if session.bundle is not None else {},
            runtime=as_read(session.running),
            policy=as_read(self.policy.to_mapping()),
            data=self.data.source,
            data_sha256=self.data.sha256,
            samples=len(self.data),
            settings=as_read(self._settings(found)),
            exits=self._exits(found, summaries, energies),
            stream=self._stream(found, summaries[STREAM], energies[STREAM]),
            closure=closure,
            energy_closure=energy_closure,
            load_s=session.load_s,
            first_run_s=found.first_run_s,
            peak_rss_bytes=found.peak_rss_bytes,
            steady_rss_bytes=found.steady_rss_bytes,
            reference_ns=tuple(found.timings.reference_ns),
            before=self.before,
            after=after,
            warnings=(
                *((f"not a measurement of a device: {scripted}",) if scripted else ()),
                *machine_warnings(self.before, after),
                *latency_warnings(
                    summaries,
                    halves={
                        work.name: median_half_width(np.array(found.timings.host_ns(work.name), dtype=np.float64))
                        for work in self.works
                        if work.kind == "exit" and done
                    },
                    median_within=self.protocol.median_within,
                ),
                *_answer_warnings(found.timings, found.answers, samples=len(self.data)),
                *_placement_warnings(session.runtime),
                *_other_warnings(found),
            ),
            scripted=scripted,
            gates=()
            if found.answers is None
            else gate_shares(session.plan, found.answers.exits.tolist(), found.answers.executed),
            complete=done,
            checks=self._checks(found, closure, energy_closure, after=after, done=done),
            paths=self._paths(found, summaries, energies),
            paced=tuple(self._paced(found)),
            stages=found.stages,
            operators=found.operators,
            traces=found.traces,
            meter=found.facts,
            windows=tuple(found.windows),
            power=_power(found),
        )

    def _energy(self, work: Workload, found: Measured) -> Energy:
        if found.facts is None:
            return Energy(reason=found.no_energy)
        if not work.metered:
            return Energy(reason=NOT_METERED)
        energy = energy_of(work.name, found.windows, found.facts)
        if energy.gross_j is None and found.no_energy:
            return msgspec.structs.replace(energy, reason=found.no_energy)
        return energy

    def _exits(
        self, found: Measured, summaries: dict[str, LatencySummary], energies: dict[str, Energy]
    ) -> tuple[ExitProfile, ...]:
        macs, answers = self.session.plan.exit_macs(), found.answers
        exits = [work.name for work in self.works if work.kind == "exit"]
        left = np.array([each.exit for each in found.timings.taken[STREAM]])
        made = []
        for index, name in enumerate(exits):
            before = exits[index - 1] if index else None
            device_ns = found.timings.device_ns(name)
            made.append(
                ExitProfile(
                    name=name,
                    macs=macs[index],
                    accuracy=answers.exit_accuracy(index) if answers is not None else None,
                    share=answers.share(index) if answers is not None else float(np.mean(left == index)),
                    share_accuracy=answers.share_accuracy(index) if answers is not None else None,
                    latency_ns=tuple(found.timings.host_ns(name)),
                    latency=summaries[name],
                    energy=energies[name],
                    device_ns=tuple(device_ns),
                    device=summarize(device_ns, seed=self.seed) if device_ns else None,
                    added_s=self._added_s(found, name, before, summaries),
                    added_j=difference(name, before, found.windows),
                )
            )
        return tuple(made)

    def _added_s(
        self, found: Measured, name: str, before: str | None, summaries: dict[str, LatencySummary]
    ) -> Interval:
        if before is None:
            mine = summaries[name]
            return Interval(value=mine.median_s, low=mine.median_low_s, high=mine.median_high_s)
        return self._median_difference(found, name, before)

    def _median_difference(self, found: Measured, after: str, before: str) -> Interval:
        sides = [np.array(found.timings.host_ns(name), dtype=np.float64) * 1e-9 for name in (after, before)]
        return difference_interval(sides[0], sides[1], seed=self.seed)

    def _stream(self, found: Measured, summary: LatencySummary, energy: Energy) -> StreamProfile:
        answers, device_ns = found.answers, found.timings.device_ns(STREAM)
        taken = found.timings.taken[STREAM]
        executed = answers.executed if answers is not None else None
        return StreamProfile(
            accuracy=answers.accuracy if answers is not None else None,
            exits=tuple(each.exit for each in taken),
            samples=tuple(each.sample for each in taken),
            latency_ns=tuple(each.host_ns for each in taken),
            latency=summary,
            energy=energy,
            macs=None if executed is None else mean_macs(self.session.plan, executed, samples=len(self.data)),
            device_ns=tuple(device_ns),
            device=summarize(device_ns, seed=self.seed) if device_ns else None,
        )

    def _paths(
        self, found: Measured, summaries: dict[str, LatencySummary], energies: dict[str, Energy]
    ) -> tuple[PathProfile, ...]:
        return tuple(
            PathProfile(
                name=work.name,
                gates=dict(work.gates),
                macs=path_macs(self.session.plan, work.gates),
                latency_ns=tuple(found.timings.host_ns(work.name)),
                latency=summaries[work.name],
                energy=energies[work.name],
                saved_s=self._median_difference(found, OPEN, work.name) if work.name.startswith("without ") else None,
            )
            for work in self.works
            if work.kind == "path"
        )

    def _paced(self, found: Measured) -> Iterator[PacedProfile]:
        for each in found.paced:
            energy = Energy(reason=each.failure or found.no_energy)
            if each.window is not None and found.facts is not None:
                facts, window = found.facts, each.window
                energy = Energy(
                    gross_j=window.energy_j / window.inferences,
                    method=facts.method,
                    scope=f"{facts.scope}: {facts.covers}",
                    meter=facts.name,
                    windows=1,
                    window_s=window.stop_s - window.start_s,
                    inferences=window.inferences,
                )
            yield paced_profile(each, energy, seed=self.seed)

    def _close_energy(self, found: Measured, energies: dict[str, Energy]) -> Closure | None:
        """``sum_k share_k * gross energy_k`` over the exits that the stream's windows took, against the stream's."""
        streamed = [each for each in found.windows if each.name == STREAM and each.kind == "stream"]
        each_j = [energies[work.name].gross_j for work in self.works if work.kind == "exit"]
        measured_j = energies[STREAM].gross_j
        if not streamed or measured_j is None or any(value is None for value in each_j):
            return None
        left = np.zeros(len(each_j))
        for window in streamed:
            left[: len(window.exits)] += window.exits
        predicted_j = float(left @ np.array(each_j, dtype=np.float64) / left.sum())
        if predicted_j <= 0:  # a sensor that is stuck at nothing explains nothing
            return None
        return Closure(quantity="energy", predicted=predicted_j, measured=measured_j)

    def _checks(
        self, found: Measured, closure: Closure, energy_closure: Closure | None, *, after: Environment, done: bool
    ) -> tuple[Check, ...]:
        scope = found.facts.scope if found.facts is not None else None
        checks = [
            *latency_checks(found.timings, closure, protocol=self.protocol, done=done),
            *_with_earlier(machine_checks(self.resumed, after, meter_scope=scope), self.earlier),
        ]
        if found.facts is not None:
            checks += energy_checks(
                found.windows,
                found.facts,
                found.readings,
                energy_closure,
                found.costs,
                failure=found.no_energy,
            )
        return tuple(checks)

    def _scripted(self, found: Measured) -> str | None:
        """What was not real."""
        runtime = self.session.runtime.describe()
        parts = []
        if runtime.get("scripted"):
            parts.append(f"the runtime '{runtime.get('name', self.session.runtime.name)}' is scripted")
        if found.facts is not None and found.facts.replay:
            parts.append(f"the meter '{found.facts.name}' plays a recording")
        return "; ".join(parts) or None

    def _settings(self, found: Measured) -> dict[str, Any]:
        return {
            "protocol": asdict(self.protocol),
            "seed": self.seed,
            "batch": 1,
            "rounds": found.timings.rounds,
            "timed_s": found.timings.seconds,
            "parts": found.parts,
            "timed": "session.run: input check and copy, stages, decisions, answer; preprocessing is not in it",
            "interleaving": "in every round each forced exit and path once, the stream as often as there are exits, "
            "shuffled",
            "garbage_collector": "off while timing",
            "answers_batch": BATCH_ROWS,
            "tracing_overhead": found.tracing_overhead,
            "reading_costs": found.costs,
            "idle_w": list(idle_w(found.windows)),
        }


def _with_earlier(now: Sequence[Check], earlier: Sequence[Check]) -> Iterator[Check]:
    """A machine's rule that was broken in an earlier part stays broken."""
    broken = {check.rule: check for check in earlier if check.passed is False}
    for check in now:
        before = broken.get(check.rule)
        yield check if before is None or check.passed is False else before


def _power(found: Measured) -> PowerTrace:
    step = max(1, -(-found.power.times_s.size // MOST_POWER))
    return PowerTrace(
        times_s=tuple(round(float(value), 6) for value in found.power.times_s[::step]),
        power_w=tuple(float(f"{value:.6g}") for value in found.power.values[::step]),
    )


def _placement_warnings(runtime: Runtime) -> Iterator[str]:
    """Nodes that run elsewhere than was asked for."""
    if not isinstance(runtime, NodePlacement):
        return
    elsewhere = runtime.nodes_elsewhere()
    if elsewhere is None:
        yield "which nodes the provider took cannot be told here; some may have run on the CPU"
    elif elsewhere:
        count = sum(map(len, elsewhere.values()))
        listed = "; ".join(f"{stage}: {', '.join(nodes)}" for stage, nodes in elsewhere.items())
        yield f"{count} nodes did not run where they were asked to: {listed}"


def _answer_warnings(timings: Timings, answers: Answers | None, *, samples: int) -> Iterator[str]:
    """What the stream's decisions say about the figures."""
    if answers is None:
        yield "answers on the whole data were not looked at; shares are those of the timed stream"
        return
    taken = timings.taken[STREAM]
    seen = len({each.sample for each in taken})
    if seen < samples:
        yield (
            f"the timed stream saw {seen} of {samples} samples; shares and accuracies are of all of them; "
            "give max_seconds more time to time them all"
        )
    differ = sum(each.exit != answers.exits[each.sample] for each in taken)
    if differ:
        yield (
            f"{differ} of {len(taken)} samples left elsewhere in a batch of {BATCH_ROWS} than one by one; "
            "scores so near a threshold are not reproducible here: move the threshold"
        )


def _other_warnings(found: Measured) -> Iterator[str]:
    """What is missing."""
    if found.first_run_s is None:
        yield "the session had run before, so its first run was not timed; profile a freshly loaded one"
    if found.peak_rss_bytes is None:
        yield "this system does not tell the peak memory of a process"
    if found.facts is not None and found.no_energy:
        yield f"energy was not measured to the end: {found.no_energy}"
