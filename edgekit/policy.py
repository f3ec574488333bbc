"""When to leave: score, temperature and threshold of each exit, and where they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from edgekit.certificate import Certificate, Tradeoff, to_mapping
from edgekit.errors import PolicyError
from edgekit.plan import SCORES, Plan
from edgekit.scoring import HOST_SCORES, LearnedRows, LearnedScorer, PatienceRows, RowScores

__all__ = ["Comparator", "Policy", "Provenance"]

Comparator = Literal[">=", ">"]


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where a policy came from, so that nobody has to guess later.

    Attributes:
        method: how the thresholds were chosen, in words.
        guarantee: what is promised about unseen data; ``None`` says plainly that nothing is.
        plan: fingerprint of the plan that the policy was made for.
        artifacts: sha256 of each stage artifact that gave the scores, by path in the bundle.
        runtime: name and version of the runtime that gave the scores.
        data: source of the calibration set.
        data_sha256: its digest.
        samples: how many samples it has.
        settings: what was asked for.
        results: what was found on the calibration set (accuracy, cost, exit shares).
        versions: of edgekit and the libraries that took part.
        created: UTC, ISO 8601.
        certificate: of the promise, in figures.
        tradeoff: what the other policies of the path do.
    """

    method: str
    guarantee: str | None = None
    plan: str
    artifacts: dict[str, str] = {}
    runtime: str = ""
    data: str = ""
    data_sha256: str = ""
    samples: int = 0
    settings: dict[str, Any] = {}
    results: dict[str, Any] = {}
    versions: dict[str, str] = {}
    created: str = ""
    certificate: Certificate | None = None
    tradeoff: Tradeoff | None = None


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Decides at every exit but the last, which accepts all.

    Attributes:
        score: one of :data:`edgekit.plan.SCORES` or of :data:`edgekit.scoring.HOST_SCORES`.
        scorer: of the score ``"learned"``; ``None`` for all others.
        thresholds: one per exit but the last, rounded to float32, the precision of scores, so that a comparison
            gives the same answer everywhere. Infinity never exits.
        temperatures: one per exit, the last included. Patience and a learned score do without.
        constants: that gates compare their scores with, by the names in the plan; those not named are as trained.
        comparator: ``">="`` lets a score equal to the threshold leave, ``">"`` does not.
        name: what it is saved as in a bundle.
        provenance: ``None`` for thresholds set by hand.
    """

    score: str
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...]
    constants: dict[str, float] = {}
    comparator: Comparator = ">="
    scorer: LearnedScorer | None = None
    name: str = "default"
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        for field in ("thresholds", "temperatures"):
            with np.errstate(over="ignore"):
                rounded = tuple(float(np.float32(value)) for value in getattr(self, field))
            msgspec.structs.force_setattr(self, field, rounded)
        known = (*SCORES, *HOST_SCORES)
        if self.score not in known:
            raise PolicyError(f"policy '{self.name}': score {self.score!r} is not one of {', '.join(known)}")
        if self.score == "learned" and self.scorer is None:
            raise PolicyError(f"policy '{self.name}': the score 'learned' needs a scorer: give one that was fitted")
        if self.score != "learned" and self.scorer is not None:
            raise PolicyError(f"policy '{self.name}': a scorer is for the score 'learned', not for '{self.score}'")
        if self.comparator not in (">=", ">"):
            raise PolicyError(f"policy '{self.name}': comparator must be '>=' or '>', not {self.comparator!r}")
        if not self.name or not all(letter.isalnum() or letter in "-_." for letter in self.name) or self.name[0] == ".":
            raise PolicyError(f"policy name {self.name!r}: use letters, digits, '-', '_' and '.'")
        if any(math.isnan(value) for value in self.thresholds):
            raise PolicyError(f"policy '{self.name}': a threshold is NaN; use infinity for an exit that is never taken")
        if not all(math.isfinite(value) and value > 0 for value in self.temperatures):
            raise PolicyError(f"policy '{self.name}': temperatures must be positive, not {self.temperatures}")
        if any(math.isnan(value) for value in self.constants.values()):
            raise PolicyError(f"policy '{self.name}': a constant of a gate is NaN; use infinity for one never reached")
        if len(self.temperatures) != len(self.thresholds) + 1:
            raise PolicyError(
                f"policy '{self.name}': {len(self.thresholds)} thresholds and {len(self.temperatures)} temperatures; "
                "give one threshold per exit but the last, and one temperature per exit"
            )

    @classmethod
    def fixed(
        cls,
        thresholds: Sequence[float],
        *,
        score: str = "max_prob",
        comparator: Comparator = ">=",
        temperatures: Sequence[float] | None = None,
        constants: Mapping[str, float] | None = None,
        scorer: LearnedScorer | None = None,
        name: str = "by-hand",
    ) -> Policy:
        """Thresholds set by hand, one per exit but the last.

        Args:
            thresholds: a published entropy threshold ``H < t`` is ``score="neg_entropy"``, ``-t`` and ``">"``.
            score: one of :data:`edgekit.plan.SCORES` or of :data:`edgekit.scoring.HOST_SCORES`.
            comparator: which way a tie goes.
            temperatures: one per exit; 1 where not given.
            constants: that gates compare their scores with; as trained where not given.
            scorer: of the score ``"learned"``, which alone has one.
            name: what it is saved as.

        Raises:
            PolicyError: a value that is no threshold, counts that disagree, or a scorer too many or too few.
        """
        return cls(
            score=score,
            thresholds=tuple(float(value) for value in thresholds),
            temperatures=tuple(temperatures) if temperatures is not None else (1.0,) * (len(thresholds) + 1),
            constants=dict(constants or {}),
            comparator=comparator,
            scorer=scorer,
            name=name,
        )

    def to_mapping(self) -> dict[str, Any]:
        """As JSON can say it, which has no number for infinity: ``"inf"`` and ``"-inf"`` are strings."""
        mapping: dict[str, Any] = to_mapping(self)
        return mapping

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Policy:
        """What :meth:`to_mapping` gave.

        Raises:
            PolicyError: a field is missing, unreadable, or no threshold, temperature or scorer.
        """
        try:
            return msgspec.convert(mapping, cls, strict=False)
        except msgspec.ValidationError as error:
            raise PolicyError(f"not a policy ({error})") from error

    @classmethod
    def never(cls, exits: int, *, score: str = "max_prob") -> Policy:
        """Nobody leaves before the last of ``exits`` exits."""
        return cls.fixed([math.inf] * (exits - 1), score=score, name="never-exit")

    def row_scores(self, rows: int) -> RowScores | None:
        """What computes the score for so many rows of a run; ``None`` where the stages do."""
        if self.score == "patience":
            return PatienceRows(rows)
        return None if self.scorer is None else LearnedRows(self.scorer, rows)

    def require_tested(self, artifacts: Mapping[str, str]) -> None:
        """Raises :class:`PolicyError` if the certificate is for other artifacts than these, sha256 by file."""
        origin = self.provenance
        if origin is None or origin.certificate is None or not origin.certificate.valid:
            return
        files = sorted({*origin.artifacts, *artifacts})
        differing = [file for file in files if origin.artifacts.get(file) != artifacts.get(file)]
        if origin.artifacts and differing:
            raise PolicyError(
                f"policy '{self.name}' is certified for other artifacts ({len(differing)} files differ, as "
                f"{differing[0]}): calibrate on these, or force it (--force), which ends its certificate"
            )

    def without_promise(self, artifacts: Mapping[str, str]) -> Policy:
        """This policy, its certificate marked as ended if it is for other artifacts than these."""
        try:
            self.require_tested(artifacts)
        except PolicyError:
            origin = self.provenance
            assert origin is not None
            assert origin.certificate is not None
            ended = msgspec.structs.replace(origin.certificate, valid=False)
            origin = msgspec.structs.replace(origin, certificate=ended, guarantee=None)
            return msgspec.structs.replace(self, provenance=origin)
        return self

    def require_fits(self, plan: Plan) -> None:
        """Raises :class:`PolicyError` unless this policy was made for ``plan`` (or by hand, for as many exits)."""
        exits = len(plan.exits)
        if len(self.temperatures) != exits:
            raise PolicyError(
                f"policy '{self.name}' has thresholds for {len(self.temperatures)} exits, "
                f"the network has {exits}: calibrate on this bundle"
            )
        if self.scorer is not None and (self.scorer.classes, self.scorer.exits) != (plan.classes, exits):
            raise PolicyError(
                f"policy '{self.name}' has a scorer for {self.scorer.exits} exits and {self.scorer.classes} classes, "
                f"the network has {exits} and {plan.classes}: calibrate on this bundle"
            )
        unknown = sorted(set(self.constants) - {each.name for each in plan.constants})
        if unknown:
            known = ", ".join(each.name for each in plan.constants) or "none"
            raise PolicyError(f"policy '{self.name}' has a constant '{unknown[0]}', the network's gates have {known}")
        if self.provenance is not None and self.provenance.plan != plan.fingerprint:
            raise PolicyError(
                f"policy '{self.name}' was made for another network "
                f"(plan {self.provenance.plan[:12]}, this one is {plan.fingerprint[:12]}): calibrate on this bundle"
            )
