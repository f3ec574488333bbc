"""A cut becomes a stage: live tensors, logits and scores, with the temperature as an input."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from msgspec import structs
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from edgekit.errors import InputError, LoweringError, PartitionError
from edgekit.exporters.capture import Captured, quiet
from edgekit.exporters.constants import Compared
from edgekit.exporters.decisions import ExitPoint
from edgekit.exporters.graph import batch_dimension
from edgekit.exporters.partition import Cut, Fork, Part
from edgekit.exporters.simplify import Value
from edgekit.plan import SCORES, ZERO, Constant, Exit, Gate, Plan, Run, Stage, Step, walk
from edgekit.tensors import TensorSpec

__all__ = ["StageModule", "confidence", "make_plan", "stage_module", "trace_stage"]


def confidence(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The scores of :data:`edgekit.plan.SCORES`, in that order.

    Args:
        logits: ``(batch, classes)``.
        temperature: ``() float32``.

    Returns:
        Three ``(batch,) float32`` tensors. What they are where a logit is NaN differs from runtime to runtime (some
        kernels drop NaN in a maximum); :class:`edgekit.session.Session` looks at the logits before a row leaves.
    """
    scaled = logits / temperature
    probabilities = torch.softmax(scaled, dim=1)
    largest = torch.topk(probabilities, 2, dim=1).values
    # As a product of matrices: a sum over classes rounds otherwise in other places of memory, so in other batches.
    entropy = torch.matmul(probabilities[:, None, :], torch.log_softmax(scaled, dim=1)[:, :, None])
    return probabilities.amax(dim=1), largest[:, 0] - largest[:, 1], entropy[:, 0, 0]


class StageModule(nn.Module):
    """A cut with its exit's scores, if it ends in one."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.body = cut.module
        self.exit = cut.point is not None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Live inputs, and the exit's temperature; live outputs, logits ``(batch, classes) float32`` and scores."""
        if not self.exit:
            return self.body(*tensors)
        *inputs, temperature = tensors
        *outputs, logits = self.body(*inputs)
        logits = logits.float()
        return (*outputs, logits, *confidence(logits, temperature))


def stage_module(cut: Cut) -> StageModule:
    """The stage that a cut becomes, in evaluation mode."""
    return StageModule(cut).eval()


def make_plan(
    captured: Captured, parts: Sequence[Part], mixing: Collection[str] = (), constants: Sequence[Compared] = ()
) -> tuple[Plan, tuple[Cut, ...]]:
    """The program that runs the cuts, passes the gates and leaves at the exits; and the cut of each of its stages.

    Cuts that compute the same with the same weights become one stage. ``mixing`` names the gates in which samples need
    one another; ``constants`` are what gates compare scores with.
    """
    planner = _Planner(captured, mixing, constants)
    return planner.plan(parts), tuple(planner.cuts)


class _Planner:
    def __init__(self, captured: Captured, mixing: Collection[str], constants: Sequence[Compared]) -> None:
        self.captured = captured
        self.mixing = mixing
        self.constants = constants
        self.batch = captured.batch
        self.tensors: dict[str, TensorSpec] = {}
        self.stages: list[Stage] = []
        self.cuts: list[Cut] = []
        self.known: dict[tuple[object, ...], tuple[Stage, tuple[int, ...]]] = {}

    def plan(self, parts: Sequence[Part]) -> Plan:
        names = {node: node.name for node in self.captured.inputs}
        for node in self.captured.inputs:
            self._add(node.name, node)
        for each in self.constants:
            names[each.placeholder] = f"{each.name}.constant"
            self.tensors[f"{each.name}.constant"] = TensorSpec(f"{each.name}.constant", "float32", ())
        steps = self._steps(parts, names)
        inputs = tuple(self.tensors[node.name] for node in self.captured.inputs)
        mixing = [step for step in walk(steps) if isinstance(step, Gate) and step.whole]
        whole = {run.stage for gate in mixing for run in walk((gate,)) if isinstance(run, Run)}
        stages = tuple(structs.replace(stage, whole=stage.name in whole) for stage in self.stages)
        constants = tuple(
            Constant(
                name=each.name,
                tensor=names[each.placeholder],
                comparison=each.operator,
                value=each.value,
                gates=each.gates,
            )
            for each in self.constants
        )
        return Plan(inputs=inputs, tensors=self.tensors, stages=stages, steps=tuple(steps), constants=constants)

    def _add(self, name: str, node: Node) -> None:
        self.tensors[name] = _spec(name, node, self.captured)

    def _steps(self, parts: Sequence[Part], names: dict[Node, str]) -> list[Step]:
        """Steps for parts; what they make is added to ``names``."""
        steps: list[Step] = []
        for part in parts:
            steps += [self._fork(part, names)] if isinstance(part, Fork) else self._cut(part, names)
        return steps

    def _cut(self, cut: Cut, names: dict[Node, str]) -> list[Step]:
        inputs = [names[node] for node in cut.inputs]
        for node in cut.outputs:
            names[node] = f"{cut.name}/{node.name}"
            self._add(names[node], node)
        outputs = [names[node] for node in cut.outputs]
        key, order = _signature(cut)
        if cut.point is None and key in self.known:
            stage, earlier = self.known[key]
            tensors = {stage.inputs[place]: inputs[own] for place, own in zip(earlier, order, strict=True)}
            return [Run(stage.name, tensors | dict(zip(stage.outputs, outputs, strict=True)))]
        step = None if cut.point is None else self._exit(cut.point)
        if step is not None:
            inputs.append(step.temperature)
            outputs += [step.logits, *step.scores.values()]
        weights = {tensor.data_ptr(): tensor.nbytes for tensor in cut.module.buffers()}
        stage = Stage(
            name=cut.name,
            module=cut.module_path,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            macs=cut.macs,
            weight_bytes=sum(weights.values()),
            exit=step is not None,
        )
        self.stages.append(stage)
        self.cuts.append(cut)
        self.known[key] = stage, order
        return [Run(cut.name)] if step is None else [Run(cut.name), step]

    def _exit(self, point: ExitPoint) -> Exit:
        step = Exit(
            name=point.name,
            logits=f"{point.name}.logits",
            temperature=f"{point.name}.temperature",
            scores={score: f"{point.name}.{score}" for score in SCORES},
            probabilities=point.probabilities,
        )
        classes = int(point.node.meta["val"].shape[1])
        self.tensors[step.logits] = TensorSpec(step.logits, "float32", (self.batch, classes))
        self.tensors[step.temperature] = TensorSpec(step.temperature, "float32", ())
        for name in step.scores.values():
            self.tensors[name] = TensorSpec(name, "float32", (self.batch,))
        return step

    def _fork(self, fork: Fork, names: dict[Node, str]) -> Gate:
        ways = []
        for parts in (fork.open, fork.closed):
            inner = dict(names)
            ways.append((tuple(self._steps(parts, inner)), inner))

        def called(value: Value, way: int) -> str:
            return ways[way][1][value] if isinstance(value, Node) else ZERO

        outputs = {}
        for node, values in fork.outputs.items():
            names[node] = f"{fork.gate.name}/{node.name}"
            self._add(names[node], node)
            outputs[names[node]] = (called(values[0], 0), called(values[1], 1))
        return Gate(
            name=fork.gate.name,
            value=names[fork.gate.value],
            steps=ways[0][0],
            otherwise=ways[1][0],
            outputs=outputs,
            whole=fork.gate.name in self.mixing,
        )


def _signature(cut: Cut) -> tuple[tuple[object, ...], tuple[int, ...]]:
    """What a cut computes with which weights, whatever its tensors are called; and its inputs in order of first use."""
    numbers: dict[Node, Any] = {}
    first_used: list[Node] = []

    def numbered(node: Node) -> Any:
        if node not in numbers:
            value = node.meta["val"]
            numbers[node] = ("input", len(first_used), str(value.dtype), str(tuple(value.shape)))
            first_used.append(node)
        return numbers[node]

    steps: list[object] = []
    for node in cut.module.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            weight = cut.module.get_buffer(str(node.target))
            numbers[node] = ("weight", weight.data_ptr(), str(weight.dtype), tuple(weight.shape), weight.stride())
            continue
        steps.append((node.op, str(node.target), map_arg(node.args, numbered), map_arg(node.kwargs, numbered)))
        numbers[node] = ("step", len(steps))
    placeholders = [node for node in cut.module.graph.nodes if node.op == "placeholder"]
    order = tuple(placeholders.index(node) for node in first_used)
    # An input that nothing reads keeps a cut to itself: it would have no place in that order.
    return (str(steps), len(order) == len(placeholders) or cut.name), order


def trace_stage(cut: Cut, stage: Stage, plan: Plan) -> ExportedProgram:
    """A stage as a program that targets lower, batch of any size unless the plan fixes it.

    Raises:
        LoweringError: the stage does not trace on its own.
    """
    specs = [plan.tensors[name] for name in stage.inputs]
    example = tuple(torch.zeros(spec.concrete(2), dtype=getattr(torch, spec.dtype)) for spec in specs)
    rows = Dim("batch")
    shapes = (tuple({0: rows} if spec.batched else None for spec in specs),)
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(stage_module(cut), example, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises whatever the tracer raised
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LoweringError(f"stage '{stage.name}' does not trace on its own: {line}") from error


def _spec(name: str, node: Node, captured: Captured) -> TensorSpec:
    """A tensor as it crosses a boundary: with the batch as dimension 0."""
    value = node.meta["val"]
    dtype = str(value.dtype).removeprefix("torch.")
    sizes = list(value.shape)
    batch = batch_dimension(node, captured.rows) or 0
    sizes[0], sizes[batch] = sizes[batch], sizes[0]
    try:
        return TensorSpec(name, dtype, (captured.batch, *(int(size) for size in sizes[1:])))
    except InputError as error:
        raise PartitionError(f"{error}; convert the model and the example with .float()") from error
