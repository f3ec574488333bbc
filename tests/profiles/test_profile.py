from __future__ import annotations

import gc
import shutil
from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edgekit.data import Dataset
from edgekit.errors import InputError, MeasurementError, PolicyError
from edgekit.policy import Policy
from edgekit.profiles import (
    PUBLISHABLE,
    QUICK,
    STANDARD,
    ProfileStopped,
    Protocol,
    RaplMeter,
    ReplayMeter,
    profile,
)
from edgekit.profiles.jetson import JetsonMeter
from edgekit.profiles.protocol import as_protocol
from edgekit.records import Profile
from edgekit.runtimes.fake import FakeDevice, FakeRuntime
from edgekit.session import Session
from tests.profiles.conftest import three_exits
from tests.profiles.test_jetson import plant
from tests.profiles.test_workloads import gated

EXIT_S = (0.001, 0.003, 0.007)
SHORT = Protocol(
    name="short", warmup_rounds=2, warmup_s=0.0, min_samples=20, min_seconds=0.0, max_seconds=1e9,
    max_warmup_s=0.0, stages_s=0.0, energy_window_s=10.0, energy_windows=3, idle_s=2.0,
)  # fmt: skip


@pytest.fixture
def take(session, data, clock, empty_root):
    """Profiles on the virtual clock; whatever is given replaces what it would use."""

    def taken(**options) -> Profile:
        given = {"protocol": SHORT, "clock": clock, "sleep": clock.pass_s, "repeat": clock.repeat, "root": empty_root}
        return profile(options.pop("session", session), options.pop("data", data), **{**given, **options})

    return taken


@pytest.fixture
def measured(take) -> Profile:
    return take()


def test_every_exit_takes_exactly_what_its_stages_take(measured):
    assert [each.latency.median_s for each in measured.exits] == pytest.approx(EXIT_S, rel=1e-12)
    assert [each.latency.sd_s for each in measured.exits] == pytest.approx([0, 0, 0], abs=1e-15)
    assert [each.macs for each in measured.exits] == [10, 30, 60]


def test_the_parts_explain_the_stream(measured):
    assert measured.closure.ratio == pytest.approx(1.0, rel=1e-12)
    by_hand = np.mean([EXIT_S[index] for index in measured.stream.exits])
    assert measured.closure.measured == pytest.approx(by_hand, rel=1e-12)
    assert "latency-closure" not in [check.rule for check in measured.broken]


def test_a_stream_that_costs_more_than_its_exits_is_doubted(take, session, clock):
    run = session.run

    def slow_stream(inputs, **options):
        clock.now_ns += 2_000_000 if options.get("exit") is None and len(inputs) == 1 else 0
        return run(inputs, **options)

    session.run = slow_stream
    measured = take()
    assert measured.closure.measured - measured.closure.predicted == pytest.approx(0.002, rel=1e-9)
    assert "latency-closure" in [check.rule for check in measured.broken]
    assert not measured.valid


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


def test_without_labels_there_is_no_accuracy(take, data):
    measured = take(data=replace(data, labels=None))
    assert [each.accuracy for each in measured.exits] == [None] * 3
    assert [each.share for each in measured.exits] == [0.5, 0.25, 0.25]
    assert measured.stream.accuracy is None


def test_an_exit_that_nobody_takes_has_a_share_and_no_accuracy(take):
    never = Policy.never(3)
    measured = take(policy=never)
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


def test_enough_samples_give_both_percentiles(take):
    measured = take(protocol=replace(SHORT, min_samples=662))
    assert measured.exits[2].latency.p99_s == pytest.approx(EXIT_S[2])
    assert not [text for text in measured.warnings if "too few" in text]


def test_no_meter_here_is_said_with_its_reason(measured):
    for energy in (*(each.energy for each in measured.exits), measured.stream.energy):
        assert energy.gross_j is None
        assert energy.reason is not None
        assert "meters can measure here (edgekit doctor says why of each)" in energy.reason
    assert measured.energy_closure is None


def test_a_protocol_may_ask_for_no_energy(take):
    quiet = replace(SHORT, energy_window_s=0.0)
    measured = take(protocol=quiet)
    assert measured.exits[0].energy.reason == "the protocol measures no energy; give it an energy_window_s"


def recording(path, *, seconds=1000):
    """5 W and a little more or less, so that no rule takes the sensor for stuck."""
    lines = [f"{second},{5 + 0.001 * (second % 2)}" for second in range(seconds + 1)]
    path.write_text("\n".join(["time_s,power_w", *lines]) + "\n")
    return path


def test_energy_of_a_replayed_meter(take, clock, tmp_path):
    # An inference costs 5 W times its latency, and nothing once idling is taken off.
    measured = take(
        meter=ReplayMeter(recording(tmp_path / "power.csv"), clock=clock), protocol=replace(SHORT, idle_s=10)
    )
    for energy, seconds in zip([each.energy for each in measured.exits], EXIT_S, strict=True):
        assert energy.gross_j == pytest.approx(5 * seconds, rel=1e-3)
        assert energy.net_j == pytest.approx(0, abs=1e-5)
        assert energy.low_j < 5.0005 * seconds < energy.high_j
        assert (energy.windows, energy.method) == (3, "replay")
    assert measured.exits[0].energy.inferences == 10_000
    assert measured.exits[0].energy.window_s == pytest.approx(10.0)
    assert [each.added_j.value for each in measured.exits] == pytest.approx([0.005, 0.01, 0.02], rel=1e-3)
    assert measured.energy_closure is not None
    assert measured.energy_closure.ratio == pytest.approx(1, rel=0.01)
    assert "plays a recording" in (measured.scripted or "")
    assert measured.settings["idle_w"] == pytest.approx([5, 5], rel=1e-3)
    assert measured.meter.replay
    assert len(measured.power.times_s) == len(measured.power.power_w) > 1000
    kinds = Counter(each.kind for each in measured.windows)
    assert kinds == {"idle": 2, "exit": 9, "stream": 3}
    energy_rules = {
        check.rule: check for check in measured.checks if check.rule.startswith(("energy", "idle", "sensor"))
    }
    assert len(energy_rules) >= 5
    assert all(check.passed for check in energy_rules.values())


def test_a_recording_that_ends_becomes_the_reason(take, clock, tmp_path):
    measured = take(meter=ReplayMeter(recording(tmp_path / "power.csv", seconds=3), clock=clock))
    assert "recording ends after 3 s" in (measured.exits[0].energy.reason or "")
    assert any("energy was not measured to the end" in text for text in measured.warnings)
    assert "meter-to-the-end" in [check.rule for check in measured.broken]
    assert measured.exits[0].latency.median_s == pytest.approx(EXIT_S[0])


def test_a_sensor_that_vanishes_leaves_the_windows_it_measured(take, clock, tmp_path):
    measured = take(meter=ReplayMeter(recording(tmp_path / "power.csv", seconds=50), clock=clock))
    energies = [*(each.energy for each in measured.exits), measured.stream.energy]
    assert 0 < sum(energy.windows for energy in energies) < 12
    assert measured.complete
    assert measured.windows


def jetson(tmp_path):
    return plant("jetson-orin-nano", tmp_path / "jetson")


def test_a_sensor_whose_files_vanish_leaves_all_that_was_measured(take, session, clock, tmp_path):
    """It cannot even be asked what it is any more."""
    root, run = jetson(tmp_path), session.run

    def vanishing(inputs, **options):
        if clock.now_ns > 60e9:
            shutil.rmtree(root, ignore_errors=True)
        return run(inputs, **options)

    session.run = vanishing
    kept: list[Profile] = []
    measured = take(meter=JetsonMeter(root=root, clock=clock), keep=kept.append)
    assert kept
    assert measured.meter.name == "jetson"
    assert "can no longer be read" in next(check for check in measured.broken if check.rule == "meter-to-the-end").says
    assert measured.windows
    assert measured.exits[0].latency.median_s == pytest.approx(EXIT_S[0])
    assert measured.scripted == "the runtime 'fake' is scripted"


def test_a_run_whose_meter_failed_goes_on_once_that_is_mended(take, clock, tmp_path):
    protocol = replace(SHORT, paced_hz=(10.0,), paced_s=5.0)
    path = recording(tmp_path / "power.csv", seconds=50)
    part = take(meter=ReplayMeter(path, clock=clock), protocol=protocol)
    assert part.complete
    assert part.paced[0].energy.gross_j is None
    whole = take(meter=ReplayMeter(recording(path), clock=clock), resume=part, protocol=protocol)
    assert whole.windows[: len(part.windows)] == part.windows
    assert [each.energy.windows for each in (*whole.exits, whole.stream)] == [3] * 4
    assert [each.energy.gross_j for each in whole.paced] == [pytest.approx(0.5, rel=1e-3)]
    assert "meter-to-the-end" not in [check.rule for check in whole.broken]
    with pytest.raises(MeasurementError, match="is complete; there is nothing to resume"):
        take(meter=ReplayMeter(path, clock=clock), resume=whole, protocol=protocol)


def test_another_voltage_is_no_other_meter(take, session, clock, tmp_path):
    """A Jetson's step is computed from the voltage of the moment."""
    root = jetson(tmp_path)
    stopped_at(session, clock, 60.0)
    with pytest.raises(ProfileStopped) as caught:
        take(meter=JetsonMeter(root=root, clock=clock))
    part = caught.value.profile
    (volts,) = root.rglob("in1_input")
    volts.write_text("4990\n")
    whole = take(meter=JetsonMeter(root=root, clock=clock), resume=part)
    assert whole.windows[: len(part.windows)] == part.windows
    assert whole.meter.resolution != part.meter.resolution
    with pytest.raises(MeasurementError, match="meter 'jetson' was used; give it again"):
        take(meter=ReplayMeter(recording(tmp_path / "power.csv"), clock=clock), resume=part)


def test_the_stream_s_energy_is_that_of_the_stream_whatever_is_held_in_memory(take, clock, tmp_path, monkeypatch):
    """11 of 40 samples are held: 5 W for 3 ms on average are 15 mJ, by the shares of all."""
    monkeypatch.setattr("edgekit.profiles.inputs.POOL_BYTES", 11 * 16)
    protocol = replace(SHORT, paced_hz=(10.0,), paced_s=10.0, energy_window_s=4.0)
    for seed in range(2):
        measured = take(meter=ReplayMeter(recording(tmp_path / "power.csv"), clock=clock), seed=seed, protocol=protocol)
        energy = measured.stream.energy
        assert energy.gross_j == pytest.approx(0.015, rel=0.005)
        assert energy.low_j < 0.015 < energy.high_j
        assert np.mean(measured.paced[0].latency_ns) * 1e-9 == pytest.approx(0.003, rel=0.05)


def test_a_sensor_that_is_stuck_at_nothing_closes_nothing(take, clock, scripted_meter):
    measured = take(meter=scripted_meter(lambda _: 0.0, clock, quantity="power"))
    assert measured.stream.energy.gross_j == 0
    assert measured.energy_closure is None
    assert "sensor-alive" in [check.rule for check in measured.broken]


def test_of_gates_closed_one_by_one_no_windows_are_taken_and_why_is_said(take, handler, clock, tmp_path):
    made = {"first": ("x", "g"), "second": ("y", "h"), "other": ("y", "v")}

    def handle(stage, tensors):
        if stage not in made:
            return handler(stage, tensors)
        read, written = made[stage]
        return {written: tensors[read]}

    protocol = replace(SHORT, energy_window_s=1.0, energy_windows=1)
    with Session(gated(), FakeRuntime(handle), {}, policy=Policy.fixed([0.5, 0.5])) as session:
        meter = ReplayMeter(recording(tmp_path / "power.csv"), clock=clock)
        paths = {each.name: each.energy for each in take(session=session, protocol=protocol, meter=meter).paths}
    assert paths["all gates open"].gross_j is not None
    assert paths["without outer"].gross_j is None
    assert "not with each closed alone" in paths["without outer"].reason
    assert "resume" not in paths["without outer"].reason


def test_a_given_meter_that_cannot_measure_is_an_error(take, empty_root):
    with pytest.raises(MeasurementError, match=r"meter 'rapl' cannot measure here: .*does not exist"):
        take(meter=RaplMeter(root=empty_root))


def test_the_first_run_of_all_is_timed_and_a_later_one_is_not(take):
    first = take()
    second = take()
    assert first.first_run_s == pytest.approx(EXIT_S[2])
    assert second.first_run_s is None
    assert any("had run before" in text for text in second.warnings)


def test_the_same_seed_takes_the_same_turns(take):
    streams = [take(seed=seed).stream.exits for seed in (1, 1, 2)]
    assert streams[0] == streams[1] != streams[2]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interrupted_it_gives_back_policy_and_collector(take, session, clock, stop):
    own, run = session.policy, session.run

    def interrupted(inputs, **options):
        if clock.now_ns > 100_000_000:
            assert not gc.isenabled()
            raise stop
        return run(inputs, **options)

    session.run = interrupted
    with pytest.raises(stop):
        take(policy=Policy.never(3))
    assert session.policy is own
    assert gc.isenabled()


def stopped_at(session, clock, at_s):
    """Ctrl-C once, at some time."""
    run, done = session.run, []

    def stopping(inputs, **options):
        if clock.now_ns > at_s * 1e9 and not done:
            done.append(True)
            raise KeyboardInterrupt
        return run(inputs, **options)

    session.run = stopping


@pytest.mark.parametrize("at_s", [0.25, 10.0, 60.0, 90.0, 108.0])
def test_what_was_stopped_is_kept_and_goes_on(take, session, clock, tmp_path, at_s):
    """In the latencies, in the windows, in those of 2N and of 3N inferences, and at the paced stream."""
    protocol = replace(SHORT, paced_hz=(10.0,), paced_s=5.0, energy_window_s=3.0, slope=True)
    path = recording(tmp_path / "power.csv")
    stopped_at(session, clock, at_s)
    with pytest.raises(ProfileStopped) as caught:
        take(protocol=protocol, meter=ReplayMeter(path, clock=clock))
    part = caught.value.profile
    assert not part.complete
    assert "complete" in [check.rule for check in part.broken]
    saved = Profile.load(part.save(tmp_path / "part.json"))
    whole = take(protocol=protocol, meter=ReplayMeter(path, clock=clock), resume=saved)
    assert whole.complete
    assert whole.settings["parts"] == 2
    for before, after in zip(part.exits, whole.exits, strict=True):
        assert after.latency_ns[: len(before.latency_ns)] == before.latency_ns
    assert part.reference_ns
    assert whole.reference_ns[: len(part.reference_ns)] == part.reference_ns
    assert 0 <= len(whole.reference_ns) - whole.settings["rounds"] <= 1, "a round that was broken off has its own"
    assert whole.windows[: len(part.windows)] == part.windows
    assert Counter(each.name for each in whole.windows if each.kind in ("exit", "stream")) == {
        "exit0": 3, "exit1": 3, "exit2": 3, "stream": 3,
    }  # fmt: skip
    assert Counter(each.name for each in whole.windows if each.kind == "slope") == dict.fromkeys(
        ("exit0", "exit1", "exit2", "stream"), 2
    )
    starts = [each.start_s for each in whole.windows]
    assert starts == sorted(starts)
    assert list(whole.power.times_s) == sorted(whole.power.times_s)
    assert [each.rate_hz for each in whole.paced] == [10.0]
    assert "complete" not in [check.rule for check in whole.broken]
    assert (part.stream.accuracy, whole.stream.accuracy) == (None, 0.875)


def test_only_the_same_measurement_goes_on(take, session, clock, data):
    stopped_at(session, clock, 0.25)
    with pytest.raises(ProfileStopped) as caught:
        take()
    part = caught.value.profile
    for options, name in (
        ({"policy": Policy.never(3)}, "policy"),
        ({"data": data.take(slice(0, 30))}, "data_sha256"),
        ({"protocol": replace(SHORT, min_samples=21)}, "settings.protocol"),
    ):
        with pytest.raises(MeasurementError, match=f"cannot be resumed: {name} was .* measure anew"):
            take(resume=part, **options)
    for name, value in (
        ("host", "elsewhere"), ("system", "Linux 1"), ("processor", "Z80"), ("cores", 1), ("affinity", (7,)),
        ("governors", {"cpu0": "powersave"}), ("frequency_limits_hz", (1e9, 2e9)), ("boost", True),
        ("power_mode", "15W"), ("versions", part.before.versions | {"edgekit": "0.0.1"}),
    ):  # fmt: skip
        other = msgspec.structs.replace(part, before=msgspec.structs.replace(part.before, **{name: value}))
        with pytest.raises(MeasurementError, match=rf"before\.{name}.* was .* and is .*; measure anew"):
            take(resume=other)
    unloaded = part.before.versions | {"of a library that is not loaded now": "2.0"}
    other = msgspec.structs.replace(part, before=msgspec.structs.replace(part.before, versions=unloaded))
    assert take(resume=other).complete
    with pytest.raises(MeasurementError, match="is complete; there is nothing to resume"):
        take(resume=take())


def test_what_there_is_is_given_every_minute(take, clock, tmp_path):
    kept: list[Profile] = []
    whole = take(meter=ReplayMeter(recording(tmp_path / "power.csv"), clock=clock), keep=kept.append)
    assert [len(each.windows) for each in kept] == sorted({len(each.windows) for each in kept})
    assert len(kept) == 3  # after the latencies, and twice in 133 s of windows
    assert not any(each.complete for each in kept)
    assert whole.windows[: len(kept[-1].windows)] == kept[-1].windows


def test_paced_streams(take, clock, tmp_path):
    protocol = replace(SHORT, paced_hz=(10.0, 200.0), paced_s=5.0)
    measured = take(protocol=protocol)
    slow, fast = measured.paced
    assert (slow.rate_hz, slow.late, len(slow.latency_ns)) == (10.0, 0, 50)
    assert slow.latency.median_s in EXIT_S
    assert slow.energy.reason == measured.stream.energy.reason
    assert fast.late > 0  # 7 ms at 5 ms each
    with_meter = take(protocol=protocol, meter=ReplayMeter(recording(tmp_path / "power.csv"), clock=clock))
    assert with_meter.paced[0].energy.gross_j == pytest.approx(0.5, rel=1e-3)


def test_the_device_has_a_clock_of_its_own(take, handler, clock):
    device = FakeDevice(handler, device_clock=clock)
    with Session(three_exits(), device, {}, policy=Policy.fixed([0.5, 0.5])) as session:
        measured = take(session=session)
    assert measured.exits[1].device.median_s == pytest.approx(0.003)
    assert measured.exits[1].latency.median_s == pytest.approx(0.003)
    assert len(measured.stream.device_ns) == len(measured.stream.latency_ns)


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


def test_decisions_that_a_batch_changes_are_told(take, session):
    run = session.run

    def other_in_batches(inputs, **options):
        result = run(inputs, **options)
        return result if len(inputs) == 1 else msgspec.structs.replace(result, exit=np.zeros_like(result.exit))

    session.run = other_in_batches
    measured = take()
    assert any("left elsewhere in a batch" in text for text in measured.warnings)


def test_protocols_by_name():
    assert as_protocol("quick") is QUICK
    assert as_protocol("standard") is STANDARD
    assert as_protocol("publishable") is PUBLISHABLE
    # MLPerf: 1024 queries and 60 s on mobile devices, 600 s on the edge; 6636 samples for a 99.9th percentile.
    assert (STANDARD.min_samples, STANDARD.min_seconds, STANDARD.energy_windows) == (1024, 60, 5)
    assert (PUBLISHABLE.min_samples, PUBLISHABLE.min_seconds) == (6636, 600)
    with pytest.raises(MeasurementError, match="no protocol is called 'slow'"):
        as_protocol("slow")  # type: ignore[arg-type]
    with pytest.raises(MeasurementError, match="min_samples must be at least 1"):
        Protocol(min_samples=0)


def test_progress_goes_up_to_the_end(take):
    told: dict[str, list[float]] = {}
    take(progress=lambda task, done, total: told.setdefault(task, []).append(done / total))
    assert set(told) == {"warm up", "measure latency", "check answers"}
    for fractions in told.values():
        assert fractions == sorted(fractions)
    assert told["measure latency"][-1] == told["check answers"][-1] == 1


def test_on_this_machine(session, data):
    """The real clock, sensors and memory of whatever this runs on."""
    brief = Protocol(
        warmup_rounds=1, warmup_s=0.0, min_samples=3, min_seconds=0.0, max_seconds=1.0, energy_window_s=0,
        stages_s=0.05,
    )  # fmt: skip
    measured = profile(session, data, protocol=brief)
    assert all(each.latency.min_s > 0 for each in measured.exits)
    assert measured.peak_rss_bytes is None or measured.peak_rss_bytes > 10 << 20
    assert measured.before.cores == measured.after.cores
