"""Power that flows through the shunt of an INA219 or INA226, read over I2C."""

from __future__ import annotations

import errno
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekit.errors import MeasurementError, MissingExtraError, require
from edgekit.measured import MeterFacts
from edgekit.profiles.reading import PolledMeter

__all__ = ["InaMeter"]

HOW = "InaMeter(chip='ina226', bus=1, address=0x40, shunt_ohms=0.1)"
CONFIG, SHUNT, BUS, POWER = 0x00, 0x01, 0x02, 0x03
"""Registers that both chips have."""
CONTINUOUS = 0b111
"""Lowest bits of the configuration: shunt and bus, again and again."""


class _Chip(ABC):
    """Registers of one kind of chip, 16 bits each.

    Attributes:
        name: of the kind.
        shunt_step_v: one step of the shunt register.
    """

    name: str
    shunt_step_v: float

    def __init__(self, bus: Any, address: int) -> None:
        self._bus = bus
        self._address = address

    def register(self, number: int) -> int:
        """Unsigned. SMBus words come with their low byte first, the chip sends the high byte first."""
        word = int(self._bus.read_word_data(self._address, number))
        return ((word & 0xFF) << 8) | (word >> 8)

    def shunt_steps(self) -> int:
        """Signed."""
        steps = self.register(SHUNT)
        return steps - (1 << 16) if steps & 0x8000 else steps

    def is_continuous(self) -> bool:
        """Whether it converts both voltages again and again."""
        return self.register(CONFIG) & CONTINUOUS == CONTINUOUS

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether there is a conversion that was not read yet; asking forgets it."""

    @abstractmethod
    def bus_v(self) -> float:
        """Voltage of the bus."""

    @abstractmethod
    def interval_s(self) -> float:
        """Between two conversions, averages included."""

    @abstractmethod
    def most_steps(self) -> int:
        """Of the shunt register; there it is clipped."""

    def stranger(self) -> str | None:
        """Why this is another chip, where it can be told."""
        return None


class _Ina219(_Chip):
    """TI INA219, SBOS448G, section 8.6."""

    name = "ina219"
    shunt_step_v = 10e-6
    BUS_STEP_V = 4e-3
    BITS_S = (84e-6, 148e-6, 276e-6, 532e-6)
    SAMPLES_S = (532e-6, 1.06e-3, 2.13e-3, 4.26e-3, 8.51e-3, 17.02e-3, 34.05e-3, 68.10e-3)

    def is_ready(self) -> bool:
        ready = bool(self.register(BUS) & 0b10)
        if ready:
            self.register(POWER)  # reading it forgets the flag
        return ready

    def bus_v(self) -> float:
        return (self.register(BUS) >> 3) * self.BUS_STEP_V

    def interval_s(self) -> float:
        config = self.register(CONFIG)
        return self._conversion_s(config >> 7) + self._conversion_s(config >> 3)

    def most_steps(self) -> int:
        return 4000 << (self.register(CONFIG) >> 11 & 0b11)  # ±40 mV times 1, 2, 4, 8

    def _conversion_s(self, setting: int) -> float:
        return self.SAMPLES_S[setting & 0b111] if setting & 0b1000 else self.BITS_S[setting & 0b11]


class _Ina226(_Chip):
    """TI INA226, SBOS547A, section 7.6."""

    name = "ina226"
    shunt_step_v = 2.5e-6
    BUS_STEP_V = 1.25e-3
    CONVERSION_S = (140e-6, 204e-6, 332e-6, 588e-6, 1.1e-3, 2.116e-3, 4.156e-3, 8.244e-3)
    AVERAGES = (1, 4, 16, 64, 128, 256, 512, 1024)
    MASK, MAKER = 0x06, 0xFE
    TEXAS_INSTRUMENTS = 0x5449

    def is_ready(self) -> bool:
        return bool(self.register(self.MASK) & 0b1000)  # reading it forgets the flag

    def bus_v(self) -> float:
        return self.register(BUS) * self.BUS_STEP_V

    def interval_s(self) -> float:
        config = self.register(CONFIG)
        both_s = self.CONVERSION_S[config >> 6 & 0b111] + self.CONVERSION_S[config >> 3 & 0b111]
        return both_s * self.AVERAGES[config >> 9 & 0b111]

    def most_steps(self) -> int:
        return 0x7FFF

    def stranger(self) -> str | None:
        maker = self.register(self.MAKER)
        return None if maker == self.TEXAS_INSTRUMENTS else f"its maker register says {maker:#06x}"


CHIPS: dict[str, type[_Chip]] = {"ina219": _Ina219, "ina226": _Ina226}


class InaMeter(PolledMeter):
    """Bus voltage times shunt voltage over the shunt's resistance; the chip's own current and power are not used.

    A reading waits for the next conversion, so that none is read twice. The chip's configuration is left as it is; it
    must convert both voltages continuously, as it does after it was switched on. Nobody else may read it meanwhile,
    the kernel's driver ``ina2xx`` included.

    Args:
        chip: ``"ina219"`` or ``"ina226"``.
        bus: number of the I2C bus, as in ``/dev/i2c-1``.
        address: of the chip, 0x40 to 0x4f.
        shunt_ohms: resistance of the shunt; its tolerance is the figure's.
        smbus: an open bus to use instead, as ``smbus2.SMBus``; stays open.
        root: the folder that stands for ``/``.
        clock: nanoseconds, as ``time.perf_counter_ns``.
    """

    name = "ina"

    def __init__(
        self,
        *,
        chip: str | None = None,
        bus: int | None = None,
        address: int = 0x40,
        shunt_ohms: float | None = None,
        smbus: Any = None,
        root: Path = Path("/"),
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        super().__init__(root=root, clock=clock)
        self._kind, self._number, self._address, self._shunt_ohms = chip, bus, address, shunt_ohms
        self._given = smbus
        self._bus: Any = None
        self._chip: _Chip | None = None
        self._interval_s = 0.0
        self._most_steps = 0

    def unavailable(self) -> str | None:
        """Why it cannot measure here, with what would fix it; ``None`` when it can."""
        if self._kind is None or self._shunt_ohms is None or (self._number is None and self._given is None):
            return f"needs to be told chip, bus, address and shunt: {HOW}"
        if self._kind not in CHIPS or not self._shunt_ohms > 0:
            return f"knows {', '.join(CHIPS)} over a shunt of more than 0 ohms: {HOW}"
        try:
            self._connect()
            return self._problem()
        except MissingExtraError as error:
            return str(error)
        except PermissionError:
            return f"/dev/i2c-{self._number} may not be opened: sudo usermod -aG i2c $USER, then log in again"
        except OSError as error:
            if error.errno == errno.EBUSY:
                return f"{self._where} is in the hands of the kernel's driver; use the meter 'hwmon'"
            return f"{self._where} does not answer ({error.strerror or error}); see i2cdetect -y {self._number}"
        finally:
            self._disconnect()

    def facts(self) -> MeterFacts:
        """The conversion interval from the configuration, and the step: bus voltage now times one step of current."""
        try:
            chip = self._connect()
            step_w = chip.bus_v() * chip.shunt_step_v / (self._shunt_ohms or 1.0)
            interval_s = chip.interval_s()
        except OSError as error:
            raise MeasurementError(f"ina: {self._where} does not answer ({error})") from error
        finally:
            if not self._is_open:
                self._disconnect()
        return MeterFacts(
            name=self.name,
            quantity="power",
            scope="device",
            covers=f"what flows through the shunt of {self._where}",
            parts=(f"{self._kind} {self._address:#04x}",),
            resolution=step_w,
            update_interval_s=interval_s,
        )

    @property
    def _where(self) -> str:
        bus = "the given bus" if self._number is None else f"I2C bus {self._number}"
        return f"the {self._kind} at {self._address:#04x} of {bus}"

    def _start(self) -> None:
        try:
            chip = self._connect()
            self._interval_s, self._most_steps = chip.interval_s(), chip.most_steps()
        except OSError as error:
            self._disconnect()
            raise MeasurementError(f"ina: {self._where} does not answer ({error})") from error

    def _stop(self) -> None:
        self._disconnect()

    def _value(self) -> float:
        chip = self._connect()
        try:
            self._wait(chip)
            steps, bus_v = chip.shunt_steps(), chip.bus_v()
        except OSError as error:
            raise MeasurementError(f"ina: {self._where} does not answer any more ({error}); measure again") from error
        if abs(steps) >= self._most_steps:
            raise MeasurementError(
                f"ina: more flows than {self._where} can measure; use a smaller shunt or wider range"
            )
        return bus_v * steps * chip.shunt_step_v / (self._shunt_ohms or 1.0)

    def _wait(self, chip: _Chip) -> None:
        """Until a conversion is ready: three intervals, and a tenth of a second for a slow bus, are enough."""
        until_ns = self._clock() + int((3 * self._interval_s + 0.1) * 1e9)
        while not chip.is_ready():
            if self._clock() > until_ns:
                raise MeasurementError(f"ina: {self._where} converts no more; measure again")

    def _problem(self) -> str | None:
        chip = self._connect()
        if stranger := chip.stranger():
            return f"{self._where} is another chip: {stranger}; give the right one: {HOW}"
        if not chip.is_continuous():
            return f"{self._where} does not convert continuously; switch it off and on, or set its register 0"
        return None

    def _connect(self) -> _Chip:
        if self._chip is None:
            if self._given is None:
                library: Any = require("smbus2", extra="i2c", purpose="Reading an INA219 or INA226")
                self._bus = library.SMBus(str(self._root / f"dev/i2c-{self._number}"))
            self._chip = CHIPS[self._kind or ""](self._given or self._bus, self._address)
        return self._chip

    def _disconnect(self) -> None:
        if self._bus is not None:
            self._bus.close()
        self._bus = self._chip = None
