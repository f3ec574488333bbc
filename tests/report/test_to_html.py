"""The HTML file without a browser: content, size, escaping, errors, nothing half-written."""

import errno
import html
import json
import os
import re
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgekit.errors import MeasurementError, MissingExtraError
from edgekit.report import charts, write_html

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
    assert len(figures["tradeoff"]["data"]) == 4
    assert {"shares-0", "shares-1", "cdf-0", "cdf-1", "energy-1"} <= set(figures)
    assert words(text).count("95 % CI") >= 6


def test_names_stay_text(damaged_names, tmp_path):
    nasty = damaged_names.network
    page = write_html([damaged_names], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<img" not in page.split("<script>")[0]
    text, figures = parts(tmp_path / "r.html")
    assert nasty in html.unescape(text)
    # Charts read a subset of HTML: names reach them escaped.
    assert figures["shares-0"]["data"][0]["x"][0] == "&lt;b&gt;{{7*7}}&lt;/b&gt;"
    assert figures["cdf-0"]["data"][0]["name"] == "&lt;b&gt;{{7*7}}&lt;/b&gt;"
    assert html.escape(nasty) in figures["tradeoff"]["data"][0]["hovertext"][1]
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


def test_tradeoff_points_carry_their_intervals(profile, unlabelled):
    exits, stream = charts.tradeoff([profile])["data"]
    last = profile.exits[-1].latency
    assert exits["x"][-1] == pytest.approx(last.mean_s * 1e3)
    assert exits["error_x"]["array"][-1] == pytest.approx((last.mean_high_s - last.mean_s) * 1e3)
    # Wilson's interval of 571.9 right answers among 700, by hand.
    n, p, z = 700, 0.817, 1.959964
    high = (p + z * z / (2 * n) + z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5) / (1 + z * z / n)
    assert exits["error_y"]["array"][-1] == pytest.approx(high - p, abs=1e-6)
    assert stream["marker"]["symbol"] == "star"
    without = charts.tradeoff([unlabelled])["data"]
    assert without[0]["y"] == [f"exit{index}" for index in range(1, 6)]
    assert "error_y" not in without[0]


def test_an_exit_has_one_colour(with_energy):
    colours = list(charts.exit_colours(5))
    assert len(set(colours)) == 5
    assert charts.tradeoff([with_energy])["data"][0]["marker"]["color"] == colours
    assert charts.shares(with_energy)["data"][0]["marker"]["color"] == colours
    assert [trace["line"]["color"] for trace in charts.cdf(with_energy)["data"]][:5] == colours
    assert charts.energies(with_energy)["data"][0]["marker"]["color"][:5] == colours


def test_log_axis_where_it_helps(profile, one_exit):
    assert charts.cdf(profile)["layout"]["xaxis"]["type"] == "log"
    assert "type" not in charts.cdf(one_exit)["layout"]["xaxis"]


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
