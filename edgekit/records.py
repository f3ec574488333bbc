"""The profile file: what was measured, on what, with the raw samples. Measured by ``profiles``, shown by ``report``.

History of :data:`PROFILE_SCHEMA`:

1. first form: latency of every forced exit and of the thresholded stream, energy, memory, environment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from edgekit.environment import Environment
from edgekit.errors import MeasurementError

__all__ = [
    "PROFILE_SCHEMA",
    "Closure",
    "Energy",
    "ExitProfile",
    "LatencySummary",
    "Profile",
    "StreamProfile",
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
    """

    accuracy: float | None
    exits: tuple[int, ...]
    latency_ns: tuple[int, ...]
    latency: LatencySummary
    energy: Energy


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
