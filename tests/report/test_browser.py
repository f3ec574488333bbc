"""The report and pictures in headless Chromium: no message on the console, nothing fetched, every chart drawn."""

import re

import pytest

from edgekit.report import write_html, write_picture

pytest.importorskip("plotly", reason="the report extra is not installed")

pytestmark = pytest.mark.browser


def drawn(dom):
    """Charts drawn, curves, points and bars, in the page."""
    return {
        "figures": int((re.search(r'data-plots="(\d+)"', dom) or [0, 0])[1]),
        "scatter": len(re.findall(r'<g class="trace scatter', dom)),
        "bars": len(re.findall(r'<g class="trace bars', dom)),
        "bar": len(re.findall(r'<g class="point"', dom)),
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["profile"], {"figures": 3, "scatter": 3 + 6, "bars": 1, "bar": 5}),
        (["with_energy"], {"figures": 4, "scatter": 3 + 6, "bars": 2, "bar": 5 + 6}),
        (["full"], {"figures": 7, "scatter": 4 + 8 + 1, "bars": 2 + 3 + 4 + 1, "bar": 5 + 6 + 32 + 20 + 2}),
        (["unlabelled"], {"figures": 3, "scatter": 2 + 6, "bars": 1, "bar": 5}),
        (["one_exit"], {"figures": 3, "scatter": 3 + 2, "bars": 1, "bar": 1}),
        (["damaged_names"], {"figures": 3, "scatter": 3 + 6, "bars": 1, "bar": 5}),
        (["profile", "with_energy", "scripted"], {"figures": 8, "scatter": 7 + 18, "bars": 4, "bar": 15 + 6}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_every_chart_is_drawn_and_the_console_is_silent(names, expected, request, opened, tmp_path):
    profiles = [request.getfixturevalue(name) for name in names]
    dom, console = opened(write_html(profiles, tmp_path / "r.html"), tmp_path / "user")
    assert console == []
    assert drawn(dom) == expected
    assert 'class="main-svg"' in dom
    assert ">exit1</text>" in dom or "damaged_names" in names
    # A name with markup in it makes no element, not even inside a chart.
    assert "<img" not in re.sub(r"<script.*?</script>", "", dom, flags=re.S)


@pytest.mark.parametrize(
    "options",
    [["--blink-settings=preferredColorScheme=0"], ["--window-size=420,900"]],
    ids=["dark", "narrow"],
)
def test_other_screens(options, with_energy, opened, tmp_path):
    dom, console = opened(write_html([with_energy], tmp_path / "r.html"), tmp_path / "user", *options)
    assert console == []
    assert drawn(dom)["figures"] == 4


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ('<script>throw new Error("boom")</script>', "Uncaught Error: boom"),
        ('<img src="https://example.invalid/x.png">', "violates the following Content Security Policy"),
        ('<script>fetch("https://example.invalid/").catch(() => {})</script>', "Content Security Policy"),
    ],
    ids=["error", "image", "fetch"],
)
def test_this_harness_notices(harm, said, profile, opened, tmp_path):
    path = write_html([profile], tmp_path / "r.html")
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", harm + "</body>"), encoding="utf-8")
    _, console = opened(path, tmp_path / "user")
    assert any(said in line for line in console)


@pytest.mark.parametrize("options", [[], ["--blink-settings=preferredColorScheme=0"]], ids=["light", "dark"])
@pytest.mark.parametrize("suffix", [".svg", ".html"])
@pytest.mark.parametrize("name", ["chain54", "nested", "nasty"])
def test_pictures_of_plans(name, suffix, options, plans, opened, tmp_path):
    path = write_picture(plans[name], tmp_path / f"p{suffix}", name=name)
    dom, console = opened(path, tmp_path / "user", *options)
    assert console == []
    assert len(re.findall(r'<path class="diamond"', dom)) == len(plans[name].gates)
    assert "<img" not in dom


@pytest.mark.parametrize("name", ["chain54", "nested", "looped", "nasty"])
def test_texts_of_pictures_stay_in_their_boxes(name, plans, opened, tmp_path):
    """Measured by a script that is put beside the picture for this test alone."""
    page = write_picture(plans[name], tmp_path / "p.html", name=name)
    measure = """<script>
    const stray = [];
    for (const group of document.querySelectorAll("g.stage, g.exit, g.inputs"))
      for (const text of group.querySelectorAll(":scope > text")) {
        const own = text.getBoundingClientRect();
        const box = group.querySelector("rect.box, rect.pill").getBoundingClientRect();
        if (own.right > box.right || own.left < box.left || own.bottom > box.bottom) stray.push(text.textContent);
      }
    for (const panel of document.querySelectorAll("rect.open, rect.closed"))
      for (const text of panel.parentNode.querySelectorAll(":scope > text"))
        if (text.getBoundingClientRect().right > panel.getBoundingClientRect().right) stray.push(text.textContent);
    document.body.dataset.stray = JSON.stringify(stray);
    </script></body>"""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<meta http-equiv=[^>]*>", "", text).replace("</body>", measure)
    page.write_text(text, encoding="utf-8")
    dom, console = opened(page, tmp_path / "user")
    assert console == []
    assert 'data-stray="[]"' in dom
