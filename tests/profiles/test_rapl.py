"""Constructed sysfs trees: no machine with the counters was at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles import RaplMeter

RANGE_UJ = 262_143_328_850


class Machine:
    """A ``/sys/class/powercap`` to write to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "sys/class/powercap"

    def zone(self, path: str, name: str, energy_uj: int, *, range_uj: object = RANGE_UJ) -> Path:
        folder = self.folder / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")
        return folder


@pytest.fixture
def machine(tmp_path) -> Machine:
    """Two sockets, DRAM on the first, and everything that must not be counted again."""
    made = Machine(tmp_path)
    made.zone("intel-rapl:0", "package-0", 1_000_000)
    made.zone("intel-rapl:0:0", "core", 500_000)
    made.zone("intel-rapl:0:1", "uncore", 100_000)
    made.zone("intel-rapl:0:2", "dram", 2_000_000)
    made.zone("intel-rapl:1", "package-1", 7_000_000)
    made.zone("intel-rapl:2", "psys", 90_000_000)
    made.zone("intel-rapl-mmio:0", "package-0", 1_000_000)
    return made


@pytest.fixture
def meter(machine, clock):
    made = RaplMeter(root=machine.root, clock=clock)
    made.open()
    yield made
    made.close()


def test_it_is_a_meter(meter):
    assert isinstance(meter, Meter)
    assert meter.unavailable() is None


def test_packages_and_dram_are_added_and_nothing_twice(machine, meter, clock):
    machine.zone("intel-rapl:0", "package-0", 1_000_000 + 3_000_000)
    machine.zone("intel-rapl:1", "package-1", 7_000_000 + 2_000_000)
    machine.zone("intel-rapl:0:2", "dram", 2_000_000 + 500_000)
    machine.zone("intel-rapl:0:0", "core", 500_000 + 2_500_000)
    machine.zone("intel-rapl:2", "psys", 90_000_000 + 9_000_000)
    machine.zone("intel-rapl-mmio:0", "package-0", 1_000_000 + 3_000_000)
    clock.pass_s(1.5)
    reading = meter.read()
    assert reading.energy_j == pytest.approx(5.5)
    assert reading.time_ns == 1_500_000_000
    assert meter.scope == "processor packages and DRAM"


def test_describe_names_the_zones_and_derives_the_step(meter):
    told = meter.describe()
    assert told["zones"] == ["intel-rapl:0 package-0", "intel-rapl:0:2 dram", "intel-rapl:1 package-1"]
    assert told["resolution_j"] == pytest.approx(2**-14, rel=1e-3), "this range belongs to steps of 61 uJ"
    assert "replay" not in told


def test_a_counter_that_starts_again(tmp_path, clock):
    machine = Machine(tmp_path)
    machine.zone("intel-rapl:0", "package-0", RANGE_UJ - 2_000_000)
    meter = RaplMeter(root=tmp_path, clock=clock)
    meter.open()
    machine.zone("intel-rapl:0", "package-0", 1_000_000)
    assert meter.read().energy_j == pytest.approx(3.0)
    machine.zone("intel-rapl:0", "package-0", 1_500_000)
    assert meter.read().energy_j == pytest.approx(3.5)
    machine.zone("intel-rapl:0", "package-0", 500_000)  # a second time
    assert meter.read().energy_j == pytest.approx(3.5 + RANGE_UJ * 1e-6 - 1.0)


@pytest.mark.parametrize("range_uj", ["", "unknown", 0])
def test_without_a_range_it_measures_until_the_counter_starts_again(tmp_path, clock, range_uj):
    machine = Machine(tmp_path)
    machine.zone("intel-rapl:0", "package-0", 5_000_000, range_uj=range_uj)
    meter = RaplMeter(root=tmp_path, clock=clock)
    meter.open()
    machine.zone("intel-rapl:0", "package-0", 6_000_000, range_uj=range_uj)
    assert meter.read().energy_j == pytest.approx(1.0)
    assert meter.describe()["resolution_j"] is None
    machine.zone("intel-rapl:0", "package-0", 1_000_000, range_uj=range_uj)
    with pytest.raises(MeasurementError, match=r"counter of intel-rapl:0 started again and .*max_energy_range_uj"):
        meter.read()


def test_a_counter_that_vanishes(machine, meter):
    (machine.folder / "intel-rapl:1/energy_uj").unlink()
    with pytest.raises(MeasurementError, match="intel-rapl:1/energy_uj can no longer be read"):
        meter.read()


def test_counters_for_root_only(machine, monkeypatch):
    read_text = Path.read_text

    def refused(path, *arguments, **keywords):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", refused)
    meter = RaplMeter(root=machine.root)
    reason = meter.unavailable()
    assert reason is not None
    assert f"sudo chmod a+r {machine.folder}/*/energy_uj" in reason
    with pytest.raises(MeasurementError, match="for root only"):
        meter.open()


def test_no_powercap(tmp_path):
    reason = RaplMeter(root=tmp_path).unavailable()
    assert reason is not None
    assert "virtual machine" in reason
    assert "not an x86 processor" in reason


def test_powercap_without_packages(tmp_path):
    machine = Machine(tmp_path)
    machine.zone("intel-rapl:0", "psys", 1)
    machine.zone("intel-rapl-mmio:0", "package-0", 1)
    assert "has no processor package" in (RaplMeter(root=tmp_path).unavailable() or "")


def test_a_counter_that_is_no_number(tmp_path):
    machine = Machine(tmp_path)
    machine.zone("intel-rapl:0", "package-0", 1)
    (machine.folder / "intel-rapl:0/energy_uj").write_text("\n")
    assert "cannot be read" in (RaplMeter(root=tmp_path).unavailable() or "")


def test_read_before_open(machine):
    with pytest.raises(MeasurementError, match="read before open"):
        RaplMeter(root=machine.root).read()


def test_opened_again_it_counts_from_there(machine, meter):
    machine.zone("intel-rapl:0", "package-0", 9_000_000)
    meter.close()
    meter.open()
    assert meter.read().energy_j == 0
