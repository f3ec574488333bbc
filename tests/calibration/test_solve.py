"""Paths and budgets against sample-by-sample evaluation and brute force that share no code with them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.calibration import frontier, solve
from edgekit.calibration.candidates import Samples, evaluate
from edgekit.calibration.solve import msdnet_budget, propose_budget, propose_path, shared_threshold_path
from edgekit.errors import CalibrationError


def outcome(scores, losses, costs, heads, thresholds):
    """Mean loss, standard deviation, cost and shares, sample by sample, in plain Python."""
    exits, samples = losses.shape
    off = [threshold == math.inf for threshold in thresholds]
    lost, spent, left = [], [], [0] * exits
    for sample in range(samples):
        taken = exits - 1
        for index, threshold in enumerate(thresholds):
            if scores[index][sample] >= np.float32(threshold):
                taken = index
                break
        left[taken] += 1
        lost.append(float(losses[taken][sample]))
        spent.append(costs[taken] - sum(heads[index] for index in range(taken) if off[index]))
    return np.mean(lost), np.std(lost), np.mean(spent), [count / samples for count in left]


def cascade(exits, samples, *, seed=0, levels=None):
    """Scores, accuracy gaps and costs of exits that get better with depth."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=samples)
    depth = np.linspace(0.2, 1.2, exits)[:, None]
    right = (difficulty + 0.5 * rng.normal(size=(exits, samples)) < depth).astype(np.int8)
    scores = 1 / (1 + np.exp(2 * (difficulty - depth[:-1] + 0.6 * rng.normal(size=(exits - 1, samples)))))
    if levels is not None:
        scores = np.round(scores * levels) / levels
    return scores.astype(np.float32), right[-1] - right, np.linspace(1, 3, exits).tolist()


@st.composite
def problems(draw):
    exits, samples = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    value = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, math.nan])
    rows = [draw(st.lists(value, min_size=samples, max_size=samples)) for _ in range(exits - 1)]
    loss = st.sampled_from([-1.0, -0.25, 0.0, 0.5, 1.0])
    losses = [draw(st.lists(loss, min_size=samples, max_size=samples)) for _ in range(exits - 1)]
    scores = np.asarray(rows, dtype=np.float32).reshape(exits - 1, samples)
    costs = [float(draw(st.integers(1, 9))) for _ in range(exits)]
    heads = [draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in range(exits)]
    return scores, np.asarray([*losses, [0.0] * samples]), costs, heads


def every_vector(scores):
    """Every way to split every exit's scores."""
    return list(itertools.product(*([*np.unique(row[~np.isnan(row)]).tolist(), math.inf] for row in scores)))


def least_cost(found, risk):
    return min(cost for each, _, cost, _ in found if each <= risk + 1e-9)


def require_path(path, scores, losses, costs, heads):
    """A path's invariants: figures are true, never-exit first, ever cheaper and harder to pass."""
    exits = len(losses)
    assert path[0].thresholds == (math.inf,) * (exits - 1)
    for each in path:
        risk, deviation, cost, shares = outcome(scores, losses, costs, heads, each.thresholds)
        assert (each.risk, each.cost) == (pytest.approx(risk), pytest.approx(cost))
        assert each.deviation == pytest.approx(deviation, abs=1e-7)
        assert each.shares == pytest.approx(shares)
        assert all(float(np.float32(value)) == value for value in each.thresholds)
        assert all(share or value == math.inf for share, value in zip(each.shares[:-1], each.thresholds, strict=True))
    assert all(later.cost < earlier.cost for earlier, later in itertools.pairwise(path))
    targets = [each.risk + solve.DOUBT * each.deviation / math.sqrt(solve.TESTED) for each in path[1:]]
    assert targets == sorted(targets)


@given(problems())
@settings(max_examples=80, deadline=None)
def test_a_path_says_what_it_does(problem):
    scores, losses, costs, heads = problem
    require_path(propose_path(scores, losses, costs, heads=heads), scores, losses, costs, heads)
    require_path(shared_threshold_path(scores, losses, costs, heads=heads), scores, losses, costs, heads)


@given(problems())
@settings(max_examples=80, deadline=None)
def test_the_front_of_small_problems_is_exact(problem):
    scores, losses, costs, heads = problem
    pool = frontier.search(Samples.checked(scores, losses, costs, heads))
    found = [outcome(scores, losses, costs, heads, vector) for vector in every_vector(scores)]
    for vector, risk in zip(pool.thresholds, pool.loss, strict=True):
        assert outcome(scores, losses, costs, heads, vector.tolist())[0] == pytest.approx(risk)
    for risk in (0.0, 0.2, 1.0):
        within = pool.cost[pool.loss <= risk + 1e-9]
        assert min(within, default=math.inf) == pytest.approx(least_cost(found, risk))


@pytest.mark.parametrize(("exits", "samples"), [(3, 40), (4, 14), (5, 7)])
def test_the_search_of_one_exit_at_a_time_comes_close_to_brute_force(exits, samples, monkeypatch):
    """Without the exact grid: seldom any dearer than the best vector of all, never by a tenth."""
    monkeypatch.setattr(frontier, "EXACT", 0)
    monkeypatch.setattr(frontier, "CELLS", 0)
    ratios = []
    for seed in range(3):
        scores, losses, costs = cascade(exits, samples, seed=seed)
        given_samples = Samples.checked(scores, losses, costs)
        every = [given_samples.evaluate(np.asarray(vector, dtype=np.float32)) for vector in every_vector(scores)]
        pool = frontier.search(given_samples)
        for risk in (0.0, 0.05, 0.15):
            best = min(each.cost for each in every if each.risk <= risk + 1e-9)
            ratios.append(pool.cost[pool.loss <= risk + 1e-9].min() / best)
    assert max(ratios) < 1.1
    assert np.mean(ratios) < 1.02


def test_more_samples_than_are_searched(monkeypatch):
    scores, losses, costs = cascade(4, 3000)
    monkeypatch.setattr(solve, "SEARCHED", 800)
    path = propose_path(scores, losses, costs, seed=3)
    require_path(path, scores, losses, costs, [0.0] * 4)
    assert len(path) > 20
    assert path == propose_path(scores, losses, costs, seed=3)
    assert path != propose_path(scores, losses, costs, seed=4)


def walked(path, scores, losses, costs, epsilon):
    """Cost on new samples just before the path first exceeds a risk, knowing the risk."""
    cost = math.inf
    for each in path:
        new = evaluate(scores, losses, costs, thresholds=each.thresholds)
        if new.risk > epsilon:
            break
        cost = min(cost, new.cost)
    return cost


@pytest.mark.parametrize("exits", [3, 5, 8])
def test_on_new_samples_no_worse_than_one_shared_threshold(exits):
    scores, losses, costs = cascade(exits, 12_000, seed=exits)
    ours, shared = [], []
    for start in (0, 2000):
        part, new = np.s_[:, start : start + 2000], np.s_[:, 4000:]
        for epsilon in (0.01, 0.02, 0.05):
            for way, into in ((propose_path, ours), (shared_threshold_path, shared)):
                path = way(scores[part], losses[part], costs)
                into.append(walked(path, scores[new], losses[new], costs, epsilon))
    assert np.mean(ours) <= 1.01 * np.mean(shared)


def test_a_path_is_dense_where_targets_lie():
    scores, losses, costs = cascade(5, 20_000)
    for path in (propose_path(scores, losses, costs), shared_threshold_path(scores, losses, costs)):
        risks = np.array([each.risk for each in path])
        assert len(path) <= 64
        assert ((risks > 0.005) & (risks < 0.1)).sum() >= 20
        assert np.diff(risks[risks < 0.1]).max() < 0.01
    assert len(propose_path(scores, losses, costs, points=9)) <= 9


def test_an_exit_whose_score_says_nothing_is_avoided():
    """The first exit's score is noise; a shared threshold lets people leave there all the same."""
    scores, losses, costs = cascade(4, 16_000)
    scores[0] = np.random.default_rng(1).random(16_000)
    part, new = np.s_[:, :6000], np.s_[:, 6000:]
    ours, shared = (way(scores[part], losses[part], costs) for way in (propose_path, shared_threshold_path))
    for epsilon in (0.01, 0.02, 0.05):
        cost = walked(ours, scores[new], losses[new], costs, epsilon)
        assert cost < 0.99 * walked(shared, scores[new], losses[new], costs, epsilon)


def test_an_exit_that_costs_more_than_the_last_is_switched_off():
    """Costs that fall with depth: nobody is to leave at the middle exit."""
    scores, losses, _ = cascade(3, 4000)
    path = propose_path(scores, losses, [1.0, 5.0, 4.0])
    assert len(path) > 10
    assert all(each.thresholds[1] == math.inf for each in path if each.risk < 0.1)
    assert propose_path(scores, losses, [5.0, 5.0, 4.0]) == (path[0],)


def test_a_head_that_costs_more_than_it_saves_is_switched_off():
    scores, losses, costs = cascade(3, 4000)
    without = propose_path(scores, losses, costs, heads=[0.9, 0.0, 0.0])
    assert without[0].cost == pytest.approx(3.0 - 0.9)
    assert all(each.thresholds[0] == math.inf for each in without if each.risk < 0.02)
    assert any(each.thresholds[0] < math.inf for each in propose_path(scores, losses, costs) if each.risk < 0.02)


def test_noise_is_not_taken_for_safety():
    """The first exit gains as often as it loses: no risk, but no test passes it; it must not block what follows."""
    rng = np.random.default_rng(0)
    scores = rng.random((2, 4000)).astype(np.float32)
    losses = np.zeros((3, 4000), dtype=np.int8)
    losses[0] = rng.choice([-1, 1], 4000)
    losses[1] = rng.random(4000) < 0.01
    path = propose_path(scores, losses, [1.0, 1.1, 3.0])
    assert path[1].deviation < 0.1
    assert min(each.cost for each in path if each.deviation < 0.2) < 1.2


@pytest.mark.parametrize("levels", [1, 9])
def test_tied_scores(levels):
    scores, losses, costs = cascade(3, 1000, levels=levels)
    path = propose_path(scores, losses, costs)
    require_path(path, scores, losses, costs, [0.0] * 3)
    assert len(path) > 1


def test_all_scores_tied_is_all_or_nobody():
    losses = np.asarray([[1, 0, 0, 0], [0, 0, 0, 0]])
    path = propose_path(np.full((1, 4), 0.5, dtype=np.float32), losses, [1.0, 2.0])
    assert [(each.risk, each.cost) for each in path] == [(0.0, 2.0), (0.25, 1.0)]
    assert path[1].thresholds == (0.5,)


def test_a_first_exit_better_than_the_last_has_negative_risk():
    losses = np.asarray([[-1, 0, -1, 0], [0, 0, 0, 0]])
    path = propose_path(np.full((1, 4), 0.5, dtype=np.float32), losses, [1.0, 2.0])
    assert (path[-1].risk, path[-1].cost) == (-0.5, 1.0)


@pytest.mark.parametrize("early", [0, 1, 3])
def test_no_samples_is_never_exit(early):
    path = propose_path(np.empty((early, 0), np.float32), np.empty((early + 1, 0)), [1.0] * (early + 1))
    assert [each.thresholds for each in path] == [(math.inf,) * early]
    assert path[0].shares == (0.0,) * early + (1.0,)


def test_one_exit_has_no_thresholds():
    path = propose_path(np.empty((0, 5), np.float32), np.zeros((1, 5)), [2.0])
    assert [(each.thresholds, each.cost, each.shares) for each in path] == [((), 2.0, (1.0,))]


def test_scores_that_are_all_nan_never_leave():
    path = propose_path(np.full((2, 500), np.nan, dtype=np.float32), np.zeros((3, 500)), [1.0, 2.0, 3.0])
    assert [each.thresholds for each in path] == [(math.inf, math.inf)]


@given(problems(), st.floats(0.5, 9))
@settings(max_examples=80, deadline=None)
def test_a_budget_is_kept_or_refused(problem, budget):
    scores, losses, costs, heads = problem
    if propose_path(scores, losses, costs, heads=heads, points=4000)[-1].cost > budget:
        with pytest.raises(CalibrationError, match="the cheapest costs"):
            propose_budget(scores, losses, costs, budget=budget, heads=heads)
    else:
        found = propose_budget(scores, losses, costs, budget=budget, heads=heads)
        assert found.cost <= budget
        assert outcome(scores, losses, costs, heads, found.thresholds)[2] == pytest.approx(found.cost)


def test_a_budget_is_used_and_beats_msdnets_solver_on_new_samples():
    scores, losses, costs = cascade(5, 24_000)
    part, new = np.s_[:, :4000], np.s_[:, 4000:]
    risks = []
    for budget in (1.6, 2.0, 2.4, 2.8):
        ours = propose_budget(scores[part], losses[part], costs, budget=budget)
        assert 0.98 * budget <= ours.cost <= budget
        theirs = msdnet_budget(scores[part], costs, budget=budget)
        risks.append([evaluate(scores[new], losses[new], costs, thresholds=t).risk for t in (ours.thresholds, theirs)])
    assert all(ours <= theirs for ours, theirs in risks)


def test_msdnets_thresholds_by_hand():
    """p = 1: a third of nine samples at each exit, the third-largest score among those still there."""
    scores = np.asarray([
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
        [0.0, 0.0, 0.99, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95],
    ], dtype=np.float32)  # fmt: skip
    assert solve._msdnet_thresholds(scores, 1.0).tolist() == np.float32([0.7, 0.8]).tolist()
    # 1/3 + 1/9 of a share each: few leave at all with p above 1, and none where the share is below one sample.
    assert solve._msdnet_thresholds(scores[:, :1], 1.0).tolist() == [math.inf, math.inf]


def test_msdnet_takes_the_dearest_within_budget():
    scores, losses, costs = cascade(4, 2000)
    cheap, dear = (msdnet_budget(scores, costs, budget=budget) for budget in (1.5, 2.5))
    found = [evaluate(scores, losses, costs, thresholds=each).cost for each in (cheap, dear)]
    assert found[0] <= 1.5 < found[1] <= 2.5
    with pytest.raises(CalibrationError, match=r"nothing that costs 0.5 or less"):
        msdnet_budget(scores, costs, budget=0.5)


BAD = {
    "do not fit": {"losses": np.zeros((2, 4))},
    "scores must be float32": {"scores": np.zeros((2, 4))},
    "costs and heads must be finite": {"costs": [1.0, math.nan, 2.0]},
    "a loss is NaN": {"losses": np.full((3, 4), np.nan)},
    "a score is infinite": {"scores": np.full((2, 4), np.inf, dtype=np.float32)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    given_values = {"scores": np.zeros((2, 4), np.float32), "losses": np.zeros((3, 4)), "costs": [1.0, 2.0, 3.0]}
    with pytest.raises(CalibrationError, match=message):
        propose_path(**{**given_values, **BAD[message]})


def test_a_path_of_one_point_is_refused():
    with pytest.raises(CalibrationError, match="points is 1"):
        propose_path(np.zeros((1, 2), np.float32), np.zeros((2, 2)), [1.0, 2.0], points=1)
    with pytest.raises(CalibrationError, match="2 thresholds for 1 exits"):
        evaluate(np.zeros((1, 2), np.float32), np.zeros((2, 2)), [1.0, 2.0], thresholds=[1.0, 2.0])
