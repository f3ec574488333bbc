"""Tensors in host memory, for every runtime that computes there."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.interfaces import Buffer
from edgekit.tensors import TensorSpec

__all__ = ["ALIGNMENT", "ChannelsLastBuffer", "HostBuffer"]

ALIGNMENT = 64
"""Bytes. Kernels take other paths, and round differently, at other alignments; one cache line suits all of them."""

LARGE_ROW_BYTES = 4096
"""Rows of this size are copied one by one, which costs less than the temporary copy that numpy would make of all."""


class HostBuffer:
    """One tensor in host memory, up to a number of rows.

    Args:
        spec: the tensor.
        rows: rows to make room for; a tensor that is not batched has its own size.
    """

    shared = True

    def __init__(self, spec: TensorSpec, rows: int) -> None:
        self.spec = spec
        self.rows = rows
        self._array = _aligned(spec.concrete(rows), np.dtype(spec.dtype))
        self._batched = spec.batched
        self._first = self._array[:1] if spec.batched else self._array

    def write(self, array: NDArray[Any]) -> None:
        """Copy an array in, from row 0."""
        self.read(len(array) if self._batched else 1)[...] = array

    def read(self, rows: int) -> NDArray[Any]:
        """The first ``rows`` rows: a C-contiguous view of this memory, for as long as the buffer lives."""
        if rows == 1 or not self._batched:
            return self._first
        return self._array[:rows]

    def copy(self, source: Buffer, rows: NDArray[np.intp], places: NDArray[np.intp]) -> None:
        """Copy rows of another host buffer, or of this one, to places here."""
        array = source.read(source.rows)
        if array[:1].nbytes < LARGE_ROW_BYTES:
            self._array[places] = array[rows]
            return
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            self._array[place] = array[row]


class ChannelsLastBuffer:
    """A tensor ``(rows, channels, height, width)`` that lies in memory as ``(rows, height, width, channels)``.

    Args:
        spec: the tensor.
        rows: rows to make room for; a tensor that is not batched has its own size.
    """

    shared = True

    def __init__(self, spec: TensorSpec, rows: int) -> None:
        self.spec = spec
        self.rows = rows
        batch, channels, height, width = spec.shape
        self._stored = HostBuffer(TensorSpec(spec.name, spec.dtype, (batch, height, width, channels)), rows)

    def write(self, array: NDArray[Any]) -> None:
        """Copy an array ``(rows, channels, height, width)`` in, from row 0."""
        self._stored.write(array.transpose(0, 2, 3, 1))

    def read(self, rows: int) -> NDArray[Any]:
        """The first rows, a view ``(rows, channels, height, width)`` of this memory."""
        return self.stored(rows).transpose(0, 3, 1, 2)

    def stored(self, rows: int) -> NDArray[Any]:
        """The first rows as they lie in memory: ``(rows, height, width, channels)``."""
        return self._stored.read(rows)

    def copy(self, source: Buffer, rows: NDArray[np.intp], places: NDArray[np.intp]) -> None:
        """Copy rows of another such buffer, or of this one, to places here."""
        assert isinstance(source, ChannelsLastBuffer)
        self._stored.copy(source._stored, rows, places)


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
