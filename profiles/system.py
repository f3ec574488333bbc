"""The process and the machine around a measurement: memory, garbage collector, and what makes figures doubtful."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekit.environment import Environment
from edgekit.limits import temperatures_c
from edgekit.measured import Check
from edgekit.tree import Tree, list_of

__all__ = [
    "collector_off",
    "hottest_c",
    "machine_checks",
    "machine_warnings",
    "peak_rss_bytes",
    "steady_rss_bytes",
]

BUSY = 0.10
"""Share of the processors that other work may use."""
WHOLE = 0.8
"""Processors' time that other work may use, however many there are: one that is lost whole shows as a bit less."""
DRIFT = 0.05
"""How much a clock may change between before and after."""
JUMP_S = 1.0
"""How far the wall clock may move against the monotonic one."""
NEAR_C = 5.0
"""Distance to a passive trip point from which on a zone is told."""
STILL = frozenset({"performance", "userspace"})
"""Governors that do not follow the load."""
SLOWING = re.compile(r"cpufreq|devfreq|processor|throttle", re.IGNORECASE)
"""Cooling devices that cool by slowing something down; at work in either look, they hold the machine back."""
HARMLESS = re.compile(r"fan|lcd|backlight", re.IGNORECASE)
"""Cooling devices that slow nothing down."""
FIX_CLOCK = "fix the clocks: edgekit doctor --fix"


def peak_rss_bytes(*, root: Path = Path("/")) -> int | None:
    """Highest resident memory of this process since it started, all that it did before included.

    From ``VmHWM`` of ``/proc/self/status``, else ``getrusage``; ``None`` where neither is known.
    """
    found = _status_bytes("VmHWM", root=root)
    if found is not None:
        return found
    if root != Path("/"):
        return None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def steady_rss_bytes(*, root: Path = Path("/")) -> int | None:
    """Resident memory of this process now: ``VmRSS`` of ``/proc/self/status``; ``None`` where it is not told."""
    return _status_bytes("VmRSS", root=root)


def _status_bytes(field: str, *, root: Path) -> int | None:
    try:
        status = (root / "proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def hottest_c(*, root: Path = Path("/")) -> float | None:
    """Temperature of the hottest zone or sensor; ``None`` where there is none."""
    tree = Tree(root)
    found = tree.at("temperatures_c", lambda: temperatures_c(tree))
    return max(found.values()) if found else None


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


def machine_checks(before: Environment, after: Environment, *, meter_scope: str | None = None) -> tuple[Check, ...]:
    """The protocol's rules about the machine: each that is broken makes the figures those of another machine.

    Args:
        before: the look before the measurement.
        after: the look after it.
        meter_scope: of :class:`edgekit.measured.MeterFacts`; ``"battery"`` turns the rule about mains around.
    """
    return (
        _quiet_machine(before, after),
        _steady_clock(before, after),
        _no_throttling(before, after),
        _mains_power(before, after, battery_is_meter=meter_scope == "battery"),
        _clock_jump(before, after),
        _same_machine(before, after),
    )


def _check(rule: str, passed: bool | None, says: str, advice: str) -> Check:
    return Check(rule=rule, passed=passed, says=says, advice="" if passed else advice)


def _unknown(rule: str, what: str, field: str, look: Environment) -> Check:
    """A rule that could not be looked at, and why."""
    return Check(rule=rule, passed=None, says=f"{what} is not known: {look.unavailable.get(field, 'not told')}")


def _quiet_machine(before: Environment, after: Environment) -> Check:
    """Other work uses 10 % of the processors at most, and not a whole one."""
    rule = "quiet-machine"
    looks = [(look, look.busy, when) for look, when in ((before, "before"), (after, "after")) if look.busy is not None]
    if not looks:
        return _unknown(rule, "how busy the machine was", "busy", before)
    look, busy, when = max(looks, key=lambda each: each[1])
    used, limit = busy * (look.cores or 1), min(BUSY * (look.cores or 1), WHOLE)
    says = f"other work used {busy:.0%} of the processors just {when} the measurement"
    if look.cores:
        says += f" ({used:.1f} of {look.cores}; at most {limit:.1f})"
    culprits = ", ".join(
        f"{each.name} (pid {each.pid}, {each.processors:.1f} processors)" for each in look.competitors or ()
    )
    return _check(
        rule,
        used <= limit,
        f"{says}: {culprits}" if culprits and used > limit else says,
        f"stop {'it' if culprits else 'what else runs, here or beside this container or virtual machine'}, "
        "and measure again",
    )


def _steady_clock(before: Environment, after: Environment) -> Check:
    """No clock moved by more than 5 %, where the clock does not follow the load anyway."""
    rule = "steady-clock"
    if _follows_load(before):
        says = "the clock follows the load, so two looks at rest say nothing of the time between them"
        return Check(rule=rule, passed=None, says=says, advice=FIX_CLOCK)
    speeds, later = _speeds_hz(before), _speeds_hz(after)
    changes = {name: abs(later[name] / speeds[name] - 1) for name in speeds if name in later and speeds[name] > 0}
    if not changes:
        return _unknown(rule, "how fast the processors were", "frequencies_hz", before)
    worst = max(changes, key=lambda name: changes[name])
    return _check(
        rule,
        changes[worst] <= DRIFT,
        f"the clock of {worst} changed by {changes[worst]:.0%} between before and after (at most {DRIFT:.0%})",
        f"{FIX_CLOCK}; cool the device, and measure again",
    )


def _follows_load(look: Environment) -> bool:
    return not look.clocks_fixed and any(name not in STILL for name in (look.governors or {}).values())


def _speeds_hz(look: Environment) -> dict[str, float]:
    """Clock by processor; on x86, where one at rest tells an old figure, the highest of each type of core."""
    speeds = look.frequencies_hz or {}
    if not re.fullmatch(r"x86_64|amd64|i[3-6]86", look.machine, re.IGNORECASE):
        return speeds
    found: dict[str, float] = {}
    for name, speed in speeds.items():
        kind = f"the fastest {(look.core_types or {}).get(name, 'processor')}"
        found[kind] = max(speed, found.get(kind, 0.0))
    return found


def _no_throttling(before: Environment, after: Environment) -> Check:
    """Nothing held the machine back: by heat, by current, or by voltage."""
    rule = "no-throttling"
    sources = ("throttle_counts", "throttled", "cooling", "passive_trips_c", "alarms")
    known = [name for name in sources if getattr(before, name) is not None and getattr(after, name) is not None]
    if not known:
        return Check(rule=rule, passed=None, says="the system tells neither throttling, nor cooling, nor trip points")
    found = list(dict.fromkeys(_throttling(before, after)))
    return _check(
        rule,
        not found,
        "; ".join(found) or f"no sign of throttling ({', '.join(name.removesuffix('_c') for name in known)})",
        "cool the device, give it a supply that holds its voltage, and measure again",
    )


def _throttling(before: Environment, after: Environment) -> Iterator[str]:
    """Every sign of it, in words."""
    earlier = before.throttle_counts or {}
    for name, count in (after.throttle_counts or {}).items():
        if name in earlier and count > earlier[name]:
            yield f"{name} went from {earlier[name]} to {count}"
    for word in (*before.throttled_now, *after.throttled_now):
        yield f"{word} now (get_throttled)"
    if before.throttled is not None:
        for word in after.throttled_since_boot:
            if word not in before.throttled_since_boot:
                yield f"{word} during the measurement (get_throttled)"
    cooling = before.cooling or {}
    for look in (before, after):
        for name, state in (look.cooling or {}).items():
            slows = state > 0 if SLOWING.search(name) else state > max(0, cooling.get(name, state))
            if slows and not HARMLESS.search(name):
                yield f"the cooling device {name} is at work"
        for name, above in _above_trip(look):
            if above >= 0:
                yield f"{name} is at its passive trip point"
        for name in look.alarms or ():
            yield f"the alarm {name} is raised"


def _above_trip(look: Environment) -> Iterator[tuple[str, float]]:
    """How far each zone is above the temperature at which something is slowed down."""
    temperatures = look.temperatures_c or {}
    for name, trip in (look.passive_trips_c or {}).items():
        if name in temperatures:
            yield name, temperatures[name] - trip


def _mains_power(before: Environment, after: Environment, *, battery_is_meter: bool) -> Check:
    """Mains throughout: on battery, firmware lowers power limits, and lowers them further as it empties.

    Where the battery itself is the meter, it must be the source throughout instead.
    """
    rule, wanted = "mains-power", "battery" if battery_is_meter else "mains"
    if before.power_source is None or after.power_source is None:
        return _unknown(rule, "where the power comes from", "power_source", before)
    sources = [before.power_source, after.power_source]
    return _check(
        rule,
        sources == [wanted, wanted],
        f"the power came from {' first, and then from '.join(dict.fromkeys(sources))}",
        "the meter reads the battery: pull the plug for the whole measurement"
        if battery_is_meter
        else "plug in the power supply for the whole measurement",
    )


def _clock_jump(before: Environment, after: Environment) -> Check:
    """The wall clock went as the monotonic one did; else somebody set it, or the machine slept."""
    rule = "clock-jump"
    if before.clock_offset_s is None or after.clock_offset_s is None:
        return _unknown(rule, "whether the clock jumped", "clock_offset_s", before)
    moved_s = after.clock_offset_s - before.clock_offset_s
    return _check(
        rule,
        abs(moved_s) <= JUMP_S,
        f"the wall clock moved by {moved_s:+.3f} s against the monotonic one (at most {JUMP_S:g} s)",
        "it was set, or the machine slept or was stopped; let it settle, forbid sleep "
        "(systemd-inhibit edgekit profile ...), and measure again",
    )


def _same_machine(before: Environment, after: Environment) -> Check:
    """Both looks are of one machine."""
    facts = {"host": "host", "system": "system", "machine": "architecture", "processor": "processor", "cores": "cores"}
    differ = [
        f"{name} {getattr(before, field)} before, {getattr(after, field)} after"
        for field, name in facts.items()
        if getattr(before, field) != getattr(after, field)
    ]
    return _check(
        "same-machine",
        not differ,
        "; ".join(differ) or f"{before.host} before and after",
        "measure it whole on one machine, with the same processors online",
    )


def machine_warnings(before: Environment, after: Environment) -> Iterator[str]:
    """What about the machine makes the figures less certain without making them wrong, and what to change."""
    slow = sorted(set((before.governors or {}).values()) - STILL)
    if _follows_load(before):
        yield (
            f"the frequency governor is {', '.join(slow)}, so the clock follows the load; "
            f"{'sudo jetson_clocks' if before.power_modes else 'sudo cpupower frequency-set -g performance'}"
        )
    if before.boost:
        yield f"turbo is on, so the clock depends on heat and on how many processors work; {FIX_CLOCK}"
    if len(before.usable_cores) > 1:
        choices = (
            f"taskset -c {list_of(cores)} edgekit profile ... ({kind})" for kind, cores in before.usable_cores.items()
        )
        yield (
            f"the process may run on {len(before.usable_cores)} types of core, and its figures depend on which; "
            f"{' or '.join(choices)}"
        )
    near = {name for look in (before, after) for name, above in _above_trip(look) if -NEAR_C <= above < 0}
    if near:
        yield f"{', '.join(sorted(near))}: less than {NEAR_C:g} °C below throttling; cool the device"
    if before.throttled_since_boot:
        yield (
            f"since it started, the board has had: {', '.join(before.throttled_since_boot)}; "
            "mend its supply or cooling, and restart it"
        )
    if (after.swap_used_bytes or 0) > (before.swap_used_bytes or 0):
        yield "memory went to swap during the measurement; free some, or sudo swapoff -a"
