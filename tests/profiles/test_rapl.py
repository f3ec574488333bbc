"""Constructed sysfs trees: no machine with the counters was at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles.rapl import RaplMeter

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
    assert reading.value == pytest.approx(5.5)
    assert reading.time_ns == 1_500_000_000


def test_facts_name_the_zones_and_derive_the_step(meter):
    facts = meter.facts()
    assert facts.parts == ("intel-rapl:0 package-0", "intel-rapl:0:2 dram", "intel-rapl:1 package-1")
    assert facts.resolution == pytest.approx(3 * 2**-14, rel=1e-3), "this range belongs to steps of 61 uJ"
    assert (facts.quantity, facts.unit, facts.method, facts.scope) == ("energy", "J", "counter", "socket")
    assert facts.covers == "processor packages and DRAM"
    assert facts.update_interval_s == 1e-3


def test_a_counter_that_was_reset(tmp_path, clock):
    """40 kJ, and 5 J a twentieth of a second later: no socket takes a counter past its range in that time."""
    machine = Machine(tmp_path)
    machine.zone("intel-rapl:0", "package-0", 40_000_000_000)
    meter = RaplMeter(root=tmp_path, clock=clock)
    meter.open()
    clock.pass_s(0.05)
    machine.zone("intel-rapl:0", "package-0", 5_000_000)
    with pytest.raises(MeasurementError, match=r"went back from 40000000000 to 5000000 µJ, .* it was reset; measure"):
        meter.read()


def test_a_counter_that_starts_again(tmp_path, clock):
    machine = Machine(tmp_path)
    machine.zone("intel-rapl:0", "package-0", RANGE_UJ - 2_000_000)
    meter = RaplMeter(root=tmp_path, clock=clock)
    meter.open()
    machine.zone("intel-rapl:0", "package-0", 1_000_000)
    assert meter.read().value == pytest.approx(3.0)
    machine.zone("intel-rapl:0", "package-0", 1_500_000)
    assert meter.read().value == pytest.approx(3.5)
    machine.zone("intel-rapl:0", "package-0", 500_000)  # a second time
    clock.pass_s(262.1)
    assert meter.read().value == pytest.approx(3.5 + RANGE_UJ * 1e-6 - 1.0)


@pytest.mark.parametrize(
    ("limits_uw", "enough_s"),
    [
        ({}, 262.2),  # 262,143 J at 1000 W
        ({"constraint_0_max_power_uw": 15_000_000, "constraint_1_power_limit_uw": 50_000_000}, 2621.5),  # twice 50 W
        ({"constraint_0_power_limit_uw": 4_095_000_000}, 262.2),  # a limit that is none
        ({"constraint_0_power_limit_uw": 0}, 262.2),
    ],
)
@pytest.mark.parametrize("now_uj", [3_000_000, 1_000_000])
def test_more_than_one_restart_is_never_guessed(tmp_path, clock, limits_uw, enough_s, now_uj):
    machine = Machine(tmp_path)
    zone = machine.zone("intel-rapl:0", "package-0", 2_000_000)
    for name, limit_uw in limits_uw.items():
        (zone / name).write_text(f"{limit_uw}\n")
    meter = RaplMeter(root=tmp_path, clock=clock)
    meter.open()
    clock.pass_s(enough_s - 1)
    meter.read()
    machine.zone("intel-rapl:0", "package-0", now_uj)
    clock.pass_s(enough_s + 1)
    with pytest.raises(MeasurementError, match=r"intel-rapl:0 may have started again more than once .* more often"):
        meter.read()


@given(
    st.integers(0, RANGE_UJ - 1),
    st.lists(st.integers(0, RANGE_UJ - 1), max_size=10),
)
def test_joules_never_go_back_and_add_up(tmp_path_factory, start_uj, used_uj):
    machine = Machine(tmp_path_factory.mktemp("rapl"))
    machine.zone("intel-rapl:0", "package-0", start_uj)
    now_s = 0.0
    meter = RaplMeter(root=machine.root, clock=lambda: round(now_s * 1e9))
    meter.open()
    total_uj = 0
    for step_uj in used_uj:
        total_uj += step_uj
        now_s += 262.1  # as long as so much takes
        machine.zone("intel-rapl:0", "package-0", (start_uj + total_uj) % RANGE_UJ)
        assert meter.read().value == pytest.approx(total_uj * 1e-6)


@pytest.mark.parametrize("range_uj", ["", "unknown", 0])
def test_a_counter_whose_restart_is_not_known_is_not_used(tmp_path, range_uj):
    machine = Machine(tmp_path)
    machine.zone("intel-rapl:0", "package-0", 5_000_000, range_uj=range_uj)
    reason = RaplMeter(root=tmp_path).unavailable()
    assert reason is not None
    assert "where the counter of intel-rapl:0 starts again is not known" in reason
    assert "max_energy_range_uj" in reason


def test_a_range_of_32_bits_is_a_range(tmp_path):
    machine = Machine(tmp_path)
    machine.zone("intel-rapl:0", "package-0", 2**32 - 1, range_uj=2**32 - 1)
    meter = RaplMeter(root=tmp_path)
    assert meter.unavailable() is None
    assert meter.facts().resolution == pytest.approx(1e-6)


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


def test_a_container_that_masks_the_counters(tmp_path):
    folder = tmp_path / "sys/class/powercap"
    folder.mkdir(parents=True)
    (folder / "intel-rapl:0").symlink_to("../../devices/virtual/powercap/intel-rapl/intel-rapl:0")
    reason = RaplMeter(root=tmp_path).unavailable()
    assert reason is not None
    assert "hidden by the container" in reason
    assert "--security-opt systempaths=unconfined" in reason


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
    assert meter.read().value == 0
