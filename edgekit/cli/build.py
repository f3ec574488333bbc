"""``edgekit build``: the engines of a bundle, built on the device that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgekit.artifacts import FLOAT, artifact_set
from edgekit.bundle import Bundle
from edgekit.cli import options, output
from edgekit.errors import InputError
from edgekit.report.formats import duration, size

if TYPE_CHECKING:
    from edgekit.engines import Built

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit build net.edgekit --runtime tensorrt --max-batch 8"


def command(
    bundle: options.BundlePath,
    runtime: Annotated[str, typer.Option("--runtime", help="What the engines are for.")] = "tensorrt",
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Rows that an engine takes at once.")] = 1,
    precision: options.Precision = FLOAT,
    workspace: Annotated[
        str | None, typer.Option("--workspace", help="Scratch memory of a layer, as 1GiB; all there is if not given.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Build the engines of every stage on this device and keep them beside the bundle; those that are right stay."""
    from edgekit import plugins
    from edgekit.engines import build_engines, engines_beside

    given = {**options.runtime_options(runtime), "max_batch": max_batch}
    name = given.pop("runtime")
    if workspace is not None:
        given["workspace"] = workspace
    with output.Bars() as progress, Bundle.open(bundle) as opened:
        if not hasattr(plugins.load("runtimes", name), "keep_engines"):
            raise InputError(f"--runtime {name}: builds no engines, so there is nothing to do; tensorrt does")
        made = plugins.create("runtimes", name, **given)
        try:
            made.keep_engines(engines_beside(opened.path))
            target = artifact_set(made.target, precision)
            built = build_engines(made, opened.plan.stages, opened.artifacts(target), progress=progress)
            facts = made.describe()
        finally:
            made.close()
    summary = {
        "bundle": str(bundle),
        "artifacts": target,
        "runtime": facts,
        "engines": msgspec.to_builtins(built),
        "built": sum(each.state != "reused" for each in built),
        "size_bytes": sum(each.size_bytes for each in built),
        "seconds": sum(each.seconds for each in built),
    }
    output.show(summary, as_json=json, draw=lambda console: _draw(summary, built, console))


def _draw(summary: dict[str, Any], built: Sequence[Built], console: Console) -> None:
    table = Table("stage", "engine", "size", "built in", "", box=None, pad_edge=False)
    for each in built:
        state = f"{each.state}: {each.why}" if each.why else each.state
        took = "" if each.state == "reused" else duration(each.seconds)
        table.add_row(*map(Text, (each.stage, each.engine, size(each.size_bytes), took, state)))
    console.print(table)
    console.print(
        f"{len(built)} engines, {summary['built']} built now in {duration(summary['seconds'])}, "
        f"{size(summary['size_bytes'])}",
        soft_wrap=True,
    )
