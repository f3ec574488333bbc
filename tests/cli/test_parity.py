"""The verb parity on a real bundle of the digits network: exit codes, what is written, and one line for errors."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

import edgekit
from edgekit.cli.parity import read_budget
from edgekit.errors import InputError
from edgekit.manifest import MANIFEST
from edgekit.parity_records import Budget, Parity

TEST_SET = "edgekit.zoo.digits:test_set"
MODEL = """
from edgekit.zoo import registry

def untrained():
    return registry.find("msdnet-digits").build().eval()

def other():
    return registry.find("moe-digits").build().eval()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a user's module in it, as the current folder."""
    (tmp_path / "parity_models.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def nameless(digits_bundle):
    """The digits network under a name that the zoo does not know."""
    manifest = digits_bundle / MANIFEST
    found = msgspec.json.decode(manifest.read_bytes()) | {"name": "mine"}
    manifest.write_bytes(msgspec.json.encode(found))
    return digits_bundle


def asked(bundle, runtimes="onnxruntime,eager", *more):
    return ("parity", bundle, "--runtimes", runtimes, "--data", TEST_SET, "--limit", 48, *more)


def test_within_the_budget_is_0(shell, exported_digits, here):
    done = shell.works(*asked(exported_digits, "onnxruntime,eager", "-o", "parity.json"))
    assert done.stdout.startswith("all within the budget\n")
    assert "eager against onnxruntime: 0 of 432 decisions differ (100.000 % alike)" in done.stdout
    assert done.stderr == "wrote parity.json\n"
    found = Parity.load("parity.json")
    assert (found.network, found.samples, found.reference) == ("msdnet-digits", 48, "onnxruntime")
    assert [run.label for run in found.runs] == ["eager"]
    assert found.runs[0].runtime["name"] == "eager"


def test_beyond_the_budget_is_3_with_a_sentence_for_every_reason(shell, exported_digits, here):
    done = shell(*asked(exported_digits, "onnxruntime,eager", "--max-difference", "0", "-o", "parity.json"))
    assert done.exit_code == 3, done.output
    assert done.stdout.startswith("beyond  eager: logits of exit ")
    found = Parity.load("parity.json")
    exits = [step.name for step in found.runs[0].exits]
    assert len(found.exceeded) == len(exits)
    for name, sentence in zip(exits, found.exceeded, strict=True):
        assert sentence.startswith(f"eager: logits of exit '{name}' differ from onnxruntime by ")
        assert sentence.endswith("of their scale (allowed 0)")
    told = shell(*asked(exported_digits, "onnxruntime,eager", "--max-difference", "0", "--json"))
    assert told.exit_code == 3
    assert json.loads(told.stdout)["exceeded"] == list(found.exceeded)


def test_what_is_not_judged_is_never_beyond(shell, exported_digits):
    unjudged = ("--max-difference", "none", "--flip-margin", "none", "--max-flips", "none")
    done = shell.works(*asked(exported_digits, "onnxruntime,eager", *unjudged))
    assert done.stdout.startswith("all within the budget")
    assert "budget none" in done.stdout


def test_a_reference_and_saved_policies(shell, digits_bundle):
    with edgekit.Bundle.open(digits_bundle) as bundle:
        for name, threshold in (("eager-to-leave", 0.6), ("hesitant", 0.99)):
            bundle.save_policy(edgekit.Policy.fixed([threshold] * 2, name=name))
    arguments = ("--reference", "eager", "--policy", "hesitant,eager-to-leave")
    found = shell.json(*asked(digits_bundle, "onnxruntime,eager", *arguments))
    assert found["reference"] == "eager"
    (run,) = found["runs"]
    assert run["label"] == "onnxruntime"
    assert [each["policy"] for each in run["policies"]] == ["hesitant", "eager-to-leave"]
    assert run["policies"][0]["thresholds"] == [pytest.approx(0.99)] * 2


def test_a_certified_policy_is_compared_on_any_runtime(shell, digits_bundle):
    shell.works(
        "calibrate", digits_bundle, "--data", "edgekit.zoo.digits:calibration_set", "--max-drop", "5%", "--name", "kept"
    )
    found = shell.json(*asked(digits_bundle, "onnxruntime,eager", "--policy", "kept"))
    assert [each["policy"] for each in found["runs"][0]["policies"]] == ["kept"]


def test_a_precision_is_part_of_the_label(shell, exported_digits):
    found = shell.json(*asked(exported_digits, "onnxruntime,onnxruntime:float32"))
    (run,) = found["runs"]
    assert (run["label"], run["artifacts"]) == ("onnxruntime:float32", "onnx")
    assert {step["spread"]["largest"] for step in run["exits"]} == {0}
    assert "holds no 'onnx-int8' artifact" in shell.fails(*asked(exported_digits, "onnxruntime,onnxruntime:int8"))


def test_options_of_a_runtime_are_part_of_the_label(shell, exported_digits):
    found = shell.json(*asked(exported_digits, "onnxruntime,onnxruntime:row_by_row=1"))
    assert found["runs"][0]["runtime"]["row_by_row"] in (True, 1)


@pytest.mark.slow
def test_a_network_with_gates(shell, exported_moe):
    path, _ = exported_moe
    arguments = ("parity", path, "--runtimes", "onnxruntime,eager", "--data", TEST_SET, "--limit", 24)
    found = shell.json(*arguments)
    (gates,) = found["runs"][0]["gates"]
    assert len(gates["gates"]) == 8
    assert all(gate["compared"] == gate["agreed"] == 24 for gate in gates["gates"])
    assert "gates: 0 of 24 samples take another way" in shell.works(*arguments).stdout


@pytest.mark.slow
def test_a_model_of_ones_own(shell, nameless, here):
    assert "eager needs the model, as --model package.module:factory" in shell.fails(*asked(nameless))
    from edgekit.zoo import registry

    weights = registry.WEIGHTS / "msdnet-digits.safetensors"
    model = ("--model", "parity_models:untrained")
    done = shell.works(*asked(nameless, "onnxruntime,eager", *model, "--weights", weights))
    assert done.stdout.startswith("all within the budget")
    line = shell.fails(*asked(nameless, "onnxruntime,eager", *model))
    assert "answers otherwise than when it was exported: give the weights that it had" in line
    line = shell.fails(*asked(nameless, "onnxruntime,eager", "--model", "parity_models:other"))
    assert "the model is cut otherwise (plan" in line


@pytest.mark.parametrize(
    ("runtimes", "more", "match"),
    [
        ("onnxruntime", (), "two runtimes or more, not 1"),
        ("onnxruntime,onnxruntime", (), "'onnxruntime' is there twice"),
        ("onnxruntime,abacus", (), "no runtime is called 'abacus'"),
        ("onnxruntime,onnxruntime:int7", (), "expected a runtime, with a precision"),
        ("onnxruntime,onnxruntime:int8:float16", (), "expected a runtime, with a precision"),
        ("onnxruntime,eager", ("--reference", "litert"), "--reference litert: is not among"),
        ("onnxruntime,eager", ("--policy", "none-such"), "has no policy 'none-such'"),
        ("onnxruntime,eager", ("--max-flips", "few"), "--max-flips few"),
        ("onnxruntime,eager", ("--flip-margin", "-1"), "--flip-margin -1"),
    ],
)
def test_what_is_refused(shell, exported_digits, runtimes, more, match):
    assert match in shell.fails(*asked(exported_digits, runtimes, *more))


def test_budgets_are_read():
    assert read_budget("0.02%", "1e-4", "1e-4") == Budget()
    assert read_budget("3", "none", "0.5") == Budget(flips=3, flip_share=None, difference=None, margin=0.5)
    assert read_budget("0.5", "1", "none") == Budget(flip_share=0.5, difference=1.0, margin=None)
    assert read_budget("none", "1e-4", "1e-4") == Budget(flip_share=None)
    for wrong in (("-1", "1", "1"), ("1", "1,2", "1"), ("1", "x", "1"), ("1", "1", "nan")):
        with pytest.raises(InputError):
            read_budget(*wrong)


def test_data_without_labels(shell, exported_digits, here):
    np.savez("data.npz", inputs=np.zeros((3, 1, 8, 8), np.float32))
    arguments = ("parity", exported_digits, "--runtimes", "onnxruntime,onnxruntime:float32", "--data", "data.npz")
    assert "accuracy" not in shell.works(*arguments).stdout
    assert shell.json(*arguments)["labelled"] is False
