"""Collect the logits of every exit once; choose thresholds empirically, without a guarantee; record what came out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.scores import expected_calibration_error, negative_log_likelihood, require_score, score
from edgekit.calibration.temperature import TEMPERATURE_RANGE, fit_temperature
from edgekit.calibration.thresholds import CELLS, SEPARATION, choose_thresholds
from edgekit.data import Dataset
from edgekit.errors import CalibrationError
from edgekit.policy import Policy, Provenance
from edgekit.progress import Progress, silent
from edgekit.records import Profile
from edgekit.tensors import finite_rows

if TYPE_CHECKING:
    from edgekit.session import Session

__all__ = [
    "METHOD",
    "Collected",
    "calibrate_empirically",
    "collect",
    "confidence_of",
    "exit_costs",
    "labels_if_any",
    "policy_back_on_failure",
    "provenance_of",
    "run_policy",
    "runtime_name",
    "scores_of",
    "usable_labels",
]

METHOD = "empirical: least cost on the calibration set with the accuracy drop within max_drop"
BATCH_ROWS = 64

Minimize = Literal["latency", "energy", "macs"]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What every exit says about every sample, collected once.

    Attributes:
        logits: ``(exits, samples, classes) float32``, finite.
        labels: ``(samples,) int64``, or ``None``.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64] | None

    @property
    def right(self) -> NDArray[np.bool_]:
        """``(exits, samples)`` whether each exit's largest logit is the label's. Needs labels."""
        return np.asarray(self.logits.argmax(axis=2) == self.labels)


def collect(session: Session, data: Dataset, *, batch: int = BATCH_ROWS, progress: Progress = silent) -> Collected:
    """Run every sample to every exit.

    Args:
        session: open; its policy does not matter.
        data: calibration set.
        batch: samples at a time.
        progress: told how many samples are done.

    Raises:
        CalibrationError: a sample or its logits are not finite; the message names the first, and the exit.
        InputError: the samples do not fit the network.
    """
    exits = session.plan.exits
    parts: list[NDArray[np.float32]] = []
    for start in range(0, len(data), batch):
        inputs = data.batch(slice(start, start + batch))
        _require_finite(inputs, start, f"{data.source}: sample", "is NaN or infinite; remove or repair it")
        logits = np.stack([np.array(each, dtype=np.float32) for each in session.run_exits(inputs)])
        for step, each in zip(exits, logits, strict=True):
            what = f"{data.source}: exit '{step.name}' of sample"
            _require_finite(each, start, what, "gave NaN or infinite logits; check the sample")
        parts.append(logits)
        progress("run every exit", min(start + batch, len(data)), len(data))
    return Collected(logits=np.concatenate(parts, axis=1), labels=data.labels)


@contextmanager
def policy_back_on_failure(session: Session) -> Iterator[None]:
    """Give the session its policy back if what is done in here fails."""
    before = session.policy
    try:
        yield
    except BaseException:
        session.use(before)
        raise


def calibrate_empirically(
    session: Session,
    data: Dataset,
    *,
    max_drop: float = 0.01,
    score: str = "max_prob",
    minimize: Minimize | None = None,
    profile: Profile | None = None,
    temperature: bool = True,
    name: str = "default",
    progress: Progress = silent,
) -> Policy:
    """Choose thresholds of least mean cost that keep accuracy near the last exit's, on the calibration set.

    Empirical: the drop holds on ``data`` as it was run here. Nothing is promised about other data; on fresh samples of
    the same kind, expect the drop to be exceeded in many cases, the more so the smaller the set.

    The cost of leaving at an exit is the *mean* measured latency of that forced exit, since means add up to the mean
    of the stream and medians do not; or its cumulative MACs.

    **The session keeps the new policy.** It is run over ``data`` with it, and ``policy.provenance.results`` tells what
    came out, ``within_max_drop`` included. If anything fails, the session's earlier policy is put back.

    Args:
        session: open, on the runtime that the policy is for.
        data: labelled samples that were not trained on.
        max_drop: largest ``accuracy(last exit) - accuracy(policy)``, 0 to 1.
        score: one of :data:`edgekit.plan.SCORES`.
        minimize: ``"latency"`` needs a profile; ``None`` takes latency when there is one, else MACs.
        profile: measured with this network on this runtime.
        temperature: fit one per exit; else all are 1.
        name: of the policy.
        progress: told what is being done.

    Raises:
        CalibrationError: the data or the options do not allow a choice; the message says which and what to do.
        InputError: the samples do not fit the network.
    """
    allowed = _allowed_losses(max_drop, len(data))
    require_score(score)
    costs, (quantity, unit) = exit_costs(session, minimize=minimize, profile=profile)
    labels = usable_labels(data, session.plan.classes)
    collected = collect(session, data, progress=progress)
    logits = collected.logits
    fitted = [fit_temperature(each, labels) if temperature else 1.0 for each in logits]
    choice = choose_thresholds(scores_of(logits[:-1], score, fitted), collected.right, costs=costs, allowed=allowed)
    policy = Policy(score=score, thresholds=choice.thresholds, temperatures=tuple(fitted), name=name)
    settings = {
        "max_drop": max_drop,
        "score": score,
        "minimize": quantity,
        "profile": profile.created if profile is not None and quantity == "latency" else None,
        "temperature": temperature,
        "temperature_range": list(TEMPERATURE_RANGE),
        "separation": SEPARATION,
        "grid_cells": CELLS,
        "combinations": choice.combinations,
        "exact": choice.exact,
    }
    with policy_back_on_failure(session):
        session.use(policy)
        classes, taken = run_policy(session, data, progress)
        results = {
            **_outcome(collected, classes == labels, taken, allowed=allowed),
            **_cost_outcome(costs, taken, unit),
            "as_predicted": float((taken == choice.exits).mean()),
            **confidence_of(logits, labels, fitted),
        }
        provenance = provenance_of(session, data, settings=settings, results=results)
        policy = msgspec.structs.replace(policy, provenance=provenance)
        session.use(policy)
    return policy


def _allowed_losses(max_drop: float, samples: int) -> int:
    """How many answers may be lost; exact, so that 0.29 of 100 is 29 and not 28.999999999999996."""
    if not 0 <= max_drop <= 1:
        raise CalibrationError(f"max_drop must be between 0 and 1, not {max_drop}; 0.01 allows one answer in a hundred")
    return math.floor(Fraction(repr(float(max_drop))) * samples)


def exit_costs(
    session: Session, *, minimize: Minimize | None, profile: Profile | None
) -> tuple[tuple[float, ...], tuple[Minimize, str]]:
    """Mean cost of leaving at each exit, and what it is: quantity and unit.

    Raises:
        CalibrationError: it is not known, or the profile is of another network or runtime.
    """
    if minimize not in (None, "latency", "energy", "macs"):
        raise CalibrationError(f"minimize must be 'latency', 'energy' or 'macs', not {minimize!r}")
    if minimize == "macs" or (minimize is None and profile is None):
        macs = session.plan.exit_macs()
        known = tuple(float(count) for count in macs if count is not None)
        if len(known) < len(macs):
            raise CalibrationError("the MACs of some stages are not known; give a measured profile: profile=...")
        return known, ("macs", "MACs")
    if profile is None:
        raise CalibrationError(
            f"minimize={minimize!r} needs measurements: measure with edgekit profile, then give profile=..."
        )
    _require_profile_of(session, profile)
    if minimize == "energy":
        joules = tuple(each.energy.gross_j for each in profile.exits)
        found = tuple(value for value in joules if value is not None and math.isfinite(value) and value > 0)
        if len(found) != len(session.plan.exits):
            reason = next((each.energy.reason for each in profile.exits if each.energy.reason), "no meter")
            raise CalibrationError(f"the profile has no energy for every exit ({reason}); minimize latency instead")
        return found, ("energy", "J")
    means = tuple(each.latency.mean_s for each in profile.exits)
    if len(means) != len(session.plan.exits) or not all(math.isfinite(mean) and mean > 0 for mean in means):
        raise CalibrationError("the profile has no positive mean latency for every exit: profile again")
    return means, ("latency", "s")


def _require_profile_of(session: Session, profile: Profile) -> None:
    runtime = session.runtime.describe().get("name")
    if profile.plan != session.plan.fingerprint:
        raise CalibrationError(
            f"the profile is of another network (plan {profile.plan[:12]}, this one is "
            f"{session.plan.fingerprint[:12]}): profile this bundle"
        )
    if profile.runtime.get("name") != runtime:
        raise CalibrationError(
            f"the profile was measured on runtime '{profile.runtime.get('name')}', the session runs on '{runtime}': "
            "profile on this runtime"
        )


def labels_if_any(data: Dataset, classes: int, *, needed: bool) -> NDArray[np.int64] | None:
    """The labels, checked by :func:`usable_labels`; ``None`` where there are none and none are needed."""
    return usable_labels(data, classes) if needed or data.labels is not None else None


def usable_labels(data: Dataset, classes: int) -> NDArray[np.int64]:
    """The labels, when a choice can be made from them."""
    labels = data.labels
    if labels is None:
        raise CalibrationError(f"{data.source}: has no labels; calibration needs one class index per sample")
    if len(labels) < 2:
        raise CalibrationError(f"{data.source}: one sample is too few to choose thresholds; give a few hundred or more")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise CalibrationError(
            f"{data.source}: label {labels[wrong[0]]} of sample {wrong[0]} is outside 0 to {classes - 1}, "
            "the classes of the network"
        )
    if (labels == labels[0]).all():
        raise CalibrationError(
            f"{data.source}: every sample is of class {labels[0]}; give samples of all classes, as they occur in use"
        )
    return labels


def _require_finite(array: NDArray[Any], start: int, what: str, problem: str) -> None:
    """Names the first sample (rows of ``array``, counted from ``start``) that holds NaN or infinity."""
    bad = np.flatnonzero(~finite_rows(array))
    if len(bad):
        raise CalibrationError(f"{what} {start + int(bad[0])} {problem}")


def scores_of(logits: NDArray[np.float32], name: str, temperatures: Sequence[float]) -> NDArray[np.float32]:
    """``(exits - 1, samples)`` scores of every exit but the last."""
    scores = np.empty(logits.shape[:2], dtype=np.float32)
    for row, each, temperature in zip(scores, logits, temperatures, strict=False):  # the last exit's is not needed
        row[:] = score(each, name=name, temperature=temperature)
    return scores


def run_policy(session: Session, data: Dataset, progress: Progress) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Class and exit of each sample, as the session decides."""
    classes: list[NDArray[np.int64]] = []
    exits: list[NDArray[np.int64]] = []
    done = 0
    for inputs in data.batches(BATCH_ROWS):
        result = session.run(inputs)
        classes.append(result.logits.argmax(axis=1))
        exits.append(result.exit)
        done += len(result.exit)
        progress("run the policy", done, len(data))
    return np.concatenate(classes), np.concatenate(exits)


def _outcome(
    collected: Collected, right: NDArray[np.bool_], taken: NDArray[np.int64], *, allowed: int
) -> dict[str, Any]:
    """Accuracy and exit shares of the policy as it ran."""
    every = collected.right
    samples, exits = len(right), len(every)
    counts = np.bincount(taken, minlength=exits)
    lost = int(every[-1].sum()) - int(right.sum())
    return {
        "accuracy_last": int(every[-1].sum()) / samples,
        "accuracy": int(right.sum()) / samples,
        "drop": lost / samples,
        "within_max_drop": lost <= allowed,
        "exit_accuracy": [int(row.sum()) / samples for row in every],
        "exit_shares": [int(count) / samples for count in counts],
    }


def _cost_outcome(costs: Sequence[float], taken: NDArray[np.int64], unit: str) -> dict[str, Any]:
    expected = float(np.asarray(costs)[taken].mean())
    return {
        "cost_unit": unit,
        "exit_costs": list(costs),
        "expected_cost": expected,
        "cost_of_last_exit": costs[-1],
    }


def confidence_of(
    logits: NDArray[np.float32], labels: NDArray[np.int64], temperatures: Sequence[float]
) -> dict[str, Any]:
    """ECE and NLL of every exit, as it is and with its temperature."""
    pairs = list(zip(logits, temperatures, strict=True))
    return {
        "ece_before": [expected_calibration_error(each, labels) for each in logits],
        "ece": [expected_calibration_error(each, labels, temperature=value) for each, value in pairs],
        "nll_before": [negative_log_likelihood(each, labels) for each in logits],
        "nll": [negative_log_likelihood(each, labels, temperature=value) for each, value in pairs],
    }


def provenance_of(
    session: Session,
    data: Dataset,
    *,
    settings: dict[str, Any],
    results: dict[str, Any],
    method: str = METHOD,
    guarantee: str | None = None,
) -> Provenance:
    """Where a policy comes from: network, artifacts, runtime, data, versions and time."""
    bundle = session.bundle
    return Provenance(
        method=method,
        guarantee=guarantee,
        plan=session.plan.fingerprint,
        artifacts=bundle.artifact_digests(session.target) if bundle is not None else {},
        runtime=runtime_name(session),
        data=data.source,
        data_sha256=data.sha256,
        samples=len(data),
        settings=settings,
        results=results,
        versions={name: _version(name) for name in ("edgekit", "numpy")},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def runtime_name(session: Session) -> str:
    """Name and version of a session's runtime; that its results are not real, where they are scripted."""
    runtime = session.runtime.describe()
    scripted = " (scripted: its results are not real)" if runtime.get("scripted") else ""
    return f"{runtime.get('name', session.runtime.name)} {runtime.get('version', '')}".strip() + scripted


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed as a package"
