"""The work in a plan's parts: MACs of what runs when gates are open, or closed."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.plan import ZERO, Exit, Gate, Plan, Run, Step
from edgekit.report.formats import percent, si

__all__ = ["handed_through", "macs_of", "macs_text"]


def macs_of(plan: Plan, steps: Sequence[Step], *, is_open: bool = True) -> int | None:
    """MACs of steps for one sample that finds every gate open, or closed; ``None`` when some could not be counted."""
    total = 0
    for step in steps:
        if isinstance(step, Exit):
            continue
        macs = (
            plan.stage(step.stage).macs
            if isinstance(step, Run)
            else macs_of(plan, step.steps if is_open else step.otherwise, is_open=is_open)
        )
        if macs is None:
            return None
        total += macs
    return total


def macs_text(macs: int | None, whole: int | None) -> str:
    """``4.72 M MACs (3.8 %)``: with their share of the whole."""
    if macs is None:
        return "MACs not counted"
    if not whole:
        return f"{si(macs)} MACs"
    return f"{si(macs)} MACs ({'under 0.1 %' if 0 < macs < 0.0005 * whole else percent(macs / whole)})"


def handed_through(plan: Plan, gate: Gate, *, is_open: bool) -> tuple[str, ...]:
    """What a gate gives one way without running anything for it: tensors made before it, or ``"zeros"``."""
    made: set[str] = set()
    for step in gate.steps if is_open else gate.otherwise:
        if isinstance(step, Run):
            made.update(step.called(plan.stage(step.stage).outputs))
        elif isinstance(step, Gate):
            made.update(step.outputs)
    sources = dict.fromkeys(ways[0 if is_open else 1] for ways in gate.outputs.values())
    return tuple("zeros" if source == ZERO else source for source in sources if source not in made)
