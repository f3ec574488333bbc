from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from edgekit.calibration.drift import Drift, chi2_survival, homogeneity, population_stability
from edgekit.errors import CalibrationError

COUNTS = st.integers(2, 8).flatmap(lambda n: st.lists(st.lists(st.integers(0, 500), min_size=n, max_size=n),
                                                      min_size=2, max_size=2))  # fmt: skip


@given(st.floats(0, 2000), st.integers(1, 200))
def test_chi_squared_is_scipys(x, freedom):
    assert chi2_survival(x, freedom) == pytest.approx(scipy.stats.chi2.sf(x, freedom), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(("x", "freedom"), [(-1.0, 1), (math.nan, 1), (1.0, 0)])
def test_chi_squared_of_nonsense(x, freedom):
    with pytest.raises(CalibrationError, match="degrees of freedom"):
        chi2_survival(x, freedom)


@given(COUNTS)
def test_homogeneity_is_scipys(counts):
    table = np.asarray(counts)
    table = table[:, table.sum(axis=0) > 0]
    usable = table.shape[1] > 1 and table.sum(axis=1).all()
    expected = scipy.stats.chi2_contingency(table, correction=False).pvalue if usable else 1.0
    assert homogeneity(*counts) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@given(COUNTS)
def test_stability_is_the_symmetric_divergence(counts):
    p, q = (np.asarray(each) + 0.5 for each in counts)
    expected = scipy.stats.entropy(p, q) + scipy.stats.entropy(q, p)
    assert population_stability(*counts) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert population_stability(*counts) == pytest.approx(population_stability(*counts[::-1]))


def test_p_values_are_uniform_without_a_shift():
    rng = np.random.default_rng(0)
    pairs = rng.multinomial(1000, [0.75, 0.2, 0.05], size=(2000, 2))
    p = np.array([homogeneity(*pair) for pair in pairs])
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.015)


def test_a_shift_is_noticed_in_one_window():
    """Of the first exit from 0.75 to 0.60 of the samples."""
    rng = np.random.default_rng(1)
    drift = Drift(reference=[7500, 2500], counts=[0, 0])
    drift.add((rng.random(1000) > 0.75).astype(np.int64))
    assert drift.windows == 1
    assert not drift.warning
    drift.add((rng.random(1000) > 0.60).astype(np.int64))
    assert drift.warning
    assert (drift.windows, drift.notable) == (2, 1)
    assert drift.last.psi == pytest.approx(0.104, abs=0.03)
    assert drift.last.p_value < 1e-9


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 15))
def test_one_by_one_or_in_a_restarted_half(exits, size):
    whole, parts = (Drift(reference=None, counts=[0, 0, 0], size=size) for _ in range(2))
    for each in exits:
        whole.add(np.array([each]))
    for index, each in enumerate(exits):
        if index == len(exits) // 2:
            parts = msgspec.json.decode(msgspec.json.encode(parts), type=Drift)
        parts.add(np.array([each]))
    assert parts == whole
    assert sum(whole.counts) == len(exits) % size
    assert whole.windows == max(0, len(exits) // size - 1), "the first window is the reference"


def test_a_batch_larger_than_the_window_is_one_window():
    drift = Drift(reference=[5, 5], counts=[0, 0], size=10)
    drift.add(np.zeros(64, dtype=np.int64))
    assert drift.last.shares == (1.0, 0.0)


@pytest.mark.parametrize("wrong", [
    {"size": 0}, {"reference": [1]}, {"reference": [1, -1]}, {"counts": [], "reference": []},
])  # fmt: skip
def test_bad_options(wrong):
    with pytest.raises(CalibrationError):
        Drift(**{"reference": [1, 1], "counts": [0, 0], **wrong})
