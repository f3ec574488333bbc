from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import pytest

from edgekit.environment import Environment
from edgekit.profiles.system import collector_off, machine_warnings, peak_rss_bytes


def look(**facts) -> Environment:
    return Environment(taken="2026-01-01T00:00:00+00:00", host="h", system="Linux", machine="aarch64", **facts)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")
def test_peak_memory_agrees_with_getrusage():
    golden = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak_rss_bytes() == pytest.approx(golden, rel=0.05)


def test_peak_memory_of_a_recorded_machine(tmp_path):
    assert peak_rss_bytes(root=tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("VmPeak:\t  9000 kB\nVmHWM:\t  1234 kB\nVmRSS:\t 1000 kB\n")
    assert peak_rss_bytes(root=tmp_path) == 1234 * 1024


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


def test_other_work_is_told_with_its_time():
    (text,) = machine_warnings(look(busy=0.0), look(busy=0.83))
    assert text.startswith("other work used 83% of the processors just after")


def test_a_governor_is_told_with_its_cure():
    (text,) = machine_warnings(look(governors={"cpu0": "performance", "cpu1": "schedutil"}), look())
    assert "schedutil" in text
    assert "cpupower frequency-set -g performance" in text


def test_a_clock_that_changed():
    before, after = look(frequencies_hz={"cpu0": 2e9, "cpu1": 2e9}), look(frequencies_hz={"cpu0": 1.5e9, "cpu1": 2e9})
    (text,) = machine_warnings(before, after)
    assert "changed by 25%" in text
