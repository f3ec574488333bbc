"""From the calls that a runtime's profiler saw to the figures of operators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from edgekit.measured import OperatorTime

__all__ = ["WARM_UP_CALLS", "Calls", "operator_times"]

Calls = Mapping[tuple[str, str, str], Sequence[float]]
"""Seconds of every call in order, by stage, name and kind of the operator."""

WARM_UP_CALLS = 3
"""First calls of an operator that are left out where there are more: they find caches cold and memory unclaimed."""


def operator_times(calls: Calls) -> tuple[OperatorTime, ...]:
    """Mean and share of every operator, in the order of ``calls``; operators without calls are left out."""
    kept = {key: seconds[WARM_UP_CALLS:] or seconds for key, seconds in calls.items() if seconds}
    totals: defaultdict[str, float] = defaultdict(float)
    for (stage, _, _), seconds in kept.items():
        totals[stage] += sum(seconds)
    return tuple(
        OperatorTime(
            stage=stage,
            name=name,
            kind=kind,
            mean_s=sum(seconds) / len(seconds),
            calls=len(seconds),
            share=sum(seconds) / totals[stage] if totals[stage] else 0.0,
        )
        for (stage, name, kind), seconds in kept.items()
    )
