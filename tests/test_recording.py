"""What a recording shows, on a scripted runtime: every run, its rows, and nothing that was not asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.plan import SCORES, Exit, Plan, Run, Stage
from edgekit.policy import Policy
from edgekit.recording import Recording
from edgekit.runtimes.fake import FakeRuntime
from edgekit.session import Session
from edgekit.tensors import TensorSpec


@pytest.fixture
def plan():
    """``double`` runs twice, on the input and on what it made; then an exit that could leave, and the last one."""
    tensors = {name: TensorSpec(name, "float32", ("batch", 1)) for name in ("x", "a", "b")}
    exits, heads = [], []
    for index in range(2):
        scores = {score: f"{score}{index}" for score in SCORES}
        exits.append(Exit(name=f"e{index}", logits=f"l{index}", temperature=f"t{index}", scores=scores))
        tensors[f"l{index}"] = TensorSpec(f"l{index}", "float32", ("batch", 2))
        tensors[f"t{index}"] = TensorSpec(f"t{index}", "float32", ())
        tensors |= {name: TensorSpec(name, "float32", ("batch",)) for name in scores.values()}
        inputs, outputs = ("b", f"t{index}"), (f"l{index}", *scores.values())
        heads.append(Stage(name=f"head{index}", inputs=inputs, outputs=outputs, macs=1, weight_bytes=0))
    double = Stage(name="double", inputs=("x",), outputs=("a",), macs=1, weight_bytes=0, exit=False)
    steps = (Run("double"), Run("double", {"x": "a", "a": "b"}), Run("head0"), exits[0], Run("head1"), exits[1])
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=(double, *heads), steps=steps)


def handle(stage, inputs):
    if stage == "double":
        return {"a": inputs["x"] * 2}
    b, index = inputs["b"][:, 0], stage[-1]
    made = {f"{score}{index}": b + place for place, score in enumerate(SCORES)}
    return {f"l{index}": np.stack([b, -b], 1), **made}


@pytest.fixture
def shown(plan):
    """A session on a recording of the scripted runtime, and what the recording has shown."""
    calls = []
    recording = Recording(FakeRuntime(handle), lambda stage, tensors: calls.append((stage.name, tensors)))
    with Session(plan, recording, {}, policy=Policy.fixed([10.0], temperatures=[3.0, 1.0])) as session:
        yield session, calls


def listed(calls):
    return [(name, {key: value.tolist() for key, value in tensors.items()}) for name, tensors in calls]


def test_every_run_with_its_rows_and_what_was_asked_for(shown):
    session, calls = shown
    result = session.run(np.array([[1], [3], [2]], np.float32))
    assert result.exit.tolist() == [1, 0, 1]
    assert listed(calls) == [
        ("double", {"x": [[1], [3], [2]], "a": [[2], [6], [4]]}),
        ("double", {"x": [[2], [6], [4]], "a": [[4], [12], [8]]}),
        ("head0", {"b": [[4], [12], [8]], "t0": 3.0, "l0": [[4, -4], [12, -12], [8, -8]], "max_prob0": [4, 12, 8]}),
        ("head1", {"b": [[4], [8]], "t1": 1.0, "l1": [[4, -4], [8, -8]], "max_prob1": [4, 8]}),
    ]


def test_what_was_shown_stays_as_it_was(shown):
    session, calls = shown
    session.run(np.array([[1]], np.float32))
    before = listed(calls)
    session.run(np.array([[5]], np.float32))
    assert listed(calls)[: len(before)] == before
    assert calls[4][1]["x"].tolist() == [[5]]


def test_answers_are_those_of_the_runtime_itself(plan, shown):
    session, _ = shown
    x = np.random.default_rng(0).uniform(0, 5, (9, 1)).astype(np.float32)
    with Session(plan, FakeRuntime(handle), {}, policy=session.policy) as plain:
        expected, found = plain.run(x), session.run(x)
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.exit, expected.exit)
    assert found.executed == expected.executed


def test_it_passes_for_the_runtime(plan):
    runtime = FakeRuntime(handle)
    recording = Recording(runtime, lambda stage, tensors: None)
    assert (recording.name, recording.target, recording.describe()) == ("fake", "", runtime.describe())
    recording.close()
    assert recording.open(plan.stages[0], Path()) is not recording.open(plan.stages[0], Path())


def test_what_it_is_told_to_keep_may_stop_the_run(plan):
    def refuse(stage, tensors):
        raise EdgekitError(f"enough of {stage.name}")

    with (
        Session(plan, Recording(FakeRuntime(handle), refuse), {}) as session,
        pytest.raises(EdgekitError, match="enough of double"),
    ):
        session.run(np.ones((1, 1), np.float32))
