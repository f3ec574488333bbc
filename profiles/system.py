"""The process and the machine around a measurement: memory, garbage collector, and what makes figures doubtful."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekit.environment import Environment

__all__ = ["collector_off", "machine_warnings", "peak_rss_bytes"]

BUSY = 0.10
"""Share of the processors that other work may use before figures are doubtful."""
DRIFT = 0.05
"""Change of frequency between before and after that makes figures doubtful."""


def peak_rss_bytes(*, root: Path = Path("/")) -> int | None:
    """Highest resident memory of this process since it started, all that it did before included.

    From ``VmHWM`` of ``/proc/self/status``, else ``getrusage``; ``None`` where neither is known.
    """
    try:
        status = (root / "proc/self/status").read_text()
    except OSError:
        status = ""
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    if root != Path("/"):
        return None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def collector_off() -> Iterator[None]:
    """Python's garbage collector, run once and then off inside the block: a collection is no inference's cost."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def machine_warnings(before: Environment, after: Environment) -> Iterator[str]:
    """What about the machine makes the figures less certain, and what to change."""
    for look, when in ((before, "before"), (after, "after")):
        if look.busy is not None and look.busy > BUSY:
            yield (
                f"other work used {look.busy:.0%} of the processors just {when} the measurement; "
                "stop it and measure again"
            )
    slow = sorted({name for name in (before.governors or {}).values() if name != "performance"})
    if slow:
        yield (
            f"the frequency governor is {', '.join(slow)}, so the clock follows the load; "
            "sudo cpupower frequency-set -g performance"
        )
    speeds, later = before.frequencies_hz or {}, after.frequencies_hz or {}
    changes = [abs(later[name] / speeds[name] - 1) for name in speeds if name in later and speeds[name] > 0]
    if changes and max(changes) > DRIFT:
        yield (
            f"a processor's clock changed by {max(changes):.0%} between before and after; "
            "fix the frequency, cool the device, and measure again"
        )
