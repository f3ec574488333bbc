"""Ranges of activations, from which their scales in 8 bits follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINS", "LEVELS", "Range", "activation_ranges", "least_error_range"]

Range = tuple[float, float]
"""Lowest and highest value that is told from its neighbours; zero lies between or at an end."""
Run = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]
"""Gives the activations of one feed, by name."""

LEVELS = 255
"""Steps of 8 bits."""
BINS = 2048
"""Of the histogram in which ranges are searched."""
SHRINKS = np.linspace(1.0, 0.2, 81)
"""How much of the whole range is tried."""


def activation_ranges(
    run: Run, feeds: Sequence[Mapping[str, NDArray[Any]]], *, symmetric: bool = False
) -> dict[str, Range]:
    """For each activation the range of least rounding and clipping error over the feeds; runs each feed twice.

    Values that are not finite are left out; an activation without any other has the range ``(0, 0)``. Symmetric ranges
    have zero in their middle.
    """
    ends: dict[str, Range] = {}
    for feed in feeds:
        for name, values in run(feed).items():
            low, high = ends.get(name, (0.0, 0.0))
            finite = values[np.isfinite(values)]
            if finite.size:
                low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            ends[name] = (low, high)
    if symmetric:
        ends = {name: (-max(-low, high), max(-low, high)) for name, (low, high) in ends.items()}
    counts = {name: np.zeros(BINS, dtype=np.int64) for name in ends}
    for feed in feeds:
        for name, values in run(feed).items():
            low, high = ends[name]
            if high > low:
                counts[name] += np.histogram(values[np.isfinite(values)], bins=BINS, range=(low, high))[0]
    return {name: least_error_range(counts[name], ends[name]) for name in ends}


def least_error_range(counts: NDArray[np.int64], ends: Range) -> Range:
    """The part of a range, both ends drawn in alike, that has least mean square error in :data:`LEVELS` steps.

    Rounding by a step ``s`` has ``s² / 12``; what lies outside is off by its distance.

    Args:
        counts: ``(bins,)`` of a histogram between the ends.
        ends: that hold zero.
    """
    low, high = ends
    if high <= low:
        return ends
    edges = np.linspace(low, high, len(counts) + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    lows, highs = low * SHRINKS[:, None], high * SHRINKS[:, None]
    outside = np.maximum(centres - highs, 0) + np.maximum(lows - centres, 0)
    steps = (highs - lows) / LEVELS
    # Zero, where ReLU leaves most values, is exact in every scale.
    inexact = counts * ((edges[:-1] > 0) | (edges[1:] < 0))
    errors = (outside**2 * counts).sum(axis=1) + (np.where(outside > 0, 0, steps**2 / 12) * inexact).sum(axis=1)
    best = SHRINKS[int(np.argmin(errors))]
    return float(low * best), float(high * best)


def shared(ranges: Mapping[str, Range], groups: Iterable[Sequence[str]]) -> dict[str, Range]:
    """Ranges in which those of a group are one, that holds them all: what is joined needs no second rounding."""
    found = dict(ranges)
    for group in groups:
        known = [ranges[name] for name in group if name in ranges]
        if known:
            whole = (min(low for low, _ in known), max(high for _, high in known))
            found.update(dict.fromkeys((name for name in group if name in ranges), whole))
    return found
