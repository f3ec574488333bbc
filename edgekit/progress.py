"""How long work tells where it stands. The library only calls; the command line draws."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Called as work goes on."""

    def __call__(self, task: str, done: int, total: int) -> None:
        """``task`` in a few words, and how much of it is done."""
        ...


def silent(task: str, done: int, total: int) -> None:
    """Says nothing."""
