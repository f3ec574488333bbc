"""Registers of the data sheets (TI SBOS448 and SBOS547) behind a bus of Python functions."""

from __future__ import annotations

import errno
import inspect
import sys
from types import SimpleNamespace

import pytest

from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles.ina import InaMeter

INA219 = {0x00: 0x399F, 0x01: 0x07D0, 0x02: 0x5D98 | 0b10, 0x03: 0}
"""Reset configuration. 2000 steps of 10 uV = 20 mV; 2995 steps of 4 mV = 11.98 V; a conversion is ready."""
INA226 = {0x00: 0x4127, 0x01: 0x0FA0, 0x02: 0x2570, 0x06: 0b1000, 0xFE: 0x5449}
"""Reset configuration. 4000 steps of 2.5 uV = 10 mV; 9584 steps of 1.25 mV = 11.98 V; a conversion is ready."""


class Bus:
    """SMBus words come with their low byte first. Every transfer takes 0.1 ms."""

    def __init__(self, registers, clock=None) -> None:
        self.registers = dict(registers)
        self.clock = clock
        self.error: OSError | None = None
        self.busy = self.then_busy = 0
        self.closed = False

    def read_word_data(self, i2c_addr, register, force=None):
        if self.clock is not None:
            self.clock.now_ns += 100_000
        if self.error is not None:
            raise self.error
        assert i2c_addr == 0x40
        word = self.registers[register]
        if self.busy and register in (0x02, 0x06):
            self.busy -= 1
            word &= ~(0b10 if register == 0x02 else 0b1000)
        elif register == (0x06 if 0x06 in self.registers else 0x03):
            self.busy = self.then_busy  # reading it forgets that a conversion is ready
        return ((word & 0xFF) << 8) | (word >> 8)

    def close(self) -> None:
        self.closed = True


def ina(chip: str, bus: Bus, **options) -> InaMeter:
    return InaMeter(chip=chip, shunt_ohms=0.1, smbus=bus, **options)


@pytest.mark.parametrize(
    ("chip", "registers", "power_w", "step_w", "interval_s"),
    [
        ("ina219", INA219, 11.98 * 0.2, 11.98 * 1e-4, 2 * 532e-6),
        ("ina226", INA226, 11.98 * 0.1, 11.98 * 2.5e-5, 2 * 1.1e-3),
    ],
)
def test_power_step_and_interval(clock, chip, registers, power_w, step_w, interval_s):
    meter = ina(chip, Bus(registers, clock), clock=clock)
    assert isinstance(meter, Meter)
    assert meter.unavailable() is None
    facts = meter.facts()
    assert facts.resolution == pytest.approx(step_w)
    assert facts.update_interval_s == pytest.approx(interval_s)
    assert (facts.quantity, facts.scope) == ("power", "device")
    meter.open()
    assert meter.read().value == pytest.approx(power_w)


@pytest.mark.parametrize(
    ("chip", "config", "interval_s"),
    [
        ("ina219", 0b00_00_0_0000_0000_111 | 0b111, 84e-6 + 84e-6),
        ("ina219", 0x2000 | 0b1111 << 7 | 0b1001 << 3 | 0b111, 68.1e-3 + 1.06e-3),
        ("ina226", 0x4000 | 0b111 << 9 | 0b000 << 6 | 0b111 << 3 | 0b111, 1024 * (140e-6 + 8.244e-3)),
    ],
)
def test_interval_of_other_configurations(chip, config, interval_s):
    registers = {**(INA219 if chip == "ina219" else INA226), 0x00: config}
    assert ina(chip, Bus(registers)).facts().update_interval_s == pytest.approx(interval_s)


@pytest.mark.parametrize(("chip", "registers"), [("ina219", INA219), ("ina226", INA226)])
def test_a_reading_waits_for_the_next_conversion(clock, chip, registers):
    bus = Bus(registers, clock)
    meter = ina(chip, bus, clock=clock)
    meter.open()
    bus.busy = 7
    before_ns = clock()
    meter.read()
    assert clock() - before_ns >= 8 * 100_000
    bus.then_busy = 10**9
    meter.read()
    with pytest.raises(MeasurementError, match="converts no more"):
        meter.read()


@pytest.mark.parametrize(("chip", "registers"), [("ina219", INA219), ("ina226", INA226)])
def test_a_current_the_wrong_way_round(chip, registers):
    bus = Bus({**registers, 0x01: 0xF830})  # -2000
    meter = ina(chip, bus)
    meter.open()
    with pytest.raises(MeasurementError, match="wired the wrong way round"):
        meter.read()


@pytest.mark.parametrize(
    ("chip", "registers", "config", "steps"),
    [
        ("ina219", INA219, 0x399F, 32000),
        ("ina219", INA219, 0x219F, 4000),
        ("ina226", INA226, 0x4127, 0x7FFF),
    ],
)
def test_more_than_the_range(chip, registers, config, steps):
    meter = ina(chip, Bus({**registers, 0x00: config, 0x01: steps}))
    meter.open()
    with pytest.raises(MeasurementError, match="smaller shunt"):
        meter.read()


def test_it_must_be_told(tmp_path):
    for options in ({}, {"chip": "ina226", "bus": 1}, {"bus": 1, "shunt_ohms": 0.1}):
        assert "InaMeter(chip='ina226', bus=1" in (InaMeter(root=tmp_path, **options).unavailable() or "")
    assert "knows ina219, ina226" in (InaMeter(chip="ina3221", bus=1, shunt_ohms=0.1).unavailable() or "")
    assert "more than 0 ohms" in (InaMeter(chip="ina226", bus=1, shunt_ohms=0.0).unavailable() or "")


def test_another_chip_or_mode():
    assert "its maker register says 0x0000" in (ina("ina226", Bus({**INA226, 0xFE: 0})).unavailable() or "")
    assert "does not convert continuously" in (ina("ina226", Bus({**INA226, 0x00: 0x4123})).unavailable() or "")


def test_a_chip_that_goes():
    bus = Bus(INA226)
    meter = ina("ina226", bus)
    meter.open()
    bus.error = OSError(errno.EREMOTEIO, "Remote I/O error")
    with pytest.raises(MeasurementError, match=r"does not answer any more .*Remote I/O error"):
        meter.read()
    meter.close()
    assert not bus.closed, "a bus that was given stays open"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "sudo usermod -aG i2c"),
        (OSError(errno.EBUSY, "Device or resource busy"), "use the meter 'hwmon'"),
        (OSError(errno.EREMOTEIO, "Remote I/O error"), "i2cdetect -y 1"),
    ],
)
def test_errors_of_the_bus(monkeypatch, error, message):
    def refused(path):
        raise error

    monkeypatch.setitem(sys.modules, "smbus2", SimpleNamespace(SMBus=refused))
    assert message in (InaMeter(chip="ina226", bus=1, shunt_ohms=0.1).unavailable() or "")


def test_its_own_bus_is_opened_by_path_and_closed(monkeypatch, tmp_path):
    opened = []

    def open_bus(path):
        opened.append((path, Bus(INA226)))
        return opened[-1][1]

    monkeypatch.setitem(sys.modules, "smbus2", SimpleNamespace(SMBus=open_bus))
    meter = InaMeter(chip="ina226", bus=1, shunt_ohms=0.1, root=tmp_path)
    meter.facts()
    meter.open()
    meter.read()
    meter.close()
    assert {path for path, _ in opened} == {str(tmp_path / "dev/i2c-1")}
    assert all(bus.closed for _, bus in opened)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "smbus2", None)
    reason = InaMeter(chip="ina226", bus=1, shunt_ohms=0.1).unavailable()
    assert "pip install 'edgekit[i2c]'" in (reason or "")


def test_the_real_library_has_what_is_used():
    smbus2 = pytest.importorskip("smbus2", reason="needs smbus2: pip install 'edgekit[i2c]'")
    real = inspect.signature(smbus2.SMBus.read_word_data)
    assert list(real.parameters) == list(inspect.signature(Bus.read_word_data).parameters)
    assert list(inspect.signature(smbus2.SMBus.__init__).parameters)[:2] == ["self", "bus"]
    assert callable(smbus2.SMBus.close)
