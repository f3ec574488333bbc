"""What to do when the loss no longer keeps to its target: shift the thresholds, or never exit until certified again."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgekit.calibration.monitor import checked_losses
from edgekit.calibration.risk import binomial_p_value, require_share, samples_for_power
from edgekit.errors import CalibrationError
from edgekit.policy import Policy
from edgekit.scoring import ODDS_LIMIT

__all__ = ["Adaptive", "PValue", "Recertification", "positive_p_value"]

PValue = Callable[[NDArray[np.float64], float], float]
"""Of losses ``(audits,)`` and epsilon: chance of so small losses, or smaller, where their mean exceeds epsilon."""

_TOP = {"max_prob": 1.0, "margin": 1.0, "neg_entropy": 0.0, "learned": ODDS_LIMIT}
"""Largest value of each score that can be shifted by little; patience is a count."""


class Adaptive(msgspec.Struct, kw_only=True):
    """One shift of all thresholds, moved by every audit: ``shift <- max(lowest, shift + gamma (x - epsilon))``.

    Feldman, Ringel, Bates, Romano: Achieving risk control in online learning settings, 2022 (arXiv 2205.09095).
    Whatever the stream does, even if an adversary chose it, the mean loss of the first ``t`` audits obeys

    ``mean - epsilon <= (highest + m gamma (1 - epsilon)) / (gamma t)``,

    where at most ``m`` audits were decided under one shift (1, or more in batches): above ``highest`` nobody leaves
    early and the loss is 0, so the shift cannot go further up. While the shift was
    never held at ``lowest``, also ``mean - epsilon >= lowest / (gamma t)``; where it was held, the loss is smaller
    than was allowed. A promise for the long run only: for a while the loss may be anything. It does not hold for
    losses that are added later than others of the same shift, as with late labels.

    Attributes:
        epsilon: mean loss to hold.
        gamma: step, in units of the score.
        lowest: shift at which everybody leaves at the first exit that may be taken (or a higher one, which was given).
        highest: shift above which nobody leaves early.
        shift: now.
        audits: losses seen.
        excess: sum of ``x - epsilon``.
        held: whether the shift was ever held at ``lowest``.
        together: the most losses that were added at once, and so decided under one shift.
    """

    epsilon: float
    gamma: float
    lowest: float
    highest: float
    shift: float = 0.0
    audits: int = 0
    excess: float = 0.0
    held: bool = False
    together: int = 1

    def __post_init__(self) -> None:
        require_share("epsilon", self.epsilon)
        if not (self.gamma > 0 and math.isfinite(self.gamma)):
            raise CalibrationError(f"gamma must be above 0, not {self.gamma}; 0.02 is a usual step")
        if not -math.inf < self.lowest <= self.shift < math.inf:
            raise CalibrationError(f"shift {self.shift} must be at least lowest, which is {self.lowest}")

    @classmethod
    def of(cls, policy: Policy, *, classes: int, epsilon: float, gamma: float, lowest: float | None = None) -> Adaptive:
        """A shift of 0 for a policy's thresholds.

        Args:
            policy: with at least one finite threshold.
            classes: that the network tells apart.
            epsilon: mean loss to hold.
            gamma: step, in units of the score.
            lowest: 0 never makes the thresholds laxer than they were calibrated; ``None`` goes as far as the score.

        Raises:
            CalibrationError: the policy has no threshold to shift, or an option is wrong.
        """
        if policy.score not in _TOP:
            raise CalibrationError(f"thresholds of {policy.score} are whole numbers, which cannot be adapted in steps")
        finite = [value for value in policy.thresholds if value != math.inf]
        if not finite or -math.inf in finite:
            what = "lets every sample leave" if finite else "never exits early"
            raise CalibrationError(f"policy '{policy.name}' {what}; there is no threshold to adapt")
        furthest = min(0.0, _bottom(policy.score, classes) - max(finite))
        if lowest is not None and lowest > 0:
            raise CalibrationError(f"lowest must be at most 0, not {lowest}")
        return cls(
            epsilon=epsilon,
            gamma=gamma,
            lowest=furthest if lowest is None else max(furthest, lowest),
            highest=max(0.0, _TOP[policy.score] - min(finite)),
        )

    @property
    def mean(self) -> float | None:
        """Mean loss of the audits; ``None`` before the first."""
        return self.epsilon + self.excess / self.audits if self.audits else None

    @property
    def bound(self) -> float:
        """The most by which the mean loss can exceed epsilon by now; infinite before the first audit."""
        if not self.audits:
            return math.inf
        beyond = self.together * self.gamma * (1 - self.epsilon)
        return (self.highest + beyond) / (self.gamma * self.audits)

    def add(self, losses: ArrayLike) -> None:
        """Move by one loss, or by several of one batch: ``()`` or ``(audits,)``, each between -1 and 1.

        Raises:
            CalibrationError: a loss is NaN or out of range.
        """
        x = checked_losses(losses, lowest=-1.0)
        self.together = max(self.together, len(x))
        for loss in x.tolist():
            self.audits += 1
            self.excess += loss - self.epsilon
            moved = self.shift + self.gamma * (loss - self.epsilon)
            self.held = self.held or moved < self.lowest
            self.shift = max(self.lowest, moved)

    def apply(self, policy: Policy) -> Policy:
        """The policy with its finite thresholds shifted; one that no score can reach becomes infinite."""
        moved = [value + self.shift for value in policy.thresholds]
        return msgspec.structs.replace(
            policy,
            thresholds=tuple(value if value <= _TOP[policy.score] else math.inf for value in moved),
            name=f"{policy.name}-adapted",
            provenance=None,
        )


class Recertification(msgspec.Struct, kw_only=True):
    """Certifies a policy again on fresh audits, as often as it takes, with one ``delta`` for all attempts together.

    Attempt ``t`` (from 1) is a test at ``delta / 2^t``, and the sum of these is at most ``delta``. How many audits it
    takes is fixed before the first of them is seen: so many that a policy of mean loss ``epsilon / 2`` passes in 9 of
    10 cases. Looking sooner, or trying again on the same audits, would break the promise, so neither is possible.

    **Promise**: with probability at least ``1 - delta`` no attempt ever passes while the mean loss exceeds epsilon.

    Attributes:
        epsilon: largest mean loss.
        delta: chance that some attempt passes wrongly.
        certified: whether the policy may be used; if not, nobody may leave early.
        attempts: made so far.
        needed: audits of the attempt that is under way; 0 when none is.
        fresh: how many of them it has.
        losses: of those, by number from 0; those that are not here are 0, as most are.
        p_value: of the latest attempt.
    """

    epsilon: float
    delta: float
    certified: bool = True
    attempts: int = 0
    needed: int = 0
    fresh: int = 0
    losses: dict[int, float] = {}
    p_value: float | None = None

    def __post_init__(self) -> None:
        require_share("epsilon", self.epsilon)
        require_share("delta", self.delta)

    @property
    def spent(self) -> float:
        """Part of ``delta`` that the attempts made so far have used up."""
        return self.delta * (1 - 0.5**self.attempts)

    @property
    def level(self) -> float:
        """``delta / 2^t`` of the next attempt."""
        return self.delta * 0.5 ** (self.attempts + 1)

    def revert(self) -> None:
        """Withdraw the certificate; the next audits belong to the next attempt."""
        self.certified = False
        self.fresh, self.losses = 0, {}
        self.needed = samples_for_power(self.epsilon, self.level, risk=self.epsilon / 2)

    def add(self, losses: ArrayLike, *, p_value: PValue | None = None) -> bool:
        """Take losses of the policy on fresh audits; an attempt is made as soon as it has as many as it needs.

        Args:
            losses: ``()`` or ``(audits,)``, each between -1 and 1. Those that come after a pass are not looked at.
            p_value: fixed beforehand; :func:`positive_p_value` when not given.

        Returns:
            Whether the policy may be used now.

        Raises:
            CalibrationError: a loss is NaN or out of range.
        """
        for loss in checked_losses(losses, lowest=-1.0).tolist():
            if not self.certified:
                if loss:
                    self.losses[self.fresh] = loss
                self.fresh += 1
                if self.fresh == self.needed:
                    self._attempt(p_value or positive_p_value)
        return self.certified

    def _attempt(self, p_value: PValue) -> None:
        losses = np.zeros(self.fresh)
        losses[list(self.losses)] = list(self.losses.values())
        self.p_value = p_value(losses, self.epsilon)
        passed = self.p_value <= self.level
        self.attempts += 1
        if passed:
            self.certified, self.needed, self.fresh, self.losses = True, 0, 0, {}
        else:
            self.revert()


def positive_p_value(losses: NDArray[np.float64], epsilon: float) -> float:
    """Exact binomial p-value of how many losses are positive; valid for all losses up to 1, since ``x <= 1[x > 0]``.

    Args:
        losses: ``(audits,)``.
        epsilon: 0 to 1.
    """
    return binomial_p_value(int((losses > 0).sum()), len(losses), epsilon)


def _bottom(score: str, classes: int) -> float:
    """Smallest value of a score."""
    return {"max_prob": 1 / classes, "margin": 0.0, "neg_entropy": -math.log(classes), "learned": -ODDS_LIMIT}[score]
