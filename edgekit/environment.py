"""What a measurement was made on: device, clocks, load, versions. A measurement carries one before and one after."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["Environment"]

LIBRARIES = {
    "numpy": ("numpy",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "torch": ("torch",),
    "ai_edge_litert": ("ai-edge-litert",),
    "tflite_runtime": ("tflite-runtime",),
    "tensorrt": ("tensorrt",),
    "executorch": ("executorch",),
}
"""Modules that may take part in a measurement, and the distributions that bring them."""


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

    @classmethod
    def take(cls, *, root: Path = Path("/"), busy_over_s: float = 0.2) -> Environment:
        """Look at the machine now.

        Args:
            root: the folder that stands for ``/``; with any other, files under it are read and nothing else.
            busy_over_s: how long to wait while counting the processor time of other work.
        """
        look = _Look(root)
        return cls(
            taken=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            host=platform.node(),
            system=f"{platform.system()} {platform.release()}",
            machine=platform.machine(),
            processor=look.at("processor", look.processor),
            cores=look.at("cores", look.cores),
            affinity=look.at("affinity", _affinity),
            memory_bytes=look.at("memory_bytes", look.memory_bytes),
            governors=look.at("governors", look.governors),
            frequencies_hz=look.at("frequencies_hz", look.frequencies_hz),
            frequency_limits_hz=look.at("frequency_limits_hz", look.frequency_limits_hz),
            temperatures_c=look.at("temperatures_c", look.temperatures_c),
            load=look.at("load", look.load),
            busy=look.at("busy", lambda: look.busy(busy_over_s)),
            container=look.container(),
            versions=_versions(),
            unavailable=look.unavailable,
        )


class _UnreadableError(Exception):
    """A fact that this machine does not tell; the message is the reason."""


class _Look:
    """Reads files below a root and keeps the reason of what it could not read."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._live = root == Path("/")
        self.unavailable: dict[str, str] = {}

    def at(self, name: str, reader: Callable[[], Any]) -> Any:
        """What the reader finds, or ``None`` and its reason kept under ``name``."""
        try:
            return reader()
        except _UnreadableError as error:
            self.unavailable[name] = str(error)
        except OSError as error:
            self.unavailable[name] = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except (ValueError, IndexError) as error:
            self.unavailable[name] = f"not what was expected there: {error}"
        return None

    def processor(self) -> str:
        cpuinfo = self._fields("proc/cpuinfo")
        board = self._root / "proc/device-tree/model"
        for found in (self._text(board), *(cpuinfo.get(key) for key in ("model name", "Model", "Hardware"))):
            if found:
                return found
        raise _UnreadableError("neither /proc/device-tree/model nor /proc/cpuinfo names one")

    def cores(self) -> int:
        online = self._text(self._root / "sys/devices/system/cpu/online")
        if online:
            return sum(
                int(last or first) - int(first) + 1
                for first, _, last in (part.partition("-") for part in online.split(","))
            )
        count = os.cpu_count() if self._live else None
        if count is None:
            raise _UnreadableError("the system does not list its processors")
        return count

    def memory_bytes(self) -> int:
        total = self._fields("proc/meminfo").get("MemTotal")
        if total is None:
            raise _UnreadableError("/proc/meminfo has no MemTotal")
        return int(total.split()[0]) * 1024

    def governors(self) -> dict[str, str]:
        return self._per_processor("scaling_governor")

    def frequencies_hz(self) -> dict[str, float]:
        try:
            return {name: float(khz) * 1e3 for name, khz in self._per_processor("scaling_cur_freq").items()}
        except _UnreadableError as error:
            if self._live:
                import psutil

                found = psutil.cpu_freq(percpu=True) or []
                if found and all(each.current for each in found):
                    return {f"cpu{index}": each.current * 1e6 for index, each in enumerate(found)}
            raise error

    def frequency_limits_hz(self) -> tuple[float, float]:
        low = self._per_processor("scaling_min_freq").values()
        high = self._per_processor("scaling_max_freq").values()
        return min(map(float, low)) * 1e3, max(map(float, high)) * 1e3

    def temperatures_c(self) -> dict[str, float]:
        """Thermal zones and hwmon sensors, both in thousandths of a degree."""
        sensors = [
            (self._text(zone / "type") or zone.name, zone.name, zone / "temp")
            for zone in self._found("sys/class/thermal/thermal_zone*")
        ] + [
            (
                f"{self._text(file.parent / 'name') or file.parent.name} "
                f"{self._text(file.with_name(file.name.replace('_input', '_label'))) or file.stem.split('_')[0]}",
                file.parent.name,
                file,
            )
            for file in self._found("sys/class/hwmon/hwmon*/temp*_input")
        ]
        if not sensors:
            raise _UnreadableError("no thermal zone and no hwmon temperature in /sys (usual in virtual machines)")
        names = [name for name, _, _ in sensors]
        found: dict[str, float] = {}
        for name, place, file in sensors:
            unique = name if names.count(name) == 1 else f"{name} ({place})"
            value = self.at(f"temperatures_c.{unique}", partial(_thousandths, file))
            if value is not None:
                found[unique] = value
        if not found:
            raise _UnreadableError("every temperature sensor refused to be read")
        return found

    def load(self) -> float:
        return float((self._root / "proc/loadavg").read_text().split()[0])

    def busy(self, over_s: float) -> float:
        """Processor time of everything but this process, over that of all processors."""
        if not self._live:
            raise _UnreadableError("a recorded machine does no work")
        import psutil

        own = psutil.Process()

        def others_s() -> float:
            times = psutil.cpu_times()._asdict()
            # Guest time is part of user time already; steal is work of other guests on this processor.
            used = sum(times.get(kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
            mine = own.cpu_times()
            return float(used - mine.user - mine.system)

        start, start_s = time.perf_counter(), others_s()
        time.sleep(over_s)
        used_s, elapsed_s = others_s() - start_s, time.perf_counter() - start
        return min(1.0, max(0.0, used_s / (elapsed_s * (psutil.cpu_count() or 1))))

    def container(self) -> str | None:
        """Container and virtual machine, as far as they leave signs; ``None`` without any."""
        signs = []
        groups = self._text(self._root / "proc/1/cgroup") or ""
        if (self._root / ".dockerenv").exists() or "docker" in groups:
            signs.append("docker")
        if (self._root / "run/.containerenv").exists():
            signs.append("podman")
        if "kubepods" in groups:
            signs.append("kubernetes")
        told = self._text(self._root / "run/systemd/container")
        if told and told not in signs:
            signs.append(told)
        if re.search(r"^flags\s*:.*\bhypervisor\b", self._text(self._root / "proc/cpuinfo") or "", re.MULTILINE):
            maker = self._text(self._root / "sys/class/dmi/id/sys_vendor")
            signs.append(f"virtual machine ({maker})" if maker else "virtual machine")
        return ", ".join(signs) or None

    def _found(self, pattern: str) -> list[Path]:
        """Paths of a pattern, in the order of the numbers in their names."""
        return sorted(self._root.glob(pattern), key=lambda path: [int(part) for part in re.findall(r"\d+", str(path))])

    def _per_processor(self, name: str) -> dict[str, str]:
        files = self._found(f"sys/devices/system/cpu/cpu[0-9]*/cpufreq/{name}")
        if not files:
            raise _UnreadableError("no cpufreq in /sys/devices/system/cpu (usual in virtual machines)")
        return {file.parent.parent.name: file.read_text().strip() for file in files}

    def _fields(self, name: str) -> dict[str, str]:
        """First value of each ``key : value`` line."""
        pairs = (line.partition(":") for line in reversed((self._text(self._root / name) or "").splitlines()))
        return {key.strip(): value.strip() for key, _, value in pairs}

    @staticmethod
    def _text(path: Path) -> str | None:
        """A small file's text without its ending, or ``None``."""
        try:
            return path.read_text(errors="replace").strip().strip("\0") or None
        except OSError:
            return None


def _thousandths(file: Path) -> float:
    return int(file.read_text()) / 1e3


def _affinity() -> tuple[int, ...]:
    if not hasattr(os, "sched_getaffinity"):
        raise _UnreadableError(f"{platform.system()} has no processor affinity")
    return tuple(sorted(os.sched_getaffinity(0)))


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
