from __future__ import annotations

import gc

import numpy as np
import pytest

from edgekit.profiles.paced import measure_paced
from edgekit.profiles.recorder import Recorder
from edgekit.progress import silent


def paced(clock, durations_s, *, rate_hz=10.0, recorder=None):
    durations = iter(durations_s)

    def run():
        assert not gc.isenabled()
        clock.pass_s(next(durations))
        return 0

    return measure_paced(
        run, rate_hz=rate_hz, seconds=len(durations_s) / rate_hz, recorder=recorder, clock=clock, sleep=clock.pass_s,
        progress=silent,
    )  # fmt: skip


def test_inferences_begin_at_their_time(clock):
    found = paced(clock, [0.02, 0.03, 0.02, 0.02])
    assert found.latency_ns == pytest.approx([2e7, 3e7, 2e7, 2e7])
    assert found.late == 0
    assert clock.now_ns == pytest.approx(4e8)


def test_what_could_not_begin_in_time_counts_from_when_its_sample_was_there(clock):
    # The second takes three periods: the third waits 200 ms, the fourth 120 ms, the fifth 40 ms.
    found = paced(clock, [0.02, 0.3, 0.02, 0.02, 0.02, 0.02])
    assert np.array(found.latency_ns) * 1e-9 == pytest.approx([0.02, 0.3, 0.22, 0.14, 0.06, 0.02])
    assert found.late == 3


def test_energy_holds_the_idling(clock, scripted_meter):
    busy_s = [0.0]
    meter = scripted_meter(lambda time_s: 2 * time_s + 4 * busy_s[0], clock)
    with Recorder(meter, zero_ns=0, repeat=clock.repeat) as recorder:
        found = measure_paced(
            lambda: (clock.pass_s(0.02), busy_s.__setitem__(0, busy_s[0] + 0.02), 0)[-1],
            rate_hz=10.0, seconds=10.0, recorder=recorder, clock=clock, sleep=clock.pass_s, progress=silent,
        )  # fmt: skip
    assert found.window.inferences == 100
    assert found.window.energy_j / 100 == pytest.approx(0.2 + 0.08, rel=0.01)
    assert found.window.stop_s - found.window.start_s == pytest.approx(10.0)
