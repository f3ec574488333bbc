"""A parity report as rich tables that fit 100 columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console, RenderableType
from rich.text import Text

from edgekit.parity_records import Parity, RunParity
from edgekit.report.grid import hanging, sheet_table
from edgekit.report.parity_sheets import budget_text, headline, parity_sheets, subject

__all__ = ["print_parity"]

FLIPS_SHOWN = 10
"""Flips that the terminal lists, those farthest from their threshold first; all are in the file."""


def print_parity(parity: Parity, *, console: Console) -> None:
    """What is beyond the budget, then every runtime: logits, stages, decisions, flips; and what was not compared."""
    for sentence in parity.exceeded:
        console.print(hanging("beyond", sentence, style="red"))
    if not parity.exceeded:
        console.print(Text("all within the budget", style="bold green"))
    console.print(Text(f"{subject(parity)}; budget {budget_text(parity)}"))
    for run in parity.runs:
        console.print()
        console.print(Text(headline(parity, run), style="bold"))
        for part in _parts(parity, run, console.width):
            console.print(part)
    for note in parity.notes:
        console.print(hanging("note", note, style="yellow"))


def _parts(parity: Parity, run: RunParity, width: int) -> Iterator[RenderableType]:
    for sheet in parity_sheets(parity, run):
        if sheet.key.startswith("gates"):
            yield Text(sheet.lead)
        if sheet.key == "flips":
            shown = sheet.lines[:FLIPS_SHOWN]
            title = f"flips, {len(shown)} of {len(sheet.lines)}, farthest from the threshold first"
            sheet = replace(sheet, title=title, lines=shown)
        if sheet.lines:
            yield sheet_table(sheet, width=width, named=2)
