"""Comparison: intervals against scipy's bootstrap, verdicts, and what else differs."""

import msgspec
import numpy as np
import pytest
import scipy.stats

from edgekit.errors import MeasurementError
from edgekit.report import compare
from edgekit.report.compare import _medians


@pytest.mark.parametrize("count", [1, 2, 7, 30, 201])
def test_drawn_medians_are_those_of_resamples(count):
    random = np.random.default_rng(1)
    ordered = np.sort(random.gamma(2.0, 1.0, count))
    drawn = _medians(ordered, 40_000, random)
    resampled = np.median(random.choice(ordered, size=(40_000, count)), axis=1)
    for share in (0.025, 0.25, 0.5, 0.75, 0.975):
        spread = max(float(np.ptp(ordered)), 1e-12)
        assert abs(np.quantile(drawn, share) - np.quantile(resampled, share)) <= 0.02 * spread
    assert drawn.mean() == pytest.approx(resampled.mean(), rel=0.01)


def test_interval_agrees_with_scipy(profile):
    slower = with_latencies(profile, 1.06, seed=5)
    found = compare([profile, slower]).pairs[0].differences[2]
    mine, theirs = (np.asarray(item.exits[2].latency_ns, float) for item in (profile, slower))
    golden = scipy.stats.bootstrap(
        (mine, theirs),
        lambda a, b, axis: np.median(b, axis=axis) / np.median(a, axis=axis) - 1,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found.change == pytest.approx(np.median(theirs) / np.median(mine) - 1)
    assert (found.low, found.high) == (pytest.approx(golden.low, abs=7e-4), pytest.approx(golden.high, abs=7e-4))
    assert found.low < found.change < found.high


def with_latencies(profile, factor, *, seed):
    random = np.random.default_rng(seed)

    def scaled(item):
        taken = np.asarray(item.latency_ns) * factor * random.normal(1, 0.01, len(item.latency_ns))
        return msgspec.structs.replace(item, latency_ns=tuple(int(value) for value in taken))

    exits = tuple(scaled(item) for item in profile.exits)
    return msgspec.structs.replace(profile, exits=exits, stream=scaled(profile.stream))


@pytest.mark.parametrize(("factor", "verdict"), [(1.06, "slower"), (0.94, "faster"), (1.0, "no clear difference")])
def test_verdict(profile, factor, verdict):
    found = compare([profile, with_latencies(profile, factor, seed=7)]).pairs[0].differences
    assert [difference.name for difference in found] == ["exit1", "exit2", "exit3", "exit4", "exit5", "stream"]
    assert found[4].verdict == verdict
    assert found[4].text.startswith(verdict)
    if verdict != "no clear difference":
        assert found[4].change == pytest.approx(factor - 1, abs=0.005)
    low, high = found[4].text.split("CI ")[1].rstrip(" %)").split("..")
    assert float(low) <= float(high)


def test_same_seed_same_interval(profile):
    other = with_latencies(profile, 1.02, seed=1)
    assert compare([profile, other]) == compare([profile, other])


def test_accuracy_change(profile, unlabelled):
    exits = (msgspec.structs.replace(profile.exits[0], accuracy=0.652), *profile.exits[1:])
    other = msgspec.structs.replace(profile, exits=exits)
    assert compare([profile, other]).pairs[0].differences[0].accuracy_text == "+1.0 points"
    assert compare([profile, unlabelled]).pairs[0].differences[0].accuracy_text == "–"


def test_what_else_differs_is_named(profile):
    machine = msgspec.structs.replace(
        profile.before, governors={"cpu0": "performance"}, host="board-7", temperatures_c={"soc": 80.0}, load=3.0
    )
    other = msgspec.structs.replace(
        profile,
        before=machine,
        runtime=profile.runtime | {"threads": 4},
        policy=profile.policy | {"thresholds": [0.5, 0.5, 0.5, float("inf")]},
        created="2027-01-01T00:00:00+00:00",
    )
    changes = {change.name: (change.baseline, change.other) for change in compare([profile, other]).pairs[0].changes}
    assert changes["runtime threads"] == ("1", "4")
    assert changes["machine host"] == ("bench-01", "board-7")
    assert changes["machine governors cpu0"] == ("powersave", "performance")
    assert changes["policy thresholds"] == ("0.93, 0.9, 0.88, never", "0.5, 0.5, 0.5, never")
    assert not any("machine temperatures" in name or "load" in name or "created" in name for name in changes)
    assert compare([profile, profile]).pairs[0].changes == ()


def test_other_networks_are_refused_unless_told(profile, one_exit):
    other = msgspec.structs.replace(one_exit, plan="b" * 64, network="lenet")
    with pytest.raises(MeasurementError, match=r"'msdnet-cifar10' \(plan 3f9a1c0de55b\) and 'lenet' \(plan b{12}\)"):
        compare([profile, other])
    pair = compare([profile, other], other_networks=True).pairs[0]
    assert [difference.name for difference in pair.differences] == ["exit1", "stream"]
    assert pair.notes == ("only one of the networks has exit 'exit2', 'exit3', 'exit4', 'exit5'",)


def test_scripted_profiles_are_named(profile, scripted):
    assert "answers from a script" in compare([profile, scripted]).pairs[0].notes[0]


def test_too_little_to_compare(profile):
    with pytest.raises(MeasurementError, match="needs two profiles or more, not 1"):
        compare([profile])
    empty = msgspec.structs.replace(profile, stream=msgspec.structs.replace(profile.stream, latency_ns=()))
    with pytest.raises(MeasurementError, match="'stream' has no raw samples"):
        compare([profile, empty])
