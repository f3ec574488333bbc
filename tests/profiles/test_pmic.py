"""A constructed answer of the firmware, in its format; the total by hand and by awk."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles.pmic import PmicMeter
from edgekit.profiles.recorder import Recorder
from edgekit.tree import UnreadableError

DUMP = (Path(__file__).with_name("trees") / "raspberry-pi-5-pmic.txt").read_text()
TOTAL_W = 2.10646


def board(root: Path, model: str) -> Path:
    (root / "proc/device-tree").mkdir(parents=True, exist_ok=True)
    (root / "proc/device-tree/model").write_text(f"{model}\0")
    return root


@pytest.fixture
def pi5(tmp_path) -> Path:
    return board(tmp_path, "Raspberry Pi 5 Model B Rev 1.0")


def test_the_sum_of_rails_that_tell_voltage_and_current(pi5, clock):
    asked = []

    def run(command):
        asked.append(tuple(command))
        clock.pass_s(0.004)
        return DUMP

    meter = PmicMeter(run=run, root=pi5, clock=clock)
    assert isinstance(meter, Meter)
    assert meter.unavailable() is None
    facts = meter.facts()
    assert (facts.quantity, facts.scope, facts.update_interval_s) == ("power", "board", 0.2)
    assert facts.resolution is None
    assert len(facts.parts) == 12
    assert not {"EXT5V", "BATT"} & set(facts.parts), "voltage only"
    assert "without USB" in facts.covers
    assert Recorder(meter, zero_ns=0).every_s == pytest.approx(0.1)
    meter.open()
    before_ns = clock()
    reading = meter.read()
    assert reading.value == pytest.approx(TOTAL_W)
    assert reading.time_ns == before_ns + 2_000_000
    assert set(asked) == {("vcgencmd", "pmic_read_adc")}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Raspberry Pi 4 Model B Rev 1.5", "only a Pi 5 has"),
        ("Raspberry Pi Compute Module 4 Rev 1.0", "only a Pi 5 has"),
        ("NVIDIA Jetson Nano", "not a Raspberry Pi 5"),
    ],
)
def test_other_boards_are_not_asked(tmp_path, model, message):
    def run(command):
        raise AssertionError("asked")

    assert message in (PmicMeter(run=run, root=board(tmp_path, model)).unavailable() or "")


@pytest.mark.parametrize("model", ["Raspberry Pi Compute Module 5 Rev 1.0", "Raspberry Pi 500 Rev 1.0"])
def test_its_siblings(tmp_path, model):
    assert PmicMeter(run=lambda _: DUMP, root=board(tmp_path, model)).unavailable() is None


def test_a_command_that_fails(pi5):
    def run(command):
        raise UnreadableError("vcgencmd pmic_read_adc failed (VCHI initialization failed)")

    with pytest.raises(MeasurementError, match=r"pmic: .*VCHI initialization failed.*usermod -aG video"):
        PmicMeter(run=run, root=pi5).open()


def test_a_command_that_is_not_there(pi5, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "vcgencmd is not installed; sudo apt install raspi-utils" in (PmicMeter(root=pi5).unavailable() or "")


def test_an_answer_that_is_none(pi5):
    meter = PmicMeter(run=lambda _: 'error=1 error_msg="Command not registered"\n', root=pi5)
    assert "told no rail ('error=1 error_msg=\"Command not registered\"')" in (meter.unavailable() or "")


def test_a_rail_that_goes(pi5):
    answers = [DUMP] * 2 + [DUMP.replace("VDD_CORE_A", "VDD_CORE_X")]
    meter = PmicMeter(run=lambda _: answers.pop(0), root=pi5)
    meter.open()
    with pytest.raises(MeasurementError, match=r"rails changed \(VDD_CORE\)"):
        meter.read()


def test_the_command_is_really_run(pi5, monkeypatch, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "vcgencmd").write_text(f"#!/bin/sh\ntest \"$1\" = pmic_read_adc && cat <<'END'\n{DUMP}END\n")
    (tools / "vcgencmd").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    meter = PmicMeter(root=pi5)
    meter.open()
    assert meter.read().value == pytest.approx(TOTAL_W)
