"""The verb: model to bundle."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from edgekit import plugins
from edgekit.bundle import Bundle, BundleWriter, write_bundle
from edgekit.data import Preprocess
from edgekit.errors import CaptureError, EdgekitError, LoweringError
from edgekit.exporters.capture import Captured, capture
from edgekit.exporters.constants import Compared, constants_as_inputs
from edgekit.exporters.decisions import ExitPoint, find_exits
from edgekit.exporters.gates import SMALLEST_GATE, GatePoint, Gates, find_gates, gate_values
from edgekit.exporters.macs import count_macs
from edgekit.exporters.mixing import mixing_gates, require_all_rows
from edgekit.exporters.parity import (
    GOLDEN,
    check_parity,
    eager_exits,
    forced_exits,
    golden_inputs,
    quantile_constants,
    require_rows_apart,
    settle_ties,
)
from edgekit.exporters.partition import Part, partition
from edgekit.exporters.stages import make_plan, trace_stage
from edgekit.interfaces import Batching, Joining, Runtime, Target
from edgekit.manifest import Manifest
from edgekit.plan import Plan, Stage
from edgekit.progress import Progress, silent
from edgekit.session import Session
from edgekit.tensors import BATCH

__all__ = ["Staged", "export_bundle", "stage_model"]


APART = ".apart"
"""Folder of stages that are still to be joined: no target's name."""
TOGETHER = 8
"""Gates that are closed in turn in one run of the whole graph, on samples of their own."""


class Staged:
    """A model cut into stages, before it is written for any target.

    Attributes:
        model: the eager model.
        captured: its graph.
        exits: in order.
        gates: found between the exits.
        parts: stages and gates.
        mixing: names of the gates in which samples of a batch need one another.
        constants: that gates compare scores with.
        plan: the program that runs them.
        cuts: of the plan's stages.
        notes: what was left out or reordered.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        exits: tuple[ExitPoint, ...],
        gates: Gates,
        parts: tuple[Part, ...],
        mixing: Collection[str],
        constants: tuple[Compared, ...],
        notes: tuple[str, ...],
    ) -> None:
        self.model = model
        self.captured = captured
        self.exits = exits
        self.gates = gates
        self.parts = parts
        self.mixing = mixing
        self.constants = constants
        self.plan, self.cuts = make_plan(captured, parts, mixing, constants)
        self.notes = notes

    def forced(self, inputs: Sequence[Tensor]) -> list[tuple[dict[str, bool], Sequence[Tensor]]]:
        """Settings of the gates, and what the whole graph gives at each exit then.

        All open; all closed; and, on two samples, each alone closed, with those that hang on the same value.
        """
        gates = list(self.gates.all())
        if not gates:
            return []
        found: list[tuple[dict[str, bool], Sequence[Tensor]]] = []
        for is_open in (True, False):
            named = {gate.name: is_open for gate in gates}
            forced = {gate.value: is_open for gate in gates if gate.binary or not is_open}
            found.append((named, forced_exits(self.captured, self.exits, inputs, forced)))
        values = list(dict.fromkeys(gate.value for gate in gates))
        together = 1 if self.mixing else TOGETHER
        for start in range(0, len(values) if len(values) > 1 else 0, together):
            found += self._each_closed(gates, values[start : start + together], [tensor[:2] for tensor in inputs])
        return found

    def _each_closed(
        self, gates: Sequence[GatePoint], values: Sequence[Node], inputs: Sequence[Tensor]
    ) -> list[tuple[dict[str, bool], Sequence[Tensor]]]:
        """Each of some gates closed and all others open, in one run: for every value, rows of its own."""
        rows = len(inputs[0])
        forced = {}
        for gate in gates:  # an open gate that scales keeps its own value
            forced[gate.value] = torch.full((len(values), rows), 1.0 if gate.binary else math.nan)
        for place, value in enumerate(values):
            forced[value][place] = 0
        given = [tensor.repeat(len(values), *[1] * (tensor.ndim - 1)) for tensor in inputs]
        answers = forced_exits(self.captured, self.exits, given, {node: each.view(-1) for node, each in forced.items()})
        return [
            (
                {gate.name: gate.value is not value for gate in gates},
                [answer[place * rows : (place + 1) * rows] for answer in answers],
            )
            for place, value in enumerate(values)
        ]

    def moved(self, inputs: Sequence[Tensor]) -> list[tuple[dict[str, float], Sequence[Tensor]]]:
        """Other constants of the gates, by name, and what the whole graph gives at each exit then."""
        settings: list[tuple[dict[str, float], Sequence[Tensor]]] = []
        for quantile in (0.25, 0.75) if self.constants else ():
            found = quantile_constants(self.captured, self.exits, inputs, self.constants, quantile)
            named = {each.name: found[each.placeholder] for each in self.constants if each.placeholder in found}
            settings.append((named, forced_exits(self.captured, self.exits, inputs, {}, found)))
        return settings

    def eager(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the eager model gives at each exit."""
        return eager_exits(self.model, self.captured, self.exits, inputs)


def stage_model(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    exits: Sequence[str] | None = None,
    smallest_gate: int = SMALLEST_GATE,
) -> Staged:
    """Capture a model, find its exits and cut it there. Arguments and errors as in :func:`export_bundle`."""
    captured = capture(model, _tensors(args), _tensor_mapping(kwargs))
    macs = count_macs(captured.program, rows=len(captured.example[0]))
    values = gate_values(captured)
    points, notes = find_exits(captured, names=exits, macs=macs, gate_values=values)
    gates = find_gates(captured, points, macs, smallest=smallest_gate)
    constants = constants_as_inputs(captured, gates)
    parts = partition(captured, points, gates, macs, [each.placeholder for each in constants])
    mixing = mixing_gates(captured, points, gates, golden_inputs(captured, None, samples=4))
    require_all_rows(parts, mixing)
    mixed = tuple(
        f"what gate '{gate}' guards mixes the samples of a batch ({operator}): all are run if one needs it, and "
        "answers depend on which samples are run together"
        for gate, operator in mixing.items()
    )
    uncounted = () if macs is not None else ("MACs could not be counted: an operator has no shape function",)
    return Staged(
        model, captured, points, gates, parts, mixing, constants, (*captured.notes, *notes, *mixed, *uncounted)
    )


def export_bundle(
    model: nn.Module,
    args: Any,
    path: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    targets: Sequence[str | Target] = ("onnx",),
    exits: Sequence[str] | None = None,
    smallest_gate: int = SMALLEST_GATE,
    name: str | None = None,
    preprocess: Preprocess | None = None,
    classes: Sequence[str] = (),
    golden: Any = None,
    tolerance: float = 1e-4,
    overwrite: bool = False,
    packed: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Cut a trained network at its exits, write every stage, check it against the model, and bundle it.

    Args:
        model: in evaluation mode, as its authors wrote it.
        args: example inputs, one tensor or a tuple of them, dimension 0 the batch.
        path: of the bundle.
        kwargs: example inputs given by name.
        targets: kinds of device to write the stages for, by name or made with options.
        exits: outputs or modules that are exits, in order; found by themselves when ``None``.
        smallest_gate: MACs that a gate must guard to be one, and as many more for each 10,000 bytes of a sample that
            cross its boundary; what guards less is computed always.
        name: of the network; the model's class name when ``None``.
        preprocess: how images become inputs, kept in the bundle.
        classes: class names in label order.
        golden: more inputs to compare on, as ``args``; noise like the example when ``None``.
        tolerance: largest difference to the eager model, relative to the largest logit, or absolute below 1.
        overwrite: replace a bundle at ``path``.
        packed: write one file instead of a folder.
        progress: told what is being done.

    Raises:
        CaptureError: the model cannot become one graph, or its exits cannot be told.
        PartitionError: the graph cannot be cut at its exits.
        LoweringError: a target cannot take a stage, or what it wrote does not open.
        ParityError: the stages do not answer as the model does. Whatever is raised, nothing is left behind.
        BundleError: the bundle cannot be written.
    """
    if isinstance(targets, str) or not isinstance(targets, Sequence) or not targets:
        raise LoweringError("targets must be a sequence, as ('onnx',)")
    lowering = [_target(target) for target in targets]
    if len({target.name for target in lowering}) < len(lowering):
        raise LoweringError(f"targets: one is there twice ({', '.join(target.name for target in lowering)})")
    with write_bundle(path, overwrite=overwrite, packed=packed) as writer:
        progress("capture", 0, 1)
        staged = stage_model(model, args, kwargs, exits=exits, smallest_gate=smallest_gate)
        progress("capture", 1, 1)
        at_once = max(target.batch if isinstance(target, Batching) else 1 for target in lowering)
        given = None if golden is None else _leaves(golden)
        inputs = golden_inputs(staged.captured, given, samples=max(GOLDEN, at_once))
        if len(inputs[0]) < at_once:
            raise LoweringError(
                f"{at_once} samples at once cannot be compared with the eager model on {len(inputs[0])}: give "
                f"{at_once} golden inputs or more, example included"
            )
        expected, forced, moved = staged.eager(inputs), staged.forced(inputs), staged.moved(inputs)
        if not staged.mixing:
            part = [tensor[len(tensor) // 2 :] for tensor in inputs]
            require_rows_apart(expected, staged.eager(part), staged.exits, tolerance=tolerance)
        expected, ties = settle_ties(staged.captured, staged.exits, inputs, expected)
        artifacts = _lower(staged, lowering, writer, progress)
        parity = {}
        for number, target in enumerate(lowering):
            progress("compare with the eager model", number, len(lowering))
            paths = {stage: writer.folder / file for stage, file in artifacts[target.name].items()}
            parity[target.name] = _compare(staged, target, paths, inputs, expected, forced, moved, tolerance=tolerance)
        progress("compare with the eager model", len(lowering), len(lowering))
        asked = {f"input:{spec.name}": tensor for spec, tensor in zip(staged.plan.inputs, inputs, strict=True)}
        answered = {f"exit:{point.name}": value for point, value in zip(staged.exits, expected, strict=True)}
        writer.golden({name: tensor.numpy() for name, tensor in {**asked, **answered}.items()})
        writer.describe(
            Manifest(
                name=name or type(model).__name__,
                created="",
                plan=staged.plan,
                artifacts=artifacts,
                preprocess=preprocess,
                classes=tuple(classes),
                capture={
                    "route": staged.captured.route,
                    "attempts": [asdict(attempt) for attempt in staged.captured.attempts],
                    "decisions": [asdict(finding) for finding in staged.gates.findings],
                },
                parity=parity,
                notes=(*staged.notes, *ties),
                versions={"edgekit": version("edgekit"), **{k: v for t in lowering for k, v in t.versions().items()}},
            )
        )
    return Bundle.open(path)


def _target(target: str | Target) -> Target:
    return cast("Target", plugins.create("targets", target)) if isinstance(target, str) else target


def _lower(
    staged: Staged, targets: Sequence[Target], writer: BundleWriter, progress: Progress
) -> dict[str, dict[str, str]]:
    """Write every stage for every target, and see that it opens. Returns the artifacts' paths by target and stage."""
    plan = staged.plan
    artifacts: dict[str, dict[str, str]] = {target.name: {} for target in targets}
    runtimes = [cast("Runtime", plugins.create("runtimes", target.runtime)) for target in targets]
    total = len(plan.stages) * len(targets)
    for number, (cut, stage) in enumerate(zip(staged.cuts, plan.stages, strict=True)):
        program = trace_stage(cut, stage, plan)
        for offset, (target, runtime) in enumerate(zip(targets, runtimes, strict=True)):
            progress(f"write {stage.name} for {target.name}", number * len(targets) + offset, total)
            folder = f"{APART}/{target.name}" if isinstance(target, Joining) else target.name
            name = f"stages/{folder}/{stage.name}{target.suffix}"
            target.lower(program, stage, writer.path(name), specs=plan.tensors)
            artifacts[target.name][stage.name] = name
            try:
                _open_every_way(runtime, stage, writer.folder / name, plan)
            except EdgekitError as error:
                raise LoweringError(f"what was written for '{target.name}' does not open: {error}") from error
    for target in targets:
        if isinstance(target, Joining):
            joined = f"stages/{target.name}/network{target.suffix}"
            try:
                target.join([writer.folder / name for name in artifacts[target.name].values()], writer.path(joined))
            except OSError:
                raise
            except Exception as error:  # of a library that writes the format
                raise LoweringError(f"the stages for '{target.name}' cannot be joined in one file: {error}") from error
            artifacts[target.name] = dict.fromkeys(artifacts[target.name], joined)
    shutil.rmtree(writer.folder / "stages" / APART, ignore_errors=True)
    for runtime in runtimes:
        runtime.close()
    progress("write stages", total, total)
    return artifacts


def _compare(
    staged: Staged,
    target: Target,
    paths: Mapping[str, Path],
    inputs: Sequence[Tensor],
    expected: Sequence[Tensor],
    forced: Sequence[tuple[dict[str, bool], Sequence[Tensor]]],
    moved: Sequence[tuple[dict[str, float], Sequence[Tensor]]],
    *,
    tolerance: float,
) -> dict[str, Any]:
    """Open what was written in its own runtime, and compare."""
    runtime = cast("Runtime", plugins.create("runtimes", target.runtime))
    rows = len(inputs[0])
    batches = [slice(0, rows), slice(0, 1), slice(rows - 1, rows)]
    if staged.mixing:
        batches = batches[:1]
    elif staged.captured.batch != BATCH:
        batches = [slice(row, row + 1) for row in range(rows)]
    return check_parity(
        lambda policy: Session(staged.plan, runtime, paths, policy=policy),
        expected,
        staged.exits,
        inputs,
        gates=forced,
        constants=moved,
        batches=batches,
        tolerance=tolerance,
    )


def _open_every_way(runtime: Runtime, stage: Stage, artifact: Path, plan: Plan) -> None:
    """Bind what a session can ask of a stage, each alone: a target may keep them in files of their own."""
    live, head = stage.live, stage.head
    asked = [live, *((*live, head[0], *score) for score in ((), *((each,) for each in head[1:])))] if head else [live]
    buffers = {name: runtime.allocate(plan.tensors[name], 1) for name in (*stage.inputs, *stage.outputs)}
    for outputs in asked:
        if outputs:
            runner = runtime.open(stage, artifact)
            runner.bind(buffers, rows=1, outputs=outputs)
            runner.close()


def _tensors(args: Any) -> tuple[Any, ...]:
    """Example arguments as a tuple, arrays as tensors."""
    given = tuple(args) if isinstance(args, tuple | list) else (args,)
    return cast("tuple[Any, ...]", pytree.tree_map(_tensor, given))


def _tensor_mapping(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: pytree.tree_map(_tensor, value) for name, value in (kwargs or {}).items()}


def _tensor(leaf: Any) -> Any:
    return torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf


def _leaves(golden: Any) -> list[Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(_tensors(golden)) if isinstance(leaf, Tensor)]
    if not leaves:
        raise CaptureError("golden inputs hold no tensor")
    return leaves
