"""Which meter measures: the registered one that covers what runs the network, as nearly as there is one."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

from edgekit import plugins
from edgekit.errors import EdgekitError
from edgekit.interfaces import Meter

__all__ = ["find_meter"]

SCOPES = ("wall", "board", "module", "socket", "gpu", "battery")
"""From what covers most of the device to what covers least of it, the battery last: it is slow and coarse. What hangs
on a lead or is some chip's (``"device"``) may be another device's, and is used only when it is given."""
USUAL = {"x86_64": ("rapl",), "AMD64": ("rapl",)}
USUAL_ELSEWHERE = ("jetson", "pmic")
"""Meters that a machine of a kind mostly has."""


def find_meter(
    *, root: Path = Path("/"), clock: Callable[[], int] = time.perf_counter_ns, on_gpu: bool = False
) -> tuple[Meter | None, str]:
    """The registered meter of the widest scope that can measure here, recordings left out; else why none can.

    Args:
        root: the folder that stands for ``/``.
        clock: nanoseconds, for the meter.
        on_gpu: the network runs on a discrete GPU, whose own meter then comes first.
    """
    reasons, found = dict[str, str](), list[tuple[int, Meter]]()
    for name in plugins.names("meters"):
        try:
            meter: Meter = plugins.create("meters", name, root=root, clock=clock)
            reason = meter.unavailable()
            if reason is None:
                facts = meter.facts()
                if not facts.replay and facts.scope in SCOPES:
                    first = on_gpu and facts.scope == "gpu"
                    found.append((-1 if first else SCOPES.index(facts.scope), meter))
                continue
        except EdgekitError as error:
            reason = str(error)
        except Exception as error:  # whatever a plugin raises is its reason; the others may measure
            reason = f"broken plugin: {type(error).__name__}: {error}"
        reasons[name] = reason
    if found:
        return min(found, key=lambda each: each[0])[1], ""
    if not reasons:
        return None, "no meter is registered; reinstall edgekit or install a meter plugin"
    usual = USUAL.get(platform.machine(), USUAL_ELSEWHERE)
    likely = "; ".join(f"{name}: {reasons[name]}" for name in usual if name in reasons)
    return None, f"none of {len(reasons)} meters can measure here (edgekit doctor says why of each). {likely}"
