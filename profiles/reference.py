"""A fixed piece of work, done once in every round: how long it takes tells how fast the machine is at the moment."""

from __future__ import annotations

import numpy as np

__all__ = ["Reference"]

SIZE = 32_768
"""Numbers in each array: 128 KiB, so that arrays lie where a small network's features do, in the second cache."""
TIMES = 4


class Reference:
    """Products, sums and maxima of arrays, ``float32``, by numpy: a tenth of a millisecond on a server's core.

    It is one thread's work in caches, as a stage's is, so what slows one slows the other: a neighbour on the same
    processor, heat, a lower frequency. It is not a measure of the machine: only its changes mean something.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._one, self._two = (rng.standard_normal(SIZE, dtype=np.float32) for _ in range(2))
        self._out = np.empty_like(self._one)

    def __call__(self) -> None:
        """Do it once."""
        for _ in range(TIMES):
            np.multiply(self._one, self._two, out=self._out)
            np.add(self._out, self._one, out=self._out)
            np.maximum(self._out, 0, out=self._out)
