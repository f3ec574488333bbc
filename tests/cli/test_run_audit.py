"""``edgekit run --audit`` on a bundle of the digits network."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.bundle import Bundle
from edgekit.policy import Policy
from edgekit.zoo import digits

TEST_SET = "edgekit.zoo.digits:test_set"


@pytest.fixture
def bundle(digits_bundle):
    """With a policy that keeps to the last exit's answers, one that does not, and one that is calibrated."""
    with Bundle.open(digits_bundle) as opened:
        opened.save_policy(Policy.fixed([0.99, 0.99], name="careful"))
        opened.save_policy(Policy.fixed([0.2, 0.2], name="careless"))
    return digits_bundle


@pytest.fixture
def audit(shell, bundle):
    """The audit's part of a run's JSON."""

    def run(policy, *options):
        return shell.json("run", bundle, "--data", TEST_SET, "--policy", policy, *options)["audit"]

    return run


def test_without_it_nothing_is_audited(audit):
    assert audit("careful") is None


def test_audit_says_where_it_stands_and_changes_no_answer(shell, bundle, audit):
    given = ("run", bundle, "--data", TEST_SET, "--policy", "careful")
    audited = shell.json(*given, "--audit", "50%", "--epsilon", "5%")
    status = audited.pop("audit")
    plain = shell.json(*given)
    assert audited == {name: value for name, value in plain.items() if name != "audit"}
    assert status["samples"] == 355
    assert status["audits"] / 355 == pytest.approx(0.5, abs=0.1)
    assert status["mean"] <= 0.02
    assert (status["epsilon"], status["limit"], status["alarm_at"]) == (0.05, 100.0, None)
    assert (status["serving"], status["state"]) == ("calibrated", None)
    text = " ".join(shell.works(*given, "--audit", "0.5", "--epsilon", "0.05").stdout.split())
    assert f"{status['audits']} of 355 samples" in text
    assert "target 5.0 %" in text
    assert "alarm at 100" in text
    assert "in memory only" in text
    assert "alarm at audit" not in text


def test_state_goes_on_at_the_next_run(audit, tmp_path):
    options = ("--audit", "50%", "--epsilon", "5%")
    path = tmp_path / "audit.json"
    parts = [audit("careful", *options, "--audit-state", path, "--batch", batch) for batch in (1, 64)]
    assert [part["samples"] for part in parts] == [355, 710]
    assert parts[1]["audits"] > 1.5 * parts[0]["audits"]
    assert parts[1]["state"] == str(path)
    assert sorted(each.name for each in tmp_path.glob("*audit*")) == [".audit.json.lock", "audit.json"]


def test_an_alarm_is_shown_with_what_to_do_next(shell, bundle, audit):
    options = ("--audit", "100%", "--epsilon", "1%")
    assert audit("careless", *options)["alarm_at"] > 0
    done = shell.works("run", bundle, "--data", TEST_SET, "--policy", "careless", *options)
    *_, alarm, following = done.stdout.splitlines()
    assert alarm.startswith("alarm at audit ")
    assert alarm.endswith("the mean loss is above 1.0 %")
    assert following.startswith("next: edgekit calibrate on fresh data")


def test_an_alarm_is_red_on_a_terminal(shell, bundle, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    options = ("--audit", "1", "--epsilon", "1%")
    done = shell.works("run", bundle, "--data", TEST_SET, "--policy", "careless", *options)
    assert "\x1b[1;31malarm at audit" in done.stdout
    assert "\x1b[31mnext: " in done.stdout


def test_reverting_keeps_the_accuracy_of_the_last_exit(shell, bundle, audit, tmp_path):
    options = ("--audit", "100%", "--epsilon", "1%", "--on-alarm", "revert", "--audit-state", tmp_path / "audit.json")
    status = audit("careless", *options)
    assert (status["serving"], status["thresholds"]) == ("never-exit", ["inf", "inf"])
    again = shell.json("run", bundle, "--data", TEST_SET, "--policy", "careless", *options)
    assert [each["rows"] for each in again["exits"]] == [0, 0, 355]
    text = shell.works("run", bundle, "--data", TEST_SET, "--policy", "careless", *options).stdout
    assert "nobody leaves early until certified again: " in text.splitlines()[-1]


def test_labels_of_the_data_give_the_accuracy_gap(audit):
    status = audit("careless", "--audit", "1", "--epsilon", "1%", "--audit-loss", "gap", "--batch", 50)
    assert (status["audits"], status["waiting"]) == (355, 0)
    labels = digits.test_set().labels
    assert len(labels) == 355
    assert 0.01 < status["mean"] < 0.9
    assert status["low"] < status["mean"] < status["high"]


def test_adaptation_makes_careless_thresholds_stricter(audit):
    status = audit("careless", "--audit", "1", "--epsilon", "2%", "--gamma", "0.1", "--batch", 1)
    assert status["serving"] == "adapted"
    assert min(status["thresholds"]) > 0.3
    assert status["mean"] - 0.02 <= status["excess_bound"]


def test_a_calibrated_policy_brings_its_epsilon(shell, bundle, audit):
    shell.works("calibrate", bundle, "--data", "edgekit.zoo.digits:calibration_set", "--max-drop", "3%")
    assert audit("default", "--audit", "10%")["epsilon"] == 0.03


def test_what_cannot_be_audited_is_one_line(shell, bundle, tmp_path):
    run = ("run", bundle, "--data", TEST_SET, "--policy", "careful")
    assert "--audit-state needs --audit" in shell.fails(*run, "--audit-state", tmp_path / "a.json")
    assert "--audit some" in shell.fails(*run, "--audit", "some", "--epsilon", "1%")
    assert "give it, as --epsilon 2%" in shell.fails(*run, "--audit", "1%")
    (tmp_path / "a.json").write_text("no state")
    line = shell.fails(*run, "--audit", "1%", "--epsilon", "1%", "--audit-state", tmp_path / "a.json")
    assert f"{tmp_path / 'a.json'}: no audit state" in line
    np.savez(tmp_path / "some.npz", x=digits.test_set().batch(slice(5)))
    unlabelled = ("run", bundle, "--data", tmp_path / "some.npz", "--policy", "careful", "--epsilon", "1%")
    assert "has no labels" in shell.fails(*unlabelled, "--audit", "1", "--audit-loss", "gap")
