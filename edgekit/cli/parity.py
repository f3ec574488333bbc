"""``edgekit parity``: do runtimes answer and decide alike?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from edgekit.artifacts import FLOAT, PRECISIONS
from edgekit.bundle import Bundle
from edgekit.cli import options, output
from edgekit.data import as_dataset
from edgekit.errors import InputError, ParityError, require
from edgekit.policy import Policy

if TYPE_CHECKING:
    from torch import nn

    from edgekit.exporters import Staged
    from edgekit.parity_records import Budget
    from edgekit.session import Session

__all__ = ["EXAMPLE", "EXCEEDED", "command"]

EXAMPLE = "edgekit parity net.edgekit --runtimes onnxruntime,litert,eager --data test.npz --max-flips 0.02%"
EXCEEDED = 3
"""Exit code when something differs by more than the budget."""
SAME_WEIGHTS = 1e-3
"""Share of the largest golden logit that an eager model may be off; other weights are off by more."""


def command(
    bundle: options.BundlePath,
    data: options.DataSource,
    runtimes: Annotated[
        str,
        typer.Option(
            "--runtimes",
            help="Two or more, separated by commas: onnxruntime, onnxruntime:int8, onnxruntime:provider=cuda, eager.",
        ),
    ],
    reference: Annotated[
        str | None, typer.Option("--reference", help="The one the others are held against. [default: the first]")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="Saved ones, separated by commas. [default: three thresholds for every score]"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Samples to run, evenly spaced. [default: all]")
    ] = None,
    recorded: Annotated[
        int, typer.Option("--recorded", min=1, help="Samples among them to compare single stages on.")
    ] = 256,
    max_flips: Annotated[
        str, typer.Option("--max-flips", help="Decisions that may differ: 0.02% or 0.0002 of all, 3 of them, or none.")
    ] = "0.02%",
    max_difference: Annotated[
        str,
        typer.Option("--max-difference", help="Of an exit's logits, as a share of the largest; none does not judge."),
    ] = "1e-4",
    flip_margin: Annotated[
        str,
        typer.Option("--flip-margin", help="From the threshold to a flipped sample's score; none does not judge."),
    ] = "1e-4",
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODULE:FACTORY", help="For eager. [default: the zoo's of the bundle's name]"),
    ] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="A .safetensors file, for eager.")] = None,
    exits: Annotated[str | None, typer.Option("--exits", help="For eager, as given to edgekit export.")] = None,
    smallest_gate: Annotated[
        int | None, typer.Option("--smallest-gate", min=0, help="For eager, as given to edgekit export.")
    ] = None,
    threads: options.Threads = 1,
    path: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file to write.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Page to write: pictures, every flip at an exit.")] = None,
    json: options.Json = False,
) -> None:
    """Hold runtimes against one of them: stages, logits, decisions, and what each flipped decision costs.

    Exit code: 0 within the budget, 3 beyond it, 1 for errors.
    """
    from edgekit.parity import compare_runtimes
    from edgekit.report.files import write_aside
    from edgekit.report.parity import print_parity
    from edgekit.report.parity_page import write_parity

    budget = read_budget(max_flips, max_difference, flip_margin)
    labels = options.names(runtimes)
    doubled = [label for label in labels if labels.count(label) > 1]
    if doubled:
        raise InputError(f"--runtimes {runtimes}: '{doubled[0]}' is there twice")
    if reference is not None and reference not in labels:
        raise InputError(f"--reference {reference}: is not among --runtimes {runtimes}")
    if page is not None:
        for library in ("plotly", "jinja2"):
            require(library, extra="report", purpose="An HTML report")
        if page.is_dir() or not page.resolve().parent.is_dir():
            raise InputError(f"--html {page}: {'is a folder' if page.is_dir() else 'no such folder'}; name a file")
    options.find_users_code()
    with ExitStack() as stack:
        progress = stack.enter_context(output.Bars())
        opened = stack.enter_context(Bundle.open(bundle))
        policies = [opened.policy(name) for name in options.names(policy)] if policy is not None else []
        manifest = opened.manifest
        samples = as_dataset(data, preprocess=manifest.preprocess, classes=manifest.classes, progress=progress)
        sessions: dict[str, Session] = {}
        for label in labels:
            if label == "eager":
                network = eager_model(manifest.name, model, weights)
                named = options.names(exits) if exits is not None else None
                staged = stage_again(opened, network, exits=named, smallest_gate=smallest_gate)
                sessions[label] = _eager_session(opened, staged, threads, stack)
            else:
                sessions[label] = stack.enter_context(_session(opened, label, threads))
        parity = compare_runtimes(
            sessions,
            samples,
            reference=reference,
            policies=policies,
            limit=limit,
            recorded=recorded,
            budget=budget,
            progress=progress,
        )
    if path is not None:
        write_aside(path, parity.to_json())
    output.show(parity.to_mapping(), as_json=json, draw=lambda console: print_parity(parity, console=console))
    if page is not None:
        write_parity(parity, page)
    for written in filter(None, (path, page)):
        output.remark(f"wrote {written}")
    if parity.exceeded:
        raise typer.Exit(EXCEEDED)


def read_budget(max_flips: str, max_difference: str, flip_margin: str) -> Budget:
    """The budget as the options say; ``none`` does not judge, a whole number of flips counts them.

    Raises:
        InputError: something else.
    """
    from edgekit.parity_records import Budget

    flips = share = None
    if max_flips.isascii() and max_flips.isdigit():
        flips = int(max_flips)
    elif max_flips != "none":
        share = options.share(max_flips, option="--max-flips")
    return Budget(
        flips=flips,
        flip_share=share,
        difference=_bound(max_difference, "--max-difference"),
        margin=_bound(flip_margin, "--flip-margin"),
    )


def _bound(text: str, option: str) -> float | None:
    if text == "none":
        return None
    (value, *more) = options.numbers(text, option=option)
    if more or value < 0:
        raise InputError(f"{option} {text}: expected a number that is not negative, or none")
    return value


def _session(bundle: Bundle, label: str, threads: int) -> Session:
    """``name[:precision][:option=value ...]``, open, and letting nobody leave: no saved policy keeps it from opening.

    Raises:
        InputError: a part is neither a precision nor an option.
    """
    import edgekit

    name, *parts = label.split(":")
    precisions = [part for part in parts if part in PRECISIONS]
    given = [part for part in parts if part not in PRECISIONS]
    if len(precisions) > 1 or not all("=" in part for part in given):
        raise InputError(
            f"--runtimes {label}: expected a runtime, with a precision ({', '.join(PRECISIONS)}) or options after "
            "colons, as onnxruntime:int8 or onnxruntime:provider=cuda"
        )
    return edgekit.load(
        bundle,
        policy=Policy.never(len(bundle.plan.exits)),
        threads=threads,
        precision=precisions[0] if precisions else FLOAT,
        **options.runtime_options(":".join([name, ",".join(given)]) if given else name),
    )


def eager_model(name: str, model: str | None, weights: Path | None) -> nn.Module:
    """What ``eager`` runs: a model of the user's, or the zoo's of that name.

    Raises:
        ParityError: no model is given, and the zoo has none of that name.
        CaptureError: the given one cannot be made.
        InputError: the weights are not the model's.
    """
    require("torch", extra="export", purpose="The runtime eager")
    from edgekit.cli.export import make_model
    from edgekit.zoo import registry
    from edgekit.zoo.weight_files import load_weights

    if model is None:
        if name not in registry.NETWORKS:
            raise ParityError(
                f"the zoo has no network '{name}': eager needs the model, as --model package.module:factory"
            )
        return registry.load(name, weights=weights)
    made = make_model(model)
    if weights is not None:
        load_weights(made, weights)
    return made.eval()


def stage_again(
    bundle: Bundle, model: nn.Module, *, exits: Sequence[str] | None = None, smallest_gate: int | None = None
) -> Staged:
    """The model cut as the bundle is.

    Args:
        bundle: what was exported.
        model: that it was exported from, in evaluation mode.
        exits: as the export was given.
        smallest_gate: likewise.

    Raises:
        ParityError: it is cut otherwise: another model, other options of the export, or another version.
        CaptureError: it cannot become one graph.
    """
    torch = require("torch", extra="export", purpose="The runtime eager")
    from edgekit.exporters import stage_model

    golden = bundle.golden()
    rows = 2 if any(spec.batched for spec in bundle.plan.inputs) else 1
    example = tuple(torch.from_numpy(golden[f"input:{spec.name}"][:rows]) for spec in bundle.plan.inputs)
    smallest: dict[str, Any] = {} if smallest_gate is None else {"smallest_gate": smallest_gate}
    staged = stage_model(model, example, exits=exits, **smallest)
    if staged.plan.fingerprint != bundle.plan.fingerprint:
        raise ParityError(
            f"{bundle.path}: the model is cut otherwise (plan {staged.plan.fingerprint[:12]}) than when exported "
            f"({bundle.plan.fingerprint[:12]}): give the same model, --exits and --smallest-gate, or export again"
        )
    return staged


def _eager_session(bundle: Bundle, staged: Staged, threads: int, stack: ExitStack) -> Session:
    """A session on the eager model's stages, which must answer as the model that was exported."""
    from edgekit.exporters.stages import stage_module
    from edgekit.runtimes.eager import EagerRuntime
    from edgekit.session import Session

    runtime = EagerRuntime({cut.name: stage_module(cut) for cut in staged.cuts}, threads=threads)
    stack.callback(runtime.close)
    session = stack.enter_context(Session(bundle.plan, runtime, {}, bundle=bundle))
    golden = bundle.golden()
    every = session.run_exits([golden[f"input:{spec.name}"] for spec in bundle.plan.inputs])
    for step, logits in zip(bundle.plan.exits, every, strict=True):
        expected = golden[f"exit:{step.name}"]
        given = _softmax(logits) if step.probabilities else logits
        allowed = SAME_WEIGHTS * float(np.abs(expected[np.isfinite(expected)]).max(initial=0))
        if not np.allclose(given, expected, rtol=0, atol=allowed, equal_nan=True):
            raise ParityError(
                f"{bundle.path}: exit '{step.name}' of the model answers otherwise than when it was exported: "
                "give the weights that it had, as --weights FILE"
            )
    return session


def _softmax(logits: Any) -> Any:
    from edgekit.scoring import log_softmax

    return np.exp(log_softmax(logits))
