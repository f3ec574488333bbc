"""Names, dtypes and shapes of the tensors that enter, cross and leave stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError

__all__ = ["BATCH", "TensorSpec"]

BATCH = "batch"
"""The symbolic size of dimension 0 of every tensor that has one row per sample."""


class TensorSpec(msgspec.Struct, frozen=True):
    """A tensor's contract.

    Attributes:
        name: unique within a plan.
        dtype: numpy's name, as ``"float32"``.
        shape: sizes; a string is a symbolic size. Only :data:`BATCH`, as dimension 0, is symbolic.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        try:
            known = np.dtype(self.dtype).kind in "biufc"
        except (TypeError, ValueError, SyntaxError) as error:
            raise InputError(f"tensor '{self.name}': {self.dtype!r} is not a numpy dtype") from error
        if not known:
            raise InputError(f"tensor '{self.name}': {self.dtype!r} is not a dtype of numbers")
        if any(size != BATCH or position > 0 for position, size in enumerate(self.shape) if isinstance(size, str)):
            raise InputError(f"tensor '{self.name}': only dimension 0 may be symbolic, as '{BATCH}': {self.shape}")
        if any(size < 0 for size in self.shape if isinstance(size, int)):
            raise InputError(f"tensor '{self.name}': negative size in {self.shape}")

    @property
    def batched(self) -> bool:
        """Whether dimension 0 counts samples, any number of them."""
        return bool(self.shape) and self.shape[0] == BATCH

    def concrete(self, rows: int) -> tuple[int, ...]:
        """The shape for a batch of ``rows`` samples."""
        return tuple(rows if isinstance(size, str) else size for size in self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample's row (of the whole tensor where it is not batched)."""
        return self.row_size * np.dtype(self.dtype).itemsize

    @property
    def row_size(self) -> int:
        """Elements of one sample's row (of the whole tensor where it is not batched)."""
        return int(np.prod(self.concrete(1), dtype=np.int64))

    def like(self, other: TensorSpec) -> bool:
        """Whether the other has the same dtype and shape, whatever its name."""
        return (self.dtype, self.shape) == (other.dtype, other.shape)

    def check(self, array: Any) -> NDArray[Any]:
        """``array``, C-contiguous, when it fits this contract.

        Raises:
            InputError: it is no array, or its dtype or shape differ; the message says expected and given.
        """
        if not isinstance(array, np.ndarray):
            raise InputError(f"input '{self.name}': expected a numpy array, not {type(array).__name__}")
        if array.dtype != np.dtype(self.dtype):
            raise InputError(
                f"input '{self.name}': expected {self.dtype}, got {array.dtype}; "
                f"convert it with .astype('{self.dtype}')"
            )
        fits = array.ndim == len(self.shape) and all(
            isinstance(size, str) or size == given for size, given in zip(self.shape, array.shape, strict=True)
        )
        if not fits:
            hint = ""
            if self.batched and array.shape == self.shape[1:]:
                hint = "; add the batch dimension: x[None]"
            expected = ", ".join(str(size) for size in self.shape)
            raise InputError(f"input '{self.name}': expected shape ({expected}), got {array.shape}{hint}")
        return np.asarray(array, order="C")


def check_inputs(
    specs: tuple[TensorSpec, ...], given: Mapping[str, Any] | tuple[Any, ...] | list[Any] | Any
) -> tuple[list[NDArray[Any]], int]:
    """Checks a run's inputs: arrays in the order of ``specs``, and the number of samples.

    Args:
        specs: the network's inputs.
        given: one array, a sequence in order, or by name: a mapping, or an array with fields.

    Raises:
        InputError: an input is missing, unknown, misshapen, or the batches disagree.
    """
    names = [spec.name for spec in specs]
    if isinstance(given, np.ndarray) and given.dtype.names is not None:
        given = {name: np.ascontiguousarray(given[name]) for name in given.dtype.names}
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(names))
        missing = [name for name in names if name not in given]
        if unknown or missing:
            raise InputError(f"inputs are {names}; missing: {missing or 'none'}, unknown: {unknown or 'none'}")
        arrays = [given[name] for name in names]
    else:
        arrays = list(given) if isinstance(given, tuple | list) else [given]
        if len(arrays) != len(specs):
            raise InputError(f"the network takes {len(specs)} inputs {names}, got {len(arrays)}")
    checked = [spec.check(array) for spec, array in zip(specs, arrays, strict=True)]
    rows = {spec.name: len(array) for spec, array in zip(specs, checked, strict=True) if spec.batched}
    if len(set(rows.values())) > 1:
        raise InputError(f"inputs disagree on the batch: {rows}")
    return checked, next(iter(rows.values()), 1)


def finite_rows(array: NDArray[Any]) -> NDArray[np.bool_]:
    """``(rows,)`` whether all numbers of a row are finite, those of every field where the array has fields.

    Args:
        array: ``(rows, ...)``.
    """
    if array.dtype.names is not None:
        fields = [finite_rows(array[name]) for name in array.dtype.names]
        return np.asarray(np.all(fields, axis=0))
    if array.dtype.kind not in "fc":
        return np.ones(len(array), dtype=np.bool_)
    return np.asarray(np.isfinite(array.reshape(len(array), -1)).all(axis=1))
