from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit.calibration import expected_calibration_error, negative_log_likelihood, score
from edgekit.errors import CalibrationError
from edgekit.plan import SCORES

LOGITS = np.random.default_rng(3).normal(scale=4, size=(200, 7)).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_scores_agree_with_scipy(temperature):
    probabilities = scipy.special.softmax(LOGITS.astype(np.float64) / temperature, axis=1)
    ordered = np.sort(probabilities, axis=1)
    expected = {
        "max_prob": ordered[:, -1],
        "margin": ordered[:, -1] - ordered[:, -2],
        "neg_entropy": -scipy.special.entr(probabilities).sum(axis=1),
    }
    for name in SCORES:
        found = score(LOGITS, name=name, temperature=temperature)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[name], atol=2e-6)


def test_scores_by_hand():
    """softmax(log 6, log 3, log 1) = (0.6, 0.3, 0.1)."""
    logits = np.log(np.array([[6, 3, 1]], dtype=np.float32))
    assert score(logits, name="max_prob")[0] == pytest.approx(0.6, abs=1e-6)
    assert score(logits, name="margin")[0] == pytest.approx(0.3, abs=1e-6)
    entropy = 0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1)
    assert score(logits, name="neg_entropy")[0] == pytest.approx(entropy, abs=1e-6)


@pytest.mark.parametrize(("name", "sure", "unsure"), [
    ("max_prob", 1.0, 0.5), ("margin", 1.0, 0.0), ("neg_entropy", 0.0, -math.log(2)),
])  # fmt: skip
def test_extreme_logits_and_ties(name, sure, unsure):
    logits = np.array([[1e4, -1e4], [1e38, -1e38], [1e4, 1e4], [-1e4, -1e4]], dtype=np.float32)
    np.testing.assert_allclose(score(logits, name=name), [sure, sure, unsure, unsure], atol=1e-6)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_no_number_makes_the_score_nan(name, bad):
    logits = np.array([[1.0, bad, 0.0], [1.0, 2.0, 0.0]], dtype=np.float32)
    assert np.isnan(score(logits, name=name)).tolist() == [True, False]


def test_logits_that_overflow_when_divided_make_the_score_nan():
    assert np.isnan(score(np.array([[3e38, 0]], dtype=np.float32), name="max_prob", temperature=0.1)).all()


def test_one_class_is_always_sure():
    logits = np.array([[3.0]], dtype=np.float32)
    assert [float(score(logits, name=name)[0]) for name in SCORES] == [1.0, 1.0, 0.0]


def test_an_unknown_score_is_refused():
    with pytest.raises(CalibrationError, match="'energy' is not one of max_prob, margin, neg_entropy"):
        score(LOGITS, name="energy")


@given(hnp.arrays(np.float32, (5, 4), elements=st.floats(-50, 50, width=32)), st.floats(0.1, 10))
def test_scores_stay_in_their_ranges_and_do_not_see_the_order_of_classes(logits, temperature):
    for name, low, high in (("max_prob", 0.25, 1.0), ("margin", 0.0, 1.0), ("neg_entropy", -math.log(4), 0.0)):
        found = score(logits, name=name, temperature=temperature)
        assert (found >= low - 1e-5).all()
        assert (found <= high + 1e-5).all()
        np.testing.assert_allclose(score(logits[:, ::-1], name=name, temperature=temperature), found, atol=1e-6)


def test_nll_is_the_mean_log_loss():
    labels = np.arange(200) % 7
    expected = -scipy.special.log_softmax(LOGITS.astype(np.float64) / 2, axis=1)[np.arange(200), labels].mean()
    assert negative_log_likelihood(LOGITS, labels, temperature=2) == pytest.approx(expected, rel=1e-12)


def test_ece_by_hand():
    """Two bins in use. (0.4, 0.6]: 0.55 twice, one right: |0.5 - 0.55|. (0.8, 1.0]: 0.9 twice, both right: 0.1."""
    logits = np.log(np.array([[0.55, 0.45], [0.55, 0.45], [0.9, 0.1], [0.9, 0.1]]))
    labels = np.array([0, 1, 0, 0])
    assert expected_calibration_error(logits, labels, bins=5) == pytest.approx(0.5 * 0.05 + 0.5 * 0.1)


def test_ece_of_a_perfectly_calibrated_set_is_zero():
    logits = np.log(np.array([[0.75, 0.25]] * 4))
    assert expected_calibration_error(logits, np.array([0, 0, 0, 1])) == pytest.approx(0.0, abs=1e-12)
