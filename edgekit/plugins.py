"""Targets, runtimes and meters by name. Built-in ones register through the same entry points as a plugin."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from edgekit.errors import PluginError

__all__ = ["Kind", "create", "load", "names"]

Kind = Literal["targets", "runtimes", "meters"]


def _found(kind: Kind) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"edgekit.{kind}")}


def names(kind: Kind) -> tuple[str, ...]:
    """Every registered name, sorted."""
    return tuple(sorted(_found(kind)))


def load(kind: Kind, name: str) -> Any:
    """What makes a plugin of a kind, by name.

    Raises:
        PluginError: no such name, or its module is broken.
    """
    point = _found(kind).get(name)
    if point is None:
        raise PluginError(f"no {kind[:-1]} is called '{name}' (known: {', '.join(names(kind)) or 'none'})")
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise PluginError(f"{kind[:-1]} '{name}' ({point.value}) cannot be loaded: {error}") from error


def create(kind: Kind, name: str, **options: Any) -> Any:
    """Make a plugin of a kind by name.

    Raises:
        PluginError: no such name, its module is broken, or it does not take these options.
        MissingExtraError: the library behind it is not installed.
    """
    made = load(kind, name)
    try:
        return made(**options)
    except TypeError as error:
        raise PluginError(f"{kind[:-1]} '{name}' does not take these options ({error})") from error
