"""The stream at a fixed rate, as a camera asks for it: between inferences the device idles, cools and clocks down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgekit.measured import Energy, Window
from edgekit.profiles.energy import Inference
from edgekit.profiles.recorder import Recorder
from edgekit.profiles.system import collector_off
from edgekit.progress import Progress
from edgekit.records import PacedProfile
from edgekit.stats import summarize

__all__ = ["Paced", "measure_paced", "paced_profile"]


@dataclass(frozen=True, kw_only=True)
class Paced:
    """What one rate gave.

    Attributes:
        rate_hz: inferences begun each second.
        latency_ns: in order.
        late: inferences that began after their time.
        window: of energy; ``None`` without a meter.
        failure: why there is no energy.
    """

    rate_hz: float
    latency_ns: list[int]
    late: int
    window: Window | None = None
    failure: str = ""


def measure_paced(
    run: Inference,
    *,
    rate_hz: float,
    seconds: float,
    recorder: Recorder | None,
    clock: Callable[[], int],
    sleep: Callable[[float], None],
    progress: Progress,
) -> Paced:
    """Begin an inference every ``1 / rate_hz`` seconds for as long; the garbage collector is off.

    The time of an inference that could not begin in time, because the one before was not ready, counts from when its
    sample was there.

    Args:
        run: the next inference of the stream.
        rate_hz: of samples.
        seconds: in all; at least two samples are run.
        recorder: of energy, open; ``None`` for none.
        clock: nanoseconds.
        sleep: seconds of doing nothing.
        progress: told where it stands.

    Raises:
        MeasurementError: the meter cannot be read any more.
    """
    count, period_ns = max(2, round(seconds * rate_hz)), 1e9 / rate_hz
    taken_ns: list[int] = []
    late = 0
    with collector_off():
        start_s = recorder.take() if recorder is not None else 0.0
        first_ns = clock()
        for number in range(count):
            due_ns = first_ns + round(number * period_ns)
            if number % max(1, count // 50) == 0:
                progress(f"measure at {rate_hz:g} Hz", number, count)
            was_late = clock() > due_ns and number > 0
            if not was_late:
                sleep(max(0, due_ns - clock()) * 1e-9)
            begin_ns = due_ns if was_late else clock()
            run()
            taken_ns.append(clock() - begin_ns)
            late += was_late
        sleep(max(0, first_ns + round(count * period_ns) - clock()) * 1e-9)
    window = None
    if recorder is not None:
        stop_s = recorder.take()
        found = recorder.joules(start_s, stop_s)
        window = Window(
            name=f"stream at {rate_hz:g} Hz",
            kind="paced",
            start_s=start_s,
            stop_s=stop_s,
            inferences=count,
            energy_j=found.energy_j,
            bound_j=found.bound_j,
            updates=found.updates,
            gap_s=found.gap_s,
            median_s=sorted(taken_ns)[count // 2] * 1e-9,
        )
    return Paced(rate_hz=rate_hz, latency_ns=taken_ns, late=late, window=window)


def paced_profile(paced: Paced, energy: Energy, *, seed: int) -> PacedProfile:
    """For the file.

    Args:
        paced: what was measured.
        energy: of one inference with the idling after it.
        seed: of the bootstrap.
    """
    return PacedProfile(
        rate_hz=paced.rate_hz,
        latency_ns=tuple(paced.latency_ns),
        latency=summarize(paced.latency_ns, seed=seed),
        late=paced.late,
        energy=energy,
    )
