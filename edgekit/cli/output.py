"""What people and machines see: results on standard output; progress and complaints on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

__all__ = ["Bars", "complain", "remark", "show"]

PLAIN_WIDTH = 120
"""Columns where no terminal tells its own."""


def complain(message: str) -> None:
    """One line on standard error."""
    typer.echo(f"edgekit: {' '.join(message.split())}", err=True)


def remark(message: str) -> None:
    """A line beside the result: where a file went, how training stands. On standard error."""
    typer.echo(message, err=True)


def show(value: Any, *, as_json: bool, draw: Callable[[Console], None]) -> None:
    """The result of a verb.

    Args:
        value: what machines get: anything that msgspec encodes as a JSON object.
        as_json: whether a machine is asking.
        draw: what people get.
    """
    if as_json:
        typer.echo(msgspec.json.encode(value).decode())
    else:
        draw(Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH))


class Bars:
    """A progress bar on standard error, for :class:`edgekit.progress.Progress`; nothing where that is no terminal.

    It draws only when it is called, never from a thread of its own: that would take time from what is being measured.
    """

    REDRAW_S = 0.1

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, visible=False)
        self._shown = ""
        self._drawn_s = 0.0

    def __enter__(self) -> Bars:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        """A line above the bar."""
        if not self._bar.disable:
            self._bar.console.print(message, highlight=False, soft_wrap=True)

    def __call__(self, task: str, done: int, total: int) -> None:
        """Show where ``task`` stands."""
        now = time.perf_counter()
        if task != self._shown:
            self._bar.reset(self._task, description=task, visible=True)
            self._shown = task
        elif done < total and now - self._drawn_s < self.REDRAW_S:
            return
        self._drawn_s = now
        self._bar.update(self._task, completed=done, total=total)
        self._bar.refresh()
