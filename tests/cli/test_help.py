"""Every verb explains itself, and the command starts quickly."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.main import get_command

from edgekit.cli import app

HEAVY = ("torch", "onnxruntime", "scipy", "plotly", "jinja2", "sklearn")


def verbs(command, path=()):
    """Every command that can be typed, as ``(path, command)``."""
    if not hasattr(command, "commands"):
        return [(path, command)]
    return [each for name, child in command.commands.items() for each in verbs(child, (*path, name))]


EVERY = verbs(get_command(app))


def test_verbs_are_those_of_the_design():
    names = {" ".join(path) for path, _ in EVERY}
    single = {"export", "inspect", "run", "propose", "calibrate", "profile", "report", "compare", "doctor"}
    single |= {"parity", "quantize", "build"}
    assert names == single | {"zoo list", "zoo train", "zoo export"}


@pytest.mark.parametrize(("path", "command"), EVERY, ids=[" ".join(path) for path, _ in EVERY])
def test_help_has_a_sentence_an_example_and_json(path, command, shell):
    text = " ".join(shell.works(*path, "--help").stdout.split())
    assert f"Example: edgekit {' '.join(path)}" in text
    assert "--json" in text
    assert command.help.split("\n")[0].endswith(".")
    for parameter in command.params:
        assert parameter.help or parameter.name == "help", parameter.name


@pytest.mark.parametrize(("path", "command"), EVERY, ids=[" ".join(path) for path, _ in EVERY])
def test_example_parses(path, command):
    words = command.epilog.removeprefix("Example: edgekit ").split()
    assert tuple(words[: len(path)]) == path
    with command.make_context(path[-1], words[len(path) :]) as context:
        assert context.params["json"] is False


def test_starting_loads_nothing_heavy(tmp_path):
    code = f"import sys, edgekit.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(shell):
    from importlib.metadata import version

    assert shell.works("--version").stdout.strip() == f"edgekit {version('edgekit')}"
