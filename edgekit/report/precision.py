"""What lower precision did, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from edgekit.precision import PrecisionReport, StagePrecision
from edgekit.report.formats import NONE, duration, percent, points, size
from edgekit.report.grid import headed
from edgekit.report.tables import short_names

__all__ = ["precision_lines", "precision_table"]


def precision_table(report: PrecisionReport) -> Table:
    """A line for each stage, what it does alone, and one for the set."""
    what = "accuracy" if report.measure == "accuracy" else "agreement"
    table = headed(
        f"{report.artifacts}: each stage alone in {report.precision}, then the set",
        ["stage", "is", "rows", "size", "of float", "time", "of float", "largest Δ", "flips", what],
    )
    table.columns[1].justify = "left"
    names = short_names([each.name for each in report.stages], most=28)
    for place, (name, each) in enumerate(zip(names, report.stages, strict=True)):
        last = place == len(names) - 1
        table.add_row(*map(Text, (name, *_stage(each))), style="" if each.lowered else "dim", end_section=last)
    table.add_row(
        *map(
            Text,
            (
                "the set", "", "", size(report.size_bytes), _times(report.size_ratio), duration(report.time_s),
                _times(report.time_s / report.float_s), _number(report.largest_difference), str(report.flips),
                points(0.0 - report.drop),
            ),
        ),
        style="bold",
    )  # fmt: skip
    return table


def _stage(each: StagePrecision) -> tuple[str, ...]:
    ratio = None if each.size_bytes is None else each.size_bytes / each.float_bytes
    faster = None if each.time_s is None or not each.float_s else each.time_s / each.float_s
    return (
        each.precision,
        NONE if each.calibrated is None else str(each.calibrated),
        size(each.size_bytes),
        _times(ratio),
        duration(each.time_s),
        _times(faster),
        _number(each.largest_difference),
        NONE if each.flips is None else str(each.flips),
        NONE if each.drop is None else points(0.0 - each.drop),
    )


def precision_lines(report: PrecisionReport) -> Iterator[str]:
    """What a reader needs beside the table."""
    if report.float_accuracy is not None:
        yield (
            f"accuracy {percent(report.accuracy, digits=2)}, in float {percent(report.float_accuracy, digits=2)} "
            f"({report.samples} samples held out, policy {report.policy})"
        )
    else:
        yield (
            f"{report.samples} samples held out without labels: agreement with float's answers, policy {report.policy}"
        )
    yield (
        f"{report.changed} answers changed; {report.flips} samples took another way through exits and gates; exits "
        f"{_shares(report.exits)}, in float {_shares(report.float_exits)}"
    )
    if report.calibrated_on is not None:
        on = "that survive to each stage" if report.calibrated_on == "survivors" else "all of them at every stage"
        yield f"calibrated on {report.calibration_samples} samples of {report.data}, {on}"
    for each in report.stages:
        if each.kept is not None:
            yield f"{each.name} stays in float: {each.kept}"


def _times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}×"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2g}"


def _shares(shares: tuple[float, ...]) -> str:
    return ", ".join(percent(share) for share in shares)
