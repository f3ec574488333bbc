"""What a trade-off says to people: the promise in words, its choices for other targets, its policies, exits and scores.

Terminal and page show it. A figure that is not known says so with its reason; it is never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edgekit.certificate import Certificate, Point, Tradeoff
from edgekit.policy import Policy
from edgekit.report.facts import Fact
from edgekit.report.formats import NONE, Unit, energy_unit, fixed, in_unit, moment, percent, time_unit

__all__ = ["ACCEPTED", "FAILED", "TESTED", "UNAVAILABLE", "UNTESTED", "Choice", "Cost", "Reading", "epsilon_text"]

UNAVAILABLE = "unavailable"
ACCEPTED, FAILED, UNTESTED = "tested and accepted", "tested and failed", "not tested"
TESTED = "tested"
"""Where the level of the test is not known."""

NO_LABELS = "the samples have no labels"
ONE_KIND = "the answers there are all right or all wrong, or were not looked at"
_MACS = (Unit(1e9, "G"), Unit(1e6, "M"), Unit(1e3, "k"), Unit(1.0, ""))
_PROMISES = {
    "gap": "loses at most {} of accuracy against the last exit",
    "consistency": "answers at most {} of inputs otherwise than the last exit does",
    "brier": "loses at most {} of Brier score against the last exit",
}
_LOSSES = {
    "gap": "accuracy lost against the last exit",
    "consistency": "answers that differ from the last exit's",
    "brier": "Brier score lost against the last exit",
}
_NEAR = 1e-9
"""Targets nearer to each other than this are one."""


def finite(value: float | None) -> float | None:
    """The value, where it is a number."""
    return value if value is not None and math.isfinite(value) else None


def epsilon_text(epsilon: float) -> str:
    """A target as short as it can be told: ``2 %``, ``0.25 %``."""
    return f"{100 * epsilon:.4g} %"


def bound_text(value: float | None, *, nothing: str = NONE) -> str:
    """A threshold, or a gate's constant; ``nothing`` where there is none."""
    if value is None or math.isnan(value):
        return nothing
    return f"{value:.4g}" if math.isfinite(value) else "never" if value > 0 else "always"


def signed(share: float) -> str:
    """``-0.37`` is ``−37 %``."""
    whole = round(100 * share)
    return f"{whole:+d} %".replace("-", "−") if whole else "0 %"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A kind of cost: how it reads, and why it may be missing.

    Attributes:
        name: ``"latency"``, ``"energy"`` or ``"macs"``.
        title: for headings.
        field: of :class:`~edgekit.certificate.Point`.
        unit: that suits every policy of the path.
        reason: why it is missing, where it is.
    """

    name: str
    title: str
    field: str
    unit: Unit
    reason: str

    @property
    def heading(self) -> str:
        """``latency [ms]``."""
        return f"{self.title} [{self.unit.symbol}]" if self.unit.symbol else self.title

    def of(self, point: Point) -> float | None:
        """Mean for a sample, in SI units."""
        return finite(getattr(point, self.field))

    def text(self, value: float | None) -> str:
        """With its unit."""
        return UNAVAILABLE if value is None else f"{fixed(value, self.unit)} {self.unit.symbol}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """From this target on, the policy at this place of the path.

    Attributes:
        epsilon: target.
        place: of the policy.
        asked: it is the target asked for beforehand.
    """

    epsilon: float
    place: int
    asked: bool = False


@dataclass(frozen=True)
class Reading:
    """A trade-off, what was promised of its choice (``None``: nothing was), and the policy that was saved."""

    tradeoff: Tradeoff
    certificate: Certificate | None
    policy: Policy

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What was asked for."""
        return self.policy.provenance.settings if self.policy.provenance is not None else {}

    @property
    def certified(self) -> bool:
        """Whether something is promised about other data."""
        return self.certificate is not None and self.certificate.valid

    @property
    def gains(self) -> bool:
        """Whether what is promised is more than that nothing changes."""
        return self.certified and self.tradeoff.chosen > 0

    @property
    def chosen(self) -> Point:
        """The policy's point."""
        return self.tradeoff.points[self.tradeoff.chosen]

    @property
    def never(self) -> Point:
        """The path's first point: nobody leaves early, and gates are as trained."""
        return self.tradeoff.points[0]

    @property
    def never_name(self) -> str:
        """What the first point is called; with one exit there is nothing to leave."""
        return "never-exit" if len(self.tradeoff.exits) > 1 else "gates as trained"

    @cached_property
    def asked(self) -> float | None:
        """The target that was asked for beforehand."""
        return self.certificate.epsilon if self.certificate is not None else self._setting("epsilon", "max_drop")

    @cached_property
    def delta(self) -> float | None:
        """Probability with which a test may be wrong."""
        return self.certificate.delta if self.certificate is not None else self._setting("delta")

    def _setting(self, *names: str) -> float | None:
        found = (self.settings.get(name) for name in names)
        return next((float(value) for value in found if isinstance(value, int | float)), None)

    @cached_property
    def loss(self) -> str:
        """Name of the loss."""
        return self.certificate.loss if self.certificate is not None else str(self.settings.get("loss", ""))

    @property
    def loss_words(self) -> str:
        """What the loss is."""
        return _LOSSES.get(self.loss, f"loss '{self.loss}'" if self.loss else "its kind is not recorded")

    @cached_property
    def costs(self) -> tuple[Cost, ...]:
        """Latency, energy and MACs, known or not."""
        points = self.tradeoff.points
        most = max((finite(point.macs) or 0.0 for point in points), default=0.0)
        macs = next((unit for unit in _MACS if most >= unit.scale), _MACS[-1])
        return (
            Cost(
                name="latency",
                title="latency",
                field="latency_s",
                unit=time_unit(finite(point.latency_s) for point in points),
                reason="no profile gave the latency of the exits",
            ),
            Cost(
                name="energy",
                title="energy",
                field="energy_j",
                unit=energy_unit(finite(point.energy_j) for point in points),
                reason="no profile gave the energy of the exits",
            ),
            Cost(name="macs", title="MACs", field="macs", unit=macs, reason="multiply-accumulates are not counted"),
        )

    @cached_property
    def known_costs(self) -> tuple[Cost, ...]:
        """Those that some policy has, the one that was minimised first."""
        known = [cost for cost in self.costs if any(cost.of(point) is not None for point in self.tradeoff.points)]
        return tuple(sorted(known, key=lambda cost: cost.name != self.tradeoff.cost))

    @property
    def agreement(self) -> bool:
        """Whether agreement with the last exit stands in for an accuracy that is not known."""
        return self.loss == "consistency" and all(finite(point.accuracy) is None for point in self.tradeoff.points)

    @property
    def answers_title(self) -> str:
        """What :meth:`answers` is."""
        return "agreement" if self.agreement else "accuracy"

    def answers(self, point: Point) -> float | None:
        """Accuracy; without labels the agreement with the last exit, where the loss tells it."""
        return 1 - point.loss if self.agreement else finite(point.accuracy)

    def change(self, cost: Cost, point: Point) -> str:
        """``−37 %``: held against the path's first point."""
        value, full = cost.of(point), cost.of(self.never)
        return NONE if value is None or not full else signed(value / full - 1)

    def early(self, point: Point) -> float:
        """Share of samples that leave before the last exit."""
        return sum(point.shares[:-1])

    def band(self, point: Point) -> str:
        """``0.3 % to 1.9 %``."""
        return f"{percent(finite(point.low), digits=2)} to {percent(finite(point.high), digits=2)}"

    def status(self, place: int) -> str:
        """Whether the policy was tested for the target asked for, and how it fared."""
        p_value = self.tradeoff.points[place].p_value
        if p_value is None and place > 0:
            return UNTESTED
        if self.delta is None:
            return TESTED
        # The first policy's loss is 0 by definition: it needs no test.
        return ACCEPTED if place == 0 or p_value is None or p_value <= self.delta else FAILED

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """A target and its policy for each change of policy, rising; the target asked for is always among them."""
        asked = self.asked
        every = [
            Choice(epsilon=target.epsilon, place=target.place)
            for target in self.tradeoff.targets
            if asked is None or abs(target.epsilon - asked) > _NEAR
        ]
        if asked is not None:
            every.append(Choice(epsilon=asked, place=self.tradeoff.chosen, asked=True))
        found: list[Choice] = []
        for choice in sorted(every, key=lambda choice: choice.epsilon):
            if not found or choice.asked or choice.place != found[-1].place:
                found.append(choice)
        return tuple(found)

    def standing(self, choice: Choice) -> tuple[str, str]:
        """What may be relied on if this choice is used: a word or two, and a sentence."""
        target = epsilon_text(choice.epsilon)
        if self.certificate is None:
            return "no guarantee", "No guarantee: nothing is certified, neither this choice nor any other here."
        if not self.certificate.valid:
            return "no guarantee", "No guarantee: the certificate does not hold for the artifacts in the bundle."
        if choice.place == 0:
            return "loses nothing", f"Loses nothing: it is {self.never_name}, which the loss is counted against."
        if choice.asked:
            level = epsilon_text(1 - self.certificate.delta)
            return "certified", f"Certified: ε = {target} was asked for beforehand (with probability {level} or more)."
        return (
            "valid alone",
            f"Not certified: it would be, had ε = {target} been asked for beforehand. "
            "To use it, ask for it and test on samples not yet seen.",
        )

    @cached_property
    def headline(self) -> str:
        """What is promised about other data, in a sentence."""
        kept = "Nobody leaves early" if len(self.tradeoff.exits) > 1 else "The gates stay as trained"
        found = self.certificate
        if found is None:
            return "No guarantee: nothing is promised about other data."
        target = f"ε = {epsilon_text(found.epsilon)} and δ = {epsilon_text(found.delta)}"
        if not found.valid:
            return "No guarantee any more: this policy was put, by force, on artifacts that were not tested."
        if found.samples < found.needed:
            return (
                f"Too few samples: {found.samples} were there, and {found.needed} are needed before anything but "
                f"{self.never_name} can be certified at {target}. {kept}."
            )
        if self.tradeoff.chosen == 0:
            return f"{kept}: no cheaper policy was certified at {target}."
        return self.promise(found)

    def promise(self, certificate: Certificate) -> str:
        """The certificate as a sentence."""
        target = epsilon_text(certificate.epsilon)
        does = _PROMISES.get(certificate.loss, f"has a mean loss '{certificate.loss}' of at most {{}}").format(target)
        among = ", at every exit among those alone who left at or before it" if certificate.conditional else ""
        return (
            f"With probability {epsilon_text(1 - certificate.delta)} or more, over the drawing of the samples, policy "
            f"'{self.policy.name}' {does}{among}, on inputs like the {certificate.samples} that it was tested on."
        )

    @property
    def detail(self) -> str:
        """What belongs beside the headline; may be empty."""
        if self.certificate is None:
            return "The figures below are of the samples shown here alone; how others fare was not tested."
        if not self.certificate.valid:
            return f"Of the artifacts that were tested it was certified: {self.promise(self.certificate)}"
        return ""

    @property
    def targets_note(self) -> str:
        """How far the choices for other targets may be trusted."""
        if not self.certified or self.asked is None or self.certificate is None:
            return "None of these choices is certified; they show what each target would have chosen on these samples."
        target, level = epsilon_text(self.asked), epsilon_text(1 - self.certificate.delta)
        return (
            f"Only the choice for ε = {target}, asked for beforehand, "
            + (f"is certified, with probability {level} or more. " if self.gains else f"stands: {self.never_name}. ")
            + "Each other choice would hold alone, had its ε been the one asked for; they do not hold all together, "
            "and none may be picked because of what it shows here."
        )

    @property
    def missing(self) -> tuple[str, ...]:
        """Why figures are missing, a line each."""
        found = [f"{cost.title} unavailable: {cost.reason}" for cost in self.costs if cost not in self.known_costs]
        if all(finite(point.accuracy) is None for point in self.tradeoff.points):
            found.insert(0, f"accuracy unavailable: {NO_LABELS}")
        if self.tradeoff.ece is None:
            found.append(f"ECE unavailable: {NO_LABELS}")
        if len(self.tradeoff.exits) > 1 and None in self._aurocs(self.tradeoff.auroc)[:-1]:
            found.append(f"AUROC unavailable for some exits: {ONE_KIND}")
        return tuple(found)

    @property
    def auroc_words(self) -> str:
        """What the score of an exit is to tell apart."""
        if self.tradeoff.ece is None:
            return "the last exit's answers from others"
        return "right answers from wrong ones"

    def _aurocs(self, values: Sequence[float | None]) -> tuple[float | None, ...]:
        early = len(self.tradeoff.exits) - 1
        return (*map(finite, values[:early]), *[None] * (early - len(values[:early])), None)

    def exit_lines(self) -> tuple[tuple[str, ...], ...]:
        """Of each exit: name, threshold, share, accuracy of all samples there, ECE, AUROC."""
        exits, chosen = self.tradeoff.exits, self.chosen
        known = self.policy.provenance.results.get("exit_accuracy") if self.policy.provenance is not None else None
        accuracies = known if isinstance(known, list | tuple) and len(known) == len(exits) else [None] * len(exits)
        if accuracies[-1] is None and self.never.accuracy is not None and not self.never.constants:
            accuracies = [*accuracies[:-1], self.never.accuracy]
        eces = self.tradeoff.ece or (None,) * len(exits)
        rows = zip(exits, chosen.shares, accuracies, eces, self._aurocs(self.tradeoff.auroc), strict=True)
        return tuple(
            (
                name,
                "accepts all" if place == len(exits) - 1 else bound_text(chosen.thresholds[place]),
                percent(share),
                UNAVAILABLE if finite(accuracy) is None else percent(accuracy),
                UNAVAILABLE if finite(ece) is None else f"{ece:.3f}",
                NONE if place == len(exits) - 1 else UNAVAILABLE if auroc is None else f"{auroc:.3f}",
            )
            for place, (name, share, accuracy, ece, auroc) in enumerate(rows)
        )

    def score_lines(self) -> tuple[tuple[str, ...], ...]:
        """Of each score, by target and cost: name, target, cost, AUROC of each exit but the last.

        Empty with one exit, which takes no score.
        """
        if len(self.tradeoff.exits) == 1:
            return ()
        ordered = sorted(self.tradeoff.scores, key=lambda each: (each.epsilon, each.cost))
        return tuple(
            (
                each.score,
                epsilon_text(each.epsilon),
                _cost_text(finite(each.cost), each.unit),
                *(NONE if value is None else f"{value:.3f}" for value in self._aurocs(each.auroc)[:-1]),
            )
            for each in ordered
        )

    @property
    def score_note(self) -> str:
        """What the score's cost is, and which score is the policy's."""
        return (
            "Mean cost of the cheapest policy with the score that a test at this ε would probably accept, on the "
            f"samples that the path was found on. The policy's own is {self.policy.score}."
        )

    def constants_of(self, point: Point) -> tuple[tuple[str, str], ...]:
        """Gates' constants, of all that any policy of the path changes."""
        names = dict.fromkeys(name for each in self.tradeoff.points for name in each.constants)
        return tuple((name, bound_text(point.constants.get(name), nothing="as trained")) for name in names)

    def certificate_facts(self) -> tuple[Fact, ...]:
        """The certificate, line by line; empty without one."""
        found = self.certificate
        if found is None:
            return ()
        origin = self.policy.provenance
        facts = [
            Fact("ε", f"{epsilon_text(found.epsilon)}: largest mean loss"),
            Fact("δ", f"{epsilon_text(found.delta)}: probability with which the promise may be broken"),
            Fact("loss", f"{found.loss}: {self.loss_words}" if found.loss in _LOSSES else found.loss),
            Fact("about", "those who left, at or before each exit" if found.conditional else "all inputs"),
            Fact("test", f"{found.test}, along the path until the first failure"),
            Fact("samples", f"{found.samples} tested; {found.needed} are the least with which anything can pass"),
            Fact("mean loss", percent(finite(found.mean_loss), digits=2)),
            Fact("p-value", NONE if finite(found.p_value) is None else f"{found.p_value:.3g}"),
            Fact("policies tested", f"{found.tested} of {len(self.tradeoff.points)}"),
            Fact("path", f"sha256 {found.path[:12]}, from {found.path_samples} other samples: {found.path_source}"),
            Fact("seed", str(found.seed)),
            Fact("precision", found.precision),
            Fact("device", found.device),
            Fact("valid", "yes" if found.valid else "no: the artifacts are not those that were tested"),
        ]
        if origin is not None:
            facts += [
                Fact("runtime", origin.runtime or NONE),
                Fact("data", f"{origin.data or NONE} (sha256 {origin.data_sha256[:12] or NONE})"),
                Fact("artifacts", f"{len(origin.artifacts)} by their sha256, in the policy's provenance"),
                Fact("made", moment(origin.created)),
            ]
        return tuple(facts)


def _cost_text(value: float | None, unit: str) -> str:
    if value is None:
        return UNAVAILABLE
    return in_unit(value, unit)
