"""``edgekit run``: predictions and exits."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgekit.artifacts import FLOAT
from edgekit.bundle import Bundle
from edgekit.cli import options, output
from edgekit.data import Dataset, as_dataset
from edgekit.errors import InputError
from edgekit.progress import Progress
from edgekit.report.files import write_aside
from edgekit.report.formats import percent, si
from edgekit.shares import gate_shares, mean_macs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgekit.calibration.audit import Audit, Status
    from edgekit.policy import Policy
    from edgekit.session import Session

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit run net.edgekit --data test.npz --policy default -o predictions.csv"


def command(
    bundle: options.BundlePath,
    data: options.DataSource,
    policy: options.PolicyName = None,
    force: options.Force = False,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples at a time.")] = 64,
    runtime: options.Runtime = "onnxruntime",
    threads: options.Threads = 1,
    precision: options.Precision = FLOAT,
    path: Annotated[Path | None, typer.Option("-o", "--output", help="CSV file to write: a line per sample.")] = None,
    audit: Annotated[
        str | None, typer.Option("--audit", help="Share of the samples that also run to the last exit: 1% or 0.01.")
    ] = None,
    audit_state: Annotated[
        Path | None, typer.Option("--audit-state", help="File in which the audit goes on at the next run.")
    ] = None,
    audit_loss: Annotated[
        Literal["consistency", "gap"] | None,
        typer.Option(
            "--audit-loss",
            help="Agreement with the last exit, or the accuracy gap, which needs labels. [default: the policy's own]",
        ),
    ] = None,
    audit_seed: Annotated[int, typer.Option("--audit-seed", min=0, help="Of the choice of samples.")] = 0,
    epsilon: Annotated[
        str | None,
        typer.Option("--epsilon", help="Largest mean loss in order. [default: the policy's own]"),
    ] = None,
    alpha: Annotated[str, typer.Option("--alpha", help="Chance of a false alarm of the audit, ever.")] = "1%",
    gamma: Annotated[float, typer.Option("--gamma", min=0.0, help="Adapt thresholds by this step; 0 does not.")] = 0.0,
    on_alarm: Annotated[
        Literal["report", "revert"],
        typer.Option("--on-alarm", help="Report it, or never exit early until the policy is certified again."),
    ] = "report",
    json: options.Json = False,
) -> None:
    """Run data through a bundle: predictions, exits, how often gates were open, and accuracy where there are labels."""
    import edgekit

    share = None if audit is None else options.share(audit, option="--audit")
    if share is None and audit_state is not None:
        raise InputError("--audit-state needs --audit, the share of the samples to audit, as --audit 1%")
    options.find_users_code()
    with (
        output.Bars() as progress,
        Bundle.open(bundle) as opened,
        edgekit.load(
            opened,
            **options.runtime_options(runtime),
            policy=policy,
            force=force,
            threads=threads,
            precision=precision,
        ) as session,
    ):
        names = opened.manifest.classes
        samples = as_dataset(data, preprocess=opened.manifest.preprocess, classes=names, progress=progress)
        if share is not None and audit_loss is None:
            audit_loss = _audit_loss(session.policy, samples)
        if share is not None and audit_loss == "gap" and samples.labels is None:
            raise InputError(f"{samples.source}: has no labels, which --audit-loss gap needs; leave that option out")
        with ExitStack() as stack:
            auditing = None
            if share is not None:
                from edgekit.calibration.audit import Audit

                auditing = stack.enter_context(
                    Audit(
                        session,
                        state=audit_state,
                        epsilon=_epsilon(epsilon, session.policy),
                        fraction=share,
                        alpha=options.share(alpha, option="--alpha"),
                        loss=audit_loss or "consistency",
                        seed=audit_seed,
                        gamma=gamma,
                        on_alarm=on_alarm,
                    )
                )
            answers = _run(session, samples, batch=batch, progress=progress, audit=auditing)
            status = auditing.status() if auditing is not None else None
        summary = _summary(session, samples, answers)
    if path is not None:
        write_aside(
            path,
            _csv(samples, answers, classes=names or samples.classes, exits=[each["name"] for each in summary["exits"]]),
        )
    every = {
        "predictions": answers.predictions.tolist(),
        "exits_taken": answers.exits.tolist(),
        "scores": [float(score) for score in answers.scores],
        "output": str(path) if path is not None else None,
        "audit": msgspec.to_builtins(status),
    }

    def draw(console: Console) -> None:
        _draw(summary, console)
        if status is not None:
            _draw_audit(status, console)
        if path is not None:
            console.print(f"wrote {path}", soft_wrap=True)

    output.show({**summary, **every}, as_json=json, draw=draw)


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """``(samples,)`` each, and the rows that every stage ran on."""

    predictions: NDArray[np.int64]
    exits: NDArray[np.int64]
    scores: NDArray[np.float32]
    executed: Counter[str]


def _run(session: Session, samples: Dataset, *, batch: int, progress: Progress, audit: Audit | None = None) -> _Answers:
    run = session.run if audit is None else audit.run
    before = 0 if audit is None else audit.samples
    results = []
    executed: Counter[str] = Counter()
    for done, inputs in enumerate(samples.batches(batch)):
        result = run(inputs)
        if audit is not None and samples.labels is not None:
            for sample in audit.waiting:
                if sample >= before:
                    audit.label(sample, int(samples.labels[sample - before]))
        results.append((result.logits.argmax(axis=1), result.exit, result.score))
        executed.update(result.executed)
        progress("run", min((done + 1) * batch, len(samples)), len(samples))
    predictions, exits, scores = (np.concatenate(part) for part in zip(*results, strict=True))
    return _Answers(predictions=predictions, exits=exits, scores=scores, executed=executed)


def _summary(session: Session, samples: Dataset, answers: _Answers) -> dict[str, Any]:
    right = None if samples.labels is None else answers.predictions == samples.labels
    exits = []
    for index, step in enumerate(session.plan.exits):
        here = answers.exits == index
        rows = int(here.sum())
        accuracy = None if right is None or not rows else float(right[here].mean())
        exits.append({"name": step.name, "rows": rows, "share": rows / len(samples), "accuracy": accuracy})
    return {
        "data": samples.source,
        "samples": len(samples),
        "policy": session.policy.name,
        "certified": _certified(session.policy),
        "accuracy": None if right is None else float(right.mean()),
        "exits": exits,
        "stages": [{"name": stage.name, "rows": answers.executed[stage.name]} for stage in session.plan.stages],
        "macs": mean_macs(session.plan, answers.executed, samples=len(samples)),
        "gates": msgspec.to_builtins(gate_shares(session.plan, answers.exits.tolist(), answers.executed)),
    }


def _certified(policy: Policy) -> bool | None:
    """Whether the policy's certificate holds for what ran; ``None`` without one."""
    certificate = policy.provenance.certificate if policy.provenance is not None else None
    return None if certificate is None else certificate.valid


def _audit_loss(policy: Policy, samples: Dataset) -> Literal["consistency", "gap"]:
    """What the policy is certified for, if these samples can show it; consistency is never less than the gap."""
    certificate = policy.provenance.certificate if policy.provenance is not None else None
    gap = certificate is not None and certificate.loss == "gap" and samples.labels is not None
    return "gap" if gap else "consistency"


def _epsilon(text: str | None, policy: Policy) -> float:
    """What was given, or what the policy was made for."""
    if text is not None:
        return options.share(text, option="--epsilon")
    made_for = policy.provenance.settings if policy.provenance is not None else {}
    for name in ("epsilon", "max_drop"):
        if name in made_for:
            return float(made_for[name])
    raise InputError(f"policy '{policy.name}' does not say what loss it was made for; give it, as --epsilon 2%")


def _csv(samples: Dataset, answers: _Answers, *, classes: tuple[str, ...], exits: list[str]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    labels = samples.labels
    writer.writerow(["sample", "prediction", "exit", "score", *(["label"] if labels is not None else [])])
    for index, (prediction, leave, score) in enumerate(
        zip(answers.predictions, answers.exits, answers.scores, strict=True)
    ):
        label = [_name(labels[index], classes)] if labels is not None else []
        writer.writerow([index, _name(prediction, classes), exits[leave], f"{score:.6g}", *label])
    return text.getvalue()


def _name(index: Any, names: tuple[str, ...]) -> str:
    return names[index] if 0 <= index < len(names) else str(index)


def _draw(summary: dict[str, Any], console: Console) -> None:
    ended = " (its certificate is for other artifacts)" if summary["certified"] is False else ""
    table = Table(title=f"{summary['samples']} samples, policy {summary['policy']}{ended}", title_justify="left")
    for heading in ("exit", "samples", "share", "accuracy there"):
        table.add_column(heading, justify="left" if heading == "exit" else "right")
    for each in summary["exits"]:
        table.add_row(each["name"], str(each["rows"]), percent(each["share"]), percent(each["accuracy"]))
    table.add_section()
    table.add_row("all", str(summary["samples"]), percent(1.0), percent(summary["accuracy"]), style="bold")
    console.print(table)
    if summary["gates"]:
        shares = [f"{each['name']} {percent(each['share'])}" for each in summary["gates"]]
        console.print(f"gates open: {', '.join(shares)}")
    console.print("rows per stage: " + ", ".join(f"{each['name']} {each['rows']}" for each in summary["stages"]))
    if summary["macs"] is not None:
        console.print(f"{si(summary['macs'])} MACs for one sample on average")


def _draw_audit(status: Status, console: Console) -> None:
    table = Table(title="audit", title_justify="left", show_header=False)
    bounds = f"{percent(status.low)} to {percent(status.high)}"
    drift = "no full window yet"
    if status.drift is not None:
        drift = f"PSI {status.drift.psi:.3f}, p = {status.drift.p_value:.2g}; shifted in {status.drift_notable} of "
        drift += f"{status.drift_windows} windows"
    thresholds = ", ".join(each if isinstance(each, str) else f"{each:.4g}" for each in status.thresholds)
    for name, text in {
        "audits": f"{status.audits} of {status.samples} samples"
        + (f", {status.waiting} more without labels" if status.waiting else ""),
        "mean loss": f"{percent(status.mean)} (with {percent(status.confidence, digits=0)} confidence {bounds}), "
        f"target {percent(status.epsilon)}",
        "evidence": f"{status.evidence:.3g}, alarm at {status.limit:g} "
        f"(ever on a stream in order: at most 1 in {status.limit:g})",
        "evidence, restarted": f"{status.restarted:.3g}, alarm at {status.restarted_limit:g} "
        f"(on a stream in order every {status.restarted_limit:g} audits in the mean, or later)",
        "exit shares": f"{drift} (early warning, without a guarantee)",
        "thresholds": f"{thresholds or 'none'} ({status.serving})",
        "delta spent": f"{status.delta_spent:.4g} of {status.delta:g}, attempts {status.attempts}",
        "state": status.state or "in memory only; --audit-state keeps it",
    }.items():
        table.add_row(name, Text(text))
    console.print(table)
    for text, style in _remarks(status):
        console.print(Text(text, style=style), soft_wrap=True)


def _remarks(status: Status) -> Iterator[tuple[str, str]]:
    """What should be done, and how urgent it looks."""
    first = min((at for at in (status.alarm_at, status.restarted_alarm_at) if at is not None), default=None)
    if first is not None:
        yield f"alarm at audit {first}: the mean loss is above {percent(status.epsilon)}", "bold red"
    if status.serving == "never-exit":
        yield f"nobody leaves early until certified again: {status.fresh} of {status.needed} audits", "bold red"
    elif first is not None:
        yield "next: edgekit calibrate on fresh data, or --on-alarm revert to certify this policy again", "red"
    if status.drift_warning:
        yield "exit shares have shifted: samples are not like those at calibration; audit more of them", "yellow"
    if status.state_failure is not None:
        yield f"the state could not be written: {status.state_failure}", "bold red"
