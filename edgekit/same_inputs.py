"""Stages of several runtimes on the same inputs, those of a reference: how far their outputs lie apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import EdgekitError
from edgekit.interfaces import StageRunner
from edgekit.parity_records import Spread, StageParity, TensorParity
from edgekit.plan import SCORES, Plan, Stage
from edgekit.policy import Policy
from edgekit.progress import Progress, silent
from edgekit.recording import Recording
from edgekit.session import Session

__all__ = ["Differences", "compare_stages"]

KEPT = 16_384
"""Elements of one run of a stage whose differences are kept for the percentiles; evenly spaced where there are more."""

Arrays = Mapping[str, NDArray[Any]]


class Differences:
    """Adds up how far the values of one tensor lie apart."""

    def __init__(self) -> None:
        self._scale = self._largest = 0.0
        self._elements = self._unlike = 0
        self._kept: list[NDArray[np.float64]] = []

    def add(self, reference: NDArray[Any], other: NDArray[Any]) -> None:
        """Two arrays of one shape, of any dtype. NaN equals NaN, and an infinity one of its sign."""
        wide = np.complex128 if reference.dtype.kind == "c" else np.float64
        expected, given = reference.astype(wide).ravel(), other.astype(wide).ravel()
        known = np.isfinite(expected)
        finite = known & np.isfinite(given)
        same = (expected == given) | (np.isnan(expected) & np.isnan(given))
        self._unlike += int((~finite & ~same).sum())
        self._elements += int(finite.sum())
        self._scale = max(self._scale, float(np.abs(expected[known]).max(initial=0)))
        differences = np.abs(expected[finite] - given[finite])
        self._largest = max(self._largest, float(differences.max(initial=0)))
        self._kept.append(differences[:: max(1, math.ceil(len(differences) / KEPT))])

    def spread(self) -> Spread:
        """What was added."""
        kept = np.concatenate([*self._kept, np.zeros(0 if self._elements else 1)])
        median, p99 = np.quantile(kept, (0.5, 0.99))
        return Spread(
            scale=self._scale,
            largest=self._largest,
            median=float(median),
            p99=float(p99),
            elements=self._elements,
            unlike=self._unlike,
        )


class _Stages:
    """Stages of one session, opened once more, each when it is first run. A context manager."""

    def __init__(self, session: Session) -> None:
        self._plan = session.plan
        self._runtime = session.runtime
        self._artifacts = session.artifacts
        self._runners: dict[str, StageRunner] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, stage: Stage, tensors: Arrays) -> dict[str, NDArray[Any]]:
        """The outputs among ``tensors``, computed here from the inputs among them.

        Raises:
            EdgekitError: the stage fails; the message names it.
        """
        rows = _rows(self._plan, tensors)
        outputs = tuple(name for name in stage.outputs if name in tensors)
        try:
            buffers = {name: self._runtime.allocate(self._plan.tensors[name], rows) for name in tensors}
            for name in stage.inputs:
                buffers[name].write(tensors[name])
            self._open(stage).bind(buffers, rows=rows, outputs=outputs)()
            return {name: buffers[name].read(rows) for name in outputs}
        except EdgekitError:
            raise
        except Exception as error:  # a device library raises anything
            line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise EdgekitError(f"stage '{stage.name}' failed in {self._runtime.name} ({line})") from error

    def _open(self, stage: Stage) -> StageRunner:
        if stage.name not in self._runners:
            artifact = self._artifacts[stage.name] if self._runtime.target else Path()
            runner = self._runtime.open(stage, artifact)
            self._stack.callback(runner.close)
            self._runners[stage.name] = runner
        return self._runners[stage.name]


def compare_stages(
    reference: Session,
    others: Mapping[str, Session],
    batches: Sequence[NDArray[Any]],
    *,
    progress: Progress = silent,
) -> dict[str, tuple[StageParity, ...]]:
    """Run samples to the last exit with a reference, and what came to its stages through those of others.

    Gates are open for the rows that they are open for. A stage that nobody came to is left out.

    Args:
        reference: whose inputs every stage gets.
        others: by label, on the same plan.
        batches: model-ready inputs, ``(rows, ...)`` each.
        progress: told how many batches are done.

    Returns:
        By label, the stages in the plan's order.

    Raises:
        EdgekitError: a stage fails.
    """
    plan = reference.plan
    found: dict[str, dict[tuple[str, str], Differences]] = {label: {} for label in others}
    rows = {stage.name: 0 for stage in plan.stages}
    with ExitStack() as stack:
        opened = {label: stack.enter_context(_Stages(session)) for label, session in others.items()}

        def keep(stage: Stage, tensors: dict[str, NDArray[Any]]) -> None:
            wanted = _new(stage, tensors, asked)
            rows[stage.name] += _rows(plan, tensors) if asked == SCORES[0] else 0
            for label, stages in opened.items() if wanted else ():
                made = stages.run(stage, tensors)
                for name in wanted:
                    found[label].setdefault((stage.name, name), Differences()).add(tensors[name], made[name])

        recording = Recording(reference.runtime, keep)
        last = len(plan.exits) - 1
        # A runtime may keep a stage's scores in files of their own, so that not all can be asked for at once.
        asked = SCORES[0]
        session = stack.enter_context(Session(plan, recording, reference.artifacts, target=reference.target))
        for number, asked in enumerate(SCORES):
            session.use(Policy.never(last + 1, score=asked))
            for done, inputs in enumerate(batches):
                session.run(inputs, exit=last)
                progress("compare stages", number * len(batches) + done + 1, len(SCORES) * len(batches))
    return {label: tuple(_told(plan, rows, spreads)) for label, spreads in found.items()}


def _new(stage: Stage, tensors: Arrays, score: str) -> list[str]:
    """Outputs that were not looked at with the scores before this one."""
    outputs = [name for name in stage.outputs if name in tensors]
    return outputs if score == SCORES[0] else [name for name in outputs if name in stage.head[1:]]


def _rows(plan: Plan, tensors: Arrays) -> int:
    return next((len(array) for name, array in tensors.items() if plan.tensors[name].batched), 1)


def _told(plan: Plan, rows: Mapping[str, int], found: Mapping[tuple[str, str], Differences]) -> Iterator[StageParity]:
    for stage in plan.stages:
        tensors = tuple(
            TensorParity(name=name, spread=found[stage.name, name].spread())
            for name in stage.outputs
            if (stage.name, name) in found
        )
        if tensors:
            yield StageParity(name=stage.name, rows=rows[stage.name], tensors=tensors)
