"""Accuracy against cost: points with their intervals, and the Pareto front."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.report.costs import cost_figures, front


def traces(profiles, cost):
    return {trace["name"]: trace for trace in cost_figures(profiles)["choices"][cost]["data"]}


def test_points_carry_their_intervals(profile):
    found = traces([profile], "mean")
    exits, stream = found["forced exits"], found["stream with the policy"]
    last = profile.exits[-1].latency
    assert exits["x"][-1] == pytest.approx(last.mean_s * 1e3)
    assert exits["error_x"]["array"][-1] == pytest.approx((last.mean_high_s - last.mean_s) * 1e3)
    # Wilson's interval of 571.9 right answers among 700, by hand.
    n, p, z = 700, 0.817, 1.959964
    high = (p + z * z / (2 * n) + z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5) / (1 + z * z / n)
    assert exits["error_y"]["array"][-1] == pytest.approx(high - p, abs=1e-6)
    assert stream["marker"]["symbol"] == "star"


def test_costs_offered_are_those_known(profile, full):
    assert list(cost_figures([profile])["choices"]) == ["mean", "median", "p90", "macs"]
    assert list(cost_figures([full])["choices"]) == ["mean", "median", "p90", "gross", "net", "macs"]
    assert traces([full], "p90")["forced exits"]["x"][1] == pytest.approx(1e3 * full.exits[1].latency.p90_s)
    assert traces([full], "net")["forced exits"]["x"][1] == pytest.approx(1e3 * full.exits[1].energy.net_j)


def test_rates_are_points_but_not_for_energy(full):
    paced = traces([full], "mean")["stream at a fixed rate"]
    assert paced["x"] == pytest.approx([1e3 * item.latency.mean_s for item in full.paced])
    assert paced["y"] == [full.stream.accuracy] * 2
    assert "stream at a fixed rate" not in traces([full], "gross")


def test_without_labels_there_is_no_front(unlabelled):
    found = traces([unlabelled], "median")
    assert "Pareto front" not in found
    assert found["forced exits"]["y"] == [f"exit{index}" for index in range(1, 6)]
    assert "error_y" not in found["forced exits"]


def test_front_of_a_profile_is_drawn_and_said(profile):
    figure = cost_figures([profile])["choices"]["macs"]
    assert figure["data"][0]["x"] == sorted(figure["data"][0]["x"])
    # The stream's 14.4 M MACs at 81.1 % beat exit 3 (20.4 M, 77.8 %) and exit 4 (29.7 M, 80.5 %).
    assert figure["says"].endswith("less than: exit1, exit2, stream, exit5.")


def test_front_by_hand():
    assert front([(1, 0.5), (2, 0.4), (3, 0.9), (3, 0.8), (4, 0.9), (0.5, 0.1)]) == (5, 0, 2)
    assert front([]) == ()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_nothing_beats_the_front_and_the_front_beats_the_rest(places):
    best = front(places)
    for place, (cost, accuracy) in enumerate(places):
        beaten = any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in places)
        if place in best:
            assert not beaten
        else:
            assert any(places[b][0] <= cost and places[b][1] >= accuracy for b in best)
