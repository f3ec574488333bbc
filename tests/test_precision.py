"""The report of lower precision."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from edgekit.precision import PrecisionReport, StagePrecision
from edgekit.report.precision import precision_lines, precision_table


def report(**changes):
    stages = (
        StagePrecision(
            name="blocks.0", precision="int8", reached=900, calibrated=512, float_bytes=4000, size_bytes=1000,
            float_s=2e-3, time_s=1e-3, largest_difference=0.25, mean_difference=0.01, flips=3, drop=0.002,
        ),
        StagePrecision(
            name="blocks.1", precision="float32", kept="only 3 of 900 samples reach it, 16 are needed", reached=3,
            calibrated=3, float_bytes=6000,
        ),
    )  # fmt: skip
    values = {
        "created": "2026-01-01T00:00:00+00:00", "network": "net", "plan": "0" * 64, "target": "onnx",
        "precision": "int8", "artifacts": "onnx-int8", "policy": "default", "calibrated_on": "survivors",
        "data": "digits.npz", "data_sha256": "1" * 64, "calibration_samples": 900, "samples": 900,
        "measure": "accuracy", "drop": 0.002, "max_drop": 0.01, "float_accuracy": 0.95, "accuracy": 0.948,
        "float_exits": (0.9, 0.1), "exits": (0.91, 0.09), "flips": 3, "changed": 2, "largest_difference": 0.25,
        "float_bytes": 10_000, "size_bytes": 7000, "float_s": 4e-3, "time_s": 3e-3, "runtime": {"name": "fake"},
        "stages": stages,
    }  # fmt: skip
    return PrecisionReport(**(values | changes))


def shown(made, *, width=140):
    console = Console(file=io.StringIO(), width=width)
    console.print(precision_table(made))
    for line in precision_lines(made):
        console.print(line, soft_wrap=True)
    return console.file.getvalue()


def test_a_report_is_the_same_after_json():
    assert msgspec.json.decode(msgspec.json.encode(report()), type=PrecisionReport) == report()
    assert msgspec.convert(msgspec.to_builtins(report()), PrecisionReport) == report()


@pytest.mark.parametrize(("drop", "most", "within"), [(0.01, 0.01, True), (0.02, 0.01, False), (0.5, None, True)])
def test_whether_the_drop_is_what_was_asked_for(drop, most, within):
    assert report(drop=drop, max_drop=most).within_max_drop is within


def test_what_people_see():
    text = shown(report())
    lines = {words[0]: words for line in text.splitlines() if len(words := line.split()) > 1 and words[1] != "stays"}
    assert lines["blocks.0"] == [
        "blocks.0", "int8", "512", "1000", "B", "0.25×", "1.000", "ms", "0.50×", "0.25", "3", "−0.2", "points",
    ]  # fmt: skip
    assert lines["blocks.1"][:3] == ["blocks.1", "float32", "3"]
    assert "the set" in text
    assert "0.70×" in text
    assert "accuracy 94.80 %, in float 95.00 % (900 samples held out, policy default)" in text
    assert "exits 91.0 %, 9.0 %, in float 90.0 %, 10.0 %" in text
    assert "calibrated on 900 samples of digits.npz, that survive to each stage" in text
    assert "blocks.1 stays in float: only 3 of 900 samples reach it, 16 are needed" in text


def test_without_labels_it_is_float_that_is_agreed_with():
    text = shown(report(measure="agreement", float_accuracy=None, accuracy=None, calibrated_on=None))
    assert "900 samples held out without labels: agreement with float's answers" in text
    assert "calibrated on" not in text


def test_the_table_fits_a_terminal():
    assert max(map(len, shown(report(), width=100).splitlines()[:8])) <= 100
