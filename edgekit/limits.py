"""Reading what holds a machine back: heat, current, its power mode, and where its power comes from."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from edgekit.machine import per_processor
from edgekit.tree import Tree, UnreadableError

__all__ = ["THROTTLED", "temperatures_c"]

THROTTLED = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
"""Bits 0 to 3 of a Raspberry Pi's ``vcgencmd get_throttled``: now; the same from bit 16 on: at some time since boot."""
COUNTERS = (
    "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count",
    "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/package_throttle_count",
    "sys/class/hwmon/hwmon*/oc[0-9]*_event_cnt",
)
"""Events of throttling: Intel's by heat, for each processor; Jetson's by over-current."""
ALARMS = ("curr[0-9]*_crit_alarm", "curr[0-9]*_max_alarm", "in[0-9]*_lcrit_alarm")
"""Of hwmon: too much current (INA3221 on Jetson); too little voltage (Raspberry Pi)."""
GPU = re.compile(r"gpu|mali|g[a-z]\d+b$", re.IGNORECASE)
"""Names of GPUs among the devfreq devices; Jetson's are chips, as 17000000.ga10b."""


def _sensors(tree: Tree) -> dict[str, Path]:
    """Files of temperature by name: thermal zones, then hwmon; what is there twice has its place in its name."""
    found = [
        (tree.text(zone / "type") or zone.name, zone / "temp") for zone in tree.found("sys/class/thermal/thermal_zone*")
    ]
    for file in tree.found("sys/class/hwmon/hwmon*/temp*_input"):
        chip = tree.text(file.parent / "name") or file.parent.name
        label = tree.text(file.with_name(file.name.replace("_input", "_label"))) or file.stem.split("_")[0]
        found.append((f"{chip} {label}", file))
    names = [name for name, _ in found]
    return {name if names.count(name) == 1 else f"{name} ({file.parent.name})": file for name, file in found}


def temperatures_c(tree: Tree) -> dict[str, float]:
    """Thermal zones and hwmon sensors; a sensor that refuses has its own reason."""
    sensors = _sensors(tree)
    if not sensors:
        raise UnreadableError("no thermal zone and no hwmon temperature in /sys (usual in virtual machines)")
    values = {name: tree.at(f"temperatures_c.{name}", partial(_celsius, file)) for name, file in sensors.items()}
    found = {name: value for name, value in values.items() if value is not None}
    if not found:
        raise UnreadableError("every temperature sensor refused to be read")
    return found


def _celsius(file: Path) -> float:
    """Both kinds of sensors and trip points are in thousandths of a degree."""
    return int(file.read_text()) / 1e3


def passive_trips_c(tree: Tree) -> dict[str, float]:
    """Temperature by zone from which on the kernel slows something down; zones that have one."""
    found = {}
    for name, file in _sensors(tree).items():
        kinds = [
            each for each in tree.found(_below(tree, file.parent, "trip_point_*_type")) if tree.text(each) == "passive"
        ]
        trips = [_celsius(each.with_name(each.name.replace("_type", "_temp"))) for each in kinds]
        # x86_pkg_temp has trip points that stand at 0 until somebody sets them.
        if any(trip > 0 for trip in trips):
            found[name] = min(trip for trip in trips if trip > 0)
    if not found:
        raise UnreadableError("no thermal zone has a passive trip point")
    return found


def _below(tree: Tree, folder: Path, pattern: str) -> str:
    return f"{folder.relative_to(tree.root).as_posix()}/{pattern}"


def cooling(tree: Tree) -> dict[str, int]:
    """State of every cooling device, fans too; 0 is idle."""
    devices = tree.found("sys/class/thermal/cooling_device*")
    if not devices:
        raise UnreadableError("no cooling device in /sys/class/thermal")
    names = [tree.text(device / "type") or device.name for device in devices]
    found = {}
    for name, device in zip(names, devices, strict=True):
        unique = name if names.count(name) == 1 else f"{name} ({device.name})"
        state = tree.at(f"cooling.{unique}", partial(_whole, device / "cur_state"))
        if state is not None:
            found[unique] = state
    return found


def _whole(file: Path) -> int:
    return int(file.read_text())


def throttle_counts(tree: Tree) -> dict[str, int]:
    """Events of throttling since boot, by counter, summed over the processors; only a change says something."""
    files = tree.found(*COUNTERS)
    if not files:
        raise UnreadableError("no counter of throttling (x86: thermal_throttle; Jetson: oc*_event_cnt)")
    found: dict[str, int] = {}
    for file in files:
        found[file.name] = found.get(file.name, 0) + _whole(file)
    return found


def throttled(tree: Tree) -> int:
    """A Raspberry Pi's bits, see :data:`THROTTLED`: from the firmware's file, else from ``vcgencmd``."""
    files = tree.found(
        "sys/devices/platform/*:firmware/get_throttled", "sys/devices/platform/*/*:firmware/get_throttled"
    )
    if files:
        return int(files[0].read_text(), 16)
    if "Raspberry Pi" not in (tree.text("proc/device-tree/model") or ""):
        raise UnreadableError("not a Raspberry Pi")
    told = tree.command("vcgencmd", "get_throttled")
    found = re.search(r"throttled=(0x[0-9a-fA-F]+)", told)
    if found is None:
        raise UnreadableError(f"vcgencmd get_throttled said '{told.strip()}'; is this user in the group video?")
    return int(found[1], 16)


def alarms(tree: Tree) -> tuple[str, ...]:
    """Raised alarms of current and voltage sensors, as ``"ina3221 VDD_IN curr1_crit_alarm"``."""
    files = tree.found(*(f"sys/class/hwmon/hwmon*/{pattern}" for pattern in ALARMS))
    if not files:
        raise UnreadableError("no current or voltage sensor with an alarm in /sys/class/hwmon")
    return tuple(_alarm(tree, file) for file in files if (tree.text(file) or "0") != "0")


def _alarm(tree: Tree, file: Path) -> str:
    channel = "".join(re.findall(r"\d+", file.name)[:1])
    labels = (tree.text(file.with_name(f"{kind}{channel}_label")) for kind in ("in", "curr"))
    return " ".join(filter(None, (tree.text(file.parent / "name"), next(filter(None, labels), None), file.name)))


def power_modes(tree: Tree) -> dict[str, str]:
    """Names of a Jetson's power modes by number, from its nvpmodel.conf; empty on other machines."""
    conf = tree.text("etc/nvpmodel.conf") or ""
    return dict(re.findall(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", conf, re.MULTILINE))


def power_mode(tree: Tree) -> str:
    """Name of a Jetson's power mode, from what nvpmodel wrote when it was set, else from ``nvpmodel -q``."""
    modes = power_modes(tree)
    status = re.search(r"pmode:(\d+)", tree.text("var/lib/nvpmodel/status") or "")
    if status is not None:
        number = str(int(status[1]))
        return modes.get(number, f"mode {number}")
    if not modes:
        raise UnreadableError("not a Jetson: no /etc/nvpmodel.conf")
    told = tree.command("nvpmodel", "-q")
    found = re.search(r"NV Power Mode:\s*(\S+)", told)
    if found is None:
        raise UnreadableError(f"nvpmodel -q said '{' '.join(told.split())}'")
    return found[1]


def clocks_fixed(tree: Tree) -> bool:
    """Whether the lowest allowed frequency is the highest, of every processor and GPU: what jetson_clocks does."""
    low, high = per_processor(tree, "scaling_min_freq"), per_processor(tree, "scaling_max_freq")
    gpus = [file.parent for file in tree.found("sys/class/devfreq/*/min_freq") if GPU.search(file.parent.name)]
    return low == high and all(tree.text(gpu / "min_freq") == tree.text(gpu / "max_freq") for gpu in gpus)


def power_source(tree: Tree) -> str:
    """``"battery"`` while one is discharged, else ``"mains"``."""
    supplies = tree.found("sys/class/power_supply/*")
    # Batteries of mice and pens are listed as well; their scope is Device.
    own = [supply for supply in supplies if tree.text(supply / "scope") != "Device"]
    batteries = [supply for supply in own if tree.text(supply / "type") == "Battery"]
    if any(tree.text(battery / "status") == "Discharging" for battery in batteries):
        return "battery"
    if any(tree.text(supply / "online") == "1" for supply in own if supply not in batteries):
        return "mains"
    # A charged battery that is not discharged stands on something, listed or not.
    if any(tree.text(battery / "status") in ("Charging", "Full", "Not charging") for battery in batteries):
        return "mains"
    raise UnreadableError("nothing in /sys/class/power_supply tells (usual on boards and servers)")
