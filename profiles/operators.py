"""The time of every operator, by the runtime's own profiler, in a second session that nothing else is measured in."""

from __future__ import annotations

import numpy as np

from edgekit.data import Dataset
from edgekit.errors import MeasurementError
from edgekit.interfaces import OperatorTimer
from edgekit.measured import OperatorTime
from edgekit.profiles.stages import every_stage
from edgekit.progress import Progress
from edgekit.session import Session

__all__ = ["time_operators"]

WARM_UP_RUNS = 3
"""As many first calls of an operator as built-in runtimes leave out."""


def time_operators(
    session: Session, data: Dataset, *, runs: int, rng: np.random.Generator, progress: Progress
) -> tuple[OperatorTime, ...]:
    """Open the network once more with its profiler on, and run real samples to the last exit.

    The policy's score is computed at every exit on the way. Where there are gates, each of the outcomes that together
    run every stage is run as often. A profiler takes time itself: read shares, and trust the stage's own time more
    than the sum of its operators.

    Args:
        session: an open bundle; left as it is.
        data: real samples.
        runs: how many inferences are counted; some come before that are not.
        rng: of the samples.
        progress: told where it stands.

    Returns:
        Stage by stage, in the order in which they were run.

    Raises:
        MeasurementError: the runtime cannot time its operators, or its recording cannot be read.
    """
    name = session.runtime.name
    if not isinstance(session.runtime, OperatorTimer):
        raise MeasurementError(f"runtime '{name}' cannot time its operators; measure them on one that can, as ORT's")
    timing = session.runtime.timing_operators()
    try:
        if not isinstance(timing, OperatorTimer):
            raise MeasurementError(f"runtime '{name}' gives one to time operators that does not tell them; mend it")
        with session.again(timing) as again:
            last, ways = len(session.plan.exits) - 1, every_stage(session.plan)
            for done in range(WARM_UP_RUNS + runs):
                sample = int(rng.integers(len(data)))
                for way in ways:
                    again.run(data.batch(slice(sample, sample + 1)), exit=last, gates=way)
                progress("time operators", done + 1, WARM_UP_RUNS + runs)
            return timing.operator_times()
    finally:
        timing.close()
