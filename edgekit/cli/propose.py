"""``edgekit propose``: policies to be tested on other samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from edgekit.artifacts import FLOAT
from edgekit.certificate import Proposal, to_mapping
from edgekit.cli import options, output
from edgekit.records import Profile
from edgekit.report.formats import percent, si

__all__ = ["EXAMPLE", "command", "needed_samples"]

EXAMPLE = "edgekit propose net.edgekit --data validation.npz --score best"
SHOWN = 12
"""Policies of the path in the table."""


def command(
    bundle: options.BundlePath,
    data: options.DataSource,
    loss: options.LossName = "gap",
    score: Annotated[
        str, typer.Option("--score", help="max_prob, margin, neg_entropy, patience, learned, or best of these.")
    ] = "max_prob",
    max_drop: Annotated[str, typer.Option("--max-drop", help="Target at which scores are compared.")] = "1%",
    minimize: options.Minimize = None,
    profile: options.ProfilePath = None,
    temperature: options.Temperature = True,
    name: Annotated[str, typer.Option("--name", help="What the proposal is saved as, in the bundle.")] = "default",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    runtime: options.Runtime = "onnxruntime",
    threads: options.Threads = 1,
    precision: options.Precision = FLOAT,
    json: options.Json = False,
) -> None:
    """Find policies worth testing, on a server's validation samples, and save them in the bundle.

    edgekit calibrate then tests them on the device, with samples of its own.
    """
    import edgekit

    drop = options.share(max_drop, option="--max-drop")
    measured = Profile.load(profile) if profile is not None else None
    options.find_users_code()
    with (
        output.Bars() as progress,
        options.uncalibrated(bundle, runtime=runtime, threads=threads, precision=precision) as session,
    ):
        proposal = edgekit.propose(
            session,
            data,
            loss=loss,
            score=score,
            max_drop=drop,
            minimize=minimize,
            profile=measured,
            temperature=temperature,
            name=name,
            seed=seed,
            progress=progress,
        )
        exits = tuple(step.name for step in session.plan.exits)
    output.show(to_mapping(proposal), as_json=json, draw=lambda console: _draw(proposal, exits, bundle, drop, console))


def needed_samples(losses: Sequence[tuple[str, float]], confidence: float) -> str:
    """How many samples a test needs at least, said before any is run; ``losses`` each with its largest mean."""
    from edgekit.calibration import find_loss, smallest_sample

    least = max(smallest_sample(most, 1 - confidence, find_loss(loss).test) for loss, most in losses)
    promise = ", ".join(f"{percent(most)} of {loss}" for loss, most in losses)
    return (
        f"a promise of {promise}, with {percent(confidence)} confidence, takes {least} tested samples at least, and "
        "more where some lose; without a proposal half of those given test"
    )


def _draw(proposal: Proposal, exits: tuple[str, ...], bundle: Path, drop: float, console: Console) -> None:
    if proposal.scores:
        table = Table(title="scores, on the same samples", title_justify="left")
        for heading in ("score", f"cost at {proposal.scores[0].epsilon:.3g}", "AUROC of each exit"):
            table.add_column(heading, justify="left" if heading == "score" else "right")
        for found in proposal.scores:
            mark = " (chosen)" if found.score == proposal.score else ""
            ranked = ", ".join("–" if value is None else f"{value:.3f}" for value in found.auroc)
            table.add_row(found.score + mark, si(found.cost), ranked)
        console.print(table)
    table = Table(title=f"{len(proposal.policies)} policies, in the order of testing", title_justify="left")
    for heading in ("", f"loss ({proposal.loss})", proposal.cost, *exits):
        table.add_column(heading, justify="right")
    step = max(1, len(proposal.policies) // SHOWN)
    for place in range(0, len(proposal.policies), step):
        policy = proposal.policies[place]
        table.add_row(str(place), percent(policy.loss), si(policy.cost), *map(percent, policy.shares))
    console.print(table)
    console.print(
        f"found on {proposal.samples} samples of {proposal.source}; saved in {bundle} as proposal '{proposal.name}'",
        soft_wrap=True,
    )
    console.print("next: edgekit calibrate on other samples, which test these policies", soft_wrap=True)
    if 0 < drop < 1:
        console.print(needed_samples([(proposal.loss, drop)], 0.95), soft_wrap=True)
