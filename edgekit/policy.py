"""When to leave: score, temperature and threshold of each exit, and where they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from edgekit.errors import PolicyError
from edgekit.plan import SCORES, Plan

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


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Decides at every exit but the last, which accepts all.

    Attributes:
        score: one of :data:`edgekit.plan.SCORES`.
        thresholds: one per exit but the last, rounded to float32, the precision of scores, so that a comparison
            gives the same answer everywhere. Infinity never exits.
        temperatures: one per exit, the last included.
        comparator: ``">="`` lets a score equal to the threshold leave, ``">"`` does not.
        name: what it is saved as in a bundle.
        provenance: ``None`` for thresholds set by hand.
    """

    score: str
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...]
    comparator: Comparator = ">="
    name: str = "default"
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        for field in ("thresholds", "temperatures"):
            with np.errstate(over="ignore"):
                rounded = tuple(float(np.float32(value)) for value in getattr(self, field))
            msgspec.structs.force_setattr(self, field, rounded)
        if self.score not in SCORES:
            raise PolicyError(f"policy '{self.name}': score {self.score!r} is not one of {', '.join(SCORES)}")
        if self.comparator not in (">=", ">"):
            raise PolicyError(f"policy '{self.name}': comparator must be '>=' or '>', not {self.comparator!r}")
        if not self.name or not all(letter.isalnum() or letter in "-_." for letter in self.name) or self.name[0] == ".":
            raise PolicyError(f"policy name {self.name!r}: use letters, digits, '-', '_' and '.'")
        if any(math.isnan(value) for value in self.thresholds):
            raise PolicyError(f"policy '{self.name}': a threshold is NaN; use infinity for an exit that is never taken")
        if not all(math.isfinite(value) and value > 0 for value in self.temperatures):
            raise PolicyError(f"policy '{self.name}': temperatures must be positive, not {self.temperatures}")
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
        name: str = "by-hand",
    ) -> Policy:
        """Thresholds set by hand, one per exit but the last.

        Args:
            thresholds: a published entropy threshold ``H < t`` is ``score="neg_entropy"``, ``-t`` and ``">"``.
            score: one of :data:`edgekit.plan.SCORES`.
            comparator: which way a tie goes.
            temperatures: one per exit; 1 where not given.
            name: what it is saved as.

        Raises:
            PolicyError: a value that is no threshold, or counts that disagree.
        """
        return cls(
            score=score,
            thresholds=tuple(float(value) for value in thresholds),
            temperatures=tuple(temperatures) if temperatures is not None else (1.0,) * (len(thresholds) + 1),
            comparator=comparator,
            name=name,
        )

    def to_mapping(self) -> dict[str, Any]:
        """As JSON can say it, which has no number for infinity: ``"inf"`` and ``"-inf"`` are strings."""
        thresholds = [value if math.isfinite(value) else str(value) for value in self.thresholds]
        return {**msgspec.to_builtins(self), "thresholds": thresholds, "temperatures": list(self.temperatures)}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Policy:
        """What :meth:`to_mapping` gave.

        Raises:
            PolicyError: a field is missing, unreadable, or no threshold or temperature.
        """
        try:
            return msgspec.convert(mapping, cls, strict=False)
        except msgspec.ValidationError as error:
            raise PolicyError(f"not a policy ({error})") from error

    @classmethod
    def never(cls, exits: int, *, score: str = "max_prob") -> Policy:
        """Nobody leaves before the last of ``exits`` exits."""
        return cls.fixed([math.inf] * (exits - 1), score=score, name="never-exit")

    def require_fits(self, plan: Plan) -> None:
        """Raises :class:`PolicyError` unless this policy was made for ``plan`` (or by hand, for as many exits)."""
        exits = len(plan.exits)
        if len(self.temperatures) != exits:
            raise PolicyError(
                f"policy '{self.name}' has thresholds for {len(self.temperatures)} exits, "
                f"the network has {exits}: calibrate on this bundle"
            )
        if self.provenance is not None and self.provenance.plan != plan.fingerprint:
            raise PolicyError(
                f"policy '{self.name}' was made for another network "
                f"(plan {self.provenance.plan[:12]}, this one is {plan.fingerprint[:12]}): calibrate on this bundle"
            )
