from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edgekit.data import Dataset
from edgekit.errors import InputError, MeasurementError, PolicyError
from edgekit.policy import Policy
from edgekit.profiles import QUICK, STANDARD, Protocol, RaplMeter, ReplayMeter, profile
from edgekit.profiles.protocol import as_protocol
from edgekit.records import Profile

EXIT_S = (0.001, 0.003, 0.007)
SHORT = Protocol(
    name="short", warmup_rounds=2, warmup_s=0.0, min_samples=20, min_seconds=0.0, max_seconds=1e9,
    energy_window_s=1.0, energy_windows=3, idle_s=2.0,
)  # fmt: skip


@pytest.fixture
def measured(session, data, clock, empty_root) -> Profile:
    return profile(session, data, protocol=SHORT, clock=clock, sleep=clock.pass_s, root=empty_root)


def test_every_exit_takes_exactly_what_its_stages_take(measured):
    assert [each.latency.median_s for each in measured.exits] == pytest.approx(EXIT_S, rel=1e-12)
    assert [each.latency.sd_s for each in measured.exits] == pytest.approx([0, 0, 0], abs=1e-15)
    assert [each.macs for each in measured.exits] == [10, 30, 60]


def test_the_parts_explain_the_stream(measured):
    assert measured.closure.ratio == pytest.approx(1.0, rel=1e-12)
    by_hand = np.mean([EXIT_S[index] for index in measured.stream.exits])
    assert measured.closure.measured_s == pytest.approx(by_hand, rel=1e-12)
    assert not [text for text in measured.warnings if "explain" in text]


def test_a_stream_that_costs_more_than_its_exits_is_doubted(session, data, clock, empty_root):
    run = session.run

    def slow_stream(inputs, **options):
        clock.now_ns += 0 if options else 2_000_000
        return run(inputs, **options)

    session.run = slow_stream
    measured = profile(session, data, protocol=SHORT, clock=clock, root=empty_root)
    assert measured.closure.measured_s - measured.closure.predicted_s == pytest.approx(0.002, rel=1e-9)
    assert any("times what its exits explain" in text for text in measured.warnings)


def test_answers_of_exits_and_policy(measured):
    assert [each.share for each in measured.exits] == [0.5, 0.25, 0.25]
    assert [each.share_accuracy for each in measured.exits] == [1.0, 1.0, 0.5]
    assert [each.accuracy for each in measured.exits] == [0.5, 0.75, 0.875]
    assert measured.stream.accuracy == 0.875
    assert measured.stream.macs == 0.5 * 10 + 0.25 * 30 + 0.25 * 60
    assert measured.gates == ()


def test_the_stream_passes_every_sample_as_often(measured, data):
    # 20 rounds of 3 are 60: the 40 samples once, half of them twice; each decides the same way every time.
    assert len(measured.stream.latency_ns) == 60
    assert len(measured.stream.exits) == 60
    counts = Counter(measured.stream.exits[:40])
    assert [counts[index] for index in range(3)] == [20, 10, 10]


def test_without_labels_there_is_no_accuracy(session, data, clock, empty_root):
    measured = profile(session, replace(data, labels=None), protocol=SHORT, clock=clock, root=empty_root)
    assert [each.accuracy for each in measured.exits] == [None] * 3
    assert [each.share for each in measured.exits] == [0.5, 0.25, 0.25]
    assert measured.stream.accuracy is None


def test_an_exit_that_nobody_takes_has_a_share_and_no_accuracy(session, data, clock, empty_root):
    never = Policy.never(3)
    measured = profile(session, data, policy=never, protocol=SHORT, clock=clock, root=empty_root)
    assert [each.share for each in measured.exits] == [0, 0, 1]
    assert [each.share_accuracy for each in measured.exits] == [None, None, 0.875]
    assert measured.policy["thresholds"] == ["inf", "inf"]


def test_it_says_that_the_runtime_is_scripted(measured):
    assert measured.scripted == "the runtime 'fake' is scripted"
    assert any("not a measurement of a device" in text for text in measured.warnings)


def test_saved_and_loaded_it_is_the_same(measured, tmp_path):
    assert Profile.load(measured.save(tmp_path / "profile.json")) == measured


def test_few_samples_give_no_percentile_and_a_warning(measured):
    assert measured.exits[0].latency.p90_s is None
    assert any("too few samples for a 90th percentile" in text for text in measured.warnings)
    assert any("too few samples for a 99th percentile" in text for text in measured.warnings)


def test_enough_samples_give_both_percentiles(session, data, clock, empty_root):
    measured = profile(session, data, protocol=replace(SHORT, min_samples=662), clock=clock, root=empty_root)
    assert measured.exits[2].latency.p99_s == pytest.approx(EXIT_S[2])
    assert not [text for text in measured.warnings if "too few" in text]


def test_no_meter_here_is_said_with_its_reason(measured):
    for energy in (*(each.energy for each in measured.exits), measured.stream.energy):
        assert energy.gross_j is None
        assert energy.reason is not None
        assert energy.reason.startswith("rapl: ")
        assert "does not exist" in energy.reason
    assert measured.energy_closure is None


def test_a_protocol_may_ask_for_no_energy(session, data, clock, empty_root):
    quiet = replace(SHORT, energy_window_s=0.0)
    measured = profile(session, data, protocol=quiet, clock=clock, root=empty_root)
    assert measured.exits[0].energy.reason == "the protocol measures no energy; give it an energy_window_s"


def test_energy_of_a_replayed_meter(session, data, clock, empty_root, tmp_path):
    # 5 W all the time, so that an inference costs 5 W times its latency, and nothing once idling is taken off.
    recording = tmp_path / "power.csv"
    recording.write_text("time_s,power_w\n0,5\n100,5\n")
    meter = ReplayMeter(recording, clock=clock)
    measured = profile(
        session, data, protocol=SHORT, meter=meter, clock=clock, sleep=clock.pass_s, root=empty_root
    )  # fmt: skip
    assert [each.energy.gross_j for each in measured.exits] == pytest.approx(
        [5 * seconds for seconds in EXIT_S], rel=1e-6
    )
    assert [each.energy.net_j for each in measured.exits] == pytest.approx([0, 0, 0], abs=1e-9)
    assert measured.energy_closure is not None
    assert measured.energy_closure.ratio == pytest.approx(1, rel=0.01)
    assert measured.exits[0].energy.inferences == 1000
    assert measured.exits[0].energy.window_s == pytest.approx(1.0)
    assert measured.scripted is not None
    assert "plays a recording" in measured.scripted
    assert measured.settings["idle_w"] == pytest.approx([5, 5])


def test_a_recording_that_ends_becomes_the_reason(session, data, clock, empty_root, tmp_path):
    recording = tmp_path / "power.csv"
    recording.write_text("time_s,power_w\n0,5\n3,5\n")
    meter = ReplayMeter(recording, clock=clock)
    measured = profile(
        session, data, protocol=SHORT, meter=meter, clock=clock, sleep=clock.pass_s, root=empty_root
    )  # fmt: skip
    assert "recording ends after 3 s" in (measured.exits[0].energy.reason or "")
    assert any("although there is a meter" in text for text in measured.warnings)
    assert measured.exits[0].latency.median_s == pytest.approx(EXIT_S[0])


def test_a_given_meter_that_cannot_measure_is_an_error(session, data, clock, empty_root):
    with pytest.raises(MeasurementError, match=r"meter 'rapl' cannot measure here: .*does not exist"):
        profile(session, data, meter=RaplMeter(root=empty_root), protocol=SHORT, clock=clock, root=empty_root)


def test_the_first_run_of_all_is_timed_and_a_later_one_is_not(session, data, clock, empty_root):
    first = profile(session, data, protocol=SHORT, clock=clock, root=empty_root)
    second = profile(session, data, protocol=SHORT, clock=clock, root=empty_root)
    assert first.first_run_s == pytest.approx(EXIT_S[2])
    assert second.first_run_s is None
    assert any("had run before" in text for text in second.warnings)


def test_the_same_seed_takes_the_same_turns(session, data, clock, empty_root):
    streams = [
        profile(session, data, protocol=SHORT, seed=seed, clock=clock, root=empty_root).stream.exits
        for seed in (1, 1, 2)
    ]
    assert streams[0] == streams[1] != streams[2]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interrupted_it_gives_back_policy_and_collector(session, data, clock, empty_root, stop):
    own, run = session.policy, session.run

    def interrupted(inputs, **options):
        if clock.now_ns > 50_000_000:
            assert not gc.isenabled()
            raise stop
        return run(inputs, **options)

    session.run = interrupted
    with pytest.raises(stop):
        profile(session, data, policy=Policy.never(3), protocol=SHORT, clock=clock, root=empty_root)
    assert session.policy is own
    assert gc.isenabled()


def test_a_policy_for_another_network(session, data, empty_root):
    with pytest.raises(PolicyError, match="thresholds for 2 exits, the network has 3"):
        profile(session, data, policy=Policy.fixed([0.5]), root=empty_root)


def test_samples_that_are_not_numbers(session, data, empty_root):
    inputs = data.inputs.copy()
    inputs[7, 1] = np.nan
    with pytest.raises(MeasurementError, match="made up: sample 7 holds NaN"):
        profile(session, replace(data, inputs=inputs), root=empty_root)


def test_labels_of_another_task(session, data, empty_root):
    with pytest.raises(MeasurementError, match="labels go from 0 to 9, but the network tells 3 classes apart"):
        profile(session, replace(data, labels=np.arange(40) % 10), root=empty_root)


def test_samples_of_another_shape(session, empty_root):
    with pytest.raises(InputError, match="expected shape"):
        profile(session, Dataset(inputs=np.zeros((4, 9), np.float32)), root=empty_root)


def test_decisions_that_a_batch_changes_are_told(session, data, clock, empty_root):
    run = session.run

    def other_in_batches(inputs, **options):
        result = run(inputs, **options)
        return result if len(inputs) == 1 else msgspec.structs.replace(result, exit=np.zeros_like(result.exit))

    session.run = other_in_batches
    measured = profile(session, data, protocol=SHORT, clock=clock, root=empty_root)
    assert any("left elsewhere in a batch" in text for text in measured.warnings)


def test_protocols_by_name():
    assert as_protocol("quick") is QUICK
    assert as_protocol("standard") is STANDARD
    assert STANDARD.min_samples >= 662
    assert STANDARD.min_seconds >= 60
    with pytest.raises(MeasurementError, match="no protocol is called 'slow'"):
        as_protocol("slow")  # type: ignore[arg-type]
    with pytest.raises(MeasurementError, match="min_samples must be at least 1"):
        Protocol(min_samples=0)


def test_progress_goes_up_to_the_end(session, data, clock, empty_root):
    told: dict[str, list[float]] = {}
    profile(
        session, data, protocol=SHORT, clock=clock, root=empty_root,
        progress=lambda task, done, total: told.setdefault(task, []).append(done / total),
    )  # fmt: skip
    assert set(told) == {"measure latency", "check answers"}
    for fractions in told.values():
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1


def test_on_this_machine(session, data):
    """The real clock, sensors and memory of whatever this runs on."""
    brief = Protocol(warmup_rounds=1, warmup_s=0.0, min_samples=3, min_seconds=0.0, max_seconds=1.0, energy_window_s=0)
    measured = profile(session, data, protocol=brief)
    assert all(each.latency.min_s > 0 for each in measured.exits)
    assert measured.peak_rss_bytes is None or measured.peak_rss_bytes > 10 << 20
    assert measured.before.cores == measured.after.cores
