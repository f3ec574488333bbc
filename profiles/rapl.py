"""Processor energy of x86 machines: Intel's running average power limit counters (AMD's too), from sysfs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import MeasurementError
from edgekit.measured import MeterFacts
from edgekit.profiles import sysfs
from edgekit.profiles.reading import PolledMeter

__all__ = ["RaplMeter"]

POWERCAP = "sys/class/powercap"
ZONES = "intel-rapl:*"
"""Those of the MSR interface and their parts; ``intel-rapl-mmio:*`` counts the same energy again."""
COUNTER_STEPS = 2**32 - 1
"""The hardware counter has 32 bits, so a zone's range tells the energy of one step."""
MOST_W = 1000.0
"""No socket and none's memory uses more: twice the thermal design power of the largest. Where the firmware sets no
limit, the zone's files speak of thousands of watts."""
LATE_S = 0.1
"""How old a counter's value may be: some updates of a millisecond, and as long as the reader may be held up."""


@dataclass
class _Counter:
    """A zone that is counted.

    Attributes:
        zone: its folder.
        range_uj: where it starts again.
        most_w: what it can use at most.
        last_uj: at the last reading.
        last_ns: when that was.
    """

    zone: Path
    range_uj: int
    most_w: float
    last_uj: int
    last_ns: int


class RaplMeter(PolledMeter):
    """Sum of every package zone and every DRAM zone.

    A package zone holds its cores and uncore, which are therefore not added; DRAM is outside the package (Intel SDM
    volume 3, "Package RAPL Domain" and "DRAM RAPL Domain"), and is added where the machine has the zone. ``psys``
    covers the platform, packages included, and is left out. The figures are of the whole socket, not of this process.

    A counter starts again at ``max_energy_range_uj``, after minutes at full load; one restart between two readings is
    found and made up for, to within one counter step, unless the zone cannot have used as much: then it was reset, an
    error. Two cannot be told from one, nor one from none when the counter has passed its last value, so readings
    must not lie farther apart than the zone's highest power needs for its range.

    Args:
        root: the folder that stands for ``/``.
        clock: nanoseconds, as ``time.perf_counter_ns``.
    """

    name = "rapl"

    def __init__(self, *, root: Path = Path("/"), clock: Callable[[], int] = time.perf_counter_ns) -> None:
        super().__init__(root=root, clock=clock)
        self._counters: list[_Counter] = []
        self._total_uj = 0

    def unavailable(self) -> str | None:
        """Why it cannot measure here, with what would fix it; ``None`` when it can."""
        folder = self._root / POWERCAP
        if not folder.is_dir():
            return (
                f"{folder} does not exist: a virtual machine, a container that hides it, or not an x86 processor; "
                "run on the machine itself (modprobe intel_rapl_msr), or give another meter"
            )
        zones = self._zones()
        if not zones and any(not sysfs.label(path / "name") for path in folder.glob(ZONES)):
            return (
                f"{folder} is hidden by the container; run outside of it, or start it with "
                "--security-opt systempaths=unconfined"
            )
        if not zones:
            return f"{folder} has no processor package; load the driver (modprobe intel_rapl_msr) or give another meter"
        allow = f"sudo chmod a+r {folder}/*/energy_uj"
        problems = [
            sysfs.unreadable(zone / "energy_uj", fix=allow, counter=True) or _without_range(zone) for zone in zones
        ]
        return next(filter(None, problems), None)

    def facts(self) -> MeterFacts:
        """Zones, their step from their range, and the update interval (about 1 ms; the system does not tell it)."""
        zones = self._zones()
        dram = any(sysfs.label(zone / "name") == "dram" for zone in zones)
        return MeterFacts(
            name=self.name,
            quantity="energy",
            scope="socket",
            covers="processor packages and DRAM" if dram else "processor packages",
            parts=tuple(f"{zone.name} {sysfs.label(zone / 'name')}" for zone in zones),
            resolution=sum(map(_range_uj, zones)) / COUNTER_STEPS * 1e-6,
            update_interval_s=1e-3,
        )

    def _start(self) -> None:
        self._total_uj = 0
        self._counters = [
            _Counter(
                zone=zone,
                range_uj=_range_uj(zone),
                most_w=_most_w(zone),
                last_uj=sysfs.sense(self.name, zone / "energy_uj", counter=True),
                last_ns=self._clock(),
            )
            for zone in self._zones()
        ]

    def _value(self) -> float:
        for counter in self._counters:
            self._total_uj += self._step_uj(counter)
        return self._total_uj * 1e-6

    def _step_uj(self, counter: _Counter) -> int:
        """Energy since the last reading."""
        now_uj, now_ns = sysfs.sense(self.name, counter.zone / "energy_uj", counter=True), self._clock()
        gap_s = (now_ns - counter.last_ns) * 1e-9
        if gap_s * counter.most_w > counter.range_uj * 1e-6:
            raise MeasurementError(
                f"rapl: the counter of {counter.zone.name} may have started again more than once in {gap_s:.0f} s "
                f"(range {counter.range_uj * 1e-6:.0f} J, up to {counter.most_w:g} W); read it more often and measure "
                "again"
            )
        step_uj = now_uj - counter.last_uj
        if step_uj < 0:
            step_uj += counter.range_uj
            if step_uj * 1e-6 > counter.most_w * (gap_s + LATE_S):
                raise MeasurementError(
                    f"rapl: the counter of {counter.zone.name} went back from {counter.last_uj} to {now_uj} µJ, and "
                    f"{counter.most_w:g} W cannot take it past its range in {gap_s:.2f} s: it was reset; measure again"
                )
        counter.last_uj, counter.last_ns = now_uj, now_ns
        return step_uj

    def _zones(self) -> list[Path]:
        """Zones that are added up."""
        found = sorted((self._root / POWERCAP).glob(ZONES))
        labels = {path: sysfs.label(path / "name") for path in found}
        return [path for path in found if labels[path].startswith("package") or labels[path] == "dram"]


def _without_range(zone: Path) -> str | None:
    path = zone / "max_energy_range_uj"
    reason = sysfs.unreadable(path, counter=True)
    if reason is None and sysfs.number(path) <= 0:
        reason = f"{path} says {sysfs.number(path)}; use another meter"
    return None if reason is None else f"where the counter of {zone.name} starts again is not known: {reason}"


def _range_uj(zone: Path) -> int:
    return sysfs.sense("rapl", zone / "max_energy_range_uj", counter=True)


def _most_w(zone: Path) -> float:
    """Twice the highest of the zone's limits, which hold for an average, where it has any and they are plausible."""
    patterns = ("constraint_*_max_power_uw", "constraint_*_power_limit_uw")
    limits_uw = [sysfs.optional(path) or 0 for pattern in patterns for path in zone.glob(pattern)]
    most_w = 2e-6 * max(limits_uw, default=0)
    return most_w if 0 < most_w < MOST_W else MOST_W
