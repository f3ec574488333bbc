from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax

from edgekit.calibration.losses import LOSSES, Loss, accuracy_gap, brier_gap, check_losses, consistency
from edgekit.errors import CalibrationError

PREDICTIONS = arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 8)), elements=st.integers(0, 2))


def test_accuracy_gap_by_hand():
    """Columns: both right, lost here, gained here, both wrong (differently)."""
    gap = accuracy_gap(np.array([[0, 1, 0, 1], [0, 0, 1, 2]]), np.array([0, 0, 0, 0]))
    assert gap.tolist() == [[0, 1, -1, 0], [0, 0, 0, 0]]
    assert gap.dtype == np.float64


def test_consistency_by_hand():
    loss = consistency(np.array([[0, 1, 0, 1], [0, 0, 1, 2]]))
    assert loss.tolist() == [[0, 1, 1, 1], [0, 0, 0, 0]]
    assert loss.dtype == np.float64


@given(PREDICTIONS, st.data())
def test_the_gap_is_the_drop_of_accuracy_and_never_above_consistency(predictions, data):
    samples = predictions.shape[1]
    labels = data.draw(arrays(np.int64, samples, elements=st.integers(0, 2)))
    gap = accuracy_gap(predictions, labels)
    accuracy = (predictions == labels).mean(axis=1)
    np.testing.assert_allclose(gap.mean(axis=1), accuracy[-1] - accuracy, atol=1e-12)
    assert (gap <= consistency(predictions)).all()


def test_brier_gap_is_half_the_difference_of_brier_scores(noisy_network):
    logits, labels = noisy_network()
    squares = (softmax(logits.astype(np.float64), axis=2) - np.eye(4)[labels]) ** 2
    brier = squares.sum(axis=2)
    np.testing.assert_allclose(brier_gap(logits, labels), (brier - brier[-1]) / 2, atol=1e-12)


def test_brier_gap_reaches_its_bounds_and_no_further():
    sure = 1000 * np.eye(2, dtype=np.float32)
    logits = np.array([[sure[1], sure[0]], [sure[0], sure[1]]])
    assert brier_gap(logits, np.array([0, 0])).tolist() == [[1, -1], [0, 0]]


@given(arrays(np.float32, (3, 4, 3), elements=st.floats(-50, 50, width=32)))
def test_every_built_in_loss_keeps_the_range_it_tells(logits):
    labels = np.array([0, 1, 2, 0])
    for loss in LOSSES.values():
        values = loss(logits, labels)
        assert values.shape == (3, 4)
        assert values.min() >= loss.low
        assert values.max() <= 1
        assert not values[-1].any()
        assert not loss.whole or np.isin(values, [-1, 0, 1]).all()


def test_the_range_decides_the_test():
    assert {name: loss.test for name, loss in LOSSES.items()} == {
        "gap": "ternary", "consistency": "binomial", "brier": "wsr",
    }  # fmt: skip
    assert Loss(name="mine", per_sample=lambda logits, labels: logits).test == "hoeffding-bentkus"


def test_only_consistency_does_without_labels(noisy_network):
    logits, _ = noisy_network()
    assert LOSSES["consistency"](logits).shape == (3, 300)
    for name in ("gap", "brier"):
        with pytest.raises(CalibrationError, match=f"loss '{name}' needs labels; without them use 'consistency'"):
            LOSSES[name](logits)


@pytest.mark.parametrize("labels", [np.zeros(299, int), np.zeros((300, 1), int), np.zeros(300)])
def test_labels_that_do_not_fit(noisy_network, labels):
    logits, _ = noisy_network()
    for name in ("gap", "brier"):
        with pytest.raises(CalibrationError, match="give 300 class indices, one per sample"):
            LOSSES[name](logits, labels)


@pytest.mark.parametrize("bad", [-1, 4])
def test_brier_names_a_label_that_is_no_class(noisy_network, bad):
    logits, labels = noisy_network()
    labels[7] = bad
    with pytest.raises(CalibrationError, match=f"label {bad} of sample 7 is outside 0 to 3"):
        brier_gap(logits, labels)


def test_losses_of_the_users_own_pass_as_they_are():
    mine = np.array([[0.5, -7.0, 1.0], [0, 0, 0]])
    assert check_losses(mine, (2, 3)) is mine
    assert check_losses(np.array([[True, False], [False, False]]), (2, 2)).tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "loss 'mine' is not finite; exit 1 of sample 2 has nan"),
     (-math.inf, "loss 'mine' is not finite; exit 1 of sample 2 has -inf"),
     (1.25, "loss 'mine' is above 1: divide it by its largest value; exit 1 of sample 2 has 1.25")],
)  # fmt: skip
def test_the_first_bad_loss_is_named(value, message):
    losses = np.zeros((3, 4))
    losses[1, 2] = losses[1, 3] = value
    with pytest.raises(CalibrationError, match=f"^{message}$"):
        check_losses(losses, (3, 4), name="mine")


def test_losses_of_the_wrong_form():
    with pytest.raises(CalibrationError, match=r"has shape \(4,\); give \(2, 4\), one per exit and sample"):
        check_losses(np.zeros(4), (2, 4))
    with pytest.raises(CalibrationError, match="not real numbers"):
        check_losses(np.zeros((2, 4), dtype=complex), (2, 4))
    with pytest.raises(CalibrationError, match=r"of the last exit must be 0, sample 3 has -1.0: subtract"):
        check_losses(np.array([[0, 0, 0, 0], [0, 0, 0, -1.0]]), (2, 4))


def test_a_function_that_breaks_its_word_is_told(noisy_network):
    logits, labels = noisy_network()
    labels[0] = logits[0, 0].argmax()
    logits[-1, 0] = -logits[-1, 0]  # the first exit is right where the last is wrong
    signed = Loss(name="mine", per_sample=lambda logits, labels: LOSSES["gap"](logits, labels), low=0.0)
    with pytest.raises(CalibrationError, match=r"loss 'mine' is below 0\.0, its smallest value"):
        signed(logits, labels)
    halves = Loss(name="mine", per_sample=lambda logits, labels: consistency(logits.argmax(2)) / 2, whole=True)
    with pytest.raises(CalibrationError, match="loss 'mine' is not a whole number"):
        halves(logits, labels)
