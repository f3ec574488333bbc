"""What would make a machine measurable: commands for a person to read and run. Nothing here runs any of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgekit.environment import Environment
from edgekit.tree import list_of

__all__ = ["Fix", "fixes", "script"]

CPU = "/sys/devices/system/cpu"
GOVERNORS = f"{CPU}/cpu[0-9]*/cpufreq/scaling_governor"
PERMISSION = re.compile(r"sudo (?:chmod [\w+=]+ [\w./*:@-]+|usermod -aG \w+ \$USER)")
"""The command in a meter's reason. Its characters are limited: it becomes a line of a shell script."""
INSTALL = re.compile(r"pip install '[\w\[\]., -]+'")
NEAR_C = 5.0
"""Distance to a trip point from which on heat is told."""
HEAVY = 0.2
"""Processors' time from which on a competing process is told."""
HEADER = """#!/bin/sh
# What would make this machine measurable. None of it has been run: read it, then pipe it to sh.
# Settings last until the next start. Lines behind a # are yours to decide.
"""


class Fix(msgspec.Struct, frozen=True, kw_only=True):
    """One finding.

    Attributes:
        why: what is wrong, and what a person can do where no command can.
        command: that mends it; ``None`` where there is none.
        by_hand: that the command is a choice, or has gaps to fill: in the script it stands behind a ``#``.
    """

    why: str
    command: str | None = None
    by_hand: bool = False


def fixes(
    machine: Environment,
    *,
    meters: Mapping[str, Mapping[str, Any]],
    runtimes: Mapping[str, Mapping[str, Any]],
    root: Path = Path("/"),
    as_root: bool = False,
) -> tuple[Fix, ...]:
    """Everything that stands against measuring on this machine, with its cure.

    Args:
        machine: a look at it.
        meters: what the doctor found: whether each works, and what it says.
        runtimes: likewise.
        root: the folder that stands for ``/``.
        as_root: whether the commands need no ``sudo``.
    """
    found = (
        *_walls(machine),
        *_clocks(machine, root),
        *_permissions(machine, meters),
        *_memory(machine),
        *_power_and_heat(machine),
        *_processors(machine),
        *_libraries(meters, kind="meter"),
        *_libraries(runtimes, kind="runtime"),
    )
    # Several meters may want the same permission.
    once = {fix.command or fix.why: fix for fix in reversed(found)}
    return tuple(_plain(fix, as_root=as_root) for fix in reversed(once.values()))


def script(found: Sequence[Fix]) -> str:
    """A shell script with a comment on every command; ``""`` when nothing is to be done."""
    if not found:
        return ""
    parts = [f"# {fix.why}\n" + _line(fix) for fix in found]
    return "\n".join([HEADER, *parts])


def _line(fix: Fix) -> str:
    if fix.command is None:
        return ""
    return f"{'# ' if fix.by_hand else ''}{fix.command}\n"


def _plain(fix: Fix, *, as_root: bool) -> Fix:
    """Names of processes and sensors are anybody's text: on one line, a comment they stay."""
    why = " ".join("".join(letter if letter.isprintable() else " " for letter in fix.why).split())
    command = fix.command.replace("sudo ", "") if fix.command and as_root else fix.command
    return Fix(why=why, command=command, by_hand=fix.by_hand)


def _walls(machine: Environment) -> Iterator[Fix]:
    if machine.masked:
        yield Fix(
            why=f"the container hides {', '.join(machine.masked)}, so that meters and counters there cannot be read: "
            "measure outside of it, or start it with these folders",
            command="docker run --security-opt systempaths=unconfined ...",
            by_hand=True,
        )


def _clocks(machine: Environment, root: Path) -> Iterator[Fix]:
    modes, mode = machine.power_modes, machine.power_mode
    # Numbers differ from board to board: 0 is the fastest of some, and 15 W on others.
    fastest = {name: number for number, name in modes.items() if name.startswith("MAXN")}
    if fastest and mode is not None and mode not in fastest:
        yield Fix(
            why=f"the power mode is {mode}; measure in the one that will be in use. "
            f"The fastest is {next(iter(fastest))}; a change may restart the board, and sets the clocks loose",
            command=f"sudo nvpmodel -m {next(iter(fastest.values()))}",
            by_hand=True,
        )
    loose = sorted(set((machine.governors or {}).values()) - {"performance", "userspace"})
    if modes and not machine.clocks_fixed:
        yield Fix(why="the clocks follow the load: hold them at the power mode's highest", command="sudo jetson_clocks")
    elif loose and not machine.clocks_fixed:
        yield Fix(
            why=f"the frequency governor is {', '.join(loose)}, so the clocks follow the load",
            command=f"echo performance | sudo tee {GOVERNORS} > /dev/null",
        )
    if machine.boost:
        yield Fix(
            why="turbo is on: such clocks are held only while the processor is cool and few of its cores work",
            command=_turbo_off(root),
        )


def _turbo_off(root: Path) -> str:
    if (root / f"{CPU}/intel_pstate/no_turbo".lstrip("/")).exists():
        return f"echo 1 | sudo tee {CPU}/intel_pstate/no_turbo > /dev/null"
    if (root / f"{CPU}/cpufreq/boost".lstrip("/")).exists():
        return f"echo 0 | sudo tee {CPU}/cpufreq/boost > /dev/null"
    return f"echo 0 | sudo tee {CPU}/cpufreq/policy[0-9]*/boost > /dev/null"


def _permissions(machine: Environment, meters: Mapping[str, Mapping[str, Any]]) -> Iterator[Fix]:
    reason = machine.unavailable.get("throttled", "")
    if "/dev/vcio" in reason or "group video" in reason:
        yield Fix(
            why="vcgencmd may not ask the firmware about throttling; then log in again",
            command="sudo usermod -aG video $USER",
        )
    for name, meter in meters.items():
        command = PERMISSION.search(meter["says"])
        if command is not None and not meter["works"]:
            again = "; then log in again" if "usermod" in command[0] else ""
            yield Fix(why=f"meter {name} may not read its sensor{again}", command=command[0].rstrip(".:"))


def _memory(machine: Environment) -> Iterator[Fix]:
    if machine.swap_used_bytes:
        yield Fix(
            why=f"{machine.swap_used_bytes / 2**20:.0f} MiB lie in swap, and coming back from there takes time "
            "(afterwards: swapon -a)",
            command="sudo swapoff -a",
        )


def _power_and_heat(machine: Environment) -> Iterator[Fix]:
    if machine.power_source == "battery":
        yield Fix(
            why="it runs on battery, which lowers power limits: plug in the mains, unless the battery is the meter"
        )
    yield from _get_throttled(machine)
    if machine.alarms:
        yield Fix(why=f"raised: {', '.join(machine.alarms)}: a stronger supply, or a lower power mode")
    temperatures = machine.temperatures_c or {}
    for zone, trip in (machine.passive_trips_c or {}).items():
        if zone in temperatures and temperatures[zone] > trip - NEAR_C:
            yield Fix(
                why=f"{zone} has {temperatures[zone]:.0f} °C and is slowed down from {trip:.0f} °C: "
                "let it cool, or fit a fan"
            )


def _get_throttled(machine: Environment) -> Iterator[Fix]:
    now = machine.throttled_now
    past = tuple(word for word in machine.throttled_since_boot if word not in now)
    for words, when in ((now, "now"), (past, "since the start")):
        if words:
            low = "use a supply that holds 5 V (a Pi 5 wants 5 A) and a short cable"
            cures = [low] if "under-voltage" in words else ["fit a fan or a heat sink"]
            cures += ["restart, so that the board forgets it"] if when != "now" else []
            yield Fix(
                why=f"get_throttled says {', '.join(words)} {when}: {'; '.join(cures)}; then look again",
                command="vcgencmd get_throttled",
                by_hand=True,
            )


def _processors(machine: Environment) -> Iterator[Fix]:
    for each in machine.competitors or ():
        if each.processors >= HEAVY:
            yield Fix(
                why=f"{each.name} (pid {each.pid}) uses {each.processors:.1f} processors: stop it yourself, "
                "or wait until it is done"
            )
    kinds = machine.usable_cores
    if len(kinds) > 1:
        for kind, numbers in kinds.items():
            yield Fix(
                why=f"figures depend on the type of core; to stay on {kind}",
                command=f"taskset -c {list_of(numbers)} edgekit profile ...",
                by_hand=True,
            )
    if machine.isolated and set(machine.isolated) != set(machine.affinity or ()):
        yield Fix(
            why="processors are kept free of other work (isolcpus), and this process is not on them",
            command=f"taskset -c {list_of(machine.isolated)} edgekit profile ...",
            by_hand=True,
        )


def _libraries(plugins: Mapping[str, Mapping[str, Any]], *, kind: str) -> Iterator[Fix]:
    """Lines that install what a kind lacks, where nothing of the kind works without."""
    if any(each["works"] and not each.get("needs") for each in plugins.values()):
        return
    lines = {found[0]: name for name, each in plugins.items() if (found := INSTALL.search(each["says"]))}
    for line, name in lines.items():
        yield Fix(why=f"no {kind} works here; {kind} {name} lacks its library", command=line, by_hand=True)
