"""A plan as hops: what is run up to each decision, what is asked of it, and what is still needed after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.plan import Exit, Plan, Run

__all__ = ["Hop", "hops", "read_by"]


@dataclass(frozen=True)
class Hop:
    """What is run up to a decision, and the decision.

    Attributes:
        stages: each with the outputs asked of it.
        exit: index of the exit that decides.
        logits: name of its logits.
        score: name of its score.
        threshold: NaN lets no row leave, and costs what any other threshold does.
        live: tensors with a row per sample that are read after this hop.
    """

    stages: tuple[tuple[str, tuple[str, ...]], ...]
    exit: int
    logits: str
    score: str
    threshold: np.float32
    live: tuple[str, ...]


def hops(plan: Plan, score: str, deciding: Mapping[int, float]) -> tuple[Hop, ...]:
    """The steps up to the last deciding exit, cut at the deciding exits.

    Stages are asked for what any later stage reads, whether or not the route gets there: a row that leaves has paid
    for it.
    """
    read_at_exits = {
        plan.steps.index(plan.exits[index]): {plan.exits[index].logits, plan.exits[index].scores[score]}
        for index in deciding
    }
    needed = read_by(plan.steps, plan).union(*read_at_exits.values())
    made = {spec.name for spec in plan.inputs}
    route: list[Hop] = []
    stages: list[tuple[str, tuple[str, ...]]] = []
    index = -1
    for position, step in enumerate(plan.steps):
        if isinstance(step, Run):
            outputs = plan.stage(step.stage).outputs
            asked = tuple(name for name in outputs if name in needed)
            if asked:  # nothing is asked of a mere head whose exit is never taken
                stages.append((step.stage, asked))
            made.update(outputs)
            continue
        index += 1
        if index not in deciding:
            continue
        later = read_by(plan.steps[position:], plan)
        later = later.union(*(names for at, names in read_at_exits.items() if at > position))
        live = tuple(sorted(name for name in later & made if plan.tensors[name].batched))
        route.append(Hop(tuple(stages), index, step.logits, step.scores[score], np.float32(deciding[index]), live))
        stages = []
        if index == max(deciding):
            break
    return tuple(route)


def read_by(steps: Sequence[Run | Exit], plan: Plan) -> set[str]:
    """Tensors that the stages run in these steps read."""
    return {name for step in steps if isinstance(step, Run) for name in plan.stage(step.stage).inputs}
