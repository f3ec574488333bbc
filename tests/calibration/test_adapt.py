from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.calibration.adapt import Adaptive, Recertification
from edgekit.errors import CalibrationError
from edgekit.policy import Policy

POLICY = Policy.fixed([0.7, math.inf, 0.9])
SCORES = {"max_prob": [0.7, 0.9], "margin": [0.5, 0.8], "neg_entropy": [-0.9, -0.3]}


def follow(adaptive, policy, scores, wrong, batch=1):
    """Losses of samples that are wrong at every early exit, ``batch`` of them under one shift."""
    for start in range(0, len(wrong), batch):
        rows = slice(start, start + batch)
        early = (scores[rows] >= np.array(adaptive.apply(policy).thresholds)).any(axis=1)
        adaptive.add((early & wrong[rows]).astype(float))


@pytest.mark.parametrize("score", SCORES)
@given(
    seed=st.integers(0, 1000),
    epsilon=st.floats(0.01, 0.5),
    gamma=st.floats(0.005, 0.3),
    audits=st.integers(1, 300),
    batch=st.sampled_from([1, 1, 8, 50]),
)
def test_the_long_run_bound_holds_for_every_stream(score, seed, epsilon, gamma, audits, batch):
    rng = np.random.default_rng(seed)
    policy = Policy.fixed(SCORES[score], score=score)
    adaptive = Adaptive.of(policy, classes=10, epsilon=epsilon, gamma=gamma)
    low, high = (-math.log(10), 0.0) if score == "neg_entropy" else (0.0, 1.0)
    wrong = rng.random(audits) < rng.choice([0.02, 0.2, 0.9, 1.0])
    follow(adaptive, policy, rng.uniform(low, high, (audits, 2)), wrong, batch)
    assert adaptive.together == min(batch, audits)
    excess = adaptive.mean - epsilon
    assert excess <= adaptive.bound + 1e-9
    if not adaptive.held:
        assert excess >= adaptive.lowest / (gamma * audits) - 1e-9
    assert adaptive.lowest <= adaptive.shift <= adaptive.highest + gamma * adaptive.together


@pytest.mark.parametrize("gamma", [0.02, 0.05])
def test_a_harder_mix_is_met_in_the_long_run(gamma):
    """Wrong at an exit with chance ``1 - score``, and twice that after the shift."""
    rng, epsilon = np.random.default_rng(0), 0.05
    policy = Policy.fixed([0.8])
    adaptive = Adaptive.of(policy, classes=10, epsilon=epsilon, gamma=gamma)
    scores = rng.beta(4, 1, 6000)
    wrong = rng.random(6000) < (1 - scores) * np.where(np.arange(6000) < 2000, 1, 2)
    follow(adaptive, policy, scores[:, None], wrong)
    fixed = (wrong & (scores >= np.float32(0.8)))[2000:].mean()
    assert fixed > 1.5 * epsilon
    assert abs(adaptive.mean - epsilon) <= max(adaptive.bound, 0.01)
    assert adaptive.shift > 0


def test_shifts_reach_finite_thresholds_only():
    adaptive = Adaptive.of(POLICY, classes=10, epsilon=0.1, gamma=0.25)
    assert adaptive.apply(POLICY).thresholds == POLICY.thresholds
    adaptive.add(1.0)
    np.testing.assert_allclose(adaptive.apply(POLICY).thresholds, [0.925, math.inf, math.inf], rtol=1e-6)
    assert (adaptive.highest, adaptive.lowest) == pytest.approx((0.3, -0.8), abs=1e-6)
    assert adaptive.apply(POLICY).provenance is None


def test_thresholds_stay_as_strict_as_calibrated_where_that_is_wanted():
    adaptive = Adaptive.of(POLICY, classes=10, epsilon=0.1, gamma=0.25, lowest=0.0)
    adaptive.add(np.zeros(50))
    assert (adaptive.shift, adaptive.held) == (0.0, True)
    assert adaptive.apply(POLICY).thresholds == POLICY.thresholds


@pytest.mark.parametrize(("policy", "options", "message"), [
    (Policy.never(3), {}, "never exits early; there is no threshold to adapt"),
    (Policy.fixed([-math.inf, 0.5]), {}, "lets every sample leave; there is no threshold to adapt"),
    (POLICY, {"gamma": 0.0}, "gamma must be above 0"),
    (POLICY, {"gamma": math.nan}, "gamma must be above 0"),
    (POLICY, {"epsilon": 1.0}, "epsilon must be"),
    (POLICY, {"lowest": 0.1}, "lowest must be at most 0"),
])  # fmt: skip
def test_what_cannot_be_adapted(policy, options, message):
    with pytest.raises(CalibrationError, match=message):
        Adaptive.of(policy, **{"classes": 10, "epsilon": 0.1, "gamma": 0.1, **options})


def test_attempts_spend_half_of_what_is_left():
    again = Recertification(epsilon=0.1, delta=0.2)
    assert (again.certified, again.spent, again.level) == (True, 0.0, 0.1)
    again.revert()
    levels = []
    for _ in range(5):
        levels.append(again.level)
        again.add(np.ones(again.needed))
        assert not again.certified
    assert levels == pytest.approx([0.1, 0.05, 0.025, 0.0125, 0.00625])
    assert again.spent == pytest.approx(sum(levels))
    assert again.spent < again.delta
    again.add(np.zeros(again.needed - 1))
    assert not again.certified, "not before it has as many as it said"
    assert again.add(0.0)
    assert (again.attempts, again.needed, again.fresh) == (6, 0, 0)
    assert again.add(1.0), "audits after a pass are no business of the attempt"


def test_no_attempt_passes_more_often_than_delta_at_the_boundary():
    rng, delta, epsilon, lives = np.random.default_rng(4), 0.2, 0.1, 200
    passed = 0
    for _ in range(lives):
        again = Recertification(epsilon=epsilon, delta=delta)
        again.revert()
        while again.attempts < 3 and not again.certified:
            again.add((rng.random(again.needed) < epsilon).astype(float))
        passed += again.certified
    assert passed / lives <= delta + 3 * math.sqrt(delta * (1 - delta) / lives)
    assert passed > 0


def test_a_good_policy_passes_the_first_attempt_in_nine_of_ten_cases():
    rng, passed = np.random.default_rng(4), 0
    for _ in range(200):
        again = Recertification(epsilon=0.05, delta=0.1)
        again.revert()
        passed += again.add((rng.random(again.needed) < 0.025).astype(float))
    assert passed / 200 >= 0.85


def test_a_p_value_of_ones_own_and_signed_losses():
    again = Recertification(epsilon=0.1, delta=0.2)
    again.revert()
    seen, losses = [], np.resize([-1.0, 0.0, 0.5], again.needed)
    again.add(losses, p_value=lambda x, epsilon: seen.append((x.tolist(), epsilon)) or 1.0)
    assert seen == [(losses.tolist(), 0.1)]
    assert (again.p_value, again.certified) == (1.0, False)
    assert again.add(np.full(again.needed, -1.0)), "losses below 0 count as none"


def test_attempts_go_on_after_a_restart():
    again = Recertification(epsilon=0.1, delta=0.2)
    again.revert()
    again.add([0.0, 1.0, 0.0])
    back = msgspec.json.decode(msgspec.json.encode(again), type=Recertification)
    assert back == again
    assert (back.fresh, back.losses) == (3, {1: 1.0})
