"""Parity on scripted runtimes with known differences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest

from edgekit.calibration.scores import score
from edgekit.data import Dataset
from edgekit.errors import InputError, MeasurementError, PolicyError
from edgekit.gate_ways import GateWays
from edgekit.parity import compare_runtimes, quantile_policies
from edgekit.parity_records import Budget, Count, Parity
from edgekit.plan import SCORES, Constant, Exit, Gate, Plan, Run, Stage
from edgekit.policy import Policy, Provenance
from edgekit.runtimes.fake import FakeRuntime
from edgekit.session import Session
from edgekit.tensors import TensorSpec

NAN, INF = math.nan, math.inf


def exit_of(index, tensors, batch="batch", classes=2):
    """An exit and its tensors, and the names that its stage makes for it."""
    scores = {name: f"{name}:{index}" for name in SCORES}
    step = Exit(name=f"e{index}", logits=f"logits:{index}", temperature=f"t:{index}", scores=scores)
    tensors[step.logits] = TensorSpec(step.logits, "float32", (batch, classes))
    tensors[step.temperature] = TensorSpec(step.temperature, "float32", ())
    tensors.update({name: TensorSpec(name, "float32", (batch,)) for name in scores.values()})
    return step, (step.logits, *scores.values())


def chain(exits, *, batch="batch"):
    """A stage for every exit, each handing on one number: ``x``, ``h:0``, ``h:1``, ..."""
    tensors = {"x": TensorSpec("x", "float32", (batch, 1))}
    stages, steps = [], []
    for index in range(exits):
        step, head = exit_of(index, tensors, batch)
        tensors[f"h:{index}"] = TensorSpec(f"h:{index}", "float32", (batch, 1))
        inputs = (f"h:{index - 1}" if index else "x", step.temperature)
        outputs = (*([f"h:{index}"] if index < exits - 1 else []), *head)
        stages.append(Stage(name=f"s{index}", inputs=inputs, outputs=outputs, macs=1, weight_bytes=0))
        steps += [Run(f"s{index}"), step]
    del tensors[f"h:{exits - 1}"]
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=tuple(stages), steps=tuple(steps))


def gated():
    """``g0``, the exit ``e0``, then ``g1`` with ``g2`` inside, and ``e1``."""
    names = ("x", "v:0", "y0", "z0", "v:1", "y1", "v:2", "y2", "z2", "z1")
    tensors = {name: TensorSpec(name, "float32", ("batch", 1)) for name in names}
    (e0, head0), (e1, head1) = exit_of(0, tensors), exit_of(1, tensors)

    def stage(name, inputs, *outputs, leaves=False):
        return Stage(name=name, inputs=inputs, outputs=outputs, macs=1, weight_bytes=0, exit=leaves)

    stages = (
        stage("ask0", ("x",), "v:0"), stage("add0", ("x",), "y0"), stage("head0", ("z0", "t:0"), *head0, leaves=True),
        stage("ask1", ("z0",), "v:1"), stage("add1", ("z0",), "y1"), stage("ask2", ("y1",), "v:2"),
        stage("add2", ("y1",), "y2"), stage("head1", ("z1", "t:1"), *head1, leaves=True),
    )  # fmt: skip
    inner = Gate(name="g2", value="v:2", steps=(Run("add2"),), outputs={"z2": ("y2", "y1")})
    steps = (
        Run("ask0"), Gate(name="g0", value="v:0", steps=(Run("add0"),), outputs={"z0": ("y0", "x")}), Run("head0"), e0,
        Run("ask1"),
        Gate(name="g1", value="v:1", steps=(Run("add1"), Run("ask2"), inner), outputs={"z1": ("z2", "z0")}),
        Run("head1"), e1,
    )  # fmt: skip
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=stages, steps=steps)


@dataclass
class Script:
    """Answers by the sample's number, which is its input and travels on, with whatever ``offsets`` have added to it.

    What was added to a stage's input is in its logits, too: a difference that an earlier stage made.
    """

    plan: Plan
    logits: np.ndarray
    scores: np.ndarray | None = None
    values: dict[str, np.ndarray] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)

    def open(self, **options):
        return Session(self.plan, FakeRuntime(self.handle), {}, **options)

    def handle(self, stage, inputs):
        column = next(array for array in inputs.values() if array.ndim == 2)[:, 0]
        rows = np.rint(column).astype(int)
        made = {}
        for name in self.plan.stage(stage).outputs:
            kind, _, index = name.partition(":")
            if kind == "logits":
                array = self.logits[int(index), rows] + (column - rows)[:, None]
            elif kind in SCORES:
                array = self._scores(kind, int(index), rows)
            elif name in self.values:
                array = self.values[name][rows, None]
            else:
                array = column[:, None]
            made[name] = (array + self.offsets.get(name, 0)).astype(np.float32)
        return made

    def _scores(self, kind, index, rows):
        return score(self.logits[index, rows], name=kind) if self.scores is None else self.scores[index, rows]


def script(scores, *, plan=None, answers=None, **options):
    """Scores ``(exits, samples)``; logits from the classes ``answers`` likewise, class 0 where there are none."""
    scores = np.asarray(scores, np.float32)
    answers = np.zeros(scores.shape, int) if answers is None else np.asarray(answers)
    logits = np.where(np.arange(2) == answers[..., None], 4, -4).astype(np.float32)
    return Script(plan or chain(len(scores)), logits, scores, **options)


def numbered(count, labels=None):
    labels = None if labels is None else np.asarray(labels)
    return Dataset(inputs=np.arange(count, dtype=np.float32)[:, None], labels=labels)


def compared(mine, theirs, data, **options):
    """The report on two scripts, and the one run in it."""
    with mine.open() as reference, theirs.open() as other:
        parity = compare_runtimes({"a": reference, "b": other}, data, **options)
        assert reference.policy.name == other.policy.name == "never-exit", "policies are put back"
    (run,) = parity.runs
    return parity, run


# Stages and logits


def test_differences_of_stages_do_not_add_up_those_of_logits_do():
    mine = script([[0.25] * 5] * 3)
    theirs = script([[0.25] * 5] * 3, offsets={"h:0": 0.125, "h:1": 0.25, "margin:2": 0.5})
    parity, run = compared(mine, theirs, numbered(5))
    found = {(stage.name, each.name): each.spread for stage in run.stages for each in stage.tensors}
    largest = {name: spread.largest for name, spread in found.items() if spread.largest}
    assert largest == {("s0", "h:0"): 0.125, ("s1", "h:1"): 0.25, ("s2", "margin:2"): 0.5}
    assert {stage for stage, _ in found} == {"s0", "s1", "s2"}
    assert [name for stage, name in found if stage == "s1"] == list(mine.plan.stage("s1").outputs)
    assert found["s1", "h:1"].scale == 4, "the reference hands on 0 to 4"
    assert [step.spread.largest for step in run.exits] == [0, 0.125, 0.375]
    assert [step.spread.scale for step in run.exits] == [4, 4, 4]
    assert [stage.rows for stage in run.stages] == [5, 5, 5]
    assert run.stages[2].worst.name == "margin:2"
    assert [sentence.split(" (")[0] for sentence in parity.exceeded] == [
        "b: logits of exit 'e1' differ from a by 0.0312 of their scale",
        "b: logits of exit 'e2' differ from a by 0.0938 of their scale",
    ]


def test_stages_are_compared_on_some_samples_and_decisions_on_all():
    made = script([[0.1] * 100, [0.2] * 100])
    parity, run = compared(made, made, numbered(100), recorded=7, policies=[Policy.fixed([0.5])])
    assert (parity.samples, parity.recorded, run.decisions) == (100, 7, 100)
    assert [stage.rows for stage in run.stages] == [7, 7]


def test_a_limit_takes_evenly_spaced_samples_and_flips_keep_their_place():
    mine, theirs = script([[0.1] * 10, [0] * 10]), script([[0.1] * 9 + [0.9], [0] * 10])
    parity, run = compared(mine, theirs, numbered(10), limit=10, policies=[Policy.fixed([0.5])])
    assert [flip.sample for flip in run.policies[0].flips] == [9]
    theirs = script([[0.1] * 6 + [0.9] + [0.1] * 3, [0] * 10])
    parity, run = compared(mine, theirs, numbered(10), limit=3, policies=[Policy.fixed([0.5])])
    assert (parity.samples, parity.of_samples) == (3, 10)
    assert [flip.sample for flip in run.policies[0].flips] == [6], "of 0, 3 and 6"


def test_a_stage_that_nobody_comes_to_is_told():
    plan = gated()
    closed = {"v:0": np.zeros(3), "v:1": np.zeros(3), "v:2": np.zeros(3)}
    made = script([[0.1] * 3] * 2, plan=plan, values=closed)
    parity, run = compared(made, made, numbered(3))
    assert [stage.name for stage in run.stages] == ["ask0", "head0", "ask1", "head1"]
    assert "no sample came to 4 of 8 stages, as 'add0'" in parity.notes


def test_a_network_for_one_sample_at_a_time():
    scores = [[0.9, 0.1, 0.5], [0.3, 0.3, 0.3]]
    mine, theirs = script(scores, plan=chain(2, batch=1)), script(scores, plan=chain(2, batch=1), offsets={"h:0": 0.25})
    _, run = compared(mine, theirs, numbered(3), policies=[Policy.fixed([0.5])])
    assert run.stages[0].tensors[0].spread.largest == 0.25
    assert [stage.rows for stage in run.stages] == [3, 3]
    assert run.policies[0].exits == (Count(name="e0", compared=3, agreed=3),)


# Exits


@pytest.fixture
def flipping():
    """Threshold 0.5 at the first of two exits. Samples by number:

    0 leaves; 1 ties with the reference and stays with the other; 2 the reverse, within rounding; 3 stays; 4 has no
    score with the reference; 5 none with the other; 6 is far off.
    """
    mine = script(
        [[0.9, 0.5, 0.49996, 0.2, NAN, 0.7, 0.3], [0.0] * 7],
        answers=[[0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 1, 0]],
    )
    theirs = script(
        [[0.9, 0.49999, 0.50001, 0.2, 0.9, NAN, 0.8], [0.0] * 7],
        answers=[[0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 1, 0]],
    )
    return mine, theirs


def test_flips_by_hand(flipping):
    labels = [0, 0, 0, 1, 0, 1, 0]
    parity, run = compared(*flipping, numbered(7, labels), policies=[Policy.fixed([0.5])])
    (found,) = run.policies
    assert found.exits == (Count(name="e0", compared=7, agreed=2),)
    assert found.exits[0].agreement == pytest.approx(2 / 7)
    assert found.agreement == pytest.approx(2 / 7)
    flips = {flip.sample: flip for flip in found.flips}
    assert list(flips) == [1, 2, 4, 5, 6]
    assert {sample: (flip.reference_exit, flip.exit, flip.at) for sample, flip in flips.items()} == {
        1: ("e0", "e1", "e0"), 2: ("e1", "e0", "e0"), 4: ("e1", "e0", "e0"), 5: ("e0", "e1", "e0"),
        6: ("e1", "e0", "e0"),
    }  # fmt: skip
    assert flips[1].margin == 0
    assert flips[2].margin == pytest.approx(4e-5, rel=1e-2)
    assert (flips[4].margin, flips[4].reference_score, flips[4].score) == (None, None, pytest.approx(0.9))
    assert (flips[5].margin, flips[5].score) == (pytest.approx(0.2), None)
    assert flips[6].margin == pytest.approx(0.2)
    assert {flip.threshold for flip in found.flips} == {0.5}
    # 1: right at e0 (class 0), wrong at e1 (class 1). 2: the reverse. 5: wrong at e0, right at e1.
    assert {sample: flip.cost for sample, flip in flips.items()} == {1: 1, 2: -1, 4: 0, 5: -1, 6: 0}
    assert {sample for sample, flip in flips.items() if flip.answer_changed} == {1, 2, 5}
    assert found.flip_cost == pytest.approx(-1 / 7)
    # Sample 3 stays in both and is right at e1. The reference: 0, 1, 3, 4, 6 right of 7; the other: 0, 2 to 6.
    assert (found.accuracy_reference, found.accuracy) == (pytest.approx(5 / 7), pytest.approx(6 / 7))
    assert found.answers_changed == 3
    (flip_sentence, margin_sentence) = parity.exceeded
    assert flip_sentence == "b: 5 of 7 decisions differ from a (71.4 %, allowed 0.02 %)"
    assert margin_sentence == (
        "b: 3 of 5 flips at exits are farther than 0.0001 from the threshold: sample 4 has no score at exit 'e0' "
        "with policy 'by-hand'"
    )


def test_without_labels_nothing_is_said_of_accuracy(flipping):
    parity, run = compared(*flipping, numbered(7), policies=[Policy.fixed([0.5])])
    assert not parity.labelled
    (found,) = run.policies
    assert (found.accuracy_reference, found.accuracy, found.flip_cost) == (None, None, None)
    assert {flip.cost for flip in found.flips} == {None}
    assert {flip.sample for flip in found.flips if flip.answer_changed} == {1, 2, 5}


def test_a_tie_leaves_or_stays_as_the_policy_says(flipping):
    strict = Policy.fixed([0.5], comparator=">")
    _, run = compared(*flipping, numbered(7), policies=[strict])
    assert [flip.sample for flip in run.policies[0].flips] == [2, 4, 5, 6], "sample 1 now stays in both"


def test_rows_that_left_before_do_not_count_at_later_exits():
    # Sample 0 flips at e0; sample 1 leaves there in both; 2 and 3 come to e1, where 3 flips.
    mine = script([[0.9, 0.9, 0.1, 0.1], [0.9, 0.9, 0.9, 0.9], [0] * 4])
    theirs = script([[0.4, 0.9, 0.1, 0.1], [0.1, 0.9, 0.9, 0.1], [0] * 4])
    _, run = compared(mine, theirs, numbered(4), policies=[Policy.fixed([0.5, 0.5])])
    (found,) = run.policies
    assert found.exits == (Count(name="e0", compared=4, agreed=3), Count(name="e1", compared=2, agreed=1))
    assert [(flip.sample, flip.at, flip.exit) for flip in found.flips] == [(0, "e0", "e2"), (3, "e1", "e2")]


def test_an_exit_that_is_never_taken_decides_nothing():
    mine, theirs = script([[0.9], [0.9], [0]]), script([[0.1], [0.9], [0]])
    parity, run = compared(mine, theirs, numbered(1), policies=[Policy.fixed([INF, 0.5])])
    assert [count.name for count in run.policies[0].exits] == ["e1"]
    assert run.policies[0].flips == ()
    assert parity.notes[0] == "some exits are never taken, and so decide nothing, with policies by-hand"


def test_many_samples_in_batches_are_told_apart():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 1, (3, 300)).astype(np.float32)
    moved = scores + rng.choice([0, 0.1, -0.1], p=[0.6, 0.2, 0.2], size=scores.shape).astype(np.float32)
    answers = rng.integers(0, 2, (3, 300))
    labels = rng.integers(0, 2, 300)
    data = numbered(300, labels)
    policy = Policy.fixed([0.7, 0.6], name="kept", score="margin")
    _, run = compared(script(scores, answers=answers), script(moved, answers=answers), data, policies=[policy])

    def leaves(table):
        return [next((e for e in (0, 1) if table[e, row] >= np.float32((0.7, 0.6)[e])), 2) for row in range(300)]

    expected = [(row, a, b) for row, (a, b) in enumerate(zip(leaves(scores), leaves(moved), strict=True)) if a != b]
    (found,) = run.policies
    assert len(expected) > 10
    assert [(flip.sample, int(flip.reference_exit[1]), int(flip.exit[1])) for flip in found.flips] == expected
    for flip, (row, a, b) in zip(found.flips, expected, strict=True):
        at = min(a, b)
        assert flip.reference_score == pytest.approx(scores[at, row])
        assert flip.score == pytest.approx(moved[at, row])
        assert flip.margin == pytest.approx(abs(float(scores[at, row]) - (0.7, 0.6)[at]), abs=1e-6)
        right = [int(answers[exit_index, row] == labels[row]) for exit_index in (a, b)]
        assert flip.cost == right[0] - right[1]
    costs = sum(flip.cost for flip in found.flips)
    assert found.accuracy_reference - found.accuracy == pytest.approx(costs / 300) == pytest.approx(found.flip_cost)


def test_what_a_policy_promises_plays_no_part():
    made = script([[0.9, 0.1], [0, 0]])
    origin = Provenance(method="by hand", plan=made.plan.fingerprint, artifacts={"stages/onnx/s0.onnx": "0" * 64})
    policy = msgspec.structs.replace(Policy.fixed([0.5], name="saved"), provenance=origin)
    _, run = compared(made, made, numbered(2), policies=[policy])
    assert (run.policies[0].policy, run.policies[0].flips) == ("saved", ())


def test_a_policy_for_another_network_is_refused():
    made = script([[0.9], [0]])
    with made.open() as a, made.open() as b, pytest.raises(PolicyError, match="thresholds for 3 exits"):
        compare_runtimes({"a": a, "b": b}, numbered(1), policies=[Policy.fixed([0.5, 0.5])])


# Thresholds that nobody gave


def test_thresholds_lie_midway_between_neighbours_at_the_quantiles():
    scores = np.array([[0.1, 0.3, 0.2, 0.4, NAN, 0.4], [9] * 6], np.float32)
    policies = quantile_policies({"margin": scores})
    assert [policy.name for policy in policies] == ["margin-q25", "margin-q50", "margin-q75"]
    assert [policy.score for policy in policies] == ["margin"] * 3
    assert [policy.thresholds[0] for policy in policies] == pytest.approx([0.15, 0.25, 0.35])


def test_without_policies_each_score_is_tried_at_three_thresholds():
    logits = np.random.default_rng(1).standard_normal((2, 40, 2)).astype(np.float32)
    made = Script(chain(2), logits)
    _, run = compared(made, made, numbered(40))
    assert [(each.policy, each.score) for each in run.policies] == [
        (f"{name}-q{quantile}", name) for name in SCORES for quantile in (25, 50, 75)
    ]
    assert (run.decisions, run.flips, run.agreement) == (360, 0, 1)
    p = np.exp(logits[0].astype(np.float64))
    largest = np.sort((p / p.sum(1, keepdims=True)).max(1))
    assert run.policies[1].thresholds[0] == pytest.approx((largest[19] + largest[20]) / 2, rel=1e-6)


def test_one_sample_decides_nothing_of_itself():
    made = Script(chain(2), np.ones((2, 1, 2), np.float32))
    parity, run = compared(made, made, numbered(1))
    assert {each.thresholds for each in run.policies} == {(INF,)}
    assert {each.exits for each in run.policies} == {()}
    assert parity.exceeded == ()
    assert "max_prob-q25" in parity.notes[0]
    assert Parity.from_mapping(parity.to_mapping()) == parity


def test_a_network_with_one_exit_and_no_gate_decides_nothing():
    made = Script(chain(1), np.ones((1, 3, 2), np.float32))
    parity, run = compared(made, made, numbered(3))
    assert (run.policies, run.gates, run.decisions, run.agreement) == ((), (), 0, None)
    assert parity.exceeded == ()


# Gates


@pytest.fixture
def gates():
    """Sample 2 takes another way at g0 and, inside g1, at g2; sample 4 at g1. Both leave elsewhere with 0.5 at e0."""
    ask = {"v:0": [1, 0, 1, 0, 1, 1], "v:1": [1, 1, 1, 1, 1, 0], "v:2": [0, 1, 0, NAN, 0, 1]}
    moved = {"v:0": [1, 0, 0, 0, 1, 1], "v:1": [1, 1, 1, 1, 0, 0], "v:2": [0, 1, 1, 1, 0, 1]}
    scores = np.array([[0.9, 0.9, 0.9, 0.1, 0.5, 0.1], [0.0] * 6])
    others = np.array([[0.9, 0.9, 0.2, 0.1, 0.4, 0.1], [0.0] * 6])
    answers = np.array([[0] * 6, [0, 1, 0, 1, 0, 1]])
    changed = answers.copy()
    changed[1, 2] = 1
    plan = gated()

    def made(values, table, classes):
        arrays = {name: np.array(each, np.float32) for name, each in values.items()}
        return script(table, plan=plan, answers=classes, values=arrays)

    return made(ask, scores, answers), made(moved, others, changed)


def test_gates_by_hand(gates):
    _, run = compared(*gates, numbered(6, [0] * 6), policies=[Policy.fixed([0.5])])
    (found,) = run.gates
    assert found.gates == (
        Count(name="g0", compared=6, agreed=5),
        Count(name="g1", compared=6, agreed=5),
        Count(name="g2", compared=4, agreed=3),  # not 5, closed at g1 in both, nor 4, closed in one; NaN is not 0
    )
    assert [(flip.sample, flip.gate, flip.reference_open, flip.later) for flip in found.flips] == [
        (2, "g0", True, 1), (4, "g1", True, 0),
    ]  # fmt: skip
    assert [(flip.answer_changed, flip.cost) for flip in found.flips] == [(True, 1), (False, 0)]
    assert (found.agreement, found.flip_cost) == (pytest.approx(4 / 6), pytest.approx(1 / 6))
    assert (run.decisions, run.flips) == (12, 4)


def test_a_flip_behind_a_gate_that_flipped_is_not_judged_by_its_margin(gates):
    budget = Budget(flip_share=0.5, difference=None, margin=1e-4)
    parity, run = compared(*gates, numbered(6), policies=[Policy.fixed([0.5])], budget=budget)
    flips = {flip.sample: flip for flip in run.policies[0].flips}
    assert {sample: flip.after_gate for sample, flip in flips.items()} == {2: "g0", 4: None}, "g1 lies behind e0"
    assert (flips[2].margin, flips[4].margin) == (pytest.approx(0.4), 0)
    assert parity.exceeded == ()


def test_rows_of_gated_stages_are_compared_where_the_reference_sends_them(gates):
    _, run = compared(*gates, numbered(6))
    rows = {stage.name: stage.rows for stage in run.stages}
    assert rows == {"ask0": 6, "add0": 4, "head0": 6, "ask1": 6, "add1": 5, "ask2": 5, "add2": 2, "head1": 6}
    asked = next(stage for stage in run.stages if stage.name == "ask0").tensors[0].spread
    assert (asked.largest, asked.scale) == (1, 1)


def test_gates_are_compared_with_the_constants_of_every_policy(gates):
    """``ask0`` says whether its value is above a constant, 0.5 as trained."""
    plan = gates[0].plan
    tensors = plan.tensors | {"c": TensorSpec("c", "float32", ())}
    ask = msgspec.structs.replace(plan.stage("ask0"), inputs=("x", "c"))
    constant = Constant(name="g0", tensor="c", comparison=">", value=0.5, gates=("g0",))
    plan = msgspec.structs.replace(plan, tensors=tensors, stages=(ask, *plan.stages[1:]), constants=(constant,))
    values = np.array([0.1, 0.6, 0.8, 0.9], np.float32)

    def opened(moved):
        made = script([[0.9, 0.1, 0.1, 0.1], [0] * 4], plan=plan, values={f"v:{at}": np.zeros(4) for at in range(3)})

        def handle(stage, inputs):
            answers = made.handle(stage, inputs)
            if stage == "ask0":
                rows = np.rint(inputs["x"][:, 0]).astype(int)
                answers["v:0"] = ((values + moved)[rows, None] > inputs["c"]).astype(np.float32)
            return answers

        return Session(plan, FakeRuntime(handle), {})

    moved = {"g0": 0.85}
    policies = [Policy.fixed([0.5]), Policy.fixed([0.5], constants=moved), Policy.fixed([0.7], constants=moved)]
    with opened(0) as reference, opened(np.array([0, 0, 0.1, 0], np.float32)) as other:
        parity = compare_runtimes({"a": reference, "b": other}, numbered(4), policies=policies)
    (run,) = parity.runs
    assert [each.constants for each in run.policies] == [{}, moved, moved]
    assert [each.constants for each in run.gates] == [{}, moved]
    assert [[flip.sample for flip in each.flips] for each in run.gates] == [[], [2]]
    assert run.decisions == 5 * 4


def test_samples_that_need_one_another_run_alone(gates):
    plan = gates[0].plan
    mixing = [
        msgspec.structs.replace(step, whole=True) if isinstance(step, Gate) and step.name == "g0" else step
        for step in plan.steps
    ]
    for made in gates:
        made.plan = msgspec.structs.replace(plan, steps=tuple(mixing))
    with gates[0].open() as a, gates[1].open() as b:
        parity = compare_runtimes({"a": a, "b": b}, numbered(6), policies=[Policy.fixed([0.5])])
        assert all(session.runtime.rows == session.runtime.calls for session in (a, b)), "one row in every call"
    assert "samples of a batch need one another in this network: every sample was run alone" in parity.notes
    assert [flip.sample for flip in parity.runs[0].policies[0].flips] == [2, 4]


def test_gates_of_a_stage_that_runs_twice():
    """``ask`` opens for an odd sample that nothing was added to: the second time for none that went through."""
    names = ("x", "v", "y", "z", "v1", "y1", "z1")
    tensors = {name: TensorSpec(name, "float32", ("batch", 1)) for name in names}
    step, head = exit_of(0, tensors)
    stages = tuple(
        Stage(name=name, inputs=inputs, outputs=outputs, macs=1, weight_bytes=0, exit=name == "head")
        for name, inputs, outputs in (
            ("ask", ("x",), ("v",)), ("add", ("x",), ("y",)), ("head", ("z1", "t:0"), head),
        )
    )  # fmt: skip
    steps = (
        Run("ask"), Gate(name="g0", value="v", steps=(Run("add"),), outputs={"z": ("y", "x")}),
        Run("ask", {"x": "z", "v": "v1"}),
        Gate(
            name="g1", value="v1", steps=(Run("add", {"x": "z", "y": "y1"}),),
            otherwise=(Run("add", {"x": "z", "y": "y1"}),), outputs={"z1": ("y1", "y1")},
        ),
        Run("head"), step,
    )  # fmt: skip
    plan = Plan(inputs=(tensors["x"],), tensors=tensors, stages=stages, steps=steps)

    def handle(stage, inputs):
        column = next(iter(inputs.values()))[:, 0]
        if stage == "head":
            return {name: np.stack([column, -column], 1) if "logits" in name else column for name in head}
        made = (column % 2 == 1) if stage == "ask" else column + 0.25
        return {"v" if stage == "ask" else "y": made.astype(np.float32)[:, None]}

    with Session(plan, FakeRuntime(handle), {}) as session, GateWays(session, {}) as ways:
        assert ways.of(np.array([[1]], np.float32)) == ({"g0": True, "g1": False}, 0)
        assert ways.of(np.array([[2]], np.float32)) == ({"g0": False, "g1": False}, 0)
        assert ways.of(np.array([[-1]], np.float32)) == ({"g0": True, "g1": False}, 1)


# What may differ


def test_the_farthest_flip_of_all_policies_is_named(flipping):
    far = Policy.fixed([0.3002], name="far")
    parity, run = compared(*flipping, numbered(7), policies=[Policy.fixed([0.5]), far], budget=Budget(flips=99))
    assert [flip.sample for flip in run.policies[1].flips] == [4, 5, 6]
    assert parity.exceeded[-1] == (
        "b: 6 of 8 flips at exits are farther than 0.0001 from the threshold: sample 4 has no score at exit 'e0' "
        "with policy 'by-hand'"
    )
    wide = Budget(flips=99, flip_share=None, margin=0.3)
    parity, _ = compared(*flipping, numbered(7), policies=[Policy.fixed([0.5]), far], budget=wide)
    assert "3 of 8 flips at exits" in parity.exceeded[0], "two without a score, and 0.7 against 0.3002"


@pytest.mark.parametrize(
    ("budget", "kinds"),
    [
        (Budget(), ["decisions", "flips"]),
        (Budget(flips=5, flip_share=None), ["flips"]),
        (Budget(flips=4, flip_share=None), ["decisions", "flips"]),
        (Budget(flip_share=0.5), ["decisions", "flips"]),  # four of seven
        (Budget(flip_share=0.6), ["flips"]),
        (Budget(flip_share=0.75, margin=None), []),
        (Budget(flips=None, flip_share=None, difference=None, margin=None), []),
    ],
)
def test_budgets(flipping, budget, kinds):
    parity, _ = compared(*flipping, numbered(7), policies=[Policy.fixed([0.5])], budget=budget)
    assert parity.budget == budget
    assert len(parity.exceeded) == len(kinds)
    assert all(kind in sentence for kind, sentence in zip(kinds, parity.exceeded, strict=True))


def test_logits_that_are_nan_in_one_runtime_are_beyond_any_difference():
    mine, theirs = script([[0.9, 0.9], [0, 0]]), script([[0.9, 0.9], [0, 0]])
    theirs.logits[1, 1, 0] = NAN
    parity, run = compared(mine, theirs, numbered(2), budget=Budget(difference=10.0))
    assert run.exits[1].spread.unlike == 1
    (sentence,) = parity.exceeded
    assert sentence == "b: logits of exit 'e1' are NaN or infinite where those of a are not, or the reverse (1 of them)"


def test_a_nan_in_both_runtimes_is_no_difference():
    made = script([[0.9, NAN], [0, 0]])
    made.logits[0, 1] = NAN
    parity, run = compared(made, made, numbered(2), policies=[Policy.fixed([0.5])])
    assert (run.flips, run.exits[0].spread.unlike, parity.exceeded) == (0, 0, ())


# What is asked for, and what is written


def test_several_runtimes_against_any_of_them():
    made = script([[0.9, 0.2], [0, 0]])
    moved = script([[0.9, 0.2], [0, 0]], offsets={"logits:1": 0.5})
    with made.open() as a, moved.open() as b, made.open() as c:
        parity = compare_runtimes({"a": a, "b": b, "c": c}, numbered(2), reference="c")
    assert parity.reference == "c"
    assert {run.label: run.exits[1].spread.largest for run in parity.runs} == {"a": 0, "b": 0.5}
    assert "not real: a, b, c answers from a script" in parity.notes


def test_what_cannot_be_compared():
    made, longer = script([[0.9], [0]]), script([[0.9], [0], [0]])
    with made.open() as a, made.open() as b, longer.open() as c:
        with pytest.raises(InputError, match="two runtimes or more, not 1"):
            compare_runtimes({"a": a}, numbered(1))
        with pytest.raises(InputError, match="reference 'z' is not among the runtimes a, b"):
            compare_runtimes({"a": a, "b": b}, numbered(1), reference="z")
        with pytest.raises(InputError, match="'c' runs another plan"):
            compare_runtimes({"a": a, "c": c}, numbered(1))
        with pytest.raises(InputError, match="at least one sample"):
            compare_runtimes({"a": a, "b": b}, numbered(1), limit=0)


def test_the_file_comes_back_as_it_was(flipping, tmp_path):
    parity, _ = compared(*flipping, numbered(7, [0] * 7), policies=[Policy.fixed([0.5])])
    path = tmp_path / "parity.json"
    path.write_text(parity.to_json())
    assert Parity.load(path) == parity
    newer = msgspec.json.decode(path.read_bytes()) | {"schema": 99}
    path.write_bytes(msgspec.json.encode(newer))
    with pytest.raises(MeasurementError, match=r"parity\.json: parity schema 99 is newer"):
        Parity.load(path)
    path.write_text('{"schema": 1}')
    with pytest.raises(MeasurementError, match="not a parity report"):
        Parity.load(path)
    path.write_text("[]")
    with pytest.raises(MeasurementError, match=r"parity\.json"):
        Parity.load(path)
    with pytest.raises(MeasurementError, match="cannot be read"):
        Parity.load(tmp_path / "none.json")
