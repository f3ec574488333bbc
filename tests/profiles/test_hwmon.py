"""Constructed folders of the kernel's hardware monitoring (Documentation/hwmon/sysfs-interface.rst)."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles.hwmon import HwmonMeter


class Machine:
    def __init__(self, root: Path) -> None:
        self.root = root

    def chip(self, number: int, name: str, *, device: str = "", **files: object) -> Path:
        folder = self.root / f"sys/class/hwmon/hwmon{number}"
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in {"name": name, **files}.items():
            (folder / file).write_text(f"{content}\n")
        if device:
            (self.root / device).mkdir(parents=True, exist_ok=True)
            (folder / "device").symlink_to(self.root / device)
        return folder


@pytest.fixture
def machine(tmp_path) -> Machine:
    made = Machine(tmp_path)
    made.chip(0, "coretemp", temp1_input=45_000)
    return made


def test_the_only_sensor_is_used(machine, clock):
    machine.chip(3, "power_meter", power1_average=60_500_000, power1_average_interval=1000, power1_cap=100_000_000)
    meter = HwmonMeter(root=machine.root, clock=clock)
    assert isinstance(meter, Meter)
    assert meter.unavailable() is None
    facts = meter.facts()
    assert (facts.quantity, facts.scope, facts.parts) == ("power", "device", ("power_meter/power1",))
    assert facts.update_interval_s == 1.0
    assert facts.resolution is None
    meter.open()
    assert meter.read().value == pytest.approx(60.5)


def test_power_now_comes_before_its_average_and_the_chip_tells_its_interval(machine):
    machine.chip(1, "ina226", power1_input=5_000_000, power1_average=4_000_000, power1_label="VIN", update_interval=2)
    meter = HwmonMeter(root=machine.root)
    meter.open()
    assert meter.read().value == pytest.approx(5.0)
    assert meter.facts().parts == ("ina226/VIN",)
    assert meter.facts().update_interval_s == pytest.approx(0.002)


def test_of_several_one_must_be_chosen_and_nothing_is_added(machine):
    machine.chip(1, "amdgpu", power1_average=20_000_000, power1_label="PPT")
    machine.chip(2, "power_meter", power1_average=90_000_000)
    meter = HwmonMeter(root=machine.root)
    assert meter.unavailable() == (
        "several sensors: amdgpu/PPT, power_meter/power1; choose one: HwmonMeter(sensors='amdgpu/PPT')"
    )
    with pytest.raises(MeasurementError, match="hwmon: several sensors"):
        meter.open()
    chosen = HwmonMeter(root=machine.root, sensors="amdgpu/PPT")
    chosen.open()
    assert chosen.read().value == pytest.approx(20.0)
    both = HwmonMeter(root=machine.root, sensors="amdgpu/PPT + power_meter/power1")
    both.open()
    assert both.read().value == pytest.approx(110.0)
    assert "no sensor is called nvme/1; there are: amdgpu/PPT" in (
        HwmonMeter(root=machine.root, sensors="nvme/1").unavailable() or ""
    )


def test_a_counter_counts_from_opening(machine):
    folder = machine.chip(1, "ina228", energy1_input=7_000_000)
    meter = HwmonMeter(root=machine.root)
    meter.open()
    (folder / "energy1_input").write_text("9500000\n")
    assert meter.facts().quantity == "energy"
    assert meter.read().value == pytest.approx(2.5)


@pytest.mark.parametrize("now_uj", [1, 2**32 - 2])
def test_a_counter_that_goes_back_is_not_guessed(machine, now_uj):
    folder = machine.chip(1, "i915", energy1_input=2**32 - 1)
    meter = HwmonMeter(root=machine.root)
    assert meter.unavailable() is None, "any number of a counter is possible"
    meter.open()
    (folder / "energy1_input").write_text(f"{now_uj}\n")
    with pytest.raises(MeasurementError, match="went back from 4294967295"):
        meter.read()


def test_counter_and_gauge_are_not_added(machine):
    machine.chip(1, "ina228", energy1_input=7_000_000, power1_input=1_000_000)
    reason = HwmonMeter(root=machine.root, sensors="ina228/energy1+ina228/power1").unavailable()
    assert reason == "counters of energy and sensors of power cannot be added; choose one kind"


@pytest.mark.parametrize("value", [4294967295000, 4294967295, 2**31 - 1])
def test_no_value(machine, value):
    folder = machine.chip(1, "amdgpu", power1_average=value)
    meter = HwmonMeter(root=machine.root)
    assert "stands for no value" in (meter.unavailable() or "")
    (folder / "power1_average").write_text("1000000\n")
    meter.open()
    (folder / "power1_average").write_text(f"{value}\n")
    with pytest.raises(MeasurementError, match="stands for no value"):
        meter.read()


def test_a_negative_value_is_refused_also_in_a_sum(machine):
    machine.chip(1, "a", power1_input=-5_000_000, power2_input=9_000_000)
    meter = HwmonMeter(root=machine.root, sensors="a/power1+a/power2")
    meter.open()
    with pytest.raises(MeasurementError, match="says -5000000, which cannot be"):
        meter.read()


def test_a_chip_may_be_renumbered(machine):
    first = machine.chip(4, "amdgpu", power1_average=1_000_000)
    machine.chip(5, "power_meter", power1_average=2_000_000)
    first.rename(first.with_name("hwmon11"))
    meter = HwmonMeter(root=machine.root, sensors="amdgpu/power1")
    meter.open()
    assert meter.read().value == pytest.approx(1.0)


def test_two_alike_are_told_apart_by_their_device(machine):
    machine.chip(1, "amdgpu", device="sys/devices/pci0/0000:03:00.0", power1_average=1_000_000)
    machine.chip(2, "amdgpu", device="sys/devices/pci0/0000:07:00.0", power1_average=2_000_000)
    assert "amdgpu@0000:03:00.0/power1, amdgpu@0000:07:00.0/power1" in (
        HwmonMeter(root=machine.root).unavailable() or ""
    )
    meter = HwmonMeter(root=machine.root, sensors="amdgpu@0000:07:00.0/power1")
    meter.open()
    assert meter.read().value == pytest.approx(2.0)


def test_what_other_meters_read_is_left_to_them(machine):
    machine.chip(1, "BAT_0", power1_input=9_000_000)
    machine.chip(2, "ucsi_source_psy_2_00081", power1_input=9_000_000)
    for name in ("BAT-0", "ucsi-source-psy-2-00081"):
        (machine.root / "sys/class/power_supply" / name).mkdir(parents=True)
    machine.chip(3, "ina238", power1_input=23_000_000)
    meter = HwmonMeter(root=machine.root)
    assert meter.facts().parts == ("ina238/power1",), "not a Jetson's"
    (machine.root / "proc/device-tree").mkdir(parents=True)
    (machine.root / "proc/device-tree/compatible").write_text("nvidia,p3834-0008\0nvidia,tegra264\0")
    assert "has no sensor of power or energy" in (meter.unavailable() or "")


def test_a_sensor_that_goes(machine):
    folder = machine.chip(1, "power_meter", power1_input=1_000_000)
    meter = HwmonMeter(root=machine.root)
    meter.open()
    (folder / "power1_input").unlink()
    with pytest.raises(MeasurementError, match="power1_input can no longer be read"):
        meter.read()


def test_permission_denied(machine, monkeypatch):
    machine.chip(1, "amd_energy", energy1_input=1_000_000)
    read_text = Path.read_text

    def refused(path, *arguments, **keywords):
        if path.name == "energy1_input":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", refused)
    assert f"sudo chmod a+r {machine.root}/sys/class/hwmon/hwmon1/energy1_input" in (
        HwmonMeter(root=machine.root).unavailable() or ""
    )


def test_no_hwmon(tmp_path):
    assert "has no sensor of power or energy" in (HwmonMeter(root=tmp_path).unavailable() or "")
