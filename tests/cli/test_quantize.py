"""``edgekit quantize``, typed as people do."""

from __future__ import annotations

import json

TRAINING, TEST = "edgekit.zoo.digits:training_set", "edgekit.zoo.digits:test_set"


def test_quantize_then_use_it(shell, digits_bundle):
    done = shell.works("quantize", digits_bundle, "--data", TRAINING, "--max-drop", "2%")
    assert "onnx-int8: each stage alone in int8, then the set" in done.stdout
    assert "accuracy" in done.stdout
    assert f"saved in {digits_bundle} as 'onnx-int8'" in done.stdout.replace("\n", "")
    known = shell.json("inspect", digits_bundle)
    assert set(known["targets"]) == {"onnx", "onnx-int8"}
    assert known["parity"]["onnx-int8"]["precision"] == "int8"
    float_run, int8_run = (
        shell.json("run", digits_bundle, "--data", TEST, "--precision", precision) for precision in ("float32", "int8")
    )
    assert abs(float_run["accuracy"] - int8_run["accuracy"]) <= 0.02
    assert float_run["scores"] != int8_run["scores"]


def test_the_report_is_one_object_for_machines(shell, digits_bundle):
    stage = shell.json("inspect", digits_bundle)["steps"][0]["stage"]
    report = shell.json("quantize", digits_bundle, "--data", TRAINING, "--calibrate-on", "all", "--keep-float", stage)
    assert report["calibrated_on"] == "all"
    assert report["stages"][0]["kept"] == "asked for"
    assert report["stages"][1]["precision"] == "int8"
    assert report["size_bytes"] < report["float_bytes"]
    json.dumps(report)


def test_what_goes_wrong_is_one_line(shell, digits_bundle, tmp_path):
    assert "stage 'nowhere' does not exist" in shell.fails(
        "quantize", digits_bundle, "--data", TRAINING, "--keep-float", "nowhere"
    )
    assert "nothing can be quantised for target 'litert'" in shell.fails(
        "quantize", digits_bundle, "--data", TRAINING, "--target", "litert"
    )
    assert "--max-drop 200%" in shell.fails("quantize", digits_bundle, "--data", TRAINING, "--max-drop", "200%")
    assert "has no policy 'brave'" in shell.fails("quantize", digits_bundle, "--data", TRAINING, "--policy", "brave")
