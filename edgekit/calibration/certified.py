"""Policies with a certificate: proposed on some samples, tested on others, the cheapest that passed is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.bands import interval
from edgekit.calibration.calibrate import (
    Minimize,
    confidence_of,
    labels_if_any,
    policy_back_on_failure,
    provenance_of,
    run_policy,
)
from edgekit.calibration.certify import (
    Also,
    Certification,
    Risk,
    Setting,
    certify,
    certify_settings,
    certify_strict,
    shuffled,
)
from edgekit.calibration.gathered import Gathered
from edgekit.calibration.losses import Loss
from edgekit.calibration.proposal import Scoring, find_loss, propose_on, was_seen
from edgekit.calibration.risk import require_confidence, require_share, smallest_sample
from edgekit.calibration.scorers import auroc
from edgekit.calibration.thresholds import exits_taken
from edgekit.certificate import AlsoKept, Certificate, Point, Proposal, Proposed, Target, Tradeoff
from edgekit.data import Dataset
from edgekit.environment import Environment
from edgekit.errors import CalibrationError
from edgekit.policy import Policy
from edgekit.progress import Progress, silent
from edgekit.records import Profile

if TYPE_CHECKING:
    from edgekit.session import Session

__all__ = ["METHOD", "calibrate_certified", "halves"]

METHOD = "certified: the cheapest policy that passed a fixed-sequence test along a path found on other samples"
LEAVERS = 100
"""Samples expected to leave at an exit or before it, below which a promise about them alone is not worth its test."""
BAND = 0.95
"""Confidence of each point's interval in the trade-off."""
TARGETS = (0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1)
"""Other epsilons that people are told about."""


def calibrate_certified(
    session: Session,
    data: Dataset,
    *,
    epsilon: float,
    delta: float,
    loss: str | Loss = "gap",
    score: str = "max_prob",
    conditional: bool = False,
    also: Sequence[tuple[str | Loss, float]] = (),
    proposal: Proposal | None = None,
    minimize: Minimize | None = None,
    profile: Profile | None = None,
    temperature: bool = True,
    name: str = "default",
    seed: int = 0,
    progress: Progress = silent,
) -> Policy:
    """The cheapest policy of a path that loses at most ``epsilon`` with probability ``1 - delta``; its certificate.

    Without a ``proposal`` half of ``data``, drawn by ``seed``, proposes the path and the other half tests it.

    **The session keeps the new policy.** It is run over ``data`` with it, and ``policy.provenance.results`` tells what
    came out. If anything fails, the session's earlier policy is put back.

    Args:
        session: open, on the runtime, device and artifacts that the certificate is for.
        data: samples like those of later use, that neither the network nor the proposal was made from.
        epsilon: largest mean loss, 0 to 1.
        delta: 0 to 1.
        loss: ``"gap"``, ``"consistency"`` (without labels), ``"brier"`` or the user's own.
        score: as in :func:`edgekit.calibration.proposal.propose`; a given proposal has its own.
        conditional: promise it of those who leave early alone.
        also: more losses, each with its largest mean, that the policy has to keep as well (over all inputs).
        proposal: of policies to test.
        minimize: ``"latency"``, ``"energy"`` or ``"macs"``.
        profile: of this network on this runtime.
        temperature: fit one per exit, where a path is proposed here.
        name: of the policy.
        seed: of the split and of the order of testing; chosen before the data are seen.
        progress: told what is being done.

    Raises:
        CalibrationError: the data or the options do not allow a choice; the message says which and what to do.
        InputError: the samples do not fit the network.
    """
    require_share("max_drop", epsilon)
    require_confidence(delta)
    found = find_loss(loss)
    others = [(find_loss(other), most) for other, most in also]
    for other, most in others:
        require_share(f"the largest mean of loss '{other.name}'", most)
    needed = any(each.needs_labels for each in (found, *(other for other, _ in others)))
    labels_if_any(data, session.plan.classes, needed=needed)
    if conditional and len(session.plan.exits) == 1:
        raise CalibrationError("the network has one exit: nobody leaves early, so there is nothing to promise of them")
    gathered = Gathered(session, data, minimize=minimize, profile=profile, progress=progress)
    split = proposal is None
    with policy_back_on_failure(session):
        if proposal is None:
            ours, rows = halves(len(data), seed)
            proposal = propose_on(
                gathered, ours, found, score=score, epsilon=epsilon, temperature=temperature, name=name, seed=seed
            )
        else:
            rows = np.arange(len(data))
            _require_other_samples(proposal, gathered, found, conditional=conditional)
        tested = _Tested(gathered, proposal, found, rows, delta=delta, seed=seed, conditional=conditional, also=others)
        certification = tested.certify(epsilon)
        chosen = tested.cheapest(certification)
        certificate = _certificate(
            certification, chosen, tested.proposal, session, found, conditional=conditional, also=others
        )
        proposal = tested.proposal
        tradeoff = tested.tradeoff(certification, chosen)
        policy = Policy(
            score=proposal.score,
            scorer=proposal.scorer,
            thresholds=proposal.policies[chosen].thresholds,
            temperatures=proposal.temperatures,
            constants=dict(proposal.policies[chosen].constants),
            name=name,
        )
        session.use(policy)
        classes, taken = run_policy(session, data, progress)
        results = {
            **_results(gathered, classes, taken, rows),
            "as_predicted": float((taken[rows] == tested.exits(chosen)).mean()),
            "warnings": _warnings(gathered, rows, tested.proposal if split else None),
            "cost_unit": gathered.unit,
            "exit_costs": list(gathered.costs({}, rows)),
            "expected_cost": tested.cost(chosen),
            "cost_of_last_exit": gathered.costs({}, rows)[-1],
        }
        if data.labels is not None:
            results |= confidence_of(gathered.logits({})[:, rows], data.labels[rows], proposal.temperatures)
        settings = {
            "max_drop": epsilon,
            "epsilon": epsilon,
            "confidence": 1 - delta,
            "loss": found.name,
            "conditional": conditional,
            "score": proposal.score,
            "minimize": gathered.quantity,
            "profile": profile.created if profile is not None and gathered.quantity != "macs" else None,
            "seed": seed,
        }
        provenance = provenance_of(
            session, data, settings=settings, results=results, method=METHOD, guarantee=_promise(certificate, len(data))
        )
        provenance = msgspec.structs.replace(provenance, certificate=certificate, tradeoff=tradeoff)
        policy = msgspec.structs.replace(policy, provenance=provenance)
        session.use(policy)
    return policy


def _require_other_samples(proposal: Proposal, gathered: Gathered, loss: Loss, *, conditional: bool) -> None:
    plan, data = gathered.session.plan, gathered.data
    if proposal.plan != plan.fingerprint:
        raise CalibrationError(f"proposal '{proposal.name}' is for another network: propose on this bundle")
    if proposal.loss != loss.name:
        raise CalibrationError(
            f"proposal '{proposal.name}' is ordered by loss '{proposal.loss}', not '{loss.name}': propose for this "
            "loss, or ask for that one"
        )
    if gathered.quantity != "macs" and any(policy.constants for policy in proposal.policies):
        raise CalibrationError(
            f"proposal '{proposal.name}' moves constants of gates, whose {gathered.quantity} was not measured: "
            f"minimize 'macs', or propose for {gathered.quantity}"
        )
    known = int(was_seen(proposal, data, np.arange(len(data))).sum())
    if known or proposal.data_sha256 == data.sha256:
        raise CalibrationError(
            f"{data.source}: proposal '{proposal.name}' was found on {known} of these very samples, which then cannot "
            "test it: give others"
        )
    if conditional and any(policy.constants for policy in proposal.policies):
        raise CalibrationError("a promise about those who leave early cannot be tested with other constants of gates")


def _testable(proposal: Proposal, samples: int, loss: Loss, *, delta: float) -> Proposal:
    """Without policies that let too few leave early for a test of those alone; told from the proposing samples."""
    least = smallest_sample(0.5, delta, loss.test)

    def early(policy: Proposed) -> bool:
        left = np.cumsum(policy.shares[:-1]) * samples
        used = np.asarray(policy.thresholds) < math.inf
        return bool((left[used] >= max(least, LEAVERS)).all())

    first, *others = proposal.policies
    return msgspec.structs.replace(proposal, policies=(first, *filter(early, others)))


def halves(samples: int, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Samples that propose and samples that test, where one set has to do both."""
    order = shuffled(samples, seed)
    return np.sort(order[: samples // 2]), np.sort(order[samples // 2 :])


class _Tested:
    """A path on the samples that test it."""

    def __init__(
        self,
        gathered: Gathered,
        proposal: Proposal,
        loss: Loss,
        rows: NDArray[np.intp],
        *,
        delta: float,
        seed: int,
        conditional: bool,
        also: Sequence[tuple[Loss, float]],
    ) -> None:
        self.gathered = gathered
        self.proposal = _testable(proposal, len(rows), loss, delta=delta) if conditional else proposal
        self.loss = loss
        self.rows = rows
        self.delta = delta
        self.seed = seed
        self.conditional = conditional
        self.also = [
            Also(risk=Risk(epsilon=most, test=other.test), losses=partial(self._losses, other)) for other, most in also
        ]
        self.scoring = Scoring(proposal.score, proposal.temperatures, proposal.scorer)
        self.constants = any(policy.constants for policy in proposal.policies)

    def scores(self, place: int) -> NDArray[np.float32]:
        return self.scoring(self.gathered.logits(self.proposal.policies[place].constants)[:, self.rows])

    def losses(self, place: int) -> NDArray[np.float64]:
        return self._losses(self.loss, place)

    def _losses(self, loss: Loss, place: int) -> NDArray[np.float64]:
        return self.gathered.losses(loss, self.proposal.policies[place].constants)[:, self.rows]

    def exits(self, place: int) -> NDArray[np.intp]:
        """The exit that each sample takes."""
        return exits_taken(self.scores(place), self.proposal.policies[place].thresholds)

    def loss_of(self, place: int) -> NDArray[np.float64]:
        """Each sample's loss under a policy."""
        return np.asarray(np.take_along_axis(self.losses(place), self.exits(place)[None], axis=0)[0])

    def cost(self, place: int) -> float:
        """Mean cost of a policy on these samples."""
        costs = np.asarray(self.gathered.costs(self.proposal.policies[place].constants, self.rows))
        return float(costs[self.exits(place)].mean())

    def certify(self, epsilon: float) -> Certification:
        path = [policy.thresholds for policy in self.proposal.policies]
        test, delta, seed = self.loss.test, self.delta, self.seed
        if self.constants:
            settings = [
                Setting(
                    thresholds=thresholds,
                    scores=lambda place=place: self.scores(place),  # type: ignore[misc]
                    losses=lambda place=place: self.losses(place),  # type: ignore[misc]
                )
                for place, thresholds in enumerate(path)
            ]
            return certify_settings(
                settings, samples=len(self.rows), epsilon=epsilon, delta=delta, test=test, seed=seed, also=self.also
            )
        tester = certify_strict if self.conditional else certify
        return tester(
            self.scores(0), self.losses(0), path, epsilon=epsilon, delta=delta, test=test, seed=seed, also=self.also
        )

    def cheapest(self, certification: Certification) -> int:
        """Place of the accepted policy of least mean cost here; of equal ones the safest."""
        return min((self.cost(each.place), each.place) for each in certification.accepted)[1]

    def tradeoff(self, certification: Certification, chosen: int) -> Tradeoff:
        gathered, labels = self.gathered, self.gathered.data.labels
        tested = [*certification.accepted, *([certification.failed] if certification.failed is not None else [])]
        p_values = {each.place: each.p_value for each in tested}
        points = [self._point(place, p_values.get(place)) for place in range(len(self.proposal.policies))]
        logits = gathered.logits({})[:, self.rows]
        truth = logits[-1].argmax(axis=1) if labels is None else labels[self.rows]
        ranked = [auroc(row, each.argmax(axis=1) == truth) for row, each in zip(self.scores(0), logits, strict=False)]
        known = None
        if labels is not None:
            known = tuple(confidence_of(logits, labels[self.rows], self.proposal.temperatures)["ece"])
        targets = sorted({*TARGETS, certification.epsilon})
        return Tradeoff(
            exits=tuple(step.name for step in gathered.session.plan.exits),
            points=tuple(points),
            chosen=chosen,
            confidence=BAND,
            targets=tuple(Target(epsilon=each, place=self.cheapest(self.certify(each))) for each in targets),
            cost=gathered.quantity,
            cost_source=self._cost_source(),
            scores=self.proposal.scores,
            ece=known,
            auroc=tuple(None if math.isnan(value) else value for value in ranked),
        )

    def _point(self, place: int, tested: float | None) -> Point:
        policy, gathered = self.proposal.policies[place], self.gathered
        losses, taken = self.loss_of(place), self.exits(place)
        low, high = interval(losses, self.loss, BAND)
        logits = gathered.logits(policy.constants)[:, self.rows]
        labels = gathered.data.labels
        classes = logits.argmax(axis=2)[taken, np.arange(len(taken))]
        macs = gathered.macs(policy.constants, self.rows)
        latency, energy = self._profiled(policy.constants)
        return Point(
            thresholds=policy.thresholds,
            constants=policy.constants,
            shares=tuple((np.bincount(taken, minlength=len(logits)) / len(taken)).tolist()),
            loss=float(losses.mean()),
            low=low,
            high=high,
            p_value=tested,
            accuracy=None if labels is None else float((classes == labels[self.rows]).mean()),
            macs=None if macs is None else float(np.asarray(macs)[taken].mean()),
            latency_s=None if latency is None else float(np.asarray(latency)[taken].mean()),
            energy_j=None if energy is None else float(np.asarray(energy)[taken].mean()),
        )

    def _profiled(self, constants: dict[str, float]) -> tuple[list[float] | None, list[float] | None]:
        """Mean latency and energy of each exit, where a profile has them for these constants."""
        profile = self.gathered.profile
        if profile is None or constants:
            return None, None
        joules = [each.energy.gross_j for each in profile.exits]
        known = [value for value in joules if value is not None]
        return [each.latency.mean_s for each in profile.exits], known if len(known) == len(joules) else None

    def _cost_source(self) -> str:
        profile = self.gathered.profile
        if self.gathered.quantity == "macs" or profile is None:
            return "multiply-accumulates of what runs; latency and energy were not measured"
        return f"profile of {profile.created}"


def _certificate(
    certification: Certification,
    chosen: int,
    proposal: Proposal,
    session: Session,
    loss: Loss,
    *,
    conditional: bool,
    also: Sequence[tuple[Loss, float]],
) -> Certificate:
    verdict = next(each for each in certification.accepted if each.place == chosen)
    plan = session.plan
    dtypes = sorted({plan.tensors[step.logits].dtype for step in plan.exits} | {spec.dtype for spec in plan.inputs})
    return Certificate(
        epsilon=certification.epsilon,
        delta=certification.delta,
        loss=loss.name,
        conditional=conditional,
        test=certification.test,
        samples=certification.samples,
        needed=certification.needed,
        mean_loss=max(verdict.losses[: len(verdict.losses) - len(also)]),
        p_value=verdict.p_value,
        tested=len(certification.accepted) - 1 + (certification.failed is not None),
        path=proposal.digest,
        path_samples=proposal.samples,
        path_source=proposal.source,
        seed=certification.seed,
        precision=", ".join(dtypes),
        also=tuple(
            AlsoKept(loss=other.name, epsilon=most, test=other.test, mean_loss=mean, p_value=p)
            for (other, most), mean, p in zip(
                also,
                verdict.losses[len(verdict.losses) - len(also) :],
                verdict.p_values[len(verdict.p_values) - len(also) :],
                strict=True,
            )
        ),
        device=Environment.take(busy_over_s=0.0).processor or "unknown",
    )


def _promise(certificate: Certificate, given: int) -> str:
    sure = float(f"{1 - certificate.delta:.12f}")
    among = " among those who leave early, at or before each exit," if certificate.conditional else ""
    if certificate.samples < certificate.needed:
        return (
            f"nobody leaves early, so nothing is lost: {certificate.samples} samples are too few to certify more, "
            f"{certificate.needed} are needed"
            + ("" if given == certificate.samples else f" ({2 * certificate.needed} where half of them propose)")
        )
    return (
        f"with probability {sure!r} over the drawing of the {certificate.samples} tested samples, "
        f"the mean loss ({certificate.loss}) against the last exit{among} is at most {certificate.epsilon:g}"
        + "".join(f", and ({each.loss}) at most {each.epsilon:g}" for each in certificate.also)
        + " on inputs like them"
    )


def _results(
    gathered: Gathered, classes: NDArray[np.int64], taken: NDArray[np.int64], rows: NDArray[np.intp]
) -> dict[str, Any]:
    """What the policy did on the samples that tested it, as it ran."""
    labels, exits = gathered.data.labels, len(gathered.session.plan.exits)
    last = gathered.logits({})[-1].argmax(axis=1)
    results: dict[str, Any] = {
        "exit_shares": (np.bincount(taken[rows], minlength=exits) / len(rows)).tolist(),
        "agreement_with_last": float((classes == last)[rows].mean()),
        "samples_tested": len(rows),
    }
    if labels is not None:
        every = (gathered.logits({}).argmax(axis=2) == labels)[:, rows]
        right = (classes == labels)[rows]
        results |= {
            "accuracy": float(right.mean()),
            "accuracy_last": float(every[-1].mean()),
            "drop": float(every[-1].mean() - right.mean()),
            "exit_accuracy": every.mean(axis=1).tolist(),
        }
    return results


def _warnings(gathered: Gathered, rows: NDArray[np.intp], proposal: Proposal | None) -> list[str]:
    """What makes samples doubtful: a certificate is about independent draws of what comes in use.

    Args:
        gathered: what the network says about them.
        rows: that were tested.
        proposal: found on other samples of the same set.
    """
    told = []
    data = gathered.data
    if proposal is not None:
        both = int(was_seen(proposal, data, rows).sum())
        if both:
            told.append(
                f"{both} of {len(rows)} tested samples are among those that proposed the path: remove duplicates"
            )
    flat = gathered.logits({})[:, rows].transpose(1, 0, 2).reshape(len(rows), -1)
    alike = len(flat) - len(np.unique(flat, axis=0))
    if alike:
        told.append(
            f"{alike} of {len(rows)} tested samples gave the very answers of another one: duplicates make a "
            "certificate too confident"
        )
    if data.labels is not None:
        classes = gathered.session.plan.classes
        accuracy = float((gathered.logits({})[-1].argmax(axis=1) == data.labels)[rows].mean())
        guessing = 1 / classes
        if accuracy <= guessing + 4 * math.sqrt(guessing * (1 - guessing) / len(rows)):
            told.append(
                f"the last exit is right for {accuracy:.1%} of the samples, about what guessing gives: are the labels "
                "those of this network's classes?"
            )
    return told
