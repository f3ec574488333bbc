from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import MeasurementError
from edgekit.profiles import Protocol, latency
from edgekit.profiles.latency import Timed, Timings, close_latency, measure_latency
from edgekit.profiles.reference import Reference
from edgekit.profiles.workloads import STREAM, workloads
from edgekit.progress import silent
from edgekit.stats import quantile_interval


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


def measure(session, data, clock, protocol, *, seed=0, timings=None) -> Timings:
    works = workloads(session.plan)
    timings = timings or Timings.nothing(works)
    measure_latency(
        session, data, works, timings, protocol=protocol, rng=np.random.default_rng(seed), clock=clock, progress=silent
    )
    return timings


def test_every_round_holds_every_exit_once_and_as_many_of_the_stream(session, data, clock, calls):
    timings = measure(session, data, clock, short(max_seconds=0.0))
    rounds = [calls[start : start + 6] for start in range(0, len(calls), 6)]
    assert timings.rounds == 30
    assert len(rounds) >= 3 + 30
    for turn in rounds:
        assert sorted(turn, key=str) == [0, 1, 2, None, None, None]
    assert len({tuple(turn) for turn in rounds}) > 10, "the turns must be shuffled"


def test_warm_up_is_thrown_away(session, data, clock, calls):
    timings = measure(session, data, clock, short(warmup_rounds=5, max_warmup_s=0.0, max_seconds=0.0))
    assert len(calls) == (5 + 30) * 6
    assert [len(timings.taken[name]) for name in ("exit0", "exit1", "exit2", STREAM)] == [30, 30, 30, 90]
    assert timings.steady


def test_every_round_begins_with_the_reference(session, data, clock, calls, monkeypatch):
    class Work:
        def __call__(self):
            calls.append("reference")
            clock.now_ns += 7_000 + len(calls)

    monkeypatch.setattr(latency, "Reference", Work)
    timings = measure(session, data, clock, short(max_seconds=0.0))
    assert calls[::7] == ["reference"] * (len(calls) // 7)
    assert timings.reference_ns == [7_000 + 7 * turn + 1 for turn in range(len(calls) // 7)][-30:]
    again = measure(session, data, clock, short(min_samples=50, max_seconds=0.0), timings=timings)
    assert len(again.reference_ns) == again.rounds == 50


def test_the_reference_is_the_same_work_in_every_place():
    """By numpy's own expression; arrays of a place begin in lines of their own."""
    work = Reference()
    for _ in work.places:
        work()
    for one, two, out in work.places:
        assert (out == np.maximum(one * two + one, 0)).all()
        assert (one == work.places[0][0]).all()
        assert [each.ctypes.data % 4096 for each in (one, two, out)] == [0, 64, 128]


def test_warm_up_lasts(session, data, clock):
    measure(session, data, clock, short(warmup_rounds=0, warmup_s=10.0, min_samples=1, max_seconds=0.0))
    assert 10.0 < clock.now_ns * 1e-9 < 10.4


@pytest.mark.parametrize(("until", "steady"), [(200, True), (10**9, False)])
def test_warm_up_goes_on_until_it_is_steady(session, data, clock, until, steady):
    """Every inference is faster than the one before, up to some number of them."""
    run, count = session.run, [0]

    def faster(inputs, **options):
        count[0] += 1
        clock.pass_s(0.1 * 0.99 ** min(count[0], until))
        return run(inputs, **options)

    session.run = faster
    timings = measure(session, data, clock, short(min_samples=1, max_seconds=0.0, max_warmup_s=20.0 if steady else 5.0))
    assert timings.steady is steady
    assert steady is False or count[0] > until


def test_rounds_go_on_for_the_time_asked(session, data, clock):
    assert 5.0 <= measure(session, data, clock, short(min_seconds=5.0)).seconds < 5.1


def test_rounds_go_on_until_all_data_was_seen_but_no_longer_than_allowed(session, data, clock):
    whole = measure(session, data, clock, short(min_samples=1, max_seconds=1e6, max_warmup_s=0.0))
    assert sorted({each.sample for each in whole.taken[STREAM]}) == list(range(40))
    assert whole.rounds == 14  # of 3 samples: the first multiple of 3 from 40 on
    cut = measure(session, data, clock, short(min_samples=1, max_seconds=0.05))
    assert cut.rounds < whole.rounds


def wandering(session, clock, *, every_s, slower):
    """The machine is slower for some seconds, then as fast as before, and so on."""
    run = session.run

    def turn(inputs, **options):
        clock.pass_s(slower * (int(clock.now_ns * 1e-9 / every_s) % 2) + 1e-6 * (clock.now_ns % 997))
        return run(inputs, **options)

    session.run = turn


@pytest.mark.parametrize(("within", "least_s", "most_s"), [(0.0, 10, 11), (0.3, 10, 11), (0.04, 12, 30)])
def test_rounds_go_on_until_medians_are_known(session, data, clock, within, least_s, most_s):
    wandering(session, clock, every_s=1.0, slower=3e-4)
    protocol = short(min_seconds=10.0, max_seconds=2000.0, median_within=within, max_warmup_s=0.0)
    timings = measure(session, data, clock, protocol)
    assert least_s <= timings.seconds < most_s
    for name in ("exit0", "exit1", "exit2"):
        samples = np.array(timings.host_ns(name), float)
        low, high = quantile_interval(samples, 0.5)
        assert within == 0 or (high - low) / 2 <= within * np.median(samples)


def test_medians_that_stay_unknown_end_in_time(session, data, clock):
    wandering(session, clock, every_s=1.0, slower=3e-4)
    for most_s, lasts_s in ((20.0, 20.0), (1000.0, 50.0)):
        protocol = short(min_seconds=10.0, max_seconds=most_s, median_within=1e-5, max_warmup_s=0.0)
        assert lasts_s <= measure(session, data, clock, protocol).seconds < lasts_s + 1


def test_what_was_stopped_goes_on(session, data, clock):
    first = measure(session, data, clock, short(min_samples=20, max_seconds=0.0))
    before_s = first.seconds
    again = measure(session, data, clock, short(min_samples=50, max_seconds=0.0), timings=first)
    assert again.rounds == 50
    assert len(again.taken["exit1"]) == 50
    assert again.seconds == pytest.approx(before_s * 2.5, rel=0.3)


def test_what_was_not_seen_before_a_stop_comes_first(session, data, clock):
    first = measure(session, data, clock, short(min_samples=5, max_seconds=0.0))
    seen = {each.sample for each in first.taken[STREAM]}
    assert len(seen) == 15
    whole = measure(session, data, clock, short(min_samples=1, max_seconds=1e6), timings=first, seed=1)
    assert len(whole.taken[STREAM]) == 42
    assert {each.sample for each in whole.taken[STREAM]} == set(range(40))


def test_a_warm_up_that_was_never_steady_stays_so(session, data, clock):
    first = measure(session, data, clock, short(min_samples=5, max_seconds=0.0))
    first.steady = False
    again = measure(session, data, clock, short(min_samples=10, max_seconds=0.0), timings=first)
    assert again.steady is False


def test_drift_hits_all_alike(session, data, clock):
    """A machine that slows down from one run to the next: the parts still explain the whole."""
    run, slow = session.run, [0]

    def slower(inputs, **options):
        slow[0] += 1000
        clock.now_ns += slow[0]
        return run(inputs, **options)

    session.run = slower
    timings = measure(session, data, clock, short(min_samples=200))
    assert close_latency(timings, workloads(session.plan)).ratio == pytest.approx(1, abs=0.03)


def test_exits_of_the_stream_are_those_of_its_samples(session, data, clock):
    for each in measure(session, data, clock, short()).taken[STREAM]:
        assert each.exit == (0 if each.sample < 20 else 1 if each.sample < 30 else 2)
        assert each.host_ns == (1, 3, 7)[each.exit] * 1_000_000


def test_a_clock_that_goes_back(session, data, clock):
    run = session.run

    def backwards(inputs, **options):
        result = run(inputs, **options)
        clock._now_ns -= 50_000_000 if clock._now_ns > 400_000_000 else 0
        return result

    session.run = backwards
    with pytest.raises(MeasurementError, match=r"the clock went back by \d+ ns during an inference"):
        measure(session, data, clock, short())


@given(
    st.lists(st.integers(1, 10**9), min_size=3, max_size=3),
    st.lists(st.integers(0, 2), min_size=1, max_size=50),
)
def test_closure_is_one_whenever_the_stream_costs_what_its_exits_cost(costs, taken):
    from tests.profiles.conftest import three_exits

    works = workloads(three_exits())
    timings = Timings(
        taken={f"exit{index}": [Timed(cost, 0, index)] * 4 for index, cost in enumerate(costs)}
        | {STREAM: [Timed(costs[index], 0, index) for index in taken]}
    )
    assert close_latency(timings, works).ratio == pytest.approx(1, rel=1e-9)
