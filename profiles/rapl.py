"""Processor energy of x86 machines: Intel's running average power limit counters (AMD's too), from sysfs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekit.errors import MeasurementError
from edgekit.profiles.energy import Reading

__all__ = ["RaplMeter"]

POWERCAP = "sys/class/powercap"
ZONE = re.compile(r"intel-rapl:\d+(:\d+)?")
"""Zones of the MSR interface and their parts. ``intel-rapl-mmio:N`` counts the same energy again and does not match."""
COUNTER_STEPS = 2**32 - 1
"""The hardware counter has 32 bits, so a zone's range tells the energy of one step."""


class RaplMeter:
    """Sum of every package zone and every DRAM zone.

    A package zone holds its cores and uncore, which are therefore not added; DRAM is outside the package (Intel SDM
    volume 3, "Package RAPL Domain" and "DRAM RAPL Domain"), and is added where the machine has the zone. ``psys``
    covers the platform, packages included, and is left out. The figures are of the whole socket, not of this process.

    A counter starts again at ``max_energy_range_uj``, after minutes at full load; one restart between two readings is
    found and made up for, to within one counter step, two cannot be told from one.

    Args:
        root: the folder that stands for ``/``.
        clock: nanoseconds, as ``time.perf_counter_ns``.
    """

    name = "rapl"
    quantity = "counter"

    def __init__(self, *, root: Path = Path("/"), clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._root = Path(root)
        self._clock = clock
        self._last_uj: dict[Path, int] = {}
        self._total_uj = 0

    @property
    def scope(self) -> str:
        """What the zones found cover."""
        labels = {_label(zone) for zone in self._zones()}
        return "processor packages and DRAM" if "dram" in labels else "processor packages"

    def unavailable(self) -> str | None:
        """Why it cannot measure here, with what would fix it; ``None`` when it can."""
        folder = self._root / POWERCAP
        if not folder.is_dir():
            return (
                f"{folder} does not exist: a virtual machine, a container that hides it, or not an x86 processor; "
                "run on the machine itself (modprobe intel_rapl_msr), or give another meter"
            )
        zones = self._zones()
        if not zones:
            return f"{folder} has no processor package; load the driver (modprobe intel_rapl_msr) or give another meter"
        try:
            for zone in zones:
                _read_uj(zone / "energy_uj")
        except PermissionError:
            return f"{zone}/energy_uj is for root only; run as root, or allow it: sudo chmod a+r {folder}/*/energy_uj"
        except (OSError, ValueError) as error:
            return f"{zone}/energy_uj cannot be read ({error}); use another meter"
        return None

    def open(self) -> None:
        """Start; energy counts from here.

        Raises:
            MeasurementError: it cannot measure here.
        """
        reason = self.unavailable()
        if reason is not None:
            raise MeasurementError(f"rapl: {reason}")
        self._total_uj = 0
        self._last_uj = {zone: self._counter(zone) for zone in self._zones()}

    def read(self) -> Reading:
        """Energy since :meth:`open`.

        Raises:
            MeasurementError: it is not open, a counter vanished, or it started again and its range is unknown.
        """
        if not self._last_uj:
            raise MeasurementError("rapl: read before open; call open() first")
        for zone, last_uj in self._last_uj.items():
            now_uj = self._counter(zone)
            self._total_uj += now_uj - last_uj if now_uj >= last_uj else now_uj - last_uj + _range_uj(zone)
            self._last_uj[zone] = now_uj
        return Reading(time_ns=self._clock(), energy_j=self._total_uj * 1e-6)

    def close(self) -> None:
        """Stop."""
        self._last_uj = {}

    def describe(self) -> dict[str, Any]:
        """Name, quantity, unit, scope, zones, resolution and update interval (about 1 ms; not told by the system)."""
        zones = self._zones()
        return {
            "name": self.name,
            "quantity": self.quantity,
            "unit": "J",
            "scope": self.scope,
            "zones": [f"{zone.name} {_label(zone)}" for zone in zones],
            "resolution_j": self._resolution_j(zones),
            "update_interval_s": 1e-3,
        }

    def _zones(self) -> list[Path]:
        """Zones that are added up."""
        folder = self._root / POWERCAP
        found = sorted(path for path in folder.glob("intel-rapl:*") if ZONE.fullmatch(path.name))
        return [path for path in found if _label(path).startswith("package") or _label(path) == "dram"]

    @staticmethod
    def _counter(zone: Path) -> int:
        try:
            return _read_uj(zone / "energy_uj")
        except (OSError, ValueError) as error:
            raise MeasurementError(f"rapl: {zone}/energy_uj can no longer be read ({error}); measure again") from error

    @staticmethod
    def _resolution_j(zones: list[Path]) -> float | None:
        try:
            return max(_range_uj(zone) / COUNTER_STEPS * 1e-6 for zone in zones)
        except (MeasurementError, ValueError):
            return None


def _label(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def _read_uj(path: Path) -> int:
    return int(path.read_text())


def _range_uj(zone: Path) -> int:
    path = zone / "max_energy_range_uj"
    try:
        value = _read_uj(path)
    except (OSError, ValueError) as error:
        raise MeasurementError(
            f"rapl: the counter of {zone.name} started again and {path} cannot be read ({error}); measure again"
        ) from error
    if value <= 0:
        raise MeasurementError(f"rapl: the counter of {zone.name} started again and {path} says {value}; measure again")
    return value
