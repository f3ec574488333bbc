"""Sessions on plans with gates, against an interpreter of one row at a time."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BundleError, InputError
from edgekit.plan import SCORES, ZERO, Exit, Gate, Plan, Run, Stage, walk
from edgekit.policy import Policy
from edgekit.runtimes.fake import FakeRuntime
from edgekit.session import Session
from edgekit.tensors import TensorSpec

CLASSES = 2


class Maker:
    """Draws a random program. Stage ``sN`` computes whole numbers from whole numbers, so sums are exact."""

    def __init__(self, draw):
        self.draw = draw
        self.tensors = {"x": TensorSpec("x", "float32", ("batch", 1))}
        self.stages = []
        self.gates = 0

    def tensor(self):
        name = f"t{len(self.tensors)}"
        self.tensors[name] = TensorSpec(name, "float32", ("batch", 1))
        return name

    def run(self, ready, extra=()):
        inputs = self.draw(st.lists(st.sampled_from(ready), min_size=1, max_size=3, unique=True))
        made = [self.tensor() for _ in range(self.draw(st.integers(1, 2)))]
        plain = [stage for stage in self.stages if not stage.exit]
        if plain and not extra and self.draw(st.integers(0, 3)) == 0:  # one that there is once more, as a loop has it
            stage = self.draw(st.sampled_from(plain))
            tensors = {each: self.draw(st.sampled_from(ready)) for each in stage.inputs}
            tensors |= {each: self.tensor() for each in stage.outputs}
            return Run(stage.name, tensors), [tensors[each] for each in stage.outputs]
        name = f"s{len(self.stages)}"
        temperature = [f"temperature{extra[0]}"] if extra else []
        outputs = (*made, *(extra[1:] if extra else ()))
        self.stages.append(
            Stage(name=name, inputs=(*inputs, *temperature), outputs=outputs, macs=1, weight_bytes=0, exit=bool(extra))
        )
        return Run(name), made

    def steps(self, ready, depth):
        ready, steps = list(ready), []
        for _ in range(self.draw(st.integers(0 if depth < 3 else 1, 3))):
            if depth and self.draw(st.booleans()):
                step, made = self.gate(ready, depth - 1)
            else:
                step, made = self.run(ready)
            steps.append(step)
            ready += made
        return tuple(steps), ready

    def gate(self, ready, depth):
        self.gates += 1
        name = f"g{self.gates}"
        value = self.draw(st.sampled_from(ready))
        opened, when_open = self.steps(ready, depth)
        closed, when_closed = self.steps(ready, depth if self.draw(st.booleans()) else 0)
        outputs = {
            self.tensor(): (
                self.draw(st.sampled_from([*when_open, ZERO])),
                self.draw(st.sampled_from([*when_closed, ZERO])),
            )
            for _ in range(self.draw(st.integers(1, 2)))
        }
        return Gate(name=name, value=value, steps=opened, otherwise=closed, outputs=outputs), list(outputs)

    def plan(self):
        steps, ready = [], ["x"]
        for index in range(self.draw(st.integers(1, 3))):
            more, ready = self.steps(ready, 3)
            names = {score: f"{score}{index}" for score in SCORES}
            step = Exit(name=f"e{index}", logits=f"logits{index}", temperature=f"temperature{index}", scores=names)
            self.tensors[step.logits] = TensorSpec(step.logits, "float32", ("batch", CLASSES))
            self.tensors[step.temperature] = TensorSpec(step.temperature, "float32", ())
            self.tensors |= {each: TensorSpec(each, "float32", ("batch",)) for each in names.values()}
            run, made = self.run(ready, (index, step.logits, *names.values()))
            steps += [*more, run, step]
            ready += made
        inputs = (self.tensors["x"],)
        return Plan(inputs=inputs, tensors=self.tensors, stages=tuple(self.stages), steps=tuple(steps))


def compute(stage, values):
    """Every output of a stage for one row, a whole number from -3 to 3, or NaN now and then."""
    total = sum((3 + place) * (9 if np.isnan(value) else value) for place, value in enumerate(values)) + int(stage[1:])
    return lambda place: np.nan if (total + place) % 11 == 0 else float((total * 5 + place * 2) % 7 - 3)


def handler(plan):
    def handle(name, inputs):
        stage = plan.stage(name)
        columns = [inputs[each].reshape(-1) for each in stage.inputs if not each.startswith("temperature")]
        made = {}
        for place, output in enumerate(stage.outputs):
            rows = [compute(name, [column[row] for column in columns])(place) for row in range(len(columns[0]))]
            array = np.array(rows, dtype=np.float32)
            shape = plan.tensors[output].concrete(len(rows))
            made[output] = (
                np.nan_to_num(array, nan=5)[:, None].repeat(CLASSES, 1)
                if len(shape) == 2 and shape[1] > 1
                else array.reshape(shape)
            )
        return made

    return handle


def interpret(plan, policy, x, gates=None, leave=None):
    """Exit, logits and executed stages of one row, in plain Python."""
    values, executed = {"x": x, ZERO: 0.0}, dict.fromkeys((stage.name for stage in plan.stages), 0)

    def run(steps):
        for step in steps:
            if isinstance(step, Run):
                stage = plan.stage(step.stage)
                given = [values[n] for n in step.called(stage.inputs) if not n.startswith("temperature")]
                made = compute(stage.name, given)
                values.update({output: made(place) for place, output in enumerate(step.called(stage.outputs))})
                executed[stage.name] += 1
            elif isinstance(step, Gate):
                is_open = values[step.value] != 0 if step.name not in (gates or {}) else gates[step.name]
                run(step.steps if is_open else step.otherwise)
                values.update({name: values[ways[0 if is_open else 1]] for name, ways in step.outputs.items()})

    for index, step in enumerate(plan.exits):
        begin = 0 if index == 0 else plan.steps.index(plan.exits[index - 1]) + 1
        run(plan.steps[begin : plan.steps.index(step)])
        accepts = index == len(plan.exits) - 1 or values[step.scores["max_prob"]] >= policy.thresholds[index]
        if accepts if leave is None else index == leave:
            return index, np.nan_to_num(values[step.logits], nan=5), executed
    raise AssertionError("the last exit accepts all")


@st.composite
def cases(draw):
    plan = Maker(draw).plan()
    thresholds = [draw(st.sampled_from([-2.0, 0.0, 2.0])) for _ in plan.exits[:-1]]
    rows = draw(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
    names = [gate.name for gate in plan.gates]
    gates = draw(st.dictionaries(st.sampled_from(names), st.booleans())) if names else {}
    return plan, Policy.fixed(thresholds), np.array(rows, dtype=np.float32)[:, None], gates


def expected(plan, policy, inputs, gates, leave=None):
    found = [interpret(plan, policy, float(x), gates, leave) for x in inputs[:, 0]]
    executed = {stage.name: sum(each[2][stage.name] for each in found) for stage in plan.stages}
    return [each[0] for each in found], np.array([[each[1]] * CLASSES for each in found], np.float32), executed


def check(result, plan, policy, inputs, gates):
    exits, logits, executed = expected(plan, policy, inputs, gates)
    np.testing.assert_array_equal(result.exit, exits)
    np.testing.assert_array_equal(result.logits, logits)
    runs = [step for step in walk(plan.steps) if isinstance(step, Run)]
    read = {name for run in runs for name in run.called(plan.stage(run.stage).inputs)}
    read |= {name for step in plan.exits for name in (step.logits, *step.scores.values())}
    read |= {gate.value for gate in plan.gates}
    read |= {source for gate in plan.gates for sources in gate.outputs.values() for source in sources}
    idle = {run.stage for run in runs if read.isdisjoint(run.called(plan.stage(run.stage).outputs))}
    for stage in {stage.name for stage in plan.stages} - idle:
        assert result.executed[stage] == executed[stage]


@given(cases())
@settings(max_examples=300, deadline=None)
def test_any_batch_and_single_rows_equal_the_interpreter(case):
    plan, policy, inputs, gates = case
    with Session(plan, FakeRuntime(handler(plan)), {}, policy=policy) as session:
        for forced in ({}, gates):
            check(session.run(inputs, gates=forced), plan, policy, inputs, forced)
            for row in range(len(inputs)):
                check(session.run(inputs[row : row + 1], gates=forced), plan, policy, inputs[row : row + 1], forced)
            check(session.run(inputs[::-1], gates=forced), plan, policy, inputs[::-1], forced)
        for index, logits in enumerate(session.run_exits(inputs)):
            np.testing.assert_array_equal(logits, expected(plan, policy, inputs, {}, leave=index)[1])


def chain(gates=3):
    """``x`` through gates of one stage each, which open on an odd value and add 2 to it; a closed one hands it on."""
    tensors, stages, steps, at = {"x": TensorSpec("x", "float32", ("batch", 1))}, [], [], "x"
    for index in range(gates):
        tensors |= {name: TensorSpec(name, "float32", ("batch", 1)) for name in (f"v{index}", f"y{index}", f"z{index}")}
        stages.append(
            Stage(name=f"ask{index}", inputs=(at,), outputs=(f"v{index}",), macs=1, weight_bytes=0, exit=False)
        )
        stages.append(
            Stage(name=f"add{index}", inputs=(at,), outputs=(f"y{index}",), macs=1, weight_bytes=0, exit=False)
        )
        inner = (Run(f"add{index}"),)
        gate = Gate(name=f"g{index}", value=f"v{index}", steps=inner, outputs={f"z{index}": (f"y{index}", at)})
        steps += [Run(f"ask{index}"), gate]
        at = f"z{index}"
    names = {score: score for score in SCORES}
    tensors |= {"logits": TensorSpec("logits", "float32", ("batch", CLASSES)), "t": TensorSpec("t", "float32", ())}
    tensors |= {name: TensorSpec(name, "float32", ("batch",)) for name in names}
    stages.append(Stage(name="head", inputs=(at, "t"), outputs=("logits", *names), macs=1, weight_bytes=0))
    steps += [Run("head"), Exit(name="e", logits="logits", temperature="t", scores=names)]
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=tuple(stages), steps=tuple(steps))


def chain_handler(name, inputs):
    rows = next(array for name, array in inputs.items() if array.ndim == 2)
    if name.startswith("ask"):
        return {f"v{name[3:]}": rows % 2}
    if name.startswith("add"):
        return {f"y{name[3:]}": rows + 2}
    return {"logits": np.repeat(rows, CLASSES, 1), **dict.fromkeys(SCORES, rows[:, 0] * 0)}


def test_a_chain_of_gates_works_in_two_buffers_and_binds_each_stage_for_each():
    plan = chain(20)
    runtime = FakeRuntime(chain_handler)
    with Session(plan, runtime, {}) as session:
        for rows in ([1], [2], [1, 2, 3, 4], [1, 3], [2, 4]):
            inputs = np.array(rows, np.float32)[:, None]
            result = session.run(inputs)
            np.testing.assert_array_equal(result.logits[:, 0], [row + 40 * (row % 2) for row in rows])
            assert result.executed["add7"] == sum(row % 2 for row in rows)
            for row in inputs:
                session.run(row[None])
        assert len(session._slots._pool["float32", ("batch", 1)]) == 4  # two, the value, and rows gathered
        assert len(session._one._nodes) <= 4 * 20  # two places, and the gate before open or closed


def test_a_nan_value_is_open():
    with Session(chain(1), FakeRuntime(chain_handler), {}) as session:
        inputs = np.array([[np.nan], [2]], np.float32)
        assert session.run(inputs).executed["add0"] == 1
        assert session.run(inputs[:1]).executed["add0"] == 1


def test_an_unknown_gate_is_named():
    with (
        Session(chain(1), FakeRuntime(chain_handler), {}) as session,
        pytest.raises(InputError, match="gate 'g7' does not exist; the network has g0"),
    ):
        session.run(np.zeros((1, 1), np.float32), gates={"g7": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "nothing"}, "gate 'g0' needs 'nothing' before anything has made it"),
        ({"value": "t"}, None),
        ({"value": "logits"}, "gate 'g0' needs 'logits' before"),
        ({"outputs": {"z0": ("y0", "y0")}}, "gate 'g0' gives 'y0' when closed, which nothing has made"),
        ({"outputs": {"z9": ("y0", "x")}}, "output 'z9' of gate 'g0' has no specification"),
        ({"outputs": {"z0": ("y0", "t")}}, "gate 'g0' gives 't' as 'z0', which has another shape or dtype"),
        ({"steps": (Run("nothing"),)}, "it runs stage 'nothing', which does not exist"),
        ({"steps": (Run("add0"), chain(1).exits[0])}, "exit 'e' is inside a gate"),
    ],
)
def test_gates_that_do_not_fit(change, message):
    plan = chain(1)
    gate = msgspec.structs.replace(plan.gates[0], **change)

    def changed():
        return msgspec.structs.replace(plan, steps=(plan.steps[0], gate, *plan.steps[2:]))

    if message is None:
        changed()
        return
    with pytest.raises(BundleError, match=message):
        changed()


def test_a_plan_with_gates_is_read_as_it_was_written():
    plan = chain(2)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan
