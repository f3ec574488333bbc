"""Reading the processors, the memory, the work of others and the walls around this process."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from edgekit.tree import Tree, UnreadableError, fields_of, numbers_of

__all__ = ["OtherWork"]

CPU = "sys/devices/system/cpu"
MODELS = ("model name", "Model", "Hardware")
ARM_CORES = {
    0xC05: "Cortex-A5", 0xC07: "Cortex-A7", 0xC08: "Cortex-A8", 0xC09: "Cortex-A9", 0xC0D: "Cortex-A17",
    0xC0E: "Cortex-A17", 0xC0F: "Cortex-A15", 0xD01: "Cortex-A32", 0xD03: "Cortex-A53", 0xD04: "Cortex-A35",
    0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72", 0xD09: "Cortex-A73", 0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD0E: "Cortex-A76AE", 0xD40: "Neoverse-V1",
    0xD41: "Cortex-A78", 0xD42: "Cortex-A78AE", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510", 0xD47: "Cortex-A710",
    0xD48: "Cortex-X2", 0xD49: "Neoverse-N2", 0xD4A: "Neoverse-E1", 0xD4B: "Cortex-A78C", 0xD4C: "Cortex-X1C",
    0xD4D: "Cortex-A715", 0xD4E: "Cortex-X3", 0xD4F: "Neoverse-V2", 0xD80: "Cortex-A520", 0xD81: "Cortex-A720",
    0xD82: "Cortex-X4", 0xD83: "Neoverse-V3AE", 0xD84: "Neoverse-V3", 0xD85: "Cortex-X925", 0xD87: "Cortex-A725",
}  # fmt: skip
"""Part numbers of ARM's own cores in the MIDR register, as in arch/arm64/include/asm/cputype.h of Linux."""
OTHER_CORES = {(0x4E, 0x000): "Denver", (0x4E, 0x003): "Denver 2", (0x4E, 0x004): "Carmel"}
"""Of other makers, by implementer and part: NVIDIA's, on Jetson."""
ARM = 0x41
HYBRID = {"cpu_core": "performance core", "cpu_atom": "efficiency core", "cpu_lowpower": "low-power core"}
"""Intel's kinds, by the performance monitoring unit that lists their processors."""
SAME_CAPACITY = 0.9
"""Cores of one name are one type when the weakest has this much of the strongest's capacity."""
SHOWN = 3
LEAST = 0.05
"""Competing processes that are told: the heaviest few that use this much of a processor or more."""


class OtherWork(msgspec.Struct, frozen=True, kw_only=True):
    """Another process that used processor time during the look.

    Attributes:
        name: of its program; never its arguments.
        pid: its number.
        processors: how many processors' time it used; 1.0 is one whole processor.
    """

    name: str
    pid: int
    processors: float


def processor(tree: Tree) -> str:
    """The board's name, or the processor's."""
    cpuinfo = tree.fields("proc/cpuinfo")
    for found in (tree.text("proc/device-tree/model"), *(cpuinfo.get(key) for key in MODELS)):
        if found:
            return found
    raise UnreadableError("neither /proc/device-tree/model nor /proc/cpuinfo names one")


def cores(tree: Tree) -> int:
    """Processors that are online."""
    online = tree.text(f"{CPU}/online")
    if online:
        return len(numbers_of(online))
    count = os.cpu_count() if tree.live else None
    if count is None:
        raise UnreadableError("the system does not list its processors")
    return count


def affinity(tree: Tree) -> tuple[int, ...]:
    """Processors that this process may run on."""
    if not tree.live:
        allowed = tree.fields("proc/self/status").get("Cpus_allowed_list")
        if allowed is None:
            raise UnreadableError("a recorded machine without /proc/self/status")
        return numbers_of(allowed)
    if not hasattr(os, "sched_getaffinity"):
        raise UnreadableError(f"{platform.system()} has no processor affinity")
    return tuple(sorted(os.sched_getaffinity(0)))


def core_types(tree: Tree) -> dict[str, str]:
    """Type of core by processor: Intel's hybrid lists, ARM's part numbers, else the model name or the capacity."""
    lists = tree.found("sys/devices/cpu_*/cpus")
    if lists:
        kinds = {
            number: HYBRID.get(file.parent.name, file.parent.name)
            for file in lists
            for number in numbers_of(tree.text(file) or "")
        }
    else:
        kinds = _by_capacity(_named_cores(tree), _capacities(tree))
    if not kinds:
        raise UnreadableError("neither /proc/cpuinfo nor cpu_capacity tells the types of cores")
    return {f"cpu{number}": kinds[number] for number in sorted(kinds)}


def _named_cores(tree: Tree) -> dict[int, str]:
    found = {}
    for block in re.split(r"\n\s*\n", tree.text("proc/cpuinfo") or ""):
        fields = fields_of(block)
        if not fields.get("processor", "").isdigit():
            continue
        name = fields.get("model name")
        if "CPU part" in fields:
            maker, part = int(fields.get("CPU implementer", "0"), 16), int(fields["CPU part"], 16)
            known = ARM_CORES.get(part) if maker == ARM else OTHER_CORES.get((maker, part))
            name = known or f"implementer 0x{maker:02x} part 0x{part:03x}"
        if name:
            found[int(fields["processor"])] = name
    return found


def _capacities(tree: Tree) -> dict[int, int]:
    files = tree.found(f"{CPU}/cpu[0-9]*/cpu_capacity")
    return {int(file.parent.name.removeprefix("cpu")): int(file.read_text()) for file in files}


def _by_capacity(names: dict[int, str], capacities: dict[int, int]) -> dict[int, str]:
    """Names, told apart by capacity where cores of one name are not equally strong."""
    if not names:
        return {number: f"capacity {capacity}" for number, capacity in capacities.items()}
    found = dict(names)
    for name in set(names.values()):
        own = {number: capacities[number] for number in names if names[number] == name and number in capacities}
        if own and min(own.values()) < SAME_CAPACITY * max(own.values()):
            found |= {number: f"{name} of capacity {capacity}" for number, capacity in own.items()}
    return found


def per_processor(tree: Tree, name: str) -> dict[str, str]:
    """A cpufreq file of every processor."""
    files = tree.found(f"{CPU}/cpu[0-9]*/cpufreq/{name}")
    if not files:
        raise UnreadableError("no cpufreq in /sys/devices/system/cpu (usual in virtual machines)")
    return {file.parent.parent.name: file.read_text().strip() for file in files}


def frequencies_hz(tree: Tree) -> dict[str, float]:
    """Current frequency by processor."""
    try:
        return {name: float(khz) * 1e3 for name, khz in per_processor(tree, "scaling_cur_freq").items()}
    except UnreadableError as error:
        if tree.live:
            import psutil

            found = psutil.cpu_freq(percpu=True) or []
            if found and all(each.current for each in found):
                return {f"cpu{index}": each.current * 1e6 for index, each in enumerate(found)}
        raise error


def frequency_limits_hz(tree: Tree) -> tuple[float, float]:
    """Lowest and highest allowed frequency."""
    low = per_processor(tree, "scaling_min_freq").values()
    high = per_processor(tree, "scaling_max_freq").values()
    return min(map(float, low)) * 1e3, max(map(float, high)) * 1e3


def boost(tree: Tree) -> bool:
    """Whether the processor may run above its nominal frequency while it is cool."""
    no_turbo = tree.text(f"{CPU}/intel_pstate/no_turbo")
    if no_turbo is not None:
        return int(no_turbo) == 0
    switches = tree.found(f"{CPU}/cpufreq/boost", f"{CPU}/cpufreq/policy[0-9]*/boost")
    if not switches:
        raise UnreadableError("no turbo or boost switch in /sys/devices/system/cpu")
    return any(int(file.read_text()) != 0 for file in switches)


def isolated(tree: Tree) -> tuple[int, ...]:
    """Processors that the scheduler leaves alone (``isolcpus``)."""
    return numbers_of((tree.root / CPU / "isolated").read_text().strip())


def memory_bytes(tree: Tree) -> int:
    """Physical memory."""
    return _meminfo_bytes(tree, "MemTotal")


def swap_used_bytes(tree: Tree) -> int:
    """Swap space that holds something."""
    return _meminfo_bytes(tree, "SwapTotal") - _meminfo_bytes(tree, "SwapFree")


def _meminfo_bytes(tree: Tree, name: str) -> int:
    value = tree.fields("proc/meminfo").get(name)
    if value is None:
        raise UnreadableError(f"/proc/meminfo has no {name}")
    return int(value.split()[0]) * 1024


def load(tree: Tree) -> float:
    """One-minute load average."""
    return float((tree.root / "proc/loadavg").read_text().split()[0])


def other_work(tree: Tree, *, over_s: float) -> tuple[float, tuple[OtherWork, ...]]:
    """Share of all processors' time that everything but this process used, and the heaviest of it."""
    if not tree.live:
        raise UnreadableError("a recorded machine does no work")
    if over_s <= 0:
        raise UnreadableError("nobody waited to see")
    import psutil

    own = psutil.Process()

    def others_s() -> float:
        times = psutil.cpu_times()._asdict()
        # Guest time is part of user time already; steal is work of other guests on this processor.
        used = sum(times.get(kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
        mine = own.cpu_times()
        return float(used - mine.user - mine.system)

    # Going through the processes takes a while, and each is met as late in the second round as in the first.
    first, begun = time.perf_counter(), _used_s(but=own.pid)
    start, start_s = time.perf_counter(), others_s()
    time.sleep(over_s)
    used_s, elapsed_s = others_s() - start_s, time.perf_counter() - start
    second, ended = time.perf_counter(), _used_s(but=own.pid)
    found = [
        OtherWork(name=name, pid=pid, processors=round((now_s - begun[pid, name]) / (second - first), 2))
        for (pid, name), now_s in ended.items()
        if (pid, name) in begun
    ]
    heaviest = sorted((each for each in found if each.processors >= LEAST), key=lambda each: -each.processors)
    return min(1.0, max(0.0, used_s / (elapsed_s * (psutil.cpu_count() or 1)))), tuple(heaviest[:SHOWN])


def _used_s(*, but: int) -> dict[tuple[int, str], float]:
    """Processor time of every other process that can be seen, by pid and name."""
    import psutil

    found = {}
    for each in psutil.process_iter(["name", "cpu_times"]):
        times: Any = each.info["cpu_times"]
        if each.pid != but and times is not None:
            found[each.pid, each.info["name"] or "?"] = times.user + times.system
    return found


def container(tree: Tree) -> str | None:
    """Container and virtual machine, as far as they leave signs; ``None`` without any."""
    signs = []
    groups = tree.text("proc/1/cgroup") or ""
    if (tree.root / ".dockerenv").exists() or "docker" in groups:
        signs.append("docker")
    if (tree.root / "run/.containerenv").exists():
        signs.append("podman")
    if "kubepods" in groups:
        signs.append("kubernetes")
    told = tree.text("run/systemd/container")
    if told and told not in signs:
        signs.append(told)
    if re.search(r"^flags\s*:.*\bhypervisor\b", tree.text("proc/cpuinfo") or "", re.MULTILINE):
        maker = tree.text("sys/class/dmi/id/sys_vendor")
        signs.append(f"virtual machine ({maker})" if maker else "virtual machine")
    return ", ".join(signs) or None


def masked(tree: Tree) -> tuple[str, ...]:
    """Folders of /sys over which a container has laid an empty one: a read-only tmpfs, as Docker and Podman do."""
    lines = (tree.root / "proc/self/mountinfo").read_text().splitlines()
    return tuple(sorted(set(_covered(lines))))


def _covered(lines: list[str]) -> Iterator[str]:
    for line in lines:
        mount, _, source = line.partition(" - ")
        place, options = mount.split()[4:6]
        # The kernel's own folder of control groups is a tmpfs as well, on older systems.
        inside = place.startswith("/sys/") and not place.startswith("/sys/fs/")
        if inside and source.startswith("tmpfs ") and "ro" in options.split(","):
            yield place
