"""The parity report: how far runtimes lie apart on one network. Found by ``parity``, shown by ``report``.

Documented in docs/parity.md. History of :data:`PARITY_SCHEMA`:

1. first form: stages on the same inputs, logits of every exit, decisions at policies and at gates, a budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgekit.certificate import to_mapping
from edgekit.environment import Environment
from edgekit.errors import MeasurementError

__all__ = [
    "PARITY_SCHEMA",
    "Budget",
    "Count",
    "ExitParity",
    "Flip",
    "GateFlip",
    "GatesParity",
    "Parity",
    "PolicyParity",
    "RunParity",
    "Spread",
    "StageParity",
    "TensorParity",
]

PARITY_SCHEMA = 1
ROUNDING = 1e-9
"""Of a share of a count, which must not round up for it."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How far the values of one tensor lie apart in two runtimes.

    Attributes:
        scale: largest magnitude among the reference's finite values.
        largest: absolute difference, where both are finite.
        median: of the absolute differences; of evenly spaced ones where a tensor has very many.
        p99: their 99th percentile, likewise.
        elements: that both have finite.
        unlike: elements that are NaN or infinite in one runtime and something else in the other.
    """

    scale: float
    largest: float
    median: float
    p99: float
    elements: int
    unlike: int = 0

    @property
    def relative(self) -> float | None:
        """Largest difference by the scale; ``None`` where the reference is zero throughout and the other is not."""
        if self.largest == 0:
            return 0.0
        return self.largest / self.scale if self.scale > 0 else None

    @property
    def order(self) -> tuple[bool, float]:
        """Sorts by how bad it is: what is finite in one only first, then by the relative difference."""
        return self.unlike > 0, float("inf") if self.relative is None else self.relative


class TensorParity(msgspec.Struct, frozen=True, kw_only=True):
    """An output of a stage, both runtimes given the reference's inputs."""

    name: str
    spread: Spread


class StageParity(msgspec.Struct, frozen=True, kw_only=True):
    """A stage, both runtimes given the reference's inputs, so that differences of earlier stages do not add up.

    Attributes:
        name: of the stage.
        rows: samples that came to it.
        tensors: its outputs.
    """

    name: str
    rows: int
    tensors: tuple[TensorParity, ...]

    @property
    def worst(self) -> TensorParity:
        """The output that differs most, relative to its scale."""
        return max(self.tensors, key=lambda each: each.spread.order)


class ExitParity(msgspec.Struct, frozen=True, kw_only=True):
    """An exit that every sample runs to, from the network's input on.

    Attributes:
        name: of the exit.
        spread: of its logits.
        answers_changed: samples for which another class is largest.
        accuracy_reference: of the reference here; ``None`` without labels.
        accuracy: of the other runtime, likewise.
    """

    name: str
    spread: Spread
    answers_changed: int
    accuracy_reference: float | None
    accuracy: float | None


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """Decisions at one exit or gate.

    Attributes:
        name: of the exit or gate.
        compared: samples that came to it in both runtimes.
        agreed: those among them that both decided alike.
    """

    name: str
    compared: int
    agreed: int

    @property
    def agreement(self) -> float | None:
        """Agreed of compared; ``None`` when none came."""
        return self.agreed / self.compared if self.compared else None


class Flip(msgspec.Struct, frozen=True, kw_only=True):
    """A sample that leaves elsewhere than with the reference.

    Attributes:
        sample: its place in the data.
        reference_exit: exit that it takes with the reference.
        exit: with the other runtime.
        at: exit at which only one of the two let it leave: the earlier one.
        threshold: there.
        reference_score: there; ``None`` where it is NaN.
        score: of the other runtime there, likewise.
        margin: ``|reference_score - threshold|``; ``None`` where there is no score.
        answer_changed: whether another class is largest where it left.
        cost: 1 where the reference was right and the other runtime is not, -1 for the reverse, 0 otherwise; ``None``
            without labels.
        after_gate: first gate on the way that already decided otherwise; the margin then explains nothing.
    """

    sample: int
    reference_exit: str
    exit: str
    at: str
    threshold: float
    reference_score: float | None
    score: float | None
    margin: float | None
    answer_changed: bool
    cost: int | None
    after_gate: str | None = None


class PolicyParity(msgspec.Struct, frozen=True, kw_only=True):
    """Decisions of both runtimes with one policy.

    Attributes:
        policy: its name.
        score: what decides.
        comparator: which way a tie goes.
        thresholds: one per exit but the last; infinity never leaves.
        constants: of gates, where they are not as trained.
        samples: how many ran.
        exits: that decide, in order.
        flips: samples that take another exit.
        answers_changed: samples that get another answer, flipped or not.
        accuracy_reference: of the reference with the policy; ``None`` without labels.
        accuracy: of the other runtime, likewise.
    """

    policy: str
    score: str
    comparator: str
    thresholds: tuple[float, ...]
    constants: dict[str, float] = {}
    samples: int
    exits: tuple[Count, ...]
    flips: tuple[Flip, ...]
    answers_changed: int
    accuracy_reference: float | None
    accuracy: float | None

    @property
    def agreement(self) -> float:
        """Share of the samples that take the same exit."""
        return 1 - len(self.flips) / self.samples

    @property
    def flip_cost(self) -> float | None:
        """Accuracy that the flips alone cost, a share of all samples; negative when they win some."""
        return _cost(self.flips, self.samples)


class GateFlip(msgspec.Struct, frozen=True, kw_only=True):
    """A sample that takes another way through a gate than with the reference: the first one where it does.

    Attributes:
        sample: its place in the data.
        gate: name.
        reference_open: whether the reference found it open.
        later: gates after it that were decided otherwise, too.
        answer_changed: whether another class is largest at the last exit.
        cost: as for :class:`Flip`.
    """

    sample: int
    gate: str
    reference_open: bool
    later: int
    answer_changed: bool
    cost: int | None


class GatesParity(msgspec.Struct, frozen=True, kw_only=True):
    """Decisions at gates, every sample alone and run to the last exit.

    Attributes:
        constants: that gates compare scores with, where they are not as trained.
        samples: how many ran.
        gates: every one, in order.
        flips: samples that take another way.
    """

    constants: dict[str, float]
    samples: int
    gates: tuple[Count, ...]
    flips: tuple[GateFlip, ...]

    @property
    def agreement(self) -> float:
        """Share of the samples that take the same way through every gate."""
        return 1 - len(self.flips) / self.samples

    @property
    def flip_cost(self) -> float | None:
        """As of :class:`PolicyParity`."""
        return _cost(self.flips, self.samples)


class RunParity(msgspec.Struct, frozen=True, kw_only=True):
    """One runtime held against the reference.

    Attributes:
        label: what it was called, as ``"litert"`` or ``"onnxruntime:int8"``.
        runtime: what :meth:`edgekit.interfaces.Runtime.describe` says.
        artifacts: name of the bundle's set of artifacts that ran.
        exits: in order.
        stages: that ran, in order.
        policies: that decisions were compared at.
        gates: decisions at gates, for each setting of their constants; empty where the network has none.
    """

    label: str
    runtime: dict[str, Any]
    artifacts: str
    exits: tuple[ExitParity, ...]
    stages: tuple[StageParity, ...]
    policies: tuple[PolicyParity, ...]
    gates: tuple[GatesParity, ...] = ()

    @property
    def settings(self) -> tuple[PolicyParity | GatesParity, ...]:
        """What every sample was decided about with: the policies, and the settings of the gates."""
        return (*self.policies, *self.gates)

    @property
    def decisions(self) -> int:
        """Samples that were decided about: each once for every setting."""
        return sum(each.samples for each in self.settings)

    @property
    def flips(self) -> int:
        """Those decided otherwise than with the reference."""
        return sum(len(each.flips) for each in self.settings)

    @property
    def agreement(self) -> float | None:
        """Share decided alike; ``None`` where nothing is decided."""
        return 1 - self.flips / self.decisions if self.decisions else None


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What may differ. ``None`` does not judge.

    Attributes:
        flips: how many decisions.
        flip_share: how many, as a share of all, rounded up to whole ones.
        difference: largest of an exit's logits, relative to their scale.
        margin: how far a flipped sample's score may lie from the threshold.
    """

    flips: int | None = None
    flip_share: float | None = 2e-4
    difference: float | None = 1e-4
    margin: float | None = 1e-4

    def exceeded(self, run: RunParity, reference: str) -> Iterator[str]:
        """A sentence for everything in which a runtime differs from the reference by more."""
        of_all = f"{run.label}: {run.flips} of {run.decisions} decisions differ from {reference}"
        if self.flips is not None and run.flips > self.flips:
            yield f"{of_all} (allowed {self.flips})"
        if self.flip_share is not None and run.flips > math.ceil(self.flip_share * run.decisions - ROUNDING):
            yield f"{of_all} ({100 * run.flips / run.decisions:.3g} %, allowed {100 * self.flip_share:.3g} %)"
        if self.difference is not None:
            yield from (each for step in run.exits for each in _too_far(step, run.label, reference, self.difference))
        if self.margin is not None:
            yield from _beyond(run, self.margin)


def _too_far(step: ExitParity, label: str, reference: str, allowed: float) -> Iterator[str]:
    spread = step.spread
    if spread.unlike:
        yield (
            f"{label}: logits of exit '{step.name}' are NaN or infinite where those of {reference} are not, or the "
            f"reverse ({spread.unlike} of them)"
        )
    if spread.largest > allowed * spread.scale:
        share = "which is zero" if spread.relative is None else f"{spread.relative:.3g} of their scale"
        yield f"{label}: logits of exit '{step.name}' differ from {reference} by {share} (allowed {allowed:g})"


def _beyond(run: RunParity, allowed: float) -> Iterator[str]:
    """Flips that rounding does not explain. Those behind a gate that flipped are explained by the gate."""
    judged = [(each.policy, flip) for each in run.policies for flip in each.flips if flip.after_gate is None]
    far = [(policy, flip) for policy, flip in judged if flip.margin is None or flip.margin > allowed]
    if far:
        policy, worst = max(far, key=lambda pair: math.inf if pair[1].margin is None else pair[1].margin)
        lies = "has no score" if worst.margin is None else f"lies {worst.margin:.3g} from it"
        yield (
            f"{run.label}: {len(far)} of {len(judged)} flips at exits are farther than {allowed:g} from the threshold: "
            f"sample {worst.sample} {lies} at exit '{worst.at}' with policy '{policy}'"
        )


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """Runtimes held against a reference, on one network and the same samples.

    Attributes:
        schema: :data:`PARITY_SCHEMA` when written.
        created: UTC, ISO 8601.
        network: name of the bundle.
        plan: fingerprint of its plan.
        data: source of the samples.
        data_sha256: digest of those that ran.
        samples: how many ran.
        of_samples: how many the data has.
        recorded: how many of them the stages were compared on.
        labelled: whether accuracies are known.
        reference: label of the reference.
        reference_runtime: what it says of itself.
        runs: every other runtime.
        budget: what may differ.
        exceeded: a sentence for everything that differs by more; empty is what a build hopes for.
        notes: what was not compared, and why.
        environment: the machine.
    """

    schema: int = PARITY_SCHEMA
    created: str
    network: str
    plan: str
    data: str
    data_sha256: str
    samples: int
    of_samples: int
    recorded: int
    labelled: bool
    reference: str
    reference_runtime: dict[str, Any]
    runs: tuple[RunParity, ...]
    budget: Budget
    exceeded: tuple[str, ...]
    notes: tuple[str, ...] = ()
    environment: Environment

    def to_mapping(self) -> dict[str, Any]:
        """As JSON can say it, which has no number for infinity: ``"inf"`` and ``"-inf"`` are strings."""
        mapping: dict[str, Any] = to_mapping(self)
        return mapping

    def to_json(self) -> str:
        """As it is written."""
        return msgspec.json.format(msgspec.json.encode(self.to_mapping()), indent=1).decode()

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Parity:
        """What :meth:`to_mapping` gave.

        Raises:
            MeasurementError: it is something else, or of a newer schema.
        """
        schema = mapping.get("schema")
        if isinstance(schema, int) and schema > PARITY_SCHEMA:
            raise MeasurementError(f"parity schema {schema} is newer than this edgekit knows; upgrade it")
        try:
            return msgspec.convert(mapping, cls, strict=False)
        except msgspec.ValidationError as error:
            raise MeasurementError(f"not a parity report ({error})") from error

    @classmethod
    def load(cls, path: str | Path) -> Parity:
        """Read what ``edgekit parity -o`` wrote.

        Raises:
            MeasurementError: the file is missing, damaged, or of a newer schema.
        """
        try:
            return cls.from_mapping(msgspec.json.decode(Path(path).read_bytes(), type=dict[str, Any]))
        except OSError as error:
            raise MeasurementError(f"{path}: cannot be read ({error.strerror})") from error
        except (msgspec.DecodeError, MeasurementError) as error:
            raise MeasurementError(f"{path}: {error}") from error


def _cost(flips: tuple[Flip, ...] | tuple[GateFlip, ...], samples: int) -> float | None:
    costs = [flip.cost for flip in flips]
    known = [cost for cost in costs if cost is not None]
    return sum(known) / samples if len(known) == len(costs) else None
