"""What a network says about some samples, for each setting of the constants that its gates compare scores with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.calibrate import Collected, Minimize, collect, exit_costs
from edgekit.calibration.losses import Loss
from edgekit.data import Dataset
from edgekit.errors import CalibrationError
from edgekit.plan import Constant, Plan
from edgekit.policy import Policy
from edgekit.progress import Progress, silent
from edgekit.records import Profile
from edgekit.shares import mean_macs

if TYPE_CHECKING:
    from edgekit.session import Session

__all__ = ["Gathered", "moved_constants"]

SHIFTS = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0, 2.0)
"""How far constants are moved up and down: log-odds where they lie between 0 and 1, else in their own unit.

Fine near zero: gates trained towards a share of open ones have most of their scores near the constant.
"""
COSTED = 256
"""Samples on which the cost of a setting of constants is measured, in MACs that ran."""

Constants = Mapping[str, float]
Rows = NDArray[np.intp]


class Gathered:
    """Runs every sample to every exit once for each setting of constants, when it is first asked for.

    Args:
        session: open; its policy is replaced, and whoever gathers puts it back.
        data: samples.
        minimize: what costs are.
        profile: where they come from, unless they are MACs.
        progress: told how many samples are done.

    Raises:
        CalibrationError: costs are not known.
    """

    def __init__(
        self,
        session: Session,
        data: Dataset,
        *,
        minimize: Minimize | None,
        profile: Profile | None,
        progress: Progress = silent,
    ) -> None:
        self.session = session
        self.data = data
        self.trained_costs, (self.quantity, self.unit) = exit_costs(session, minimize=minimize, profile=profile)
        self.profile = profile
        self._progress = progress
        self._collected: dict[tuple[tuple[str, float], ...], Collected] = {}
        self._macs: dict[tuple[object, ...], tuple[float, ...] | None] = {}

    def logits(self, constants: Constants) -> NDArray[np.float32]:
        """``(exits, samples, classes) float32``."""
        key = _key(constants)
        if key not in self._collected:
            self._use(constants)
            self._collected[key] = collect(self.session, self.data, progress=self._progress)
        return self._collected[key].logits

    def losses(self, loss: Loss, constants: Constants) -> NDArray[np.float64]:
        """``(exits, samples)`` of leaving at each exit, against the last exit with the gates as trained."""
        logits = self.logits(constants)
        if not constants:
            return loss(logits, self.data.labels)
        return loss(np.concatenate([logits, self.logits({})[-1:]]), self.data.labels)[:-1]

    def costs(self, constants: Constants, rows: Rows) -> tuple[float, ...]:
        """Mean cost of leaving at each exit, in :attr:`unit`; of what runs, on some of ``rows``.

        Raises:
            CalibrationError: it was not measured with these constants.
        """
        if not constants and not self.session.plan.gates:
            return self.trained_costs
        if self.quantity != "macs":
            if constants:
                raise CalibrationError(
                    f"{self.quantity} was not measured with other constants of gates; minimize 'macs' instead"
                )
            return self.trained_costs
        counted = self.macs(constants, rows)
        assert counted is not None  # exit_costs refuses stages without a count
        return counted

    def saves(self, constants: Constants, rows: Rows) -> bool:
        """Whether reaching the last exit costs less than with the gates as trained; told from a few of ``rows``."""
        return self.costs(constants, rows)[-1] < self.costs({}, rows)[-1]

    def macs(self, constants: Constants, rows: Rows) -> tuple[float, ...] | None:
        """Mean MACs of leaving at each exit, of what ran on a few of ``rows``; ``None`` when uncounted.

        What proposes a path must not look at the samples that test it, not even for what they cost.
        """
        few = rows[:COSTED]
        key = (_key(constants), few.tobytes())
        if key not in self._macs:
            self._use(constants)
            inputs = self.data.batch(few)
            means = []
            for index in range(len(self.session.plan.exits)):
                result = self.session.run(inputs, exit=index)
                means.append(mean_macs(self.session.plan, result.executed, samples=len(result.exit)))
            known = tuple(mean for mean in means if mean is not None)
            self._macs[key] = known if len(known) == len(means) else None
        return self._macs[key]

    def _use(self, constants: Constants) -> None:
        never = [math.inf] * (len(self.session.plan.exits) - 1)
        self.session.use(Policy.fixed(never, constants=constants))


def moved_constants(plan: Plan) -> tuple[dict[str, float], ...]:
    """Settings of the gates' constants: as trained, and all moved alike, each in the direction of fewer and of more.

    Which of the two directions closes gates depends on the network, so both are there; what costs more is not proposed.
    """
    if not plan.constants:
        return ({},)
    shifts = sorted((sign * shift for sign in (-1, 1) for shift in SHIFTS), key=abs)
    return ({}, *({each.name: _moved(each, shift) for each in plan.constants} for shift in shifts))


def _moved(constant: Constant, shift: float) -> float:
    # A larger constant makes ``>`` true less often, and ``<`` more often: gates move the same way.
    signed = shift if constant.comparison in (">", ">=") else -shift
    if 0 < constant.value < 1:
        odds = math.log(constant.value / (1 - constant.value)) + signed
        return float(np.float32(1 / (1 + math.exp(-odds))))
    return float(np.float32(constant.value + signed))


def _key(constants: Constants) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(constants.items()))
