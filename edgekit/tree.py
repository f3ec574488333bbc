"""Reading a machine: files below a root, commands that only look, and the reasons of what cannot be read."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

__all__ = ["Runner", "Tree", "UnreadableError", "fields_of", "list_of", "numbers_of", "run_command"]

Runner = Callable[[Sequence[str]], str]
"""Runs a command that changes nothing and gives what it printed; raises :class:`UnreadableError`."""
T = TypeVar("T")
PATIENCE_S = 2.0
"""How long a command may take: a look at the machine must not hang on a broken driver."""


class UnreadableError(Exception):
    """A fact that this machine does not tell; the message is the reason."""


def run_command(words: Sequence[str]) -> str:
    """What a command printed.

    Raises:
        UnreadableError: it is not installed, took too long, or failed.
    """
    try:
        done = subprocess.run(
            list(words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise UnreadableError(f"{words[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise UnreadableError(f"{' '.join(words)} gave no answer in {PATIENCE_S:g} s") from error
    except OSError as error:
        raise UnreadableError(f"{words[0]} cannot be run ({error.strerror})") from error
    if done.returncode != 0:
        told = (done.stderr or done.stdout).strip().splitlines()
        raise UnreadableError(f"{' '.join(words)} failed ({told[0] if told else f'exit code {done.returncode}'})")
    return done.stdout


class Tree:
    """Files below a root.

    Args:
        root: the folder that stands for ``/``.
        run: runs commands; without one they run on the live machine only.

    Attributes:
        live: whether this is the machine that the program runs on.
        unavailable: reasons of what :meth:`at` could not read.
    """

    def __init__(self, root: Path, *, run: Runner | None = None) -> None:
        self.root = root
        self.live = root == Path("/")
        self.unavailable: dict[str, str] = {}
        self._run = run if run is not None or not self.live else run_command

    def at(self, name: str, reader: Callable[[], T]) -> T | None:
        """What the reader finds, or ``None`` and its reason kept under ``name``."""
        try:
            return reader()
        except UnreadableError as error:
            self.unavailable[name] = str(error)
        except OSError as error:
            self.unavailable[name] = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except (ValueError, IndexError) as error:
            self.unavailable[name] = f"not what was expected there: {error}"
        return None

    def command(self, *words: str) -> str:
        """What a command that only looks printed.

        Raises:
            UnreadableError: it cannot be run here.
        """
        if self._run is None:
            raise UnreadableError(f"{words[0]} runs on the machine itself only, and this one is a recording")
        return self._run(words)

    def found(self, *patterns: str) -> list[Path]:
        """Paths of patterns, each in the order of the numbers in its names."""
        return [
            path
            for pattern in patterns
            for path in sorted(
                self.root.glob(pattern), key=lambda path: ([int(part) for part in re.findall(r"\d+", str(path))], path)
            )
        ]

    def text(self, path: str | Path) -> str | None:
        """A small file's text without its ending, or ``None``; relative paths begin at the root."""
        try:
            return (self.root / path).read_text(errors="replace").strip().strip("\0") or None
        except OSError:
            return None

    def fields(self, name: str) -> dict[str, str]:
        """First value of each ``key : value`` line."""
        return fields_of(self.text(name) or "")


def fields_of(text: str) -> dict[str, str]:
    """First value of each ``key : value`` line of a text."""
    pairs = (line.partition(":") for line in reversed(text.splitlines()))
    return {key.strip(): value.strip() for key, _, value in pairs}


def numbers_of(text: str) -> tuple[int, ...]:
    """``"0-2,5"`` is ``(0, 1, 2, 5)``, as the kernel writes lists of processors.

    Raises:
        ValueError: something else.
    """
    parts = (part.partition("-") for part in text.split(",") if part.strip())
    return tuple(number for first, _, last in parts for number in range(int(first), int(last or first) + 1))


def list_of(numbers: Iterable[int]) -> str:
    """The way back: ``(0, 1, 2, 5)`` is ``"0-2,5"``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
