from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import edgekit
from edgekit.bundle import Bundle
from edgekit.calibration import study
from edgekit.calibration.certify import certify
from edgekit.calibration.losses import LOSSES
from edgekit.calibration.study import Check, Recording, boundary, controls, draws, load_recording, main, record
from edgekit.errors import CalibrationError
from edgekit.session import Session


@pytest.fixture
def recording(noisy_network):
    logits, labels = noisy_network(3, 800)
    return Recording(logits=logits, labels=labels, costs=np.array([1.0, 2.0, 3.0]), source="scripted")


@pytest.fixture
def scores_file(recording, tmp_path):
    path = tmp_path / "scores.npz"
    np.savez(path, logits=recording.logits, labels=recording.labels, costs=recording.costs)
    return path


@pytest.fixture
def short(monkeypatch):
    """Fewer settings: the whole of the study, not its size, is looked at here."""
    monkeypatch.setattr(study, "DELTAS", (0.1,))
    monkeypatch.setattr(study, "EPSILONS", (0.02,))
    monkeypatch.setattr(study, "BOUNDARY_REPETITIONS", 1)


def everything_accepted(scores, losses, path, **options):
    """A certification that has lost its mind."""
    return certify(scores, np.zeros_like(losses), path, **options)


def test_a_check_knows_whether_it_holds():
    assert Check(part="p", what="w", found=0.1, must="<=", limit=0.1).holds
    assert not Check(part="p", what="w", found=0.11, must="<=", limit=0.1).holds
    assert not Check(part="p", what="w", found=0.1, must=">", limit=0.1).holds
    assert not Check(part="p", what="w", found=math.nan, must="<=", limit=0.1).holds
    assert Check(part="p", what="w", found=7.0).holds


@pytest.mark.parametrize("kind", study.BOUNDARY_LOSSES)
def test_losses_at_the_boundary_have_that_mean_and_are_at_most_1(kind):
    losses = study.BOUNDARY_LOSSES[kind](np.random.default_rng(0), 400_000, 0.05)
    assert losses.mean() == pytest.approx(0.05, abs=4 * losses.std() / math.sqrt(len(losses)) + 1e-12)
    assert losses.max() <= 1


def test_the_boundary_holds(short):
    checks = boundary(100)
    assert len(checks) == 3 * 18
    assert all(check.holds for check in checks)
    assert max(check.found for check in checks) > 0.05


def test_the_boundary_catches_a_test_that_rejects_too_often(monkeypatch, short):
    honest = study.p_value
    monkeypatch.setattr(study, "p_value", lambda losses, **options: honest(losses, **options) / 4)
    assert sum(not check.holds for check in boundary(100)) > 5


def test_wrong_methods_are_caught_and_the_right_one_holds():
    checks = controls(200)
    assert all(check.holds for check in checks)
    assert [check.must for check in checks] == ["<=", "<=", ">", ">", ">", ">"]


def test_a_sequence_that_is_off_by_one_would_be_noticed(monkeypatch):
    """The wrong method in the right one's place."""

    def off_by_one(*arguments, **options):
        found = certify(*arguments, **options)
        return replace(found, accepted=(*found.accepted, *filter(None, [found.failed])))

    monkeypatch.setattr(study, "certify", off_by_one)
    (wrong,) = (check for check in controls(100) if not check.holds)
    assert wrong.what == "the right sequence: promise broken"


def test_a_study_that_cannot_tell_wrong_methods_does_not_pass(monkeypatch):
    """Were the grid harmless, nothing would break the promise, and nothing would be shown."""
    monkeypatch.setattr(study, "allowed", lambda delta, repetitions: 1.0)
    assert sum(not check.holds for check in controls(50)) == 4


def test_real_logits_hold_and_are_compared_with_the_oracle(recording, short):
    checks = draws(recording, 40, floor=3.0)
    assert all(check.holds for check in checks)
    found = {check.what: check.found for check in checks}
    gap = "gap, epsilon=0.02, delta=0.1: mean cost in costs of"
    assert 1 / 3 <= found[f"{gap} the last exit"] < 1
    assert 1 < found[f"{gap} the oracle on the path"] < 2
    assert found[f"{gap} the oracle over all thresholds"] >= found[f"{gap} the oracle on the path"] - 1e-9
    assert {check.part for check in checks} == {"validity", "power"}
    (floor,) = (check for check in checks if check.limit == 3.0)
    assert floor.what.startswith("gap, epsilon=0.02")
    strict = draws(recording, 40, floor=1.0)
    assert [check.what for check in strict if not check.holds] == [floor.what]


def test_a_certificate_that_accepts_everything_breaks_its_promise(recording, short, monkeypatch):
    monkeypatch.setattr(study, "certify", everything_accepted)
    checks = draws(recording, 10)
    broken = [check for check in checks if check.part == "validity" and not check.holds]
    assert {check.what.partition(" ")[0] for check in broken} == {"gap", "consistency", "brier"}
    assert all(check.found == 1 for check in broken)


def test_a_risk_just_above_epsilon_breaks_the_promise(short, monkeypatch):
    losses = np.zeros((2, 1000))
    losses[0, :21] = 1
    half = study._Half(scores=np.ones((1, 1000), dtype=np.float32), losses=losses, costs=np.array([1.0, 2.0]))
    monkeypatch.setattr(study, "certify", everything_accepted)
    for epsilon, rate in ((0.0205, 1.0), (0.021, 0.0)):
        checks = study._validity(half, [(math.inf,), (0.5,)], LOSSES["consistency"], 5, epsilon=epsilon, seed=0)
        check = next(checks)
        assert check.found == rate
        assert check.what.endswith("(no policy can)") is (rate == 0)


def test_who_proposes_does_not_judge(recording, short, monkeypatch):
    seen = {"proposed": [], "judged": []}
    propose, judge = study.propose_path, study._Half.judge

    def propose_seen(scores, *arguments):
        seen["proposed"].append(scores)
        return propose(scores, *arguments)

    def judge_seen(half, path):
        seen["judged"].append(half.scores)
        return judge(half, path)

    monkeypatch.setattr(study, "propose_path", propose_seen)
    monkeypatch.setattr(study._Half, "judge", judge_seen)
    draws(replace(recording, labels=None), 2)
    columns = {name: {tuple(column) for column in scores[0].T} for name, scores in seen.items()}
    assert not columns["proposed"] & columns["judged"]
    assert len(columns["proposed"] | columns["judged"]) == 800


def test_the_same_seed_gives_the_same_study(recording, short):
    unlabelled = replace(recording, labels=None)
    assert draws(unlabelled, 10, seed=3) == draws(unlabelled, 10, seed=3)
    assert draws(unlabelled, 10, seed=3) != draws(unlabelled, 10, seed=4)
    assert controls(20, seed=3) == controls(20, seed=3)


def test_without_labels_consistency_alone_is_studied(recording, short):
    checks = draws(replace(recording, labels=None), 5)
    assert {check.what.split()[0].rstrip(",") for check in checks} == {"consistency"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["gap", "consistency"])
def test_the_oracle_is_the_best_of_all_thresholds(name, seed, noisy_network):
    logits, labels = noisy_network(3, 40, seed=seed)
    logits[-1, :4] *= -1  # here earlier exits gain
    scores = study.score(logits[:-1], name="max_prob")
    half = study._Half(scores=scores, losses=LOSSES[name](logits, labels), costs=np.array([1.0, 2.0, 3.0]))
    best = math.inf
    grids = [[*np.unique(row), np.inf] for row in scores]
    for first in grids[0]:
        risks, costs = half.judge([(first, second) for second in grids[1]])
        best = min(best, costs[risks <= 0.05].min(initial=math.inf))
    assert study._best_cost(half, 0.05) == pytest.approx(best)


def test_logits_from_a_file(recording, scores_file, tmp_path):
    found = load_recording(scores_file)
    np.testing.assert_array_equal(found.logits, recording.logits)
    np.testing.assert_array_equal(found.labels, recording.labels)
    assert found.costs.tolist() == [1, 2, 3]
    np.savez(tmp_path / "bare.npz", logits=recording.logits)
    bare = load_recording(tmp_path / "bare.npz")
    assert bare.labels is None
    assert bare.costs.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("arrays", "message"), [
    ({"other": np.zeros(3)}, "has no array 'logits'"),
    ({"logits": np.zeros((3, 5))}, r"logits must be \(exits, samples, classes\), not \(3, 5\)"),
    ({"logits": np.zeros((3, 1, 5))}, "logits must be"),
    ({"logits": np.full((3, 4, 5), np.nan)}, "logits must be finite"),
    ({"logits": np.zeros((3, 4, 5)), "costs": np.ones(2)}, r"\(2,\) costs for 3 exits"),
])  # fmt: skip
def test_files_that_hold_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(CalibrationError, match=message):
        load_recording(tmp_path / "bad.npz")


@pytest.mark.parametrize("content", [None, b"", b"not a zip file"])
def test_files_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "bad.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"bad\.npz: not an \.npz file of arrays"):
        load_recording(path)


@pytest.mark.parametrize(("macs", "costs"), [((10, 10, 10), [10, 20, 30]), ((10, None, 10), [1, 2, 3])])
def test_logits_from_a_bundle(scripted_session, noisy_network, monkeypatch, tmp_path, macs, costs):
    logits, labels = noisy_network()
    np.savez(tmp_path / "data.npz", inputs=np.arange(300, dtype=np.float32)[:, None], labels=labels)
    session = scripted_session(logits, macs=macs)
    opened = SimpleNamespace(plan=session.plan, manifest=SimpleNamespace(preprocess=None, classes=()))
    monkeypatch.setattr(Bundle, "open", lambda path: nullcontext(opened))
    monkeypatch.setattr(Session, "open", lambda bundle, policy: session)
    found = record("net.edgekit", str(tmp_path / "data.npz"))
    np.testing.assert_array_equal(found.logits, logits)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.costs.tolist() == costs


def test_people_get_a_table(scores_file, short, capsys):
    assert main(["--scores", str(scores_file), "--repetitions", "60"]) == 0
    told = capsys.readouterr().out
    assert "gap by ternary, epsilon=0.02, delta=0.1: promise broken" in told
    assert "off by one: promise broken" in told
    assert told.count("│ wsr, ") == 1  # of all at the boundary, the worst
    assert told.splitlines()[-1] == "66 of 66 are as they must be"


def test_machines_get_json(scores_file, short, capsys, monkeypatch):
    assert main(["--scores", str(scores_file), "--repetitions", "40", "--json", "--seed", "5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["holds"] is True
    assert (told["settings"]["seed"], told["settings"]["scores"]) == (5, str(scores_file))
    assert {check["part"] for check in told["checks"]} == {"boundary", "control", "validity", "power"}
    assert set(told["checks"][0]) == {"part", "what", "found", "must", "limit", "holds"}
    monkeypatch.setattr(study, "certify", everything_accepted)
    assert main(["--repetitions", "20", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["holds"] is False


def test_a_broken_promise_is_exit_code_1(scores_file, short, capsys, monkeypatch):
    monkeypatch.setattr(study, "certify", everything_accepted)
    assert main(["--scores", str(scores_file), "--repetitions", "20"]) == 1
    told = capsys.readouterr().out
    assert "ARE NOT" in told
    assert "NO" in told


@pytest.mark.parametrize(("arguments", "message"), [
    (["--repetitions", "1"], "a rate needs at least 2 repetitions, not 1"),
    (["--bundle", "net.edgekit"], "--bundle and --data go together"),
    (["--data", "net.edgekit"], "--bundle and --data go together"),
    (["--scores", "missing.npz"], "missing.npz: not an .npz file"),
])  # fmt: skip
def test_a_study_that_cannot_be_run_is_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_progress_is_told(recording, short):
    told = []
    boundary(2, progress=lambda *step: told.append(step))
    controls(2, progress=lambda *step: told.append(step))
    draws(recording, 2, progress=lambda *step: told.append(step))
    ends = {what: (done, total) for what, done, total in told}
    assert len(ends) == 3
    assert all(done == total for done, total in ends.values())


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "edgekit.calibration.study", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "--scores" in done.stdout


@pytest.mark.slow
def test_the_whole_study_holds_on_real_digits(tmp_path, capsys):
    """As a sceptic runs it, but for the repetitions: every exit of the zoo's digits network on samples it never saw."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from typer.testing import CliRunner

    from edgekit.calibration.calibrate import collect
    from edgekit.cli import app
    from edgekit.zoo import digits

    bundle = tmp_path / "digits.edgekit"
    assert CliRunner().invoke(app, ["zoo", "export", "msdnet-digits", "-o", str(bundle)]).exit_code == 0
    with edgekit.load(bundle) as session:
        parts = [collect(session, part) for part in (digits.calibration_set(), digits.test_set())]
    logits = np.concatenate([part.logits for part in parts], axis=1)
    labels = np.concatenate([part.labels for part in parts])
    np.savez(tmp_path / "digits.npz", logits=logits, labels=labels)
    assert main(["--scores", str(tmp_path / "digits.npz")]) == 0, capsys.readouterr().out
