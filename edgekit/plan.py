"""A network as a program on stages: run one, leave if its exit accepts, run a part only where its gate is open.

A plan is data: immutable, validated when made, written to and read from JSON by msgspec. It names tensors; where
they live is a runtime's business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import msgspec

from edgekit.errors import BundleError
from edgekit.tensors import BATCH, TensorSpec

__all__ = ["SCORES", "ZERO", "Constant", "Exit", "Gate", "Plan", "Run", "Stage", "Step", "walk"]

SCORES = ("max_prob", "margin", "neg_entropy")
"""Confidence scores that a stage can compute; each grows with confidence.

With ``p = softmax(logits / temperature)``: the largest ``p``; the largest minus the second largest; and
``sum(p * log p)``, in nats, at most 0. A NaN among the logits makes the score NaN.
"""


ZERO = ""
"""Stands for a tensor of zeros among what a gate gives."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One static subgraph, lowered to one artifact per target.

    Attributes:
        name: unique; also the artifact's file name.
        module: path of the module that most of the stage's work came from, ``""`` when it has none.
        inputs: network inputs, tensors of earlier stages, and ``temperature`` tensors, in artifact order.
        outputs: tensors that later stages and gates need, then those of the stage's exit.
        macs: multiply-accumulates for one sample; ``None`` when they could not be counted.
        weight_bytes: bytes of the weights and constants that it holds.
        exit: whether it ends in an exit: its last outputs are the logits and one score of each kind.
        whole: samples of a batch need one another in it: a runtime must not split the batch.
    """

    name: str
    module: str = ""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int | None
    weight_bytes: int
    exit: bool = True
    whole: bool = False

    @property
    def live(self) -> tuple[str, ...]:
        """Outputs that later stages and gates need."""
        return self.outputs[: -1 - len(SCORES)] if self.exit else self.outputs

    @property
    def head(self) -> tuple[str, ...]:
        """Outputs of its exit: logits, then a score of each kind; empty when it ends in none."""
        return self.outputs[-1 - len(SCORES) :] if self.exit else ()


class Run(msgspec.Struct, frozen=True, tag_field="do", tag="run"):
    """Run a stage on the rows that are still in.

    Attributes:
        stage: its name.
        tensors: what its inputs and outputs are called in this run, where that is not as in the stage: equal stages,
            as an unrolled loop has, share one artifact and its weights.
    """

    stage: str
    tensors: dict[str, str] = {}

    def called(self, names: Iterable[str]) -> tuple[str, ...]:
        """Tensors of this run by their names in the stage."""
        return tuple(self.tensors.get(name, name) for name in names)


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


class Gate(msgspec.Struct, frozen=True, kw_only=True, tag_field="do", tag="gate"):
    """Rows whose value is not zero take one way, the others another; a NaN is not zero.

    Attributes:
        name: unique, after the module that it guards.
        value: tensor with one number for each row, of any shape with one element a row.
        steps: what rows run when the gate is open. Holds no exits.
        otherwise: what they run when it is closed; mostly nothing.
        outputs: what the gate gives, by name: the tensor that it is when open, and when closed. :data:`ZERO` stands
            for zeros; a tensor made before the gate is handed through.
        whole: samples need one another inside: a way that one row of a batch takes is run for all of them.
    """

    name: str
    value: str
    steps: tuple[Step, ...]
    otherwise: tuple[Step, ...] = ()
    outputs: dict[str, tuple[str, str]]
    whole: bool = False


class Constant(msgspec.Struct, frozen=True, kw_only=True):
    """A number that gates compare a score with. It is an input of their stages, so a policy may say another.

    Attributes:
        name: unique, that of the first of its gates.
        tensor: input tensor ``() float32``.
        comparison: ``score <comparison> constant``: one of ``>``, ``>=``, ``<``, ``<=``.
        value: as the network was trained.
        gates: names of the gates that it opens and closes.
    """

    name: str
    tensor: str
    comparison: str
    value: float
    gates: tuple[str, ...]


Step = Run | Exit | Gate


def walk(steps: Iterable[Step]) -> Iterator[Step]:
    """Every step in the order of its execution, those inside gates after the gate."""
    for step in steps:
        yield step
        if isinstance(step, Gate):
            yield from walk(step.steps)
            yield from walk(step.otherwise)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs, tensors, stages and steps of one network.

    Attributes:
        inputs: the network's inputs.
        tensors: every tensor that crosses a stage boundary, temperatures and scores included, by name.
        stages: by name, in the order of their first run.
        steps: what is done, in order; ends with an :class:`Exit`.
        constants: that gates compare scores with.
    """

    inputs: tuple[TensorSpec, ...]
    tensors: dict[str, TensorSpec]
    stages: tuple[Stage, ...]
    steps: tuple[Step, ...]
    constants: tuple[Constant, ...] = ()

    def __post_init__(self) -> None:
        problem = next(_problems(self), None)
        if problem is not None:
            raise BundleError(f"plan: {problem}")

    @property
    def exits(self) -> tuple[Exit, ...]:
        """The exits, in order."""
        return tuple(step for step in self.steps if isinstance(step, Exit))

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates, nested ones after the one that holds them."""
        return tuple(step for step in walk(self.steps) if isinstance(step, Gate))

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
        """Every stage that has run when exit number ``exit_index`` (from 0) decides, if every gate was open.

        One that runs several times is there as often.
        """
        position = self.steps.index(self.exits[exit_index])
        return tuple(self.stage(name) for name in _when_open(self.steps[:position]))

    def exit_macs(self) -> tuple[int | None, ...]:
        """MACs for one sample that leaves at each exit with every gate open, heads passed on the way included."""
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
        ("gate", [step.name for step in plan.gates]),
        ("input", [spec.name for spec in plan.inputs]),
        ("constant", [each.name for each in plan.constants]),
    ):
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            yield f"two {kind}s are called '{doubled[0]}'"
    for name, spec in plan.tensors.items():
        if spec.name != name:
            yield f"tensor '{name}' is listed with the specification of '{spec.name}'"
    stages = {stage.name: stage for stage in plan.stages}
    ready = {spec.name for spec in plan.inputs} | {step.temperature for step in plan.exits}
    ready |= {each.tensor for each in plan.constants}
    unknown = sorted(ready - set(plan.tensors))
    if unknown:
        yield f"tensor '{unknown[0]}' has no specification"
        return
    lost = [name for each in plan.constants for name in each.gates if name not in {gate.name for gate in plan.gates}]
    if lost:
        yield f"a constant is of gate '{lost[0]}', which does not exist"
    for spec in plan.inputs:
        if plan.tensors[spec.name] != spec:
            yield f"input '{spec.name}' has two specifications"
    yield from _step_problems(plan, stages, ready)
    if {step.stage for step in walk(plan.steps) if isinstance(step, Run)} != set(stages):
        yield "a stage is never run"
    widths = {plan.tensors[step.logits].shape[1:] for step in plan.exits}
    if len(widths) > 1:
        yield f"exits tell different numbers of classes apart: {sorted(widths)}"


def _when_open(steps: Iterable[Step]) -> Iterator[str]:
    """Stages in the order in which a row runs them for which every gate is open."""
    for step in steps:
        if isinstance(step, Run):
            yield step.stage
        elif isinstance(step, Gate):
            yield from _when_open(step.steps)


def _step_problems(plan: Plan, stages: dict[str, Stage], ready: set[str]) -> Iterator[str]:
    for step in plan.steps:
        if isinstance(step, Exit):
            yield from _exit_problems(plan, step, ready)
        else:
            yield from _run_problems(plan, step, stages, ready)


def _run_problems(plan: Plan, step: Step, stages: dict[str, Stage], ready: set[str]) -> Iterator[str]:
    """Problems of a step that is no exit. Adds what it makes to ``ready``."""
    if isinstance(step, Exit):
        yield f"exit '{step.name}' is inside a gate"
    elif isinstance(step, Run):
        if step.stage not in stages:
            yield f"it runs stage '{step.stage}', which does not exist"
            return
        stage = stages[step.stage]
        missing = [name for name in step.called(stage.inputs) if name not in ready]
        if missing:
            yield f"stage '{stage.name}' needs '{missing[0]}' before anything has made it"
        untold = [name for name in (*stage.outputs, *step.called(stage.outputs)) if name not in plan.tensors]
        if untold:
            yield f"output '{untold[0]}' of stage '{stage.name}' has no specification"
        elif not missing:
            yield from (
                f"stage '{stage.name}' takes or makes '{name}', and in one run '{other}', of another shape or dtype"
                for name, other in step.tensors.items()
                if not plan.tensors[name].like(plan.tensors[other])
            )
        ready.update(step.called(stage.outputs))
    else:
        if step.value not in ready:
            yield f"gate '{step.name}' needs '{step.value}' before anything has made it"
        elif plan.tensors[step.value].row_size != 1:
            yield f"value '{step.value}' of gate '{step.name}' is not one number for each row"
        for way, inner in enumerate((step.steps, step.otherwise)):
            made = set(ready)
            for each in inner:
                yield from _run_problems(plan, each, stages, made)
            yield from _join_problems(plan, step, way, made)
        ready.update(step.outputs)


def _join_problems(plan: Plan, gate: Gate, way: int, made: set[str]) -> Iterator[str]:
    """Problems of what a gate gives when it is open (``way`` 0) or closed (1)."""
    state = ("open", "closed")[way]
    for name, sources in gate.outputs.items():
        source = sources[way]
        if name not in plan.tensors:
            yield f"output '{name}' of gate '{gate.name}' has no specification"
        elif source != ZERO and source not in made:
            yield f"gate '{gate.name}' gives '{source}' when {state}, which nothing has made"
        elif source != ZERO and not plan.tensors[source].like(plan.tensors[name]):
            yield f"gate '{gate.name}' gives '{source}' as '{name}', which has another shape or dtype"


def _exit_problems(plan: Plan, step: Exit, ready: set[str]) -> Iterator[str]:
    if set(step.scores) != set(SCORES):
        yield f"exit '{step.name}' must have the scores {', '.join(SCORES)}"
    missing = [name for name in (step.logits, *step.scores.values()) if name not in ready]
    if missing:
        yield f"exit '{step.name}' needs '{missing[0]}' before anything has made it"
    elif len(shape := plan.tensors[step.logits].shape) != 2 or shape[0] not in (BATCH, 1):
        yield f"logits of exit '{step.name}' must be (batch, classes)"
