"""The profile file: what was measured, on what, with the raw samples. Measured by ``profiles``, shown by ``report``.

Documented in docs/profile-format.md. History of :data:`PROFILE_SCHEMA`:

1. first form: latency of every forced exit and of the thresholded stream, energy, memory, environment.
2. intervals of energy, windows and power over time, paths of gates, paced streams, where the time goes, checks of the
   protocol's rules, what is needed to resume. ``Energy.quantity`` became ``method``, a closure's ``predicted_s`` and
   ``measured_s`` lost their unit.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from edgekit.environment import Environment
from edgekit.errors import MeasurementError
from edgekit.measured import (
    Check,
    Closure,
    Energy,
    Interval,
    LatencySummary,
    MeterFacts,
    OperatorTime,
    PowerTrace,
    StageTime,
    TracedRun,
    Window,
)
from edgekit.shares import GateShare

__all__ = ["PROFILE_SCHEMA", "ExitProfile", "PacedProfile", "PathProfile", "Profile", "StreamProfile"]

PROFILE_SCHEMA = 2


class ExitProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One exit, every sample forced to leave there.

    Attributes:
        name: of the exit.
        macs: for one sample that leaves here.
        accuracy: on the data, when it has labels.
        share: of the stream's samples that left here.
        share_accuracy: accuracy of those samples.
        latency_ns: raw samples in the order they were taken, batch 1.
        latency: their summary.
        energy: of one inference.
        device_ns: the same inferences on the device's own clock; empty where the runtime has none.
        device: their summary.
        added_s: median latency from the exit before to this one.
        added_j: gross energy likewise: of the stages between, their heads included; ``None`` where not measured. Of
            means over the windows, where ``energy`` is of medians.
    """

    name: str
    macs: int | None
    accuracy: float | None
    share: float | None
    share_accuracy: float | None
    latency_ns: tuple[int, ...]
    latency: LatencySummary
    energy: Energy
    device_ns: tuple[int, ...] = ()
    device: LatencySummary | None = None
    added_s: Interval | None = None
    added_j: Interval | None = None


class StreamProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The data run through the policy as it will be in use, one sample at a time.

    Attributes:
        accuracy: on the data, when it has labels.
        exits: index of the exit that each sample took.
        latency_ns: raw, sample by sample.
        latency: their summary.
        energy: of one inference.
        macs: mean for one sample of the data: what ran, by the stages' MACs.
        samples: which sample of the data each inference saw.
        device_ns: on the device's own clock; empty where the runtime has none.
        device: their summary.
    """

    accuracy: float | None
    exits: tuple[int, ...]
    latency_ns: tuple[int, ...]
    latency: LatencySummary
    energy: Energy
    macs: float | None = None
    samples: tuple[int, ...] = ()
    device_ns: tuple[int, ...] = ()
    device: LatencySummary | None = None


class PathProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Every sample forced through gates to the last exit.

    Attributes:
        name: ``"all gates open"``, ``"all gates closed"``, or ``"without NAME"``: that gate closed, the others open.
        gates: outcome of each gate.
        macs: for one sample; ``None`` when a stage's could not be counted.
        latency_ns: raw samples, batch 1.
        latency: their summary.
        energy: of one inference.
        saved_s: median latency that closing the one gate saves against all open; ``None`` for the two others.
    """

    name: str
    gates: dict[str, bool]
    macs: int | None
    latency_ns: tuple[int, ...]
    latency: LatencySummary
    energy: Energy
    saved_s: Interval | None = None


class PacedProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The stream at a fixed rate, as from a camera: idle between inferences, so clocks may drop and caches cool.

    Attributes:
        rate_hz: inferences begun each second.
        latency_ns: raw, from when the sample was there to the answer; the first one included. With a meter, while it
            was read.
        latency: their summary.
        late: inferences that began after their time, because the one before was not ready.
        energy: gross, for one inference with the idling up to the next one; never net.
    """

    rate_hz: float
    latency_ns: tuple[int, ...]
    latency: LatencySummary
    late: int
    energy: Energy


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Everything measured in one profiling run.

    Attributes:
        schema: :data:`PROFILE_SCHEMA` when written.
        created: UTC, ISO 8601.
        network: name of the bundle.
        plan: fingerprint of its plan.
        artifacts: sha256 of each stage artifact that ran, by path in the bundle.
        runtime: what :meth:`edgekit.interfaces.Runtime.describe` says.
        policy: the policy of the stream, as a mapping; a threshold without end is the string ``"inf"`` or ``"-inf"``,
            for which JSON has no number.
        data: source of the samples.
        data_sha256: their digest.
        samples: how many there are.
        settings: of the protocol: warm-up, rounds, seed, interleaving.
        exits: in order.
        stream: with the policy.
        closure: of latency.
        energy_closure: of gross energy, when it was measured.
        load_s: time to open the stages.
        first_run_s: time of the first inference.
        peak_rss_bytes: highest resident memory of the process, or ``None`` where the system does not tell.
        before: the machine before.
        after: the machine after.
        warnings: what makes the figures less certain, in words.
        scripted: ``None`` when everything is real; else what was not (a fake runtime, a replayed meter).
        gates: how often each was open on the data, with the policy; empty where the network has none.
        complete: whether everything that the protocol asks for was measured; a run that was stopped can be resumed, as
            can one whose meter failed.
        checks: the protocol's rules; see :attr:`valid`.
        paths: forced through gates; empty where the network has none.
        paced: the stream at fixed rates, where the protocol asks for it.
        stages: where the time goes, in the order in which they run.
        operators: of every stage, on request.
        traces: some inferences taken apart, for a timeline.
        meter: of energy; ``None`` where there was none.
        windows: of energy, in the order in which they were taken, idle ones included.
        power: over the time of the windows.
        steady_rss_bytes: resident memory of the process after the latencies were measured.
        reference_ns: time of the same piece of work in every round, in order: what the machine's speed did
            (:class:`edgekit.profiles.reference.Reference`).
    """

    schema: int = PROFILE_SCHEMA
    created: str
    network: str
    plan: str
    artifacts: dict[str, str]
    runtime: dict[str, Any]
    policy: dict[str, Any]
    data: str
    data_sha256: str
    samples: int
    settings: dict[str, Any]
    exits: tuple[ExitProfile, ...]
    stream: StreamProfile
    closure: Closure
    energy_closure: Closure | None
    load_s: float | None
    first_run_s: float | None
    peak_rss_bytes: int | None
    before: Environment
    after: Environment
    warnings: tuple[str, ...] = ()
    scripted: str | None = None
    gates: tuple[GateShare, ...] = ()
    complete: bool = True
    checks: tuple[Check, ...] = ()
    paths: tuple[PathProfile, ...] = ()
    paced: tuple[PacedProfile, ...] = ()
    stages: tuple[StageTime, ...] = ()
    operators: tuple[OperatorTime, ...] = ()
    traces: tuple[TracedRun, ...] = ()
    meter: MeterFacts | None = None
    windows: tuple[Window, ...] = ()
    power: PowerTrace = PowerTrace()
    steady_rss_bytes: int | None = None
    reference_ns: tuple[int, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether no rule of the protocol was broken."""
        return not self.broken

    @property
    def broken(self) -> tuple[Check, ...]:
        """The rules that were."""
        return tuple(check for check in self.checks if check.passed is False)

    def save(self, path: str | Path) -> Path:
        """Write as JSON, aside and renamed.

        Raises:
            MeasurementError: the file cannot be written; an older one stays as it was.
        """
        path = Path(path)
        aside = path.with_name(f".{path.name}.part")
        try:
            aside.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
            os.replace(aside, path)
        except OSError as error:
            raise MeasurementError(f"{path}: the profile cannot be written ({error.strerror})") from error
        finally:
            if aside.exists():
                aside.unlink()
        return path

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what :meth:`save` wrote.

        Raises:
            MeasurementError: the file is missing, damaged, or of a newer schema.
        """
        try:
            raw = Path(path).read_bytes()
            schema = msgspec.json.decode(raw, type=_SchemaOnly).schema
            if schema > PROFILE_SCHEMA:
                raise MeasurementError(f"{path}: profile schema {schema} is newer than this edgekit knows; upgrade it")
            if schema == 1:
                return msgspec.convert(_from_schema_1(msgspec.json.decode(raw)), type=cls)
            return msgspec.json.decode(raw, type=cls)
        except OSError as error:
            raise MeasurementError(f"{path}: cannot be read ({error.strerror})") from error
        except msgspec.DecodeError as error:
            raise MeasurementError(f"{path}: not a profile ({error})") from error

    def to_html(self, path: str | Path) -> Path:
        """Write the self-contained HTML report. Needs the ``report`` extra."""
        from edgekit.report import write_html

        return write_html([self], path)


class _SchemaOnly(msgspec.Struct):
    schema: int


def _from_schema_1(found: Any) -> Any:
    """The mapping of a file of the first schema, in the form of the second."""
    if not isinstance(found, dict):
        return found
    for name, quantity in (("closure", "latency"), ("energy_closure", "energy")):
        old = found.get(name)
        if isinstance(old, dict):
            found[name] = {
                "quantity": quantity,
                "predicted": old.get("predicted_s"),
                "measured": old.get("measured_s"),
            }
    for part in (*(found.get("exits") or ()), found.get("stream")):
        energy = part.get("energy") if isinstance(part, dict) else None
        if isinstance(energy, dict):
            energy["method"] = energy.pop("quantity", "")
    found["schema"] = PROFILE_SCHEMA
    return found
