"""``edgekit doctor``: what this machine has, what is missing, and the line that gets it."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from inspect import Parameter, signature
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgekit import plugins
from edgekit.cli import options, output
from edgekit.environment import Environment
from edgekit.errors import EdgekitError
from edgekit.report.formats import size

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit doctor"


def command(json: options.Json = False) -> None:
    """Show runtimes, targets, meters, clocks and extras of this machine; what is missing, and how to get it."""
    machine = Environment.take()
    found: dict[str, Any] = {
        "edgekit": metadata.version("edgekit"),
        "environment": msgspec.to_builtins(machine),
        "runtimes": _plugins("runtimes", lambda runtime: _text(runtime.describe())),
        "targets": _plugins("targets", lambda target: _text(target.versions())),
        "meters": _plugins("meters", lambda meter: f"{meter.quantity}, {meter.scope}"),
        "extras": _extras(),
    }
    output.show(found, as_json=json, draw=lambda console: _draw(found, machine, console))


def _plugins(kind: plugins.Kind, describe: Callable[[Any], str]) -> dict[str, dict[str, Any]]:
    """Every plugin of a kind: whether it works here, and what it says or why not."""
    return {name: _try(kind, name, describe) for name in plugins.names(kind)}


def _try(kind: plugins.Kind, name: str, describe: Callable[[Any], str]) -> dict[str, Any]:
    try:
        parts = _required(plugins.load(kind, name))
        if parts:
            return {"works": True, "says": f"made in Python, from its {' and '.join(parts)}"}
        made = plugins.create(kind, name)
        reason = made.unavailable() if kind == "meters" else None
        found = {"works": reason is None, "says": reason or describe(made)}
        if kind == "runtimes":
            made.close()
    except EdgekitError as error:
        return {"works": False, "says": str(error)}
    except Exception as error:  # whatever a plugin raises is listed; the doctor goes on
        return {"works": False, "says": f"broken plugin: {type(error).__name__}: {error}"}
    return found


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


def _machine(machine: Environment) -> Table:
    table = Table(show_header=False, box=None)
    rows = {
        "cores": machine.cores,
        "memory_bytes": size(machine.memory_bytes) if machine.memory_bytes is not None else None,
        "governors": _counts(machine.governors),
        "frequencies_hz": _frequencies(machine),
        "temperatures_c": _counts({zone: f"{value:.0f} °C" for zone, value in (machine.temperatures_c or {}).items()}),
        "load": machine.load,
    }
    for name, value in rows.items():
        shown = str(value) if value is not None else f"not known: {machine.unavailable.get(name, 'not told')}"
        table.add_row(name.removesuffix("_bytes").removesuffix("_hz").removesuffix("_c"), Text(shown))
    table.add_row("system", Text(f"{machine.system}, {machine.machine}{_container(machine)}"))
    return table


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
