"""A fixed piece of work, done once in every round: how long it takes tells how fast the machine is at the moment."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

__all__ = ["Reference"]

SIZE = 32_768
"""Numbers in each of three arrays, 384 KiB in all: they lie where the features of a small network do."""
TIMES = 4
PLACES = 8
"""Where arrays lie in memory is worth some percent, for as long as they are there: so they lie in several places."""
LINE, PAGE = 64, 4096
"""Bytes. Arrays that begin at the same place of a page would wait for each other."""


class Reference:
    """Products, sums and maxima of arrays, ``float32``, by numpy: a tenth of a millisecond on a server's core.

    It is one thread's work in caches, as a stage's is, so what slows one slows the other: a neighbour on the same
    processor, heat, a lower frequency. It is not a measure of the machine: only its changes mean something.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        one, two = (rng.standard_normal(SIZE, dtype=np.float32) for _ in range(2))
        self.places = [_arrays() for _ in range(PLACES)]
        for first, second, _ in self.places:
            first[:], second[:] = one, two
        self._next = itertools.cycle(self.places)

    def __call__(self) -> None:
        """Do it once, in the next place."""
        one, two, out = next(self._next)
        for _ in range(TIMES):
            np.multiply(one, two, out=out)
            np.add(out, one, out=out)
            np.maximum(out, 0, out=out)


def _arrays() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Three in one piece of memory, each a line farther from the beginning of its page."""
    size = SIZE * 4 + LINE
    raw = np.zeros(3 * size + PAGE, dtype=np.uint8)
    start = -raw.ctypes.data % PAGE
    one, two, out = (raw[start + place * size :][: SIZE * 4].view(np.float32) for place in range(3))
    return one, two, out
