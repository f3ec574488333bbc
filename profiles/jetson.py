"""Power of NVIDIA Jetson modules and boards: their INA3221 and INA238 power monitors, from sysfs."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import MeasurementError
from edgekit.measured import MeterFacts
from edgekit.profiles import sysfs
from edgekit.profiles.reading import PolledMeter

__all__ = ["JetsonMeter"]

DRIVERS = "sys/bus/i2c/drivers"
SHUNT_STEP_V = 40e-6
"""One step of an INA3221's shunt voltage (TI SBOS576, and the kernel's drivers/hwmon/ina3221.c)."""
CURRENT_STEP_A = 1e-3
"""The driver rounds to milliamperes."""


@dataclass(frozen=True)
class Total:
    """Rails that add up to something.

    Attributes:
        rails: names; none feeds another.
        scope: of their sum, as in :class:`~edgekit.measured.MeterFacts`.
        covers: what the sum is.
    """

    rails: tuple[str, ...]
    scope: str
    covers: str


@dataclass(frozen=True)
class Board:
    """A family of modules.

    Attributes:
        name: of the family.
        known_by: pattern of its model or module number in the device tree.
        totals: what its rails may be added to, the most inclusive first; empty when it has no sensor.
    """

    name: str
    known_by: str
    totals: tuple[Total, ...]


VDD_IN = Total(("VDD_IN",), "module", "the module's input")
CARRIER = Total(("VDD_IN", "VDD_MUX"), "board", "the module's input and the carrier board's")
BOARDS = (
    # The INA238 of the developer kit's carrier sees all that comes in; the INA3221's rails are parts of it.
    Board("Thor", r"p3834|\bthor\b", (Total(("VIN",), "board", "the board's input, carrier included"),)),
    # VDDQ_VDD2_1V8AO is fed by VIN_SYS_5V0 and would be counted twice.
    Board(
        "AGX Orin",
        r"p3701|agx orin",
        (Total(("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), "module", "the module's three supplies"),),
    ),
    Board("Orin Nano or Orin NX", r"p3767|orin (nano|nx)", (VDD_IN,)),
    Board(
        "AGX Xavier",
        r"p2888|agx xavier|jetson-agx\b|\bgalen\b",
        (Total(("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), "module", "the module's six supplies"),),
    ),
    Board("Xavier NX", r"p3668|xavier nx|\bjakku\b", (VDD_IN,)),
    Board("TX2 NX", r"p3636|tx2 nx|\blanai\b", (VDD_IN,)),
    Board("TX2", r"p3310|p3489|jetson[- ]tx2|\bquill\b", (CARRIER, VDD_IN)),
    Board("TX1", r"p2180|jetson[-_ ]tx1|jetson-cv", (CARRIER, VDD_IN)),
    Board("Nano 2GB", r"p3542|nano 2gb", ()),
    Board("Nano", r"p3448|jetson[- ]nano", (Total(("POM_5V_IN",), "module", "the module's 5 V input"),)),
)
"""Which rails are the total; the first match counts. From energymon's JetsonPowerRails.md (device trees and developer
guides of L4T 32.6.1 and 34.1, NVIDIA forum topics 201037 and 223111), the AGX Xavier design guide (DG-09840-001, figure
5-14), the kernel's tegra234 device trees for Orin Nano and NX, and NVIDIA forum topic 366461 for Thor."""


@dataclass(frozen=True)
class Rail:
    """A channel of a power monitor.

    Attributes:
        name: on the board.
        files: numbers whose product is its power.
        to_w: of that product.
        interval: file with milliseconds between two conversions.
        shunt: file with the shunt's microohms.
        switch: file that says whether the channel is on.
    """

    name: str
    files: tuple[Path, ...]
    to_w: float
    interval: Path | None = None
    shunt: Path | None = None
    switch: Path | None = None


class JetsonMeter(PolledMeter):
    """Power of the rails that add up to the whole module or board, chosen by the board's model and the rails it has.

    Every read of a channel waits for its next conversion (a few milliseconds each, voltage and current apart), so a
    reading takes some and is timed at its middle. Figures of a rail are what flows into its regulators.

    Args:
        rails: names to add up instead, joined by ``+``, as ``"VDD_IN"`` or ``"GPU+CPU"``. For boards that are not known
            and for parts of one; nobody checks that none of them feeds another.
        root: the folder that stands for ``/``.
        clock: nanoseconds, as ``time.perf_counter_ns``.
    """

    name = "jetson"

    def __init__(
        self,
        *,
        rails: str | None = None,
        root: Path = Path("/"),
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        super().__init__(root=root, clock=clock)
        self._wanted = tuple(part.strip() for part in rails.split("+")) if rails else ()
        self._opened: tuple[Rail, ...] = ()

    def unavailable(self) -> str | None:
        """Why it cannot measure here, with what would fix it; ``None`` when it can."""
        try:
            rails = self._chosen()[1]
        except MeasurementError as error:
            return str(error)
        for rail in rails:
            if rail.switch is not None and sysfs.optional(rail.switch) == 0:
                return f"rail {rail.name} is switched off: echo 1 | sudo tee {rail.switch}"
            for path in rail.files:
                if reason := sysfs.unreadable(path):
                    return reason
        return None

    def facts(self) -> MeterFacts:
        """Rails, what their sum covers, their steps together, and the slowest chip's interval.

        A rail's step is its voltage now times the current of one step of shunt voltage: 40 mW at 5 V over 5 mΩ. A part
        that no file tells (of JetPack 4 and of an INA238) makes the whole ``None``.
        """
        total, rails = self._chosen()
        intervals_ms = [sysfs.optional(rail.interval) if rail.interval else None for rail in rails]
        steps_w = [self._step_w(rail) for rail in rails]
        known_w = [step_w for step_w in steps_w if step_w is not None]
        return MeterFacts(
            name=self.name,
            quantity="power",
            scope=total.scope,
            covers=total.covers,
            parts=total.rails,
            resolution=sum(known_w) if len(known_w) == len(rails) else None,
            update_interval_s=max((each or 0 for each in intervals_ms), default=0) * 1e-3 or None,
        )

    def _start(self) -> None:
        self._opened = self._chosen()[1]

    def _value(self) -> float:
        return sum(math.prod(sysfs.sense(self.name, path) for path in rail.files) * rail.to_w for rail in self._opened)

    def _step_w(self, rail: Rail) -> float | None:
        shunt_uohm = sysfs.optional(rail.shunt) if rail.shunt else None
        if not shunt_uohm:
            return None
        volts = sysfs.sense(self.name, rail.files[0]) * 1e-3
        return volts * max(SHUNT_STEP_V / (shunt_uohm * 1e-6), CURRENT_STEP_A)

    def _chosen(self) -> tuple[Total, tuple[Rail, ...]]:
        """What is added up.

        Raises:
            MeasurementError: nothing can be, and why.
        """
        found = tuple(_rails(self._root / DRIVERS))
        board = _board(self._root)
        if self._wanted:
            totals: tuple[Total, ...] = (Total(self._wanted, "device", f"{' + '.join(self._wanted)}, as chosen"),)
        else:
            totals = board.totals if board is not None else ()
        for total in totals:
            rails = tuple(rail for name in total.rails for rail in found if rail.name == name)
            if len(rails) > len(set(total.rails)):
                raise MeasurementError(f"several rails are called alike: {_names(rails)}; use an external meter")
            if len(rails) == len(total.rails):
                return total, rails
        raise MeasurementError(self._why_none(board, found, totals))

    def _why_none(self, board: Board | None, found: tuple[Rail, ...], totals: tuple[Total, ...]) -> str:
        if board is not None and not board.totals and not self._wanted:
            return f"a Jetson {board.name} has no power sensor; use an external meter (ina, joulescope)"
        if not found:
            folder = self._root / DRIVERS / "ina3221"
            if board is None:
                return f"{folder} has no power monitor: not a Jetson, or a container that hides it; use another meter"
            return f"{folder} has no power monitor, but this is a Jetson {board.name}; load it: sudo modprobe ina3221"
        choose = f"found {_names(found)}; choose those that make up the total: JetsonMeter(rails='A+B')"
        if totals:
            missing = " or ".join("+".join(total.rails) for total in totals)
            return f"{missing} is not among the rails; {choose}"
        model = sysfs.label(self._root / "proc/device-tree/model")
        known = f"the board '{model}' is not known" if model else "which board it is cannot be read"
        return f"{known}; {choose}"


def _board(root: Path) -> Board | None:
    text = sysfs.board(root).lower()
    return next((board for board in BOARDS if re.search(board.known_by, text)), None)


def _names(rails: tuple[Rail, ...]) -> str:
    return ", ".join(rail.name for rail in rails)


def _rails(drivers: Path) -> Iterator[Rail]:
    """Every named channel of every power monitor; ``NC`` is one that is not connected."""
    for chip in sorted(drivers.glob("ina3221x/*/iio:device*")):  # JetPack 4
        for channel in range(3):
            name = sysfs.label(chip / f"rail_name_{channel}")
            if name and name != "NC":
                yield _iio_rail(chip, channel, name)
    for chip in sorted(drivers.glob("ina3221/*/hwmon/hwmon*")):  # JetPack 5 and later
        for channel in range(1, 4):  # in4 to in7 and curr4 are shunt voltages and sums
            name = sysfs.label(chip / f"in{channel}_label")
            if name and name != "NC":
                yield Rail(
                    name=name,
                    files=(chip / f"in{channel}_input", chip / f"curr{channel}_input"),  # mV, mA
                    to_w=1e-6,
                    interval=chip / "update_interval",
                    shunt=chip / f"shunt{channel}_resistor",
                    switch=chip / f"in{channel}_enable",
                )
    for chip in sorted(drivers.glob("ina238/*/hwmon/hwmon*")):
        name = sysfs.label(chip / "power1_label") or sysfs.label(chip / "in1_label") or "VIN"  # Thor's has no label
        yield Rail(name=name, files=(chip / "power1_input",), to_w=1e-6, interval=chip / "update_interval")


def _iio_rail(chip: Path, channel: int, name: str) -> Rail:
    power = chip / f"in_power{channel}_input"  # mW
    pair = (chip / f"in_voltage{channel}_input", chip / f"in_current{channel}_input")  # mV, mA
    files, to_w = ((power,), 1e-3) if power.exists() else (pair, 1e-6)
    return Rail(name=name, files=files, to_w=to_w, interval=chip / f"polling_delay_{channel}")
