"""``edgekit calibrate``: a policy with a certificate, or one within a budget, or bounds for any time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from edgekit.artifacts import FLOAT
from edgekit.cli import options, output
from edgekit.cli.propose import needed_samples
from edgekit.errors import InputError
from edgekit.policy import Policy
from edgekit.records import Profile
from edgekit.report.files import write_aside
from edgekit.report.formats import duration, percent, si
from edgekit.report.tradeoff_terminal import tradeoff_tables

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit calibrate net.edgekit --data device.npz --max-drop 1% --confidence 95% --minimize latency"


def command(
    bundle: options.BundlePath,
    data: options.DataSource,
    max_drop: Annotated[str, typer.Option("--max-drop", help="What may be lost: 1% or 0.01.")] = "1%",
    confidence: Annotated[
        str, typer.Option("--confidence", help="That no more is lost on inputs like these: 95% or 0.95.")
    ] = "95%",
    empirical: Annotated[
        bool, typer.Option("--empirical", help="Promise nothing: hold the drop on these samples alone.")
    ] = False,
    loss: options.LossName = "gap",
    strict: Annotated[
        bool, typer.Option("--strict", help="Promise it of those who leave early alone, at or before each exit.")
    ] = False,
    also: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="LOSS:SHARE", help="Another loss to keep as well: consistency:5%. Repeatable."),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            "--score",
            help="max_prob, margin, neg_entropy, patience, learned, or best of these. [default: the proposal's]",
        ),
    ] = None,
    proposal: Annotated[
        str | None,
        typer.Option("--proposal", help="Saved by edgekit propose. [default: 'default', else half of the samples]"),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Mean cost not to exceed, instead of a drop: 2ms, 5mJ or 1.2e6 (MACs)."),
    ] = None,
    anytime: Annotated[
        bool, typer.Option("--anytime", help="Bound the loss of stopping at each exit; nobody leaves by itself.")
    ] = False,
    minimize: options.Minimize = None,
    profile: options.ProfilePath = None,
    temperature: options.Temperature = True,
    name: Annotated[str, typer.Option("--name", help="What the policy is saved as, in the bundle.")] = "default",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the split and the order of testing.")] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Write the threshold explorer, one HTML file.")] = None,
    runtime: options.Runtime = "onnxruntime",
    threads: options.Threads = 1,
    precision: options.Precision = FLOAT,
    json: options.Json = False,
) -> None:
    """Choose when to leave: at least cost, with a certificate of what is lost at most, and save it in the bundle.

    Policies proposed on other samples are tested on these; without a proposal, half of these propose and half test.
    """
    import edgekit

    drop = options.share(max_drop, option="--max-drop")
    sure = None if empirical else options.share(confidence, option="--confidence")
    most, quantity = (None, None) if budget is None else _budget(budget)
    if sum((empirical, strict, budget is not None, anytime)) > 1:
        raise InputError("--empirical, --strict, --budget and --anytime exclude each other: give one")
    if html is not None:
        if empirical or anytime or budget is not None:
            raise InputError("--html shows a certified policy's path: leave out --empirical, --budget and --anytime")
        if not html.resolve().parent.is_dir():
            raise InputError(f"--html {html}: no such folder")
    more = [_also(text) for text in also or ()]
    measured = Profile.load(profile) if profile is not None else None
    options.find_users_code()
    with (
        output.Bars() as progress,
        options.uncalibrated(bundle, runtime=runtime, threads=threads, precision=precision) as session,
    ):
        asked = [(loss, drop), *more]
        if sure not in (None, 0, 1) and budget is None and not anytime and all(0 < most < 1 for _, most in asked):
            progress.say(needed_samples(asked, sure))
        policy = edgekit.calibrate(
            session,
            data,
            max_drop=drop,
            confidence=sure,
            loss=loss,
            score=score,
            conditional=strict,
            also=more,
            proposal=proposal,
            budget=most,
            anytime=anytime,
            minimize=minimize or quantity,
            profile=measured,
            temperature=temperature,
            name=name,
            seed=seed,
            progress=progress,
        )
        exits = tuple(step.name for step in session.plan.exits)
    origin = policy.provenance
    assert origin is not None
    if html is not None and origin.tradeoff is not None:
        from edgekit.report.tradeoff_page import tradeoff_html

        title = f"{bundle.stem}: policy {policy.name}"
        page = tradeoff_html(origin.tradeoff, origin.certificate, title=title, policy=policy)
        write_aside(html, page)
    output.show(policy.to_mapping(), as_json=json, draw=lambda console: _draw(policy, exits, bundle, html, console))


def _also(text: str) -> tuple[str, float]:
    """``consistency:5%``."""
    loss, colon, share = text.partition(":")
    if not colon:
        raise InputError(f"--also {text}: expected a loss and its largest mean, as --also consistency:5%")
    return loss.strip(), options.share(share, option="--also")


def _budget(text: str) -> tuple[float, Literal["latency", "energy", "macs"]]:
    """``2ms`` is 0.002 s of latency, ``5mJ`` 0.005 J, a number MACs.

    Raises:
        InputError: something else.
    """
    units: dict[str, tuple[float, Literal["latency", "energy", "macs"]]] = {
        "us": (1e-6, "latency"), "µs": (1e-6, "latency"), "ms": (1e-3, "latency"), "s": (1.0, "latency"),
        "uJ": (1e-6, "energy"), "µJ": (1e-6, "energy"), "mJ": (1e-3, "energy"), "J": (1.0, "energy"), "": (1.0, "macs"),
    }  # fmt: skip
    number = text.strip().rstrip("sJmuµ ")
    unit = text.strip()[len(number) :].strip()
    try:
        factor, quantity = units[unit]
        value = float(number) * factor
    except (KeyError, ValueError):
        raise InputError(f"--budget {text}: expected a mean cost, as --budget 2ms, 5mJ or 1.2e6 (MACs)") from None
    if not 0 < value < float("inf"):
        raise InputError(f"--budget {text}: a budget is positive")
    return value, quantity


def _draw(policy: Policy, exits: tuple[str, ...], bundle: Path, html: Path | None, console: Console) -> None:
    origin = policy.provenance
    assert origin is not None
    if origin.tradeoff is not None:
        for each in tradeoff_tables(origin.tradeoff, origin.certificate, policy):
            console.print(each)
    elif "anytime" in origin.results:
        _draw_anytime(origin.results["anytime"], console)
    else:
        _draw_choice(policy, exits, console)
    console.print(f"promise: {origin.guarantee or 'none on other data, this is an empirical choice'}", soft_wrap=True)
    for warning in origin.results.get("warnings", ()):
        console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    console.print(f"saved in {bundle} as policy '{policy.name}'", soft_wrap=True)
    if html is not None:
        console.print(f"explorer: {html}", soft_wrap=True)


def _draw_anytime(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="stopped at an exit", title_justify="left")
    for heading in ("exit", "accuracy", "mean loss here", "at most"):
        table.add_column(heading, justify="left" if heading == "exit" else "right")
    for row in rows:
        accuracy = "–" if row["accuracy"] is None else percent(row["accuracy"])
        table.add_row(row["exit"], accuracy, percent(row["loss"]), percent(row["bound"]))
    console.print(table)


def _draw_choice(policy: Policy, exits: tuple[str, ...], console: Console) -> None:
    assert policy.provenance is not None
    results, source = policy.provenance.results, policy.provenance
    table = Table(title=f"policy {policy.name}: {policy.score} {policy.comparator} threshold", title_justify="left")
    for heading in ("exit", "threshold", "temperature", "share"):
        table.add_column(heading, justify="left" if heading == "exit" else "right")
    for index, (name, temperature) in enumerate(zip(exits, policy.temperatures, strict=True)):
        threshold = f"{policy.thresholds[index]:.4g}" if index < len(policy.thresholds) else "accepts all"
        table.add_row(name, threshold, f"{temperature:.3g}", percent(results["exit_shares"][index]))
    console.print(table)
    unit = results["cost_unit"]
    if "accuracy" in results:
        console.print(
            f"accuracy {percent(results['accuracy'])}, of the last exit alone {percent(results['accuracy_last'])} "
            f"({source.samples} samples of {source.data})"
        )
    console.print(
        f"mean cost {_cost(results['expected_cost'], unit)}, all to the last exit "
        f"{_cost(results['exit_costs'][-1], unit)}"
    )
    if "msdnet" in results:
        baseline = results["msdnet"]
        console.print(
            f"MSDNet's budgeted batch: {baseline['reason']}"
            if "reason" in baseline
            else f"loss {percent(results['loss'])}; MSDNet's budgeted batch would lose {percent(baseline['loss'])} at "
            f"{_cost(baseline['expected_cost'], unit)}",
            soft_wrap=True,
        )


def _cost(value: float, unit: str) -> str:
    return duration(value) if unit == "s" else f"{si(value)} {unit}"
