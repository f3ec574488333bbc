"""Policies worth testing: for one network, one loss and one score, in the order in which to test them."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.calibrate import Minimize, labels_if_any, runtime_name, scores_of
from edgekit.calibration.candidates import Candidate
from edgekit.calibration.certify import shuffled
from edgekit.calibration.gathered import Gathered, moved_constants
from edgekit.calibration.losses import LOSSES, Loss
from edgekit.calibration.scorers import auroc, fit_scorer
from edgekit.calibration.solve import DOUBT, TESTED, propose_path
from edgekit.calibration.temperature import fit_temperature
from edgekit.certificate import Proposal, Proposed, ScoreFound
from edgekit.data import Dataset
from edgekit.errors import CalibrationError
from edgekit.plan import SCORES
from edgekit.progress import Progress, silent
from edgekit.records import Profile
from edgekit.scoring import LearnedScorer, patience

if TYPE_CHECKING:
    from edgekit.session import Session

__all__ = ["ALL_SCORES", "Scoring", "digests", "find_loss", "propose", "propose_on", "seen", "was_seen"]

ALL_SCORES = (*SCORES, "patience", "learned")
"""Scores that can be compared; of two exits or more."""


DIGESTED = 256
"""Samples whose inputs are read at a time."""
POINTS = 64
"""Most policies of a proposal."""


@dataclass(frozen=True)
class Scoring:
    """A score with what it needs.

    Attributes:
        name: one of :data:`ALL_SCORES`.
        temperatures: one per exit.
        scorer: of ``"learned"``.
    """

    name: str
    temperatures: tuple[float, ...]
    scorer: LearnedScorer | None = None

    def __call__(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """``(exits - 1, samples) float32`` of logits ``(exits, samples, classes)``."""
        if self.name == "patience":
            return patience(logits)[:-1]
        if self.scorer is not None:
            return self.scorer(logits)
        return scores_of(logits[:-1], self.name, self.temperatures)


def digests(data: Dataset, rows: NDArray[np.intp]) -> NDArray[np.uint64]:
    """``(rows,) uint64`` of the inputs of some samples as the network gets them; equal for equal samples."""
    found = np.empty(len(rows), dtype=np.uint64)
    for start in range(0, len(rows), DIGESTED):
        for place, sample in enumerate(data.batch(rows[start : start + DIGESTED])):
            digest = hashlib.blake2b(np.ascontiguousarray(sample).tobytes(), digest_size=8).digest()
            found[start + place] = int.from_bytes(digest, "little")
    return found


def seen(data: Dataset, rows: NDArray[np.intp]) -> str:
    """Digests of samples as a proposal keeps them."""
    return base64.b64encode(np.unique(digests(data, rows)).astype("<u8").tobytes()).decode()


def was_seen(proposal: Proposal, data: Dataset, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
    """``(rows,)`` whether each sample is one that a proposal was found on."""
    known = np.frombuffer(base64.b64decode(proposal.seen), dtype="<u8")
    return np.isin(digests(data, rows), known)


def find_loss(loss: str | Loss) -> Loss:
    """A built-in loss by name, or the user's own.

    Raises:
        CalibrationError: there is none of that name.
    """
    if isinstance(loss, Loss):
        return loss
    if loss not in LOSSES:
        raise CalibrationError(f"loss {loss!r} is not one of {', '.join(LOSSES)}; or give an edgekit.calibration.Loss")
    return LOSSES[loss]


def propose(
    session: Session,
    data: Dataset,
    *,
    loss: str | Loss = "gap",
    score: str = "max_prob",
    epsilon: float = 0.01,
    minimize: Minimize | None = None,
    profile: Profile | None = None,
    temperature: bool = True,
    name: str = "default",
    seed: int = 0,
    progress: Progress = silent,
) -> Proposal:
    """Policies to test on other samples, as on the device: see :mod:`edgekit.calibration.solve`.

    What is proposed decides what a certified policy costs, and never whether its certificate holds.

    Args:
        session: open; its policy is put back.
        data: samples that were not trained on, and that will not test the policies.
        loss: of leaving early: ``"gap"``, ``"consistency"``, ``"brier"`` or the user's own.
        score: one of :data:`ALL_SCORES`, or ``"best"``: the one of least cost on these samples.
        epsilon: target at which scores are compared.
        minimize: as in :func:`edgekit.calibrate`.
        profile: likewise.
        temperature: fit one per exit, where there are labels; else all are 1.
        name: of the proposal.
        seed: of what is drawn.
        progress: told how many samples have run.

    Raises:
        CalibrationError: the data or the options do not allow a proposal; the message says which and what to do.
        InputError: the samples do not fit the network.
    """
    before = session.policy
    gathered = Gathered(session, data, minimize=minimize, profile=profile, progress=progress)
    try:
        return propose_on(
            gathered, None, find_loss(loss), score=score, epsilon=epsilon, temperature=temperature, name=name, seed=seed
        )
    finally:
        session.use(before)


def propose_on(
    gathered: Gathered,
    rows: NDArray[np.intp] | None,
    loss: Loss,
    *,
    score: str,
    epsilon: float,
    temperature: bool,
    name: str,
    seed: int,
) -> Proposal:
    """A proposal from some ``rows`` of what was gathered; all if ``None``. Arguments and errors of :func:`propose`."""
    session, data = gathered.session, gathered.data
    if score not in (*ALL_SCORES, "best"):
        raise CalibrationError(f"score {score!r} is not one of {', '.join(ALL_SCORES)}, or 'best'")
    labels = labels_if_any(data, session.plan.classes, needed=loss.needs_labels)
    rows = np.arange(len(data)) if rows is None else rows
    if len(rows) < 2:
        raise CalibrationError(
            f"{data.source}: {len(rows)} samples are too few to propose policies from; give some hundreds"
        )
    logits = gathered.logits({})
    temperatures = tuple(
        1.0 if labels is None or not temperature else fit_temperature(each[rows], labels[rows]) for each in logits
    )
    found = _compare(gathered, rows, loss, temperatures, labels, epsilon=epsilon, seed=seed, only=score)
    chosen = min(found, key=lambda each: each[1].cost) if score == "best" else found[_place(found, score)]
    scoring, _, found_on = chosen
    policies = [
        proposed
        for constants in (moved_constants(session.plan) if gathered.quantity == "macs" else ({},))
        if not constants or gathered.saves(constants, rows)
        for proposed in _policies(gathered, found_on, loss, scoring, constants, seed)
    ]
    return Proposal(
        name=name,
        plan=session.plan.fingerprint,
        loss=loss.name,
        score=scoring.name,
        temperatures=temperatures,
        scorer=scoring.scorer,
        policies=_in_order(policies),
        cost="mean MACs" if gathered.quantity == "macs" else f"mean {gathered.quantity}, {gathered.unit}",
        scores=tuple(each[1] for each in found) if len(logits) > 1 else (),
        samples=len(rows),
        source=data.source,
        data_sha256=data.sha256,
        seen=seen(data, rows),
        runtime=runtime_name(session),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


Found = tuple[Scoring, ScoreFound, NDArray[np.intp]]
"""A score, what it is worth, and the rows that a path with it may be found on."""


def _compare(
    gathered: Gathered,
    rows: NDArray[np.intp],
    loss: Loss,
    temperatures: tuple[float, ...],
    labels: NDArray[np.int64] | None,
    *,
    epsilon: float,
    seed: int,
    only: str,
) -> list[Found]:
    """Every score on the same rows: those that a learned one was not fitted on."""
    logits = gathered.logits({})
    if len(logits) == 1:
        name = "max_prob" if only == "best" else only
        return [
            (Scoring(name, temperatures), ScoreFound(score=name, epsilon=epsilon, cost=0.0, unit="", auroc=()), rows)
        ]
    order = rows[shuffled(len(rows), seed)]
    fitted, rest = np.sort(order[: len(rows) // 2]), np.sort(order[len(rows) // 2 :])
    scorer = fit_scorer(logits[:, fitted], None if labels is None else labels[fitted])
    losses, costs = gathered.losses(loss, {}), gathered.costs({}, rows)
    truth = logits[-1].argmax(axis=1) if labels is None else labels
    right = logits[:-1].argmax(axis=2) == truth
    found: list[Found] = []
    for name in ALL_SCORES:
        scoring = Scoring(name, temperatures, scorer if name == "learned" else None)
        scores = scoring(logits[:, rest])
        path = propose_path(scores, losses[:, rest], costs, seed=seed)
        ranked = [auroc(row, truth_row) for row, truth_row in zip(scores, right[:, rest], strict=True)]
        worth = ScoreFound(
            score=name,
            epsilon=epsilon,
            cost=min(each.cost for each in path if each is path[0] or _passable(each) <= epsilon),
            unit=gathered.unit,
            auroc=tuple(None if math.isnan(value) else value for value in ranked),
        )
        found.append((scoring, worth, rest if name == "learned" else rows))
    return found


def _place(found: Sequence[Found], score: str) -> int:
    return next(place for place, each in enumerate(found) if each[0].name == score)


def _passable(candidate: Candidate) -> float:
    """About the smallest target that a test of :data:`TESTED` samples mostly accepts, the order of a path."""
    return candidate.risk + DOUBT * candidate.deviation / math.sqrt(TESTED)


def _policies(
    gathered: Gathered,
    rows: NDArray[np.intp],
    loss: Loss,
    scoring: Scoring,
    constants: dict[str, float],
    seed: int,
) -> list[tuple[float, Proposed]]:
    """Policies with one setting of the constants, each with what it is ordered by."""
    scores = scoring(gathered.logits(constants)[:, rows])
    path = propose_path(scores, gathered.losses(loss, constants)[:, rows], gathered.costs(constants, rows), seed=seed)
    return [
        (
            _passable(each),
            Proposed(
                thresholds=each.thresholds,
                constants=constants,
                loss=each.risk,
                cost=each.cost,
                shares=each.shares,
            ),
        )
        for each in path
    ]


def _in_order(policies: Sequence[tuple[float, Proposed]]) -> tuple[Proposed, ...]:
    """Never-exit with the gates as trained, then whatever is cheaper than all that are safer."""
    (_, first), *others = policies
    kept = [first]
    for _, policy in sorted(others, key=lambda each: (each[0], -each[1].cost)):
        if policy.cost < kept[-1].cost:
            kept.append(policy)
    places = np.unique(np.linspace(0, len(kept) - 1, min(len(kept), POINTS)).round().astype(int))
    return tuple(kept[place] for place in places)
