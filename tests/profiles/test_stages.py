"""Where the time goes: against times written down, on a clock that they alone move, and against ONNX Runtime's."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from edgekit.data import Dataset
from edgekit.errors import MeasurementError
from edgekit.plan import SCORES, ZERO, Exit, Gate, Plan, Run, Stage
from edgekit.policy import Policy
from edgekit.profiles.stages import KEPT, every_stage, measure_stages
from edgekit.progress import silent
from edgekit.runtimes.fake import FakeRunner, FakeRuntime
from edgekit.session import Session
from edgekit.tensors import TensorSpec

TICK_NS = 10
"""Every reading of the clock takes so long."""


class Costly(FakeRuntime):
    """Stages that take ``body`` nanoseconds, and ``head`` more where logits are asked for."""

    def __init__(self, handler, clock, costs) -> None:
        super().__init__(handler)
        self.clock, self.costs, self.open_now = clock, costs, 0

    def open(self, stage: Stage, artifact: Path) -> FakeRunner:
        runtime, made = self, super().open(stage, artifact)
        bind = made.bind

        def costly(buffers, *, rows, outputs):
            run, (body, head) = bind(buffers, rows=rows, outputs=outputs), runtime.costs[stage.name]

            def timed() -> None:
                runtime.clock.now_ns += body + (head if any("logits" in name for name in outputs) else 0)
                run()

            return timed

        def close() -> None:
            runtime.open_now -= 1

        made.bind, made.close = costly, close
        runtime.open_now += 1
        return made


def tensor(name, *shape):
    return TensorSpec(name, "float32", ("batch", *shape))


def chained(exits: int) -> Plan:
    """Stages in a row, an exit after each."""
    tensors, stages, steps, before = {"x": tensor("x", 1)}, [], [], "x"
    for index in range(exits):
        scores = {score: f"{score}{index}" for score in SCORES}
        made = (f"hidden{index}", f"logits{index}", *scores.values())
        tensors |= {made[0]: tensor(made[0], 1), made[1]: tensor(made[1], 2)} | {n: tensor(n) for n in made[2:]}
        tensors[f"t{index}"] = TensorSpec(f"t{index}", "float32", ())
        stages.append(Stage(name=f"s{index}", inputs=(before, f"t{index}"), outputs=made, macs=1, weight_bytes=0))
        steps += [Run(f"s{index}"), Exit(name=f"e{index}", logits=made[1], temperature=f"t{index}", scores=scores)]
        before = made[0]
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=tuple(stages), steps=tuple(steps))


def zeros(plan):
    """A handler: all is 0, but what holds a gate's value, which is whether the input is over 0."""

    def handle(stage, inputs):
        rows = next(array for array in inputs.values() if array.ndim)
        made = {}
        for name in plan.stage(stage).outputs:
            shape = plan.tensors[name].concrete(len(rows))
            made[name] = np.zeros(shape, np.float32) + (rows.reshape(-1)[0] > 0 if name.startswith("value") else 0)
        return made

    return handle


@pytest.fixture
def ticking(clock):
    def now() -> int:
        clock.now_ns += TICK_NS
        return clock.now_ns

    return now


def look(session, clock, inputs=(0.0,), **options):
    data = Dataset(inputs=np.array(inputs, np.float32)[:, None])
    options = {"seconds": 0.0, "rng": np.random.default_rng(0), "clock": clock, "progress": silent, **options}
    return measure_stages(session, data, **options)


COSTS = {"s0": (1000, 300), "s1": (2000, 200), "s2": (4000, 100)}


@pytest.mark.parametrize("thresholds", [(0.5, 0.5), (-1.0, 0.5), (np.inf, np.inf)])
@pytest.mark.parametrize("score", ["margin", "patience"])
def test_what_a_stage_costs_is_told_apart(clock, ticking, thresholds, score):
    """Whatever the policy: forced runs pay for every head."""
    plan = chained(3)
    runtime = Costly(zeros(plan), clock, COSTS)
    policy = Policy.fixed(thresholds, score=score)
    with Session(plan, runtime, {}, policy=policy) as session:
        found = look(session, ticking)
        assert session.policy == policy
        assert runtime.open_now == 3, "the second session is closed"
    whole_ns = sum(body + head for body, head in COSTS.values()) + 15 * TICK_NS
    for index, stage in enumerate(found.stages):
        body, head = COSTS[f"s{index}"]
        assert stage.name == f"s{index}"
        assert stage.compute.value == pytest.approx((body + head + TICK_NS) * 1e-9)
        assert stage.compute.low == pytest.approx(stage.compute.high)
        if index == 2:
            assert stage.head is None, "the last head always runs"
        else:
            assert stage.head.value == pytest.approx(head * 1e-9)
        assert stage.decision.value == pytest.approx(TICK_NS * 1e-9)
        boundary_ns = 2 * TICK_NS if index == 0 else TICK_NS
        assert stage.boundary.value == pytest.approx(boundary_ns * 1e-9)
        others_ns = sum(sum(COSTS[f"s{other}"]) + TICK_NS for other in range(3) if other != index)
        assert stage.relative.value == pytest.approx((body + head + TICK_NS) / others_ns)
        pieces_ns = body + head + TICK_NS + TICK_NS + boundary_ns
        assert stage.share == pytest.approx(pieces_ns / whole_ns)
    assert found.tracing_overhead == pytest.approx(whole_ns / (whole_ns - 14 * TICK_NS))


def test_some_traces_of_every_exit_are_kept(clock, ticking):
    clock.now_ns = 7_000_000_000
    with Session(chained(2), Costly(zeros(chained(2)), clock, COSTS), {}, policy=Policy.fixed([-1.0])) as session:
        found = look(session, ticking, zero_ns=5_000_000_000)
    assert [(each.name, each.exit) for each in found.traces] == [
        (name, leaves) for name, leaves in (("e0", 0), ("e1", 1), ("stream", 0)) for _ in range(KEPT)
    ]
    assert all(2 < each.start_s < 2.001 for each in found.traces)


def test_as_long_as_asked_and_told_how_far(clock, ticking):
    told = []
    with Session(chained(2), Costly(zeros(chained(2)), clock, COSTS), {}) as session:
        start_ns = clock.now_ns
        look(session, ticking, seconds=0.002, progress=lambda task, done, total: told.append((done, total)))
    assert 0.002 <= (clock.now_ns - start_ns) * 1e-9 < 0.0025
    assert told == sorted(told)
    assert told[-1] == (100, 100)


def test_a_stage_that_is_all_head(session, data, clock):
    """The stages of this network hand nothing on: without their heads they do not run."""
    found = measure_stages(session, data, seconds=0.0, rng=np.random.default_rng(0), clock=clock, progress=silent)
    assert [stage.head and stage.head.value for stage in found.stages] == [1e-3, 2e-3, None]
    assert [stage.compute.value for stage in found.stages] == [1e-3, 2e-3, 4e-3]


def nested() -> Plan:
    """A gate in a gate with a stage on both of its ways, and a stage that is run twice."""
    names = {score: score for score in SCORES}
    tensors = {name: tensor(name, 1) for name in ("x", "value0", "value1", *"abcdefg")}
    tensors |= {"logits": tensor("logits", 2), "t": TensorSpec("t", "float32", ())} | {n: tensor(n) for n in names}
    given = {"ask": ("x",), "enter": ("x",), "up": ("a",), "down": ("a",), "twice": ("x",)}
    made = {"ask": ("value0",), "enter": ("a", "value1"), "up": ("b",), "down": ("c",), "twice": ("f",)}
    stages = [
        Stage(name=name, inputs=given[name], outputs=made[name], macs=1, weight_bytes=0, exit=False) for name in given
    ]
    stages.append(Stage(name="head", inputs=("g", "t"), outputs=("logits", *names), macs=1, weight_bytes=0))
    inner = Gate(name="inner", value="value1", steps=(Run("up"),), otherwise=(Run("down"),), outputs={"d": ("b", "c")})
    steps = (
        Run("ask"),
        Gate(name="outer", value="value0", steps=(Run("enter"), inner), outputs={"e": ("d", ZERO)}),
        Run("twice"),
        Run("twice", {"x": "f", "f": "g"}),
        Run("head"),
        Exit(name="end", logits="logits", temperature="t", scores=names),
    )
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=tuple(stages), steps=steps)


def test_outcomes_that_run_every_stage_together():
    assert every_stage(chained(2)) == ({},)
    assert every_stage(nested()) == ({"outer": True, "inner": True}, {"outer": True, "inner": False})


def test_every_stage_behind_gates_is_looked_at(clock, ticking):
    plan = nested()
    costs = {name: ((place + 1) * 1000, 0) for place, name in enumerate(stage.name for stage in plan.stages)}
    with Session(plan, Costly(zeros(plan), clock, costs), {}) as session:
        found = {stage.name: stage for stage in look(session, ticking, inputs=[-1.0, 1.0]).stages}
    assert list(found) == ["ask", "enter", "up", "down", "twice", "head"]
    for name, stage in found.items():
        runs = 2 if name == "twice" else 1
        assert stage.compute.value == pytest.approx(runs * (costs[name][0] + TICK_NS) * 1e-9)
        assert stage.head is None
        assert 0 < stage.share < 1
    decided = {name for name, stage in found.items() if stage.decision is not None}
    assert decided == {"ask", "enter", "head"}, "gates where they fall as they fall"


def test_a_gate_that_is_hardly_ever_met_has_no_decision(clock, ticking):
    plan = nested()
    costs = {stage.name: (1000, 0) for stage in plan.stages}
    with Session(plan, Costly(zeros(plan), clock, costs), {}) as session:
        found = {stage.name: stage for stage in look(session, ticking, inputs=[-1.0]).stages}
    assert found["enter"].decision is None
    assert found["ask"].decision is not None


def test_a_clock_that_stands_still_is_refused(clock):
    plan = chained(2)
    with (
        Session(plan, FakeRuntime(zeros(plan)), {}) as session,
        pytest.raises(MeasurementError, match="the clock stood still"),
    ):
        look(session, clock)


def test_the_digits_network_on_onnx_runtime(exported_digits):
    pytest.importorskip("onnxruntime", reason="running needs the ort extra")
    data = Dataset(inputs=np.random.default_rng(0).standard_normal((20, 1, 8, 8)).astype(np.float32))
    with Session.open(exported_digits, policy=Policy.fixed([0.9, 0.9])) as session:
        found = measure_stages(
            session, data, seconds=0.2, rng=np.random.default_rng(0), clock=time.perf_counter_ns, progress=silent
        )
        names = [stage.name for stage in session.plan.stages]
    assert [stage.name for stage in found.stages] == names
    assert 0.7 < sum(stage.share for stage in found.stages) < 1.05
    for stage in found.stages[:-1]:
        assert 0 < stage.head.value < stage.compute.value
    assert found.stages[-1].head is None
    assert all(stage.compute.low <= stage.compute.value <= stage.compute.high for stage in found.stages)
    assert 0.8 < found.tracing_overhead < 2
