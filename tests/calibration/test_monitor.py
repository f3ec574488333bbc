from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betaln

from edgekit.calibration.monitor import Detector, Mean, Monitor
from edgekit.errors import CalibrationError

KINDS = (Monitor, Detector)


def loss(rng, kind, epsilon, size):
    """Losses of mean exactly ``epsilon``: 0 and 1; spread over [0, 1]; -1, 0 and 1."""
    if kind == "binary":
        return (rng.random(size) < epsilon).astype(float)
    if kind == "spread":
        return rng.beta(epsilon, 1 - epsilon, size)
    return rng.choice([-1.0, 0.0, 1.0], size, p=[0.04, 0.96 - 0.04 - epsilon, 0.04 + epsilon])


@pytest.mark.parametrize("epsilon", [0.02, 0.1])
@pytest.mark.parametrize("kind", ["binary", "spread", "signed"])
def test_false_alarms_of_long_streams_stay_below_alpha(kind, epsilon):
    """At the boundary, where they are most frequent; 600 streams of 2000 audits, and Ville's bound is for endless."""
    rng, alpha, streams = np.random.default_rng(5), 0.05, 600
    alarms = 0
    for _ in range(streams):
        monitor = Monitor(epsilon=epsilon, limit=1 / alpha, lowest=-1.0 if kind == "signed" else 0.0)
        monitor.add(loss(rng, kind, epsilon, 2000))
        alarms += monitor.alarm
    assert alarms / streams <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / streams)
    assert alarms > 0, "a test that never rejects would pass too"


def test_a_naive_monitor_would_be_caught():
    """Looking after every audit whether the exact p-value is below alpha: the control that must fail."""
    from scipy.stats import binom

    rng, alpha, streams = np.random.default_rng(5), 0.05, 300
    sums = np.cumsum(loss(rng, "binary", 0.1, (streams, 2000)), axis=1)
    p = binom.sf(sums - 1, np.arange(1, 2001), 0.1)
    assert (p < alpha).any(axis=1).mean() > 0.2


@pytest.mark.parametrize(("rate", "mean_delay"), [(0.04, 752), (0.06, 213), (0.10, 77)])
def test_delays(rate, mean_delay):
    """Measured on other streams; not much above ``ln(1 / alpha) / KL``, that no test can beat in the mean."""
    rng, epsilon, alpha = np.random.default_rng(11), 0.02, 0.01
    delays = []
    for _ in range(200):
        monitor = Monitor(epsilon=epsilon, limit=1 / alpha)
        monitor.add((rng.random(6000) < rate).astype(float))
        delays.append(monitor.alarm_at)
    divergence = rate * math.log(rate / epsilon) + (1 - rate) * math.log((1 - rate) / (1 - epsilon))
    least = math.log(1 / alpha) / divergence
    assert least * 0.95 <= np.mean(delays) <= 1.5 * least
    assert np.mean(delays) == pytest.approx(mean_delay, rel=0.2)


def test_a_good_history_delays_the_monitor_but_not_the_detector():
    rng = np.random.default_rng(2)
    delays = {kind: [] for kind in KINDS}
    for _ in range(10):
        stream = np.concatenate([rng.random(3000) < 0.005, rng.random(4000) < 0.06]).astype(float)
        for kind in KINDS:
            test = kind(epsilon=0.02, limit=100.0 if kind is Monitor else 10_000.0)
            test.add(stream)
            delays[kind].append((test.alarm_at or 7001) - 3000)
    assert min(delays[Detector]) > 0, "no false alarm in the good part"
    assert np.mean(delays[Detector]) < 350
    assert np.mean(delays[Monitor]) > 2 * np.mean(delays[Detector])


def test_the_detectors_mean_run_length_keeps_its_bound():
    rng, limit = np.random.default_rng(3), 100.0
    lengths = []
    for _ in range(150):
        detector = Detector(epsilon=0.1, limit=limit)
        detector.add(loss(rng, "binary", 0.1, 2000))
        lengths.append(detector.alarm_at or 2000)  # cut short: the true mean is larger still
    assert np.mean(lengths) >= limit
    assert max(lengths) < 2000, "on an endless stream it alarms some day"


def by_the_formula(losses, epsilon, lowest, kind):
    """The mixture, written down in exact order without logarithms."""
    bets = np.geomspace(epsilon / 2, 0.5, 8) / (epsilon - lowest)
    capital = np.ones(8) if kind is Monitor else np.zeros(8)
    for x in losses:
        capital = (capital + (kind is Detector)) * (1 + bets * (x - epsilon))
    return capital.mean()


@pytest.mark.parametrize("kind", KINDS)
@given(losses=st.lists(st.sampled_from([0.0, 1.0, 0.25, 0.0]), min_size=1, max_size=60), cut=st.integers(0, 60))
def test_evidence_is_the_formula_however_the_losses_come(kind, losses, cut):
    whole, parts = (kind(epsilon=0.05, limit=1e9) for _ in range(2))
    whole.add(losses)
    parts.add(losses[:cut])
    parts = msgspec.json.decode(msgspec.json.encode(parts), type=kind)  # a restart
    for each in losses[cut:]:
        parts.add(each)
    assert parts == whole
    assert math.exp(whole.log_e) == pytest.approx(by_the_formula(losses, 0.05, 0.0, kind), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_alarm_is_at_the_first_audit_that_reaches_the_limit(kind):
    losses = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    evidence = [by_the_formula(losses[:count], 0.05, 0.0, kind) for count in range(1, 9)]
    test = kind(epsilon=0.05, limit=evidence[4] * (1 - 1e-9))
    test.add(losses)
    assert evidence[3] < test.limit < evidence[5]
    assert test.alarm_at == 5


@pytest.mark.parametrize("kind", KINDS)
@given(st.floats(1e-4, 0.5), st.sampled_from([0.0, -1.0]), st.integers(0, 10))
def test_evidence_stays_a_number(kind, epsilon, lowest, seed):
    """Whatever comes: all bets keep some capital after the worst losses, and none overflows after the best."""
    stream = np.random.default_rng(seed).choice([lowest, 1.0], 50)
    test = kind(epsilon=epsilon, limit=100.0, lowest=lowest)
    test.add(stream)
    test.add(np.ones(3000))
    assert np.isfinite(test.logs).all()
    assert test.alarm
    assert test.alarm_at <= 3050
    test.add(np.full(3000, lowest))
    assert np.isfinite(test.logs).all()
    assert test.alarm, "an alarm is not taken back"


def test_nothing_is_known_before_the_first_audit():
    assert Monitor(epsilon=0.1, limit=100.0).log_e == 0
    assert Detector(epsilon=0.1, limit=100.0).log_e == -math.inf
    test = Monitor(epsilon=0.1, limit=100.0)
    test.add([])
    assert test == Monitor(epsilon=0.1, limit=100.0)
    assert (Mean().mean, Mean().bounds(), Mean().bounds(signed=True)) == (None, (0, 1), (-1, 1))


@pytest.mark.parametrize(("options", "message"), [
    ({"epsilon": 0.0}, "epsilon must be"),
    ({"epsilon": math.nan}, "epsilon must be"),
    ({"limit": 0.5}, "limit must be at least 1"),
    ({"limit": math.inf}, "limit must be at least 1"),
    ({"lowest": -2.0}, "lowest must be between -1 and 0"),
    ({"logs": [0.0]}, "logs must be 8 numbers"),
])  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(CalibrationError, match=message):
        Monitor(**{"epsilon": 0.1, "limit": 100.0, **options})


@pytest.mark.parametrize("bad", [math.nan, 1.5, -0.1, [0.0, math.inf], [[0.0]]])
def test_bad_losses_change_nothing(bad):
    test = Monitor(epsilon=0.1, limit=100.0)
    with pytest.raises(CalibrationError, match="losses are single numbers between 0 and 1"):
        test.add(bad)
    assert test.audits == 0


@pytest.mark.parametrize("kind", ["binary", "spread", "signed"])
def test_bounds_of_the_mean_hold_at_all_times(kind):
    """A miss counts if the truth is outside at any of the looks of a stream."""
    rng, epsilon, error, streams = np.random.default_rng(8), 0.05, 0.1, 300
    missed = 0
    for _ in range(streams):
        mean, out = Mean(), False
        for part in loss(rng, kind, epsilon, (40, 25)):
            mean.add(part)
            low, high = mean.bounds(error=error, signed=kind == "signed")
            out |= not low <= epsilon <= high
        missed += out
    assert missed / streams <= error + 3 * math.sqrt(error * (1 - error) / streams)


@given(st.integers(1, 500), st.integers(0, 500), st.sampled_from([0.01, 0.05, 0.3]))
def test_bounds_are_where_the_mixture_reaches_its_limit(n, k, error):
    mean = Mean(audits=n, gained=float(min(k, n)))
    for bound in mean.bounds(error=error):
        if 0 < bound < 1:
            mixture = betaln(mean.gained + 0.5, n - mean.gained + 0.5) - betaln(0.5, 0.5)
            log_e = mixture - mean.gained * math.log(bound) - (n - mean.gained) * math.log1p(-bound)
            assert log_e == pytest.approx(-math.log(error), abs=1e-5)


def test_bounds_shrink_towards_the_mean():
    mean = Mean()
    mean.add(np.tile([0.0] * 9 + [1.0], 1000))
    low, high = mean.bounds()
    assert mean.mean == pytest.approx(0.1)
    assert 0.085 < low < 0.1 < high < 0.115
    signed = Mean()
    signed.add(np.tile([0.0] * 8 + [1.0, -1.0], 1000))
    low, high = signed.bounds(signed=True)
    assert signed.mean == pytest.approx(0)
    assert -0.03 < low < 0 < high < 0.03


@pytest.mark.parametrize("loss_of_all", [0.0, 1.0])
def test_bounds_of_losses_that_are_all_alike(loss_of_all):
    mean = Mean()
    mean.add(np.full(500, loss_of_all))
    low, high = mean.bounds()
    assert (low if loss_of_all == 0 else high) == loss_of_all
    assert 0 < high - low < 0.02
