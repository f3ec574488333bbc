"""Energy of what is wired to a Nordic Power Profiler Kit II: 100,000 samples of current a second, over serial USB."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MeasurementError, MissingExtraError, require
from edgekit.measured import MeterFacts
from edgekit.profiles.reading import Reading, SensorMeter

__all__ = ["Ppk2Meter"]

HOW = "Ppk2Meter(port='/dev/ttyACM0', voltage_v=3.3)"
SAMPLE_S = 10e-6
"""Between two samples."""
UPDATE_S = 0.01
"""Samples arrive in batches, about this far apart."""
LEAST_V, MOST_V = 0.8, 5.0
"""Of its regulator."""
LOSS = 1e-3
"""Share of samples that may be missing (EnergyRunner's limit)."""
BATCHES = 10_000
"""Samples that may be on their way."""
SILENT_S = 1.0
"""Without a sample, after which it is taken to be gone."""
ADC_V = 1.8 / 163840
"""One step of the converter."""
AFTER_SWITCH = 3
"""Samples after a switch of range that are transients (as many as Nordic's application smooths)."""
START, STOP, OUTPUT, REGULATOR, MODE, METADATA = 0x06, 0x07, 0x0C, 0x0D, 0x11, 0x19
"""Commands (pc-nrfconnect-ppk, src/constants)."""
AMPERE_METER, SOURCE_METER = 1, 2
CONSTANT = re.compile(r"^(R|GS|GI|O|S|I|UG)([0-4]): (\S+)", re.MULTILINE)
RESISTANCES = (1031.64, 101.65, 10.15, 0.94, 0.043)


@dataclass
class Calibration:
    """Constants of the five current ranges, ``(5,) float64`` each, named as the kit names them.

    Current is ``UG * (x * (GS * x + GI) + S * V + I)`` amperes with ``x = (adc - O) * ADC_V / R`` (pc-nrfconnect-ppk,
    src/device/serialDevice.ts).
    """

    R: NDArray[np.float64] = field(default_factory=lambda: np.array(RESISTANCES))
    GS: NDArray[np.float64] = field(default_factory=lambda: np.ones(5))
    GI: NDArray[np.float64] = field(default_factory=lambda: np.ones(5))
    O: NDArray[np.float64] = field(default_factory=lambda: np.zeros(5))  # noqa: E741
    S: NDArray[np.float64] = field(default_factory=lambda: np.zeros(5))
    I: NDArray[np.float64] = field(default_factory=lambda: np.zeros(5))  # noqa: E741
    UG: NDArray[np.float64] = field(default_factory=lambda: np.ones(5))

    @classmethod
    def parse(cls, text: str) -> Calibration:
        """From what the kit says of itself. Constants that it does not know (``-nan``, or a resistance of 0) stay."""
        made = cls()
        for name, index, value in CONSTANT.findall(text):
            number = float(value)
            if np.isfinite(number) and not (name == "R" and number == 0):
                getattr(made, name)[int(index)] = number
        return made

    def current_a(self, adc: NDArray[np.float64], ranges: NDArray[np.int64], volts: float) -> NDArray[np.float64]:
        """``(samples,)`` amperes from ``(samples,)`` steps of the converter in ``(samples,)`` ranges 0 to 4."""
        x = (adc - self.O[ranges]) * ADC_V / self.R[ranges]
        inner = x * (self.GS[ranges] * x + self.GI[ranges]) + self.S[ranges] * volts + self.I[ranges]
        return np.asarray(self.UG[ranges] * inner)


class Decoder:
    """Turns the stream of bytes into charge.

    A sample is a little-endian word of 32 bits: 14 of the converter, 3 of the range, 1 unused, 6 of a counter and 8
    logic inputs. Samples after a switch of range are replaced by the last one before.

    Args:
        calibration: of the kit.
        volts: of the supply.

    Attributes:
        charge_c: so far, in coulombs.
        samples: how many.
        lost: how many the counter says are missing.
    """

    def __init__(self, calibration: Calibration, volts: float) -> None:
        self.charge_c = 0.0
        self.samples = 0
        self.lost = 0
        self._calibration = calibration
        self._volts = volts
        self._rest = b""
        self._counter: int | None = None
        self._range = -1
        self._since_switch = AFTER_SWITCH
        self._held_a = 0.0

    def feed(self, data: bytes) -> None:
        """Take in more of the stream."""
        data = self._rest + data
        whole = len(data) // 4 * 4
        self._rest = data[whole:]
        if not whole:
            return
        words = np.frombuffer(data[:whole], dtype="<u4").astype(np.int64)
        ranges = np.minimum(words >> 14 & 0x7, 4)
        current_a = self._calibration.current_a((words & 0x3FFF).astype(np.float64) * 4, ranges, self._volts)
        self._count(words >> 18 & 0x3F)
        self.charge_c += float(self._steady(current_a, ranges).sum()) * SAMPLE_S

    def _count(self, counters: NDArray[np.int64]) -> None:
        """Missing samples; a loss of exactly 64 is not seen here."""
        before = counters[0] - 1 if self._counter is None else self._counter
        self.lost += int(((np.diff(counters, prepend=before) - 1) % 64).sum())
        self._counter = int(counters[-1])
        self.samples += counters.size

    def _steady(self, current_a: NDArray[np.float64], ranges: NDArray[np.int64]) -> NDArray[np.float64]:
        index = np.arange(ranges.size)
        before = ranges[0] if self._range < 0 else self._range
        switched = np.diff(ranges, prepend=before) != 0
        last_switch = np.maximum.accumulate(np.where(switched, index, -self._since_switch))
        good = index - last_switch >= AFTER_SWITCH
        last_good = np.maximum.accumulate(np.where(good, index, -1))
        steady_a = np.where(last_good >= 0, current_a[last_good], self._held_a)
        self._range, self._held_a = int(ranges[-1]), float(steady_a[-1])
        self._since_switch = min(ranges.size - int(last_switch[-1]), AFTER_SWITCH)
        return steady_a


class Ppk2Meter(SensorMeter):
    """Energy since it was opened: charge times the supply's voltage, which the kit does not measure.

    A thread of this meter takes the samples in; a reading is their sum so far. More than one sample in a thousand lost
    is an error. The kit carries up to 1 A and 5 V, so a microcontroller's supply or a small board's rail.

    Args:
        port: serial port, as ``"/dev/ttyACM0"``.
        voltage_v: of the supply; with ``source``, what the kit's regulator is set to.
        source: that the kit itself is the supply. It then switches this voltage on, and leaves it on.
        root: unused; the kit is reached by its port.
        clock: nanoseconds, as ``time.perf_counter_ns``.
    """

    name = "ppk2"

    def __init__(
        self,
        *,
        port: str | None = None,
        voltage_v: float | None = None,
        source: bool = False,
        root: Path = Path("/"),
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        super().__init__(root=root, clock=clock)
        self._port, self._voltage_v, self._source = port, voltage_v, source
        self._serial: Any = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._decoder = Decoder(Calibration(), 0.0)
        self._begun_ns = self._last_ns = 0
        self._failure = ""

    def unavailable(self) -> str | None:
        """Why it cannot measure here, with what would fix it; ``None`` when it can."""
        if self._port is None or self._voltage_v is None:
            return f"needs to be told its port and the supply's voltage: {HOW}, or with source=True where it supplies"
        if not 0 < self._voltage_v <= MOST_V or (self._source and self._voltage_v < LEAST_V):
            return f"carries up to {MOST_V:g} V, and supplies from {LEAST_V:g} V on; give that voltage_v"
        if self._is_open:
            return None
        try:
            self._connect()
        except (MeasurementError, MissingExtraError) as error:
            return str(error)
        finally:
            self._disconnect()
        return None

    def facts(self) -> MeterFacts:
        """Energy of what is wired to it. Steps differ from range to range: ``None``."""
        return MeterFacts(
            name=self.name,
            quantity="energy",
            scope="device",
            covers=f"what is wired to the Power Profiler Kit II, at {self._voltage_v:g} V",
            parts=(self._port or "",),
            update_interval_s=UPDATE_S,
        )

    def _take(self) -> Reading:
        with self._lock:
            charge_c, samples, lost = self._decoder.charge_c, self._decoder.samples, self._decoder.lost
            time_ns, failure = self._last_ns, self._failure
        silent_s = (self._clock() - time_ns) * 1e-9
        if failure or silent_s > SILENT_S:
            raise MeasurementError(f"ppk2: {self._port} sends no more ({failure or 'silent'}); plug it in again")
        expected = (time_ns - self._begun_ns) * 1e-9 / SAMPLE_S
        if lost > LOSS * max(samples, 1) or samples < expected * (1 - 10 * LOSS) - BATCHES:
            raise MeasurementError(
                f"ppk2: of {max(samples + lost, int(expected))} samples {samples} came; use a USB port of its own and "
                "fewer other programs"
            )
        return Reading(time_ns=time_ns, value=charge_c * (self._voltage_v or 0.0))

    def _start(self) -> None:
        try:
            calibration = self._connect()
        except BaseException:
            self._disconnect()
            raise
        volts = self._voltage_v or 0.0
        self._decoder, self._failure = Decoder(calibration, volts), ""
        self._send(MODE, SOURCE_METER if self._source else AMPERE_METER)
        if self._source:
            self._send(REGULATOR, *round(volts * 1000).to_bytes(2, "big"))
        self._send(OUTPUT, 1)
        self._begun_ns = self._last_ns = self._clock()
        self._send(START)
        self._thread = threading.Thread(target=self._take_in, args=(self._serial,), name="edgekit-ppk2", daemon=True)
        self._thread.start()

    def _stop(self) -> None:
        self._send(STOP)
        self._disconnect()

    def _take_in(self, port: Any) -> None:
        """The thread: everything that comes, until the port is taken away."""
        while self._serial is port:
            try:
                data = port.read(max(1, port.in_waiting))
            except Exception as error:  # pyserial raises several kinds when a port goes
                with self._lock:
                    self._failure = str(error) or type(error).__name__
                return
            if data:
                with self._lock:
                    self._decoder.feed(data)
                    self._last_ns = self._clock()

    def _send(self, *command: int) -> None:
        try:
            self._serial.write(bytes(command))
        except OSError as error:
            self._failure = str(error)

    def _connect(self) -> Calibration:
        """Open the port and let the kit introduce itself.

        Raises:
            MissingExtraError: the library is not installed.
            MeasurementError: the port cannot be opened, or no kit answers.
        """
        library: Any = require("serial", extra="ppk2", purpose="Reading a Power Profiler Kit II")
        try:
            self._serial = library.Serial(self._port, timeout=0.05)
        except OSError as error:  # pyserial's own error is one
            raise MeasurementError(
                f"{self._port} cannot be opened ({error}); sudo usermod -aG dialout $USER, then log in again"
            ) from error
        self._send(STOP)
        self._serial.reset_input_buffer()
        self._send(METADATA)
        text = b""
        for _ in range(40):
            text += self._serial.read(4096)
            if b"END" in text:
                return Calibration.parse(text.decode(errors="replace"))
        raise MeasurementError(f"no Power Profiler Kit II answers at {self._port}; give another port: {HOW}")

    def _disconnect(self) -> None:
        port, self._serial = self._serial, None
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if port is not None:
            port.close()
