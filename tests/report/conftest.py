"""Synthetic profiles and plans, and a browser."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from edgekit.shares import GateShare

QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--enable-logging=stderr",
    "--v=0",
]


def _beside(name):
    """A module in this folder; tests are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


profiles = _beside("made_profiles")


@pytest.fixture(scope="session")
def made():
    """Makes profiles; see made_profiles.py."""
    return profiles.make_profile


@pytest.fixture(scope="session")
def profile():
    return profiles.make_profile(warnings=("governor is 'powersave', not 'performance': clocks may vary",))


@pytest.fixture(scope="session")
def with_energy():
    return profiles.make_profile(seed=3, joules=2.3e-3)


@pytest.fixture(scope="session")
def full():
    """Everything that schema 2 knows."""
    return profiles.make_profile(seed=4, joules=2.3e-3, full=True)


@pytest.fixture(scope="session")
def invalid(full):
    """Two rules broken, and stopped before the end."""
    return msgspec.structs.replace(full, checks=(*profiles.CHECKS, *profiles.BROKEN), complete=False)


@pytest.fixture(scope="session")
def unlabelled():
    return profiles.make_profile(labelled=False)


@pytest.fixture(scope="session")
def one_exit():
    return profiles.make_profile(exits=1, samples=50)


@pytest.fixture(scope="session")
def scripted():
    return profiles.make_profile(scripted="runtime 'fake' answers from a script; its latencies mean nothing")


@pytest.fixture(scope="session")
def with_gates(profile):
    gates = (
        GateShare(name="blocks.1", reached=700, open=364, share=0.52),
        GateShare(name="<b>2</b>", reached=None, open=None, share=None),
    )
    stream = msgspec.structs.replace(profile.stream, macs=1_234_567.0)
    return msgspec.structs.replace(profile, gates=gates, stream=stream)


@pytest.fixture(scope="session")
def damaged_names(profile):
    """Names that are markup, script, templates and formulas."""
    nasty = "</script><img src=x onerror=alert(1)><b>{{ 7*7 }}%{x}"
    # The first is short enough to stand in the charts in full.
    names = ["<b>{{7*7}}</b>", nasty]
    renamed = [msgspec.structs.replace(item, name=name) for item, name in zip(profile.exits, names, strict=False)]
    return msgspec.structs.replace(
        profile, exits=(*renamed, *profile.exits[2:]), network=nasty, warnings=(nasty,), runtime={"name": nasty}
    )


@pytest.fixture(scope="session")
def plans():
    """By name; ``nasty`` has markup and control characters in its names."""
    made = _beside("made_plans")
    nasty = made.nested("<img src=x onerror=alert(1)>&\x00\x1b]]>")
    return {
        "chain2": made.chained(2),
        "chain54": made.chained(54),
        "nested": made.nested(),
        "looped": made.looped(),
        "nasty": nasty,
    }


@pytest.fixture(scope="session")
def opened():
    """Opens a page in headless Chromium: ``opened(page, folder, *options)``; the folder is the browser's own."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("no Chromium on the PATH (Debian: make browser)")

    def run(page, folder, *options):
        """The page after its scripts have run, and what it said on the console.

        Whatever the page tries to fetch is refused by its own Content-Security-Policy, which says so on the console.
        """
        command = [
            chromium,
            *QUIET,
            "--virtual-time-budget=10000",
            "--dump-dom",
            *options,
            f"--user-data-dir={folder}",
            page.resolve().as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=True)
        console = [line.split("CONSOLE", 1)[1] for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return done.stdout, console

    return run
