"""Tables of stages, operators, paths and rates; charts over time; validity."""

import msgspec
import numpy as np
import pytest

from edgekit.measured import Check, PowerTrace
from edgekit.report.sheets import operator_sheet, paced_sheet, path_sheet, sheets, stage_sheet, window_sheet
from edgekit.report.timeline import gates_figure, power_figure, stages_figure
from edgekit.report.validity import validity


def texts(sheet, line):
    return dict(zip(sheet.headings, (cell.text for cell in sheet.lines[line]), strict=True))


def test_stages(full, profile):
    shown = texts(stage_sheet(full), 2)
    assert shown == {
        "stage": "block2",
        "share": "18.2 %",
        "compute [µs]": "720.0 ±8.6",
        "compute CI": "711.4–728.6",
        "of it head": "96.00 ±29",
        "decision": "11.00 ±0.33",
        "boundary": "16.00 ±0.48",
    }
    assert texts(stage_sheet(full), 4)["of it head"] == "–"
    assert stage_sheet(profile) is None


def test_paths_say_what_closing_saves_and_whether_that_is_known(full):
    sheet = path_sheet(full)
    assert texts(sheet, 0)["closing it saves [ms]"] == "–"
    assert texts(sheet, 1)["closing it saves [ms]"] == "0.528 (0.484–0.572)"
    assert texts(sheet, 2)["closing it saves [ms]"] == "0.000 (−0.044 to 0.044, spans zero)"
    assert not any("energy" in heading for heading in sheet.headings)


def test_rates_are_held_against_back_to_back(full):
    sheet = paced_sheet(full)
    assert texts(sheet, 0)["against"] == "1.000×"
    ratio = full.paced[0].latency.mean_s / full.stream.latency.mean_s
    assert texts(sheet, 1)["against"] == f"{ratio:.3f}×"
    assert texts(sheet, 1)["begun late"] == "1 of 200"
    assert "energy [mJ]" in sheet.headings


def test_operators(full):
    sheet = operator_sheet(full)
    assert len(sheet.lines) == 15
    assert texts(sheet, 0)["of the stage"] == "71.0 %"


def test_windows(full, profile):
    sheet, window = window_sheet(full), full.windows[1]
    assert len(sheet.lines) == 32
    shown = texts(sheet, 1)
    assert (shown["window"], shown["kind"], shown["from [s]"], shown["length [s]"]) == (
        "exit1",
        "exit",
        "15.5",
        "10.00",
    )
    assert shown["energy [J]"] == f"{window.energy_j:.4g} ±0.02"
    assert shown["power [W]"] == f"{window.energy_j / 10:.3f}"
    assert window_sheet(profile) is None


def test_a_profile_without_parts_has_no_sheets(profile, full):
    assert sheets(profile) == ()
    assert [sheet.key for sheet in sheets(full)] == ["stages", "paths", "paced"]
    assert all(len(line) == len(sheet.headings) for sheet in sheets(full) for line in sheet.lines)


def test_a_windows_area_is_its_energy(full):
    bars = [trace for trace in power_figure(full)["data"] if trace["type"] == "bar"]
    assert [trace["meta"] for trace in bars] == ["idle", "exit", "stream"]
    area = sum(y * width for trace in bars for y, width in zip(trace["y"], trace["width"], strict=True))
    assert area == pytest.approx(sum(window.energy_j for window in full.windows))
    assert "inferences, 2.3" in bars[1]["hovertext"][0]
    assert "<b>exit1</b> (exit)" in bars[1]["hovertext"][0]


def test_a_window_with_a_gap_says_so(full):
    windows = (msgspec.structs.replace(full.windows[1], gap_s=0.7), *full.windows[2:])
    bars = power_figure(msgspec.structs.replace(full, windows=windows))["data"][0]
    assert "700.0 ms without a reading" in bars["hovertext"][0]
    assert "without a reading" not in bars["hovertext"][1]


def test_power_says_which_window_it_is_in(full):
    line = power_figure(full)["data"][-1]
    assert line["hovertext"][0] == ", idle"
    assert ", exit1" in line["hovertext"]


def test_thinned_power_keeps_its_spikes(full):
    watts = np.full(50_000, 2.0)
    watts[31_234] = 90.0
    power = PowerTrace(times_s=tuple(map(float, np.arange(50_000) * 0.01)), power_w=tuple(map(float, watts)))
    line = power_figure(msgspec.structs.replace(full, power=power))["data"][-1]
    assert len(line["x"]) <= 3000
    assert max(line["y"]) == 90.0
    assert line["x"] == sorted(line["x"])


def test_windows_without_a_trace_of_power(full, profile):
    bare = msgspec.structs.replace(full, power=PowerTrace())
    assert {trace["type"] for trace in power_figure(bare)["data"]} == {"bar"}
    assert power_figure(profile) is None


def test_parts_of_a_stage_are_its_whole(full):
    figure = stages_figure(full)
    stage = full.stages[1]
    whole = stage.boundary.value + stage.compute.value + stage.decision.value
    assert sum(trace["x"][1] for trace in figure["data"]) == pytest.approx(1e6 * whole)


def test_gates_of_which_nothing_is_known_are_pale(full, profile):
    trace = gates_figure(full)["data"][0]
    assert trace["y"] == ["without blocks.1", "without &lt;b&gt;2&lt;/b&gt;"]
    assert len(set(trace["marker"]["color"])) == 2
    assert "spans zero" in trace["hovertext"][1]
    assert gates_figure(profile) is None


def test_validity(full, invalid, profile):
    assert (validity(full).state, validity(full).headline) == ("valid", "Valid")
    assert validity(full).counts == "2 rules kept, 1 could not be looked at"
    assert validity(invalid).state == "invalid"
    assert [check.rule for check in validity(invalid).broken] == ["energy-window", "quiet-machine"]
    assert validity(profile).state == "unjudged"
    stopped = msgspec.structs.replace(full, complete=False)
    assert (validity(stopped).state, validity(stopped).headline) == ("invalid", "INCOMPLETE")
    one = msgspec.structs.replace(profile, checks=(Check(rule="x", passed=False, says="y"),))
    assert validity(one).headline == "INVALID: 1 of 1 rule broken"
