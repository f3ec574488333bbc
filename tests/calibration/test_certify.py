from __future__ import annotations

import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from edgekit.calibration.certify import Risk, certify, certify_strict, fixed_sequence, shuffled
from edgekit.calibration.losses import accuracy_gap
from edgekit.calibration.risk import TESTS, smallest_sample
from edgekit.calibration.thresholds import exits_taken
from edgekit.errors import CalibrationError

INF = math.inf
NEVER = (INF, INF)


def cascade(samples, *, seed=0, whole=True, signed=False):
    """Scores of two exits, and losses that are the likelier the lower the score."""
    rng = np.random.default_rng(seed)
    scores = rng.random((2, samples), dtype=np.float32)
    wrong = rng.random((2, samples)) < 0.3 * (1 - scores) ** 2
    losses = np.zeros((3, samples))
    losses[:2] = wrong if whole else wrong * rng.random((2, samples))
    if signed:
        losses[:2] -= rng.random((2, samples)) < 0.005
    return scores, losses


def path_of(points=20):
    return [NEVER, *((value, value) for value in np.linspace(1, 0, points))]


def counts(k, n):
    return np.repeat([1.0, 0.0], [k, n - k])


def test_a_sequence_stops_at_its_first_failure_and_asks_for_no_more():
    """Of 200 with epsilon .05, delta .1: 5 losses pass (p = .062), 6 fail (p = .124)."""
    asked = []

    def candidates():
        for k in (0, 5, 6, 0):
            asked.append(k)
            yield (counts(k, 200),)

    outcome = fixed_sequence(candidates(), [Risk(epsilon=0.05, test="binomial")], 0.1)
    assert asked == [0, 5, 6]
    assert [each.losses for each in outcome.accepted] == [(0.0,), (0.025,)]
    assert [each.place for each in outcome.accepted] == [0, 1]
    assert [each.p_value for each in outcome.accepted] == [pytest.approx(stats.binom.cdf(k, 200, 0.05)) for k in (0, 5)]
    assert outcome.failed.p_value == pytest.approx(stats.binom.cdf(6, 200, 0.05))
    assert outcome.failed.place == 2


def test_a_failure_is_never_among_the_accepted():
    """The known fault of public code: returning the first that fails."""
    outcome = fixed_sequence([(counts(200, 200),)], [Risk(epsilon=0.05, test="binomial")], 0.1)
    assert outcome.accepted == ()
    assert outcome.failed.losses == (1.0,)


def test_a_p_value_equal_to_delta_is_accepted():
    p = fixed_sequence([(counts(3, 50),)], [Risk(epsilon=0.1, test="binomial")], 0.5).accepted[0].p_value
    risks = [Risk(epsilon=0.1, test="binomial")]
    assert len(fixed_sequence([(counts(3, 50),)], risks, p).accepted) == 1
    assert len(fixed_sequence([(counts(3, 50),)], risks, np.nextafter(p, 0)).accepted) == 0


def test_of_several_risks_the_worst_decides():
    risks = [Risk(epsilon=0.05, test="binomial"), Risk(epsilon=0.2, test="wsr")]
    both = fixed_sequence([(counts(5, 200), np.full(150, -0.5))], risks, 0.1).accepted[0]
    assert both.p_value == both.p_values[0] == pytest.approx(stats.binom.cdf(5, 200, 0.05))
    assert both.samples == (200, 150)
    assert both.losses == (0.025, -0.5)
    for losses in ((counts(6, 200), np.full(150, -0.5)), (counts(5, 200), np.full(150, 0.2))):
        assert fixed_sequence([losses], risks, 0.1).accepted == ()


def test_sequences_that_make_no_sense():
    risk = Risk(epsilon=0.05, test="binomial")
    with pytest.raises(CalibrationError, match="at least one risk"):
        fixed_sequence([], [], 0.1)
    with pytest.raises(CalibrationError, match="candidate 1 has losses for 2 risks, not 1"):
        fixed_sequence([(np.zeros(200),), (np.zeros(200), np.zeros(200))], [risk], 0.1)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(CalibrationError, match="delta must be above 0 and below 1"):
            fixed_sequence([], [risk], delta)


@pytest.mark.parametrize("test", TESTS)
def test_a_path_is_accepted_up_to_the_first_policy_that_fails(test):
    scores, losses = cascade(1000, whole=test in ("binomial", "ternary"), signed=test == "wsr")
    path = path_of()
    found = certify(scores, losses, path, epsilon=0.05, delta=0.1, test=test, seed=3)
    assert 3 < len(found.accepted) < len(path)
    assert found.enough
    for place, verdict in enumerate([*found.accepted, found.failed]):
        assert verdict.place == place
        assert verdict.thresholds == tuple(np.float32(path[place]).tolist())
        taken = exits_taken(scores, path[place])
        assert verdict.exits == tuple(np.bincount(taken, minlength=3))
        assert verdict.samples == (1000,)
        assert verdict.losses[0] == pytest.approx(losses[taken, np.arange(1000)].mean())
        assert (verdict.p_value <= 0.1) is (verdict is not found.failed)
    assert found.accepted[0].p_value == 0.0
    assert (
        certify(scores, losses, path[: len(found.accepted)], epsilon=0.05, delta=0.1, test=test, seed=3).failed is None
    )


def test_the_binomial_verdict_is_the_textbooks():
    scores, losses = cascade(500)
    found = certify(scores, losses, path_of(), epsilon=0.05, delta=0.1, test="binomial")
    for verdict in found.accepted[1:]:
        lost = losses[exits_taken(scores, verdict.thresholds), np.arange(500)].sum()
        assert verdict.p_value == pytest.approx(stats.binomtest(int(lost), 500, 0.05, alternative="less").pvalue)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["binomial", "hoeffding-bentkus"]))
@settings(max_examples=25, deadline=None)
def test_permuting_the_samples_changes_nothing(seed, test):
    scores, losses = cascade(300, whole=test == "binomial")
    order = np.random.default_rng(seed).permutation(300)
    options = {"epsilon": 0.05, "delta": 0.1, "test": test}
    for function in (certify, certify_strict):
        before = function(scores, losses, path_of(), **options)
        after = function(scores[:, order], losses[:, order], path_of(), **options)
        assert [each.p_values for each in before.accepted] == [each.p_values for each in after.accepted]
        assert [each.exits for each in before.accepted] == [each.exits for each in after.accepted]
        assert before.failed.p_values == after.failed.p_values


def test_betting_is_the_same_for_the_same_seed_and_another_for_another():
    scores, losses = cascade(1000, signed=True)
    first, same, other = (
        certify(scores, losses, path_of(), epsilon=0.05, delta=0.1, test="wsr", seed=seed) for seed in (1, 1, 2)
    )
    assert first == same
    assert first.failed.p_values != other.failed.p_values or first.accepted[-1] != other.accepted[-1]


def test_the_shuffle_is_fixed_for_ever():
    assert shuffled(8, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sorted(shuffled(1000, 5).tolist()) == list(range(1000))
    assert shuffled(0, 5).tolist() == []


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("function", [certify, certify_strict])
def test_too_few_samples_leave_never_exit_and_the_count_that_is_needed(test, function):
    needed = smallest_sample(0.05, 0.1, test)
    for samples in (0, 1, needed - 1, needed):
        scores, losses = np.ones((2, samples), dtype=np.float32), np.zeros((3, samples))
        found = function(scores, losses, [NEVER, (0, 0)], epsilon=0.05, delta=0.1, test=test)
        assert (found.samples, found.needed, found.enough) == (samples, needed, samples == needed)
        assert len(found.accepted) == 1 + found.enough
        assert found.accepted[0].thresholds == NEVER
        assert found.accepted[0].exits == (0, 0, samples)
        assert found.failed is None


def test_ties_leave_and_nan_stays():
    scores = np.full((2, 400), 0.5, dtype=np.float32)
    scores[:, :100] = math.nan
    path = [NEVER, (0.5, INF), (0.5, 0.5), (np.nextafter(np.float32(0.5), np.float32(1)),) * 2, (-INF, INF)]
    found = certify(scores, np.zeros((3, 400)), path, epsilon=0.05, delta=0.1, test="binomial")
    assert [each.exits for each in found.accepted] == [
        (0, 0, 400), (300, 0, 100), (300, 0, 100), (0, 0, 400), (300, 0, 100),
    ]  # fmt: skip


def test_thresholds_are_compared_in_the_precision_of_scores():
    scores = np.full((1, 100), 0.1, dtype=np.float32)
    found = certify(scores, np.zeros((2, 100)), [(INF,), (0.1,)], epsilon=0.05, delta=0.1, test="wsr")
    assert found.accepted[1].exits == (100, 0)
    assert found.accepted[1].thresholds == (float(np.float32(0.1)),)


def test_one_exit_has_only_never_exit():
    for function in (certify, certify_strict):
        scores, losses = np.empty((0, 400), dtype=np.float32), np.zeros((1, 400))
        found = function(scores, losses, [(), ()], epsilon=0.05, delta=0.1, test="binomial")
        assert [each.exits for each in found.accepted] == [(400,), (400,)]


def test_a_first_exit_better_than_the_last_passes_with_fewer_samples_than_it_takes_at_no_loss():
    """Betting profits from losses below 0; the count that is needed stays that of losses of 0."""
    losses = np.zeros((2, 200))
    losses[0, :40] = -1
    scores = np.ones((1, 200), dtype=np.float32)
    gain, none = (
        certify(scores, each, [(INF,), (0,)], epsilon=0.02, delta=0.1, test="wsr").accepted[1].p_value
        for each in (losses, np.zeros((2, 200)))
    )
    assert gain < none / 10


@pytest.mark.parametrize(("change", "message"), [
    ({"path": []}, "a path begins with never-exit"),
    ({"path": [(0.5, 0.5)]}, "a path begins with never-exit"),
    ({"path": [NEVER, (0.5,)]}, "policy 1 of the path must have 2 thresholds that are numbers"),
    ({"path": [NEVER, (0.5, math.nan)]}, "policy 1 of the path must have 2 thresholds"),
    ({"epsilon": 0.0}, "epsilon must be above 0 and below 1, not 0.0"),
    ({"epsilon": 1.0}, "epsilon must be"),
    ({"delta": -0.1}, "delta must be"),
    ({"test": "guess"}, "test 'guess' is not one of"),
    ({"scores": np.zeros(200)}, "scores have shape"),
    ({"scores": np.zeros((2, 199))}, "loss 'custom' has shape"),
    ({"scores": np.where(np.arange(400).reshape(2, 200) == 203, INF, 0)}, "exit 1 of sample 3 has an infinite score"),
    ({"losses": np.full((3, 200), 0.5)}, "of the last exit must be 0"),
    ({"losses": np.where(np.arange(600).reshape(3, 200) == 203, -1, 0)}, "0 or 1; exit 1 of sample 3 has -1.0"),
])  # fmt: skip
@pytest.mark.parametrize("function", [certify, certify_strict])
def test_what_cannot_be_certified(function, change, message):
    arguments = {
        "scores": np.zeros((2, 200)), "losses": np.zeros((3, 200)), "path": [NEVER], "epsilon": 0.05, "delta": 0.1,
        "test": "binomial",
    }  # fmt: skip
    with pytest.raises(CalibrationError, match=message):
        function(**{**arguments, **change})


def strict_reference(scores, losses, thresholds, epsilon):
    """Largest p over the exits at or before which the policy lets samples leave, sample by sample."""
    taken = exits_taken(scores, thresholds)
    worst = 0.0
    for last in range(len(scores)):
        if math.isinf(min(thresholds[: last + 1])):
            continue
        halted = [sample for sample in range(scores.shape[1]) if taken[sample] <= last]
        lost = sum(losses[taken[sample], sample] for sample in halted)
        worst = max(worst, stats.binom.cdf(lost, len(halted), epsilon) if halted else 1.0)
    return worst


def test_strict_is_the_binomial_test_of_those_who_left_so_far():
    scores, losses = cascade(600)
    for first, second in itertools.product((0.3, 0.8, INF), repeat=2):
        if (first, second) == NEVER:
            continue
        found = certify_strict(scores, losses, [NEVER, (first, second)], epsilon=0.1, delta=0.3)
        verdict = found.accepted[1] if len(found.accepted) == 2 else found.failed
        assert verdict.p_value == pytest.approx(strict_reference(scores, losses, (first, second), 0.1))
        assert (found.failed is None) is (verdict.p_value <= 0.3)
        assert verdict.samples[-1] == 600 - verdict.exits[-1]


def test_strict_refuses_what_late_exits_make_up_for():
    """200 leave at the first exit with 10 % lost, 1800 at the second with none: 1 % in all."""
    losses = np.zeros((3, 2000))
    losses[0, :20] = 1
    scores = np.zeros((2, 2000), dtype=np.float32)
    scores[0, :200] = scores[1] = 1
    options = {"epsilon": 0.02, "delta": 0.1, "test": "binomial"}
    path = [NEVER, (INF, 1), (1, 1)]
    assert len(certify(scores, losses, path, **options).accepted) == 3
    strict = certify_strict(scores, losses, path, **options)
    assert [each.thresholds for each in strict.accepted] == [NEVER, (INF, 1)]
    assert strict.failed.losses == (0.1, 0.01)
    assert strict.failed.samples == (200, 2000)


def test_strict_needs_somebody_to_leave_wherever_somebody_may():
    scores = np.zeros((2, 500), dtype=np.float32)
    found = certify_strict(scores, np.zeros((3, 500)), [NEVER, (0.5, 0)], epsilon=0.05, delta=0.1)
    assert found.failed.samples == (0, 500)
    assert math.isnan(found.failed.losses[0])
    assert found.failed.p_value == 1.0


def violations(function, draws, samples, path, epsilon, truth):
    """Share of draws in which a policy of a risk above epsilon is accepted."""
    found = (
        function(*cascade(samples, seed=seed), path, epsilon=epsilon, delta=0.1, test="binomial", seed=seed)
        for seed in range(draws)
    )
    return np.mean([any(truth[each.place] > epsilon for each in result.accepted) for result in found])


def coarse(function):
    """Three policies far apart: harmless, near epsilon from above, far above; and their true risks."""
    scores, losses = cascade(400_000, seed=10**6)
    path = [NEVER, (0.9, 0.9), (0.5, 0.5), (0.0, 0.0)]
    truth = []
    for thresholds in path:
        taken = exits_taken(scores, thresholds)
        reached = (
            [losses[taken, np.arange(len(taken))][taken <= last].mean() for last in range(2)]
            if min(thresholds) < 1
            else [0.0]
        )
        everyone = losses[taken, np.arange(len(taken))].mean()
        truth.append(everyone if function is certify else max(reached))
    return path, np.array(truth)


@pytest.mark.parametrize("function", [certify, certify_strict])
def test_accepted_policies_break_the_promise_in_at_most_delta_of_draws(function):
    path, truth = coarse(function)
    epsilon = truth[2] * 0.98  # policy 2 is just above
    rate = violations(function, 400, 1000, path, epsilon, truth)
    assert rate <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 400)
    assert rate > 0  # the boundary is near enough for the promise to be tested at all


@pytest.mark.slow
@pytest.mark.parametrize("function", [certify, certify_strict])
@pytest.mark.parametrize("samples", [1000, 3000])
def test_accepted_policies_break_the_promise_in_at_most_delta_of_many_draws(function, samples):
    path, truth = coarse(function)
    rate = violations(function, 5000, samples, path, truth[2] * 0.99, truth)
    assert 0.01 < rate <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 5000)


def seconds(function):
    """Of the processor, so that other work on the machine counts little."""
    start = time.thread_time_ns()
    function()
    return (time.thread_time_ns() - start) / 1e9


@pytest.mark.parametrize("test", TESTS)
def test_a_thousand_samples_take_no_time(test):
    """Measured 5 ms; the promise is 50."""
    scores, losses = np.random.default_rng(0).random((7, 1000), dtype=np.float32), np.zeros((8, 1000))
    path = [(INF,) * 7, *((value,) * 7 for value in np.linspace(1, 0.9, 63))]
    certify(scores, losses, path, epsilon=0.02, delta=0.1, test=test)
    runs = (seconds(lambda: certify(scores, losses, path, epsilon=0.02, delta=0.1, test=test)) for _ in range(5))
    assert min(runs) < 0.05


def test_working_memory_is_less_than_the_input():
    rng = np.random.default_rng(0)
    scores, losses = rng.random((7, 200_000), dtype=np.float32), np.zeros((8, 200_000))
    path = [(INF,) * 7, *((value,) * 7 for value in (1, 0.9, 0.5))]
    for function, test in itertools.product((certify, certify_strict), TESTS):
        tracemalloc.start()
        function(scores, losses, path, epsilon=0.02, delta=0.1, test=test)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < scores.nbytes + losses.nbytes


@pytest.mark.slow
def test_a_million_samples_take_seconds():
    rng = np.random.default_rng(0)
    scores = rng.random((7, 1_000_000), dtype=np.float32)
    right = rng.random((8, 1_000_000)) < 0.995
    losses = accuracy_gap(right.astype(np.int64), np.ones(1_000_000, dtype=np.int64))
    path = [(INF,) * 7, *((value,) * 7 for value in np.linspace(1, 0.8, 63))]
    assert seconds(lambda: certify(scores, losses, path, epsilon=0.02, delta=0.1, test="wsr")) < 6
