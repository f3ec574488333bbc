from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.cli import export, options
from edgekit.data import Preprocess
from edgekit.errors import InputError, PluginError


@pytest.mark.parametrize(
    ("text", "value"), [("1%", 0.01), ("0.01", 0.01), ("0", 0.0), ("100%", 1.0), (" 2.5 % ", 0.025)]
)
def test_share(text, value):
    assert options.share(text, option="--max-drop") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "one", "1%%", "1% of", "-1%", "101%", "nan", "inf", "1.5"])
def test_bad_share_is_refused(text):
    with pytest.raises(InputError, match="--max-drop"):
        options.share(text, option="--max-drop")


@given(st.floats(0, 1))
def test_percent_and_share_agree(value):
    assert options.share(f"{100 * value!r}%", option="x") == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize("text", ["", "a,,b", ",", "a,"])
def test_empty_name_is_refused(text):
    with pytest.raises(InputError, match="name is missing"):
        options.names(text)


def test_example_inputs():
    image, tokens = export.example_inputs("2x3x4x5, 1x7:int64")
    assert (image.shape, image.dtype) == ((2, 3, 4, 5), np.float32)
    assert (tokens.shape, tokens.dtype) == ((1, 7), np.int64)
    assert image.std() > 0
    np.testing.assert_array_equal(image, export.example_inputs("2x3x4x5")[0])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is no shape"),
        ("1x3x", "is no shape"),
        ("1,3,32,x", "is no shape"),
        ("1x-3", "is no shape"),
        ("1x0", "size of 0"),
        ("1x3:float33", "no dtype"),
        ("1x3:nn", "no dtype"),
    ],
)
def test_bad_input_is_refused(text, match):
    with pytest.raises(InputError, match=match):
        export.example_inputs(text)


def test_preprocess():
    assert export.read_preprocess(None, None, None) is None
    expected = Preprocess(mean=(0.5,), std=(0.25,), size=(8, 9), channels=1)
    assert export.read_preprocess("0.5", "0.25", "8x9") == expected


@pytest.mark.parametrize(
    ("mean", "std", "size", "match"),
    [
        ("0.5", None, None, "both --mean and --std"),
        (None, None, "8x8", "both --mean and --std"),
        ("a", "1", None, "--mean a"),
        ("0.5", "1", "8", "HEIGHTxWIDTH"),
        ("0.5", "1", "0x8", "HEIGHTxWIDTH"),
    ],
)
def test_bad_preprocess_is_refused(mean, std, size, match):
    with pytest.raises(InputError, match=match):
        export.read_preprocess(mean, std, size)


def test_meter_by_name():
    assert options.meter(None) is None
    assert options.meter("rapl").name == "rapl"
    with pytest.raises(PluginError, match="no meter is called 'crystal-ball'"):
        options.meter("crystal-ball")


def test_meter_with_options(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("edgekit.plugins.create", lambda kind, name, **given: asked.append((name, given)))
    options.meter("replay:power.csv")
    options.meter("ina:bus=1,address=0x40,shunt_ohms=0.1")
    options.meter("jetson:rails=VDD_IN+VDD_MUX")
    assert asked == [
        ("replay", {"path": "power.csv"}),
        ("ina", {"bus": 1, "address": 64, "shunt_ohms": 0.1}),
        ("jetson", {"rails": "VDD_IN+VDD_MUX"}),
    ]


def test_an_option_that_a_meter_does_not_take():
    with pytest.raises(PluginError, match="meter 'rapl' does not take these options"):
        options.meter("rapl:colour=red")


def test_runtime_with_options():
    assert options.runtime_options("litert") == {"runtime": "litert"}
    assert options.runtime_options("onnxruntime:fallback=false,shared_threads=True") == {
        "runtime": "onnxruntime",
        "fallback": False,
        "shared_threads": True,
    }
    assert options.runtime_options("onnxruntime:provider=cuda,row_by_row=1") == {
        "runtime": "onnxruntime",
        "provider": "cuda",
        "row_by_row": 1,
    }
    with pytest.raises(InputError, match="name=value, as --runtime onnxruntime:provider=cuda"):
        options.runtime_options("onnxruntime:cuda")
