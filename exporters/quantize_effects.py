"""What lower precision does to answers, ways and times, on samples that were held out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.data import Dataset
from edgekit.interfaces import Runtime
from edgekit.plan import SCORES, Plan, Stage
from edgekit.policy import Policy
from edgekit.progress import Progress, silent
from edgekit.session import Session

__all__ = ["Effect", "HeldOut", "stage_times"]

ROUNDS, TURN = 24, 4
"""Turns of each of two files of a stage, and timed runs in a turn."""
TIMED, REPEATS = 100, 5
"""Samples on which the whole network is timed, and how often each is run."""

Artifacts = Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Of a set of artifacts against the float one. See :class:`edgekit.precision.PrecisionReport`."""

    drop: float
    flips: int
    changed: int
    largest_difference: float | None
    mean_difference: float | None


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """Of each row: logits where it left, that exit, and which stages ran how often."""

    logits: NDArray[np.float32]
    exits: NDArray[np.int64]
    ways: list[tuple[int, ...]]

    @property
    def predictions(self) -> NDArray[np.int64]:
        return self.logits.argmax(axis=1)


class HeldOut:
    """Samples held out, and what the float artifacts say of them; row by row, so that every row tells its way.

    Args:
        plan: stages and steps.
        runtime: of the artifacts.
        artifacts: the float ones.
        policy: the same for all that is compared.
        data: the samples.
        progress: told how many were run.
    """

    def __init__(
        self,
        plan: Plan,
        runtime: Runtime,
        artifacts: Artifacts,
        *,
        policy: Policy,
        data: Dataset,
        progress: Progress = silent,
    ) -> None:
        self.data = data
        self._plan = plan
        self._runtime = runtime
        self._artifacts = dict(artifacts)
        self._policy = policy
        self._progress = progress
        self._float = self._run(self._artifacts, np.arange(len(data)), "float")

    @property
    def float_accuracy(self) -> float | None:
        """Share of right answers, where there are labels."""
        return None if self.data.labels is None else float((self._float.predictions == self.data.labels).mean())

    @property
    def float_exits(self) -> tuple[float, ...]:
        """Share that left at each exit."""
        return self._shares(self._float.exits)

    def alone(self, stage: Stage, artifact: Path) -> Effect:
        """One stage replaced; rows that never came to it are not run again, since nothing changes for them."""
        place = [each.name for each in self._plan.stages].index(stage.name)
        rows = np.array([row for row, way in enumerate(self._float.ways) if way[place]], dtype=np.intp)
        found = self._run({**self._artifacts, stage.name: artifact}, rows, f"{stage.name} alone")
        return self._effect(rows, found)

    def whole(self, artifacts: Artifacts) -> tuple[Effect, tuple[float, ...]]:
        """A whole set; also the share of samples that leave at each exit."""
        rows = np.arange(len(self.data))
        found = self._run(artifacts, rows, "the set")
        return self._effect(rows, found), self._shares(found.exits)

    def times(self, artifacts: Artifacts) -> tuple[float, float]:
        """Mean seconds of one sample under the policy, in float and with a set, in turn."""
        inputs = [self.data.batch(slice(row, row + 1)) for row in range(min(TIMED, len(self.data)))]
        spent = np.empty((2, len(inputs), REPEATS))
        with self._session(self._artifacts) as one, self._session(artifacts) as other:
            for place, each in enumerate(inputs):
                for repeat in range(-1, REPEATS):  # the first time, a stage may have to be opened
                    for variant, session in enumerate((one, other)):
                        begin = time.perf_counter_ns()
                        session.run(each)
                        spent[variant, place, repeat] = time.perf_counter_ns() - begin
        float_s, time_s = (np.median(spent, axis=2).mean(axis=1) / 1e9).tolist()
        return float_s, time_s

    def _session(self, artifacts: Artifacts) -> Session:
        return Session(self._plan, self._runtime, artifacts, policy=self._policy)

    def _run(self, artifacts: Artifacts, rows: NDArray[np.intp], what: str) -> _Answers:
        logits = np.empty((len(rows), self._plan.classes), dtype=np.float32)
        exits = np.empty(len(rows), dtype=np.int64)
        ways = []
        with self._session(artifacts) as session:
            for place, row in enumerate(rows.tolist()):
                result = session.run(self.data.batch(slice(row, row + 1)))
                logits[place], exits[place] = result.logits[0], result.exit[0]
                ways.append(tuple(result.executed[stage.name] for stage in self._plan.stages))
                self._progress(f"run {what}", place + 1, len(rows))
        return _Answers(logits=logits, exits=exits, ways=ways)

    def _effect(self, rows: NDArray[np.intp], found: _Answers) -> Effect:
        before, after = self._float.predictions[rows], found.predictions
        same = np.array(
            [
                way == self._float.ways[row] and exit_ == self._float.exits[row]
                for row, way, exit_ in zip(rows.tolist(), found.ways, found.exits.tolist(), strict=True)
            ],
            dtype=np.bool_,
        )
        differences = np.abs(found.logits - self._float.logits[rows])[same]
        changed = int((before != after).sum())
        lost = float(changed)
        if self.data.labels is not None:
            labels = self.data.labels[rows]
            lost = float((before == labels).sum() - (after == labels).sum())
        return Effect(
            drop=lost / len(self.data),
            flips=int((~same).sum()),
            changed=changed,
            largest_difference=float(differences.max()) if differences.size else None,
            mean_difference=float(differences.mean()) if differences.size else None,
        )

    def _shares(self, exits: NDArray[np.int64]) -> tuple[float, ...]:
        counts = np.bincount(exits, minlength=len(self._plan.exits))
        return tuple((counts / len(exits)).tolist())


def stage_times(
    stage: Stage,
    files: tuple[Path, Path],
    feed: Mapping[str, NDArray[Any]],
    *,
    plan: Plan,
    runtime: Runtime,
    score: str,
) -> tuple[float, float]:
    """Median seconds of one run of a stage on one row, of two files in turn.

    Args:
        stage: of both.
        files: its artifacts.
        feed: its inputs; the first row is taken.
        plan: that knows the tensors.
        runtime: that opens them.
        score: that is asked for; one that no stage computes is not.
    """
    head = dict(zip(("logits", *SCORES), stage.head, strict=False))
    outputs = (*stage.live, *(head[name] for name in ("logits", score) if name in head))
    buffers = {name: runtime.allocate(plan.tensors[name], 1) for name in (*stage.inputs, *outputs)}
    for name in stage.inputs:
        buffers[name].write(feed[name][:1] if plan.tensors[name].batched else feed[name])
    runners = [runtime.open(stage, file) for file in files]
    try:
        runs = [runner.bind(buffers, rows=1, outputs=outputs) for runner in runners]
        first, second = _in_turn(runs[0], runs[1])
    finally:
        for runner in runners:
            runner.close()
    return first, second


def _in_turn(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    spent: tuple[list[int], list[int]] = ([], [])
    for _ in range(ROUNDS):
        for run, kept in zip((first, second), spent, strict=True):
            for number in range(1 + TURN):
                begin = time.perf_counter_ns()
                run()
                if number:  # a stage is followed by itself, not by another that emptied the caches
                    kept.append(time.perf_counter_ns() - begin)
    return float(np.median(spent[0])) / 1e9, float(np.median(spent[1])) / 1e9
