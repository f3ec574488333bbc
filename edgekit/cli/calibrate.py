"""``edgekit calibrate``: thresholds from a calibration set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from edgekit.cli import options, output
from edgekit.policy import Policy
from edgekit.records import Profile
from edgekit.report.formats import duration, percent, si

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit calibrate net.edgekit --data calibration.npz --max-drop 1% --minimize latency"


def command(
    bundle: options.BundlePath,
    data: options.DataSource,
    max_drop: Annotated[str, typer.Option("--max-drop", help="Accuracy that may be lost: 1% or 0.01.")] = "1%",
    score: Annotated[str, typer.Option("--score", help="max_prob, margin or neg_entropy.")] = "max_prob",
    minimize: Annotated[
        Literal["latency", "macs"] | None,
        typer.Option("--minimize", help="Latency is measured here unless --profile is given. [default: macs]"),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Latencies from edgekit profile, for --minimize latency.")
    ] = None,
    temperature: Annotated[bool, typer.Option("--temperature/--no-temperature", help="Fit one per exit first.")] = True,
    name: Annotated[str, typer.Option("--name", help="What the policy is saved as, in the bundle.")] = "default",
    runtime: options.Runtime = "onnxruntime",
    threads: options.Threads = 1,
    json: options.Json = False,
) -> None:
    """Choose thresholds that keep the accuracy at least cost, and save them in the bundle.

    Empirical: the drop holds on the calibration set; nothing is promised about other data.
    """
    import edgekit

    drop = options.share(max_drop, option="--max-drop")
    measured = Profile.load(profile) if profile is not None else None
    options.find_users_code()
    with (
        output.Bars() as progress,
        edgekit.load(bundle, runtime=runtime, threads=threads) as session,
    ):
        policy = edgekit.calibrate(
            session,
            data,
            max_drop=drop,
            score=score,
            minimize=minimize,
            profile=measured,
            temperature=temperature,
            name=name,
            progress=progress,
        )
        exits = tuple(step.name for step in session.plan.exits)
    output.show(policy.to_mapping(), as_json=json, draw=lambda console: _draw(policy, exits, bundle, console))


def _draw(policy: Policy, exits: tuple[str, ...], bundle: Path, console: Console) -> None:
    origin = policy.provenance
    assert origin is not None
    results = origin.results
    table = Table(title=f"policy {policy.name}: {policy.score} {policy.comparator} threshold", title_justify="left")
    for heading in ("exit", "threshold", "temperature", "share"):
        table.add_column(heading, justify="left" if heading == "exit" else "right")
    for index, (name, temperature) in enumerate(zip(exits, policy.temperatures, strict=True)):
        threshold = f"{policy.thresholds[index]:.4g}" if index < len(policy.thresholds) else "accepts all"
        table.add_row(name, threshold, f"{temperature:.3g}", percent(results["exit_shares"][index]))
    console.print(table)
    console.print(
        f"accuracy {percent(results['accuracy'])}, of the last exit alone {percent(results['accuracy_last'])} "
        f"({origin.samples} samples of {origin.data}); "
        f"mean cost {_cost(results['expected_cost'], results['cost_unit'])}, "
        f"all to the last exit {_cost(results['cost_of_last_exit'], results['cost_unit'])}"
    )
    console.print(f"guarantee on other data: {origin.guarantee or 'none, this is an empirical choice'}")
    console.print(f"saved in {bundle} as policy '{policy.name}'", soft_wrap=True)


def _cost(value: float, unit: str) -> str:
    return duration(value) if unit == "s" else f"{si(value)} {unit}"
