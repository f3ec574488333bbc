"""``edgekit quantize``: one more set of artifacts in lower precision, and what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from edgekit.cli import options, output
from edgekit.precision import PrecisionReport
from edgekit.report.precision import precision_lines, precision_table

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit quantize net.edgekit --data calibration.npz --precision int8 --max-drop 1%"


def command(
    bundle: options.BundlePath,
    data: options.DataSource,
    precision: Annotated[
        Literal["int8", "int8-symmetric", "int8-dynamic", "float16"],
        typer.Option(
            "--precision",
            help="int8 is calibrated on the samples, int8-symmetric as TensorRT wants it; int8-dynamic finds its "
            "ranges in use.",
        ),
    ] = "int8",
    target: Annotated[str, typer.Option("--target", help="Whose float artifacts are taken.")] = "onnx",
    policy: options.PolicyName = None,
    max_drop: Annotated[
        str | None,
        typer.Option("--max-drop", help="Keep the worst stages in float until no more is lost: 1% or 0.01."),
    ] = None,
    calibrate_on: Annotated[
        Literal["survivors", "all"],
        typer.Option("--calibrate-on", help="Each stage on the samples that survive to it, or on all."),
    ] = "survivors",
    keep_float: Annotated[
        str | None, typer.Option("--keep-float", metavar="STAGE,...", help="Stages to keep in float in any case.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the split: half calibrates, half measures.")] = 0,
    threads: options.Threads = 1,
    json: options.Json = False,
) -> None:
    """Write the stages in lower precision beside the float ones, and tell what that does to size, time and answers.

    Use them with --precision of the other verbs, and calibrate again: thresholds and certificates are of artifacts.
    """
    import edgekit

    drop = None if max_drop is None else options.share(max_drop, option="--max-drop")
    options.find_users_code()
    with output.Bars() as progress:
        report = edgekit.quantize(
            bundle,
            data,
            precision=precision,
            target=target,
            policy=policy,
            max_drop=drop,
            calibrate_on=calibrate_on,
            keep_float=() if keep_float is None else options.names(keep_float),
            seed=seed,
            threads=threads,
            progress=progress,
        )
    output.show(report, as_json=json, draw=lambda console: _draw(report, bundle, console))


def _draw(report: PrecisionReport, bundle: Path, console: Console) -> None:
    console.print(precision_table(report))
    for line in precision_lines(report):
        console.print(line, soft_wrap=True, markup=False)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    console.print(f"saved in {bundle} as '{report.artifacts}'", soft_wrap=True, markup=False)
    console.print(
        f"next: edgekit calibrate {bundle} --precision {report.precision} on other samples; policies made in float "
        "promise nothing here",
        soft_wrap=True,
        markup=False,
    )
