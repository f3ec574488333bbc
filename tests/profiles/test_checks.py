"""Every rule, kept and broken."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.measured import Closure, MeterFacts, Window
from edgekit.profiles import Protocol
from edgekit.profiles.checks import energy_checks, latency_checks, latency_warnings
from edgekit.profiles.integrate import Series
from edgekit.profiles.latency import Timed, Timings
from edgekit.stats import median_half_width, summarize

COUNTER = MeterFacts(name="m", quantity="energy", scope="board", covers="all", resolution=1e-3, update_interval_s=1e-3)
GAUGE = MeterFacts(name="m", quantity="power", scope="board", covers="all", resolution=0.04, update_interval_s=0.01)
CHANGING = Series(np.arange(5.0), np.array([0, 1, 3, 4, 6.0]))


def timings(count=1024, seconds=60.0, *, steady=True) -> Timings:
    return Timings(
        taken={name: [Timed(1000, 0, 0)] * count for name in ("a", "stream")}, rounds=count, seconds=seconds,
        steady=steady,
    )  # fmt: skip


def broken(checks):
    return {check.rule: check for check in checks if check.passed is False}


def latency(found=None, *, ratio=1.0, done=True):
    protocol = Protocol(min_samples=1024, min_seconds=60, closure=0.03, max_warmup_s=7)
    return latency_checks(found or timings(), Closure(predicted=1.0, measured=ratio), protocol=protocol, done=done)


def test_latencies_that_keep_every_rule():
    assert [(check.rule, check.passed, check.advice) for check in latency()] == [
        ("complete", True, ""),
        ("steady-warm-up", True, ""),
        ("enough-samples", True, ""),
        ("latency-closure", True, ""),
    ]


@pytest.mark.parametrize(("options", "rule", "says", "advice"), [
    ({"done": False}, "complete", "was stopped before everything", "--resume"),
    ({"found": timings(steady=False)}, "steady-warm-up", "in 7 s", "max_warmup_s"),
    ({"found": timings(count=1000)}, "enough-samples", "has 1000 samples of 1024", "resume"),
    ({"found": timings(seconds=59.0)}, "enough-samples", "in 59 s of 60 s", "resume"),
    ({"ratio": 1.04}, "latency-closure", r"took +4.0%", "quiet machine"),
    ({"ratio": 0.96}, "latency-closure", r"took -4.0%", "quiet machine"),
])  # fmt: skip
def test_a_rule_of_latency_that_is_broken(options, rule, says, advice):
    found = broken(latency(**options))
    assert set(found) == {rule}
    assert says in found[rule].says
    assert advice in found[rule].advice


def window(name="a", kind="exit", joules=100.0, count=100, seconds=10.0, **more) -> Window:
    return Window(
        name=name, kind=kind, start_s=0, stop_s=seconds, inferences=count, energy_j=joules, bound_j=0.1,
        **{"updates": 10_000, **more},
    )  # fmt: skip


GOOD = [window(), window(joules=101), window(joules=99), window("idle", "idle", 20.0), window("idle", "idle", 21.0)]
SLOPES = [window(kind="slope", joules=200, count=200), window(kind="slope", joules=300, count=300)]


def energy(windows=None, facts=COUNTER, *, series=CHANGING, costs=(1.001,), ratio=1.0, failure=""):
    closure = Closure(quantity="energy", predicted=1.0, measured=ratio)
    return energy_checks(windows or GOOD + SLOPES, facts, series, closure, costs, failure=failure)


def test_energy_that_keeps_every_rule():
    checks = list(energy())
    assert [check.rule for check in checks] == [
        "meter-to-the-end", "energy-window", "energy-resolution", "energy-updates", "no-holes", "sensor-alive",
        "energy-spread", "energy-slope", "idle-drift", "reading-costs-little", "energy-closure",
    ]  # fmt: skip
    assert all(check.passed and not check.advice for check in checks)


@pytest.mark.parametrize(("options", "rule", "says"), [
    ({"failure": "m: gone"}, "meter-to-the-end", "m: gone"),
    ({"windows": [*GOOD, window(seconds=5.0)]}, "energy-window", "lasted 5 s; 10 s or more"),
    ({"windows": [*GOOD, window(updates=99)]}, "energy-updates", "holds 99 updates of the sensor; 100 or more"),
    ({"windows": [*GOOD, window("idle", "idle", 20.0, updates=9)]}, "energy-updates", "of 'idle' holds 9 updates"),
    ({"windows": [*GOOD, window("p", "paced", updates=8)]}, "energy-updates", "of 'p' holds 8 updates"),
    ({"windows": [*GOOD, window(gap_s=2.5)]}, "no-holes", "said nothing for 2.5 s"),
    ({"windows": [*GOOD, window("idle", "idle", 20.0, gap_s=3.0)]}, "no-holes", "3 s in a window of 'idle'"),
    ({"windows": [*GOOD, window(seconds=9.99)]}, "energy-window", "lasted 9.99 s; 10 s or more"),
    ({"windows": [*GOOD, window(joules=120)]}, "energy-spread", "scatter by"),
    ({"windows": [*GOOD, window(kind="slope", joules=230, count=200)]}, "energy-slope", "another figure"),
    ({"windows": [*GOOD, window("idle", "idle", 25.0)]}, "idle-drift", "from 2 W to 2.5 W"),
    ({"costs": (1.03, 1.05, 1.0)}, "reading-costs-little", "take +3.0% while"),
    ({"ratio": 1.06}, "energy-closure", "took +6.0%"),
    ({"series": Series(np.arange(9.0), np.zeros(9))}, "sensor-alive", "the same 8 times"),
])  # fmt: skip
def test_a_rule_of_energy_that_is_broken(options, rule, says):
    found = broken(energy(**options))
    assert set(found) == {rule}
    assert says in found[rule].says
    assert found[rule].advice


def test_a_window_may_end_with_the_last_update_before_its_end():
    assert broken(energy([*GOOD, window(seconds=9.991)], GAUGE, series=Series(np.arange(3.0), np.arange(3.0)))) == {}


def test_a_load_too_small_for_the_sensor():
    small = [window(joules=0.05, count=1)] * 3
    assert "worth 50 steps of 0.001 J" in broken(energy(small))["energy-resolution"].says
    assert "worth 50 steps of 0.04 W" in broken(energy([window(joules=20.0)] * 3, GAUGE))["energy-resolution"].says


def test_a_gauge_that_always_says_the_same():
    stuck = Series(np.arange(9.0), np.full(9, 5.0))
    assert "sensor-alive" in broken(energy(GOOD, GAUGE, series=stuck))
    assert "sensor-alive" not in broken(energy(GOOD, GAUGE))


def test_a_meter_that_failed_at_once_breaks_one_rule():
    assert [check.rule for check in energy_checks(
        [], COUNTER, CHANGING, None, (), failure="m: gone"
    )] == ["meter-to-the-end"]  # fmt: skip


def test_medians_that_stayed_unknown_are_told():
    rng = np.random.default_rng(0)
    samples = {
        "known": rng.normal(1, 0.01, 2000),
        "wandering": np.repeat(rng.normal(1, 0.05, 20), 100) + rng.normal(0, 0.01, 2000),
        "few": np.ones(2),
        "nothing": np.zeros(50),
    }
    halves = {name: median_half_width(each) for name, each in samples.items()}
    assert halves["known"] < 0.015 < halves["wandering"] < 0.2
    (text,) = latency_warnings({}, halves=halves, median_within=0.015)
    named = f"(wandering {halves['wandering']:.1%}, few not at all, nothing not at all)"
    assert f"not known to the 1.5% asked for {named}" in text
    assert not list(latency_warnings({}, halves={"known": halves["known"]}, median_within=0.015))
    assert not list(latency_warnings({}, halves=halves))


def test_unsteady_latency_is_doubted():
    steady, unsteady = summarize([1000] * 700), summarize([1000, 2000] * 350)
    texts = list(latency_warnings({"a": steady, "b": unsteady}))
    assert len(texts) == 1
    assert "varies by more than 10%" in texts[0]
    assert "b 33%" in texts[0]
    assert "a 0%" not in texts[0]
