"""The pages of docs/devices: their links lead somewhere, and what they tell people to type can be typed."""

from __future__ import annotations

import re
import shlex
from importlib import metadata
from pathlib import Path

import pytest
from typer.main import get_command

from edgekit import plugins
from edgekit.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "devices"
PAGES = sorted(path.name for path in FOLDER.glob("*.md"))
DEVICES = sorted(set(PAGES) - {"README.md"})

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


def text(page):
    return (FOLDER / page).read_text()


def prose(page):
    return FENCE.sub("", text(page))


def typed(page):
    """Words of every command on a page, in a block or within a line, from ``edgekit`` or ``pip`` on."""
    lines = [line for language, body in FENCE.findall(text(page)) if language == "sh" for line in body.splitlines()]
    lines += INLINE.findall(prose(page))
    found = []
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a piece of code, not a command
            continue
        start = next((place for place, word in enumerate(words[:4]) if word in ("edgekit", "pip")), None)
        if start is not None:
            found.append(words[start:])
    return found


def anchors(page):
    """Headings of a page, as code hosts name them in links."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_is_a_page_for_each_device_and_the_index_has_them_all():
    assert DEVICES == ["arm-linux.md", "jetson-nano.md", "jetson-orin.md", "raspberry-pi.md", "x86.md"]
    assert set(DEVICES) <= set(LINK.findall(text("README.md")))


@pytest.mark.parametrize("page", DEVICES)
def test_a_page_tells_the_whole_way(page):
    headings = re.findall(r"^## (.+)$", text(page), re.MULTILINE)
    assert headings == ["Install", "First run", "Calibrate", "Profile", "Known limits"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = LINK.findall(prose(page))
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = ((FOLDER / page).parent / path).resolve() if path else FOLDER / page
        assert target.is_relative_to(ROOT), f"{page}: {link} leads out of the project"
        assert target.exists(), f"{page}: {link} does not exist"
        assert not anchor or anchor in anchors(target), f"{page}: {link} has no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_every_edgekit_line_parses(page):
    verbs = get_command(app).commands
    lines = [words[1:] for words in typed(page) if words[0] == "edgekit" and len(words) > 1]
    assert lines
    for verb, *arguments in lines:
        assert verb in verbs, f"{page}: edgekit has no verb {verb}"
        if arguments:
            with verbs[verb].make_context(verb, list(arguments)) as context:  # parses, and runs nothing
                runtime = (context.params.get("runtime") or "").partition(":")[0]
            assert not runtime or runtime in plugins.names("runtimes"), f"{page}: no runtime {runtime}"


@pytest.mark.parametrize("page", PAGES)
def test_every_extra_and_meter_exists(page):
    extras = set(metadata.metadata("edgekit").get_all("Provides-Extra"))
    named = {extra for found in re.findall(r"edgekit\[([\w,-]+)\]", text(page)) for extra in found.split(",")}
    assert named <= extras, f"{page}: no extra {named - extras}"
    meters = set(re.findall(r"--meter (\w+)", text(page)))
    assert meters <= set(plugins.names("meters")), f"{page}: no meter {meters - set(plugins.names('meters'))}"


def test_nothing_is_installed_with_torch():
    for page in DEVICES:
        for words in typed(page):
            if words[:2] == ["pip", "install"]:
                assert "edgekit[export]" not in words, page
                assert "torch" not in words, page
