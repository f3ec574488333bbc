"""Do the written stages answer as the eager model does? Every exit forced, values and decisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from edgekit.errors import CaptureError, ParityError
from edgekit.exporters.capture import Captured
from edgekit.exporters.constants import Compared
from edgekit.exporters.decisions import ExitPoint
from edgekit.exporters.graph import batch_dimension, weight_of
from edgekit.exporters.stages import confidence
from edgekit.plan import SCORES
from edgekit.policy import Policy
from edgekit.session import Session
from edgekit.tensors import BATCH

__all__ = [
    "GOLDEN",
    "ForcedGraph",
    "check_parity",
    "eager_exits",
    "forced_exits",
    "golden_inputs",
    "quantile_constants",
    "require_rows_apart",
    "settle_ties",
]

QUANTILES = (0.25, 0.5, 0.75)
"""Threshold settings that decisions are compared at: these shares of the golden samples stay at each exit."""

SCORE_ROUNDING = 1e-5
"""Scores this close to a threshold may fall on either side by rounding alone; such rows are counted apart."""

GOLDEN = 8
"""Samples to compare on, where nobody says otherwise."""


def golden_inputs(
    captured: Captured, given: Sequence[Tensor] | None, *, samples: int = GOLDEN, seed: int = 0
) -> list[Tensor]:
    """Inputs to compare on: what the user gave, or the example and as much noise of its mean and spread.

    Integer inputs are shuffled from the example's own values, so that indices stay in range.

    Raises:
        CaptureError: what the user gave does not fit the example.
    """
    if given is not None:
        _require_alike(captured.example, given)
        return [torch.cat([example, more]) for example, more in zip(captured.example, given, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    golden = []
    for example in captured.example:
        shape = (samples - len(example), *example.shape[1:])
        if example.is_floating_point():
            spread = example.double().std().item() if example.numel() > 1 else 0.0
            noise = torch.randn(shape, generator=generator) * (spread or 1.0) + example.double().mean().item()
            more = noise.to(example.dtype)
        else:
            index = torch.randint(example.numel(), shape, generator=generator)
            more = example.reshape(-1)[index]
        golden.append(torch.cat([example, more]))
    return golden


def _require_alike(examples: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    expected = [(example.dtype, tuple(example.shape[1:])) for example in examples]
    found = [(tensor.dtype, tuple(tensor.shape[1:])) for tensor in given]
    if found != expected or len({len(tensor) for tensor in given}) > 1:
        raise CaptureError(
            f"golden inputs are {[f'{tensor.dtype} {tuple(tensor.shape)}' for tensor in given]}, the example is "
            f"{[f'{tensor.dtype} {tuple(tensor.shape)}' for tensor in examples]}: only the batch may differ"
        )


def eager_exits(
    model: nn.Module, captured: Captured, points: Sequence[ExitPoint], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """What the eager model gives at each exit: ``(batch, classes)`` logits, or probabilities where it ends so."""
    if captured.batch != BATCH and len(inputs[0]) > 1:
        rows = [[tensor[row : row + 1] for tensor in inputs] for row in range(len(inputs[0]))]
        parts = [eager_exits(model, captured, points, row) for row in rows]
        return [torch.cat(part) for part in zip(*parts, strict=True)]
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[path] = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))

        return hook

    hooks = [model.get_submodule(p.name).register_forward_hook(keep(p.name)) for p in points if p.path is None]
    try:
        returned = captured.run(model, inputs)
    finally:
        for handle in hooks:
            handle.remove()
    tensors = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]
    by_path = {output.path: leaf for output, leaf in zip(captured.outputs, tensors, strict=True)}
    return [(seen[point.name] if point.path is None else by_path[point.path]).float() for point in points]


def forced_exits(
    captured: Captured,
    points: Sequence[ExitPoint],
    inputs: Sequence[Tensor],
    forced: Mapping[Node, bool | Tensor],
    constants: Mapping[Node, float] | None = None,
) -> list[Tensor]:
    """What the captured graph, whole, gives at each exit with gate values set: nothing is left out of it.

    Args:
        captured: the model's graph.
        points: exits.
        inputs: one tensor per network input.
        forced: whether the gate of each of these values is open for all samples; one that is not only 0 or 1 keeps its
            own value when it is not there. Or a number ``(batch,)`` for each sample, NaN for its own value.
        constants: other numbers for the placeholders of gates' constants.
    """
    if captured.batch != BATCH and len(inputs[0]) > 1:
        rows = [[tensor[row : row + 1] for tensor in inputs] for row in range(len(inputs[0]))]
        numbers = [
            {node: value[place : place + 1] if isinstance(value, Tensor) else value for node, value in forced.items()}
            for place in range(len(rows))
        ]
        parts = [
            forced_exits(captured, points, row, number, constants) for row, number in zip(rows, numbers, strict=True)
        ]
        return [torch.cat(part) for part in zip(*parts, strict=True)]
    seen = ForcedGraph(captured, points, forced, constants).exits(inputs)
    return [torch.softmax(v, dim=1) if p.probabilities else v for p, v in zip(points, seen, strict=True)]


def quantile_constants(
    captured: Captured,
    points: Sequence[ExitPoint],
    inputs: Sequence[Tensor],
    constants: Sequence[Compared],
    quantile: float,
) -> dict[Node, float]:
    """Constants, by placeholder, near a quantile of what they are compared with, where scores leave a gap."""
    rows = [[tensor[row : row + 1] for tensor in inputs] for row in range(len(inputs[0]))]
    seen: dict[Node, list[NDArray[np.float32]]] = {each.score: [] for each in constants}
    for given in [inputs] if captured.batch == BATCH else rows:
        graph = ForcedGraph(captured, points, {})
        graph.exits(given)
        for score, values in seen.items():
            values.append(graph.env[score].numpy().reshape(-1))
    found = {each.placeholder: _between(np.concatenate(seen[each.score]), quantile) for each in constants}
    return {node: float(np.float32(value)) for node, value in found.items() if np.isfinite(value)}


def settle_ties(
    captured: Captured, points: Sequence[ExitPoint], inputs: Sequence[Tensor], eager: Sequence[Tensor]
) -> tuple[list[Tensor], tuple[str, ...]]:
    """The eager model's answers, or, for samples that tie in a ranking, those by the rule of the lowest index.

    Args:
        captured: the model's graph.
        points: exits.
        inputs: one tensor per network input.
        eager: what the model gives at each exit.

    Returns:
        Answers at each exit, and a note when there were ties.
    """
    ranks = [node for node in captured.program.graph.nodes if node.target is torch.ops.edgekit.topk.default]
    if not ranks or captured.batch != BATCH:
        return list(eager), ()
    graph = ForcedGraph(captured, points, {})
    ruled = graph.exits(inputs)
    tied = torch.zeros(len(inputs[0]), dtype=torch.bool)
    for node in ranks:
        values, count, dim = (graph.env[arg] if isinstance(arg, Node) else arg for arg in node.args)
        ordered = values.sort(dim=dim, descending=True).values.movedim(dim, -1)
        equal = (ordered[..., :count] == ordered[..., 1 : count + 1]) if ordered.shape[-1] > count else None
        if equal is not None and len(equal) == len(tied):
            tied |= equal.reshape(len(tied), -1).any(1)
    if not tied.any():
        return list(eager), ()
    answers = [
        torch.where(tied[:, None], torch.softmax(by_rule, dim=1) if point.probabilities else by_rule, given)
        for point, by_rule, given in zip(points, ruled, eager, strict=True)
    ]
    return answers, (f"{int(tied.sum())} of {len(tied)} golden samples tie in a top-k: the lowest index is taken",)


class ForcedGraph(Interpreter):
    """The captured graph, whole, with gate values set. Arguments as in :func:`forced_exits`."""

    def __init__(
        self,
        captured: Captured,
        points: Sequence[ExitPoint],
        forced: Mapping[Node, bool | Tensor],
        constants: Mapping[Node, float] | None = None,
    ) -> None:
        super().__init__(captured.program.graph_module, garbage_collect_values=False)
        self.captured = captured
        self.points = points
        self.forced = forced
        self.constants = constants or {}

    def exits(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What it gives at each exit; every node's value is in ``env`` from then on."""
        program = self.captured.program
        given = dict(zip(self.captured.inputs, inputs, strict=True))
        args: list[Any] = []
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            if node in self.constants:
                args.append(torch.tensor(self.constants[node]))
            elif (weight := weight_of(program, node)) is not None:
                args.append(weight[1])
            else:
                args.append(given.get(node, node.meta.get("val")))
        with torch.no_grad():
            self.run(*args)
        return [self.env[point.node].float() for point in self.points]

    def run_node(self, n: Node) -> Any:
        """One node's value, or what it is set to."""
        result = super().run_node(n)
        if n not in self.forced:
            return result
        forced = self.forced[n]
        if isinstance(forced, bool):
            return torch.full_like(result, int(forced))
        batch = batch_dimension(n, self.captured.rows) or 0
        numbers = forced.view([-1 if place == batch else 1 for place in range(result.ndim)])
        return torch.where(numbers.isnan(), result, numbers.to(result.dtype))


def require_rows_apart(
    eager: Sequence[Tensor], part: Sequence[Tensor], points: Sequence[ExitPoint], *, tolerance: float
) -> None:
    """Refuse a model in which a sample's answer depends on the others in its batch.

    Args:
        eager: what the model gives at each exit for a batch.
        part: what it gives for the last rows of that batch alone.
        points: the exits.
        tolerance: as for :func:`check_parity`.

    Raises:
        CaptureError: at the first exit where the two differ.
    """
    for point, whole, alone in zip(points, eager, part, strict=True):
        rows = whole[-len(alone) :]
        close = torch.isclose(rows, alone, rtol=0, atol=_allowed(rows, tolerance), equal_nan=True)
        if not close.all():
            raise CaptureError(
                f"exit '{point.name}' answers otherwise when other samples are in the batch: edgekit needs dimension 0 "
                "of every input to be the batch, and no mean or normalisation over it"
            )


def _allowed(expected: Tensor, tolerance: float) -> float:
    finite = expected[expected.isfinite()]
    return tolerance * max(1.0, float(finite.abs().max()) if len(finite) else 0.0)


def check_parity(
    connect: Callable[[Policy], Session],
    eager: Sequence[Tensor],
    points: Sequence[ExitPoint],
    inputs: Sequence[Tensor],
    *,
    gates: Sequence[tuple[dict[str, bool], Sequence[Tensor]]] = (),
    constants: Sequence[tuple[dict[str, float], Sequence[Tensor]]] = (),
    batches: Sequence[slice],
    tolerance: float,
) -> dict[str, Any]:
    """Compare every forced exit, the decisions at three threshold settings, and forced gates, alone and in a batch.

    Args:
        connect: opens a session with a policy over the written stages. Called once for each score, and that session
            closed before the next: a runtime may hold the weights once for each score that it has been asked for.
        eager: what the eager model gives at each exit for ``inputs``.
        points: the exits.
        inputs: one tensor per network input.
        gates: outcomes that gates are forced to, by name, and what the whole graph gives at each exit then.
        constants: of gates, by name, and likewise.
        batches: samples that are run together.
        tolerance: largest difference allowed, relative to the largest logit of the exit, or absolute below 1.

    Returns:
        Largest differences by exit, and how many decisions were compared.

    Raises:
        ParityError: at the first exit whose values differ by more, or whose decisions differ.
    """
    arrays = [tensor.numpy() for tensor in inputs]
    rows = len(arrays[0])
    differences: dict[str, float] = {}
    compared = close = 0
    for score in SCORES:
        settings = [_expected(score, quantile, eager, points) for quantile in QUANTILES]
        with connect(settings[0][0]) as session:
            if not differences:
                differences = _check_values(session, eager, points, arrays, batches, tolerance=tolerance)
                for forced, whole in gates:
                    _check_forced(session, forced, whole, points, arrays, tolerance=tolerance)
                for moved, whole in constants:
                    session.use(Policy.fixed([math.inf] * (len(points) - 1), constants=moved))
                    for batch in batches:
                        last = session.run([array[batch] for array in arrays]).logits
                        _difference(last, whole[-1][batch], points[-1], tolerance)
            for policy, expected, decided in settings:
                session.use(policy)
                _check_decisions(session, expected, decided, points, arrays, batches)
                compared += sum(int(decided[batch].sum()) for batch in batches)
                close += sum(int((~decided[batch]).sum()) for batch in batches)
    return {
        "samples": rows,
        "tolerance": tolerance,
        "largest_difference": differences,
        "gate_settings_compared": len(gates) + len(constants),
        "decisions_compared": compared,
        "decisions_differing": 0,
        "decisions_within_rounding": close,
    }


def _check_values(
    session: Session,
    eager: Sequence[Tensor],
    points: Sequence[ExitPoint],
    arrays: Sequence[NDArray[Any]],
    batches: Sequence[slice],
    *,
    tolerance: float,
) -> dict[str, float]:
    """Largest difference of each exit, every sample forced to it."""
    differences = {}
    for index, (point, expected) in enumerate(zip(points, eager, strict=True)):
        worst = 0.0
        for batch in batches:
            result = session.run([array[batch] for array in arrays], exit=index)
            worst = max(worst, _difference(result.logits, expected[batch], point, tolerance))
            if (result.exit != index).any():
                raise ParityError(f"exit '{point.name}': forced, but rows left at {sorted(set(result.exit.tolist()))}")
        differences[point.name] = worst
    return differences


def _check_forced(
    session: Session,
    forced: dict[str, bool],
    expected: Sequence[Tensor],
    points: Sequence[ExitPoint],
    arrays: Sequence[NDArray[Any]],
    *,
    tolerance: float,
) -> None:
    """Compare the last exit with gates forced. ``expected`` may be of the first samples only."""
    rows = len(expected[-1])
    given = [array[:rows] for array in arrays]
    result = session.run(given, exit=len(points) - 1, gates=forced)
    try:
        _difference(result.logits, expected[-1], points[-1], tolerance)
    except ParityError as error:
        closed = [name for name, is_open in forced.items() if not is_open]
        raise ParityError(f"with gates {', '.join(closed) or 'all open, none'} closed: {error}") from error


def _check_decisions(
    session: Session,
    expected: NDArray[np.intp],
    decided: NDArray[np.bool_],
    points: Sequence[ExitPoint],
    arrays: Sequence[NDArray[Any]],
    batches: Sequence[slice],
) -> None:
    """Raise where a sample leaves elsewhere than expected, unless rounding decides it."""
    for batch in batches:
        taken = session.run([array[batch] for array in arrays]).exit
        wrong = np.flatnonzero((taken != expected[batch]) & decided[batch])
        if len(wrong):
            policy = session.policy
            raise ParityError(
                f"with {policy.score} thresholds {list(policy.thresholds)}, golden sample {batch.start + wrong[0]} "
                f"leaves at exit '{points[taken[wrong[0]]].name}', the eager model at "
                f"'{points[expected[batch][wrong[0]]].name}'; nothing was written"
            )


def _difference(given: NDArray[np.float32], expected: Tensor, point: ExitPoint, tolerance: float) -> float:
    values = torch.from_numpy(given)
    if point.probabilities:
        values = torch.softmax(values, dim=1)
    if not torch.equal(values.isfinite(), expected.isfinite()):
        raise ParityError(
            f"exit '{point.name}': NaN or infinity where the eager model has none, or the reverse. A closed gate "
            "leaves out what the model multiplies by zero, and 0 × infinity is NaN: keep what is gated finite"
        )
    finite = expected.isfinite()
    if not bool(finite.any()):
        return 0.0
    difference = float((values - expected)[finite].abs().max())
    allowed = _allowed(expected, tolerance)
    if difference > allowed:
        raise ParityError(
            f"exit '{point.name}': differs from the eager model by {difference:.3g} (allowed {allowed:.3g}); "
            "nothing was written. Raise the tolerance only if this is rounding"
        )
    return difference


def _expected(
    score: str, quantile: float, eager: Sequence[Tensor], points: Sequence[ExitPoint]
) -> tuple[Policy, NDArray[np.intp], NDArray[np.bool_]]:
    """A policy with thresholds between the eager model's own scores, and the exits that the eager model takes.

    The last array tells which rows are far enough from every threshold that rounding cannot decide them.
    """
    smallest = torch.finfo(torch.float32).tiny
    logits = [
        value.clamp_min(smallest).log() if point.probabilities else value
        for point, value in zip(points, eager, strict=True)
    ]
    position = SCORES.index(score)
    scores = [confidence(values, torch.ones(()))[position].numpy() for values in logits]
    policy = Policy.fixed([_between(values, quantile) for values in scores[:-1]], score=score)
    exits = np.full(len(scores[0]), len(points) - 1)
    decided = np.ones(len(scores[0]), dtype=np.bool_)
    for index in reversed(range(len(points) - 1)):
        threshold = np.float32(policy.thresholds[index])
        exits[scores[index] >= threshold] = index
        decided &= ~(np.abs(scores[index] - threshold) <= SCORE_ROUNDING)
    return policy, exits, decided


def _between(scores: NDArray[np.float32], quantile: float) -> float:
    """A threshold near a quantile, in the widest gap there, so that rounding does not decide."""
    ranked = np.unique(scores[np.isfinite(scores)]).astype(np.float64)
    if len(ranked) < 2:
        return float("inf")
    near = max(1, len(ranked) // 8)
    middle = round(quantile * (len(ranked) - 1))
    low, high = max(0, middle - near), min(len(ranked) - 1, middle + near)
    gaps = np.diff(ranked[low : high + 1])
    widest = low + int(gaps.argmax())
    return float((ranked[widest] + ranked[widest + 1]) / 2)
