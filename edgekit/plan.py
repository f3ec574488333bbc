"""A network as a program on stages: run one, leave if its exit accepts, run the next.

A plan is data: immutable, validated when made, written to and read from JSON by msgspec. It names tensors; where
they live is a runtime's business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec

from edgekit.errors import BundleError
from edgekit.tensors import BATCH, TensorSpec

__all__ = ["SCORES", "Exit", "Plan", "Run", "Stage"]

SCORES = ("max_prob", "margin", "neg_entropy")
"""Confidence scores that a stage can compute; each grows with confidence.

With ``p = softmax(logits / temperature)``: the largest ``p``; the largest minus the second largest; and
``sum(p * log p)``, in nats, at most 0. A NaN among the logits makes the score NaN.
"""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One static subgraph, lowered to one artifact per target.

    Attributes:
        name: unique; also the artifact's file name.
        module: path of the module that most of the stage's work came from, ``""`` when it has none.
        inputs: network inputs, tensors of earlier stages, and ``temperature`` tensors, in artifact order.
        outputs: tensors that later stages need, then those of the stage's exit.
        macs: multiply-accumulates for one sample; ``None`` when they could not be counted.
        weight_bytes: bytes of the weights and constants that it holds.
    """

    name: str
    module: str = ""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int | None
    weight_bytes: int


class Run(msgspec.Struct, frozen=True, tag_field="do", tag="run"):
    """Run a stage on the rows that are still in."""

    stage: str


class Exit(msgspec.Struct, frozen=True, kw_only=True, tag_field="do", tag="exit"):
    """Rows whose score passes leave with these logits. The last exit accepts all.

    Attributes:
        name: of the exit, as the model or the user named it.
        logits: tensor ``(batch, classes) float32``, or ``(1, classes)`` where the network takes one sample at a time.
        temperature: input tensor ``() float32`` that divides the logits before the score is taken.
        scores: tensor ``(batch,) float32`` of each score in :data:`SCORES`, by name.
        probabilities: the model returns ``softmax(logits)`` here; the stage stops before that softmax.
    """

    name: str
    logits: str
    temperature: str
    scores: dict[str, str]
    probabilities: bool = False


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs, tensors, stages and steps of one network.

    Attributes:
        inputs: the network's inputs.
        tensors: every tensor that crosses a stage boundary, temperatures and scores included, by name.
        stages: by name, in the order of their first run.
        steps: what is done, in order; ends with an :class:`Exit`.
    """

    inputs: tuple[TensorSpec, ...]
    tensors: dict[str, TensorSpec]
    stages: tuple[Stage, ...]
    steps: tuple[Run | Exit, ...]

    def __post_init__(self) -> None:
        problem = next(_problems(self), None)
        if problem is not None:
            raise BundleError(f"plan: {problem}")

    @property
    def exits(self) -> tuple[Exit, ...]:
        """The exits, in order."""
        return tuple(step for step in self.steps if isinstance(step, Exit))

    @property
    def classes(self) -> int:
        """Number of classes that the logits tell apart."""
        size = self.tensors[self.exits[-1].logits].shape[1]
        assert isinstance(size, int)
        return size

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def stages_before(self, exit_index: int) -> tuple[Stage, ...]:
        """Every stage that has run when exit number ``exit_index`` (from 0) decides."""
        position = self.steps.index(self.exits[exit_index])
        return tuple(self.stage(step.stage) for step in self.steps[:position] if isinstance(step, Run))

    def exit_macs(self) -> tuple[int | None, ...]:
        """MACs for one sample that leaves at each exit, heads passed on the way included."""
        totals: list[int | None] = []
        for index in range(len(self.exits)):
            counts = [stage.macs for stage in self.stages_before(index)]
            known = [count for count in counts if count is not None]
            totals.append(sum(known) if len(known) == len(counts) else None)
        return tuple(totals)

    @property
    def fingerprint(self) -> str:
        """Digest of the plan: which network, cut where. Weights are not part of it."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


def _problems(plan: Plan) -> Iterator[str]:
    """What makes a plan invalid, most basic first."""
    if not plan.steps or not isinstance(plan.steps[-1], Exit):
        yield "the last step must be an exit"
        return
    if not plan.inputs:
        yield "it has no inputs"
    for kind, names in (
        ("stage", [stage.name for stage in plan.stages]),
        ("exit", [step.name for step in plan.exits]),
        ("input", [spec.name for spec in plan.inputs]),
    ):
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            yield f"two {kind}s are called '{doubled[0]}'"
    for name, spec in plan.tensors.items():
        if spec.name != name:
            yield f"tensor '{name}' is listed with the specification of '{spec.name}'"
    stages = {stage.name: stage for stage in plan.stages}
    ready = {spec.name for spec in plan.inputs} | {step.temperature for step in plan.exits}
    unknown = sorted(ready - set(plan.tensors))
    if unknown:
        yield f"tensor '{unknown[0]}' has no specification"
        return
    for spec in plan.inputs:
        if plan.tensors[spec.name] != spec:
            yield f"input '{spec.name}' has two specifications"
    yield from _step_problems(plan, stages, ready)
    if {step.stage for step in plan.steps if isinstance(step, Run)} != set(stages):
        yield "a stage is never run"
    widths = {plan.tensors[step.logits].shape[1:] for step in plan.exits}
    if len(widths) > 1:
        yield f"exits tell different numbers of classes apart: {sorted(widths)}"


def _step_problems(plan: Plan, stages: dict[str, Stage], ready: set[str]) -> Iterator[str]:
    for step in plan.steps:
        if isinstance(step, Run):
            if step.stage not in stages:
                yield f"it runs stage '{step.stage}', which does not exist"
                continue
            stage = stages[step.stage]
            missing = [name for name in stage.inputs if name not in ready]
            if missing:
                yield f"stage '{stage.name}' needs '{missing[0]}' before anything has made it"
            untold = [name for name in stage.outputs if name not in plan.tensors]
            if untold:
                yield f"output '{untold[0]}' of stage '{stage.name}' has no specification"
            ready.update(stage.outputs)
        else:
            if set(step.scores) != set(SCORES):
                yield f"exit '{step.name}' must have the scores {', '.join(SCORES)}"
            missing = [name for name in (step.logits, *step.scores.values()) if name not in ready]
            if missing:
                yield f"exit '{step.name}' needs '{missing[0]}' before anything has made it"
            elif len(shape := plan.tensors[step.logits].shape) != 2 or shape[0] not in (BATCH, 1):
                yield f"logits of exit '{step.name}' must be (batch, classes)"
