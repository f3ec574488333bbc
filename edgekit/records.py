"""The profile file: what was measured, on what, with the raw samples. Measured by ``profiles``, shown by ``report``.

History of :data:`PROFILE_SCHEMA`:

1. first form: latency of every forced exit and of the thresholded stream, energy, memory, environment.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgekit.environment import Environment
from edgekit.errors import MeasurementError
from edgekit.plan import Exit, Plan, Run, Step, walk

__all__ = [
    "PROFILE_SCHEMA",
    "Closure",
    "Energy",
    "ExitProfile",
    "GateShare",
    "LatencySummary",
    "Profile",
    "StreamProfile",
    "gate_shares",
    "mean_macs",
]

PROFILE_SCHEMA = 1


class LatencySummary(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of latency samples, in seconds. A percentile is ``None`` with fewer samples than it needs.

    Attributes:
        samples: how many.
        min_s: smallest.
        median_s: middle.
        mean_s: arithmetic mean.
        sd_s: standard deviation.
        p90_s: conservative order statistic; needs 64 samples (MLPerf early stopping, 99 % confidence).
        p99_s: likewise; needs 662 samples.
        median_low_s: lower end of the bootstrap interval of the median.
        median_high_s: upper end.
        mean_low_s: lower end of the bootstrap interval of the mean.
        mean_high_s: upper end.
        confidence: of the intervals.
        outliers: samples beyond Tukey's 3 IQR fences; counted and kept.
    """

    samples: int
    min_s: float
    median_s: float
    mean_s: float
    sd_s: float
    p90_s: float | None
    p99_s: float | None
    median_low_s: float
    median_high_s: float
    mean_low_s: float
    mean_high_s: float
    confidence: float
    outliers: int


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Energy of one inference in joules, or why there is none.

    Attributes:
        gross_j: mean over the window; ``None`` when it could not be measured.
        net_j: gross less idle power times latency; ``None`` without an idle baseline.
        quantity: ``"counter"``, ``"integrated"`` or ``"replay"``.
        scope: what the figure covers.
        meter: name.
        window_s: length of the measured window.
        inferences: how many it held.
        reason: why there is no figure, with what would fix it.
    """

    gross_j: float | None = None
    net_j: float | None = None
    quantity: str = ""
    scope: str = ""
    meter: str = ""
    window_s: float | None = None
    inferences: int | None = None
    reason: str | None = None


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
    """

    name: str
    macs: int | None
    accuracy: float | None
    share: float | None
    share_accuracy: float | None
    latency_ns: tuple[int, ...]
    latency: LatencySummary
    energy: Energy


class StreamProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The data run through the policy as it will be in use, one sample at a time.

    Attributes:
        accuracy: on the data, when it has labels.
        exits: index of the exit that each sample took.
        latency_ns: raw, sample by sample.
        latency: their summary.
        energy: of one inference.
        macs: mean for one sample of the data: what ran, by the stages' MACs.
    """

    accuracy: float | None
    exits: tuple[int, ...]
    latency_ns: tuple[int, ...]
    latency: LatencySummary
    energy: Energy
    macs: float | None = None


class GateShare(msgspec.Struct, frozen=True, kw_only=True):
    """How often a gate was open.

    Attributes:
        name: of the gate.
        reached: rows that came to it; rows that left before, or took another way, did not.
        open: those among them that found it open; ``None`` where the stages that ran do not tell.
        share: open of reached; ``None`` when none came.
    """

    name: str
    reached: int | None
    open: int | None
    share: float | None


def gate_shares(plan: Plan, exits: Sequence[int], executed: Mapping[str, int]) -> tuple[GateShare, ...]:
    """How often each gate was open, told by the stages that ran.

    Args:
        plan: stages and steps.
        exits: index of the exit that each row took.
        executed: rows that each stage ran on.
    """
    runs = Counter(step.stage for step in walk(plan.steps) if isinstance(step, Run))
    left = Counter(exits)
    found: list[GateShare] = []
    remaining, passed = left.total(), 0
    for step in plan.steps:
        if isinstance(step, Exit):
            remaining, passed = remaining - left[passed], passed + 1
        else:
            found += _shares([step], remaining, {name: executed[name] for name, times in runs.items() if times == 1})
    return tuple(found)


def _shares(steps: Sequence[Step], reached: int | None, rows: Mapping[str, int]) -> Iterator[GateShare]:
    """Of the gates among steps that so many rows came to; ``rows`` knows the stages that are run in one place."""
    for step in steps:
        if isinstance(step, Run | Exit):
            continue
        opened, closed = (_rows_of(way, rows) for way in (step.steps, step.otherwise))
        if reached is not None:
            opened = reached - closed if opened is None and closed is not None else opened
            closed = reached - opened if closed is None and opened is not None else closed
        share = opened / reached if opened is not None and reached else None
        yield GateShare(name=step.name, reached=reached, open=opened, share=share)
        yield from _shares(step.steps, opened, rows)
        yield from _shares(step.otherwise, closed, rows)


def _rows_of(steps: Sequence[Step], rows: Mapping[str, int]) -> int | None:
    """Rows that took a way: those of the first stage that is run on it alone."""
    return next((rows[step.stage] for step in steps if isinstance(step, Run) and step.stage in rows), None)


def mean_macs(plan: Plan, executed: Mapping[str, int], *, samples: int) -> float | None:
    """MACs of what ran, for one sample; ``None`` when a stage's could not be counted."""
    counts = [(stage.macs, executed[stage.name]) for stage in plan.stages]
    if any(macs is None and rows for macs, rows in counts):
        return None
    return sum((macs or 0) * rows for macs, rows in counts) / samples


class Closure(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the parts explain the whole: ``sum_k share_k * mean latency_k`` against the stream's mean latency."""

    predicted_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        """Measured over predicted; 1 when the parts explain the whole."""
        return self.measured_s / self.predicted_s


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
        energy_closure: of gross energy, when it was measured: joules where the closure says seconds.
        load_s: time to open the stages.
        first_run_s: time of the first inference.
        peak_rss_bytes: highest resident memory of the process, or ``None`` where the system does not tell.
        before: the machine before.
        after: the machine after.
        warnings: what makes the figures less certain, in words.
        scripted: ``None`` when everything is real; else what was not (a fake runtime, a replayed meter).
        gates: how often each was open on the data, with the policy; empty where the network has none.
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
