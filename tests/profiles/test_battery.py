"""Constructed folders of the kernel's power supply class (Documentation/ABI/testing/sysfs-class-power)."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles.battery import BatteryMeter


class Machine:
    def __init__(self, root: Path) -> None:
        self.root = root

    def supply(self, name: str, **files: object) -> Path:
        folder = self.root / "sys/class/power_supply" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / file).write_text(f"{content}\n")
        return folder


@pytest.fixture
def machine(tmp_path) -> Machine:
    """A laptop on its battery: 11.4 V, 0.8 A."""
    made = Machine(tmp_path)
    made.supply("AC", type="Mains", online=0)
    made.supply("BAT0", type="Battery", status="Discharging", present=1, voltage_now=11_400_000, current_now=800_000)
    made.supply("hidpp_battery_0", type="Battery", scope="Device", status="Discharging", voltage_now=3_900_000)
    made.supply("ucsi-source-psy-USBC000:001", type="USB", online=1, voltage_now=20_000_000, current_now=3_000_000)
    return made


def watts(machine: Machine) -> float:
    meter = BatteryMeter(root=machine.root)
    meter.open()
    return meter.read().value


def test_voltage_times_current(machine):
    meter = BatteryMeter(root=machine.root)
    assert isinstance(meter, Meter)
    assert meter.unavailable() is None
    facts = meter.facts()
    assert (facts.quantity, facts.scope, facts.parts) == ("power", "battery", ("BAT0",))
    assert facts.resolution is None
    assert facts.update_interval_s is None
    assert watts(machine) == pytest.approx(9.12)


def test_a_current_that_flows_out_may_be_negative(machine):
    machine.supply("BAT0", current_now=-800_000)
    assert watts(machine) == pytest.approx(9.12)


def test_the_drivers_own_power_comes_first(machine):
    machine.supply("BAT0", power_now=9_500_000)
    assert watts(machine) == pytest.approx(9.5)


def test_two_batteries_are_added_and_one_may_rest(machine):
    machine.supply("BAT1", type="Battery", status="Not charging", present=1, power_now=0)
    assert watts(machine) == pytest.approx(9.12)
    machine.supply("BAT1", status="Discharging", power_now=1_000_000)
    assert watts(machine) == pytest.approx(10.12)


@pytest.mark.parametrize("status", ["Charging", "Full", "Not charging"])
def test_a_battery_that_does_not_discharge(machine, status):
    machine.supply("BAT0", status=status)
    assert BatteryMeter(root=machine.root).unavailable() == (
        f"the battery is not discharging ({status}); unplug the charger"
    )


def test_the_mains(machine):
    machine.supply("AC", online=1)
    assert BatteryMeter(root=machine.root).unavailable() == "AC is plugged in; unplug it"


def test_plugged_in_meanwhile(machine):
    meter = BatteryMeter(root=machine.root)
    meter.open()
    machine.supply("BAT0", status="Charging")
    with pytest.raises(MeasurementError, match=r"not discharging \(Charging\)"):
        meter.read()


def test_a_battery_that_goes(machine):
    meter = BatteryMeter(root=machine.root)
    meter.open()
    folder = machine.root / "sys/class/power_supply/BAT0"
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    with pytest.raises(MeasurementError, match="BAT0 can no longer be read"):
        meter.read()


def test_no_battery(tmp_path):
    assert "has no battery" in (BatteryMeter(root=tmp_path).unavailable() or "")


def test_a_port_that_negotiates_is_no_sensor(tmp_path):
    machine = Machine(tmp_path)
    machine.supply("ucsi-source-psy-2-00081", type="USB", online=1, voltage_now=5_000_000, current_now=3_000_000)
    assert "has no battery" in (BatteryMeter(root=tmp_path).unavailable() or "")


def test_a_battery_that_tells_nothing(machine):
    (machine.root / "sys/class/power_supply/BAT0/current_now").unlink()
    assert "tells neither power_now nor" in (BatteryMeter(root=machine.root).unavailable() or "")


def test_no_value(machine):
    machine.supply("BAT0", power_now=2**31 - 1)
    assert "stands for no value" in (BatteryMeter(root=machine.root).unavailable() or "")
