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
    """``4.72 M MACs, 3.8 %``: with their share of the whole."""
    if macs is None:
        return "MACs not counted"
    return f"{si(macs)} MACs, {percent(macs / whole)}" if whole else f"{si(macs)} MACs"


def handed_through(gate: Gate, *, is_open: bool) -> tuple[str, ...]:
    """What a gate gives on a way without running anything for it: tensors made before it, or ``"zeros"``."""
    steps = gate.steps if is_open else gate.otherwise
    made = {name for step in steps if isinstance(step, Gate) for name in step.outputs}
    sources = dict.fromkeys(ways[0 if is_open else 1] for ways in gate.outputs.values())
    return tuple("zeros" if source == ZERO else source for source in sources if source not in made)
