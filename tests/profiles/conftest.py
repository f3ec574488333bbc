"""A network whose every stage takes a known time on a clock that only it moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from edgekit.data import Dataset
from edgekit.measured import MeterFacts
from edgekit.plan import SCORES, Exit, Plan, Run, Stage
from edgekit.policy import Policy
from edgekit.profiles import Reading
from edgekit.runtimes.fake import FakeRuntime
from edgekit.session import Session
from edgekit.tensors import TensorSpec

STAGE_NS = (1_000_000, 2_000_000, 4_000_000)


class VirtualClock:
    """Nanoseconds that pass only when something is said to take time; what is repeated meanwhile gets its turns."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._repeated: list[list] = []
        self._random = np.random.default_rng(0)

    def __call__(self) -> int:
        return self._now_ns

    @property
    def now_ns(self) -> int:
        return self._now_ns

    @now_ns.setter
    def now_ns(self, end_ns: int) -> None:
        while self._repeated and (turn := min(self._repeated, key=lambda each: each[0]))[0] <= end_ns:
            self._now_ns = begin_ns = max(turn[0], self._now_ns)
            turn[0] = begin_ns + round(turn[1] * self._random.uniform(0.5, 1.5) * 1e9)
            turn[2]()
            end_ns += self._now_ns - begin_ns  # what the turn takes, it takes from who works
        self._now_ns = end_ns

    def pass_s(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)

    @contextmanager
    def repeat(self, work, every_s):
        """As :func:`edgekit.profiles.recorder.in_background`, in this clock's time."""
        turn = [self._now_ns + round(every_s * 1e9), every_s, work]
        self._repeated.append(turn)
        try:
            yield
        finally:
            self._repeated = [each for each in self._repeated if each is not turn]


class ScriptedMeter:
    """Joules or watts as any function of the time in seconds."""

    name = "scripted"

    def __init__(self, value, clock, *, quantity="energy", **facts) -> None:
        self.value = value
        self.clock = clock
        self.told = MeterFacts(
            **{"name": "scripted", "quantity": quantity, "scope": "board", "covers": "everything", **facts}
        )
        self.is_open = False

    def unavailable(self):
        return None

    def facts(self):
        return self.told

    def open(self):
        self.is_open = True

    def read(self):
        assert self.is_open
        return Reading(time_ns=self.clock(), value=self.value(self.clock() * 1e-9))

    def close(self):
        self.is_open = False


def three_exits() -> Plan:
    """Three stages, an exit after each; ``x`` holds ``(score at exit 0, at 1, at 2, class)``."""
    tensors = {"x": TensorSpec("x", "float32", ("batch", 4))}
    stages: list[Stage] = []
    steps: list[Run | Exit] = []
    for index in range(3):
        scores = {score: f"{score}{index}" for score in SCORES}
        logits, temperature = f"logits{index}", f"temperature{index}"
        tensors |= {name: TensorSpec(name, "float32", ("batch",)) for name in scores.values()}
        tensors[logits] = TensorSpec(logits, "float32", ("batch", 3))
        tensors[temperature] = TensorSpec(temperature, "float32", ())
        stages.append(
            Stage(
                name=f"stage{index}",
                inputs=("x", temperature),
                outputs=(logits, *scores.values()),
                macs=10 * (index + 1),
                weight_bytes=0,
            )
        )
        steps += [
            Run(f"stage{index}"),
            Exit(name=f"exit{index}", logits=logits, temperature=temperature, scores=scores),
        ]
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=tuple(stages), steps=tuple(steps))


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def handler(clock: VirtualClock):
    """Exit ``k`` answers class ``x[3]`` when ``x[k] >= 0.5``, else class 2."""

    def handle(stage: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        index = int(stage[-1])
        clock.now_ns += STAGE_NS[index]
        x = tensors["x"]
        answers = np.where(x[:, index] >= 0.5, x[:, 3], 2).astype(int)
        score = x[:, index].copy()
        return {f"logits{index}": np.eye(3, dtype=np.float32)[answers], **{f"{name}{index}": score for name in SCORES}}

    return handle


@pytest.fixture
def session(handler) -> Iterator[Session]:
    with Session(three_exits(), FakeRuntime(handler), {}, policy=Policy.fixed([0.5, 0.5])) as opened:
        yield opened


@pytest.fixture
def data() -> Dataset:
    """40 samples: 20 leave at exit 0, 10 at exit 1, 10 at exit 2 of which 5 are wrong; class 0 and 1 by turns."""
    scores = np.zeros((40, 3), dtype=np.float32)
    scores[:20] = 1.0
    scores[20:30, 1:] = 1.0
    scores[30:35, 2] = 1.0
    labels = np.arange(40) % 2
    return Dataset(inputs=np.column_stack([scores, labels]).astype(np.float32), labels=labels, source="made up")


@pytest.fixture
def empty_root(tmp_path: Path) -> Path:
    """A machine that tells nothing."""
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def scripted_meter():
    """Makes one of a function of the time."""
    return ScriptedMeter
