"""A batch: every row decides. Rows that leave are copied out, rows that take one way are run together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import EdgekitError
from edgekit.interfaces import Buffer
from edgekit.route import Block, Edge, Fork, Leave
from edgekit.scoring import RowScores
from edgekit.slots import Places, Slots

__all__ = ["Answers", "ManyRows"]

_NAN = np.float32(np.nan)


class Answers:
    """What a batch gives, filled as rows leave.

    Attributes:
        logits: ``(batch, classes) float32``.
        exit: ``(batch,) int64``.
        score: ``(batch,) float32``.
        executed: rows that each stage ran on.
        scores: of these rows, where no stage computes them.
    """

    def __init__(self, rows: int, classes: int, stages: Iterable[str], scores: RowScores | None) -> None:
        self.logits = np.empty((rows, classes), dtype=np.float32)
        self.exit = np.empty(rows, dtype=np.int64)
        self.score = np.empty(rows, dtype=np.float32)
        self.executed = dict.fromkeys(stages, 0)
        self.scores = scores


class ManyRows:
    """Walks blocks with any number of rows."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def run(self, block: Block, answers: Answers) -> None:
        """Run all rows from a route's first block until each has left."""
        remaining = np.arange(len(answers.exit))
        edge: Edge | None = Edge(block)
        places = self._slots.given
        while edge is not None:
            block, places = self._to_decision(edge, places, len(remaining), answers.executed)
            staying = self._leave(block, places, remaining, answers)
            if len(staying) == 0:
                return
            if len(staying) < len(remaining):
                order = _closed_up(staying)
                self._move(order, block, places)
                remaining = remaining[order]
            edge = block.next

    def all_logits(self, block: Block, rows: int) -> tuple[NDArray[np.float32], ...]:
        """Logits of every exit on a route, nobody leaving."""
        found = []
        edge: Edge | None = Edge(block)
        places = self._slots.given
        while edge is not None:
            block, places = self._to_decision(edge, places, rows, dict.fromkeys(self._slots.runners, 0))
            assert isinstance(block.decision, Leave)
            found.append(places[block.decision.logits].read(rows).copy())
            edge = block.next
        return tuple(found)

    def _to_decision(
        self, edge: Edge, places: Places, rows: int, executed: dict[str, int], held: Sequence[Buffer] = ()
    ) -> tuple[Block, Places]:
        """Run to the next exit, or to the end of a way through a gate; gates on the way are passed."""
        places, block = self._slots.follow(edge, places), edge.block
        while True:
            for call in block.calls:
                places = self._slots.place(call, places, held)
                run = self._slots.bind(call, places, rows)
                try:
                    run()
                except EdgekitError:
                    raise
                except Exception as error:
                    raise self._slots.failure([call.stage], error) from error
                executed[call.stage] += rows
            if not isinstance(block.decision, Fork):
                return block, places
            places = self._pass(block.decision, places, rows, executed, held)
            block = block.decision.after

    def _leave(self, block: Block, places: Places, remaining: NDArray[np.intp], answers: Answers) -> NDArray[np.intp]:
        """Copy out the rows that leave; returns the places of those that stay, ascending."""
        decision, count = block.decision, len(remaining)
        assert isinstance(decision, Leave)
        logits = places[decision.logits].read(count)
        # Kernels may drop a NaN on the way to the score, so the logits are looked at.
        given: NDArray[np.float32] | np.float32 = _NAN
        if decision.score is not None:
            given = places[decision.score].read(count)
        elif decision.complete:
            assert answers.scores is not None
            given = answers.scores.at(decision.exit, logits, remaining)
        score = np.where(np.isfinite(logits).all(axis=1), given, _NAN)
        done = np.ones(count, dtype=np.bool_) if block.next is None else score >= decision.threshold
        leaving = remaining[done]
        answers.logits[leaving] = logits[done]
        answers.exit[leaving] = decision.exit
        answers.score[leaving] = score[done]
        return np.flatnonzero(~done)

    def _move(self, order: NDArray[np.intp], block: Block, places: Places) -> None:
        """Put the rows that stay at the front of everything that is read after an exit."""
        assert block.next is not None
        moved = np.flatnonzero(order != np.arange(len(order)))
        for name in block.next.block.needed:
            if self._slots.plan.tensors[name].batched:
                places[name].copy(places[name], order[moved], moved)

    def _pass(self, fork: Fork, places: Places, rows: int, executed: dict[str, int], held: Sequence[Buffer]) -> Places:
        """Take every row through a gate, each on its way; returns where the tensors are that follow."""
        value = places[fork.gate.value].read(rows).reshape(rows, -1)[:, 0]
        is_open = value != 0 if fork.forced is None else np.full(rows, fork.forced)
        groups = [(fork.open, np.flatnonzero(is_open)), (fork.closed, np.flatnonzero(~is_open))]
        groups = [(way, chosen) for way, chosen in groups if len(chosen)]
        if len(groups) == 1:
            return self._through(groups[0][0], places, rows, executed, held)
        kept = [*held, *places.values()]
        found = []
        for way, chosen in groups:
            if fork.gate.whole or (not way.block.calls and way.block.decision is None):
                # Run for all, or nothing is run: rows stay where they are.
                after = self._through(way, places, rows, executed, kept)
                kept.extend(after.values())
                found.append((chosen, chosen, after))
                continue
            gathered = self._gather(way, places, chosen, kept)
            after = self._through(way, gathered, len(chosen), executed, [*kept, *gathered.values()])
            kept.extend(after.values())
            found.append((np.arange(len(chosen)), chosen, after))
        return self._merge(fork, found, places, kept, held)

    def _through(
        self, way: Edge, places: Places, rows: int, executed: dict[str, int], held: Sequence[Buffer]
    ) -> Places:
        block, places = self._to_decision(way, places, rows, executed, held)
        assert block.next is not None
        return self._slots.follow(block.next, places)

    def _gather(self, way: Edge, places: Places, chosen: NDArray[np.intp], held: Sequence[Buffer]) -> Places:
        """Copies of the rows that take a way, of what is read on it."""
        gathered: Places = {}
        for name in way.block.needed:
            gathered[name] = places[name]
            spec = self._slots.plan.tensors[name]
            if spec.batched:
                gathered[name] = self._slots.take(spec, [*held, *gathered.values()])
                gathered[name].copy(places[name], chosen, np.arange(len(chosen)))
        return gathered

    def _is_free(self, buffer: Buffer, held: Iterable[Buffer]) -> bool:
        return not self._slots.is_zero(buffer) and all(buffer is not other for other in held)

    def _merge(
        self,
        fork: Fork,
        found: Sequence[tuple[NDArray[np.intp], NDArray[np.intp], Places]],
        places: Places,
        kept: Sequence[Buffer],
        held: Sequence[Buffer],
    ) -> Places:
        """One tensor out of the rows that took either way, for everything that the gate gives."""
        given = [name for name in fork.gate.outputs if name in fork.after.needed]
        merged = {name: places[name] for name in fork.after.needed if name not in given}
        for name in given:
            free = [
                *held,
                *merged.values(),
                *(after[other] for _, _, after in found for other in given if other != name),
            ]
            target = next(
                (after[name] for rows, chosen, after in found if rows is chosen and self._is_free(after[name], free)),
                None,
            )
            if target is None:
                target = self._slots.take(self._slots.plan.tensors[name], [*kept, *merged.values()])
            for rows, chosen, after in found:
                if after[name] is not target:
                    target.copy(after[name], rows, chosen)
            merged[name] = target
        return merged


def _closed_up(staying: NDArray[np.intp]) -> NDArray[np.intp]:
    """Which row is at each place once those at the end have moved into the gaps."""
    count = len(staying)
    order = np.arange(count)
    gaps = np.ones(count, dtype=np.bool_)
    gaps[staying[staying < count]] = False
    order[gaps] = staying[staying >= count]
    return order
