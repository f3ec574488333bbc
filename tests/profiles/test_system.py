from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import pytest

from edgekit.environment import Environment, OtherWork
from edgekit.profiles.system import (
    collector_off,
    hottest_c,
    machine_checks,
    machine_warnings,
    peak_rss_bytes,
    steady_rss_bytes,
)


def look(**facts) -> Environment:
    known = {"taken": "2026-01-01T00:00:00+00:00", "host": "h", "system": "Linux", "machine": "aarch64"}
    return Environment(**(known | facts))


def check(rule, before, after=None, **options):
    """What one rule finds; the same look twice when only one is given."""
    found = {each.rule: each for each in machine_checks(before, before if after is None else after, **options)}
    each = found[rule]
    assert bool(each.advice) <= (each.passed is not True), "advice where nothing is wrong"
    assert each.says
    if each.passed is False:
        assert each.advice
    return each


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")
def test_peak_memory_agrees_with_getrusage():
    golden = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak_rss_bytes() == pytest.approx(golden, rel=0.05)


def test_peak_memory_of_a_recorded_machine(tmp_path):
    assert peak_rss_bytes(root=tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("VmPeak:\t  9000 kB\nVmHWM:\t  1234 kB\nVmRSS:\t 1000 kB\n")
    assert peak_rss_bytes(root=tmp_path) == 1234 * 1024
    assert steady_rss_bytes(root=tmp_path) == 1000 * 1024


def test_steady_memory(tmp_path):
    assert steady_rss_bytes(root=tmp_path) is None
    if Path("/proc/self/status").exists():
        golden = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        assert steady_rss_bytes() == pytest.approx(golden, rel=0.05)


def test_the_hottest(tmp_path):
    assert hottest_c(root=tmp_path) is None
    for index, text in enumerate(("41000", "63500", "nonsense")):
        zone = tmp_path / f"sys/class/thermal/thermal_zone{index}"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(text)
    assert hottest_c(root=tmp_path) == 63.5


def test_the_collector_comes_back_only_if_it_was_on():
    assert gc.isenabled()
    with collector_off():
        assert not gc.isenabled()
        with collector_off():
            assert not gc.isenabled()
        assert not gc.isenabled(), "it was off outside of the inner block"
    assert gc.isenabled()


def test_a_quiet_fixed_machine_is_not_doubted():
    quiet = look(busy=0.01, governors={"cpu0": "performance"}, frequencies_hz={"cpu0": 2e9})
    assert list(machine_warnings(quiet, quiet)) == []
    assert list(machine_warnings(look(), look())) == []


def test_a_machine_that_tells_nothing_is_not_accused():
    found = {each.rule: each.passed for each in machine_checks(look(), look())}
    assert found == {
        "quiet-machine": None,
        "steady-clock": None,
        "no-throttling": None,
        "mains-power": None,
        "clock-jump": None,
        "same-machine": True,
    }


def test_other_work_is_told_with_its_time_and_its_name():
    culprit = OtherWork(name="chrome", pid=4242, processors=1.6)
    found = check("quiet-machine", look(busy=0.0, cores=2), look(busy=0.83, cores=2, competitors=(culprit,)))
    assert found.passed is False
    assert found.says.startswith("other work used 83% of the processors just after the measurement (1.7 of 2")
    assert "chrome (pid 4242, 1.6 processors)" in found.says


@pytest.mark.parametrize(
    ("busy", "cores", "quiet"),
    [
        (0.02, 8, True),
        (0.09, 4, True),
        (0.11, 4, False),
        (0.125, 8, False),  # one whole processor of eight
        (0.0625, 16, False),  # and of sixteen
        (0.012, 64, True),  # 0.77 processors
        (0.0156, 64, False),
        (0.11, None, False),
        (0.09, None, True),
    ],
)
def test_other_work_that_is_too_much(busy, cores, quiet):
    assert check("quiet-machine", look(busy=busy, cores=cores)).passed is quiet


def test_a_governor_is_told_with_its_cure():
    (text,) = machine_warnings(look(governors={"cpu0": "performance", "cpu1": "schedutil"}), look())
    assert "schedutil" in text
    assert "cpupower frequency-set -g performance" in text
    (text,) = machine_warnings(look(governors={"cpu0": "schedutil"}, power_modes={"0": "MAXN"}), look())
    assert text.endswith("sudo jetson_clocks")
    assert list(machine_warnings(look(governors={"cpu0": "schedutil"}, clocks_fixed=True), look())) == []


def test_a_clock_that_changed():
    before, after = look(frequencies_hz={"cpu0": 2e9, "cpu1": 2e9}), look(frequencies_hz={"cpu0": 1.5e9, "cpu1": 2e9})
    found = check("steady-clock", before, after)
    assert found.passed is False
    assert "cpu0 changed by 25%" in found.says
    assert check("steady-clock", before, look(frequencies_hz={"cpu0": 1.95e9, "cpu1": 2e9})).passed is True


def test_a_clock_that_follows_the_load_says_nothing():
    before, after = (
        look(governors={"cpu0": "ondemand"}, frequencies_hz={"cpu0": 6e8}),
        look(frequencies_hz={"cpu0": 2e9}),
    )
    found = check("steady-clock", before, after)
    assert found.passed is None
    assert "doctor --fix" in found.advice


def test_of_x86_the_fastest_processor_counts():
    """One at rest tells what it had when it went to sleep."""
    before = look(machine="x86_64", frequencies_hz={"cpu0": 3e9, "cpu1": 8e8})
    assert (
        check("steady-clock", before, look(machine="x86_64", frequencies_hz={"cpu0": 8e8, "cpu1": 3e9})).passed is True
    )
    slow = look(machine="x86_64", frequencies_hz={"cpu0": 8e8, "cpu1": 2e9})
    assert check("steady-clock", before, slow).passed is False


@pytest.mark.parametrize(
    ("before", "after", "sign"),
    [
        (
            {"throttle_counts": {"core_throttle_count": 3}},
            {"throttle_counts": {"core_throttle_count": 5}},
            "from 3 to 5",
        ),
        ({"throttled": 0x0}, {"throttled": 0x4}, "throttled now"),
        ({"throttled": 0x1}, {"throttled": 0x1}, "under-voltage now"),
        ({"throttled": 0x10000}, {"throttled": 0x90000}, "soft temperature limit during the measurement"),
        ({"cooling": {"Processor": 1}}, {"cooling": {"Processor": 1}}, "Processor is at work"),
        ({"cooling": {"cpufreq-cpu0": 0}}, {"cooling": {"cpufreq-cpu0": 2}}, "cpufreq-cpu0 is at work"),
        ({"cooling": {"intel_powerclamp": -1}}, {"cooling": {"intel_powerclamp": 20}}, "intel_powerclamp is at work"),
        (
            {"passive_trips_c": {"soc": 85.0}, "temperatures_c": {"soc": 60.0}},
            {"passive_trips_c": {"soc": 85.0}, "temperatures_c": {"soc": 86.0}},
            "soc is at its passive trip point",
        ),
        ({"alarms": ()}, {"alarms": ("ina3221 VDD_IN curr1_crit_alarm",)}, "VDD_IN curr1_crit_alarm is raised"),
    ],
)
def test_signs_of_throttling(before, after, sign):
    found = check("no-throttling", look(**before), look(**after))
    assert found.passed is False
    assert sign in found.says


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"throttle_counts": {"core_throttle_count": 3}}, {"throttle_counts": {"core_throttle_count": 3}}),
        ({"throttled": 0x50000}, {"throttled": 0x50000}),
        ({"cooling": {"pwm-fan": 0}}, {"cooling": {"pwm-fan": 4}}),
        ({"cooling": {"TCC Offset": 3}}, {"cooling": {"TCC Offset": 3}}),
        ({"cooling": {"intel_powerclamp": -1}}, {"cooling": {"intel_powerclamp": 0}}),
        ({"passive_trips_c": {"soc": 85.0}}, {"passive_trips_c": {"soc": 85.0}, "temperatures_c": {"soc": 84.0}}),
    ],
)
def test_what_is_no_throttling(before, after):
    assert check("no-throttling", look(**before), look(**after)).passed is True


@pytest.mark.parametrize(
    ("before", "after", "scope", "passed"),
    [
        ("mains", "mains", None, True),
        ("battery", "battery", None, False),
        ("mains", "battery", "socket", False),
        ("battery", "battery", "battery", True),
        ("mains", "battery", "battery", False),
        ("mains", "mains", "battery", False),
        (None, "mains", None, None),
    ],
)
def test_mains(before, after, scope, passed):
    found = check("mains-power", look(power_source=before), look(power_source=after), meter_scope=scope)
    assert found.passed is passed


@pytest.mark.parametrize(("moved_s", "passed"), [(0.0, True), (0.4, True), (-2.0, False), (3600.0, False)])
def test_a_clock_that_jumped(moved_s, passed):
    found = check("clock-jump", look(clock_offset_s=1.7e9), look(clock_offset_s=1.7e9 + moved_s))
    assert found.passed is passed


def test_two_machines():
    found = check("same-machine", look(cores=8), look(host="other", cores=6))
    assert found.passed is False
    assert found.says == "host h before, other after; cores 8 before, 6 after"


def test_two_kinds_of_core():
    types = {f"cpu{number}": "Cortex-A55" if number < 4 else "Cortex-A76" for number in range(8)}
    (text,) = machine_warnings(look(core_types=types, affinity=tuple(range(8))), look())
    assert "2 types of core" in text
    assert "taskset -c 4-7 edgekit profile ... (Cortex-A76)" in text
    assert list(machine_warnings(look(core_types=types, affinity=(4, 5)), look())) == []


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ({"boost": True}, {}, "turbo"),
        ({"throttled": 0x10000}, {"throttled": 0x10000}, "under-voltage"),
        ({"swap_used_bytes": 0}, {"swap_used_bytes": 4096}, "swap"),
        (
            {"passive_trips_c": {"soc": 85.0}, "temperatures_c": {"soc": 81.0}},
            {},
            "soc: less than 5 °C below throttling",
        ),
    ],
)
def test_other_doubts(before, after, word):
    (text,) = machine_warnings(look(**before), look(**after))
    assert word in text
