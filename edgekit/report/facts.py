"""What a profile says in words beside its figures: headline, closure, machine, runtime, policy, run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.environment import Environment
from edgekit.measured import Closure, MeterFacts
from edgekit.records import Profile
from edgekit.report.formats import NONE, duration, energy, moment, percent, points, si, size

__all__ = [
    "Card",
    "Fact",
    "cards",
    "closure_text",
    "environment_facts",
    "guarantee_text",
    "policy_facts",
    "run_facts",
    "scripted_text",
    "system_facts",
]


@dataclass(frozen=True)
class Card:
    """One headline: a large figure, what it is, and what it is held against."""

    title: str
    value: str
    detail: str


@dataclass(frozen=True)
class Fact:
    """One line of a list of facts; ``after`` is the same thing after the run, where it was looked at twice."""

    name: str
    value: str
    after: str | None = None

    @property
    def changed(self) -> bool:
        """Whether the run left it other than it was."""
        return self.after is not None and self.after != self.value


def cards(profile: Profile) -> tuple[Card, ...]:
    """The stream held against the last exit: accuracy, speed-up, share leaving early, energy."""
    last, stream = profile.exits[-1], profile.stream
    accuracy = Card("Accuracy of the stream", percent(stream.accuracy), "the data has no labels")
    if stream.accuracy is not None and last.accuracy is not None:
        drop = points(stream.accuracy - last.accuracy)
        accuracy = Card(accuracy.title, accuracy.value, f"{drop} against {percent(last.accuracy)} at the last exit")
    speed_up = last.latency.mean_s / stream.latency.mean_s
    early = sum(index < len(profile.exits) - 1 for index in stream.exits) / max(len(stream.exits), 1)
    return (
        accuracy,
        Card(
            "Speed-up",
            f"{speed_up:.2f}×",
            f"mean {duration(stream.latency.mean_s)} against {duration(last.latency.mean_s)} at the last exit",
        ),
        Card("Leave early", percent(early), _leaving(profile)),
        _energy_card(profile),
    )


def _energy_card(profile: Profile) -> Card:
    title, stream = "Energy per inference", profile.stream.energy
    spent, full = stream.gross_j, profile.exits[-1].energy.gross_j
    if spent is None:
        return Card(title, "unavailable", stream.reason or "the profile does not say why")
    if not full:
        return Card(title, energy(spent), stream.scope)
    saved = f"{100 * (spent / full - 1):+.0f} %".replace("-", "−")
    return Card(title, energy(spent), f"{saved} against {energy(full)} at the last exit")


def _leaving(profile: Profile) -> str:
    if len(profile.exits) == 1:
        return "the network has one exit: nothing can leave early"
    return f"of {len(profile.stream.exits)} samples, before the last of {len(profile.exits)} exits"


def closure_text(closure: Closure) -> str:
    """Whether the parts explain the whole, in one line."""
    show = duration if closure.quantity == "latency" else energy
    ratio = f"{closure.ratio:.3f}" if closure.predicted else "not known"
    return (
        f"measured stream {show(closure.measured)} / Σ share × {closure.quantity} of each exit "
        f"{show(closure.predicted)} = {ratio}"
    )


def scripted_text(profile: Profile) -> str | None:
    """The banner of a profile that is not all real."""
    return None if profile.scripted is None else f"Not a real measurement: {profile.scripted}"


def guarantee_text(policy: Mapping[str, Any]) -> str:
    """What the policy promises about unseen data."""
    provenance = policy.get("provenance")
    if not isinstance(provenance, Mapping):
        return "none: thresholds set by hand"
    return str(provenance.get("guarantee") or "none: empirical, the thresholds fit the calibration set only")


def policy_facts(profile: Profile) -> tuple[Fact, ...]:
    """Thresholds of the stream and where they came from."""
    policy = profile.policy
    found = [
        Fact("policy", str(policy.get("name", NONE))),
        Fact("leaves when", f"{policy.get('score', NONE)} {policy.get('comparator', '>=')} threshold"),
        Fact("thresholds", _listed(policy.get("thresholds"), nothing="never")),
        Fact("temperatures", _listed(policy.get("temperatures"))),
    ]
    provenance = policy.get("provenance")
    if isinstance(provenance, Mapping):
        shown = ("method", "data", "samples", "runtime", "created", "settings", "results")
        found += [Fact(f"calibration {name}", _text(provenance[name])) for name in shown if provenance.get(name)]
    return tuple(found)


def run_facts(profile: Profile) -> tuple[Fact, ...]:
    """Network, data, runtime and protocol of the run."""
    runtime = {name: value for name, value in profile.runtime.items() if name != "versions"}
    found = [
        Fact("network", f"{profile.network} (plan {profile.plan[:12]})"),
        Fact("data", f"{profile.data} ({profile.samples} samples, sha256 {profile.data_sha256[:12]})"),
        Fact("measured", moment(profile.created)),
        *(Fact(f"runtime {name}", _text(value)) for name, value in runtime.items()),
        *(Fact(f"protocol {name.replace('_', ' ')}", _text(value)) for name, value in profile.settings.items()),
        Fact("opening the stages", duration(profile.load_s)),
        Fact("first inference", duration(profile.first_run_s)),
        Fact("peak resident memory", size(profile.peak_rss_bytes)),
        Fact("steady resident memory", size(profile.steady_rss_bytes)),
        *_meter_facts(profile.meter),
    ]
    return tuple(found)


def _meter_facts(meter: MeterFacts | None) -> Iterator[Fact]:
    if meter is None:
        return
    yield Fact("meter", f"{meter.name}: {meter.quantity} of {meter.covers} (scope: {meter.scope}, {meter.method})")
    yield Fact("meter parts", ", ".join(meter.parts) or NONE)
    resolution = NONE if meter.resolution is None else f"{meter.resolution:.3g} {meter.unit}"
    yield Fact("meter resolution", f"{resolution}, new every {duration(meter.update_interval_s)}")


def environment_facts(profile: Profile) -> tuple[Fact, ...]:
    """The machine before and after the run; what could not be read says why."""
    before, after = _environment(profile.before), _environment(profile.after)
    return tuple(Fact(name, before.get(name, NONE), after.get(name, NONE)) for name in dict.fromkeys((*before, *after)))


def system_facts(environment: Environment) -> tuple[Fact, ...]:
    """The machine at one look; what could not be read says why."""
    return tuple(Fact(name, text) for name, text in _environment(environment).items())


def _environment(environment: Environment) -> dict[str, str]:
    frequencies = environment.frequencies_hz
    limits = environment.frequency_limits_hz
    shown = {
        "processor": ("processor", environment.processor),
        "machine": ("machine", f"{environment.machine}, {environment.system}"),
        "host": ("host", environment.host),
        "container": ("container", environment.container),
        "cores": ("cores", environment.cores),
        "affinity": ("affinity", None if environment.affinity is None else _ranges(environment.affinity)),
        "memory": ("memory_bytes", None if environment.memory_bytes is None else size(environment.memory_bytes)),
        "governor": ("governors", None if environment.governors is None else _counted(environment.governors)),
        "frequency": ("frequencies_hz", None if not frequencies else _span(tuple(frequencies.values()), "Hz")),
        "frequency limits": ("frequency_limits_hz", None if limits is None else _span(limits, "Hz")),
        "temperature": ("temperatures_c", _temperatures(environment.temperatures_c)),
        "load (1 min)": ("load", None if environment.load is None else f"{environment.load:.2f}"),
        "other work": ("busy", None if environment.busy is None else percent(environment.busy)),
        "versions": ("versions", ", ".join(f"{name} {text}" for name, text in environment.versions.items()) or None),
    }
    found = {
        name: _without(environment.unavailable, field) if value is None else str(value)
        for name, (field, value) in shown.items()
    }
    known = {name: text for name, text in _limits(environment) if text is not None}
    said = {field for field, _ in shown.values()}
    silent = {name: reason for name, reason in environment.unavailable.items() if name not in said}
    return found | known | ({"could not be read": _text(silent)} if silent else {})


def _limits(environment: Environment) -> Iterator[tuple[str, str | None]]:
    """What holds a machine back or may do so; ``None`` where it does not tell."""

    def told(value: Any, text: Callable[[Any], str] = _text) -> str | None:
        return None if value is None else text(value)

    yield "core types", told(environment.core_types, _counted)
    yield "isolated cores", told(environment.isolated, _ranges)
    yield "boost", told(environment.boost, lambda on: "on" if on else "off")
    yield "clocks fixed", told(environment.clocks_fixed)
    yield "power mode", told(environment.power_mode)
    yield "power source", told(environment.power_source)
    yield (
        "slowed by heat or supply",
        told(environment.throttled, lambda _: ", ".join(environment.throttled_now) or "no"),
    )
    yield "throttling since boot", told(environment.throttle_counts)
    yield "cooling", told(environment.cooling, lambda states: _text({k: v for k, v in states.items() if v}) or "idle")
    yield "alarms", told(environment.alarms, lambda raised: ", ".join(raised) or "none")
    yield "swap in use", told(environment.swap_used_bytes, size)
    yield (
        "heaviest other work",
        told(
            environment.competitors,
            lambda every: ", ".join(f"{one.name} {one.processors:.2f} processors" for one in every) or "none",
        ),
    )
    yield "hidden by the container", told(environment.masked, lambda folders: ", ".join(folders) or "nothing")


def _without(unavailable: Mapping[str, str], field: str) -> str:
    return f"unavailable: {unavailable[field]}" if field in unavailable else NONE


def _span(values: tuple[float, ...], unit: str) -> str:
    low, high = si(min(values)), si(max(values))
    return f"{low}{unit}" if low == high else f"{low}{unit} to {high}{unit}"


def _temperatures(zones: Mapping[str, float] | None) -> str | None:
    if not zones:
        return None
    hottest = max(zones, key=lambda zone: zones[zone])
    return f"{zones[hottest]:.1f} °C ({hottest}{f', the hottest of {len(zones)}' if len(zones) > 1 else ''})"


def _counted(values: Mapping[str, str]) -> str:
    kinds = sorted(set(values.values()))
    return ", ".join(f"{kind} ×{sum(value == kind for value in values.values())}" for kind in kinds)


def _ranges(numbers: tuple[int, ...]) -> str:
    """``(0, 1, 2, 5)`` is ``0–2, 5``."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][-1] + 1 == number:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join("–".join(str(end) for end in run) for run in found) or "none"


def _listed(values: Any, *, nothing: str = NONE) -> str:
    # JSON has no infinity: a threshold that nobody passes is read back as null or "inf".
    texts = [nothing if value is None or math.isinf(float(value)) else f"{value:.4g}" for value in values or ()]
    return ", ".join(texts) or NONE


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items()) or NONE
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value) or NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return NONE if value is None else str(value)
