"""How often gates were open, and what ran for it: told by the stages that ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from edgekit.plan import Exit, Plan, Run, Step, walk

__all__ = ["GateShare", "gate_shares", "mean_macs"]


class GateShare(msgspec.Struct, frozen=True, kw_only=True):
    """How often a gate was open.

    Attributes:
        name: of the gate.
        reached: rows that came to it; rows that left before, or took another way, did not.
        open: those among them that found it open; ``None`` where the stages that ran do not tell.
        share: open of reached; ``None`` when none came.
    """

    name: str
    reached: int | None
    open: int | None
    share: float | None


def gate_shares(plan: Plan, exits: Sequence[int], executed: Mapping[str, int]) -> tuple[GateShare, ...]:
    """How often each gate was open, told by the stages that ran.

    Args:
        plan: stages and steps.
        exits: index of the exit that each row took.
        executed: rows that each stage ran on.
    """
    runs = Counter(step.stage for step in walk(plan.steps) if isinstance(step, Run))
    left = Counter(exits)
    found: list[GateShare] = []
    remaining, passed = left.total(), 0
    for step in plan.steps:
        if isinstance(step, Exit):
            remaining, passed = remaining - left[passed], passed + 1
        else:
            found += _shares([step], remaining, {name: executed[name] for name, times in runs.items() if times == 1})
    return tuple(found)


def _shares(steps: Sequence[Step], reached: int | None, rows: Mapping[str, int]) -> Iterator[GateShare]:
    """Of the gates among steps that so many rows came to; ``rows`` knows the stages that are run in one place."""
    for step in steps:
        if isinstance(step, Run | Exit):
            continue
        opened, closed = (_rows_of(way, rows) for way in (step.steps, step.otherwise))
        if reached is not None:
            opened = reached - closed if opened is None and closed is not None else opened
            closed = reached - opened if closed is None and opened is not None else closed
        share = opened / reached if opened is not None and reached else None
        yield GateShare(name=step.name, reached=reached, open=opened, share=share)
        yield from _shares(step.steps, opened, rows)
        yield from _shares(step.otherwise, closed, rows)


def _rows_of(steps: Sequence[Step], rows: Mapping[str, int]) -> int | None:
    """Rows that took a way: those of the first stage that is run on it alone."""
    return next((rows[step.stage] for step in steps if isinstance(step, Run) and step.stage in rows), None)


def mean_macs(plan: Plan, executed: Mapping[str, int], *, samples: int) -> float | None:
    """MACs of what ran, for one sample; ``None`` when a stage's could not be counted."""
    counts = [(stage.macs, executed[stage.name]) for stage in plan.stages]
    if any(macs is None and rows for macs, rows in counts):
        return None
    return sum((macs or 0) * rows for macs, rows in counts) / samples
