"""The session on a scripted runtime, against a loop that does one row at a time."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import EdgekitError, InputError, PluginError, PolicyError
from edgekit.plan import SCORES, ZERO, Exit, Gate, Plan, Run, Stage
from edgekit.policy import Policy, Provenance
from edgekit.runtimes.fake import FakeRuntime
from edgekit.scoring import LearnedScorer
from edgekit.session import Session
from edgekit.slots import BINDINGS_PER_STAGE
from edgekit.tensors import TensorSpec

CLASSES = 3
VALUES = (-math.inf, -1.0, 0.0, 0.1, 0.5, 0.5000001, 1.0, math.inf, math.nan)
THRESHOLDS = tuple(value for value in VALUES if not math.isnan(value))


@dataclass
class Script:
    """A network whose every answer is written down: ``logits[exit, row]`` and ``scores[exit, row]``.

    Its input's only column is the row's number in the tables, and every tensor carries it on, so that a stage sees
    at once when its inputs are not of the same rows.
    """

    plan: Plan
    logits: np.ndarray
    scores: np.ndarray

    def runtime(self) -> FakeRuntime:
        return FakeRuntime(self.handle)

    def handle(self, stage, inputs):
        columns = [array[:, 0] for name, array in inputs.items() if array.ndim == 2]
        for column in columns:
            np.testing.assert_array_equal(column, columns[0])
        rows = columns[0].astype(np.int64)
        made = {}
        for name in self.plan.stage(stage).outputs:
            kind, _, index = name.partition(":")
            if kind == "hidden":
                made[name] = columns[0][:, None].copy()
            elif kind == "logits":
                made[name] = self.logits[int(index), rows]
            else:
                made[name] = self.scores[int(index), rows] + np.float32(SCORES.index(kind))
        return made

    def inputs(self, rows=None):
        return np.arange(self.logits.shape[1] if rows is None else rows, dtype=np.float32)[:, None]

    def reference(self, policy: Policy, rows, *, exit=None):  # noqa: A002
        """Row by row, in plain Python."""
        taken = []
        for row in rows:
            for index in range(len(self.plan.exits)):
                score = np.float32(self.scores[index, row] + np.float32(SCORES.index(policy.score)))
                last = index == len(self.plan.exits) - 1
                if exit is not None:
                    leaves = index == exit
                elif last:
                    leaves = True
                elif math.isnan(score) or policy.thresholds[index] == math.inf:
                    leaves = False
                else:
                    limit = policy.thresholds[index]
                    leaves = float(score) > limit or (policy.comparator == ">=" and float(score) == limit)
                if leaves:
                    taken.append((index, score, self.logits[index, row]))
                    break
        return taken


def make_plan(reads, early=(), *, batch="batch"):
    """One exit per entry of ``reads``; each entry is a list of stages, each a list of earlier tensors that it reads.

    Tensors are counted from 0, the network's input, in the order in which stages make them. What an exit needs is
    made by the last stage before it, or, where it is in ``early``, by the last stage before the exit before it.
    """
    exits = [
        Exit(
            name=f"e{index}",
            logits=f"logits:{index}",
            temperature=f"temperature:{index}",
            scores={score: f"{score}:{index}" for score in SCORES},
        )
        for index in range(len(reads))
    ]
    tensors = {"x": TensorSpec("x", "float32", (batch, 1))}
    for step in exits:
        tensors[step.logits] = TensorSpec(step.logits, "float32", ("batch", CLASSES))
        tensors[step.temperature] = TensorSpec(step.temperature, "float32", ())
        tensors.update({name: TensorSpec(name, "float32", ("batch",)) for name in step.scores.values()})
    hidden, stages, steps = ["x"], [], []
    for index, group in enumerate(reads):
        carried = [step for at, step in enumerate(exits) if max(0, at - (at in early)) == index]
        for position, reading in enumerate(group):
            here = carried if position == len(group) - 1 else []
            made = f"hidden:{len(hidden)}"
            tensors[made] = TensorSpec(made, "float32", ("batch", 1))
            inputs = tuple(dict.fromkeys(hidden[at % len(hidden)] for at in reading)) or (hidden[-1],)
            outputs = [made, *(name for step in here for name in (step.logits, *step.scores.values()))]
            name = f"s{len(stages)}"
            inputs += tuple(step.temperature for step in here)
            stages.append(Stage(name=name, inputs=inputs, outputs=tuple(outputs), macs=1, weight_bytes=0))
            steps.append(Run(name))
            hidden.append(made)
        steps.append(exits[index])
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=tuple(stages), steps=tuple(steps))


def script(scores, reads=None, **options):
    """A script with these ``(exits, rows)`` scores; a chain of one stage per exit unless told otherwise."""
    scores = np.asarray(scores, dtype=np.float32)
    logits = np.random.default_rng(0).standard_normal((*scores.shape, CLASSES)).astype(np.float32)
    plan = make_plan(reads or [[[index]] for index in range(len(scores))], **options)
    return Script(plan, logits, scores)


@st.composite
def scripts(draw):
    exits = draw(st.integers(1, 4))
    rows = draw(st.integers(1, 7))
    reading = st.lists(st.integers(0, 20), max_size=3)
    reads = draw(st.lists(st.lists(reading, min_size=1, max_size=2), min_size=exits, max_size=exits))
    early = draw(st.sets(st.integers(0, exits - 1)))
    value = st.sampled_from(VALUES)
    scores = draw(st.lists(st.lists(value, min_size=rows, max_size=rows), min_size=exits, max_size=exits))
    return script(scores, reads, early=early)


@st.composite
def cases(draw):
    made = draw(scripts())
    exits = len(made.plan.exits)
    policy = Policy.fixed(
        draw(st.lists(st.sampled_from(THRESHOLDS), min_size=exits - 1, max_size=exits - 1)),
        score=draw(st.sampled_from(SCORES)),
        comparator=draw(st.sampled_from((">=", ">"))),
    )
    return made, policy


def check(result, expected):
    np.testing.assert_array_equal(result.exit, np.array([index for index, _, _ in expected], dtype=np.int64))
    np.testing.assert_array_equal(result.score, np.array([score for _, score, _ in expected], dtype=np.float32))
    np.testing.assert_array_equal(result.logits, np.array([logits for _, _, logits in expected]))
    assert (result.logits.dtype, result.exit.dtype, result.score.dtype) == (np.float32, np.int64, np.float32)


def expected_rows(plan, exits, deciding):
    """Rows that each stage runs on: none where no stage and no deciding exit reads what it makes."""
    read = {name for stage in plan.stages for name in stage.inputs} | {plan.exits[index].logits for index in deciding}
    counts = {stage.name: 0 for stage in plan.stages}
    for index in exits:
        for stage in plan.stages_before(int(index)):
            counts[stage.name] += not read.isdisjoint(stage.outputs)
    return counts


@given(cases())
@settings(max_examples=150, deadline=None)
def test_any_batch_equals_the_rows_one_by_one(case):
    made, policy = case
    rows = range(made.logits.shape[1])
    runtime = made.runtime()
    with Session(made.plan, runtime, {}, policy=policy) as session:
        result = session.run(made.inputs())
        expected = made.reference(policy, rows)
        check(result, expected)
        deciding = [index for index, value in enumerate((*policy.thresholds, 0.0)) if value != math.inf]
        assert result.executed == expected_rows(made.plan, result.exit, deciding)
        assert {stage: runtime.rows[stage] for stage in result.executed} == result.executed
        for row in rows:
            single = session.run(made.inputs()[row : row + 1])
            check(single, expected[row : row + 1])
            assert single.executed == expected_rows(made.plan, single.exit, deciding)


@given(cases(), st.data())
@settings(max_examples=60, deadline=None)
def test_forced_exits_and_all_exits(case, data):
    made, policy = case
    rows = range(made.logits.shape[1])
    exit_index = data.draw(st.integers(0, len(made.plan.exits) - 1))
    with Session(made.plan, made.runtime(), {}, policy=policy) as session:
        forced = session.run(made.inputs(), exit=exit_index)
        check(forced, made.reference(policy, rows, exit=exit_index))
        assert forced.executed == expected_rows(made.plan, forced.exit, range(exit_index + 1))
        check(session.run(made.inputs(1), exit=exit_index), made.reference(policy, [0], exit=exit_index))
        for logits, expected in zip(session.run_exits(made.inputs()), made.logits, strict=True):
            np.testing.assert_array_equal(logits, expected)


@given(cases(), st.lists(st.integers(1, 7), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_used_session_answers_as_a_fresh_one(case, sizes):
    made, policy = case
    with Session(made.plan, made.runtime(), {}, policy=policy) as session:
        earlier = []
        for size in sizes:
            inputs = made.inputs(min(size, made.logits.shape[1]))[::-1]
            earlier.append((inputs, session.run(inputs), session.run_exits(inputs)))
        for inputs, result, exits in earlier:
            rows = inputs[:, 0].astype(int)
            check(result, made.reference(policy, rows))
            np.testing.assert_array_equal(exits, made.logits[:, rows])


def test_results_own_their_memory():
    made = script([[0.2, 0.9], [0.5, 0.5]])
    with Session(made.plan, made.runtime(), {}, policy=Policy.fixed([0.5])) as session:
        for rows in (1, 2):
            first, exits = session.run(made.inputs(rows)), session.run_exits(made.inputs(rows))
            kept = first.logits.copy()
            again = session.run(made.inputs(rows))
            again.logits[:] = 7
            again.score[:] = 7
            again.executed["s0"] = 99
            for array in exits:
                array[:] = 7
            np.testing.assert_array_equal(first.logits, kept)
            np.testing.assert_array_equal(session.run(made.inputs(rows)).logits, kept)
            assert session.run(made.inputs(rows)).executed["s0"] == rows


def test_stages_nobody_reaches_are_not_run():
    made = script([[0.9, 0.9], [0.9, 0.9], [0, 0]])
    runtime = made.runtime()
    with Session(made.plan, runtime, {}, policy=Policy.fixed([0.5, 0.5])) as session:
        result = session.run(made.inputs())
        assert result.executed == {"s0": 2, "s1": 0, "s2": 0}
        assert session.run(made.inputs(1)).executed == {"s0": 1, "s1": 0, "s2": 0}
    assert runtime.calls == {"s0": 2}


def test_an_exit_that_is_never_taken_is_not_asked_for():
    made = script([[math.inf], [0.1], [0.2]])
    runtime = made.runtime()
    with Session(made.plan, runtime, {}, policy=Policy.fixed([math.inf, 0.5], score="margin")) as session:
        assert session.run(made.inputs()).exit[0] == 1
        assert runtime.asked["s0"] == ("hidden:1",)
        assert runtime.asked["s1"] == ("hidden:2", "logits:1", "margin:1")
        session.run(made.inputs(), exit=1)
        assert runtime.asked["s0"] == ("hidden:1", "logits:0", "margin:0")
        session.run_exits(made.inputs())
        assert runtime.asked["s0"] == ("hidden:1", "logits:0")


def test_only_what_is_read_later_is_asked_for():
    made = script([[0.1], [0.2]], [[[0]], [[0]]])
    runtime = made.runtime()
    with Session(made.plan, runtime, {}, policy=Policy.fixed([0.5])) as session:
        session.run(made.inputs())
    assert runtime.asked == {"s0": ("logits:0", "max_prob:0"), "s1": ("logits:1", "max_prob:1")}


def test_many_batch_sizes_keep_a_bounded_number_of_bindings():
    rows = BINDINGS_PER_STAGE + 10
    made = script(np.zeros((1, rows)))
    with Session(made.plan, made.runtime(), {}) as session:
        for count in range(rows, 0, -1):
            assert len(session.run(made.inputs(count)).exit) == count
        assert len(session._slots._bindings) == BINDINGS_PER_STAGE


def test_temperatures_reach_the_stages():
    made = script([[0.1], [0.2]])
    seen = {}

    def handle(stage, inputs):
        seen.update({name: float(array) for name, array in inputs.items() if name.startswith("temperature")})
        return made.handle(stage, inputs)

    with Session(made.plan, FakeRuntime(handle), {}, policy=Policy.fixed([0.5], temperatures=[2, 3])) as session:
        session.run(made.inputs())
        assert seen == {"temperature:0": 2, "temperature:1": 3}
        session.use(Policy.fixed([0.5], temperatures=[4, 5], comparator=">"))
        session.run(made.inputs())
        assert seen == {"temperature:0": 4, "temperature:1": 5}


def test_use_changes_the_decision():
    made = script([[0.5], [0.2]])
    with Session(made.plan, made.runtime(), {}) as session:
        assert session.policy.name == "never-exit"
        assert session.run(made.inputs()).exit[0] == 1
        session.use(Policy.fixed([0.5]))
        assert session.run(made.inputs()).exit[0] == 0
        session.use(Policy.fixed([0.5], comparator=">"))
        assert session.run(made.inputs()).exit[0] == 1


def test_a_network_exported_for_one_sample_runs_rows_one_by_one():
    scores = [[0.2, 0.9, math.nan], [0.5, 0.5, 0.5]]
    fixed, dynamic = script(scores, batch=1), script(scores)
    policy = Policy.fixed([0.5])
    with (
        Session(fixed.plan, fixed.runtime(), {}, policy=policy) as one,
        Session(dynamic.plan, dynamic.runtime(), {}, policy=policy) as many,
    ):
        a, b = one.run(fixed.inputs()), many.run(fixed.inputs())
        for field in ("logits", "exit", "score"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
        assert a.executed == b.executed
        np.testing.assert_array_equal(one.run_exits(fixed.inputs()), many.run_exits(fixed.inputs()))


def test_a_network_exported_for_another_fixed_batch_is_refused():
    made = script([[0.1]], batch=8)
    with pytest.raises(InputError, match="fixed shape \\(8, 1\\)"):
        Session(made.plan, made.runtime(), {})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((0, 1), np.float32), "input 'x': the batch is empty"),
        (np.zeros((2, 1)), "expected float32, got float64"),
        (np.zeros((2, 2), np.float32), r"expected shape \(batch, 1\), got \(2, 2\)"),
        (np.zeros((1,), np.float32), r"add the batch dimension"),
        ([[1.0]], "expected a numpy array, not list"),
        ({"y": np.zeros((1, 1), np.float32)}, r"missing: \['x'\], unknown: \['y'\]"),
        ((), "takes 1 inputs"),
    ],
)
def test_inputs_that_do_not_fit(inputs, message):
    made = script([[0.1]])
    with Session(made.plan, made.runtime(), {}) as session:
        for verb in (session.run, session.run_exits):
            with pytest.raises(InputError, match=message) as caught:
                verb(inputs)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [-1, 2])
def test_an_exit_that_does_not_exist(index):
    made = script([[0.1], [0.1]])
    with (
        Session(made.plan, made.runtime(), {}) as session,
        pytest.raises(InputError, match=f"exit {index} does not exist; the network has exits 0 to 1"),
    ):
        session.run(made.inputs(), exit=index)


def test_a_policy_for_another_network_is_refused():
    made = script([[0.1], [0.1]])
    foreign = msgspec.structs.replace(Policy.fixed([0.5]), provenance=Provenance(method="", plan="0" * 64))
    with pytest.raises(PolicyError, match="another network"):
        Session(made.plan, made.runtime(), {}, policy=foreign)
    with Session(made.plan, made.runtime(), {}) as session:
        with pytest.raises(PolicyError, match="has thresholds for 3 exits, the network has 2"):
            session.use(Policy.fixed([0.5, 0.5]))
        assert session.policy.name == "never-exit"


def test_closing_closes_the_stages_and_a_failed_opening_those_already_open():
    made = script([[0.1], [0.1]])
    closed = []

    class Closing(FakeRuntime):
        def open(self, stage, artifact):
            if stage.name in broken:
                raise EdgekitError("no")
            runner = super().open(stage, artifact)
            runner.close = lambda: closed.append(stage.name)
            return runner

    broken = {"s1"}
    with pytest.raises(EdgekitError, match="no"):
        Session(made.plan, Closing(made.handle), {})
    assert closed == ["s0"]
    broken, closed[:] = set(), []
    session = Session(made.plan, Closing(made.handle), {})
    assert session.load_s > 0
    session.close()
    assert sorted(closed) == ["s0", "s1"]
    for verb in (session.run, session.run_exits):
        with pytest.raises(EdgekitError, match="the session is closed"):
            verb(made.inputs())
    with pytest.raises(EdgekitError, match="the session is closed"):
        session.use(session.policy)


def test_options_for_a_ready_runtime_are_refused(tmp_path):
    from edgekit.bundle import Bundle, write_bundle
    from edgekit.manifest import Manifest

    made = script([[0.4], [0.1]])
    with write_bundle(tmp_path / "net.edgekit") as writer:
        writer.describe(Manifest(name="net", created="", plan=made.plan, artifacts={}))
    with pytest.raises(PluginError, match="runtime 'fake' is ready; give colour"):
        Session.open(tmp_path / "net.edgekit", runtime=made.runtime(), colour=1)
    with Session.open(tmp_path / "net.edgekit", runtime=made.runtime()) as session:
        assert session.policy.name == "never-exit"
        assert session.bundle is not None
    with Bundle.open(tmp_path / "net.edgekit") as bundle:
        bundle.save_policy(msgspec.structs.replace(Policy.fixed([0.3]), name="default"))
        bundle.save_policy(msgspec.structs.replace(Policy.fixed([0.6]), name="strict"))
        with Session.open(bundle, runtime=made.runtime()) as session:
            assert session.run(made.inputs()).exit[0] == 0
        with Session.open(bundle, runtime=made.runtime(), policy="strict") as session:
            assert session.run(made.inputs()).exit[0] == 1
        with pytest.raises(PolicyError, match="no policy 'other'"):
            Session.open(bundle, runtime=made.runtime(), policy="other")
        with pytest.raises(PluginError, match="fake"):
            Session.open(Path(tmp_path / "net.edgekit"), runtime="fake")


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_that_are_not_finite_never_leave_early_whatever_the_score(poison, rows):
    made = script(np.full((3, rows), 0.99))
    made.logits[0, 0, 1] = poison
    with Session(made.plan, made.runtime(), {}, policy=Policy.fixed([0.5, 0.5])) as session:
        result = session.run(made.inputs())
        np.testing.assert_array_equal(result.exit, [1, *[0] * (rows - 1)])
        assert np.isfinite(result.score).all()
        forced = session.run(made.inputs(), exit=0)
        assert np.isnan(forced.score[0])
        assert np.isfinite(forced.score[1:]).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_stage_that_fails_is_named_in_one_line(rows):
    made = script([[0.1, 0.1], [0.2, 0.2]])

    def fail(stage, inputs):
        if stage == "s1":
            raise RuntimeError("the device is gone\nand more")
        return made.handle(stage, inputs)

    message = r"^stage '(s0, )?s1' failed in fake \(the device is gone\)$"
    with Session(made.plan, FakeRuntime(fail), {}) as session, pytest.raises(EdgekitError, match=message):
        session.run(made.inputs(rows))


def check_traced(session, inputs, **forced):
    """A traced row leaves where it leaves untraced and runs what it runs; its spans follow each other in its time."""
    result, traced = session.run(inputs, **forced), session.trace(inputs, **forced)
    assert traced.exit == result.exit[0]
    computed = Counter(span.name for span in traced.spans if span.kind == "compute")
    assert {stage: computed[stage] for stage in result.executed} == result.executed
    moments = [moment for span in traced.spans for moment in (span.start_ns, span.stop_ns)]
    assert moments == sorted(moments)
    assert (moments[0], moments[-1]) == (0, traced.total_ns)
    assert [traced.spans[0].kind, traced.spans[-1].kind] == ["input", "answer"]
    return traced


@given(cases(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_traced_row_is_walked_as_any_other(case, data):
    made, policy = case
    with Session(made.plan, made.runtime(), {}, policy=policy) as session:
        if data.draw(st.booleans()):
            session.run(made.inputs())  # what is bound for one row is bound anew after a batch
        for row in made.inputs():
            traced = check_traced(session, row[None])
            assert traced.name == "stream"
            exit_index = data.draw(st.integers(0, len(made.plan.exits) - 1))
            traced = check_traced(session, row[None], exit=exit_index)
            assert traced.name == f"e{exit_index}"
            decided = [span.name for span in traced.spans if span.kind == "decision"]
            assert decided == [f"e{index}" for index in range(exit_index + 1)]


def learned(exits):
    widths = [CLASSES + 2 + index for index in range(exits - 1)]
    weights = tuple((0.0,) * width + (1.0 - index,) for index, width in enumerate(widths))
    flat = tuple((0.0,) * width for width in widths), tuple((1.0,) * width for width in widths)
    return LearnedScorer(classes=CLASSES, centres=flat[0], scales=flat[1], weights=weights)


@pytest.mark.parametrize("threshold", [0.5, 1.0, 1.5, math.inf])
@pytest.mark.parametrize("score", ["patience", "learned"])
def test_scores_of_the_host_are_traced_too(score, threshold):
    made = script(np.zeros((3, 8)))
    scorer = learned(3) if score == "learned" else None
    policy = Policy.fixed([threshold, 0.5], score=score, scorer=scorer)
    with Session(made.plan, made.runtime(), {}, policy=policy) as session:
        for row in made.inputs():
            check_traced(session, row[None])
            check_traced(session, row[None], exit=2)


def nested():
    """``x`` through a gate that holds a gate, then a gate that decides on what they gave with no stage between."""
    tensors = {name: TensorSpec(name, "float32", ("batch", 1)) for name in ("x", *"abcdefgh")}
    names = {score: score for score in SCORES}
    tensors |= {"logits": TensorSpec("logits", "float32", ("batch", CLASSES)), "t": TensorSpec("t", "float32", ())}
    tensors |= {name: TensorSpec(name, "float32", ("batch",)) for name in names}

    def stage(name, given, *made, ends=False):
        return Stage(name=name, inputs=given, outputs=made, macs=1, weight_bytes=0, exit=ends)

    inner = Gate(name="inner", value="b", steps=(Run("up"),), otherwise=(Run("down"),), outputs={"e": ("c", "d")})
    steps = (
        Run("ask"),
        Gate(name="outer", value="a", steps=(Run("enter"), inner), outputs={"f": ("e", ZERO)}),
        Gate(name="late", value="f", steps=(Run("more"),), outputs={"h": ("g", "f")}),
        Run("head"),
        Exit(name="e", logits="logits", temperature="t", scores=names),
    )
    stages = (
        stage("ask", ("x",), "a"),
        stage("enter", ("x",), "b"),
        stage("up", ("b",), "c"),
        stage("down", ("x",), "d"),
        stage("more", ("f",), "g"),
        stage("head", ("h", "t"), "logits", *names, ends=True),
    )
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=stages, steps=steps)


def nested_handler(stage, inputs):
    rows = next(array for array in inputs.values() if array.ndim == 2)
    made = {"ask": ("a", rows % 2), "enter": ("b", rows // 2 % 2), "up": ("c", rows), "down": ("d", rows * 0)}
    if stage == "head":
        return {"logits": np.repeat(rows, CLASSES, 1), **dict.fromkeys(SCORES, rows[:, 0])}
    name, value = made.get(stage, ("g", rows + 1))
    return {name: value}


def test_gates_in_gates_are_traced_as_they_fall_and_as_they_are_forced():
    with Session(nested(), FakeRuntime(nested_handler), {}) as session:
        for value in range(4):
            inputs = np.full((1, 1), value, np.float32)
            decided = [span.name for span in check_traced(session, inputs).spans if span.kind == "decision"]
            assert decided == (["outer", "inner", "late", "e"] if value % 2 else ["outer", "late", "e"])
            for outcomes in itertools.product([None, True, False], repeat=3):
                gates = {
                    name: outcome
                    for name, outcome in zip(("outer", "inner", "late"), outcomes, strict=True)
                    if outcome is not None
                }
                traced = check_traced(session, inputs, gates=gates)
                assert not {span.name for span in traced.spans if span.kind == "decision"} & set(gates)


def test_a_trace_reads_the_clock_around_every_piece():
    """Two stages of 5 and 7 ticks; every reading of the clock is a tick itself."""
    made = script([[0.1], [0.2]])
    now = itertools.count(100)
    shift = [0]

    def handle(stage, inputs):
        shift[0] += {"s0": 5, "s1": 7}[stage]
        return made.handle(stage, inputs)

    with Session(made.plan, FakeRuntime(handle), {}, policy=Policy.fixed([0.5])) as session:
        traced = session.trace(made.inputs(1), clock=lambda: next(now) + shift[0])
    assert [(span.name, span.kind, span.stop_ns - span.start_ns) for span in traced.spans] == [
        ("input", "input", 1),
        ("s0", "compute", 6),
        ("e0", "decision", 1),
        ("s1", "compute", 8),
        ("e1", "decision", 1),
        ("answer", "answer", 1),
    ]
    assert (traced.total_ns, traced.start_s) == (23, 0.0)


def test_what_cannot_be_traced():
    made = script([[0.1, 0.2]])
    with Session(made.plan, made.runtime(), {}) as session:
        with pytest.raises(InputError, match="one row can be traced, not 2"):
            session.trace(made.inputs())
        with pytest.raises(InputError, match="exit 7 does not exist"):
            session.trace(made.inputs(1), exit=7)
        with pytest.raises(InputError, match="expected float32"):
            session.trace(np.zeros((1, 1)))
    with pytest.raises(EdgekitError, match="the session is closed"):
        session.trace(made.inputs(1))


def test_a_stage_that_fails_in_a_trace_is_named():
    made = script([[0.1], [0.2]])

    def fail(stage, inputs):
        if stage == "s1":
            raise RuntimeError("the device is gone")
        return made.handle(stage, inputs)

    with Session(made.plan, FakeRuntime(fail), {}) as session, pytest.raises(EdgekitError, match="s1' failed in fake"):
        session.trace(made.inputs(1))
