"""The constant that a gate compares its score with, in a path, a test and a certificate."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.calibration import calibrate_certified, propose
from edgekit.data import Dataset
from edgekit.errors import CalibrationError
from edgekit.plan import SCORES, Constant, Exit, Gate, Plan, Run, Stage
from edgekit.policy import Policy
from edgekit.runtimes.fake import FakeRuntime
from edgekit.session import Session
from edgekit.tensors import TensorSpec

CLASSES = 4


def gated_session():
    """A block is run where the input's second number is above a constant; without it, the easy answer is given.

    An input is ``(label of the block, score, easy label)``.
    """
    scores = {name: f"exit.{name}" for name in SCORES}
    tensors = {
        "x": TensorSpec("x", "float32", ("batch", 3)),
        "block.constant": TensorSpec("block.constant", "float32", ()),
        "ask/gt": TensorSpec("ask/gt", "bool", ("batch",)),
        "ask/easy": TensorSpec("ask/easy", "float32", ("batch", CLASSES)),
        "block/hard": TensorSpec("block/hard", "float32", ("batch", CLASSES)),
        "block/out": TensorSpec("block/out", "float32", ("batch", CLASSES)),
        "exit.temperature": TensorSpec("exit.temperature", "float32", ()),
        "exit.logits": TensorSpec("exit.logits", "float32", ("batch", CLASSES)),
        **{name: TensorSpec(name, "float32", ("batch",)) for name in scores.values()},
    }
    stages = (
        Stage(
            name="ask", inputs=("x", "block.constant"), outputs=("ask/gt", "ask/easy"), macs=10, weight_bytes=0,
            exit=False,
        ),
        Stage(name="block", inputs=("x",), outputs=("block/hard",), macs=100, weight_bytes=0, exit=False),
        Stage(
            name="head", inputs=("block/out", "exit.temperature"), outputs=("exit.logits", *scores.values()), macs=10,
            weight_bytes=0,
        ),
    )  # fmt: skip
    gate = Gate(name="block", value="ask/gt", steps=(Run("block"),), outputs={"block/out": ("block/hard", "ask/easy")})
    last = Exit(name="exit", logits="exit.logits", temperature="exit.temperature", scores=scores)
    plan = Plan(
        inputs=(tensors["x"],), tensors=tensors, stages=stages, steps=(Run("ask"), gate, Run("head"), last),
        constants=(Constant(name="block", tensor="block.constant", comparison=">", value=0.5, gates=("block",)),),
    )  # fmt: skip

    def answer(labels):
        return np.eye(CLASSES, dtype=np.float32)[labels.astype(int)]

    def handler(stage, inputs):
        if stage == "ask":
            return {"ask/gt": inputs["x"][:, 1] > inputs["block.constant"], "ask/easy": answer(inputs["x"][:, 2])}
        if stage == "block":
            return {"block/hard": answer(inputs["x"][:, 0])}
        rows = inputs["block/out"]
        return {"exit.logits": rows, **{name: rows.max(axis=1) for name in scores.values()}}

    return Session(plan, FakeRuntime(handler), {})


def samples(count, seed):
    """The lower the score, the more often the easy answer is right."""
    rng = np.random.default_rng(seed)
    labels, score = rng.integers(0, CLASSES, count), rng.uniform(0.3, 0.9, count).astype(np.float32)
    wrong = rng.random(count) < np.maximum(score - 0.5, 0)
    easy = np.where(wrong, (labels + 1) % CLASSES, labels)
    inputs = np.stack([labels, score, easy], axis=1).astype(np.float32)
    return Dataset(inputs=inputs, labels=labels.astype(np.int64), source="scripted")


def test_a_moved_constant_is_certified_as_it_runs():
    """Fewer blocks run, and what that loses against the trained constant is tested and bounded."""
    session, device = gated_session(), samples(2000, 1)
    proposal = propose(session, samples(2000, 0))
    assert {tuple(policy.constants) for policy in proposal.policies} == {(), ("block",)}
    policy = calibrate_certified(session, device, epsilon=0.02, delta=0.1, proposal=proposal)
    found = policy.provenance.certificate
    assert policy.constants["block"] > 0.5
    moved = session.run(device.inputs)
    assert (found.p_value <= 0.1, found.mean_loss <= 0.02) == (True, True)
    right = (moved.logits.argmax(axis=1) == device.labels).mean()
    with Session(session.plan, session.runtime, {}, policy=Policy.never(1)) as trained:
        before = trained.run(device.inputs)
    assert found.mean_loss == pytest.approx((before.logits.argmax(axis=1) == device.labels).mean() - right)
    assert moved.executed["block"] < before.executed["block"]
    assert policy.provenance.results["as_predicted"] == 1.0
    assert policy.provenance.results["expected_cost"] < policy.provenance.results["cost_of_last_exit"]


def test_what_tests_has_no_part_in_what_constants_cost():
    """The tested half has all scores low, so that other constants would look cheap on it."""
    from edgekit.calibration.certified import halves

    data = samples(1200, 2)
    other = data.inputs.copy()
    other[halves(1200, 5)[1], 1] = 0.31
    paths = [
        calibrate_certified(
            gated_session(),
            Dataset(inputs=inputs, labels=data.labels, source="scripted"),
            epsilon=0.02,
            delta=0.1,
            seed=5,
        ).provenance.tradeoff.points
        for inputs in (data.inputs, other)
    ]
    assert [point.constants for point in paths[0]] == [point.constants for point in paths[1]]
    assert [point.macs for point in paths[0]] != [point.macs for point in paths[1]]


def test_nobody_leaves_a_network_of_one_exit_early():
    session = gated_session()
    proposal = propose(session, samples(500, 0))
    with pytest.raises(CalibrationError, match="one exit: nobody leaves early"):
        calibrate_certified(session, samples(500, 1), epsilon=0.02, delta=0.1, conditional=True, proposal=proposal)
