"""Reads a meter again and again while others work, and keeps every reading."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import numpy as np

from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles.integrate import Joules, Series, joules
from edgekit.profiles.reading import LEAST

__all__ = ["Recorder", "Repeat", "in_background"]

FASTEST_S = 0.01
"""Between two readings on average: a sensor on a slow bus takes a millisecond or more of a core for each."""
USUAL_S = 0.05
"""Where the sensor does not tell how often it is new, or is a counter that nothing is lost of in between."""
MOST_W = 100_000.0
"""No edge device uses more; what says so is a sentinel or a broken sensor."""

Repeat = Callable[[Callable[[], None], float], AbstractContextManager[None]]
"""Calls something about every so many seconds inside a ``with`` block."""


@contextmanager
def in_background(work: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call ``work`` from a thread at random moments, ``every_s`` apart on average and never twice as far.

    Random, so that work which comes and goes with any period is met at all its moments.
    """
    stop, random = threading.Event(), np.random.default_rng()

    def loop() -> None:
        while not stop.wait(every_s * random.uniform(0.5, 1.5)):
            work()

    thread = threading.Thread(target=loop, name="edgekit-meter", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Recorder:
    """A meter's readings while a ``with`` block lasts.

    A meter that fails is read no more; what was read before stays.

    Args:
        meter: closed; opened and closed by the block.
        zero_ns: of the clock: where the times begin.
        repeat: how readings are repeated meanwhile.

    Raises:
        MeasurementError: the meter cannot be opened or read at all.
    """

    def __init__(self, meter: Meter, *, zero_ns: int, repeat: Repeat = in_background) -> None:
        self.meter = meter
        with self._own_errors():
            self.facts = meter.facts()
        self._zero_ns = zero_ns
        self._repeat = repeat
        self._lock = threading.Lock()
        self._times_s: list[float] = []
        self._values: list[float] = []
        self._failure: MeasurementError | None = None
        self._paused = False
        self._repeating: AbstractContextManager[None] | None = None

    def __enter__(self) -> Recorder:
        with self._own_errors():
            self.meter.open()
        try:
            self.take()
            self._repeating = self._repeat(self._take_if_running, self.every_s)
            self._repeating.__enter__()
        except BaseException:
            self.meter.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._repeating is not None:
                self._repeating.__exit__(None, None, None)
        finally:
            with self._own_errors():
                self.meter.close()

    @property
    def every_s(self) -> float:
        """Time between two readings, on average."""
        if self.facts.quantity == "energy" or not self.facts.update_interval_s:
            return USUAL_S
        return max(self.facts.update_interval_s / 2, FASTEST_S)

    def take(self) -> float:
        """Read now. Returns the time, in seconds since zero.

        Raises:
            MeasurementError: the meter fails, now or before.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                with self._own_errors():
                    reading = self.meter.read()
                self._require_possible(reading.value)
            except MeasurementError as error:
                self._failure = error
                raise
            time_s = (reading.time_ns - self._zero_ns) * 1e-9
            if not self._times_s or time_s > self._times_s[-1]:
                self._times_s.append(time_s)
                self._values.append(reading.value)
            return time_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No readings inside the block, to see what reading costs those who work."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def series(self) -> Series:
        """All readings so far."""
        with self._lock:
            return Series(np.array(self._times_s), np.array(self._values))

    def joules(self, start_s: float, stop_s: float) -> Joules:
        """Energy between two moments, in seconds since zero.

        Raises:
            MeasurementError: there are too few readings.
        """
        return joules(self.series(), start_s, stop_s, facts=self.facts)

    def _take_if_running(self) -> None:
        if self._paused or self._failure is not None:
            return
        with suppress(MeasurementError):  # kept, and raised to whoever takes the next reading
            self.take()

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Whatever a plugin raises as what a meter may raise: it must neither end the measurement nor the thread."""
        try:
            yield
        except MeasurementError:
            raise
        except Exception as error:
            raise MeasurementError(f"{self.meter.name}: failed ({type(error).__name__}: {error})") from error

    def _require_possible(self, value: float) -> None:
        if self.facts.quantity == "power" and not LEAST < value < MOST_W:  # NaN is not either
            raise MeasurementError(
                f"{self.facts.name}: says {value:g} W, which cannot be: it is broken, absent or wired in reverse"
            )
