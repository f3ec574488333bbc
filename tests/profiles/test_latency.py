from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.profiles import Protocol
from edgekit.profiles.latency import Timings, close_latency, latency_warnings, measure_latency
from edgekit.profiles.stats import summarize
from edgekit.progress import silent
from edgekit.records import Closure


def short(**settings) -> Protocol:
    return Protocol(**{"warmup_rounds": 3, "warmup_s": 0.0, "min_samples": 30, "min_seconds": 0.0, **settings})


@pytest.fixture
def calls(session):
    """Which exit each run was forced to (``None``: the stream), in order."""
    made, run = [], session.run

    def recorded(inputs, **options):
        made.append(options.get("exit"))
        return run(inputs, **options)

    session.run = recorded
    return made


def measure(session, data, clock, protocol, *, seed=0):
    rng = np.random.default_rng(seed)
    return measure_latency(session, data, protocol=protocol, rng=rng, clock=clock, progress=silent)


def test_every_round_holds_every_exit_once_and_as_many_of_the_stream(session, data, clock, calls):
    timings = measure(session, data, clock, short(max_seconds=0.0))
    rounds = [calls[start : start + 6] for start in range(0, len(calls), 6)]
    assert len(rounds) == 3 + 30
    assert timings.rounds == 30
    for turn in rounds:
        assert sorted(turn, key=str) == [0, 1, 2, None, None, None]
    assert len({tuple(turn) for turn in rounds}) > 10, "the turns must be shuffled"


def test_warm_up_is_thrown_away(session, data, clock, calls):
    timings = measure(session, data, clock, short(warmup_rounds=5, max_seconds=0.0))
    assert len(calls) == (5 + 30) * 6
    assert [len(samples) for samples in timings.exits_ns] == [30, 30, 30]


def test_warm_up_lasts(session, data, clock):
    measure(session, data, clock, short(warmup_rounds=0, warmup_s=10.0, min_samples=1, max_seconds=0.0))
    assert 10.0 < clock.now_ns * 1e-9 < 10.2


def test_rounds_go_on_for_the_time_asked(session, data, clock):
    timings = measure(session, data, clock, short(min_seconds=5.0))
    assert 5.0 <= timings.seconds < 5.1


def test_rounds_go_on_until_all_data_was_seen_but_no_longer_than_allowed(session, data, clock):
    whole = measure(session, data, clock, short(min_samples=1, max_seconds=1e6))
    assert sorted(set(whole.stream_samples)) == list(range(40))
    assert whole.rounds == 14  # of 3 samples: the first multiple of 3 from 40 on
    cut = measure(session, data, clock, short(min_samples=1, max_seconds=0.05))
    assert cut.rounds < whole.rounds


def test_drift_hits_all_alike(session, data, clock):
    """A machine that slows down from one run to the next: the parts still explain the whole."""
    run, slow = session.run, [0]

    def slower(inputs, **options):
        slow[0] += 1000
        clock.now_ns += slow[0]
        return run(inputs, **options)

    session.run = slower
    timings = measure(session, data, clock, short(min_samples=200))
    assert close_latency(timings).ratio == pytest.approx(1, abs=0.03)


def test_exits_of_the_stream_are_those_of_its_samples(session, data, clock):
    timings = measure(session, data, clock, short())
    by_hand = [0 if sample < 20 else 1 if sample < 30 else 2 for sample in timings.stream_samples]
    assert timings.stream_exits == by_hand


@given(
    st.lists(st.integers(1, 10**9), min_size=3, max_size=3),
    st.lists(st.integers(0, 2), min_size=1, max_size=50),
)
def test_closure_is_one_whenever_the_stream_costs_what_its_exits_cost(costs, taken):
    timings = Timings(
        exits_ns=tuple([cost] * 4 for cost in costs), stream_ns=[costs[index] for index in taken], stream_exits=taken
    )
    assert close_latency(timings).ratio == pytest.approx(1, rel=1e-9)


def test_unsteady_latency_is_doubted():
    steady, unsteady = summarize([1000] * 700), summarize([1000, 2000] * 350)
    closure = Closure(predicted_s=1.0, measured_s=1.05)
    texts = list(latency_warnings({"a": steady, "b": unsteady}, closure))
    assert len(texts) == 1
    assert "varies by more than 10%" in texts[0]
    assert "b 33%" in texts[0]
    assert "a 0%" not in texts[0]
