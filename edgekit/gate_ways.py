"""Which way a sample takes through every gate, told by the gates' values, whatever runtime computes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.plan import ZERO, Gate, Run, Stage, Step
from edgekit.policy import Policy
from edgekit.recording import Recording
from edgekit.route import asked_of
from edgekit.session import Session

__all__ = ["GateWays"]

Call = tuple[Stage, dict[str, NDArray[Any]]]


class GateWays:
    """Runs single samples to the last exit and follows them through the plan. A context manager.

    Args:
        session: open; its stages are opened once more.
        constants: of gates, where they are not as trained.

    Raises:
        PolicyError: the network has no such constant.
    """

    def __init__(self, session: Session, constants: Mapping[str, float]) -> None:
        self._plan = session.plan
        self._calls: list[Call] = []
        self._stages = {stage.name: stage for stage in self._plan.stages}
        last = self._plan.exits[-1]
        policy = Policy.fixed([math.inf] * (len(self._plan.exits) - 1), constants=constants)
        self._asked = asked_of(self._plan) | {last.logits, last.scores[policy.score]}
        recording = Recording(session.runtime, lambda stage, tensors: self._calls.append((stage, tensors)))
        self._session = Session(self._plan, recording, session.artifacts, policy=policy, target=session.target)

    def __enter__(self) -> GateWays:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def of(self, sample: NDArray[Any]) -> tuple[dict[str, bool], int]:
        """Whether each gate that it came to was open, by name, and the class that is largest at the last exit.

        Args:
            sample: ``(1, ...)``, the network's only input.
        """
        self._calls.clear()
        answer = int(self._session.run(sample).logits[0].argmax())
        ways: dict[str, bool] = {}
        self._follow(self._plan.steps, iter(self._calls), {self._plan.inputs[0].name: sample, ZERO: np.zeros(1)}, ways)
        return ways, answer

    def _follow(
        self, steps: Sequence[Step], calls: Iterator[Call], values: dict[str, NDArray[Any]], ways: dict[str, bool]
    ) -> None:
        """Do the steps again with what the stages made; adds to ``values`` and ``ways``."""
        for step in steps:
            if isinstance(step, Run):
                expected = self._stages[step.stage]
                if self._asked.isdisjoint(step.called(expected.outputs)):
                    continue  # nothing reads what it makes, so it did not run
                stage, made = next(calls)
                assert stage is expected
                called = zip(step.called(stage.outputs), stage.outputs, strict=True)
                values.update({name: made[inside] for name, inside in called if inside in made})
            elif isinstance(step, Gate):
                is_open = bool(values[step.value].reshape(-1)[0] != 0)
                ways[step.name] = is_open
                self._follow(step.steps if is_open else step.otherwise, calls, values, ways)
                given = {name: sources[0 if is_open else 1] for name, sources in step.outputs.items()}
                values.update({name: values[source] for name, source in given.items() if source in values})
