"""A recorded meter: for tests and for study, never for a figure that is passed off as measured here."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MeasurementError
from edgekit.measured import MeterFacts
from edgekit.profiles.reading import PolledMeter

__all__ = ["ReplayMeter"]

COLUMNS = ("power_w", "energy_j")


class ReplayMeter(PolledMeter):
    """Plays a recording as if it were happening now, from :meth:`open` on, interpolated linearly between its lines.

    Args:
        path: a CSV file with the header ``time_s,power_w`` or ``time_s,energy_j`` and increasing times. A reading is
            then watts, or joules since the first line.
        root: unused; a recording is not of this machine.
        clock: nanoseconds, as ``time.perf_counter_ns``.

    Raises:
        MeasurementError: the file cannot be read or is no such recording.
    """

    name = "replay"

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        root: Path = Path("/"),
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        super().__init__(root=root, clock=clock)
        self._path = None if path is None else Path(path)
        self._opened_ns = 0
        self._kind = ""
        self._times_s = self._values = np.zeros(0)
        if self._path is not None:
            self._kind, self._times_s, self._values = _read_recording(self._path)

    def unavailable(self) -> str | None:
        """Why it cannot play; ``None`` when it can."""
        return "plays a recording and was given none: ReplayMeter('power.csv')" if self._path is None else None

    def facts(self) -> MeterFacts:
        """Quantity and file; says that it is a replay. Steps and rate of the recorded sensor are not known."""
        return MeterFacts(
            name=self.name,
            quantity="energy" if self._kind == "energy_j" else "power",
            scope="recording",
            covers=f"whatever was recorded in {self._path.name}" if self._path else "whatever was recorded",
            replay=True,
        )

    def _start(self) -> None:
        self._opened_ns = self._clock()

    def _value(self) -> float:
        at_s = float(self._times_s[0]) + (self._clock() - self._opened_ns) / 1e9
        if at_s > self._times_s[-1] + 1e-9:  # the clock counts nanoseconds
            length_s = self._times_s[-1] - self._times_s[0]
            raise MeasurementError(f"{self._path}: the recording ends after {length_s:g} s; give a longer one")
        value = float(np.interp(at_s, self._times_s, self._values))
        return value - float(self._values[0]) if self._kind == "energy_j" else value


def _read_recording(path: Path) -> tuple[str, NDArray[np.float64], NDArray[np.float64]]:
    """Which quantity, ``(lines,)`` seconds, and ``(lines,)`` watts or joules."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MeasurementError(f"{path}: the recording cannot be read ({error})") from error
    kind = next((name for name in COLUMNS if rows and name in rows[0]), "")
    if len(rows) < 2 or not kind or "time_s" not in rows[0]:
        raise MeasurementError(f"{path}: no recording: needs a header time_s,power_w or time_s,energy_j, and two lines")
    points: list[tuple[float, float]] = []
    for line, row in enumerate(rows, start=2):
        try:
            point = (float(row["time_s"]), float(row[kind]))
        except (TypeError, ValueError) as error:
            raise MeasurementError(f"{path}, line {line}: not two numbers; mend or remove it") from error
        if not all(map(math.isfinite, point)) or (points and point[0] <= points[-1][0]):
            raise MeasurementError(f"{path}, line {line}: times must increase and values be finite; mend or remove it")
        if points and kind == "energy_j" and point[1] < points[-1][1]:
            raise MeasurementError(f"{path}, line {line}: energy decreases; undo the counter's restart")
        points.append(point)
    times_s, values = np.array(points, dtype=np.float64).T
    return kind, times_s, values
