from __future__ import annotations

import pytest

from edgekit import plugins
from edgekit.errors import PluginError
from edgekit.profiles.find import find_meter


def offered(monkeypatch, meters):
    def create(kind, name, **options):
        if isinstance(meters[name], str):
            raise PluginError(meters[name])
        return meters[name]

    monkeypatch.setattr(plugins, "names", lambda kind: tuple(meters))
    monkeypatch.setattr(plugins, "create", create)


def test_no_meter_says_why_of_the_usual_one(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    meter, reason = find_meter(root=tmp_path)
    assert meter is None
    assert "meters can measure here (edgekit doctor says why of each)" in reason
    assert f"rapl: {tmp_path}/sys/class/powercap does not exist" in reason
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "jetson: " in find_meter(root=tmp_path)[1]


def test_a_meter_that_can_measure_is_found(tmp_path):
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    for name, content in (("name", "package-0"), ("energy_uj", "1"), ("max_energy_range_uj", "262143328850")):
        (zone / name).write_text(content)
    meter, reason = find_meter(root=tmp_path)
    assert meter is not None
    assert meter.name == "rapl"
    assert reason == ""


def test_the_widest_scope_wins_and_a_gpu_comes_first_for_what_runs_there(monkeypatch, clock, scripted_meter):
    made = {
        scope: scripted_meter(lambda t: t, clock, scope=scope, replay=scope == "wall")
        for scope in ("battery", "gpu", "module", "socket", "wall")
    }
    offered(monkeypatch, made)
    assert find_meter()[0] is made["module"]
    assert find_meter(on_gpu=True)[0] is made["gpu"]


@pytest.mark.parametrize("others", [{}, {"works": None}])
def test_a_broken_meter_is_a_reason_and_no_crash(monkeypatch, clock, scripted_meter, others):
    works = {name: scripted_meter(lambda t: t, clock) for name in others}
    offered(monkeypatch, {"rapl": "meter 'rapl' cannot be loaded: no such thing"} | works)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    meter, reason = find_meter()
    assert meter is works.get("works")
    assert ("no such thing" in reason) is not bool(works)


def test_a_meter_that_crashes_is_a_reason_and_the_others_measure(monkeypatch, clock, scripted_meter):
    broken, works = (scripted_meter(lambda t: t, clock) for _ in range(2))
    broken.unavailable = lambda: 1 / 0
    offered(monkeypatch, {"rapl": broken, "works": works})
    assert find_meter()[0] is works
    offered(monkeypatch, {"rapl": broken})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "rapl: broken plugin: ZeroDivisionError" in find_meter()[1]


def test_without_meters(monkeypatch):
    offered(monkeypatch, {})
    assert "no meter is registered" in find_meter()[1]
