"""The search against brute force that shares no code with it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.calibration import choose_thresholds, exits_taken, thresholds
from edgekit.calibration.thresholds import cuts


def outcome(scores, right, costs, chosen):
    """Correct answers and total cost, sample by sample, in plain Python."""
    correct, total = 0, 0.0
    for sample in range(right.shape[1]):
        exit_index = len(chosen)
        for index, threshold in enumerate(chosen):
            if scores[index][sample] >= np.float32(threshold):
                exit_index = index
                break
        correct += bool(right[exit_index][sample])
        total += costs[exit_index]
    return correct, total


def brute_force(scores, right, costs, allowed):
    """Least total cost over every way to split every exit's scores."""
    values = [[*np.unique(row[~np.isnan(row)]).tolist(), math.inf] for row in scores]
    least = math.inf
    for chosen in itertools.product(*values):
        correct, total = outcome(scores, right, costs, chosen)
        if right[-1].sum() - correct <= allowed:
            least = min(least, total)
    return least


def brute_force_shared(scores, right, costs, allowed):
    values = [*np.unique(scores[~np.isnan(scores)]).tolist(), math.inf]
    found = [outcome(scores, right, costs, [value] * len(scores)) for value in values]
    return min(total for correct, total in found if right[-1].sum() - correct <= allowed)


def cascade(exits, samples, *, seed=0, levels=None):
    """Scores that tell something about being right; deeper exits are right more often."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=samples)
    depth = np.linspace(0.2, 1.2, exits)[:, None]
    right = difficulty + 0.5 * rng.normal(size=(exits, samples)) < depth
    scores = 1 / (1 + np.exp(2 * (difficulty - depth[:-1] + 0.6 * rng.normal(size=(exits - 1, samples)))))
    if levels is not None:
        scores = np.round(scores * levels) / levels
    return scores.astype(np.float32), right, np.linspace(1, 3, exits).tolist()


@st.composite
def problems(draw):
    count, rows = draw(st.integers(2, 3)), draw(st.integers(2, 9))
    value = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, math.nan])
    scores = [draw(st.lists(value, min_size=rows, max_size=rows)) for _ in range(count - 1)]
    right = [draw(st.lists(st.booleans(), min_size=rows, max_size=rows)) for _ in range(count)]
    costs = [float(draw(st.integers(1, 9))) for _ in range(count)]
    array = np.asarray(scores, dtype=np.float32).reshape(count - 1, rows)
    return array, np.asarray(right), costs, draw(st.integers(0, rows))


@given(problems())
@settings(max_examples=150, deadline=None)
def test_small_problems_are_solved_exactly(problem):
    scores, right, costs, allowed = problem
    choice = choose_thresholds(scores, right, costs=costs, allowed=allowed)
    assert choice.exact
    correct, total = outcome(scores, right, costs, choice.thresholds)
    assert right[-1].sum() - correct <= allowed
    assert total == brute_force(scores, right, costs, allowed)
    assert total <= costs[-1] * right.shape[1]
    assert (choice.correct, choice.cost) == (correct, pytest.approx(total / right.shape[1]))


@pytest.mark.parametrize(("exits", "samples"), [(3, 40), (4, 14)])
def test_untied_scores_are_solved_exactly(exits, samples):
    scores, right, costs = cascade(exits, samples)
    for allowed in (0, 1, 3):
        choice = choose_thresholds(scores, right, costs=costs, allowed=allowed)
        assert choice.exact
        assert choice.cost * samples == pytest.approx(brute_force(scores, right, costs, allowed))


@given(problems(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_larger_drop_never_costs_more(problem, more):
    scores, right, costs, allowed = problem
    strict = choose_thresholds(scores, right, costs=costs, allowed=allowed)
    assert choose_thresholds(scores, right, costs=costs, allowed=allowed + more).cost <= strict.cost + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_narrowing_comes_close_to_the_exact_optimum(seed, monkeypatch):
    """With grids of 400 combinations out of 160,000 (3 exits) the gap to the optimum stays below 0.5 %."""
    scores, right, costs = cascade(3, 400, seed=seed)
    exact = choose_thresholds(scores, right, costs=costs, allowed=4)
    monkeypatch.setattr(thresholds, "CELLS", 400)
    narrowed = choose_thresholds(scores, right, costs=costs, allowed=4)
    assert exact.exact
    assert not narrowed.exact
    assert exact.cost <= narrowed.cost <= 1.005 * exact.cost


@pytest.mark.parametrize("seed", range(3))
def test_narrowing_of_four_exits_comes_close_to_the_exact_optimum(seed, monkeypatch):
    scores, right, costs = cascade(4, 70, seed=seed)
    exact = choose_thresholds(scores, right, costs=costs, allowed=2)
    monkeypatch.setattr(thresholds, "CELLS", 1000)
    narrowed = choose_thresholds(scores, right, costs=costs, allowed=2)
    assert exact.exact
    assert not narrowed.exact
    assert exact.cost <= narrowed.cost <= 1.01 * exact.cost


@pytest.mark.parametrize("joint", [2, 4])
@pytest.mark.parametrize("exits", [3, 5, 7])
def test_never_worse_than_the_best_shared_threshold(exits, joint, monkeypatch):
    monkeypatch.setattr(thresholds, "CELLS", 100)
    monkeypatch.setattr(thresholds, "JOINT", joint)
    for seed in range(3):
        scores, right, costs = cascade(exits, 60, seed=seed)
        choice = choose_thresholds(scores, right, costs=costs, allowed=2)
        assert not choice.exact
        assert right[-1].sum() - choice.correct <= 2
        assert choice.cost * 60 <= brute_force_shared(scores, right, costs, 2) + 1e-9


def test_the_shared_start_is_the_best_shared_threshold(monkeypatch):
    """With nothing to narrow (one cut per grid), what is left is the best start."""
    scores, right, costs = cascade(3, 50, seed=9)
    monkeypatch.setattr(thresholds._Search, "narrowed", lambda search, start: search.grid(thresholds._fixed(start)))
    monkeypatch.setattr(
        thresholds._Search, "multiplied", lambda search: search.grid(thresholds._fixed(search.problem.never))
    )
    monkeypatch.setattr(thresholds, "CELLS", 10)
    choice = choose_thresholds(scores, right, costs=costs, allowed=1)
    assert choice.cost * 50 == pytest.approx(brute_force_shared(scores, right, costs, 1))


def test_five_exits_and_five_thousand_samples_are_quick():
    scores, right, costs = cascade(5, 5000)
    choice = choose_thresholds(scores, right, costs=costs, allowed=50)
    assert right[-1].sum() - choice.correct <= 50
    assert choice.cost < 0.9 * costs[-1]
    assert choice.combinations < 40 * thresholds.CELLS  # work, not seconds: the same on every machine


@pytest.mark.parametrize("levels", [1, 10])
def test_tied_scores_leave_together(levels):
    scores, right, costs = cascade(3, 30, levels=levels)
    choice = choose_thresholds(scores, right, costs=costs, allowed=3)
    assert choice.cost * 30 == pytest.approx(brute_force(scores, right, costs, 3))


def test_an_exit_that_does_not_pay_is_never_taken():
    scores, right, _ = cascade(3, 200)
    choice = choose_thresholds(scores, right, costs=[1.0, 5.0, 4.0], allowed=200)
    assert choice.thresholds[1] == math.inf
    assert (choice.exits == 0).all()
    dear = choose_thresholds(scores, right, costs=[5.0, 5.0, 4.0], allowed=200)
    assert dear.thresholds == (math.inf, math.inf)


def test_a_first_exit_better_than_the_last_is_taken():
    right = np.array([[True] * 4, [False, True, False, True]])
    choice = choose_thresholds(np.full((1, 4), 0.5, dtype=np.float32), right, costs=[1.0, 2.0], allowed=0)
    assert (choice.correct, choice.cost) == (4, 1.0)


def test_nan_never_exits_even_when_everybody_may():
    scores = np.array([[math.nan, 0.1, 0.9]], dtype=np.float32)
    choice = choose_thresholds(scores, np.ones((2, 3), dtype=bool), costs=[1.0, 2.0], allowed=0)
    assert choice.exits.tolist() == [1, 0, 0]
    only_nan = choose_thresholds(scores[:, :1], np.ones((2, 1), dtype=bool), costs=[1.0, 2.0], allowed=1)
    assert only_nan.thresholds == (math.inf,)


def test_one_exit_has_no_thresholds():
    choice = choose_thresholds(np.empty((0, 5), np.float32), np.ones((1, 5), dtype=bool), costs=[2.0], allowed=0)
    assert (choice.thresholds, choice.cost, choice.exits.tolist()) == ((), 2.0, [0] * 5)


@given(st.lists(st.floats(0, 1, width=32) | st.just(math.nan), min_size=1, max_size=30))
def test_cuts_split_the_scores_between_every_pair_far_enough_apart(values):
    scores = np.asarray(values, dtype=np.float32)
    found = cuts(scores)
    assert found.dtype == np.float32
    assert (np.diff(found) > 0).all()
    assert found[-1] == np.inf
    ordered = np.unique(scores[~np.isnan(scores)])
    apart = 1 + int((np.diff(ordered.astype(np.float64)) > thresholds.SEPARATION).sum()) if len(ordered) else 0
    splits = {tuple(scores >= cut) for cut in found}
    assert len(found) == len(splits) == apart + 1


def test_scores_nearer_than_rounding_are_not_told_apart():
    one = np.float32(1)
    scores = np.array([0.5, np.nextafter(one, np.float32(0)), 1], dtype=np.float32)
    assert len(cuts(scores)) == 3


def test_decisions_are_the_float32_comparison():
    scores = np.array([[0.1, 0.7]], dtype=np.float32)
    assert exits_taken(scores, [0.7]).tolist() == [1, 0]  # 0.7 as float32 is below 0.7 as float64
