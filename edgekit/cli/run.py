"""``edgekit run``: predictions and exits."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from edgekit.bundle import Bundle
from edgekit.cli import options, output
from edgekit.data import Dataset, as_dataset
from edgekit.progress import Progress
from edgekit.records import gate_shares, mean_macs
from edgekit.report.files import write_aside
from edgekit.report.formats import percent, si

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgekit.session import Session

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit run net.edgekit --data test.npz --policy default -o predictions.csv"


def command(
    bundle: options.BundlePath,
    data: options.DataSource,
    policy: options.PolicyName = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples at a time.")] = 64,
    runtime: options.Runtime = "onnxruntime",
    threads: options.Threads = 1,
    path: Annotated[Path | None, typer.Option("-o", "--output", help="CSV file to write: a line per sample.")] = None,
    json: options.Json = False,
) -> None:
    """Run data through a bundle: predictions, exits, how often gates were open, and accuracy where there are labels."""
    import edgekit

    options.find_users_code()
    with (
        output.Bars() as progress,
        Bundle.open(bundle) as opened,
        edgekit.load(opened, runtime=runtime, policy=policy, threads=threads) as session,
    ):
        names = opened.manifest.classes
        samples = as_dataset(data, preprocess=opened.manifest.preprocess, classes=names, progress=progress)
        answers = _run(session, samples, batch=batch, progress=progress)
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
    }

    def draw(console: Console) -> None:
        _draw(summary, console)
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


def _run(session: Session, samples: Dataset, *, batch: int, progress: Progress) -> _Answers:
    results = []
    executed: Counter[str] = Counter()
    for done, inputs in enumerate(samples.batches(batch)):
        result = session.run(inputs)
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
        "accuracy": None if right is None else float(right.mean()),
        "exits": exits,
        "stages": [{"name": stage.name, "rows": answers.executed[stage.name]} for stage in session.plan.stages],
        "macs": mean_macs(session.plan, answers.executed, samples=len(samples)),
        "gates": msgspec.to_builtins(gate_shares(session.plan, answers.exits.tolist(), answers.executed)),
    }


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
    table = Table(title=f"{summary['samples']} samples, policy {summary['policy']}", title_justify="left")
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
