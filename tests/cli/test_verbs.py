"""Every verb on a real bundle of the digits network."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import edgekit
from edgekit import plugins
from edgekit.cli import doctor
from edgekit.cli.export import make_model
from edgekit.errors import PolicyError
from edgekit.zoo import digits

TEST_SET = "edgekit.zoo.digits:test_set"
CALIBRATION_SET = "edgekit.zoo.digits:calibration_set"

FACTORY = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head(x), self.last(x.relu() + 1)

class Masked(Tiny):
    def forward(self, x):
        x = self.first(x) * (x > 0)
        return self.head(x + (x.sum(1, keepdim=True) > 0).float() * self.second(x))

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(6, 6)

made = Tiny
masked = Masked

def other():
    return 5

def failing():
    raise RuntimeError("no luck")
"""


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A folder with a user's module in it, as the current folder."""
    (tmp_path / "workshop_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "workshop_models", raising=False)
    return tmp_path


def test_inspect(shell, exported_digits):
    text = shell.works("inspect", exported_digits).stdout
    found = shell.json("inspect", exported_digits)
    exits = [step for step in found["steps"] if "exit" in step]
    macs = [step["macs"] for step in found["steps"] if "stage" in step]
    assert [step["macs_so_far"] for step in exits] == list(np.cumsum(macs))
    assert all(step["exit"] in text for step in exits)
    assert "torch.export" in text
    assert sum(file.stat().st_size for file in exported_digits.rglob("*") if file.is_file()) == (
        found["size_bytes"] + (exported_digits / "manifest.json").stat().st_size
    )


def test_inspect_shows_gates_with_what_they_guard(shell, exported_moe):
    path, printed = exported_moe
    assert "found 1 exit, 8 gates" in printed.splitlines()
    found = shell.json("inspect", path)
    gates = [step for step in found["steps"] if "gate" in step]
    assert len(gates) == 8
    stages = [step for gate in gates for step in gate["open"]["steps"]]
    assert [gate["open"]["macs"] for gate in gates] == [stage["macs"] for stage in stages]
    outside = sum(step["macs"] for step in found["steps"] if "stage" in step)
    assert (found["macs_closed"], found["macs"]) == (outside, outside + sum(gate["open"]["macs"] for gate in gates))
    assert gates[0]["closed"] == {"macs": 0, "hands_through": ["zeros"], "steps": []}
    assert all(gate["reason"].endswith("reach the outputs only through products with it") for gate in gates)
    assert {each["gate"] for each in found["capture"]["decisions"]} == {gate["gate"] for gate in gates}
    lines = shell.works("inspect", path).stdout.splitlines()
    (place,) = (place for place, line in enumerate(lines) if f"gate  {gates[1]['gate']}" in line)
    assert lines[place] == (
        f"├── gate  {gates[1]['gate']}  guards 147 k MACs (12.1 %), open if {gates[1]['value']} is not 0"
    )
    assert lines[place + 1].startswith(f"│   ├── stage {stages[1]['stage']}")
    assert lines[place + 2] == f"│   └── closed: hands through {gates[1]['closed']['hands_through'][0]}"


def test_inspect_explains_hard_values(shell, exported_moe, exported_digits):
    path, _ = exported_moe
    assert "hard values" not in shell.works("inspect", path).stdout
    _, _, text = shell.works("inspect", path, "--explain").stdout.partition("hard values: exactly 0 for some samples")
    assert text.count("(line ") == 2
    assert text.count("gate layers.") == 8
    assert "nothing in this network is multiplied by an exact 0" in (
        shell.works("inspect", exported_digits, "--explain").stdout
    )


def test_inspect_explains_what_is_no_gate(shell, workshop):
    arguments = ("export", "workshop_models:masked", "--input", "2x6", "-o", "net.edgekit")
    assert "found 1 exit, 1 gate" in shell.works(*arguments, "--smallest-gate", 1).stdout
    text = shell.works("inspect", "net.edgekit", "--explain").stdout
    assert "no gate: a mask of shape (6,) for each sample" in text
    assert "gate second: " in text
    assert "found 1 exit, 0 gates" in shell.works(*arguments, "--overwrite").stdout
    assert "no gate: it guards 36 MACs" in shell.works("inspect", "net.edgekit", "--explain").stdout


def test_inspect_of_a_bundle_from_before_gates(shell, digits_bundle):
    manifest = json.loads((digits_bundle / "manifest.json").read_text())
    manifest["schema"] = 1
    del manifest["capture"]["decisions"]
    for stage in manifest["plan"]["stages"]:
        del stage["exit"]
    (digits_bundle / "manifest.json").write_text(json.dumps(manifest))
    assert "export again to see them" in shell.works("inspect", digits_bundle, "--explain").stdout


def test_inspect_draws_a_picture(shell, exported_moe, tmp_path):
    path, _ = exported_moe
    printed = shell.works("inspect", path, "--picture", tmp_path / "plan.svg").stdout
    assert printed.splitlines()[-1] == f"wrote {tmp_path / 'plan.svg'}"
    drawn = (tmp_path / "plan.svg").read_text()
    assert drawn.count('class="diamond"') == 8
    assert "reach the outputs only through products with it" in drawn
    assert ".svg or .html" in shell.fails("inspect", path, "--picture", tmp_path / "plan.png")


def test_run_and_profile_tell_how_often_gates_were_open(shell, exported_moe, tmp_path):
    path, _ = exported_moe
    found = shell.json("run", path, "--data", TEST_SET)
    shares = [gate["share"] for gate in found["gates"]]
    assert [sum(shares[:4]), sum(shares[4:])] == pytest.approx([2, 2])  # two experts of each layer
    assert all(gate["reached"] == found["samples"] for gate in found["gates"])
    inspected = shell.json("inspect", path)
    assert inspected["macs_closed"] < found["macs"] < inspected["macs"]
    text = " ".join(shell.works("run", path, "--data", TEST_SET).stdout.split())
    assert f"gates open: {found['gates'][0]['name']} {100 * shares[0]:.1f} %" in text
    profile = shell.json("profile", path, "--data", TEST_SET, "--seconds", "0.1", "-o", tmp_path / "profile.json")
    assert profile["gates"] == found["gates"]
    assert profile["stream"]["macs"] == pytest.approx(found["macs"])


def test_smallest_gate_has_one_default():
    from inspect import signature

    from edgekit.cli.export import command
    from edgekit.exporters import export_bundle
    from edgekit.exporters.gates import SMALLEST_GATE

    functions = (edgekit.export, export_bundle, command)
    assert [signature(each).parameters["smallest_gate"].default for each in functions] == [SMALLEST_GATE] * 3


def test_inspect_finds_a_changed_byte(shell, digits_bundle):
    (stage, *_) = sorted(digits_bundle.glob("stages/onnx/*.onnx"))
    content = bytearray(stage.read_bytes())
    content[-1] ^= 1
    stage.write_bytes(content)
    assert stage.name in shell.fails("inspect", digits_bundle)


def test_run_agrees_with_the_library(shell, exported_digits, tmp_path):
    path = tmp_path / "predictions.csv"
    found = shell.json("run", exported_digits, "--data", TEST_SET, "-o", path)
    data = digits.test_set()
    with edgekit.load(exported_digits) as session:
        expected = session.run(data.batch(slice(None)))
    assert found["predictions"] == expected.logits.argmax(1).tolist()
    assert found["accuracy"] == pytest.approx((expected.logits.argmax(1) == data.labels).mean())
    assert [each["rows"] for each in found["stages"]] == list(expected.executed.values())
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["prediction"]) for row in rows] == found["predictions"]
    assert {row["exit"] for row in rows} == {found["exits"][-1]["name"]}
    assert [row["label"] for row in rows] == [str(label) for label in data.labels]


def test_run_without_labels_has_no_accuracy(shell, exported_digits, tmp_path):
    np.savez(tmp_path / "some.npz", x=digits.test_set().batch(slice(5)))
    found = shell.json("run", exported_digits, "--data", tmp_path / "some.npz", "--batch", 2)
    assert found["accuracy"] is None
    assert found["samples"] == 5
    assert "–" in shell.works("run", exported_digits, "--data", tmp_path / "some.npz").stdout


def test_calibrate_saves_a_policy_that_run_uses(shell, digits_bundle):
    given = ("--max-drop", "1%", "--minimize", "macs", "--empirical")
    policy = shell.json("calibrate", digits_bundle, "--data", CALIBRATION_SET, *given)
    assert policy["provenance"]["settings"]["max_drop"] == 0.01
    assert policy["provenance"]["guarantee"] is None
    assert shell.json("inspect", digits_bundle)["policies"]["default"] == policy
    found = shell.json("run", digits_bundle, "--data", CALIBRATION_SET)
    shares = [each["share"] for each in found["exits"]]
    assert shares == pytest.approx(policy["provenance"]["results"]["exit_shares"])
    assert shares[0] > 0.3
    whole = shell.json("run", digits_bundle, "--data", CALIBRATION_SET, "--policy", "default", "--batch", 1)
    assert whole["predictions"] == found["predictions"]


def test_calibrate_for_latency_measures_or_takes_a_profile(shell, digits_bundle, profile_file, tmp_path):
    given = ("calibrate", digits_bundle, "--data", CALIBRATION_SET, "--minimize", "latency")
    policy = shell.json(*given, "--profile", profile_file, "--name", "given")
    costs = [each["latency"]["mean_s"] for each in json.loads(profile_file.read_text())["exits"]]
    assert policy["provenance"]["results"]["exit_costs"] == pytest.approx(costs)
    text = " ".join(shell.works(*given, "--name", "measured", "--empirical").stdout.split())
    assert "empirical" in text
    assert "s, all to the last exit" in text
    assert set(shell.json("inspect", digits_bundle)["policies"]) == {"given", "measured"}


def test_what_is_proposed_on_a_server_is_certified_on_the_device(shell, digits_bundle, tmp_path):
    """Samples that propose and samples that test are two sets; the bundle carries the path, not the samples."""
    proposal = shell.json("propose", digits_bundle, "--data", CALIBRATION_SET, "--score", "best")
    assert proposal["policies"][0]["thresholds"] == ["inf", "inf"]
    assert len(proposal["scores"]) == 5
    told = shell.works("propose", digits_bundle, "--data", CALIBRATION_SET).stdout
    assert "in the order of testing" in told
    assert "a promise of 1.0 % of gap, with 95.0 % confidence, takes 305 tested samples at least" in " ".join(
        told.split()
    )
    given = ("calibrate", digits_bundle, "--data", TEST_SET, "--max-drop", "5%", "--confidence", "90%")
    page = tmp_path / "explorer.html"
    policy = shell.json(*given, "--html", page)
    found = policy["provenance"]["certificate"]
    assert (found["epsilon"], found["samples"], found["path_samples"]) == (0.05, 355, 357)
    assert found["delta"] == pytest.approx(0.1)
    assert found["mean_loss"] <= 0.05
    assert policy["provenance"]["results"]["exit_shares"][0] > 0.3
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    more = shell.json(*given, "--also", "consistency:8%", "--name", "more")["provenance"]["certificate"]["also"]
    assert [(each["loss"], each["epsilon"]) for each in more] == [("consistency", 0.08)]
    assert "--also brier: expected a loss" in shell.fails(*given, "--also", "brier")
    text = " ".join(shell.works(*given).stdout.split())
    assert "promise: with probability 0.9 over the drawing of the 355 tested samples" in text
    again = shell.fails("calibrate", digits_bundle, "--data", CALIBRATION_SET, "--max-drop", "5%")
    assert "found on 357 of these very samples" in again
    assert shell.json("run", digits_bundle, "--data", TEST_SET)["certified"] is True


def test_a_device_certifies_with_numpy_alone(shell, digits_bundle, tmp_path):
    """Where scipy is not installed, the same policy with the same p-value."""
    images = digits.test_set()
    np.savez(tmp_path / "device.npz", x=images.batch(slice(None)), y=images.labels)
    shell.works("propose", digits_bundle, "--data", CALIBRATION_SET)
    given = ("calibrate", str(digits_bundle), "--data", str(tmp_path / "device.npz"), "--max-drop", "5%", "--json")
    without = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['scipy'] = None; from edgekit.cli import main; main()", *given],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    bare, full = json.loads(without.stdout), shell.json(*given[:-1])
    assert bare["thresholds"] == full["thresholds"]
    assert bare["provenance"]["certificate"] == full["provenance"]["certificate"]


@pytest.mark.slow
def test_calibrate_in_other_ways(shell, digits_bundle):
    given = ("calibrate", digits_bundle, "--data", CALIBRATION_SET)
    strict = shell.json(*given, "--strict", "--max-drop", "8%", "--loss", "consistency", "--name", "strict")
    assert strict["provenance"]["certificate"]["conditional"] is True
    budget = shell.json(*given, "--budget", "2e5", "--name", "budget")
    assert budget["provenance"]["results"]["expected_cost"] <= 2e5
    assert "MSDNet's budgeted batch" in " ".join(shell.works(*given, "--budget", "2e5").stdout.split())
    assert shell.json(*given, "--budget", "20ms")["provenance"]["settings"]["minimize"] == "latency"
    anytime = shell.json(*given, "--anytime", "--loss", "consistency")["provenance"]["results"]["anytime"]
    assert [row["exit"] for row in anytime] == ["exit1", "exit2"]
    assert all(row["loss"] < row["bound"] < 0.2 for row in anytime)
    assert "at most" in shell.works(*given, "--anytime").stdout
    for options, message in (
        (("--budget", "2 hours"), "--budget 2 hours: expected a mean cost"),
        (("--strict", "--anytime"), "exclude each other"),
        (("--empirical", "--html", "x.html"), "leave out --empirical"),
        (("--html", "nowhere/x.html"), "--html nowhere/x.html: no such folder"),
        (("--budget", "2e5", "--proposal", "other"), "exclude each other"),
        (("--empirical", "--loss", "consistency"), "the empirical choice is for the loss 'gap'"),
        (("--proposal", "other"), "has no proposal 'other'"),
        (("--confidence", "100%"), "confidence must be above 0"),
        (("--loss", "hinge"), "loss 'hinge' is not one of gap, consistency, brier"),
    ):
        assert message in shell.fails(*given, *options)


def test_a_certificate_ends_where_the_artifacts_are_others(shell, digits_bundle, tmp_path):
    """Another file of a stage: the same plan, and not what was tested."""
    shell.works("calibrate", digits_bundle, "--data", CALIBRATION_SET, "--max-drop", "5%")
    with edgekit.Bundle.open(digits_bundle) as bundle:
        policy = bundle.policy()
        artifacts = dict(policy.provenance.artifacts)
        artifacts[next(iter(artifacts))] = "0" * 64
        origin = msgspec.structs.replace(policy.provenance, artifacts=artifacts)
        bundle.save_policy(msgspec.structs.replace(policy, provenance=origin))
    message = shell.fails("run", digits_bundle, "--data", TEST_SET)
    assert "policy 'default' is certified for other artifacts (1 files differ" in message
    assert "--force" in message
    assert shell.json("run", digits_bundle, "--data", TEST_SET, "--force")["certified"] is False
    text = " ".join(shell.works("run", digits_bundle, "--data", TEST_SET, "--force").stdout.split())
    assert "its certificate is for other artifacts" in text
    with edgekit.load(digits_bundle, force=True) as session:
        assert session.policy.provenance.guarantee is None
        assert not session.policy.provenance.certificate.valid
        with pytest.raises(PolicyError, match="certified for other artifacts"):
            session.use(bundle.policy())
    shell.works("calibrate", digits_bundle, "--data", CALIBRATION_SET, "--max-drop", "5%")
    assert shell.json("run", digits_bundle, "--data", TEST_SET)["certified"] is True


def test_profile_ends_with_the_table_and_report_with_its_path(shell, exported_digits, profile_file, tmp_path):
    text = shell.works(
        "profile", exported_digits, "--data", TEST_SET, "--seconds", "0.1", "-o", tmp_path / "again.json"
    ).stdout
    assert "median" in text
    html, table = tmp_path / "report.html", tmp_path / "report.csv"
    last = shell.works("report", profile_file, "-o", html, "--csv", table).stdout.splitlines()[-1]
    assert last == f"report: {html}"
    assert html.read_text().lstrip().lower().startswith("<!doctype html>")
    with open(table, newline="") as file:
        lines = [row["name"] for row in csv.DictReader(file) if row["kind"] in ("exit", "stream")]
    assert lines == ["exit1", "exit2", "exit3", "stream"]
    found = shell.json("report", profile_file, "-o", html)
    assert found == {"html": str(html), "csv": None, "raw_csv": None, "trace": None, "mlflow": []}


def test_profile_json_has_no_raw_samples(shell, exported_digits, tmp_path):
    path = tmp_path / "profile.json"
    found = shell.json("profile", exported_digits, "--data", TEST_SET, "--seconds", "0.1", "-o", path)
    saved = json.loads(path.read_text())
    assert len(saved["stream"]["latency_ns"]) == found["stream"]["latency"]["samples"]
    assert "latency_ns" not in found["stream"]
    assert all("latency_ns" not in each for each in found["exits"])


def test_compare(shell, profile_file):
    """A measurement this short may be called invalid by its own rules, which compare takes only when told."""
    found = shell.json("compare", profile_file, profile_file, "--invalid")
    (pair,) = found["pairs"]
    middles = [each["name"] for each in pair["differences"] if each["quantity"] in ("median", "mean")]
    assert middles[:4] == ["exit1", "exit2", "exit3", "stream"]
    assert "nothing got worse" in shell.works("compare", profile_file, profile_file, "--invalid").stdout


def test_one_profile_is_no_comparison(shell, profile_file):
    assert "two profiles or more" in shell.fails("compare", profile_file)


def test_doctor(shell):
    found = shell.json("doctor")
    assert found["runtimes"]["onnxruntime"]["works"]
    assert found["runtimes"]["fake"]["says"].startswith("made in Python")
    assert found["targets"]["onnx"]["works"]
    assert set(found["extras"]) >= {"export", "ort", "report"}
    assert "rapl" in shell.works("doctor").stdout


def test_doctor_lists_a_broken_plugin_and_a_missing_extra(shell, monkeypatch):
    found = plugins._found
    broken = {
        "lost": EntryPoint("lost", "edgekit.nowhere:Lost", "edgekit.meters"),
        "angry": EntryPoint("angry", "tests_angry_meter:Angry", "edgekit.meters"),
    }
    monkeypatch.setattr(plugins, "_found", lambda kind: found(kind) | (broken if kind == "meters" else {}))
    angry = type("Angry", (), {"__init__": lambda self: 1 / 0})
    monkeypatch.setitem(sys.modules, "tests_angry_meter", type("M", (), {"Angry": angry}))
    monkeypatch.setattr(doctor, "_installed", lambda package: package != "onnxruntime")
    report = shell.json("doctor")
    assert "cannot be loaded" in report["meters"]["lost"]["says"]
    assert "ZeroDivisionError" in report["meters"]["angry"]["says"]
    assert report["extras"]["ort"] == {
        "works": False,
        "missing": ["onnxruntime"],
        "install": "pip install 'edgekit[ort]'",
    }
    assert "pip install 'edgekit[ort]'" in shell.works("doctor").stdout


def test_zoo_list(shell):
    networks = {each["name"]: each for each in shell.json("zoo", "list")["networks"]}
    assert networks["msdnet-digits"]["trained"]
    assert networks["msdnet-cifar10"]["exits"] == 5
    assert "msdnet-digits" in shell.works("zoo", "list").stdout


def test_zoo_export_refuses_to_overwrite(shell, tmp_path):
    path = tmp_path / "net.edgekit"
    found = shell.json("zoo", "export", "msdnet-digits", "-o", path, "--packed")
    assert path.is_file()
    assert found["classes"] == list(digits.CLASSES)
    assert "exists already" in shell.fails("zoo", "export", "msdnet-digits", "-o", path)


def test_export_of_a_users_module(shell, workshop):
    found = shell.json("export", "workshop_models:made", "--input", "1x6", "-o", "net.edgekit", "--name", "tiny")
    assert found["name"] == "tiny"
    assert sum("exit" in step for step in found["steps"]) == 2
    model = make_model("workshop_models:made")
    save_file(model.state_dict(), "w.safetensors")
    arguments = ("export", "workshop_models:made", "--input", "1x6", "-o", "loaded.edgekit")
    shell.works(*arguments, "--weights", "w.safetensors")
    x = np.ones((1, 6), np.float32)
    with edgekit.load("loaded.edgekit") as session:
        expected = model(torch.from_numpy(x))[1].detach().numpy()
        np.testing.assert_allclose(session.run(x).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: {k: v for k, v in state.items() if k != "head.bias"}, "lacks 'head.bias'"),
        (lambda state: state | {"extra": state["head.bias"].clone()}, "holds 'extra'"),
        (lambda state: state | {"head.bias": state["head.bias"][:2].clone()}, "'head.bias' has shape"),
    ],
)
def test_export_of_weights_that_do_not_fit(change, match, shell, workshop):
    save_file(change(make_model("workshop_models:made").state_dict()), "w.safetensors")
    line = shell.fails(
        "export", "workshop_models:made", "--input", "1x6", "-o", "n.edgekit", "--weights", "w.safetensors"
    )
    assert match in line
    assert sorted(path.name for path in workshop.iterdir() if path.name != "__pycache__") == [
        "w.safetensors",
        "workshop_models.py",
    ]


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        ("workshop_models", "package.module:factory"),
        ("workshop_nowhere:made", "ModuleNotFoundError"),
        ("workshop_models:nothing", "AttributeError"),
        ("workshop_models:other", "made a int"),
        ("workshop_models:failing", "RuntimeError: no luck (workshop_models.py, line "),
    ],
)
def test_bad_factory(factory, match, shell, workshop):
    assert match in shell.fails("export", factory, "--input", "1x6", "-o", "net.edgekit")
    assert not (workshop / "net.edgekit").exists()


def test_errors_are_one_line(shell, exported_digits, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    assert "no such bundle" in shell.fails("inspect", tmp_path / "none.edgekit")
    assert "no such file" in shell.fails("run", exported_digits, "--data", tmp_path / "none.npz")
    assert "has no policy 'x'" in shell.fails("run", exported_digits, "--data", TEST_SET, "--policy", "x")
    assert "--max-drop lots" in shell.fails("calibrate", exported_digits, "--data", TEST_SET, "--max-drop", "lots")
    assert "not a profile" in shell.fails("report", tmp_path / "bad.json", "-o", tmp_path / "r.html")
    assert "no runtime is called" in shell.fails("run", exported_digits, "--data", TEST_SET, "--runtime", "abacus")
    assert "no network 'x'" in shell.fails("zoo", "export", "x", "-o", tmp_path / "x.edgekit")


def test_data_of_other_classes_is_refused(shell, exported_digits, tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / name / "0.png")
    assert "knows no class 'cat'" in shell.fails("run", exported_digits, "--data", tmp_path / "images")


def test_interrupted_profile_writes_nothing(shell, exported_digits, tmp_path, monkeypatch):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("edgekit.profiles.profile", interrupt)
    line = shell.fails("profile", exported_digits, "--data", TEST_SET, "-o", tmp_path / "p.json", code=130)
    assert "interrupted" in line
    assert list(tmp_path.iterdir()) == []
