"""What was proposed, what was promised of a policy, from which samples, and what other policies would do."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from edgekit.errors import CalibrationError
from edgekit.scoring import LearnedScorer

__all__ = ["AlsoKept", "Certificate", "Point", "Proposal", "Proposed", "ScoreFound", "Target", "Tradeoff", "to_mapping"]


def to_mapping(record: Any) -> Any:
    """A record as JSON can say it, which has no number for infinity and NaN: they are strings, ``"inf"`` and so on."""
    return _sayable(msgspec.to_builtins(record))


def _sayable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _sayable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_sayable(each) for each in value]
    return value


class Proposed(msgspec.Struct, frozen=True, kw_only=True):
    """A policy of a path, and what it did to the samples that the path was found on.

    Attributes:
        thresholds: one per exit but the last; infinity never leaves.
        constants: of gates, where they are not as trained.
        loss: mean.
        cost: mean, in the unit that the path was proposed for.
        shares: of the samples, that leave at each exit.
    """

    thresholds: tuple[float, ...]
    constants: dict[str, float] = {}
    loss: float
    cost: float
    shares: tuple[float, ...]


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    """Policies in the order in which they are to be tested, found on samples that will not test them.

    Attributes:
        name: what it is saved as in a bundle.
        plan: fingerprint of the network's plan.
        loss: that the order is by.
        score: that the thresholds are of.
        temperatures: one per exit.
        scorer: of a learned score.
        policies: the first is never-exit with the gates as trained.
        cost: what was minimised, and its unit.
        scores: other scores.
        samples: that it was found on.
        source: of these.
        data_sha256: their digest.
        seen: 8-byte digests of their inputs, sorted, in base 64: none of them may test the policies.
        runtime: that gave their logits.
        created: UTC, ISO 8601.
    """

    name: str = "default"
    plan: str
    loss: str
    score: str
    temperatures: tuple[float, ...]
    scorer: LearnedScorer | None = None
    policies: tuple[Proposed, ...]
    cost: str
    scores: tuple[ScoreFound, ...] = ()
    samples: int
    source: str
    data_sha256: str
    seen: str = ""
    runtime: str
    created: str

    @property
    def digest(self) -> str:
        """sha256 of the path as it is written."""
        return hashlib.sha256(msgspec.json.encode(to_mapping(self), order="deterministic")).hexdigest()

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Proposal:
        """What :func:`to_mapping` gave.

        Raises:
            CalibrationError: a field is missing or unreadable.
        """
        try:
            return msgspec.convert(mapping, cls, strict=False)
        except msgspec.ValidationError as error:
            raise CalibrationError(f"not a path of policies ({error})") from error


class AlsoKept(msgspec.Struct, frozen=True, kw_only=True):
    """One more mean loss that a certificate bounds; as in :class:`Certificate`."""

    loss: str
    epsilon: float
    test: str
    mean_loss: float
    p_value: float


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """With probability ``1 - delta`` over the drawing of samples, the mean loss on inputs like them is ``<= epsilon``.

    Which artifacts, runtime and data it is about stands in the policy's provenance.

    Attributes:
        epsilon: largest mean loss.
        delta: probability with which the promise may be broken, over the drawing of the samples.
        loss: ``"gap"``, ``"consistency"``, ``"brier"`` or the name of the user's own.
        conditional: the promise is about those who leave early alone, at or before each exit.
        test: of the mean loss: one of :data:`edgekit.calibration.risk.TESTS`.
        samples: that were tested.
        needed: without which nothing could have been certified but never-exit.
        mean_loss: of the policy on these samples.
        p_value: of the policy.
        tested: policies of the path until the first that failed, or its end.
        path: sha256 of the path.
        path_samples: that the path was found on; none of them is among those tested.
        path_source: what those samples were.
        seed: of the order in which the samples were tested, and of their split where path and test share one set.
        precision: of the artifacts, as ``"float32"``.
        device: that gave the answers.
        also: more losses that are bounded together with this one.
        valid: false once the policy was put, by force, on artifacts that were not tested.
    """

    epsilon: float
    delta: float
    loss: str
    conditional: bool = False
    test: str
    samples: int
    needed: int
    mean_loss: float
    p_value: float
    tested: int
    path: str
    path_samples: int
    path_source: str
    seed: int
    precision: str
    device: str
    also: tuple[AlsoKept, ...] = ()
    valid: bool = True


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A policy of a path on the tested samples.

    Attributes:
        thresholds: one per exit but the last; infinity never leaves.
        constants: of gates, where they are not as trained.
        shares: of the samples, that leave at each exit.
        loss: mean.
        low: of a confidence interval of the mean loss, for this point alone.
        high: likewise.
        p_value: of the test, where it came to this policy; ``None`` behind the first failure.
        accuracy: of the answers; ``None`` without labels.
        macs: mean for a sample; ``None`` when uncounted.
        latency_s: mean for a sample, from a profile.
        energy_j: likewise.
    """

    thresholds: tuple[float, ...]
    constants: dict[str, float] = {}
    shares: tuple[float, ...]
    loss: float
    low: float
    high: float
    p_value: float | None = None
    accuracy: float | None = None
    macs: float | None = None
    latency_s: float | None = None
    energy_j: float | None = None


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What would have been chosen for another epsilon, had it been asked for.

    Attributes:
        epsilon: asked.
        place: of the point in the path.
    """

    epsilon: float
    place: int


class ScoreFound(msgspec.Struct, frozen=True, kw_only=True):
    """What a score is worth, on the samples that the path was found on.

    Attributes:
        score: its name.
        epsilon: target for which the cost is.
        cost: mean of the cheapest policy with it that a test would probably accept.
        unit: of the cost: ``"s"``, ``"J"`` or ``"MACs"``.
        auroc: of each exit but the last: how well the score tells right answers from wrong ones (with labels), or those
            of the last exit from others; ``None`` where there is only one kind.
    """

    score: str
    epsilon: float
    cost: float
    unit: str
    auroc: tuple[float | None, ...]


class Tradeoff(msgspec.Struct, frozen=True, kw_only=True):
    """A path on the tested samples, and the choice among its policies.

    Attributes:
        exits: names.
        points: policies of the path in its order; the first is never-exit.
        chosen: place of the policy.
        confidence: of each point's interval.
        targets: choices for other epsilons, rising.
        cost: what was minimised: ``"latency"``, ``"energy"`` or ``"macs"``.
        cost_source: where costs come from.
        scores: other scores.
        ece: expected calibration error of each exit; ``None`` without labels.
        auroc: of correctness (or agreement with the last exit) at each exit but the last.
    """

    exits: tuple[str, ...]
    points: tuple[Point, ...]
    chosen: int
    confidence: float
    targets: tuple[Target, ...]
    cost: str
    cost_source: str
    scores: tuple[ScoreFound, ...] = ()
    ece: tuple[float, ...] | None = None
    auroc: tuple[float | None, ...] = ()
