"""``edgekit profile``: stopped and resumed, on a disk that fills up, with operators, with a meter."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from edgekit.profiles import Protocol
from edgekit.records import Profile
from edgekit.session import Session

TEST_SET = "edgekit.zoo.digits:test_set"


@pytest.fixture
def given(exported_digits, tmp_path):
    return ("profile", exported_digits, "--data", TEST_SET, "--seconds", "0.1", "-o", tmp_path / "p.json")


def test_stopped_it_keeps_what_there_is_and_resumes(shell, given, tmp_path, monkeypatch):
    trace = Session.trace

    def stopping(*arguments, **options):
        monkeypatch.setattr(Session, "trace", trace)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "trace", stopping)
    line = shell.fails(*given, code=130)
    assert f"what there is lies in {tmp_path / 'p.json'}, and the same command with --resume goes on" in line
    part = Profile.load(tmp_path / "p.json")
    assert not part.complete
    assert os.listdir(tmp_path) == ["p.json"]
    found = shell.json(*given, "--resume")
    assert found["complete"]
    assert found["settings"]["parts"] == 2
    assert found["exits"][0]["latency"]["samples"] >= len(part.exits[0].latency_ns) > 0
    assert (part.stages, len(found["stages"])) == ((), 3)
    assert "is complete; there is nothing to resume" in shell.fails(*given, "--resume")


def test_nothing_to_resume(shell, given):
    assert "p.json: cannot be read" in shell.fails(*given, "--resume")


def test_a_folder_that_is_not_there_is_told_before_the_measurement(shell, given, tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.profiles.profile", lambda *_, **__: pytest.fail("measured all the same"))
    line = shell.fails(*given[:-1], tmp_path / "none" / "p.json")
    assert "the profile could not be written (No such file or directory); give another -o" in line


def test_a_folder_instead_of_a_file_is_told_before_the_measurement(shell, given, tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.profiles.profile", lambda *_, **__: pytest.fail("measured all the same"))
    line = shell.fails(*given[:-1], tmp_path)
    assert f"{tmp_path}: the profile could not be written (it is a folder); give a file as -o" in line


def fill_up(monkeypatch):
    """A disk that has no room for a profile."""
    write = Path.write_bytes

    def full(self, content):
        if self.name == ".p.json.part":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)


def test_stopped_on_a_full_disk_it_shows_what_there_is(shell, given, monkeypatch):
    def stopping(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "trace", stopping)
    fill_up(monkeypatch)
    done = shell(*given)
    assert done.exit_code == 1
    assert "p.json: the profile cannot be written (No space left on device)" in done.stderr
    assert "exit3" in done.stdout


def test_a_disk_that_fills_up_shows_the_figures_all_the_same(shell, given, tmp_path, monkeypatch):
    fill_up(monkeypatch)
    done = shell(*given)
    assert done.exit_code == 1
    assert "p.json: the profile cannot be written (No space left on device)" in done.stderr
    assert "exit3" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_operators_on_request(shell, given, tmp_path):
    assert shell.json(*given)["operators"] == []
    found = shell.json(*given, "--operators")["operators"]
    stages = {each["name"] for each in shell.json(*given)["stages"]}
    assert {each["stage"] for each in found} == stages
    assert any(each["kind"] == "Conv" for each in found)


def test_with_a_meter(shell, given, tmp_path, monkeypatch):
    short = Protocol(name="short", min_seconds=0.1, max_seconds=0.1, energy_window_s=0.2, idle_s=0.1)
    monkeypatch.setattr("edgekit.profiles.QUICK", short)
    lines = [f"{second / 10},{5 + second % 3 / 1000}" for second in range(6000)]
    (tmp_path / "power.csv").write_text("\n".join(["time_s,power_w", *lines]))
    given = [each for each in given if each not in ("--seconds", "0.1")]
    found = shell.json(*given, "--meter", f"replay:{tmp_path / 'power.csv'}")
    assert found["meter"]["replay"]
    assert found["stream"]["energy"]["gross_j"] == pytest.approx(5 * found["stream"]["latency"]["mean_s"], rel=0.5)
    assert not found["valid"]
    broken = {check["rule"] for check in found["checks"] if check["passed"] is False}
    assert "energy-window" in broken
    assert json.loads((tmp_path / "p.json").read_text())["power"]["power_w"]
