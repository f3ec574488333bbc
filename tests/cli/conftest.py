from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from edgekit.cli import app

TEST_SET = "edgekit.zoo.digits:test_set"


class Shell:
    """Types commands; remembers nothing."""

    def __call__(self, *arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def works(self, *arguments):
        done = self(*arguments)
        assert done.exit_code == 0, done.output
        return done

    def json(self, *arguments):
        """The one JSON object that a verb leaves on standard output."""
        value = json.loads(self.works(*arguments, "--json").stdout)
        assert isinstance(value, dict)
        return value

    def fails(self, *arguments, code=1):
        """The one line that a verb complains with."""
        done = self(*arguments)
        assert done.exit_code == code, done.output
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("edgekit: ")
        return line


@pytest.fixture(scope="session")
def shell():
    return Shell()


@pytest.fixture(scope="session")
def profile_file(shell, exported_digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    shell.works("profile", exported_digits, "--data", TEST_SET, "--seconds", "0.2", "-o", path)
    return path


@pytest.fixture(scope="session")
def exported_moe(shell, tmp_path_factory):
    """A network with gates, as a bundle, and what the export printed. Read only."""
    path = tmp_path_factory.mktemp("moe") / "moe.edgekit"
    return path, shell.works("zoo", "export", "moe-digits", "-o", path).stdout
