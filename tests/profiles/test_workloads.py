from __future__ import annotations

import msgspec
import pytest

from edgekit.errors import MeasurementError
from edgekit.plan import Gate, Run, Stage
from edgekit.profiles.workloads import path_macs, workloads
from edgekit.tensors import TensorSpec
from tests.profiles.conftest import three_exits


def gated():
    """The three exits with two gates before the last stage; the second has a way for when it is closed."""
    plan = three_exits()
    extra = {name: TensorSpec(name, "float32", ("batch", 4)) for name in ("g", "h", "y", "z", "v", "w")}
    stages = tuple(
        Stage(name=name, inputs=(read,), outputs=(made,), macs=macs, weight_bytes=0, exit=False)
        for name, read, made, macs in (("first", "x", "g", 100), ("second", "y", "h", 1000), ("other", "y", "v", 7))
    )
    outer = Gate(name="outer", value="max_prob0", steps=(Run("first"),), outputs={"y": ("g", "x")})
    inner = Gate(
        name="inner", value="max_prob1", steps=(Run("second"),), otherwise=(Run("other"),), outputs={"z": ("h", "v")}
    )
    steps = (*plan.steps[:4], outer, inner, *plan.steps[4:])
    return msgspec.structs.replace(plan, tensors=plan.tensors | extra, stages=plan.stages + stages, steps=steps)


def test_exits_then_the_stream():
    assert [(work.name, work.kind, work.exit) for work in workloads(three_exits())] == [
        ("exit0", "exit", 0), ("exit1", "exit", 1), ("exit2", "exit", 2), ("stream", "stream", None),
    ]  # fmt: skip


def test_paths_through_gates():
    paths = [work for work in workloads(gated()) if work.kind == "path"]
    assert {work.name: dict(work.gates) for work in paths} == {
        "all gates open": {"outer": True, "inner": True},
        "all gates closed": {"outer": False, "inner": False},
        "without outer": {"outer": False, "inner": True},
        "without inner": {"outer": True, "inner": False},
    }
    assert {work.exit for work in paths} == {2}


def test_windows_are_taken_of_all_but_each_gate_alone():
    assert [work.name for work in workloads(gated()) if not work.metered] == ["without outer", "without inner"]


@pytest.mark.parametrize("name", ["stream", "stream at 10 Hz", "all gates open", "without inner"])
def test_an_exit_that_is_called_like_something_else(name):
    plan = gated()
    steps = tuple(msgspec.structs.replace(step, name=name) if step == plan.exits[1] else step for step in plan.steps)
    with pytest.raises(MeasurementError, match=f"an exit is called '{name}', as something else"):
        workloads(msgspec.structs.replace(plan, steps=steps))


@pytest.mark.parametrize(("outer", "inner", "macs"), [
    (True, True, 60 + 1100), (False, False, 60 + 7), (False, True, 60 + 1000), (True, False, 60 + 107),
])  # fmt: skip
def test_macs_of_a_path(outer, inner, macs):
    assert path_macs(gated(), {"outer": outer, "inner": inner}) == macs
