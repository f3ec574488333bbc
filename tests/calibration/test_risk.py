from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from edgekit.calibration import risk
from edgekit.calibration.risk import (
    TESTS,
    binomial_p_value,
    clopper_pearson_lower,
    clopper_pearson_upper,
    hoeffding_bentkus_p_value,
    p_value,
    require_losses,
    samples_for_power,
    smallest_sample,
    ternary_p_value,
    wsr_p_value,
)
from edgekit.errors import CalibrationError

SHARES = st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.3]) | st.floats(1e-4, 1 - 1e-4)
COUNTS = st.integers(1, 1_000_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
NEAR = st.tuples(st.integers(1, 1_000_000), st.floats(-8, 8))
"""A sample size and standard deviations from the mean, where p-values decide."""


def wsr_step_by_step(losses, epsilon, delta):
    """As CALIBRATION states it, one sample after the other."""
    n, total, squares, variance, log_wealth, best = len(losses), 0.0, 0.0, 0.25, 0.0, 0.0
    for i, loss in enumerate(losses, start=1):
        bet = min(math.sqrt(2 * math.log(1 / delta) / (n * variance)), 0.99 / (1 - epsilon))
        log_wealth += math.log(1 - bet * (loss - epsilon))
        best = max(best, log_wealth)
        total += loss
        squares += (loss - total / (1 + i)) ** 2
        variance = (0.25 + squares) / (1 + i)
    return math.exp(-best)


@given(COUNTS, SHARES)
@settings(max_examples=200, deadline=None)
def test_binomial_is_scipys(counts, epsilon):
    k, n = counts
    expected = special.betaincc(k + 1, n - k, epsilon) if k < n else 1.0
    assert binomial_p_value(k, n, epsilon) == pytest.approx(expected, rel=1e-9, abs=1e-290)


@given(NEAR, SHARES)
@settings(max_examples=200, deadline=None)
def test_binomial_is_scipys_where_p_values_decide(near, epsilon):
    n, deviations = near
    k = int(np.clip(n * epsilon + deviations * math.sqrt(n * epsilon * (1 - epsilon)), 0, n))
    mine = binomial_p_value(k, n, epsilon)
    assert mine == pytest.approx(stats.binomtest(k, n, epsilon, alternative="less").pvalue, rel=1e-9, abs=1e-290)
    for delta in (0.05, 0.2):
        upper = special.betaincinv(k + 1, n - k, 1 - delta) if k < n else 1.0
        lower = special.betaincinv(k, n - k + 1, delta) if k else 0.0
        assert clopper_pearson_upper(k, n, delta) == pytest.approx(upper, rel=1e-9)
        assert clopper_pearson_lower(k, n, delta) == pytest.approx(lower, rel=1e-9)


def test_binomial_by_hand():
    assert binomial_p_value(0, 1, 0.25) == pytest.approx(0.75)
    assert binomial_p_value(1, 3, 0.5) == pytest.approx(0.5)
    assert binomial_p_value(2, 4, 0.25) == pytest.approx((81 + 108 + 54) / 256)
    assert binomial_p_value(4, 4, 0.25) == 1.0
    assert binomial_p_value(0, 0, 0.25) == 1.0
    assert binomial_p_value(0, 1_000_000, 0.5) == 0.0  # underflows, as it may
    assert binomial_p_value(0, 1_000_000, 1e-5) == pytest.approx(math.exp(1e6 * math.log1p(-1e-5)), rel=1e-13, abs=0)


@given(st.integers(0, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), SHARES, st.floats(0.01, 0.5))
@settings(deadline=None)
def test_an_upper_bound_at_epsilon_is_a_p_value_at_delta(counts, epsilon, delta):
    """The bound and the test are two readings of one thing."""
    k, n = counts
    upper, p = clopper_pearson_upper(k, n, delta), binomial_p_value(k, n, epsilon)
    assert (upper <= epsilon) == (p <= delta) or abs(p - delta) < 1e-9
    assert clopper_pearson_lower(k, n, delta) <= (k / n if n else 0) <= upper


@pytest.mark.parametrize("k", [0, 3, 7])
def test_clopper_pearson_misses_a_rate_as_seldom_as_it_says(k):
    upper = clopper_pearson_upper(k, 20, 0.1)
    assert stats.binom.cdf(k, 20, upper) == pytest.approx(0.1)
    if k:
        assert stats.binom.sf(k - 1, 20, clopper_pearson_lower(k, 20, 0.1)) == pytest.approx(0.1)


@pytest.mark.parametrize("function", [binomial_p_value, clopper_pearson_upper, clopper_pearson_lower])
@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, -1), (1.5, 3), (1, "3")])
def test_counts_that_are_none(function, k, n):
    with pytest.raises(CalibrationError, match=r"count|whole numbers"):
        function(k, n, 0.1)


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.0, 0.0, 1.0]) | st.floats(-5, 1), max_size=60),
    st.sampled_from([0.01, 0.05, 0.5]),
    st.sampled_from([0.05, 0.2]),
)
@settings(deadline=None)
def test_betting_is_the_gamble_played_step_by_step(losses, epsilon, delta):
    mine = wsr_p_value(np.array(losses), epsilon, delta)
    assert mine == pytest.approx(wsr_step_by_step(losses, epsilon, delta), rel=1e-9)
    assert 0 < mine <= 1


def test_betting_by_hand():
    """One sample: the bet is min(sqrt(2 ln 10 / .25), .99 / .9) = 1.1, the wealth 1 - 1.1 (0 - .1)."""
    assert wsr_p_value(np.zeros(1), 0.1, 0.1) == pytest.approx(1 / (1 + 1.1 * 0.1))
    assert wsr_p_value(np.ones(1), 0.1, 0.1) == 1.0
    assert wsr_p_value(np.full(1, -3.0), 0.1, 0.1) == pytest.approx(1 / (1 + 1.1 * 3.1))


def test_betting_leaves_its_input_as_it_was():
    losses = np.array([0.0, 1.0, -1.0, 0.0])
    wsr_p_value(losses, 0.1, 0.1)
    assert losses.tolist() == [0.0, 1.0, -1.0, 0.0]


def walk_tail(end, n, plus, minus):
    """P[sum of n steps of 1, -1 and 0 <= end], step by step."""
    masses = {0: 1.0}
    for _ in range(n):
        following: dict[int, float] = {}
        for place, mass in masses.items():
            for step, share in ((1, plus), (-1, minus), (0, 1 - plus - minus)):
                following[place + step] = following.get(place + step, 0.0) + mass * share
        masses = following
    return sum(mass for place, mass in masses.items() if place <= end)


@given(
    st.integers(1, 40),
    st.integers(-40, 40),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
)
@settings(max_examples=60, deadline=None)
def test_sums_of_signed_losses_are_added_up_exactly(n, end, plus, minus):
    end = max(-n, min(n, end))
    found = risk._walk_tails(end, n, plus=np.array([plus]), minus=np.array([minus]))[0]
    assert found == pytest.approx(walk_tail(end, n, plus, minus), abs=1e-11)


@pytest.mark.parametrize("epsilon", [0.02, 0.1])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.45])
def test_ternary_errs_no_more_than_delta_whatever_the_share_of_zeros(epsilon, share):
    """At the boundary, over every pair of counts there can be; exactly."""
    n, plus, minus = 60, share + epsilon, share
    zero = 1 - plus - minus
    for delta in (0.05, 0.2):
        total = 0.0
        for lost in range(n + 1):
            for gained in range(n + 1 - lost):
                mass = stats.multinomial.pmf([lost, gained, n - lost - gained], n, [plus, minus, zero])
                if mass > 1e-9 and ternary_p_value(lost, gained, n, epsilon, delta) <= delta:
                    total += mass
        assert total <= delta + 1e-6


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))))
@settings(max_examples=100, deadline=None)
def test_ternary_is_not_below_what_it_is_at_any_rate_in_question(counts):
    """Against the largest over a fine grid of rates up to the upper bound, summed by the other way."""
    n, lost, gained = counts
    gained = min(gained, n - lost)
    epsilon, delta = 0.05, 0.1
    found = ternary_p_value(lost, gained, n, epsilon, delta)
    top = clopper_pearson_upper(lost + gained, n, 0.05 * delta)
    rates = np.linspace(epsilon, max(top, epsilon), 50)
    tails = risk._walk_tails(lost - gained, n, plus=(rates + epsilon) / 2, minus=(rates - epsilon) / 2)
    assert found >= (tails.max() if top >= epsilon else 0.0) - 1e-9
    assert found <= 1


@pytest.mark.parametrize("delta", [0.001, 0.01, 0.05, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("epsilon", [0.005, 0.02, 0.1])
def test_very_few_signed_losses_are_tested_by_betting(epsilon, delta):
    """There is no number of samples, all without loss, that passes while some more do not."""
    least = smallest_sample(epsilon, delta, "ternary")
    assert least == smallest_sample(epsilon, delta, "wsr")
    for n in range(least, 12 * least, max(1, least // 20)):
        assert p_value(np.zeros(n), test="ternary", epsilon=epsilon, delta=delta) <= delta


def test_ternary_of_a_million_is_betting():
    losses = np.zeros(30_000)
    losses[:300] = 1
    given = {"epsilon": 0.02, "delta": 0.1}
    assert p_value(losses, test="ternary", **given) == p_value(losses, test="wsr", **given)


def test_betting_uses_the_order_and_the_others_do_not():
    losses = np.repeat([0.0, 1.0], [150, 3])
    for test in TESTS:
        forth, back = (p_value(each, test=test, epsilon=0.05, delta=0.1) for each in (losses, losses[::-1].copy()))
        assert (forth == back) is (test != "wsr")


def test_betting_takes_a_million_samples_quickly():
    losses = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 1_000_000, p=[0.01, 0.97, 0.02])
    times = []
    for _ in range(5):
        start = time.thread_time_ns()
        wsr_p_value(losses, 0.02, 0.1)
        times.append(time.thread_time_ns() - start)
    assert min(times) < 100e6


@pytest.mark.parametrize("n", [1, 20, 1000])
@pytest.mark.parametrize("share", [0, 0.02, 0.0415, 0.05, 0.4, 1])
def test_hoeffding_bentkus_is_its_formula(n, share):
    total, epsilon = share * n, 0.05
    mean = min(total / n, epsilon)
    divergence = special.rel_entr(mean, epsilon) + special.rel_entr(1 - mean, 1 - epsilon)
    bentkus = math.e * stats.binom.cdf(math.ceil(round(total, 9)), n, epsilon)
    mine = hoeffding_bentkus_p_value(total, n, epsilon)
    assert mine == pytest.approx(min(1.0, math.exp(-n * divergence), bentkus), rel=1e-9)


def test_hoeffding_bentkus_counts_ten_tenths_as_one():
    """In floating point 10 * 0.1 summed is below 1, and 3 * 0.1 * 10 above 3: neither moves the count."""
    exact = hoeffding_bentkus_p_value(1, 300, 0.02)
    for losses in ([0.1] * 10, [0.1 + 1e-17] * 10, [0.7, 0.1, 0.2]):
        padded = np.array(losses + [0.0] * (300 - len(losses)))
        assert p_value(padded, test="hoeffding-bentkus", epsilon=0.02, delta=0.1) == exact
    assert hoeffding_bentkus_p_value(3 * 0.1 * 10, 300, 0.02) == hoeffding_bentkus_p_value(3, 300, 0.02)
    assert hoeffding_bentkus_p_value(1.001, 300, 0.02) > exact


@given(COUNTS, SHARES)
@settings(deadline=None)
def test_hoeffding_bentkus_never_beats_the_exact_test_of_a_count(counts, epsilon):
    k, n = counts
    assert hoeffding_bentkus_p_value(k, n, epsilon) >= binomial_p_value(k, n, epsilon) * (1 - 1e-9)


@pytest.mark.parametrize("total", [-0.1, 3.1, math.nan])
def test_a_sum_that_cannot_be(total):
    with pytest.raises(CalibrationError, match="cannot come from 3 losses"):
        hoeffding_bentkus_p_value(total, 3, 0.1)


@pytest.mark.parametrize("test", TESTS)
def test_no_samples_prove_nothing(test):
    assert p_value(np.empty(0), test=test, epsilon=0.05, delta=0.1) == 1.0
    assert p_value(np.zeros(1), test=test, epsilon=0.05, delta=0.1) > 0.9


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_shares_outside_their_range(test, bad):
    with pytest.raises(CalibrationError, match=f"epsilon must be above 0 and below 1, not {bad}"):
        p_value(np.zeros(3), test=test, epsilon=bad, delta=0.1)
    for call in (smallest_sample, lambda e, d, t: samples_for_power(e, d, risk=0.0)):
        with pytest.raises(CalibrationError, match="epsilon must be"):
            call(bad, 0.1, test)
        with pytest.raises(CalibrationError, match="delta must be"):
            call(0.1, bad, test)
    with pytest.raises(CalibrationError, match="delta must be"):
        wsr_p_value(np.zeros(3), 0.1, bad)
    with pytest.raises(CalibrationError, match="delta must be"):
        clopper_pearson_upper(1, 3, bad)


@pytest.mark.parametrize(
    ("test", "bad", "need"),
    [("binomial", 0.5, "of 0 or 1"), ("binomial", -1, "of 0 or 1"), ("binomial", math.nan, "of 0 or 1"),
     ("hoeffding-bentkus", -0.1, "from 0 to 1"), ("hoeffding-bentkus", 1.5, "from 0 to 1"),
     ("ternary", 0.5, "of -1, 0 or 1"), ("ternary", math.nan, "of -1, 0 or 1"),
     ("wsr", 1.5, "finite and at most 1"), ("wsr", math.nan, "finite and at most 1"),
     ("wsr", -math.inf, "finite and at most 1")],
)  # fmt: skip
def test_losses_that_a_test_does_not_take(test, bad, need):
    with pytest.raises(CalibrationError, match=f"test '{test}' needs losses .*{need}; sample 2 has {bad}"):
        p_value(np.array([0.0, 1.0, bad]), test=test, epsilon=0.1, delta=0.1)
    with pytest.raises(CalibrationError, match=f"exit 1 of sample 0 has {bad}"):
        require_losses(np.array([[0.0, 1.0], [bad, 0.0]]), test)


def test_an_unknown_test():
    with pytest.raises(CalibrationError, match="test 'guess' is not one of binomial, ternary, wsr, hoeffding-bentkus"):
        p_value(np.zeros(3), test="guess", epsilon=0.1, delta=0.1)


@pytest.mark.parametrize("delta", [0.05, 0.1, 0.81])
@pytest.mark.parametrize("epsilon", [0.01, 0.02, 0.05, 0.1, 0.9])
@pytest.mark.parametrize("test", TESTS)
def test_the_smallest_sample_is_the_first_that_can_pass(test, epsilon, delta):
    n = smallest_sample(epsilon, delta, test)
    assert p_value(np.zeros(n), test=test, epsilon=epsilon, delta=delta) <= delta
    assert n == 1 or p_value(np.zeros(n - 1), test=test, epsilon=epsilon, delta=delta) > delta


def test_smallest_samples_of_the_literature():
    """ceil(ln delta / ln(1 - epsilon)), by hand."""
    assert [smallest_sample(epsilon, 0.1) for epsilon in (0.01, 0.02, 0.05)] == [230, 114, 45]
    assert [smallest_sample(epsilon, 0.05) for epsilon in (0.01, 0.02, 0.05)] == [299, 149, 59]
    assert [smallest_sample(epsilon, 0.1, "wsr") for epsilon in (0.01, 0.02, 0.05)] == [236, 117, 46]


@pytest.mark.parametrize("power", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("epsilon", [0.02, 0.05, 0.1, 0.3])
def test_samples_for_power_by_trying_every_size(epsilon, power):
    sizes = np.arange(1, 6000)
    for rate in (0, epsilon / 4, epsilon / 2, 0.6 * epsilon):
        accepted = stats.binom.ppf(0.1, sizes, epsilon).astype(int)
        accepted -= stats.binom.cdf(accepted, sizes, epsilon) > 0.1
        short = np.flatnonzero(stats.binom.cdf(accepted, sizes, rate) < power)
        assert samples_for_power(epsilon, 0.1, risk=rate, power=power) == sizes[short[-1]] + 1


def test_samples_for_power_of_hoeffding_bentkus_are_more():
    assert samples_for_power(0.02, 0.1, risk=0.01) == 1120
    assert samples_for_power(0.02, 0.1, risk=0.01, test="hoeffding-bentkus") > 1300
    with pytest.raises(CalibrationError, match="power of test 'wsr' is not known"):
        samples_for_power(0.02, 0.1, risk=0.01, test="wsr")
    with pytest.raises(CalibrationError, match="risk must be from 0 to below epsilon"):
        samples_for_power(0.02, 0.1, risk=0.02)


def boundary_losses(kind, epsilon, shape, rng):
    """Losses whose mean is epsilon exactly: the hypothesis holds, and only just."""
    if kind == "count":
        return (rng.random(shape) < epsilon).astype(float)
    if kind == "uniform":
        return rng.uniform(0, 2 * epsilon, shape)
    gain = float(kind)
    drawn = rng.random(shape)
    return (drawn < gain + epsilon).astype(float) - (drawn > 1 - gain)


@pytest.mark.parametrize("n", [60, 200])
@pytest.mark.parametrize(("test", "kind"), [
    ("binomial", "count"), ("hoeffding-bentkus", "count"), ("hoeffding-bentkus", "uniform"),
    ("ternary", "count"), ("ternary", "0.01"), ("ternary", "0.3"),
    ("wsr", "count"), ("wsr", "uniform"), ("wsr", "0.01"), ("wsr", "0.3"),
])  # fmt: skip
def test_at_the_boundary_a_test_errs_no_more_than_delta(test, kind, n):
    """The same test with epsilon raised has to reject: a test that never does would pass the first half."""
    losses = boundary_losses(kind, 0.05, (1500, n), np.random.default_rng(n))
    rate = np.mean([p_value(each, test=test, epsilon=0.05, delta=0.1) <= 0.1 for each in losses])
    assert rate <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / len(losses))
    assert np.mean([p_value(each, test=test, epsilon=0.4, delta=0.1) <= 0.1 for each in losses[:200]]) > 0.5
