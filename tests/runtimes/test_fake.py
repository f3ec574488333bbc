"""The scripted runtime: counts, says that it is scripted, and refuses a script that is not the plan's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekit import plugins
from edgekit.errors import InputError, PluginError
from edgekit.interfaces import DeviceClock, OperatorTimer
from edgekit.plan import Stage
from edgekit.runtimes.fake import FakeDevice, FakeRuntime
from edgekit.tensors import TensorSpec

STAGE = Stage(name="s", inputs=("x",), outputs=("y", "z"), macs=None, weight_bytes=0)


def bound(handler, *, rows=2, outputs=("y",)):
    runtime = FakeRuntime(handler)
    buffers = {name: runtime.allocate(TensorSpec(name, "float32", ("batch", 2)), 3) for name in "xyz"}
    buffers["x"].write(np.ones((3, 2), np.float32))
    return runtime, buffers, runtime.open(STAGE, Path()).bind(buffers, rows=rows, outputs=outputs)


def test_runs_the_handler_on_the_rows_and_counts():
    runtime, buffers, run = bound(lambda stage, inputs: {"y": inputs["x"] * 3, "z": inputs["x"]})
    run()
    run()
    np.testing.assert_array_equal(buffers["y"].read(3), [[3, 3], [3, 3], [0, 0]])
    assert not buffers["z"].read(3).any()
    assert (runtime.calls, runtime.rows, runtime.asked) == ({"s": 2}, {"s": 4}, {"s": ("y",)})


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, "stage 's': the handler returned no 'y'"),
        ({"y": np.zeros((1, 2), np.float32)}, r"'y' as float32 \(1, 2\), the plan says float32 \(2, 2\)"),
        ({"y": np.zeros((2, 2))}, r"'y' as float64 \(2, 2\), the plan says float32"),
    ],
)
def test_a_script_that_is_not_the_plans(made, message):
    _, _, run = bound(lambda stage, inputs: made)
    with pytest.raises(InputError, match=message):
        run()


def test_says_that_it_is_scripted():
    assert FakeRuntime(lambda stage, inputs: {}, threads=4).describe() == {
        "name": "fake",
        "version": "",
        "threads": 4,
        "scripted": True,
    }


def test_by_name_it_needs_its_script():
    made = plugins.create("runtimes", "fake", handler=lambda stage, inputs: {})
    assert made.name == "fake"
    with pytest.raises(PluginError, match="runtime 'fake' does not take these options"):
        plugins.create("runtimes", "fake")


def test_a_scripted_device_has_a_scripted_clock():
    now = [100]

    def handler(stage, inputs):
        now[0] += 40
        return {"y": inputs["x"]}

    runtime = FakeDevice(handler, device_clock=lambda: now[0])
    buffers = {name: runtime.allocate(TensorSpec(name, "float32", ("batch", 2)), 1) for name in "xyz"}
    run = runtime.open(STAGE, Path()).bind(buffers, rows=1, outputs=("y",))
    begin = runtime.device_mark()
    run()
    run()
    assert runtime.device_ns(begin, runtime.device_mark()) == 80
    runtime.synchronize()
    assert runtime.waits == 1
    assert runtime.describe()["scripted"] is True


def test_only_the_device_has_a_clock():
    assert isinstance(FakeDevice(lambda stage, inputs: {}, device_clock=lambda: 0), DeviceClock)
    assert not isinstance(FakeRuntime(lambda stage, inputs: {}), DeviceClock | OperatorTimer)
