from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from edgekit.calibration import scorers
from edgekit.calibration.scorers import auroc, fit_scorer
from edgekit.errors import CalibrationError
from edgekit.scoring import LearnedScorer, patience


def test_patience_counts_agreeing_exits():
    classes = np.asarray([[0, 1, 2], [0, 0, 2], [0, 0, 1], [1, 0, 1]])
    logits = np.eye(3, dtype=np.float32)[classes]
    assert patience(logits).tolist() == [[0, 0, 0], [1, 0, 1], [2, 1, 0], [0, 2, 1]]
    assert patience(logits).dtype == np.float32
    logits[1, 0, 2] = np.nan
    found = patience(logits)
    assert np.isnan(found[1, 0])
    assert found[2:, 0].tolist() == [0, 0]
    assert patience(logits[:, :0]).shape == (4, 0)


@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_patience_is_what_plain_counting_gives(exits, samples, data):
    classes = np.asarray(data.draw(st.lists(st.integers(-1, 1), min_size=exits * samples, max_size=exits * samples)))
    classes = classes.reshape(exits, samples)
    logits = np.eye(2, dtype=np.float32)[classes]
    logits[classes < 0, 0] = np.nan  # whose argmax is 0
    found = patience(logits)
    for row in range(samples):
        run, before = 0, -1
        for index, chosen in enumerate(classes[:, row].tolist()):
            run = run + 1 if chosen == before >= 0 else 0
            before = chosen
            assert math.isnan(found[index, row]) if chosen < 0 else found[index, row] == run


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_the_mann_whitney_statistic(pairs):
    score = np.asarray([value for value, _ in pairs])
    right = np.asarray([flag for _, flag in pairs])
    if right.all() or not right.any():
        assert math.isnan(auroc(score, right))
        return
    statistic = scipy.stats.mannwhitneyu(score[right], score[~right]).statistic
    assert auroc(score, right) == pytest.approx(statistic / (right.sum() * (~right).sum()))
    assert auroc(-score, right) == pytest.approx(1 - auroc(score, right))


def test_auroc_by_hand():
    right = np.asarray([True, True, False, False])
    assert auroc(np.asarray([3.0, 2.0, 1.0, 0.0]), right) == 1.0
    assert auroc(np.asarray([1.0, 1.0, 1.0, 1.0]), right) == 0.5
    assert auroc(np.asarray([1.0, 1.0, np.nan, np.nan]), right) == 1.0
    assert math.isnan(auroc(np.zeros(0), np.zeros(0, dtype=bool)))


def test_the_fit_is_that_of_penalised_logistic_regression():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 5))
    right = rng.random(400) < 1 / (1 + np.exp(-(features @ [1, -2, 0, 0.5, 0]) - 0.3))
    oracle = LogisticRegression(C=1 / (scorers.RIDGE * 400), tol=1e-10, max_iter=1000)
    oracle.fit(np.concatenate([features, np.zeros((2, 5))]), np.append(right, [True, False]))
    found = scorers._logistic(features, right)
    np.testing.assert_allclose(found[:-1], oracle.coef_[0], atol=1e-5)
    assert found[-1] == pytest.approx(oracle.intercept_[0], abs=1e-5)


def test_a_learned_score_tells_right_from_wrong_on_new_samples(noisy_network):
    logits, labels = noisy_network(4, 3000)
    found = fit_scorer(logits[:, :1500], labels[:1500])(logits[:, 1500:])
    assert found.shape == (3, 1500)
    assert found.dtype == np.float32
    for score, each in zip(found, logits[:-1, 1500:], strict=True):
        right = each.argmax(axis=1) == labels[1500:]
        top = np.sort(each, axis=1)
        assert auroc(score, right) > auroc(top[:, -1] - top[:, -2], right) - 0.02
        assert np.mean(1 / (1 + np.exp(-score))) == pytest.approx(right.mean(), abs=0.03)


def test_without_labels_it_learns_agreement_with_the_last_exit(noisy_network):
    logits, _ = noisy_network(3, 600)
    by_last = fit_scorer(logits)
    assert by_last == fit_scorer(logits, logits[-1].argmax(axis=1))
    assert by_last == fit_scorer(logits)


def test_a_score_by_hand():
    """softmax(log 3, log 1) = (3/4, 1/4); then come negative entropy, margin, and the odds of the exit before."""
    centres = [[0.5, 0.25, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0, 1.0]]
    scales = [[0.5, 1.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0, 4.0]]
    weights = [[2.0, 3.0, -1.0, 4.0, -0.25], [0.0, 0.0, 0.0, 0.0, 100.0, 0.5]]
    centres, scales, weights = (tuple(map(tuple, each)) for each in (centres, scales, weights))
    scorer = LearnedScorer(classes=2, centres=centres, scales=scales, weights=weights)
    logits = np.log(np.asarray([[[1, 3]], [[1, 1]], [[1, 1]]], dtype=np.float32))
    entropy = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    first = 2 * (0.75 - 0.5) / 0.5 - (entropy + 0.5) / 2 - 0.25
    np.testing.assert_allclose(scorer(logits)[0], [first], rtol=1e-6)
    np.testing.assert_allclose(scorer(logits)[1], [100 * (first - 1) / 4 + 0.5], rtol=1e-6)
    sure = msgspec.structs.replace(scorer, weights=(weights[0], (0.0,) * 4 + (-1e6, 0.0)))
    assert abs(sure(logits)[1, 0]) == 30


@given(st.integers(1, 60), st.integers(0, 59))
@settings(max_examples=40, deadline=None)
def test_a_score_does_not_depend_on_the_batch(size, start):
    rng = np.random.default_rng(7)
    logits = rng.normal(scale=3, size=(4, 60, 11)).astype(np.float32)
    learned = fit_scorer(logits)
    whole = learned(logits)
    rows = np.s_[:, start : start + size]
    np.testing.assert_array_equal(learned(logits[rows]), whole[rows])
    np.testing.assert_array_equal(learned(logits[:2]), whole[:2])


def test_it_survives_json(noisy_network):
    logits, labels = noisy_network(3, 200)
    learned = fit_scorer(logits, labels)
    back = msgspec.json.decode(msgspec.json.encode(learned), type=LearnedScorer)
    assert back == learned
    np.testing.assert_array_equal(back(logits), learned(logits))
    assert isinstance(msgspec.to_builtins(learned)["weights"][0][0], float)


def test_logits_that_are_no_numbers_make_this_and_later_scores_nan(noisy_network):
    logits, labels = noisy_network(4, 200)
    clean = fit_scorer(logits[:, 2:], labels[2:])
    logits[1, 0, 2], logits[0, 1, 0] = np.nan, np.inf
    assert fit_scorer(logits, labels) == clean
    found = clean(logits)
    assert np.isnan(found[:, 0]).tolist() == [False, True, True]
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(found[:, 2:]).all()


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_few_samples_give_finite_scores(noisy_network, samples):
    logits, labels = noisy_network(3, samples)
    assert np.isfinite(fit_scorer(logits, labels)(logits)).all()


@pytest.mark.parametrize("right", [True, False])
def test_answers_of_one_kind_give_finite_scores(right):
    logits = np.stack([np.eye(3), np.eye(3)]).astype(np.float32)
    labels = (np.arange(3) + (0 if right else 1)) % 3
    found = fit_scorer(logits, labels)(logits)
    assert ((found > 0) == right).all()
    assert np.isfinite(found).all()


def test_one_exit_has_no_scorers_and_one_class_is_always_right():
    learned = fit_scorer(np.zeros((1, 4, 3), np.float32))
    assert learned(np.zeros((1, 4, 3), np.float32)).shape == (0, 4)
    single = fit_scorer(np.zeros((2, 4, 1), np.float32))
    assert (single(np.zeros((2, 4, 1), np.float32)) > 0).all()


def test_what_it_cannot_learn_from_or_score_is_refused(noisy_network):
    logits, labels = noisy_network(2, 50)
    with pytest.raises(CalibrationError, match="needs samples with finite logits"):
        fit_scorer(np.full((2, 5, 3), np.nan, dtype=np.float32))
    with pytest.raises(CalibrationError, match="learned for 4 classes, but these logits have 3"):
        fit_scorer(logits, labels)(logits[:, :, :3])
