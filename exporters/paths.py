"""Path capture: Python branches on tensor values, as ``if action.sum() == 0`` or ``if score > threshold: break``.

The forward is run with the outcome of each decision forced, and traced: once with every decision at the outcome that
does more, and once more for each decision with its other outcome. What the traces share is joined
(:mod:`edgekit.exporters.joins`) into one graph that computes every way and chooses with ``torch.where``, in which
gates are found as in any masked network. A sample decides for itself, so the graph takes a batch of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.fx import Node
from torch.utils import _pytree as pytree

from edgekit.errors import CaptureError
from edgekit.exporters.agreement import DiffersError, verify
from edgekit.exporters.forced import MOST_DECISIONS, ForcedRun, Forward, natural
from edgekit.exporters.joins import AmbiguousJoinError, join
from edgekit.exporters.source import Place, reason
from edgekit.exporters.ways import Way, align

__all__ = ["Paths", "capture_paths"]

MOST_TRACES = MOST_DECISIONS + 1
"""Traces where each decision is traced once more."""

MOST_TRACES_APART = 64
"""Traces where decisions hang together and all combinations of their outcomes are traced."""

MOST_RETRIES = 8
"""Outcomes of later decisions that are changed, one after the other, where a forward fails with the usual ones."""


@dataclass(frozen=True)
class Paths:
    """A forward with Python branches, as one graph for a batch of one.

    Attributes:
        program: computes all ways.
        decisions: how many there are.
        traces: how many it took.
        notes: what was left out.
    """

    program: ExportedProgram
    decisions: int
    traces: int
    notes: tuple[str, ...]


def capture_paths(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    unchanged: Callable[[nn.Module], AbstractContextManager[None]],
    export: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], ExportedProgram],
) -> Paths | None:
    """Trace every decision of a forward both ways; ``None`` if it reads no value.

    Args:
        model: in evaluation mode.
        args: example inputs, one sample.
        kwargs: example inputs given by name.
        unchanged: puts back what a forward stores in a model.
        export: traces a model with an example.

    Raises:
        CaptureError: naming the decision's line: what the forward does with a value that it reads, two ways that
            cannot be joined, a loop without an end.
    """
    forward = Forward(model, args, kwargs, unchanged, export)
    if not forward.eager(natural).read:
        return None
    explorer = _Explorer(forward, apart=False)
    try:
        way = explorer.explore()
        verify(way, forward)
    except (AmbiguousJoinError, DiffersError):
        explorer = _Explorer(forward, apart=True)
        way = explorer.explore()
        verify(way, forward)
    _drop_markers(way)
    _drop_single_reductions(way.program)
    return Paths(way.program, explorer.decisions, explorer.traces, tuple(explorer.notes))


class _ImpossibleError(CaptureError):
    """An outcome with which the forward fails."""


class _Explorer:
    """Traces ways through a forward.

    Args:
        forward: of the model.
        apart: trace all combinations of outcomes. Otherwise later decisions that two ways take alike are traced on one.
    """

    def __init__(self, forward: Forward, *, apart: bool) -> None:
        self.forward = forward
        self.apart = apart
        self.usual: dict[Any, bool] = {}
        self.notes: list[str] = []
        self.decisions = 0
        self.traces = 0

    def explore(self) -> Way:
        """The way that does most, with all others joined to it."""
        try:
            way = self._way([])
        except _ImpossibleError:
            way = self._way(self.forward.eager(natural).outcomes)
        self._others(way, 0)
        return way

    def _others(self, way: Way, first: int) -> None:
        """Join the ways on which a decision from ``first`` on is another, the last one first.

        What is joined earlier is there for what was joined later, as what is decided earlier for what comes later.
        """
        for index in reversed(range(first, way.shared)):
            self.decisions += 1
            forced = [*way.outcomes[:index], not way.outcomes[index]]
            try:
                other = self._way(forced)
            except _ImpossibleError as error:
                self._tell(f"a branch{way.places[index]} is never {forced[-1]}, the forward fails then: {error}")
                continue
            match = align(way, other, index, shared=0 if self.apart else None)
            self._others(other, index + 1)
            join(way, other, index, match)

    def _tell(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _way(self, forced: Sequence[bool]) -> Way:
        done = self._settled(forced)
        self.traces += 1
        most = MOST_TRACES_APART if self.apart else MOST_TRACES
        if self.traces > most:
            raise CaptureError(
                f"a Python branch depends on tensor values{done.places[0]}: what later branches do depends on it, and "
                f"all combinations would be more than {most} traces"
            )
        return Way(self.forward.trace(done), done.places, done.outcomes, pytree.tree_structure(done.returned))

    def _settled(self, forced: Sequence[bool]) -> ForcedRun:
        """A run with these first outcomes, and the usual ones after; others where the forward fails with those."""
        try:
            return self._run(forced)
        except CaptureError:
            raise
        except Exception as error:  # whatever the model raises
            failed, made = error, error.run.outcomes  # type: ignore[attr-defined]
        for last in reversed(range(max(len(forced), len(made) - MOST_RETRIES), len(made))):
            with suppress(Exception):
                return self._run([*made[:last], not made[last]])
        raise _ImpossibleError(reason(failed)) from failed

    def _run(self, forced: Sequence[bool]) -> ForcedRun:
        while True:
            outcomes = iter(forced)

            def choose(place: Place, flag: Tensor, outcomes: Iterator[bool] = outcomes) -> bool:
                wanted = next(outcomes, None)
                if wanted is None and place.line not in self.usual:
                    raise _UnknownError(place)
                return self.usual[place.line] if wanted is None else wanted

            try:
                return self.forward.eager(choose)
            except _UnknownError as unknown:
                self.usual[unknown.place.line] = self._learned(unknown.place, forced)

    def _learned(self, place: Place, forced: Sequence[bool]) -> bool:
        """The usual outcome of a line is the one with which the forward does more."""
        scores = []
        for outcome in (False, True):
            usual = {**self.usual, place.line: outcome}
            outcomes = iter(forced)

            def choose(
                at: Place, flag: Tensor, outcomes: Iterator[bool] = outcomes, usual: dict[Any, bool] = usual
            ) -> bool:
                wanted = next(outcomes, usual.get(at.line))
                return bool(flag) if wanted is None else wanted

            try:
                done = self.forward.eager(choose)
                scores.append((done.work, len(done.outcomes)))
            except CaptureError:
                raise
            except Exception:  # whatever the model raises: this outcome cannot be the usual one
                scores.append((-1, -1))
        return scores[1] > scores[0]


class _UnknownError(Exception):
    """A line whose usual outcome is not known yet."""

    def __init__(self, place: Place) -> None:
        super().__init__(str(place))
        self.place = place


def _drop_markers(way: Way) -> None:
    """Return what the model returns and nothing else."""
    program = way.program
    signature = program.graph_signature
    kept = [
        slot
        for slot, spec in enumerate(signature.output_specs)
        if spec.kind is not OutputKind.USER_OUTPUT or slot in way.results
    ]
    returned: Any = way.output.args[0]
    way.output.args = (tuple(returned[slot] for slot in kept),)
    signature.output_specs[:] = [
        replace(spec, arg=TensorArgument(name=returned[slot].name)) if isinstance(returned[slot], Node) else spec
        for slot, spec in enumerate(signature.output_specs)
        if slot in kept
    ]
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


_REDUCTIONS = frozenset({"sum", "mean", "max", "min", "amax", "amin", "prod", "any", "all"})


def _drop_single_reductions(program: ExportedProgram) -> None:
    """Reducing one element gives that element.

    A branch asks for the whole batch, as in ``action.sum() == 0``, of which there is one sample: so it is seen to ask
    for the very value that the sample's features are multiplied by.
    """
    for node in list(program.graph.nodes):
        value = node.meta.get("val")
        if getattr(node.target, "_opname", "") not in _REDUCTIONS or not isinstance(value, Tensor):
            continue
        source = node.args[0]
        if source.meta["val"].numel() != 1:
            continue
        if source.meta["val"].dtype != value.dtype and node.target._opname in ("any", "all"):
            with program.graph.inserting_before(node):
                asked = program.graph.call_function(torch.ops.aten.ne.Scalar, (source, 0))
            asked.meta = {**node.meta, "val": source.meta["val"].bool()}
            source = asked
        if source.meta["val"].dtype == value.dtype:
            node.target, node.args, node.kwargs = torch.ops.aten.view.default, (source, list(value.shape)), {}
    program.graph_module.recompile()
