"""Numbers as people read them. Figures stay in SI units until they reach this file."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from typing import NamedTuple

__all__ = [
    "NONE",
    "Unit",
    "duration",
    "energy",
    "energy_unit",
    "fixed",
    "minus",
    "moment",
    "percent",
    "plus_minus",
    "points",
    "ranged",
    "si",
    "size",
    "time_unit",
]

NONE = "–"
"""Stands where there is no figure."""


class Unit(NamedTuple):
    """A unit for one column or axis: a value in SI units divided by ``scale`` is in ``symbol``."""

    scale: float
    symbol: str


_TIME = (Unit(1.0, "s"), Unit(1e-3, "ms"), Unit(1e-6, "µs"))
_ENERGY = (Unit(1.0, "J"), Unit(1e-3, "mJ"), Unit(1e-6, "µJ"))


def _fitting(values: Iterable[float | None], units: tuple[Unit, ...]) -> Unit:
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return next((unit for unit in units if largest >= unit.scale), units[-1])


def time_unit(seconds: Iterable[float | None]) -> Unit:
    """The unit of time in which the largest of these is at least 1."""
    return _fitting(seconds, _TIME)


def energy_unit(joules: Iterable[float | None]) -> Unit:
    """The unit of energy in which the largest of these is at least 1."""
    return _fitting(joules, _ENERGY)


def fixed(value: float | None, unit: Unit | None = None) -> str:
    """At least four significant figures, and three decimals at most: ``0.123``, ``1.234``, ``12.34``, ``1234``."""
    if value is None:
        return NONE
    scaled = value / unit.scale if unit is not None else value
    size = abs(scaled)
    return f"{scaled:.{3 if size < 9.9995 else 2 if size < 99.995 else 1 if size < 999.95 else 0}f}"


def ranged(low: float | None, high: float | None, unit: Unit) -> str:
    """Both ends of an interval: ``1.234–1.301``."""
    if low is None or high is None:
        return NONE
    return minus(f"{fixed(low, unit)}{' to ' if low < 0 else '–'}{fixed(high, unit)}")


def minus(text: str) -> str:
    """With signs that stand as wide as a plus."""
    return text.replace("-", "−")


def plus_minus(value: float | None, low: float | None, high: float | None, unit: Unit) -> str:
    """``4.600 ±0.092``: the half-width of the interval, to two figures; the value alone where there is none."""
    if value is None or low is None or high is None:
        return fixed(value, unit)
    half = (high - low) / 2 / unit.scale
    digits = 0 if half >= 9.5 else 1 if half >= 0.95 else 2 if half >= 0.095 else 3
    return f"{fixed(value, unit)} ±{half:.1g}" if 0 < half < 0.0005 else f"{fixed(value, unit)} ±{half:.{digits}f}"


def duration(seconds: float | None) -> str:
    """``1.234 ms``."""
    unit = time_unit([seconds])
    return NONE if seconds is None else f"{fixed(seconds, unit)} {unit.symbol}"


def energy(joules: float | None) -> str:
    """``1.234 mJ``."""
    unit = energy_unit([joules])
    return NONE if joules is None else f"{fixed(joules, unit)} {unit.symbol}"


def in_unit(value: float, unit: str) -> str:
    """Of seconds, joules, a ratio (``"1"``), or a count of something else."""
    if unit == "1":
        return f"{value:.3g}"
    return duration(value) if unit == "s" else energy(value) if unit == "J" else f"{si(value)} {unit}".rstrip()


def percent(share: float | None, *, digits: int = 1) -> str:
    """``0.123`` is ``12.3 %``."""
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def points(difference: float) -> str:
    """A difference of two shares in percentage points: ``-0.007`` is ``−0.7 points``."""
    return minus(f"{100 * difference:+.1f} points")


def si(count: float | None) -> str:
    """``12_345_678`` is ``12.3 M``."""
    if count is None:
        return NONE
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= scale:
            return f"{count / scale:.3g} {prefix}" if abs(count) < 999.5 * scale else f"{count / scale:.0f} {prefix}"
    return f"{count:.0f}"


def size(count: int | None) -> str:
    """Bytes by powers of 1024: ``1536`` is ``1.5 KiB``."""
    if count is None:
        return NONE
    value = float(count)
    for symbol in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {symbol}" if symbol == "B" else f"{value:.1f} {symbol}"
        value /= 1024
    return f"{value:.1f} TiB"


def moment(text: str) -> str:
    """ISO 8601 as ``2026-11-20 10:04 UTC``; anything else as it is."""
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return text
    found = found.replace(tzinfo=timezone.utc) if found.tzinfo is None else found.astimezone(timezone.utc)
    return f"{found:%Y-%m-%d %H:%M} UTC"
