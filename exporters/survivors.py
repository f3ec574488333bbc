"""What every stage is given when the float network runs under a policy: the samples that survive to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.data import Dataset
from edgekit.interfaces import Runtime
from edgekit.plan import Gate, Plan, Stage, Step
from edgekit.policy import Policy
from edgekit.progress import Progress, silent
from edgekit.recording import Recording
from edgekit.session import Session
from edgekit.tensors import BATCH

__all__ = ["BATCH_ROWS", "Given", "closest", "everyone", "given_to"]

BATCH_ROWS = 64
"""Samples at a time."""
HELD_BYTES = 1 << 28
"""Of recorded tensors in memory at once; more are recorded in further runs of the network."""


@dataclass
class Given:
    """Inputs of one stage, as they came.

    Attributes:
        feeds: of one run each, by the stage's own input names: ``(rows, ...)`` where the tensor is batched.
        rows: in all feeds.
        reached: rows that the stage was run on, those beyond the number to keep included.
    """

    feeds: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    rows: int = 0
    reached: int = 0


def given_to(
    stages: Sequence[Stage],
    plan: Plan,
    runtime: Runtime,
    artifacts: Mapping[str, Path],
    *,
    policy: Policy,
    data: Dataset,
    rows: int,
    progress: Progress = silent,
) -> Iterator[tuple[Stage, Given]]:
    """What some stages are given on the data, stage by stage, as many of them recorded at a time as memory allows.

    Args:
        stages: to record, in any order.
        plan: that is run; see :func:`everyone`.
        runtime: of the float artifacts.
        artifacts: each stage's file, by name.
        policy: that decides who leaves.
        data: samples, in an order that is none: the first to come are kept.
        rows: to keep of a stage at most.
        progress: told how many samples are done.

    Raises:
        InputError: the samples do not fit the network.
    """
    for some in _together(stages, plan, rows):
        kept = {stage.name: Given() for stage in some}

        def keep(stage: Stage, tensors: dict[str, NDArray[Any]], kept: dict[str, Given] = kept) -> None:
            if stage.name in kept:
                _add(kept[stage.name], stage, tensors, plan, rows)

        with Session(plan, Recording(runtime, keep), artifacts, policy=policy) as session:
            for done, inputs in enumerate(data.batches(BATCH_ROWS)):
                session.run(inputs)
                progress("record what stages are given", min((done + 1) * BATCH_ROWS, len(data)), len(data))
        for stage in some:
            yield stage, kept.pop(stage.name)


def closest(
    plan: Plan, runtime: Runtime, artifacts: Mapping[str, Path], *, policy: Policy, data: Dataset, rows: int
) -> Dataset:
    """The samples that survive longest, then those that left with the least score: what is next to survive."""
    with Session(plan, runtime, artifacts, policy=policy) as session:
        results = [session.run(inputs) for inputs in data.batches(BATCH_ROWS)]
    exits = np.concatenate([each.exit for each in results])
    scores = np.concatenate([each.score for each in results])
    return data.take(np.lexsort((scores, -exits))[:rows])


def everyone(plan: Plan, policy: Policy) -> tuple[Plan, Policy]:
    """A plan and a policy under which every sample reaches every stage, as in a static graph with masks.

    Gates decide what is taken, as they did, but both ways are run for all.
    """
    never = Policy.fixed(
        [math.inf] * len(policy.thresholds),
        temperatures=policy.temperatures,
        constants=policy.constants,
        name="never-exit",
    )
    return msgspec.structs.replace(plan, steps=tuple(map(_whole, plan.steps))), never


def _whole(step: Step) -> Step:
    if not isinstance(step, Gate):
        return step
    ways = {"steps": tuple(map(_whole, step.steps)), "otherwise": tuple(map(_whole, step.otherwise))}
    return msgspec.structs.replace(step, whole=True, **ways)


def _together(stages: Sequence[Stage], plan: Plan, rows: int) -> Iterator[list[Stage]]:
    """Stages whose inputs fit into memory together."""
    some: list[Stage] = []
    held = 0
    for stage in stages:
        size = rows * sum(plan.tensors[name].row_bytes for name in stage.inputs)
        if some and held + size > HELD_BYTES:
            yield some
            some, held = [], 0
        some.append(stage)
        held += size
    if some:
        yield some


def _add(given: Given, stage: Stage, tensors: Mapping[str, NDArray[Any]], plan: Plan, limit: int) -> None:
    inputs = {name: tensors[name] for name in stage.inputs}
    batched = [name for name in inputs if plan.tensors[name].shape[:1] == (BATCH,)]
    count = len(inputs[batched[0]]) if batched else 1
    given.reached += count
    taken = min(count, limit - given.rows)
    if taken <= 0:
        return
    # A copy where it is cut, so that the rest can go.
    given.feeds.append({name: each[:taken].copy() if name in batched else each for name, each in inputs.items()})
    given.rows += taken
