"""Power that is drawn from a battery, from the kernel's power supply class."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from edgekit.errors import MeasurementError
from edgekit.measured import MeterFacts
from edgekit.profiles import sysfs
from edgekit.profiles.reading import PolledMeter

__all__ = ["BatteryMeter"]

SUPPLIES = "sys/class/power_supply"
NEGOTIATION = "ucsi-source-psy"
"""USB-C ports that tell what was negotiated and not what flows (jetson_stats pull request 900)."""
MICRO = 1e-6
"""Of volts, amperes and watts (kernel, Documentation/ABI/testing/sysfs-class-power)."""


class BatteryMeter(PolledMeter):
    """Sum over every battery of the machine, while it runs on them alone.

    Power is the driver's own figure, else voltage times current. Drivers do not agree on the sign of a current that
    flows out, so the direction is taken from ``status``. Fuel gauges are slow (a second or more) and no driver tells
    how slow.

    Args:
        root: the folder that stands for ``/``.
        clock: nanoseconds, as ``time.perf_counter_ns``.
    """

    name = "battery"

    def __init__(self, *, root: Path = Path("/"), clock: Callable[[], int] = time.perf_counter_ns) -> None:
        super().__init__(root=root, clock=clock)
        self._opened: tuple[Path, ...] = ()

    def unavailable(self) -> str | None:
        """Why it cannot measure here, with what would fix it; ``None`` when it can."""
        batteries = self._batteries()
        if not batteries:
            return f"{self._root / SUPPLIES} has no battery; use another meter"
        if plugged := self._plugged(batteries):
            return plugged
        for battery in batteries:
            files = _files(battery)
            if not files:
                return f"{battery} tells neither power_now nor voltage_now and current_now; use another meter"
            for path in files:
                if reason := sysfs.unreadable(path):
                    return reason
        return None

    def facts(self) -> MeterFacts:
        """Batteries. Their steps and update interval are not told: ``None``."""
        return MeterFacts(
            name=self.name,
            quantity="power",
            scope="battery",
            covers="everything that runs on the battery, the screen included",
            parts=tuple(battery.name for battery in self._batteries()),
        )

    def _start(self) -> None:
        self._opened = self._batteries()

    def _value(self) -> float:
        gone = [battery for battery in self._opened if not _files(battery)]
        if gone:
            raise MeasurementError(f"battery: {gone[0]} can no longer be read; measure again")
        if plugged := self._plugged(self._opened):
            raise MeasurementError(f"battery: {plugged}")
        return sum(self._power_w(battery) for battery in self._opened)

    def _power_w(self, battery: Path) -> float:
        return math.prod(abs(sysfs.sense(self.name, path)) * MICRO for path in _files(battery))

    def _batteries(self) -> tuple[Path, ...]:
        """Those of the machine; a mouse's has the scope ``Device``."""
        return tuple(
            path
            for path in self._supplies()
            if sysfs.label(path / "type") == "Battery"
            and sysfs.label(path / "scope") != "Device"
            and sysfs.label(path / "present") != "0"
        )

    def _supplies(self) -> list[Path]:
        found = sorted((self._root / SUPPLIES).glob("*"))
        return [path for path in found if not path.name.startswith(NEGOTIATION)]

    def _plugged(self, batteries: tuple[Path, ...]) -> str | None:
        """Why the batteries do not carry the machine alone, when they do not.

        Of two batteries one may rest while the other is used.
        """
        states = [sysfs.label(battery / "status") for battery in batteries]
        if "Discharging" not in states or not set(states) <= {"Discharging", "Not charging", "Unknown", "Full"}:
            return f"the battery is not discharging ({', '.join(states)}); unplug the charger"
        for path in self._supplies():
            if sysfs.label(path / "type") in ("Mains", "USB") and sysfs.optional(path / "online") == 1:
                return f"{path.name} is plugged in; unplug it"
        return None


def _files(battery: Path) -> tuple[Path, ...]:
    """Numbers whose product is the power: ``power_now``, or voltage and current."""
    if (battery / "power_now").exists():
        return (battery / "power_now",)
    pair = (battery / "voltage_now", battery / "current_now")
    return pair if all(path.exists() for path in pair) else ()
