"""A cut becomes a stage: live tensors, logits and scores, with the temperature as an input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from edgekit.errors import InputError, LoweringError, PartitionError
from edgekit.exporters.capture import Captured, quiet
from edgekit.exporters.partition import Cut
from edgekit.plan import SCORES, Exit, Plan, Run, Stage
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
    """A cut with its exit's scores."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.body = cut.module

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Live inputs then the temperature; live outputs, logits ``(batch, classes) float32``, then the scores."""
        *inputs, temperature = tensors
        *outputs, logits = self.body(*inputs)
        logits = logits.float()
        return (*outputs, logits, *confidence(logits, temperature))


def stage_module(cut: Cut) -> StageModule:
    """The stage that a cut becomes, in evaluation mode."""
    return StageModule(cut).eval()


def make_plan(captured: Captured, cuts: Sequence[Cut]) -> Plan:
    """The program that runs the cuts and leaves at their exits."""
    tensors: dict[str, TensorSpec] = {}
    stages: list[Stage] = []
    steps: list[Run | Exit] = []
    batch = captured.batch
    for node in captured.inputs:
        tensors[node.name] = _spec(node.name, node, batch)
    names = {node: node.name for node in captured.inputs}
    for cut in cuts:
        names.update({node: f"{cut.name}/{node.name}" for node in cut.outputs})
        point = cut.point
        classes = int(point.node.meta["val"].shape[1])
        step = Exit(
            name=point.name,
            logits=f"{point.name}.logits",
            temperature=f"{point.name}.temperature",
            scores={score: f"{point.name}.{score}" for score in SCORES},
            probabilities=point.probabilities,
        )
        for node in cut.outputs:
            tensors[names[node]] = _spec(names[node], node, batch)
        tensors[step.logits] = TensorSpec(step.logits, "float32", (batch, classes))
        tensors[step.temperature] = TensorSpec(step.temperature, "float32", ())
        for name in step.scores.values():
            tensors[name] = TensorSpec(name, "float32", (batch,))
        weights = {tensor.data_ptr(): tensor.nbytes for tensor in cut.module.buffers()}
        stages.append(
            Stage(
                name=cut.name,
                module=cut.module_path,
                inputs=(*(names[node] for node in cut.inputs), step.temperature),
                outputs=(*(names[node] for node in cut.outputs), step.logits, *step.scores.values()),
                macs=cut.macs,
                weight_bytes=sum(weights.values()),
            )
        )
        steps += [Run(cut.name), step]
    inputs = tuple(tensors[node.name] for node in captured.inputs)
    return Plan(inputs=inputs, tensors=tensors, stages=tuple(stages), steps=tuple(steps))


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


def _spec(name: str, node: Node, batch: str | int) -> TensorSpec:
    value = node.meta["val"]
    dtype = str(value.dtype).removeprefix("torch.")
    try:
        return TensorSpec(name, dtype, (batch, *(int(size) for size in value.shape[1:])))
    except InputError as error:
        raise PartitionError(f"{error}; convert the model and the example with .float()") from error
