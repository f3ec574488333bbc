"""A network whose every logit is scripted: stage ``k`` looks a sample up by its index and answers ``logits[k]``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from edgekit.data import Dataset
from edgekit.plan import SCORES, Exit, Plan, Run, Stage
from edgekit.runtimes.fake import FakeRuntime
from edgekit.session import Session
from edgekit.tensors import TensorSpec

ScriptedSession = Callable[..., Session]


def plan_of(exits: int, classes: int, *, macs: tuple[int | None, ...] | None = None) -> Plan:
    tensors = {"x": TensorSpec("x", "float32", ("batch", 1))}
    stages, steps = [], []
    for index in range(exits):
        exit_name, stage_name = f"exit{index}", f"stage{index}"
        scores = {name: f"{exit_name}.{name}" for name in SCORES}
        temperature, logits = f"{exit_name}.temperature", f"{exit_name}.logits"
        tensors[temperature] = TensorSpec(temperature, "float32", ())
        tensors[logits] = TensorSpec(logits, "float32", ("batch", classes))
        tensors.update({name: TensorSpec(name, "float32", ("batch",)) for name in scores.values()})
        stages.append(
            Stage(
                name=stage_name,
                inputs=("x", temperature),
                outputs=(logits, *scores.values()),
                macs=10 if macs is None else macs[index],
                weight_bytes=0,
            )
        )
        steps += [Run(stage_name), Exit(name=exit_name, logits=logits, temperature=temperature, scores=scores)]
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=tuple(stages), steps=tuple(steps))


def reference_scores(logits: NDArray[np.float32], temperature: float) -> dict[str, NDArray[np.float32]]:
    """Scores by scipy, in float32 as a stage has them."""
    scaled = logits / np.float32(temperature)
    probabilities = softmax(scaled, axis=-1)
    top = np.sort(probabilities, axis=-1)
    with np.errstate(invalid="ignore"):
        terms = probabilities * log_softmax(scaled, axis=-1)
    return {"max_prob": top[..., -1], "margin": top[..., -1] - top[..., -2], "neg_entropy": terms.sum(axis=-1)}


@pytest.fixture
def scripted_session() -> ScriptedSession:
    """Makes a session from ``logits (exits, samples, classes) float32``."""

    def make(logits: NDArray[np.float32], *, macs: tuple[int | None, ...] | None = None) -> Session:
        def handler(stage, inputs):
            index = int(stage.removeprefix("stage"))
            rows = logits[index][inputs["x"][:, 0].astype(int)]
            temperature = float(inputs[f"exit{index}.temperature"])
            scores = reference_scores(rows, temperature)
            return {
                f"exit{index}.logits": rows,
                **{f"exit{index}.{name}": values.astype(np.float32) for name, values in scores.items()},
            }

        plan = plan_of(logits.shape[0], logits.shape[2], macs=macs)
        return Session(plan, FakeRuntime(handler), {})

    return make


@pytest.fixture
def indexed_data() -> Callable[[NDArray[np.int64] | None, int], Dataset]:
    """A data set of the samples' indices, which the scripted session looks up."""

    def make(labels: NDArray[np.int64] | None, samples: int) -> Dataset:
        return Dataset(inputs=np.arange(samples, dtype=np.float32)[:, None], labels=labels, source="scripted")

    return make


@pytest.fixture
def noisy_network() -> Callable[..., tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Makes logits of exits that get better with depth, and labels."""

    def make(exits: int = 3, samples: int = 300, *, classes: int = 4, seed: int = 0):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, classes, samples)
        noise = rng.normal(size=(samples, classes))
        logits = []
        for strength in np.linspace(1.0, 2.5, exits):
            own = rng.normal(size=(samples, classes))
            logits.append(strength * 2 * np.eye(classes)[labels] + noise + 0.7 * own)
        return np.asarray(logits, dtype=np.float32), labels.astype(np.int64)

    return make
