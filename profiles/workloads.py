"""What is run over and over: every forced exit, paths through gates, and the stream that the policy makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from edgekit.errors import MeasurementError
from edgekit.plan import Exit, Gate, Plan, Run, Step

__all__ = ["STREAM", "Workload", "path_macs", "workloads"]

STREAM = "stream"
MOST_GATES = 64
"""Gates that are closed one by one; of more, all open and all closed are measured alone."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Something that one inference can be made to do.

    Attributes:
        name: of the exit or the path, or :data:`STREAM`.
        kind: what it is.
        exit: forced; ``None`` leaves it to the policy.
        gates: forced outcomes by name; the others are the network's own.
    """

    name: str
    kind: Literal["exit", "path", "stream"]
    exit: int | None = None
    gates: Mapping[str, bool] = field(default_factory=dict, hash=False)

    @property
    def metered(self) -> bool:
        """Whether windows of energy are taken of it: not where one gate is closed alone, which would take too long."""
        return len(set(self.gates.values())) < 2


def workloads(plan: Plan) -> tuple[Workload, ...]:
    """Exits in order, then paths through gates to the last exit, then the stream.

    Of a network with gates: all open, all closed, and each closed alone, so that what it guards is the difference.

    Raises:
        MeasurementError: an exit is called like something else that is measured.
    """
    exits = [Workload(name=step.name, kind="exit", exit=index) for index, step in enumerate(plan.exits)]
    last, names = len(plan.exits) - 1, [gate.name for gate in plan.gates]
    ways: dict[str, dict[str, bool]] = {}
    if names:
        opened = dict.fromkeys(names, True)
        ways = {"all gates open": opened, "all gates closed": dict.fromkeys(names, False)}
        if 1 < len(names) <= MOST_GATES:
            ways |= {f"without {name}": opened | {name: False} for name in names}
    clashing = [work.name for work in exits if work.name in {STREAM, *ways} or work.name.startswith(f"{STREAM} at ")]
    if clashing:
        raise MeasurementError(
            f"an exit is called '{clashing[0]}', as something else that is measured; rename it and export again"
        )
    paths = [Workload(name=name, kind="path", exit=last, gates=gates) for name, gates in ways.items()]
    return (*exits, *paths, Workload(name=STREAM, kind="stream"))


def path_macs(plan: Plan, gates: Mapping[str, bool]) -> int | None:
    """MACs of one sample through these outcomes to the last exit; ``None`` when a stage's could not be counted."""

    def of(steps: tuple[Step, ...]) -> int | None:
        total = 0
        for step in steps:
            if isinstance(step, Exit):
                continue
            if isinstance(step, Run):
                found = plan.stage(step.stage).macs
            else:
                assert isinstance(step, Gate)
                found = of(step.steps if gates[step.name] else step.otherwise)
            if found is None:
                return None
            total += found
        return total

    return of(plan.steps)
