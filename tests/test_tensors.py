from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import InputError
from edgekit.tensors import BATCH, TensorSpec, check_inputs

IMAGE = TensorSpec("x", "float32", (BATCH, 3, 4))


@pytest.mark.parametrize(("dtype", "shape", "message"), [
    ("floaty", (1,), "'floaty' is not a numpy dtype"),
    ("object", (1,), "'object' is not a dtype of numbers"),
    ("f4,i4", (1,), "is not a dtype of numbers"),
    ("float32", ("rows", 2), "only dimension 0 may be symbolic"),
    ("float32", (2, BATCH), "only dimension 0 may be symbolic"),
    ("float32", (-1,), "negative size"),
])  # fmt: skip
def test_a_contract_that_means_nothing(dtype, shape, message):
    with pytest.raises(InputError, match=f"tensor 't': .*{message}"):
        TensorSpec("t", dtype, shape)


def test_sizes():
    assert IMAGE.batched
    assert IMAGE.concrete(5) == (5, 3, 4)
    assert IMAGE.row_bytes == 48
    scalar = TensorSpec("t", "float64", ())
    assert not scalar.batched
    assert scalar.row_bytes == 8


def test_check_keeps_values_and_makes_them_contiguous():
    array = np.arange(24, dtype=np.float32).reshape(4, 3, 2).T
    checked = TensorSpec("x", "float32", (BATCH, 3, 4)).check(array)
    assert checked.flags.c_contiguous
    np.testing.assert_array_equal(checked, array)
    scalar = np.array(3.0, dtype=np.float32)
    assert TensorSpec("t", "float32", ()).check(scalar).shape == ()


@pytest.mark.parametrize(("array", "message"), [
    ([1.0], "expected a numpy array, not list"),
    (np.zeros((1, 3, 4)), r"expected float32, got float64; convert it with .astype\('float32'\)"),
    (np.zeros((1, 3, 4), ">f4"), "expected float32, got >f4"),
    (np.zeros((1, 4, 3), np.float32), r"expected shape \(batch, 3, 4\), got \(1, 4, 3\)$"),
    (np.zeros((3, 4), np.float32), r".*; add the batch dimension: x\[None\]"),
    (np.zeros((), np.float32), r"expected shape \(batch, 3, 4\), got \(\)"),
])  # fmt: skip
def test_arrays_that_do_not_fit(array, message):
    with pytest.raises(InputError, match=f"input 'x': {message}"):
        IMAGE.check(array)


@given(st.integers(0, 5), st.lists(st.integers(0, 4), max_size=3))
def test_every_array_of_the_shape_fits(rows, sizes):
    spec = TensorSpec("t", "int64", (BATCH, *sizes))
    array = np.zeros(spec.concrete(rows), np.int64)
    assert spec.check(array).shape == (rows, *sizes)
    assert array[:1].nbytes == (spec.row_bytes if rows else 0)


def test_inputs_by_order_name_or_alone_are_the_same():
    pair = (IMAGE, TensorSpec("n", "int64", (BATCH,)))
    first, second = np.ones((2, 3, 4), np.float32), np.arange(2)
    for given_as in ((first, second), [first, second], {"n": second, "x": first}):
        arrays, rows = check_inputs(pair, given_as)
        assert rows == 2
        assert arrays[0] is first
        assert arrays[1] is second
    assert check_inputs((IMAGE,), first)[1] == 2


@pytest.mark.parametrize(("given_as", "message"), [
    ({"x": 0, "y": 0}, r"inputs are \['x', 'n'\]; missing: \['n'\], unknown: \['y'\]"),
    ((np.ones((2, 3, 4), np.float32),), r"takes 2 inputs \['x', 'n'\], got 1"),
    ((np.ones((2, 3, 4), np.float32), np.arange(3)), "disagree on the batch: {'x': 2, 'n': 3}"),
])  # fmt: skip
def test_inputs_that_do_not_fit(given_as, message):
    with pytest.raises(InputError, match=message):
        check_inputs((IMAGE, TensorSpec("n", "int64", (BATCH,))), given_as)


def test_json_keeps_a_contract():
    assert msgspec.json.decode(msgspec.json.encode(IMAGE), type=TensorSpec) == IMAGE
