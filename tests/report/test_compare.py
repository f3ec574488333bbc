"""Comparison: alarms and their absence, intervals against independent ones, refusals, and what else differs."""

import dataclasses
import json
import math

import msgspec
import numpy as np
import pytest
import scipy.stats

from edgekit.errors import MeasurementError
from edgekit.measured import Interval
from edgekit.report import compare
from edgekit.report.figures import Figure, figures, ratio_interval
from edgekit.stats import summarize


def differences(profiles, **options):
    return {(each.part, each.name, each.quantity): each for each in compare(profiles, **options).pairs[0].differences}


def with_latencies(profile, factor, *, seed):
    random = np.random.default_rng(seed)

    def scaled(item):
        taken = np.asarray(item.latency_ns) * factor * random.normal(1, 0.01, len(item.latency_ns))
        return msgspec.structs.replace(item, latency_ns=tuple(int(value) for value in taken))

    exits = tuple(scaled(item) for item in profile.exits)
    return msgspec.structs.replace(profile, exits=exits, stream=scaled(profile.stream))


def test_interval_agrees_with_scipys_bootstrap(profile):
    slower = with_latencies(profile, 1.06, seed=5)
    mine, theirs = (np.asarray(item.exits[2].latency_ns, float) for item in (profile, slower))
    golden = scipy.stats.bootstrap(
        (mine, theirs),
        lambda a, b, axis: np.median(b, axis=axis) / np.median(a, axis=axis) - 1,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    some = [figures(item)["exit", "exit3", "median"] for item in (profile, slower)]
    low, high = ratio_interval(*some, confidence=0.95, usual=0.95, rng=np.random.default_rng(0))
    assert (low - 1, high - 1) == (pytest.approx(golden.low, abs=2e-3), pytest.approx(golden.high, abs=2e-3))


def test_interval_of_drifting_samples_is_wider(made):
    random = np.random.default_rng(3)
    steady = random.normal(1e6, 1e4, 2000)
    series = scipy.signal.lfilter([1], [1, -0.98], random.normal(0, 1e4 * math.sqrt(1 - 0.98**2), 2000)) + 1e6
    widths = []
    for taken in (steady, series):
        one = Figure(value=1e-3, unit="s", samples=tuple(int(value) for value in taken))
        low, high = ratio_interval(one, one, confidence=0.95, usual=0.95, rng=random)
        widths.append(high - low)
    assert widths[1] > 3 * widths[0]


def test_intervals_are_joined_on_logarithms():
    """By hand: 5 % either way in both is hypot(log 1.05, -log 0.95) either way of the ratio of the logarithms."""
    mine, theirs = (
        Figure(value=value, unit="J", interval=Interval(value=value, low=0.95 * value, high=1.05 * value))
        for value in (2.0, 3.0)
    )
    low, high = ratio_interval(mine, theirs, confidence=0.95, usual=0.95, rng=np.random.default_rng(0))
    reach = math.hypot(math.log(1.05), math.log(0.95))
    assert (low, high) == (pytest.approx(1.5 * math.exp(-reach)), pytest.approx(1.5 * math.exp(reach)))


def test_few_windows_reach_further():
    """At more confidence an interval of five windows grows as Student's t, not as the normal distribution."""
    ends = Interval(value=1.0, low=0.98, high=1.02)
    widths = []
    for freedom in (None, 4):
        one = Figure(value=1.0, unit="J", interval=ends, freedom=freedom)
        low, high = ratio_interval(one, one, confidence=0.999, usual=0.95, rng=np.random.default_rng(0))
        widths.append(math.log(high / low))
    assert widths[1] / widths[0] == pytest.approx(8.610 / 2.776 / (3.291 / 1.960), rel=0.03)


def test_what_did_not_change_raises_no_alarm(made):
    """At most one of twenty seeds, with clocks that wander within each run."""
    baseline = made(seed=100, full=True, drift=0.02, joules=2e-3)
    alarms = [
        bool(compare([baseline, made(seed=seed, full=True, drift=0.02, joules=2e-3)]).worse) for seed in range(20)
    ]
    assert sum(alarms) <= 1


def test_a_stage_slowed_by_a_tenth_is_found_whatever_the_seed(made):
    baseline = made(seed=100, full=True, drift=0.01, samples=3000)
    for seed in range(20):
        worse = compare([baseline, made(seed=seed, full=True, drift=0.01, samples=3000, slow_stage=1.1)]).worse
        assert any(sentence.startswith("compute time of stage block2 got worse by ") for sentence in worse)
        assert not any("exit1" in sentence or "block1" in sentence for sentence in worse)


def slowed(profile, *factors, machine=1.0, meanwhile=1.0):
    """Stages by a factor each, the whole run by ``machine``, and what was taken apart by ``meanwhile`` as well."""
    before = [stage.compute.value for stage in profile.stages]
    after = [value * factor for value, factor in zip(before, factors, strict=True)]
    whole = machine * sum(after) / sum(before)

    def ends(value, width):
        return Interval(value=value, low=value * (1 - width), high=value * (1 + width))

    stages = tuple(
        msgspec.structs.replace(
            stage,
            compute=ends(value * machine * meanwhile, 0.005),
            relative=ends(value / (sum(after) - value), 0.004),
        )
        for stage, value in zip(profile.stages, after, strict=True)
    )
    last = profile.exits[-1]
    latency = msgspec.structs.replace(
        last.latency,
        **{name: getattr(last.latency, name) * whole for name in ("median_s", "median_low_s", "median_high_s")},
    )
    last = msgspec.structs.replace(last, latency=latency)
    return msgspec.structs.replace(profile, stages=stages, exits=(*profile.exits[:-1], last))


def verdicts(before, after, quantity="relative"):
    found = differences([before, after])
    return [found["stage", f"block{place}", quantity].verdict for place in range(5)]


@pytest.mark.parametrize("meanwhile", [0.9, 1.0, 1.1])
@pytest.mark.parametrize("machine", [0.95, 1.0, 1.04])
def test_a_slowed_stage_is_told_from_a_machine_whose_speed_wanders(made, machine, meanwhile):
    full = made(full=True)
    before = slowed(full, 1, 1, 1, 1, 1)
    after = slowed(full, 1, 1, 1.1, 1, 1, machine=machine, meanwhile=meanwhile)
    assert [place for place, verdict in enumerate(verdicts(before, after)) if verdict == "worse"] == [2]
    found = differences([before, after])
    assert found["stage", "block2", "compute"].change == pytest.approx(1.1 * machine - 1)
    assert found["stage", "block2", "relative"].change == pytest.approx(0.1)
    assert found["stage", "block2", "relative"].sentence.startswith(
        "relative compute time of stage block2 got worse by 10.0 % ± "
    )


def test_a_stage_is_not_slow_because_others_became_fast(made):
    before, after = slowed(made(full=True), 1, 1, 1, 1, 1), slowed(made(full=True), 0.5, 0.5, 1, 0.5, 0.5)
    assert differences([before, after])["stage", "block2", "relative"].change > 0.5
    assert verdicts(before, after)[2] == "unclear"
    assert verdicts(before, after, "compute") == ["better", "better", "same", "better", "better"]


def test_a_machine_that_slows_is_no_stage_that_does(made):
    before, after = slowed(made(full=True), 1, 1, 1, 1, 1), slowed(made(full=True), 1, 1, 1, 1, 1, machine=1.2)
    assert verdicts(before, after) == ["same"] * 5
    assert verdicts(before, after, "compute") == ["worse"] * 5


def test_everything_is_compared(made):
    full = made(full=True, joules=2e-3)
    found = differences([full, made(seed=1, full=True, joules=2e-3)])
    exits = [(("exit", f"exit{place}"), "median") for place in range(1, 6)]
    streams = [(("stream", "stream"), "mean"), (("paced", "stream at 10 Hz"), "mean")]
    wanted = {(*row, quantity) for row, middle in (*exits, *streams) for quantity in (middle, "p90", "energy")}
    assert wanted <= set(found)
    assert {("path", "without blocks.1", "p90"), ("stage", "block4", "compute")} <= set(found)
    assert compare([full, full]).compared == len(found)


def test_a_median_that_jumps_between_two_exits_is_no_alarm(profile):
    random = np.random.default_rng(3)

    def stream(first):
        taken = random.permutation(np.repeat((1_000_000, 1_500_000), (first, 10_000 - first)))
        noisy = tuple((taken * random.normal(1, 0.01, taken.size)).astype(int).tolist())
        return msgspec.structs.replace(profile.stream, latency_ns=noisy, latency=summarize(noisy))

    before, after = (msgspec.structs.replace(profile, stream=stream(first)) for first in (5_200, 4_800))
    assert after.stream.latency.median_s > 1.4 * before.stream.latency.median_s
    found = differences([before, after])
    assert found["stream", "stream", "mean"].verdict == "same"
    assert not compare([before, after]).worse


@pytest.mark.parametrize(("factor", "verdict"), [(1.08, "worse"), (0.92, "better"), (1.0, "same")])
def test_verdicts(profile, factor, verdict):
    found = differences([profile, with_latencies(profile, factor, seed=7)])["exit", "exit5", "median"]
    assert found.verdict == verdict
    if verdict != "same":
        assert found.change == pytest.approx(factor - 1, abs=0.005)
        assert found.text.startswith(f"{verdict} by {100 * abs(found.change):.1f} % ± ")


def test_tolerance_decides_what_is_worse(profile):
    other = with_latencies(profile, 1.08, seed=7)
    assert compare([profile, other]).worse
    assert not compare([profile, other], tolerance=0.1).worse
    assert differences([profile, other], tolerance=0.1)["exit", "exit5", "median"].verdict == "same"
    with pytest.raises(MeasurementError, match="tolerance 1"):
        compare([profile, other], tolerance=1)


def test_sentences(profile):
    found = differences([profile, with_latencies(profile, 1.08, seed=7)])
    assert found["exit", "exit2", "p90"].sentence.startswith("p90 of exit2 got worse by ")
    assert found["stream", "stream", "mean"].what == "mean of the stream"
    wide = dataclasses.replace(found["exit", "exit2", "p90"], change=0.1, low=0.05, high=0.7)
    assert wide.text == "worse by 10.0 % (5.0 to 70.0 %)"


def test_same_seed_same_interval(profile):
    other = with_latencies(profile, 1.02, seed=1)
    assert compare([profile, other]) == compare([profile, other])


def test_three_profiles_share_the_confidence(profile):
    others = [with_latencies(profile, factor, seed=2) for factor in (1.0, 1.1)]
    found = compare([profile, *others])
    assert found.compared == 2 * compare([profile, others[0]]).compared
    assert not any(sentence.startswith("msdnet-cifar10 #2") for sentence in found.worse)
    assert any(sentence.startswith("msdnet-cifar10 #3: median of exit1 got worse") for sentence in found.worse)


def test_accuracy_change(profile, unlabelled):
    exits = (msgspec.structs.replace(profile.exits[0], accuracy=0.652), *profile.exits[1:])
    other = msgspec.structs.replace(profile, exits=exits)
    assert differences([profile, other])["exit", "exit1", "median"].accuracy_text == "+1.0 points"
    assert differences([profile, unlabelled])["exit", "exit1", "median"].accuracy_text == "–"


def test_what_else_differs_is_named(profile):
    machine = msgspec.structs.replace(
        profile.before, governors={"cpu0": "performance"}, temperatures_c={"soc": 80.0}, load=3.0
    )
    other = msgspec.structs.replace(
        profile,
        before=machine,
        runtime=profile.runtime | {"threads": 4},
        policy=profile.policy | {"thresholds": [0.5, 0.5, 0.5, float("inf")]},
        created="2027-01-01T00:00:00+00:00",
        settings=profile.settings | {"rounds": 7, "timed_s": 1.0, "tracing_overhead": 1.1, "warmup_s": 0.5},
    )
    changes = {change.name: (change.baseline, change.other) for change in compare([profile, other]).pairs[0].changes}
    assert changes["runtime threads"] == ("1", "4")
    assert changes["machine governors cpu0"] == ("powersave", "performance")
    assert changes["policy thresholds"] == ("0.93, 0.9, 0.88, never", "0.5, 0.5, 0.5, never")
    assert [name for name in changes if name.startswith("protocol")] == ["protocol warmup_s"]
    assert not any("temperatures" in name or "load" in name or "created" in name for name in changes)
    assert compare([profile, profile]).pairs[0].changes == ()


def test_other_hosts_are_refused_unless_told_and_then_said(profile):
    board = msgspec.structs.replace(profile.before, host="board-7", processor="Cortex-A76")
    other = msgspec.structs.replace(with_latencies(profile, 1.2, seed=0), before=board)
    with pytest.raises(
        MeasurementError, match=r"host 'bench-01' and 'board-7'; processor 'Intel.*' and 'Cortex-A76'\); compare what"
    ):
        compare([profile, other])
    found = compare([profile, other], other_hosts=True)
    assert found.worse
    assert all(sentence.endswith("(but the machines differ)") for sentence in found.worse)
    assert found.pairs[0].notes[0].startswith("the machines differ: host 'bench-01' and 'board-7'")
    runtime = msgspec.structs.replace(profile, runtime=profile.runtime | {"name": "litert"})
    with pytest.raises(MeasurementError, match="runtime 'onnxruntime' and 'litert'"):
        compare([profile, runtime])


def test_other_networks_are_refused_unless_told(profile, one_exit):
    other = msgspec.structs.replace(one_exit, plan="b" * 64, network="lenet")
    with pytest.raises(MeasurementError, match=r"'msdnet-cifar10' \(plan 3f9a1c0de55b\) and 'lenet' \(plan b{12}\)"):
        compare([profile, other])
    pair = compare([profile, other], other_networks=True).pairs[0]
    assert list(dict.fromkeys(difference.name for difference in pair.differences)) == ["exit1", "stream"]
    assert pair.notes[0] == (
        "only one of the profiles has all figures of exit 'exit1', 'exit2', 'exit3', 'exit4', 'exit5'"
    )


def test_invalid_profiles_are_refused_unless_told(full, invalid):
    with pytest.raises(
        MeasurementError,
        match=r"'msdnet-cifar10 #2' of 2026\S+ broke energy-window, quiet-machine and is incomplete; measure it again",
    ):
        compare([full, invalid])
    notes = compare([full, invalid], invalid=True).pairs[0].notes
    assert any("is invalid: energy-window, quiet-machine" in note for note in notes)
    assert any("is incomplete" in note for note in notes)


def test_energy_of_another_meter_is_not_compared(full):
    def other(item):
        return msgspec.structs.replace(item, energy=msgspec.structs.replace(item.energy, meter="wall", scope="wall"))

    metered = msgspec.structs.replace(full, exits=tuple(map(other, full.exits)), stream=other(full.stream))
    found = differences([full, metered])
    assert ("exit", "exit1", "energy") not in found
    assert ("exit", "exit1", "median") in found
    assert "energy is not compared" in " ".join(compare([full, metered]).pairs[0].notes)


def with_energy_of(profile, **changes):
    def other(item):
        return msgspec.structs.replace(item, energy=msgspec.structs.replace(item.energy, **changes))

    return msgspec.structs.replace(profile, exits=tuple(map(other, profile.exits)), stream=other(profile.stream))


def test_energy_of_lone_windows_is_not_compared_and_that_is_said(full):
    quick = with_energy_of(full, low_j=None, high_j=None, windows=1)
    pair = compare([quick, quick]).pairs[0]
    assert not any(each.quantity == "energy" and each.part != "paced" for each in pair.differences)
    assert "energy is not compared: fewer than three windows give no interval" in " ".join(pair.notes)
    assert "energy is not compared" not in " ".join(compare([full, full]).pairs[0].notes)


def test_an_interval_without_end_is_not_known(full):
    """Energy that may as well be nothing: its ratio may be anything."""
    vague = with_energy_of(full, low_j=-1.0)
    for profiles in ([full, vague], [vague, full]):
        found = differences(profiles)["exit", "exit1", "energy"]
        assert found.text == "unclear: +0.0 % (interval not known)"
    assert json.loads(msgspec.json.encode(found))["high"] is None


def test_a_percentile_without_an_interval_is_not_judged(made):
    """100 samples tell a 90th percentile; where they hang on each other, they do not tell how sure it is."""
    steady = made(samples=300)
    slowing = tuple(range(1_000_000, 1_100_000, 1000))
    exits = (msgspec.structs.replace(steady.exits[0], latency_ns=slowing), *steady.exits[1:])
    drifting = msgspec.structs.replace(steady, exits=exits)
    found = differences([drifting, drifting])
    assert ("exit", "exit1", "p90") not in found
    assert {("exit", "exit1", "median"), ("exit", "exit2", "p90")} <= set(found)


def test_a_profile_of_no_rules_is_named(profile, full):
    assert "was held to no rule" in " ".join(compare([full, profile]).pairs[0].notes)
    assert "was held to no rule" not in " ".join(compare([full, full]).pairs[0].notes)


def test_scripted_profiles_are_named(profile, scripted):
    assert "answers from a script" in compare([profile, scripted]).pairs[0].notes[0]


def test_too_little_to_compare(profile):
    with pytest.raises(MeasurementError, match="needs two profiles or more, not 1"):
        compare([profile])
    empty = msgspec.structs.replace(profile, stream=msgspec.structs.replace(profile.stream, latency_ns=()))
    with pytest.raises(MeasurementError, match="'stream' has no raw samples"):
        compare([profile, empty])


def with_reference(profile, ns, **versions):
    before = msgspec.structs.replace(profile.before, versions=profile.before.versions | versions)
    return msgspec.structs.replace(profile, reference_ns=(ns, ns, 9 * ns), before=before)


@pytest.mark.parametrize(
    ("ns", "slower", "said"),
    [(106_000, 0.06, "took 6.0 % longer"), (97_000, -0.03, "took 3.0 % less"), (100_500, 0.005, "")],
)
def test_it_is_said_how_much_slower_the_machine_was(profile, ns, slower, said):
    pair = compare([with_reference(profile, 100_000), with_reference(profile, ns)]).pairs[0]
    assert pair.slower == pytest.approx(slower)
    notes = [each for each in pair.notes if "reference work" in each]
    assert [said in each for each in notes] == [True] * bool(said)
    assert pair.differences == compare([profile, profile]).pairs[0].differences


@pytest.mark.parametrize(
    ("factor", "reference_ns", "verdict"),
    [
        (1.12, 100_000, "worse"),
        (1.12, 94_000, "worse"),  # though the machine was faster
        (1.12, 106_000, "unclear"),  # 12 %, of which the machine may be 9
        (1.30, 106_000, "worse"),
        (0.88, 100_000, "better"),
        (0.88, 106_000, "better"),
        (0.88, 94_000, "unclear"),
    ],
)
def test_what_the_machine_may_have_done_is_no_alarm(profile, factor, reference_ns, verdict):
    before = with_reference(profile, 100_000)
    after = with_reference(with_latencies(profile, factor, seed=5), reference_ns)
    found = differences([before, after])
    assert {found["exit", each.name, "median"].verdict for each in profile.exits} == {verdict}
    changes = differences([profile, with_latencies(profile, factor, seed=5)])
    assert all(found[key].change == each.change for key, each in changes.items()), "figures stay as measured"


def test_a_percentile_is_held_against_the_references_own(profile):
    """A tail that grew for both."""
    slower = with_latencies(profile, 1.15, seed=5)
    before, after = (
        msgspec.structs.replace(item, reference_ns=(100_000,) * 800 + (tail,) * 200)
        for item, tail in ((profile, 150_000), (slower, 180_000))
    )
    found = differences([before, after])
    assert found["exit", "exit3", "median"].verdict == "worse"
    assert found["exit", "exit3", "p90"].verdict == "unclear"


def test_a_reference_of_other_work_tells_nothing(profile):
    first = with_reference(profile, 100_000)
    host = msgspec.structs.replace(first.before, host="another")
    others = [profile, with_reference(profile, 110_000, numpy="1.0"), msgspec.structs.replace(first, before=host)]
    for other in others:
        assert compare([first, other], other_hosts=True).pairs[0].slower is None
    assert compare([with_reference(profile, 0), first]).pairs[0].slower is None
