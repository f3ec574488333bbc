"""Which way of calibrating was asked for, with which proposal, and on which samples costs may be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgekit.calibration.calibrate import Minimize, calibrate_empirically
from edgekit.calibration.certified import calibrate_certified, halves
from edgekit.calibration.losses import Loss
from edgekit.calibration.modes import calibrate_anytime, calibrate_budget
from edgekit.certificate import Proposal
from edgekit.data import Dataset
from edgekit.errors import CalibrationError
from edgekit.policy import Policy
from edgekit.progress import Progress
from edgekit.records import Profile

if TYPE_CHECKING:
    from edgekit.session import Session

__all__ = ["choose"]


def choose(
    session: Session,
    data: Dataset,
    *,
    max_drop: float,
    confidence: float | None,
    loss: str | Loss,
    score: str | None,
    conditional: bool,
    also: Sequence[tuple[str | Loss, float]],
    proposal: Proposal | str | None,
    budget: float | None,
    anytime: bool,
    minimize: Minimize | None,
    measure: Callable[[Dataset], Profile | None],
    temperature: bool,
    name: str,
    seed: int,
    progress: Progress,
) -> Policy:
    """A policy by the way that was asked for. Arguments and errors as in :func:`edgekit.calibrate`.

    Instead of a profile ``measure`` gives one, measured on some samples where the user gave none, or ``None`` where
    costs are MACs.
    """
    certified = confidence is not None and budget is None and not anytime
    if (anytime and (budget is not None or confidence is None)) or (
        not certified and (proposal or conditional or also)
    ):
        raise CalibrationError(
            "a budget, anytime bounds (with a confidence), the empirical choice and a tested proposal exclude each "
            "other: ask for one"
        )
    if anytime:
        assert confidence is not None
        return calibrate_anytime(
            session, data, delta=1 - confidence, loss=loss, name=name, seed=seed, progress=progress
        )
    if budget is not None:
        return calibrate_budget(
            session, data, budget=budget, loss=loss, score=score or "max_prob", minimize=minimize,
            profile=measure(data), temperature=temperature, name=name, seed=seed, progress=progress,
        )  # fmt: skip
    if confidence is None:
        if loss != "gap":
            raise CalibrationError("the empirical choice is for the loss 'gap'; give a confidence for others")
        return calibrate_empirically(
            session, data, max_drop=max_drop, score=score or "max_prob", minimize=minimize, profile=measure(data),
            temperature=temperature, name=name, progress=progress,
        )  # fmt: skip
    given = _proposal(session, proposal, loss, score)
    return calibrate_certified(
        session, data, epsilon=max_drop, delta=1 - confidence, loss=loss, conditional=conditional, also=also,
        proposal=given, score=score or "max_prob", minimize=minimize,
        profile=measure(data if given is not None else _proposing(data, seed)), temperature=temperature, name=name,
        seed=seed, progress=progress,
    )  # fmt: skip


def _proposing(data: Dataset, seed: int) -> Dataset:
    """The half that proposes: what proposes must not look at what tests, not even for what it costs."""
    ours, _ = halves(len(data), seed)
    labels = None if data.labels is None else data.labels[ours]
    return replace(data, inputs=data.inputs[ours], labels=labels) if len(ours) else data


def _proposal(session: Session, given: Proposal | str | None, loss: str | Loss, score: str | None) -> Proposal | None:
    """What is to be tested; ``None`` where the samples are split."""
    bundle = session.bundle
    if isinstance(given, str):
        if bundle is None:
            raise CalibrationError(f"proposal '{given}': the session was not opened from a bundle; give the proposal")
        given = bundle.proposal(given)
    elif given is None and bundle is not None and "default" in bundle.manifest.proposals:
        saved = bundle.proposal()
        given = saved if saved.loss == (loss if isinstance(loss, str) else loss.name) else None
        given = given if score in (None, saved.score) else None
    if given is not None and score not in (None, given.score):
        raise CalibrationError(f"proposal '{given.name}' is of score '{given.score}', not '{score}': propose again")
    return given
