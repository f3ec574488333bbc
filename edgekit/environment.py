"""What a measurement was made on: device, clocks, load, versions. A measurement carries one before and one after."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from edgekit import limits
from edgekit import machine as machines
from edgekit.machine import OtherWork
from edgekit.tree import Runner, Tree

__all__ = ["Environment", "OtherWork"]

LIBRARIES = {
    "numpy": ("numpy",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "torch": ("torch",),
    "ai_edge_litert": ("ai-edge-litert",),
    "tflite_runtime": ("tflite-runtime",),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "tensorrt": ("tensorrt",),
    "executorch": ("executorch",),
}
"""Modules that may take part in a measurement, and the distributions that bring them."""
READERS: dict[str, Callable[[Tree], Any]] = {
    "processor": machines.processor,
    "cores": machines.cores,
    "affinity": machines.affinity,
    "memory_bytes": machines.memory_bytes,
    "governors": lambda tree: machines.per_processor(tree, "scaling_governor"),
    "frequencies_hz": machines.frequencies_hz,
    "frequency_limits_hz": machines.frequency_limits_hz,
    "temperatures_c": limits.temperatures_c,
    "load": machines.load,
    "core_types": machines.core_types,
    "isolated": machines.isolated,
    "boost": machines.boost,
    "clocks_fixed": limits.clocks_fixed,
    "passive_trips_c": limits.passive_trips_c,
    "cooling": limits.cooling,
    "throttle_counts": limits.throttle_counts,
    "throttled": limits.throttled,
    "alarms": limits.alarms,
    "power_mode": limits.power_mode,
    "power_source": limits.power_source,
    "swap_used_bytes": machines.swap_used_bytes,
    "masked": machines.masked,
}
"""What reads each attribute that a machine may not tell."""


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the machine. What could not be read is ``None``, with its reason in ``unavailable``.

    Attributes:
        taken: UTC, ISO 8601.
        host: network name.
        system: operating system and kernel.
        machine: processor architecture, as ``aarch64``.
        processor: model name, or the board's.
        cores: logical processors of the machine.
        affinity: processors that this process may run on.
        memory_bytes: physical memory.
        governors: frequency governor by processor.
        frequencies_hz: current frequency by processor.
        frequency_limits_hz: ``(lowest, highest)`` allowed frequency.
        temperatures_c: by thermal zone or sensor.
        load: one-minute load average.
        busy: share of processor time that other work used just now, 0 to 1.
        container: kind of container or virtual machine, when it says so.
        versions: of Python, edgekit and the libraries that took part.
        unavailable: reason, by name of the attribute that could not be read.
        core_types: type of core by processor, as ``"Cortex-A76"`` or ``"efficiency core"``.
        isolated: processors that the scheduler leaves alone.
        boost: whether turbo is on: frequencies that are held only while it is cool.
        clocks_fixed: whether the lowest allowed frequency of every processor and GPU is its highest.
        passive_trips_c: temperature from which on the kernel slows something down, by thermal zone.
        cooling: state of each cooling device; 0 is idle.
        throttle_counts: events of throttling since boot, by counter, summed over the processors.
        throttled: a Raspberry Pi's bits; in words: :attr:`throttled_now` and :attr:`throttled_since_boot`.
        alarms: of current and voltage sensors, those that are raised.
        power_mode: a Jetson's, as ``"15W"``.
        power_modes: its modes by number; empty on other machines.
        power_source: ``"mains"``, or ``"battery"`` while one is discharged.
        swap_used_bytes: swap space that holds something.
        competitors: the heaviest other processes during the look that gave ``busy``.
        clock_offset_s: wall clock less ``time.perf_counter``. It stays the same, to some milliseconds, until somebody
            sets the clock, the machine sleeps, or it starts again.
        masked: folders of /sys that a container hides.
    """

    taken: str
    host: str
    system: str
    machine: str
    processor: str | None = None
    cores: int | None = None
    affinity: tuple[int, ...] | None = None
    memory_bytes: int | None = None
    governors: dict[str, str] | None = None
    frequencies_hz: dict[str, float] | None = None
    frequency_limits_hz: tuple[float, float] | None = None
    temperatures_c: dict[str, float] | None = None
    load: float | None = None
    busy: float | None = None
    container: str | None = None
    versions: dict[str, str] = {}
    unavailable: dict[str, str] = {}
    core_types: dict[str, str] | None = None
    isolated: tuple[int, ...] | None = None
    boost: bool | None = None
    clocks_fixed: bool | None = None
    passive_trips_c: dict[str, float] | None = None
    cooling: dict[str, int] | None = None
    throttle_counts: dict[str, int] | None = None
    throttled: int | None = None
    alarms: tuple[str, ...] | None = None
    power_mode: str | None = None
    power_modes: dict[str, str] = {}
    power_source: str | None = None
    swap_used_bytes: int | None = None
    competitors: tuple[OtherWork, ...] | None = None
    clock_offset_s: float | None = None
    masked: tuple[str, ...] | None = None

    @property
    def usable_cores(self) -> dict[str, tuple[int, ...]]:
        """Processors that this process may run on, by type of core; empty where either is not known."""
        found: dict[str, tuple[int, ...]] = {}
        for number in self.affinity or ():
            kind = (self.core_types or {}).get(f"cpu{number}")
            if kind is not None:
                found[kind] = (*found.get(kind, ()), number)
        return found

    @property
    def throttled_now(self) -> tuple[str, ...]:
        """What holds a Raspberry Pi back at this moment, in words."""
        return tuple(word for bit, word in enumerate(limits.THROTTLED) if (self.throttled or 0) >> bit & 1)

    @property
    def throttled_since_boot(self) -> tuple[str, ...]:
        """What held a Raspberry Pi back at some time since it started, in words."""
        return tuple(word for bit, word in enumerate(limits.THROTTLED, 16) if (self.throttled or 0) >> bit & 1)

    @classmethod
    def take(cls, *, root: Path = Path("/"), busy_over_s: float = 0.2, run: Runner | None = None) -> Environment:
        """Look at the machine now. Changes nothing.

        Args:
            root: the folder that stands for ``/``; with any other, files under it are read and nothing else.
            busy_over_s: how long to wait while counting the processor time of other work; 0 leaves that out.
            run: runs the commands that look where no file tells (``vcgencmd``, ``nvpmodel``); without one, they run
                on the machine itself only.
        """
        tree = Tree(root, run=run)
        work = tree.at("busy", lambda: machines.other_work(tree, over_s=busy_over_s))
        if work is None:
            tree.unavailable["competitors"] = tree.unavailable["busy"]
        found = {name: tree.at(name, partial(reader, tree)) for name, reader in READERS.items()}
        return cls(
            taken=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            host=platform.node(),
            system=f"{platform.system()} {platform.release()}",
            machine=platform.machine(),
            busy=None if work is None else work[0],
            competitors=None if work is None else work[1],
            container=machines.container(tree),
            power_modes=limits.power_modes(tree),
            clock_offset_s=(time.time_ns() - time.perf_counter_ns()) * 1e-9,
            versions=_versions(),
            unavailable=tree.unavailable,
            **found,
        )


def _versions() -> dict[str, str]:
    """Versions of Python, edgekit and whichever of :data:`LIBRARIES` are loaded."""
    found = {"python": platform.python_version()}
    loaded = {module: names for module, names in LIBRARIES.items() if module in sys.modules}
    for module, distributions in {"edgekit": ("edgekit",), **loaded}.items():
        for distribution in distributions:
            try:
                found[module] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
        else:
            found[module] = str(getattr(sys.modules.get(module), "__version__", "unknown"))
    return found
