"""A recorded meter: for tests and for study, never for a figure that is passed off as measured here."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MeasurementError
from edgekit.profiles.energy import Reading

__all__ = ["ReplayMeter"]

COLUMNS = ("power_w", "energy_j")


class ReplayMeter:
    """Plays a recording as if it were happening now, from :meth:`open` on.

    Power is taken to change linearly between two lines, so that energy is their trapezoids, the last one cut where the
    reading falls; energy is interpolated linearly.

    Args:
        path: a CSV file with the header ``time_s,power_w`` or ``time_s,energy_j`` and increasing times.
        root: unused; a recording is not of this machine.
        clock: nanoseconds, as ``time.perf_counter_ns``.

    Raises:
        MeasurementError: the file cannot be read or is no such recording.
    """

    name = "replay"
    quantity = "replay"
    scope = "whatever was recorded"

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        root: Path = Path("/"),
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._path = None if path is None else Path(path)
        self._clock = clock
        self._opened_ns: int | None = None
        self._kind = ""
        self._times_s = self._values = self._energies_j = np.zeros(0)
        if self._path is not None:
            self._kind, self._times_s, self._values = _read_recording(self._path)
            if self._kind == "energy_j":
                self._energies_j = self._values - self._values[0]
            else:
                pieces_j = np.diff(self._times_s) * (self._values[1:] + self._values[:-1]) / 2
                self._energies_j = np.concatenate([[0.0], np.cumsum(pieces_j)])

    def unavailable(self) -> str | None:
        """Why it cannot play; ``None`` when it can."""
        return "plays a recording and was given none: ReplayMeter('power.csv')" if self._path is None else None

    def open(self) -> None:
        """Start the recording.

        Raises:
            MeasurementError: there is none.
        """
        reason = self.unavailable()
        if reason is not None:
            raise MeasurementError(f"replay: {reason}")
        self._opened_ns = self._clock()

    def read(self) -> Reading:
        """Energy since :meth:`open`.

        Raises:
            MeasurementError: it is not open, or the recording is over.
        """
        if self._opened_ns is None:
            raise MeasurementError("replay: read before open; call open() first")
        now_ns = self._clock()
        at_s = float(self._times_s[0]) + (now_ns - self._opened_ns) * 1e-9
        if at_s > self._times_s[-1]:
            length_s = self._times_s[-1] - self._times_s[0]
            raise MeasurementError(f"{self._path}: the recording ends after {length_s:g} s; give a longer one")
        return Reading(time_ns=now_ns, energy_j=self._energy_j(at_s))

    def close(self) -> None:
        """Stop."""
        self._opened_ns = None

    def describe(self) -> dict[str, Any]:
        """Name, quantity, unit, scope and file; says that it is a replay."""
        return {
            "name": self.name,
            "quantity": self.quantity,
            "unit": "J",
            "scope": self.scope,
            "resolution_j": None,
            "update_interval_s": None,
            "path": str(self._path),
            "replay": True,
        }

    def _energy_j(self, at_s: float) -> float:
        if self._kind == "energy_j":
            return float(np.interp(at_s, self._times_s, self._energies_j))
        index = max(int(np.searchsorted(self._times_s, at_s)) - 1, 0)
        power_w = float(np.interp(at_s, self._times_s, self._values))
        return float(self._energies_j[index] + (at_s - self._times_s[index]) * (self._values[index] + power_w) / 2)


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
