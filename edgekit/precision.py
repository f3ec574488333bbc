"""What lower precision does to a network: stage by stage, and to the answers of the whole."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from edgekit.artifacts import FLOAT

__all__ = ["PRECISION_SCHEMA", "PrecisionReport", "StagePrecision"]

PRECISION_SCHEMA = 1


class StagePrecision(msgspec.Struct, frozen=True, kw_only=True):
    """One stage, as it was written, and what lower precision does when this stage alone has it.

    Attributes:
        name: of the stage.
        precision: that it has in the set; ``"float32"`` where it was kept.
        kept: why it was kept in float; ``None`` where it was not.
        reached: calibration samples that came to it under the policy, each run of the stage counted; ``None`` where
            nothing had to be calibrated.
        calibrated: rows of them that its ranges were found on.
        float_bytes: size of its float files.
        size_bytes: size of its files in lower precision; ``None`` where there are none.
        float_s: median time of one run on one row, in float.
        time_s: the same in lower precision, run in turn with float.
        largest_difference: of a logit, over the held-out samples that took the same way.
        mean_difference: of these samples' logits, absolute.
        flips: held-out samples that took another way through exits and gates.
        drop: of the whole, as in :class:`PrecisionReport`, when this stage alone has lower precision.
    """

    name: str
    precision: str
    kept: str | None = None
    reached: int | None = None
    calibrated: int | None = None
    float_bytes: int
    size_bytes: int | None = None
    float_s: float | None = None
    time_s: float | None = None
    largest_difference: float | None = None
    mean_difference: float | None = None
    flips: int | None = None
    drop: float | None = None

    @property
    def lowered(self) -> bool:
        """Whether it has lower precision in the set."""
        return self.precision != FLOAT


class PrecisionReport(msgspec.Struct, frozen=True, kw_only=True):
    """A set of artifacts in lower precision, against float, under one policy.

    Attributes:
        schema: :data:`PRECISION_SCHEMA` when written.
        created: UTC, ISO 8601.
        network: name of the bundle.
        plan: fingerprint of its plan.
        target: kind of device.
        precision: asked for.
        artifacts: name of the set in the bundle.
        policy: name of the policy; its thresholds are the same for both.
        calibrated_on: the samples that reach a stage under the policy, or all; ``None`` where nothing was calibrated.
        data: source of the samples.
        data_sha256: their digest.
        calibration_samples: that found the ranges.
        samples: held out from that, on which everything below was measured.
        measure: what ``drop`` is of: right answers, or, without labels, float's own answers.
        drop: share of held-out samples that float answers right, less the share that the set does; without labels, the
            share that is answered otherwise than in float.
        max_drop: that was asked for; ``None`` where none was.
        float_accuracy: with labels.
        accuracy: with labels.
        float_exits: share of the samples that left at each exit, in float.
        exits: in the set.
        flips: samples that took another way through exits and gates.
        changed: samples whose answer is another one.
        largest_difference: of a logit, over samples that took the same way.
        float_bytes: of all float artifacts.
        size_bytes: of the set's, what it shares with float included.
        float_s: mean time of one sample under the policy, in float.
        time_s: the same of the set, sample by sample in turn with float.
        runtime: what measured, as :meth:`edgekit.interfaces.Runtime.describe` says.
        stages: in the plan's order.
        warnings: what makes the figures less certain, in words.
    """

    schema: int = PRECISION_SCHEMA
    created: str
    network: str
    plan: str
    target: str
    precision: str
    artifacts: str
    policy: str
    calibrated_on: Literal["survivors", "all"] | None
    data: str
    data_sha256: str
    calibration_samples: int
    samples: int
    measure: Literal["accuracy", "agreement"]
    drop: float
    max_drop: float | None
    float_accuracy: float | None
    accuracy: float | None
    float_exits: tuple[float, ...]
    exits: tuple[float, ...]
    flips: int
    changed: int
    largest_difference: float | None
    float_bytes: int
    size_bytes: int
    float_s: float
    time_s: float
    runtime: dict[str, Any]
    stages: tuple[StagePrecision, ...]
    warnings: tuple[str, ...] = ()

    @property
    def size_ratio(self) -> float:
        """Size of the set over that of the float artifacts."""
        return self.size_bytes / self.float_bytes

    @property
    def within_max_drop(self) -> bool:
        """Whether the drop on the held-out samples is what was asked for at most."""
        return self.max_drop is None or self.drop <= self.max_drop
