"""Sessions that decide by patience or a learned score, against the same scores of all exits at once."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.calibration.scorers import fit_scorer
from edgekit.errors import PolicyError
from edgekit.plan import SCORES, Exit, Gate, Plan, Run, Stage
from edgekit.policy import Policy
from edgekit.runtimes.fake import FakeRuntime
from edgekit.scoring import BLOCK, LearnedScorer, PatienceRows, patience
from edgekit.session import Session
from edgekit.tensors import TensorSpec

CLASSES = 3


def make_plan(exits, batch="batch"):
    """Before each exit a gate that is open for odd rows; every tensor carries the row's number."""
    tensors, stages, steps, at = {"x": TensorSpec("x", "float32", (batch, 1))}, [], [], "x"
    for index in range(exits):
        made = {name: f"{name}:{index}" for name in ("odd", "kept", "next", "logits", *SCORES)}
        tensors |= {made[name]: TensorSpec(made[name], "float32", (batch, 1)) for name in ("odd", "kept", "next")}
        tensors[made["logits"]] = TensorSpec(made["logits"], "float32", (batch, CLASSES))
        tensors |= {made[name]: TensorSpec(made[name], "float32", (batch,)) for name in SCORES}
        tensors[f"t:{index}"] = TensorSpec(f"t:{index}", "float32", ())
        for name, inputs, outputs in (
            (f"ask{index}", (at,), (made["odd"],)),
            (f"keep{index}", (at,), (made["kept"],)),
            (f"head{index}", (made["next"], f"t:{index}"), (made["logits"], *(made[score] for score in SCORES))),
        ):
            is_exit = name.startswith("head")
            stages.append(Stage(name=name, inputs=inputs, outputs=outputs, macs=1, weight_bytes=0, exit=is_exit))
        scores = {score: made[score] for score in SCORES}
        inner = (Run(f"keep{index}"),)
        steps += [
            Run(f"ask{index}"),
            Gate(name=f"g{index}", value=made["odd"], steps=inner, outputs={made["next"]: (made["kept"], at)}),
            Run(f"head{index}"),
            Exit(name=f"e{index}", logits=made["logits"], temperature=f"t:{index}", scores=scores),
        ]
        at = made["next"]
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=tuple(stages), steps=tuple(steps))


def runtime_of(logits):
    def handle(stage, inputs):
        numbers = next(array for array in inputs.values() if array.ndim == 2)
        index = stage.lstrip("askephd")
        rows = numbers[:, 0].astype(int)
        if stage.startswith("head"):
            wrong = dict.fromkeys((f"{score}:{index}" for score in SCORES), np.full(len(rows), 99, np.float32))
            return {f"logits:{index}": logits[int(index), rows], **wrong}
        return {f"odd:{index}": numbers % 2} if stage.startswith("ask") else {f"kept:{index}": numbers}

    return FakeRuntime(handle)


def numbers(rows):
    return np.asarray(rows, dtype=np.float32)[:, None]


def scorer_of(exits, seed):
    rng = np.random.default_rng(seed)
    widths = [CLASSES + 2 + index for index in range(exits - 1)]
    return LearnedScorer(
        classes=CLASSES,
        centres=tuple(tuple(rng.normal(size=width).tolist()) for width in widths),
        scales=tuple(tuple(rng.uniform(0.5, 2, size=width).tolist()) for width in widths),
        weights=tuple(tuple(rng.normal(size=width + 1).tolist()) for width in widths),
    )


def offline(policy, logits):
    """``(exits, samples)`` scores; NaN at the last exit where nothing is learned for it."""
    if policy.scorer is None:
        return patience(logits)
    return np.concatenate([policy.scorer(logits), np.full((1, logits.shape[1]), np.nan, np.float32)])


def furthest(policy):
    """Exits before this one run their heads, and the last does."""
    return max((index + 1 for index, value in enumerate(policy.thresholds) if value != math.inf), default=0)


def reference(policy, logits):
    """Exit and score of every row, in plain Python."""
    scores, last = offline(policy, logits), len(logits) - 1
    taken = []
    for row in range(logits.shape[1]):
        leaving = last
        for index, limit in enumerate(policy.thresholds):
            score = float(scores[index, row])
            if limit != math.inf and (score > limit or (policy.comparator == ">=" and score == limit)):
                leaving = index
                break
        known = leaving < last or furthest(policy) == last
        taken.append((leaving, scores[leaving, row] if known else np.float32(np.nan)))
    return np.asarray([each for each, _ in taken]), np.asarray([each for _, each in taken], dtype=np.float32)


def forced_score(policy, logits, index):
    return np.where(np.isfinite(logits[index]).all(axis=1), offline(policy, logits)[index], np.float32(np.nan))


def same_bits(found, expected):
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(found[numbers].view(np.int32), expected[numbers].view(np.int32))


@st.composite
def cases(draw):
    exits, rows = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(scale=3, size=(1, rows, CLASSES)) + rng.normal(size=(exits, rows, CLASSES))
    logits = logits.astype(np.float32)
    poison = st.sampled_from([math.nan, math.inf, -math.inf])
    places = st.tuples(st.integers(0, exits - 1), st.integers(0, rows - 1), st.integers(0, CLASSES - 1))
    for place, value in draw(st.dictionaries(places, poison, max_size=4)).items():
        logits[place] = value
    comparator = draw(st.sampled_from([">=", ">"]))
    if draw(st.booleans()):
        scorer = scorer_of(exits, draw(st.integers(0, 99)))
        met = scorer(logits).ravel()
        values = [*met[np.isfinite(met)].tolist(), 0.0]  # ties among them
    else:
        scorer, values = None, [0.0, 1.0, 2.0, 0.5]
    limit = st.sampled_from([*values, math.inf, math.inf, -math.inf])
    thresholds = draw(st.lists(limit, min_size=exits - 1, max_size=exits - 1))
    score = "patience" if scorer is None else "learned"
    return logits, Policy.fixed(thresholds, score=score, comparator=comparator, scorer=scorer)


@given(cases(), st.data())
@settings(max_examples=200, deadline=None)
def test_any_batch_decides_by_the_scores_of_all_exits(case, data):
    logits, policy = case
    count = logits.shape[1]
    exits, scores = reference(policy, logits)
    runtime = runtime_of(logits)
    with Session(make_plan(len(logits)), runtime, {}, policy=policy) as session:
        np.testing.assert_array_equal(session.run_exits(numbers(range(count))), logits)
        batches = st.lists(st.permutations(range(count)), min_size=1, max_size=3)
        for order in data.draw(batches):
            order = order[: data.draw(st.integers(1, count))]
            result = session.run(numbers(order))
            np.testing.assert_array_equal(result.exit, exits[order])
            same_bits(result.score, scores[order])
            np.testing.assert_array_equal(result.logits, logits[exits[order], order])
            for index in range(len(logits)):
                run = index < furthest(policy) or index == len(logits) - 1
                assert result.executed[f"head{index}"] == (int((exits[order] >= index).sum()) if run else 0)
            forced = data.draw(st.integers(0, len(logits) - 1))
            same_bits(session.run(numbers(order), exit=forced).score, forced_score(policy, logits, forced)[order])
            for row in order:
                single = session.run(numbers([row]))
                assert single.exit[0] == exits[row]
                same_bits(single.score, scores[[row]])
                same_bits(session.run(numbers([row]), exit=forced).score, forced_score(policy, logits, forced)[[row]])


@given(cases())
@settings(max_examples=30, deadline=None)
def test_a_network_exported_for_one_sample_decides_likewise(case):
    logits, policy = case
    exits, scores = reference(policy, logits)
    with Session(make_plan(len(logits), 1), runtime_of(logits), {}, policy=policy) as session:
        result = session.run(numbers(range(logits.shape[1])))
    np.testing.assert_array_equal(result.exit, exits)
    same_bits(result.score, scores)


@pytest.mark.parametrize("rows", [1, 2])
def test_stages_are_asked_for_logits_alone_and_no_further_than_the_last_threshold(rows):
    logits = np.zeros((4, rows, CLASSES), np.float32)
    runtime = runtime_of(logits)
    policy = Policy.fixed([math.inf, 5.0, math.inf], score="patience")
    with Session(make_plan(4), runtime, {}, policy=policy) as session:
        result = session.run(numbers(range(rows)))
        assert [result.executed[f"head{index}"] for index in range(4)] == [rows, rows, 0, rows]
        heads = {name: asked for name, asked in runtime.asked.items() if name.startswith("head")}
        assert heads == {f"head{index}": (f"logits:{index}",) for index in (0, 1, 3)}
        assert np.isnan(result.score).all()
        assert session.run(numbers(range(rows)), exit=3).score.tolist() == [3.0] * rows
        session.use(Policy.fixed([5.0, 5.0, 5.0], score="margin"))
        assert session.run(numbers(range(rows))).score.tolist() == [99.0] * rows


def test_patience_forgets_the_sample_before():
    classes = np.asarray([[0, 1], [0, 1], [0, 1]])
    logits = np.eye(CLASSES, dtype=np.float32)[classes]
    policy = Policy.fixed([1.0, 1.0], score="patience")
    with Session(make_plan(3), runtime_of(logits), {}, policy=policy) as session:
        for row in (0, 0, 1, 1, 0):
            result = session.run(numbers([row]))
            assert (result.exit[0], result.score[0]) == (1, 1.0)
        session.use(Policy.never(3, score="patience"))
        session.run(numbers([0]), exit=1)
        assert np.isnan(session.run(numbers([0])).score[0])


def test_rows_are_told_apart_by_their_numbers():
    scores = PatienceRows(2)
    both = np.arange(2)
    one, two = np.eye(CLASSES, dtype=np.float32)[[[0, 1], [0, 2]]]
    assert scores.at(0, one, both).tolist() == [0, 0]
    assert scores.at(1, two, both).tolist() == [1, 0]
    assert scores.at(2, two[1:], both[1:]).tolist() == [1]


def test_a_scorer_for_another_network_is_refused():
    logits = np.zeros((3, 1, CLASSES), np.float32)
    with Session(make_plan(3), runtime_of(logits), {}) as session:
        wrong = Policy.fixed([0, 0], score="learned", scorer=scorer_of(4, 0))
        with pytest.raises(PolicyError, match="a scorer for 4 exits and 3 classes, the network has 3 and 3: calibrate"):
            session.use(wrong)
        classes = fit_scorer(np.zeros((3, 2, 5), np.float32))
        with pytest.raises(PolicyError, match="a scorer for 3 exits and 5 classes, the network has 3 and 3: calibrate"):
            session.use(Policy.fixed([0, 0], score="learned", scorer=classes))


@pytest.mark.parametrize("change", [
    {"classes": 4}, {"classes": 0}, {"centres": ()}, {"scales": ((1.0,) * 4,)}, {"weights": ((1.0,) * 5,)},
    {"weights": ((math.nan,) * 6,)}, {"centres": ((math.inf,) * 5,)}, {"scales": ((0.0,) * 5,)},
])  # fmt: skip
def test_a_damaged_scorer_is_refused(change):
    whole = scorer_of(2, 0)
    with pytest.raises(PolicyError, match="a learned scorer has the wrong number of weights, or some that are no num"):
        msgspec.structs.replace(whole, **change)


def test_neither_parts_nor_memory_layout_change_a_score():
    logits = np.random.default_rng(0).normal(scale=3, size=(3, BLOCK + 5, 20)).astype(np.float32)
    scorer = fit_scorer(logits[:, :200])
    whole = scorer(logits)
    same_bits(scorer(logits[:, -7:]), whole[:, -7:])
    same_bits(scorer(np.asfortranarray(logits)), whole)


@pytest.mark.parametrize("score", ["patience", "learned"])
def test_a_real_network_decides_by_the_scores_of_all_exits(exported_digits, score):
    import edgekit
    from edgekit.zoo.digits import test_set

    (images,) = test_set().batches(355)
    with edgekit.load(exported_digits) as session:
        logits = np.stack(session.run_exits(images))
        scorer = fit_scorer(logits) if score == "learned" else None
        found = patience(logits) if scorer is None else scorer(logits)
        limit = 1.0 if scorer is None else np.median(found[1])
        policy = Policy.fixed([math.inf, limit], score=score, scorer=scorer)
        session.use(policy)
        exits, scores = reference(policy, logits)
        result = session.run(images)
        np.testing.assert_array_equal(result.exit, exits)
        same_bits(result.score, scores)
        assert len(set(exits.tolist())) > 1
        for row in range(60):
            single = session.run(images[row : row + 1])
            assert single.exit[0] == exits[row]
            same_bits(single.score, scores[[row]])
