"""Power or energy from any sensor of the kernel's hardware monitoring, as a board's input or a graphics card."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import MeasurementError
from edgekit.measured import MeterFacts
from edgekit.profiles import sysfs
from edgekit.profiles.reading import PolledMeter

__all__ = ["HwmonMeter"]

CHIPS = "sys/class/hwmon"
SUPPLIES = "sys/class/power_supply"
CHANNEL = re.compile(r"(power|energy)\d+_(input|average)")
JETSON_CHIPS = ("ina3221", "ina238")
"""Read by the meter ``jetson`` where the board is one."""
MICRO = 1e-6
"""Of watts and joules (kernel, Documentation/hwmon/sysfs-interface.rst)."""


@dataclass(frozen=True)
class _Sensor:
    """A channel of a chip.

    Attributes:
        key: ``chip/label``, by which it is chosen.
        chip: its folder.
        path: file with its microwatts or microjoules.
    """

    key: str
    chip: Path
    path: Path

    @property
    def counts(self) -> bool:
        """Whether it is a counter of energy."""
        return self.path.name.startswith("energy")

    @property
    def interval_s(self) -> float | None:
        """Over which it averages, or at which the chip converts."""
        averages = self.path.name.endswith("_average")
        told = self.path.with_name(f"{self.path.name}_interval" if averages else "update_interval")
        return (sysfs.optional(told) or 0) * 1e-3 or None


class HwmonMeter(PolledMeter):
    """One sensor of power or energy, or several that the user knows to add up.

    What a sensor covers is its driver's matter, so nothing is added that was not asked for. A counter of energy that
    goes back is an error: drivers count in 32 or 64 bits and in steps of their own, so how much was lost is not known.

    Args:
        sensors: which, as ``"chip/label"``, or several of one kind joined by ``+``. Not needed where there is one.
        root: the folder that stands for ``/``.
        clock: nanoseconds, as ``time.perf_counter_ns``.
    """

    name = "hwmon"

    def __init__(
        self,
        *,
        sensors: str | None = None,
        root: Path = Path("/"),
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        super().__init__(root=root, clock=clock)
        self._wanted = tuple(part.strip() for part in sensors.split("+")) if sensors else ()
        self._opened: dict[_Sensor, int] = {}
        self._last_uj: dict[_Sensor, int] = {}

    def unavailable(self) -> str | None:
        """Why it cannot measure here, with what would fix it; ``None`` when it can."""
        try:
            chosen = self._chosen()
        except MeasurementError as error:
            return str(error)
        reasons = (sysfs.unreadable(sensor.path, counter=sensor.counts) for sensor in chosen)
        return next(filter(None, reasons), None)

    def facts(self) -> MeterFacts:
        """Sensors and what their chips tell of their interval. Steps are the driver's secret: ``None``."""
        chosen = self._chosen()
        intervals_s = [sensor.interval_s for sensor in chosen]
        return MeterFacts(
            name=self.name,
            quantity="energy" if chosen[0].counts else "power",
            scope="device",
            covers=f"what {' and '.join(sensor.key for sensor in chosen)} measures, as its driver says",
            parts=tuple(sensor.key for sensor in chosen),
            update_interval_s=max((each or 0.0 for each in intervals_s), default=0.0) or None,
        )

    def _start(self) -> None:
        chosen = self._chosen()
        self._opened = {each: self._sense(each) if each.counts else 0 for each in chosen}
        self._last_uj = dict(self._opened)

    def _value(self) -> float:
        total = 0
        for sensor, opened in self._opened.items():
            now = self._sense(sensor)
            if sensor.counts and now < self._last_uj[sensor]:
                raise MeasurementError(
                    f"hwmon: the counter {sensor.path} went back from {self._last_uj[sensor]} to {now} µJ; how much it "
                    "missed is not known, so measure again in shorter windows"
                )
            self._last_uj[sensor] = now
            total += now - opened
        return total * MICRO

    def _sense(self, sensor: _Sensor) -> int:
        value = sysfs.sense(self.name, sensor.path, counter=sensor.counts)
        if value < 0:
            raise MeasurementError(f"hwmon: {sensor.path} says {value}, which cannot be; use another meter")
        return value

    def _chosen(self) -> tuple[_Sensor, ...]:
        """Sensors that are added up.

        Raises:
            MeasurementError: there is none, or it is not clear which.
        """
        found = _with_own_keys(list(self._found()))
        if not found:
            raise MeasurementError(
                f"{self._root / CHIPS} has no sensor of power or energy (a virtual machine, or no driver for the "
                "board's); use another meter"
            )
        listed = ", ".join(found)
        if not self._wanted and len(found) > 1:
            raise MeasurementError(f"several sensors: {listed}; choose one: HwmonMeter(sensors='{next(iter(found))}')")
        unknown = [key for key in self._wanted if key not in found]
        if unknown:
            raise MeasurementError(f"no sensor is called {', '.join(unknown)}; there are: {listed}")
        chosen = tuple(found[key] for key in dict.fromkeys(self._wanted or found))
        if len({sensor.counts for sensor in chosen}) > 1:
            raise MeasurementError("counters of energy and sensors of power cannot be added; choose one kind")
        return chosen

    def _found(self) -> Iterator[_Sensor]:
        supplies = {path.name.replace("-", "_") for path in (self._root / SUPPLIES).glob("*")}
        jetson = "tegra" in sysfs.board(self._root).lower() or (self._root / "etc/nv_tegra_release").exists()
        for chip in sorted((self._root / CHIPS).glob("hwmon*"), key=lambda path: (len(path.name), path.name)):
            name = sysfs.label(chip / "name")
            if name.replace("-", "_") in supplies or (jetson and name in JETSON_CHIPS):
                continue  # the meter battery or jetson reads these
            for path in sorted(chip.glob("*")):
                if not CHANNEL.fullmatch(path.name) or self._is_second(path):
                    continue
                channel = path.name.partition("_")[0]
                label = sysfs.label(chip / f"{channel}_label") or channel
                yield _Sensor(key=f"{name or chip.name}/{label}", chip=chip, path=path)

    @staticmethod
    def _is_second(path: Path) -> bool:
        """Whether it is the average of a channel that also tells its power now."""
        return path.name.endswith("_average") and path.with_name(path.name.replace("_average", "_input")).exists()


def _with_own_keys(sensors: list[_Sensor]) -> dict[str, _Sensor]:
    """By key; where several are called alike, also by their device, which stays when ``hwmonN`` is renumbered."""
    keys = [sensor.key for sensor in sensors]
    made: dict[str, _Sensor] = {}
    for sensor in sensors:
        key = sensor.key
        if keys.count(key) > 1:
            chip, _, label = key.partition("/")
            key = f"{chip}@{(sensor.chip / 'device').resolve().name}/{label}"
        if key in made:
            raise MeasurementError(f"several sensors are called {key}; use another meter")
        made[key] = _Sensor(key=key, chip=sensor.chip, path=sensor.path)
    return made
