"""What a meter gives, and what all meters here do alike."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import MeasurementError
from edgekit.measured import MeterFacts

__all__ = ["LEAST", "PolledMeter", "Reading", "SensorMeter"]

LEAST = -0.1
"""Watts or joules. Nothing gives power back; a sensor's offset may say a little less than nothing."""


@dataclass(frozen=True)
class Reading:
    """One meter reading.

    Attributes:
        time_ns: of ``time.perf_counter_ns``, when the value was true.
        value: joules since the meter was opened, or watts now, as its facts say.
    """

    time_ns: int
    value: float


class SensorMeter(ABC):
    """Opening, closing, and the plausibility of a reading; a meter adds where its readings come from.

    Args:
        root: the folder that stands for ``/``.
        clock: nanoseconds, as ``time.perf_counter_ns``.
    """

    name: str = ""

    def __init__(self, *, root: Path = Path("/"), clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._root = Path(root)
        self._clock = clock
        self._is_open = False

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why it cannot measure here, with what would fix it; ``None`` when it can."""

    @abstractmethod
    def facts(self) -> MeterFacts:
        """What it measures here. Only of a meter that is not unavailable.

        Raises:
            MeasurementError: it cannot measure here.
        """

    @abstractmethod
    def _take(self) -> Reading:
        """Value and time. Where the hardware streams, the last that came."""

    def _start(self) -> None:  # noqa: B027 - most meters have nothing to prepare
        """Whatever reading needs; cleans up after itself when it fails."""

    def _stop(self) -> None:  # noqa: B027
        """Give back what :meth:`_start` took."""

    def open(self) -> None:
        """Start; energy counts from here.

        Raises:
            MeasurementError: it cannot measure here.
        """
        self.close()
        reason = self.unavailable()
        if reason is not None:
            raise MeasurementError(f"{self.name}: {reason}")
        self._start()
        self._is_open = True

    def read(self) -> Reading:
        """Now.

        Raises:
            MeasurementError: it is not open, the sensor is gone, or what it says cannot be true.
        """
        if not self._is_open:
            raise MeasurementError(f"{self.name}: read before open; call open() first")
        reading = self._take()
        if not (math.isfinite(reading.value) and reading.value > LEAST):
            raise MeasurementError(
                f"{self.name}: the sensor says {reading.value:g}, which cannot be; it is broken, absent or wired the "
                "wrong way round, so use another meter"
            )
        return reading

    def close(self) -> None:
        """Stop. Closing what is closed does nothing."""
        if self._is_open:
            self._is_open = False
            self._stop()


class PolledMeter(SensorMeter):
    """A meter that is asked for its value.

    A reading's time is the middle between the moments before and after its files or registers were read: drivers that
    wait for the next conversion take milliseconds for each of them.
    """

    @abstractmethod
    def _value(self) -> float:
        """Joules since it was opened, or watts now."""

    def _take(self) -> Reading:
        before_ns = self._clock()
        value = self._value()
        return Reading(time_ns=(before_ns + self._clock()) // 2, value=value)
