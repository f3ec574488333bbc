"""``edgekit doctor``: what this machine has, what is missing, and the line that gets it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from inspect import Parameter, signature
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgekit import plugins
from edgekit.cli import options, output
from edgekit.cli.fixes import fixes, script
from edgekit.environment import Environment
from edgekit.errors import EdgekitError
from edgekit.interfaces import Meter
from edgekit.measured import Check
from edgekit.report.formats import duration, energy, percent, size
from edgekit.tree import list_of

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit doctor --fix"

OnlyFixes = Annotated[
    bool, typer.Option("--fix", help="Print commands that would make this machine measurable, as a script; run none.")
]


def command(fix: OnlyFixes = False, json: options.Json = False) -> None:
    """Show runtimes, targets, meters, clocks and extras of this machine; what is missing, and how to get it."""
    machine = Environment.take()
    runtimes = _plugins("runtimes", _runtime)
    meters = _plugins("meters", _meter)
    needed = fixes(machine, meters=meters, runtimes=runtimes, as_root=_is_root())
    if fix:
        output.show(
            {"fixes": msgspec.to_builtins(needed)},
            as_json=json,
            draw=lambda console: typer.echo(script(needed), nl=False),
        )
        return
    found: dict[str, Any] = {
        "edgekit": metadata.version("edgekit"),
        "environment": msgspec.to_builtins(machine),
        "checks": msgspec.to_builtins(_checks(machine)),
        "runtimes": runtimes,
        "targets": _plugins("targets", lambda target: {"says": _text(target.versions())}),
        "meters": meters,
        "extras": _extras(),
        "fixes": msgspec.to_builtins(needed),
    }
    output.show(found, as_json=json, draw=lambda console: _draw(found, machine, console))


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _checks(machine: Environment) -> tuple[Check, ...]:
    """The protocol's rules that one look can tell."""
    from edgekit.profiles.system import machine_checks

    alone = ("quiet-machine", "no-throttling", "mains-power")
    return tuple(check for check in machine_checks(machine, machine) if check.rule in alone)


def _plugins(kind: plugins.Kind, describe: Callable[[Any], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every plugin of a kind: whether it works here, and what it says or why not."""
    return {name: _try(kind, name, describe) for name in plugins.names(kind)}


def _try(kind: plugins.Kind, name: str, describe: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    try:
        parts = _required(plugins.load(kind, name))
        if parts:
            return {"works": True, "needs": parts, "says": f"made in Python, from its {' and '.join(parts)}"}
        made = plugins.create(kind, name)
        reason = made.unavailable() if kind == "meters" else None
        return {"works": False, "says": reason} if reason is not None else {"works": True, **describe(made)}
    except EdgekitError as error:
        return {"works": False, "says": str(error)}
    except Exception as error:  # whatever a plugin raises is listed; the doctor goes on
        return {"works": False, "says": f"broken plugin: {type(error).__name__}: {error}"}


def _runtime(runtime: Any) -> dict[str, Any]:
    try:
        facts = runtime.describe()
    finally:
        runtime.close()
    return {"says": _text(facts)}


def _meter(meter: Meter) -> dict[str, Any]:
    facts = meter.facts()
    # A resolution is in joules or watts, and both have the same prefixes.
    step = "not told" if facts.resolution is None else f"{energy(facts.resolution).removesuffix('J')}{facts.unit}"
    every = "not told" if facts.update_interval_s is None else duration(facts.update_interval_s)
    parts = f" ({', '.join(facts.parts)})" if facts.parts else ""
    return {
        "says": f"{facts.quantity} of {facts.scope}: {facts.covers}{parts}; step {step}, new every {every}",
        "facts": msgspec.to_builtins(facts),
    }


def _required(maker: Callable[..., Any]) -> list[str]:
    """Arguments that have no default."""
    kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    parameters = signature(maker).parameters.values()
    return [each.name for each in parameters if each.default is Parameter.empty and each.kind not in kinds]


def _extras() -> dict[str, dict[str, Any]]:
    """Every extra of edgekit: what it lacks here, and the line that gets it."""
    needed: dict[str, list[str]] = {}
    for line in metadata.requires("edgekit") or []:
        marker = re.search(r"""extra\s*==\s*["']([^"']+)["']""", line)
        package = re.match(r"[A-Za-z0-9._-]+", line)
        if marker is not None and package is not None and package[0] != "edgekit":
            needed.setdefault(marker[1], []).append(package[0])
    missing = {extra: [each for each in packages if not _installed(each)] for extra, packages in needed.items()}
    return {
        extra: {
            "works": not lacking,
            "missing": lacking,
            "install": f"pip install 'edgekit[{extra}]'" if lacking else None,
        }
        for extra, lacking in sorted(missing.items())
    }


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _draw(found: dict[str, Any], machine: Environment, console: Console) -> None:
    console.print(Text(f"edgekit {found['edgekit']} on {machine.processor or machine.machine}", style="bold"))
    console.print(_machine(machine))
    table = Table(title="Runtimes, targets, meters", title_justify="left")
    for heading in ("kind", "name", "here", "says"):
        table.add_column(heading, overflow="fold")
    for kind in ("runtimes", "targets", "meters"):
        for name, each in found[kind].items():
            table.add_row(kind[:-1], name, _mark(each["works"]), Text(each["says"]))
        table.add_section()
    console.print(table)
    for extra, each in found["extras"].items():
        lacks = f"  lacks {', '.join(each['missing'])}: {each['install']}" if each["missing"] else ""
        console.print(Text.assemble("extra ", (extra, "bold"), " ", _mark(each["works"]), lacks), soft_wrap=True)
    if found["fixes"]:
        console.print(
            Text(f"edgekit doctor --fix  prints what would mend this: {len(found['fixes'])} lines", style="yellow")
        )


def _machine(machine: Environment) -> Table:
    table = Table(show_header=False, box=None)
    rows = {
        "cores": _cores(machine),
        "memory_bytes": size(machine.memory_bytes) if machine.memory_bytes is not None else None,
        "governors": _counts(machine.governors),
        "frequencies_hz": _frequencies(machine),
        "temperatures_c": _counts({zone: f"{value:.0f} °C" for zone, value in (machine.temperatures_c or {}).items()}),
        "load": machine.load,
        "busy": _other_work(machine),
    }
    for name, value in rows.items():
        shown = str(value) if value is not None else f"not known: {machine.unavailable.get(name, 'not told')}"
        table.add_row(TITLES.get(name, name), Text(shown))
    for name, value in _told(machine).items():
        if value:
            table.add_row(name, Text(value))
    table.add_row("system", Text(f"{machine.system}, {machine.machine}{_container(machine)}"))
    return table


TITLES = {
    "memory_bytes": "memory",
    "frequencies_hz": "frequencies",
    "temperatures_c": "temperatures",
    "busy": "other work",
}


def _told(machine: Environment) -> dict[str, str | None]:
    """What only some machines have; rows without a value are left out."""
    throttling = next(check for check in _checks(machine) if check.rule == "no-throttling")
    clocks = {None: None, True: "fixed", False: "follow the load, or may"}[machine.clocks_fixed]
    modes = ", ".join(machine.power_modes.values())
    return {
        "clocks": clocks,
        "turbo": {None: None, True: "on", False: "off"}[machine.boost],
        "throttling": None if throttling.passed is None else throttling.says,
        "since start": ", ".join(machine.throttled_since_boot),
        "power mode": f"{machine.power_mode} (of {modes})" if machine.power_mode and modes else machine.power_mode,
        "power from": machine.power_source,
        "swap": f"{size(machine.swap_used_bytes)} in use" if machine.swap_used_bytes else None,
        "isolated": list_of(machine.isolated or ()),
        "hidden": ", ".join(machine.masked or ()),
    }


def _cores(machine: Environment) -> str | None:
    """How many, of which types, and which of them this process may use."""
    if machine.cores is None:
        return None
    types = Counter((machine.core_types or {}).values())
    usable = machine.usable_cores
    shown = [
        f"{count} × {name}" + (f" ({list_of(usable[name])})" if name in usable and len(types) > 1 else "")
        for name, count in types.items()
    ]
    allowed = len(machine.affinity or ()) or machine.cores
    limit = f"; this process may use {list_of(machine.affinity or ())}" if allowed < machine.cores else ""
    return f"{machine.cores}{': ' if shown else ''}{', '.join(shown)}{limit}"


def _other_work(machine: Environment) -> str | None:
    if machine.busy is None:
        return None
    who = ", ".join(f"{each.name} {each.processors:.1f}" for each in machine.competitors or ())
    return f"{percent(machine.busy)} of the processors{f': {who}' if who else ''}"


def _container(machine: Environment) -> str:
    return f", in {machine.container}" if machine.container else ""


def _counts(values: dict[str, str] | None) -> str | None:
    return ", ".join(sorted(set(values.values()))) if values else None


def _frequencies(machine: Environment) -> str | None:
    if not machine.frequencies_hz:
        return None
    values = machine.frequencies_hz.values()
    return f"{min(values) / 1e9:.2f} to {max(values) / 1e9:.2f} GHz now"


def _mark(works: bool) -> Text:
    return Text("yes", style="green") if works else Text("no", style="yellow")


def _text(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, "", {}, []))
