"""A person explores the report: mouse, keyboard, screen reader and paper, in headless Chromium led through a pipe."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

import pytest

from edgekit.report import write_html

pytest.importorskip("plotly", reason="the report extra is not installed")

pytestmark = pytest.mark.browser

KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40}
DEADLINE_S = 60


class Browser:
    """Chromium's DevTools protocol over its two pipes: messages are JSON, each ended by a zero byte."""

    def __init__(self, chromium, folder):
        (self._from, out), (into, self._to) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (into, out)]

        def give():  # Chromium reads commands from descriptor 3 and answers on 4.
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
                   "--disable-background-networking", "--hide-scrollbars", "--remote-debugging-pipe",
                   f"--user-data-dir={folder}"]  # fmt: skip
        self._process = subprocess.Popen(
            command, preexec_fn=give, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (into, out, *ends):
            os.close(end)
        self._left, self._number, self._session, self.events = b"", 0, None, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._message()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def _message(self):
        until = time.monotonic() + DEADLINE_S
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            more = os.read(self._from, 1 << 20)
            assert more, "the browser is gone"
            self._left += more
        text, self._left = self._left.split(b"\0", 1)
        return json.loads(text)

    def close(self):
        self._session = None
        self.ask("Browser.close")
        self._process.wait(timeout=DEADLINE_S)
        os.close(self._from)
        os.close(self._to)

    def open(self, path, *, dark=False, width=1300):
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=scheme)
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.ask("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.documentElement?.dataset.plots")

    def run(self, script):
        done = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, script):
        until = time.monotonic() + DEADLINE_S
        while not (found := self.run(script)):
            assert time.monotonic() < until, script
            time.sleep(0.02)
        return found

    def press(self, key, times=1):
        text = {"Enter": "\r", " ": " "}.get(key, "")
        codes = {"key": key, "windowsVirtualKeyCode": KEYS[key], "text": text}
        for _ in range(times):
            self.ask("Input.dispatchKeyEvent", type="keyDown", **codes)
            self.ask("Input.dispatchKeyEvent", type="keyUp", **codes)

    def click(self, selector):
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        centre = "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        place = self.run(f"{centre}({element}.getBoundingClientRect())")
        where = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, **where)

    @property
    def complaints(self):
        """What went to the console, and what was asked of the network besides the page itself."""
        found = []
        for event in self.events:
            name, told = event.get("method"), event.get("params", {})
            if name in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(json.dumps(told)[:300])
            if name == "Network.requestWillBeSent" and not told["request"]["url"].startswith(("file:", "data:")):
                found.append(told["request"]["url"])
        return found

    @property
    def said(self):
        return self.run("document.getElementById('announcement').textContent")

    def focus(self, selector):
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")

    def column(self, table, place):
        return self.run(
            f"[...document.querySelectorAll('#{table} tbody tr')].map((row) => row.cells[{place}].textContent.trim())"
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("no Chromium on the PATH (Debian: make browser)")
    found = Browser(chromium, tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def report(full, tmp_path_factory):
    path = write_html([full], tmp_path_factory.mktemp("report") / "r.html")
    assert path.stat().st_size < 6e6
    return path


@pytest.fixture
def page(browser, report):
    browser.open(report)
    yield browser
    assert browser.complaints == []


AXIS = "document.querySelector('#tradeoff .xtitle').textContent"


def test_the_cost_axis_is_chosen_by_keyboard_and_said(page):
    assert page.run(AXIS) == "mean latency of one inference [ms]"
    page.focus("[data-choose=tradeoff]")
    page.press("ArrowDown", 2)
    page.wait(f"{AXIS} === 'p90 latency of one inference [ms]'")
    assert page.said.startswith("Cost: p90 latency. Nothing is as accurate for less than: exit1")
    page.press("ArrowDown")
    page.wait(f"{AXIS} === 'gross energy of one inference [mJ]'")


def test_the_front_is_switched_off(page):
    lines = "document.querySelectorAll('#tradeoff .trace.scatter').length"
    before = page.run(lines)
    page.click("[data-show=tradeoff]")
    page.wait(f"{lines} === {before - 1}")
    assert page.said == "Pareto front hidden."


def test_headings_sort_by_click_and_by_enter(page, full):
    names = [f"exit{place}" for place in range(1, 6)]
    assert page.column("exits-0", 0) == [*names, "stream"]
    page.click("#exits-0 th:nth-child(2) button")
    shares = [float(text.split()[0]) for text in page.column("exits-0", 1)]
    assert shares == sorted(shares)
    assert page.said == "Sorted by share, ascending."
    page.press("Enter")
    shares = [float(text.split()[0]) for text in page.column("exits-0", 1)]
    assert shares == sorted(shares, reverse=True)
    assert page.run("document.querySelector('#exits-0 [aria-sort]').ariaSort") == "descending"
    page.focus("#exits-0 th:nth-child(1) button")
    page.press(" ")
    assert page.column("exits-0", 0) == [*names, "stream"]


def test_what_has_no_figure_is_sorted_last_both_ways(page):
    place = page.run(
        "[...document.querySelectorAll('#exits-0 th')].findIndex((th) => th.textContent.startsWith('added [mJ]'))"
    )
    for _ in range(2):
        page.click(f"#exits-0 th:nth-child({place + 1}) button")
        assert [text[0] for text in page.column("exits-0", place)][-2:] == ["–", "–"]


def test_the_distribution_is_linear_or_logarithmic_and_rows_are_switched(page):
    title = "document.querySelector('#cdf-0 .xtitle').textContent"
    assert page.run(title).endswith("log scale")
    page.focus("[data-log=cdf-0]")
    page.press(" ")
    page.wait(f"!{title}.endsWith('log scale')")
    assert page.said == "Linear axis."
    curves = "document.querySelectorAll('#cdf-0 .trace.scatter').length"
    assert page.run(curves) == 8
    page.click("[data-show=cdf-0][value=exit3]")
    page.wait(f"{curves} === 7")
    assert page.said == "exit3 hidden."
    page.click("[data-show=cdf-0][value='all gates open']")
    page.wait(f"{curves} === 8")


def test_hovering_over_power_tells_the_window(page):
    page.run("document.querySelector('#power-0').scrollIntoView({block: 'center'})")
    x, y = page.run(
        "(() => { const r = document.querySelectorAll('#power-0 .trace.bars')[1].querySelector('.point')"
        ".getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height * 0.6]; })()"
    )
    page.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    said = page.wait("document.querySelector('#power-0 .hoverlayer')?.textContent")
    assert said.startswith("exit1 (exit)10.00 s from 15.50 s")


def test_kinds_of_windows_are_switched(page):
    bars = "document.querySelectorAll('#power-0 .point').length"
    assert page.run(bars) == 32
    page.click("[data-show=power-0][value=exit]")
    page.wait(f"{bars} === 7")


def test_operators_are_unfolded_and_filtered_by_keyboard(page):
    shown = "[...document.querySelectorAll('#operators-0 tbody tr')].filter((row) => row.checkVisibility()).length"
    assert page.run(shown) == 0
    page.run("[...document.querySelectorAll('summary')].find((e) => e.textContent.startsWith('Operators')).focus()")
    page.press("Enter")
    page.wait(f"{shown} === 15")
    page.press("Tab")
    page.press("ArrowDown", 2)
    page.wait(f"{shown} === 3")
    assert page.said == "3 operators shown."


def test_everything_to_use_is_reached_by_tab_and_shows_its_focus(page):
    inside = "main :is(select, input:not(:disabled), button, summary, [tabindex])"
    wanted = page.run(f"[...document.querySelectorAll('{inside}')].filter((e) => e.checkVisibility()).length")
    page.run("document.activeElement.blur(); getSelection().removeAllRanges(); scrollTo(0, 0)")
    reached, bare = set(), []
    for _ in range(wanted + 5):
        page.press("Tab")
        place, outline = page.run(
            f"[[...document.querySelectorAll('{inside}')].indexOf(document.activeElement), "
            "getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.add(place)
        if outline == "none" and place >= 0:
            bare.append(place)
    assert len(reached - {-1}) == wanted
    assert bare == []


def test_controls_have_names(page):
    nameless = page.run(
        "[...document.querySelectorAll('select, input, button')]"
        ".filter((e) => !(e.labels?.length || e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert nameless == []


@pytest.mark.parametrize("dark", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1300, 700, 360])
def test_nothing_is_wider_than_the_screen(browser, invalid, tmp_path, dark, width):
    browser.open(write_html([invalid], tmp_path / "r.html"), dark=dark, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    colour = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) < 384) == dark
    assert browser.complaints == []


def test_on_paper_all_is_open_light_and_without_controls(browser, report):
    browser.open(report, dark=True)
    browser.run(
        """addEventListener("beforeprint", () => setTimeout(() => 0)); window.seen = {};
        addEventListener("beforeprint", () => {
          seen.open = [...document.querySelectorAll("details")].every((each) => each.open);
          seen.ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
          seen.width = document.querySelector("#tradeoff .main-svg").getBoundingClientRect().width;
        });"""
    )
    printed = base64.b64decode(browser.ask("Page.printToPDF")["data"])
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") < 16
    assert browser.wait("window.seen") == {"open": True, "ink": "#16191f", "width": 700}
    browser.ask("Emulation.setEmulatedMedia", media="print")
    assert browser.run("[...document.querySelectorAll('.controls')].every((each) => !each.checkVisibility())")
    browser.ask("Emulation.setEmulatedMedia", media="")
    assert browser.run("[...document.querySelectorAll('details')].some((each) => each.open)") is False
    assert browser.complaints == []


def test_this_harness_notices(browser, report, tmp_path):
    for harm in ('<script>throw new Error("boom")</script>', '<img src="https://example.invalid/x.png">'):
        page = report.read_text(encoding="utf-8").replace("</body>", harm + "</body>")
        (tmp_path / "harmed.html").write_text(page, encoding="utf-8")
        browser.open(tmp_path / "harmed.html")
        browser.wait("true")
        assert browser.complaints
