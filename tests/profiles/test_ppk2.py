"""Samples made here and decoded one by one as pc-nrfconnect-ppk does; no kit was at hand."""

from __future__ import annotations

import struct
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles.ppk2 import SAMPLE_S, Calibration, Decoder, Ppk2Meter

METADATA = """Calibrated: 0
R0: 1003.3506
R1: 101.5865
R2: 10.3027
R3: 0.9636
R4: 0
GS0: 0.0000
GS1: 112.7890
GS2: 18.0115
GS3: 2.5217
GS4: 0.0729
GI0: 1.0000
GI1: 0.9695
GI2: 0.9609
GI3: 0.9519
GI4: -nan
O0: 112.9420
O1: 75.4627
O2: 64.6020
O3: 50.4983
O4: 87.2177
S0: 0.000000048
S1: 0.000000596
S2: 0.000005281
S3: 0.000062577
S4: 0.002940743
I0: -0.000000104
I1: -0.000001443
I2: 0.000036439
I3: -0.000374119
I4: -0.009388455
UG0: 1.00
UG1: 1.00
UG2: 1.00
UG3: 1.00
UG4: 1.00
HW: 9173
IA: 56
END"""
"""Constructed in the kit's format."""
VOLTS = 3.3


def word(adc: int, current_range: int, counter: int) -> bytes:
    return struct.pack("<I", adc | current_range << 14 | (counter % 64) << 18 | 0xA5 << 24)


def stream(adcs, ranges) -> bytes:
    pairs = zip(adcs, ranges, strict=True)
    return b"".join(word(adc, rng, counter) for counter, (adc, rng) in enumerate(pairs))


def one_by_one_c(calibration: Calibration, adcs, ranges) -> float:
    """Coulombs, sample by sample; three samples after a switch of range are the last one before it."""
    total, since, before, last_a = 0.0, 3, None, 0.0
    for adc, rng in zip(adcs, ranges, strict=True):
        x = (adc * 4 - calibration.O[rng]) * (1.8 / 163840 / calibration.R[rng])
        current_a = calibration.UG[rng] * (
            x * (calibration.GS[rng] * x + calibration.GI[rng]) + calibration.S[rng] * VOLTS + calibration.I[rng]
        )
        since = 0 if before is not None and rng != before else since
        before = rng
        if since >= 3:
            last_a = current_a
        since += 1
        total += last_a * 1e-5
    return total


def test_what_the_kit_says_of_itself():
    calibration = Calibration.parse(METADATA)
    assert calibration.R.tolist() == [1003.3506, 101.5865, 10.3027, 0.9636, 0.043], "a resistance of 0 is none"
    assert calibration.GI[4] == 1.0, "nor is not-a-number a gain"
    assert calibration.O[2] == 64.602
    assert calibration.I[4] == -0.009388455


@given(
    st.lists(st.tuples(st.integers(0, 2**14 - 1), st.integers(0, 4)), min_size=1, max_size=60),
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
)
def test_charge_does_not_depend_on_how_bytes_arrive(samples, sizes):
    adcs, ranges = zip(*samples, strict=True)
    calibration = Calibration.parse(METADATA)
    decoder, data = Decoder(calibration, VOLTS), stream(adcs, ranges)
    at = 0
    for size in [*sizes, len(data)]:
        decoder.feed(data[at : at + size])
        at += size
    assert (decoder.samples, decoder.lost) == (len(samples), 0)
    assert decoder.charge_c == pytest.approx(one_by_one_c(calibration, adcs, ranges), rel=1e-9, abs=1e-15)


def test_samples_that_are_missing():
    data = stream([1000] * 200, [2] * 200)
    decoder = Decoder(Calibration(), VOLTS)
    decoder.feed(data[: 50 * 4])
    decoder.feed(data[53 * 4 :])
    assert (decoder.samples, decoder.lost) == (197, 3)


class Kit:
    """A serial port with a kit behind it.

    Args:
        adc: what its converter says, always in range 3.
        lose: that every so many-th sample is lost; none when 0.
        answers: whether it says what it is.
    """

    def __init__(self, *, adc: int = 2000, lose: int = 0, answers: bool = True) -> None:
        self.adc, self.lose, self.answers = adc, lose, answers
        self.commands: list[bytes] = []
        self.out = b""
        self.started: float | None = None
        self.sent = 0
        self.closed = False
        self.error: OSError | None = None
        self.silent = False

    @property
    def in_waiting(self) -> int:
        return 0

    def write(self, data: bytes) -> int:
        self.commands.append(bytes(data))
        if data == b"\x19" and self.answers:
            self.out += METADATA.encode()
        if data == b"\x06":
            self.started, self.sent = time.perf_counter(), 0
        return len(data)

    def reset_input_buffer(self) -> None:
        self.out = b""

    def read(self, size: int = 1) -> bytes:
        if self.error is not None:
            raise self.error
        if self.out or self.started is None:
            out, self.out = self.out, b""
            return out
        time.sleep(0.005)
        if self.silent:
            return b""
        due = int((time.perf_counter() - self.started) * 100_000)
        counters = np.arange(self.sent, due)
        self.sent = due
        if self.lose:
            counters = counters[counters % self.lose != 0]
        words = self.adc | 3 << 14 | (counters % 64) << 18
        return words.astype("<u4").tobytes()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def plug(monkeypatch):
    """Puts a kit behind every port."""

    def put(kit):
        def open_port(port, timeout):
            if isinstance(kit, OSError):
                raise kit
            kit.closed = False
            return kit

        monkeypatch.setitem(sys.modules, "serial", SimpleNamespace(Serial=open_port))
        return kit

    return put


def meter_with(**options) -> Ppk2Meter:
    return Ppk2Meter(port="/dev/ttyACM0", **{"voltage_v": VOLTS, **options})


def wait_for(meter: Ppk2Meter, seconds: float):
    time.sleep(seconds)
    return meter.read()


def test_a_steady_current(plug):
    kit = plug(Kit())
    meter = meter_with()
    assert isinstance(meter, Meter)
    assert meter.unavailable() is None
    assert kit.closed
    facts = meter.facts()
    assert (facts.quantity, facts.scope) == ("energy", "device")
    meter.open()
    first = wait_for(meter, 0.1)
    second = wait_for(meter, 0.3)
    meter.close()
    meter.close()
    assert kit.closed
    calibration = Calibration.parse(METADATA)
    power_w = one_by_one_c(calibration, [2000], [3]) / SAMPLE_S * VOLTS
    seconds = (second.time_ns - first.time_ns) * 1e-9
    assert (second.value - first.value) / seconds == pytest.approx(power_w, rel=0.1)
    assert kit.commands[-5:] == [b"\x19", b"\x11\x01", b"\x0c\x01", b"\x06", b"\x07"]


def test_as_a_supply_its_regulator_is_set(plug):
    kit = plug(Kit())
    meter = meter_with(source=True)
    meter.open()
    meter.close()
    assert kit.commands[-6:-1] == [b"\x19", b"\x11\x02", b"\x0d" + (3300).to_bytes(2, "big"), b"\x0c\x01", b"\x06"]


def test_lost_samples_are_an_error(plug):
    plug(Kit(lose=100))
    meter = meter_with()
    meter.open()
    with pytest.raises(MeasurementError, match=r"of \d+ samples \d+ came"):
        wait_for(meter, 0.2)
    meter.close()


def test_a_kit_that_goes(plug):
    kit = plug(Kit())
    meter = meter_with()
    meter.open()
    kit.error = OSError("device reports readiness to read but returned no data")
    with pytest.raises(MeasurementError, match=r"sends no more \(device reports"):
        wait_for(meter, 0.1)
    meter.close()


def test_a_kit_that_falls_silent(plug, clock):
    kit = plug(Kit())
    kit.silent = True
    meter = meter_with(clock=clock)
    meter.open()
    clock.pass_s(1.5)
    with pytest.raises(MeasurementError, match=r"sends no more \(silent\)"):
        meter.read()
    meter.close()


def test_it_must_be_told(tmp_path):
    assert "Ppk2Meter(port='/dev/ttyACM0'" in (Ppk2Meter(root=tmp_path).unavailable() or "")
    assert "Ppk2Meter(port='/dev/ttyACM0'" in (Ppk2Meter(port="/dev/ttyACM0").unavailable() or "")
    for options in ({"voltage_v": 12.0}, {"voltage_v": 0.0}, {"voltage_v": 0.5, "source": True}):
        assert "carries up to 5 V" in (meter_with(**options).unavailable() or "")


def test_a_port_that_is_none(plug):
    kit = plug(Kit(answers=False))
    assert "no Power Profiler Kit II answers at /dev/ttyACM0" in (meter_with().unavailable() or "")
    assert kit.closed
    plug(PermissionError(13, "Permission denied"))
    assert "sudo usermod -aG dialout" in (meter_with().unavailable() or "")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "serial", None)
    assert "pip install 'edgekit[ppk2]'" in (meter_with().unavailable() or "")
