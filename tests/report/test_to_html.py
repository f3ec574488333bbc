"""The HTML file without a browser: content, size, escaping, errors, nothing half-written."""

import errno
import html
import json
import os
import re
import sys
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgekit.errors import MeasurementError, MissingExtraError
from edgekit.report import charts, write_html
from edgekit.report.costs import cost_figures

pytest.importorskip("plotly", reason="the report extra is not installed")
pytest.importorskip("jinja2", reason="the report extra is not installed")


def parts(path):
    """Text without the plotting library, and the figures."""
    page = Path(path).read_text(encoding="utf-8")
    figures = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S).group(1)
    text = re.sub(r"<script.*?</script>", " ", page, flags=re.S)
    return text, json.loads(figures)


def words(text):
    return " ".join(html.unescape(re.sub(r"<style.*?</style>|<[^>]+>", " ", text, flags=re.S)).split())


def test_one_profile(profile, tmp_path):
    path = profile.to_html(tmp_path / "r.html")
    text, figures = parts(path)
    assert set(figures) == {"tradeoff", "shares-0", "cdf-0"}
    assert all(f'id="{name}"' in text for name in figures)
    shown = words(text)
    for expected in (
        "msdnet-cifar10",
        "81.1 %",
        "governor is 'powersave'",
        f"Energy unavailable: {profile.stream.energy.reason}",
        "Guarantee on unseen data: none: empirical, the thresholds fit the calibration set only",
        f"= {profile.closure.ratio:.3f}",
        "63.5 °C (x86_pkg_temp",
        "0.93, 0.9, 0.88, never",
    ):
        assert expected in shown
    assert os.listdir(tmp_path) == ["r.html"]


def test_gates(profile, with_gates, tmp_path):
    shown = words(parts(write_html([with_gates], tmp_path / "r.html"))[0])
    assert "gate open samples that came to it blocks.1 52.0 % 700 <b>2</b> – –" in shown
    assert "came to it" not in words(parts(write_html([profile], tmp_path / "r.html"))[0])


def test_nothing_is_fetched(profile, with_energy, tmp_path):
    text, _ = parts(write_html([profile, with_energy], tmp_path / "r.html"))
    assert "default-src 'none'" in text
    assert set(re.findall(r'(?:src|href)="([^"]*)"', text)) == {"data:,"}
    assert not re.findall(r"@import|url\(", text)


def test_banner_of_a_scripted_profile(profile, scripted, tmp_path):
    assert 'class="banner" role="alert"' in parts(write_html([scripted], tmp_path / "s.html"))[0]
    assert 'class="banner" role="alert"' not in parts(write_html([profile], tmp_path / "r.html"))[0]


def test_several_profiles_are_compared(profile, with_energy, tmp_path):
    text, figures = parts(write_html([profile, with_energy], tmp_path / "r.html", title="Two boards"))
    assert "<h1>Two boards</h1>" in text
    assert len(figures["tradeoff"]["choices"]["mean"]["data"]) == 1 + 4
    assert {"shares-0", "shares-1", "cdf-0", "cdf-1", "energy-1"} <= set(figures)
    assert words(text).count("± ") >= 12


def test_names_stay_text(damaged_names, tmp_path):
    nasty = damaged_names.network
    page = write_html([damaged_names], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<img" not in page.split("<script>")[0]
    text, figures = parts(tmp_path / "r.html")
    assert nasty in html.unescape(text)
    # Charts read a subset of HTML: names reach them escaped.
    assert figures["shares-0"]["data"][0]["x"][0] == "&lt;b&gt;{{7*7}}&lt;/b&gt;"
    assert figures["cdf-0"]["data"][0]["name"] == "&lt;b&gt;{{7*7}}&lt;/b&gt;"
    exits = figures["tradeoff"]["choices"]["mean"]["data"][1]
    assert html.escape(nasty) in exits["hovertext"][1]
    assert "<" not in "".join(figures["cdf-0"]["data"][1]["name"])


def test_long_runs_stay_small(profile, tmp_path):
    random = np.random.default_rng(0)
    long = tuple(int(value) for value in random.gamma(4.0, 1e6, 200_000))
    exits = tuple(msgspec.structs.replace(item, latency_ns=long) for item in profile.exits)
    huge = msgspec.structs.replace(
        profile, exits=exits, stream=msgspec.structs.replace(profile.stream, latency_ns=long)
    )
    assert write_html([huge], tmp_path / "r.html").stat().st_size < 6e6
    curve = charts.cdf(huge)["data"][0]
    assert len(curve["x"]) <= 400
    ordered = np.sort(np.asarray(long)) / 1e6
    assert curve["x"][-1] == pytest.approx(ordered[-1], rel=1e-4)
    for x, y in zip(curve["x"], curve["y"], strict=True):
        assert np.searchsorted(ordered, x * 1.0001) / len(ordered) == pytest.approx(y, abs=2e-4)


def test_an_exit_has_one_colour(with_energy):
    colours = list(charts.exit_colours(5))
    assert len(set(colours)) == 5
    (exits,) = (
        each for each in cost_figures([with_energy])["choices"]["p90"]["data"] if each["name"] == "forced exits"
    )
    assert exits["marker"]["color"] == colours
    assert charts.shares(with_energy)["data"][0]["marker"]["color"] == colours
    assert [trace["line"]["color"] for trace in charts.cdf(with_energy)["data"]][:5] == colours
    assert charts.energies(with_energy)["choices"]["net"]["data"][0]["marker"]["color"][:5] == colours


def test_log_axis_where_it_helps(profile, one_exit):
    assert charts.cdf(profile)["log"]
    assert not charts.cdf(one_exit)["log"]
    axes = charts.cdf(one_exit)["axes"]
    assert axes["log"]["type"] == "log"
    assert "type" not in axes["linear"]


def test_every_row_is_in_the_distribution(full):
    curves = {curve["meta"] for curve in charts.cdf(full)["data"]}
    assert {"exit5", "stream", "stream at 10 Hz", "without blocks.1"} <= curves
    assert charts.cdf(full)["off"] == ["all gates open", "without blocks.1", "without <b>2</b>"]


def test_energy_bars_carry_their_intervals(with_energy):
    trace = charts.energies(with_energy)["choices"]["gross"]["data"][0]
    spent = with_energy.exits[1].energy
    assert trace["y"][1] == pytest.approx(4.6)
    assert trace["error_y"]["array"][1] == pytest.approx(1e3 * (spent.high_j - spent.gross_j))
    assert trace["error_y"]["arrayminus"][1] == pytest.approx(1e3 * (spent.gross_j - spent.low_j))


def test_validity_is_the_first_thing_after_the_title(full, invalid, profile, tmp_path):
    text, _ = parts(write_html([invalid], tmp_path / "i.html"))
    after = words(text[text.index("</header>") :])
    assert after.startswith("INVALID: 2 of 5 rules broken, and incomplete 2 rules kept, 1 could not be looked at")
    assert "What to change: measure with --seconds 60" in after
    assert "energy-window the windows of exit1 lasted 4.1 s" in after
    assert 'class="validity invalid" role="alert"' in text
    assert "(<b>indexer</b>)" in html.unescape(text)
    assert "<b>indexer" not in text
    text, _ = parts(write_html([full], tmp_path / "v.html"))
    assert words(text[text.index("</header>") :]).startswith("Valid 2 rules kept")
    assert 'role="alert"' not in text
    assert "Not judged" in words(parts(write_html([profile], tmp_path / "n.html"))[0])


def test_every_part_is_shown(full, tmp_path):
    text, figures = parts(write_html([full], tmp_path / "r.html"))
    assert set(figures) == {"tradeoff", "shares-0", "cdf-0", "energy-0", "power-0", "stages-0", "gates-0"}
    shown = words(text)
    for expected in (
        "Where the time goes",
        "At a fixed rate",
        "at 30 Hz",
        "Operators (15)",
        "/conv",
        "Power over time",
        "without blocks.1",
        "−0.460 to 5.060 spans zero",
        "rapl: energy of processor packages",
    ):
        assert expected in shown
    assert re.findall(r'<select data-choose="(\w[^"]*)"', text) == ["tradeoff", "energy-0"]


def test_it_can_be_heard_and_reached_by_keyboard(full, tmp_path):
    """What scrolls takes the focus, charts, columns and rows have names, and no level of headings is left out."""
    for name, profiles in (("one", [full]), ("two", [full, msgspec.structs.replace(full, network="other")])):
        text, figures = parts(write_html(profiles, tmp_path / f"{name}.html"))
        assert not re.findall(r'<div class="scroll[^"]*">', text)
        named = re.findall(r'<div class="plot[^"]*" id="[^"]+" role="img" aria-label="[^"]+">', text)
        assert len(named) == len(figures)
        assert not re.findall(r"<th[^>]*></th>|<th>", text)
        assert not re.findall(r"<tr[^>]*>\s*<td[^>]*>(?!</td>)", text)
        levels = [int(level) for level in re.findall(r"<h(\d)", text)]
        assert all(after <= before + 1 for before, after in pairwise(levels))


def test_no_profile(tmp_path):
    with pytest.raises(MeasurementError, match=r"r\.html: there is no profile to report"):
        write_html([], tmp_path / "r.html")


def test_a_full_disk_leaves_the_old_report(profile, tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MeasurementError, match=r"r\.html: the report cannot be written \(No space left on device\)"):
        write_html([profile], path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.html"]


def test_missing_extra(profile, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'edgekit[report]'")):
        write_html([profile], tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []
