"""Totals by hand from the figures in ``trees/``; no Jetson was at hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles.jetson import BOARDS, JetsonMeter

TREES = Path(__file__).with_name("trees")
HWMON = "sys/bus/i2c/drivers/ina3221"


def plant(name: str, root: Path) -> Path:
    """Write a tree's files below ``root``."""
    for line in (TREES / f"{name}.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            path, _, text = line.rpartition(":")
            file = root / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.replace("\\0", "\0") + "\n")
    return root


def watts(meter: JetsonMeter) -> float:
    meter.open()
    value = meter.read().value
    meter.close()
    return value


@pytest.mark.parametrize(
    ("tree", "total_w", "parts", "scope"),
    [
        ("jetson-nano", 2.540, ("POM_5V_IN",), "module"),  # 5.08 V * 0.5 A
        ("jetson-tx1", 3.8 + 1.9, ("VDD_IN", "VDD_MUX"), "board"),
        ("jetson-tx2", 5.7 + 2.85, ("VDD_IN", "VDD_MUX"), "board"),
        ("jetson-tx2-nx", 4.5, ("VDD_IN",), "module"),
        ("jetson-xavier-nx-jp4", 6.0, ("VDD_IN",), "module"),
        ("jetson-xavier-nx-jp5", 6.0, ("VDD_IN",), "module"),
        # 19 V * (10 + 20 + 30 + 0 + 15) mA + 5 V * 400 mA
        ("jetson-agx-xavier-jp4", 1.425 + 2.0, ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), "module"),
        ("jetson-agx-xavier-jp5", 1.425 + 2.0, ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), "module"),
        ("jetson-orin-nano", 5.0, ("VDD_IN",), "module"),
        ("jetson-orin-nx", 10.0, ("VDD_IN",), "module"),
        # 19 V * 160 mA + 5 V * 800 mA; VDDQ_VDD2_1V8AO's watt is in the latter
        ("jetson-agx-orin", 3.04 + 4.0, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), "module"),
        ("jetson-agx-orin-industrial", 3.04 + 4.0, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), "module"),
        ("jetson-agx-thor", 23.0, ("VIN",), "board"),  # microwatts
    ],
)
def test_every_boards_total(tmp_path, tree, total_w, parts, scope):
    meter = JetsonMeter(root=plant(tree, tmp_path))
    assert meter.unavailable() is None
    facts = meter.facts()
    assert (facts.parts, facts.scope, facts.quantity, facts.unit) == (parts, scope, "power", "W")
    assert watts(meter) == pytest.approx(total_w, abs=1e-9)


def test_every_board_of_the_table_has_a_tree():
    trees = "".join(path.read_text() for path in TREES.glob("jetson-*.txt")).lower()
    assert [board.name for board in BOARDS if not re.search(board.known_by, trees)] == []


def test_it_is_a_meter(tmp_path):
    assert isinstance(JetsonMeter(root=tmp_path), Meter)


def test_step_and_interval_of_a_5_milliohm_shunt(tmp_path):
    facts = JetsonMeter(root=plant("jetson-orin-nano", tmp_path)).facts()
    assert facts.resolution == pytest.approx(0.040)  # 40 uV / 5 mOhm = 8 mA, at 5 V
    assert facts.update_interval_s == pytest.approx(0.007)  # 3 * (1.1 + 1.1) ms, as the driver rounds it


def test_steps_of_several_rails_add_up(tmp_path):
    facts = JetsonMeter(root=plant("jetson-agx-orin", tmp_path)).facts()
    assert facts.resolution == pytest.approx(0.020 * (19 + 19 + 5))  # 40 uV / 2 mOhm = 20 mA


@pytest.mark.parametrize("tree", ["jetson-nano", "jetson-agx-thor"])
def test_what_no_file_tells_is_not_made_up(tmp_path, tree):
    facts = JetsonMeter(root=plant(tree, tmp_path)).facts()
    assert facts.resolution is None
    assert facts.update_interval_s is None


def test_the_carrier_of_a_tx2_may_have_no_monitor(tmp_path):
    root = plant("jetson-tx2", tmp_path)
    (root / "sys/bus/i2c/drivers/ina3221x/0-0042/iio:device2/rail_name_0").unlink()
    meter = JetsonMeter(root=root)
    assert meter.facts().scope == "module"
    assert watts(meter) == pytest.approx(5.7)


def test_voltage_times_current_where_jetpack_4_has_no_power(tmp_path):
    root = plant("jetson-nano", tmp_path)
    (root / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power0_input").unlink()
    assert watts(JetsonMeter(root=root)) == pytest.approx(2.54)


def test_hwmon_may_be_renumbered(tmp_path):
    root = plant("jetson-agx-orin", tmp_path)
    (root / HWMON / "1-0040/hwmon/hwmon3").rename(root / HWMON / "1-0040/hwmon/hwmon12")
    (root / HWMON / "1-0041/hwmon/hwmon4").rename(root / HWMON / "1-0041/hwmon/hwmon3")
    assert watts(JetsonMeter(root=root)) == pytest.approx(7.04)


def test_a_nano_2gb_has_no_sensor(tmp_path):
    reason = JetsonMeter(root=plant("jetson-nano-2gb", tmp_path)).unavailable()
    assert reason is not None
    assert "Nano 2GB has no power sensor" in reason


def test_an_unknown_board_lists_its_rails_and_how_to_choose(tmp_path):
    root = plant("jetson-unknown", tmp_path)
    reason = JetsonMeter(root=root).unavailable()
    assert reason is not None
    assert "'NVIDIA Jetson Future Developer Kit' is not known; found VDD_A, VDD_B, VDD_C" in reason
    assert "JetsonMeter(rails='A+B')" in reason
    chosen = JetsonMeter(root=root, rails="VDD_A + VDD_C")
    assert chosen.unavailable() is None
    assert chosen.facts().scope == "device"
    assert watts(chosen) == pytest.approx(0.5 + 1.5)


def test_a_container_that_hides_the_device_tree(tmp_path):
    root = plant("jetson-orin-nano", tmp_path)
    for file in (root / "proc/device-tree").iterdir():
        file.unlink()
    assert "which board it is cannot be read; found VDD_IN" in (JetsonMeter(root=root).unavailable() or "")
    assert watts(JetsonMeter(root=root, rails="VDD_IN")) == pytest.approx(5.0)
    (root / "sys/devices/soc0").mkdir(parents=True)
    (root / "sys/devices/soc0/machine").write_text("NVIDIA Jetson Orin Nano Developer Kit\n")
    assert watts(JetsonMeter(root=root)) == pytest.approx(5.0)


def test_a_thor_without_the_carriers_monitor_is_not_added_up_from_parts(tmp_path):
    root = plant("jetson-agx-thor", tmp_path)
    for file in (root / "sys/bus/i2c/drivers/ina238/2-0044/hwmon/hwmon5").iterdir():
        file.unlink()
    (root / "sys/bus/i2c/drivers/ina238/2-0044/hwmon/hwmon5").rmdir()
    reason = JetsonMeter(root=root).unavailable()
    assert reason is not None
    assert reason.startswith("VIN is not among the rails; found VDD_GPU, VDD_CPU_SOC_MSS, VIN_SYS_5V0")


def test_rails_that_are_called_alike(tmp_path):
    root = plant("jetson-orin-nano", tmp_path)
    (root / HWMON / "1-0040/hwmon/hwmon1/in2_label").write_text("VDD_IN\n")
    assert "called alike" in (JetsonMeter(root=root).unavailable() or "")


def test_channels_that_are_not_connected_cannot_be_chosen(tmp_path):
    root = plant("jetson-agx-orin", tmp_path)
    for name in ("NC", "sum of shunt voltages"):
        assert "is not among the rails" in (JetsonMeter(root=root, rails=name).unavailable() or "")


def test_a_channel_that_is_switched_off(tmp_path):
    root = plant("jetson-orin-nano", tmp_path)
    switch = root / HWMON / "1-0040/hwmon/hwmon1/in1_enable"
    switch.write_text("0\n")
    assert JetsonMeter(root=root).unavailable() == f"rail VDD_IN is switched off: echo 1 | sudo tee {switch}"


def test_no_driver(tmp_path):
    root = plant("jetson-nano-2gb", tmp_path)
    (root / "proc/device-tree/compatible").write_text("nvidia,p3768-0000+p3767-0005\0nvidia,tegra234")
    (root / "proc/device-tree/model").write_text("NVIDIA Jetson Orin Nano Developer Kit\0")
    assert "sudo modprobe ina3221" in (JetsonMeter(root=root).unavailable() or "")
    assert "not a Jetson" in (JetsonMeter(root=tmp_path / "elsewhere").unavailable() or "")


def test_permission_denied(tmp_path, monkeypatch):
    root = plant("jetson-orin-nano", tmp_path)
    read_text = Path.read_text

    def refused(path, *arguments, **keywords):
        if path.name == "curr1_input":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", refused)
    reason = JetsonMeter(root=root).unavailable()
    assert reason is not None
    assert f"sudo chmod a+r {root / HWMON}/1-0040/hwmon/hwmon1/curr1_input" in reason
    with pytest.raises(MeasurementError, match=r"jetson: .*for root only"):
        JetsonMeter(root=root).open()


def test_a_sensor_that_goes(tmp_path):
    root = plant("jetson-orin-nano", tmp_path)
    meter = JetsonMeter(root=root)
    meter.open()
    (root / HWMON / "1-0040/hwmon/hwmon1/in1_input").unlink()
    with pytest.raises(MeasurementError, match=r"in1_input can no longer be read \(No such file"):
        meter.read()


def test_no_value_and_negative_totals_are_refused(tmp_path):
    root = plant("jetson-agx-thor", tmp_path)
    power = root / "sys/bus/i2c/drivers/ina238/2-0044/hwmon/hwmon5/power1_input"
    power.write_text("4294967295000\n")
    assert "stands for no value" in (JetsonMeter(root=root).unavailable() or "")
    power.write_text("23000000\n")
    meter = JetsonMeter(root=root, rails="VDD_GPU")  # -20 mA: an offset larger than what flows
    meter.open()
    with pytest.raises(MeasurementError, match=r"says -0\.4, which cannot be"):
        meter.read()


def test_a_reading_is_timed_at_its_middle(tmp_path, monkeypatch, clock):
    root = plant("jetson-agx-orin", tmp_path)
    meter = JetsonMeter(root=root, clock=clock)
    meter.open()
    read_text = Path.read_text

    def waits(path, *arguments, **keywords):
        clock.pass_s(0.007)
        return read_text(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", waits)
    assert meter.read().time_ns == 6 * 7_000_000 // 2  # voltage and current of three rails


def test_closed_it_is_not_read(tmp_path):
    meter = JetsonMeter(root=plant("jetson-nano", tmp_path))
    with pytest.raises(MeasurementError, match="read before open"):
        meter.read()
    meter.open()
    meter.close()
    meter.close()
    with pytest.raises(MeasurementError, match="read before open"):
        meter.read()
