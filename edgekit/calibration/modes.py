"""Other ways to choose: within a budget of mean cost, and for being stopped at any time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.bands import smallest_epsilon
from edgekit.calibration.calibrate import (
    Minimize,
    labels_if_any,
    policy_back_on_failure,
    provenance_of,
    scores_of,
)
from edgekit.calibration.candidates import Candidate, evaluate
from edgekit.calibration.certify import shuffled
from edgekit.calibration.gathered import Gathered
from edgekit.calibration.losses import Loss
from edgekit.calibration.proposal import find_loss
from edgekit.calibration.risk import require_confidence, smallest_sample
from edgekit.calibration.solve import msdnet_budget, propose_budget
from edgekit.calibration.temperature import fit_temperature
from edgekit.calibration.thresholds import exits_taken
from edgekit.data import Dataset
from edgekit.errors import CalibrationError
from edgekit.plan import SCORES
from edgekit.policy import Policy
from edgekit.progress import Progress, silent
from edgekit.records import Profile

if TYPE_CHECKING:
    from edgekit.session import Session

__all__ = ["anytime_bounds", "calibrate_anytime", "calibrate_budget"]

BUDGET_METHOD = "budget: the safest policy of a path whose mean cost on the calibration set is within the budget"
ANYTIME_METHOD = "anytime: nobody leaves; upper bounds of the mean loss of stopping at each exit"


def calibrate_budget(
    session: Session,
    data: Dataset,
    *,
    budget: float,
    loss: str | Loss = "gap",
    score: str = "max_prob",
    minimize: Minimize | None = None,
    profile: Profile | None = None,
    temperature: bool = True,
    name: str = "default",
    seed: int = 0,
    progress: Progress = silent,
) -> Policy:
    """Thresholds whose mean cost on ``data`` is at most ``budget``, with as little loss as can be.

    Nothing is promised about other data, neither the cost nor the loss. ``policy.provenance.results`` holds the figures
    of MSDNet's budgeted batch (Huang et al. 2018) beside it.

    Args:
        session: open; keeps the new policy.
        data: samples that were not trained on.
        budget: mean cost of a sample: seconds, joules or MACs, as ``minimize`` says.
        loss: as in :func:`edgekit.calibrate`.
        score: one of :data:`edgekit.plan.SCORES`.
        minimize: what the budget is of.
        profile: as there.
        temperature: as there.
        name: of the policy.
        seed: of what is drawn.
        progress: told what is being done.

    Raises:
        CalibrationError: no policy is that cheap, or the data or options do not allow a choice.
    """
    if score not in SCORES:
        raise CalibrationError(f"score {score!r} is not one of {', '.join(SCORES)}, which budgets are found for")
    if not (math.isfinite(budget) and budget > 0):
        raise CalibrationError(f"a budget is a positive mean cost, not {budget}")
    found = find_loss(loss)
    gathered = Gathered(session, data, minimize=minimize, profile=profile, progress=progress)
    with policy_back_on_failure(session):
        labels = labels_if_any(data, session.plan.classes, needed=found.needs_labels)
        logits, losses, costs = (
            gathered.logits({}),
            gathered.losses(found, {}),
            gathered.costs({}, np.arange(len(data))),
        )
        fitted = tuple(1.0 if labels is None or not temperature else fit_temperature(each, labels) for each in logits)
        scores = scores_of(logits[:-1], score, fitted)
        chosen = propose_budget(scores, losses, costs, budget=budget, seed=seed)
        results: dict[str, Any] = {"cost_unit": gathered.unit, "exit_costs": list(costs), **_figures(chosen)}
        results["msdnet"] = _msdnet(scores_of(logits[:-1], "max_prob", (1.0,) * len(logits)), losses, costs, budget)
        results |= _accuracy(chosen, scores, logits, labels)
        policy = Policy(score=score, thresholds=chosen.thresholds, temperatures=fitted, name=name)
        settings = {"budget": budget, "loss": found.name, "score": score, "minimize": gathered.quantity, "seed": seed}
        provenance = provenance_of(session, data, settings=settings, results=results, method=BUDGET_METHOD)
        policy = msgspec.structs.replace(policy, provenance=provenance)
        session.use(policy)
    return policy


def _figures(candidate: Candidate) -> dict[str, Any]:
    return {
        "loss": candidate.risk,
        "expected_cost": candidate.cost,
        "exit_shares": list(candidate.shares),
    }


def _msdnet(
    scores: NDArray[np.float32], losses: NDArray[np.float64], costs: tuple[float, ...], budget: float
) -> dict[str, Any]:
    """The baseline's thresholds and figures, or why there are none."""
    try:
        thresholds = msdnet_budget(scores, costs, budget=budget)
    except CalibrationError as error:
        return {"reason": str(error)}
    figures = _figures(evaluate(scores, losses, costs, thresholds=thresholds))
    return {"thresholds": [value if math.isfinite(value) else str(value) for value in thresholds], **figures}


def _accuracy(
    chosen: Candidate, scores: NDArray[np.float32], logits: NDArray[np.float32], labels: NDArray[np.int64] | None
) -> dict[str, Any]:
    if labels is None:
        return {}
    taken = exits_taken(scores, chosen.thresholds)
    classes = logits.argmax(axis=2)
    right = classes[taken, np.arange(len(taken))] == labels
    return {"accuracy": float(right.mean()), "accuracy_last": float((classes[-1] == labels).mean())}


def calibrate_anytime(
    session: Session,
    data: Dataset,
    *,
    delta: float,
    loss: str | Loss = "gap",
    name: str = "default",
    seed: int = 0,
    progress: Progress = silent,
) -> Policy:
    """For a stream that is stopped from outside: what stopping at each exit loses at most, all exits at once.

    The policy lets nobody leave by itself. ``policy.provenance.results["anytime"]`` has for each exit but the last the
    mean loss here and its upper bound; all bounds hold together with probability ``1 - delta``.

    Args:
        session: open; keeps the new policy.
        data: samples like those of later use, not trained on.
        delta: 0 to 1.
        loss: as in :func:`edgekit.calibrate`.
        name: of the policy.
        seed: of the order of testing.
        progress: told what is being done.

    Raises:
        CalibrationError: the data or the options do not allow it.
    """
    require_confidence(delta)
    if len(session.plan.exits) == 1:
        raise CalibrationError("the network has one exit: there is no other to stop at")
    found = find_loss(loss)
    gathered = Gathered(session, data, minimize="macs", profile=None, progress=progress)
    with policy_back_on_failure(session):
        labels = labels_if_any(data, session.plan.classes, needed=found.needs_labels)
        losses = gathered.losses(found, {})
        bounds = anytime_bounds(losses, found, delta=delta, seed=seed)
        exits = [step.name for step in session.plan.exits]
        right = None if labels is None else gathered.logits({}).argmax(axis=2) == labels
        rows = [
            {
                "exit": name_of,
                "loss": float(row.mean()),
                "bound": bound,
                "accuracy": None if right is None else float(right[index].mean()),
            }
            for index, (name_of, row, bound) in enumerate(zip(exits, losses, bounds, strict=False))
        ]
        policy = msgspec.structs.replace(Policy.never(len(exits)), name=name)
        results = {
            "anytime": rows,
            "cost_unit": gathered.unit,
            "exit_costs": list(gathered.costs({}, np.arange(len(data)))),
        }
        settings = {"confidence": 1 - delta, "loss": found.name, "test": found.test, "seed": seed}
        sure = float(f"{1 - delta:.12f}")
        promise = (
            f"with probability {sure!r} over the drawing of the {len(data)} samples, the mean loss ({found.name}) of "
            "stopping at an exit is at most its bound, at all exits together"
        )
        provenance = provenance_of(
            session, data, settings=settings, results=results, method=ANYTIME_METHOD, guarantee=promise
        )
        policy = msgspec.structs.replace(policy, provenance=provenance)
        session.use(policy)
    return policy


def anytime_bounds(losses: NDArray[np.float64], loss: Loss, *, delta: float, seed: int) -> tuple[float, ...]:
    """Upper bounds of the mean loss of stopping at each exit but the last, all at once with probability ``1 - delta``.

    By Bonferroni's inequality: each holds with probability ``1 - delta / (exits - 1)``.

    Args:
        losses: ``(exits, samples)`` of stopping at each exit.
        loss: what they are.
        delta: 0 to 1.
        seed: of the order of testing.

    Raises:
        CalibrationError: there are too few samples to bound anything below 1.
    """
    early, samples = max(len(losses) - 1, 1), losses.shape[1]
    share = delta / early
    least = smallest_sample(0.5, share, loss.test)
    if samples < least:
        raise CalibrationError(f"{samples} samples bound no loss of {early} exits at once: give {least} or more")
    order = shuffled(samples, seed)
    return tuple(smallest_epsilon(row[order], test=loss.test, delta=share) for row in losses[:-1])
