"""Energy that flows through a Joulescope, from the accumulator of the instrument."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekit.errors import MeasurementError, MissingExtraError, require
from edgekit.measured import MeterFacts
from edgekit.profiles.reading import Reading, SensorMeter

__all__ = ["JoulescopeMeter"]

STATISTICS_HZ = 50
"""How often the instrument is asked to report; of those that Joulescope's own application offers."""
SAMPLES_HZ = 1_000_000
"""Of a JS220, in which the report's length is told to it."""
JS110_HZ = 2
"""A JS110 reports as often, and cannot be told otherwise."""
FIRST_S = 3.0
"""To wait for the first report."""
LATE = 10
"""Reports missed in a row, after which the instrument is taken to be gone."""


class JoulescopeMeter(SensorMeter):
    """Energy since it was opened. The instrument integrates at its full rate and reports its sum.

    Reports come in a thread of the library; a reading is the last one, timed when it arrived (a few milliseconds late).

    Args:
        device: its path, as ``"u/js220/002557"``; not needed where one is plugged in.
        covers: what it is wired to, in words.
        root: unused; the instrument is found by USB.
        clock: nanoseconds, as ``time.perf_counter_ns``.
    """

    name = "joulescope"

    def __init__(
        self,
        *,
        device: str | None = None,
        covers: str = "what is wired to the Joulescope",
        root: Path = Path("/"),
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        super().__init__(root=root, clock=clock)
        self._wanted, self._covers = device, covers
        self._driver: Any = None
        self._device = ""
        self._lock = threading.Condition()
        self._last: Reading | None = None
        self._opened_j = 0.0

    def unavailable(self) -> str | None:
        """Why it cannot measure here, with what would fix it; ``None`` when it can."""
        if self._root != Path("/"):
            return f"is found by USB and not under {self._root}; leave root as it is"
        if self._is_open:
            return None
        try:
            driver = self._new_driver()
        except (MeasurementError, MissingExtraError) as error:
            return str(error)
        try:
            self._pick(driver)
        except MeasurementError as error:
            return str(error)
        finally:
            driver.finalize()
        return None

    def facts(self) -> MeterFacts:
        """The instrument and how often it reports. Its steps lie far below everything: ``None``."""
        device = self._device
        if not self._is_open:
            driver = self._new_driver()
            try:
                device = self._pick(driver)
            finally:
                driver.finalize()
        return MeterFacts(
            name=self.name,
            quantity="energy",
            scope="device",
            covers=self._covers,
            parts=(device,),
            update_interval_s=1 / _rate_hz(device),
        )

    def _take(self) -> Reading:
        with self._lock:
            last = self._last
        if last is None or (self._clock() - last.time_ns) * 1e-9 * _rate_hz(self._device) > LATE:
            raise MeasurementError(f"joulescope: {self._device} reports no more; plug it in again and measure again")
        return Reading(time_ns=last.time_ns, value=last.value - self._opened_j)

    def _start(self) -> None:
        self._driver = self._new_driver()
        try:
            self._device = self._pick(self._driver)
            self._driver.open(self._device)
            self._ask_for_reports()
            with self._lock:
                if not self._lock.wait_for(lambda: self._last is not None, timeout=FIRST_S):
                    raise MeasurementError(f"joulescope: {self._device} sends no report; plug it in again")
                assert self._last is not None
                self._opened_j = self._last.value
        except BaseException as error:
            self._stop()
            if isinstance(error, (MeasurementError, KeyboardInterrupt, SystemExit)):
                raise
            raise MeasurementError(f"joulescope: {self._device} cannot be used ({error}); plug it in again") from error

    def _stop(self) -> None:
        driver, self._driver, self._last = self._driver, None, None
        if driver is not None:
            driver.finalize()

    def _ask_for_reports(self) -> None:
        """As the library's own ``statistics`` command does."""
        if "js110" in self._device:
            self._driver.publish(f"{self._device}/s/i/range/select", "auto")
            topic = f"{self._device}/s/sstats/value"
        else:
            self._driver.publish(f"{self._device}/s/i/range/mode", "auto")
            self._driver.publish(f"{self._device}/s/stats/scnt", SAMPLES_HZ // STATISTICS_HZ)
            self._driver.publish(f"{self._device}/s/stats/ctrl", 1)
            topic = f"{self._device}/s/stats/value"
        self._driver.subscribe(topic, "pub", self._on_report)

    def _on_report(self, topic: str, value: Any) -> None:
        """Called by the library's thread."""
        energy_j = float(value["accumulators"]["energy"]["value"])
        with self._lock:
            self._last = Reading(time_ns=self._clock(), value=energy_j)
            self._lock.notify_all()

    def _new_driver(self) -> Any:
        library: Any = require("pyjoulescope_driver", extra="joulescope", purpose="Reading a Joulescope")
        try:
            return library.Driver()
        except (RuntimeError, OSError) as error:
            raise MeasurementError(f"the Joulescope's driver does not start ({error})") from error

    def _pick(self, driver: Any) -> str:
        """Path of the instrument.

        Raises:
            MeasurementError: there is none, or it is not clear which.
        """
        devices: list[str] = [path for path in driver.device_paths() if "js110" in path or "js220" in path]
        if not devices:
            raise MeasurementError(
                "no Joulescope JS110 or JS220 is plugged in, or its udev rule is missing (see the library's README)"
            )
        if self._wanted is None and len(devices) == 1:
            return devices[0]
        if self._wanted not in devices:
            raise MeasurementError(
                f"there are {', '.join(devices)}; choose one: JoulescopeMeter(device='{devices[0]}')"
            )
        return self._wanted


def _rate_hz(device: str) -> int:
    return JS110_HZ if "js110" in device else STATISTICS_HZ
