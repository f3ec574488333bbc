"""Inputs made ready before energy is measured: few enough for memory, and leaving where the stream's leave."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.data import Dataset

__all__ = ["Inputs"]

POOL_BYTES = 64 << 20
POOL_SAMPLES = 1024


class Inputs:
    """Samples of the data in an endless row, each made ready before, so that preprocessing is in nobody's energy.

    Exits come as often as in the stream, and spread evenly, so that a short stretch already costs what a long one
    does. Where not all samples are held at once, those that are can be drawn anew before each window: what samples of
    one exit differ by then scatters the windows, and is in the interval.

    Args:
        data: real samples.
        exits: where samples leave, by sample, of as many as are known.
        rng: of the draws.
    """

    def __init__(self, data: Dataset, exits: Mapping[int, int], *, rng: np.random.Generator) -> None:
        self._data, self._rng = data, rng
        self._samples, self._exits = (np.array(list(each), dtype=np.intp) for each in (exits, exits.values()))
        sample_bytes = max(1, data.batch(slice(0, 1)).nbytes)
        self._size = min(self._samples.size, POOL_SAMPLES, max(1, POOL_BYTES // sample_bytes))
        self._draw()

    def renew(self) -> None:
        """Hold other samples from now on, where there are others."""
        if self._size < self._samples.size:
            self._draw()

    def __next__(self) -> NDArray[Any]:
        return next(self._ready[next(self._turns)])

    def _draw(self) -> None:
        order = _evenly(self._exits, self._rng)
        exits = self._exits[order].tolist()
        of_every_exit = [exits.index(each) for each in set(exits)]
        ready: defaultdict[int, list[NDArray[Any]]] = defaultdict(list)
        for place in dict.fromkeys([*range(self._size), *of_every_exit]):
            sample = int(self._samples[order[place]])
            ready[exits[place]].append(self._data.batch(slice(sample, sample + 1)))
        self._ready: dict[int, Iterator[NDArray[Any]]] = {each: cycle(inputs) for each, inputs in ready.items()}
        self._turns = cycle(exits)


def _evenly(groups: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """Places in random order, those of each group spread evenly over it."""
    keys = np.empty(groups.size)
    for group in np.unique(groups):
        mine = rng.permutation(np.flatnonzero(groups == group))
        keys[mine] = (np.arange(mine.size) + rng.random(mine.size)) / mine.size
    return np.argsort(keys)
