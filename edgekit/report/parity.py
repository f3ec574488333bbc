"""A parity report as rich tables that fit 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from edgekit.parity_records import Count, Flip, GatesParity, Parity, PolicyParity, RunParity, Spread
from edgekit.report.formats import NONE, minus, percent
from edgekit.report.tables import short_names

__all__ = ["print_parity"]

FLIPS_SHOWN = 10
"""Flips that the terminal lists, those farthest from their threshold first; all are in the file."""
_NAMES = (40, 28, 22, 16)
"""Characters of names, as a terminal has room."""

Lines = Sequence[Sequence[str]]


def print_parity(parity: Parity, *, console: Console) -> None:
    """What is beyond the budget, then every runtime: logits, stages, decisions, flips; and what was not compared."""
    for sentence in parity.exceeded:
        console.print(_hanging("beyond", sentence, style="red"))
    if not parity.exceeded:
        console.print(Text("all within the budget", style="bold green"))
    few = f" of {parity.of_samples}" if parity.samples < parity.of_samples else ""
    console.print(
        Text(
            f"{parity.network}: {parity.samples}{few} samples of {parity.data}, stages on {parity.recorded}; "
            f"budget {_budget(parity)}"
        )
    )
    for run in parity.runs:
        console.print()
        console.print(Text(_headline(parity, run), style="bold"))
        for table in _tables(parity, run, console.width):
            console.print(table)
    for note in parity.notes:
        console.print(_hanging("note", note, style="yellow"))


def _budget(parity: Parity) -> str:
    budget = parity.budget
    parts = [
        f"{budget.flips} flips" if budget.flips is not None else "",
        f"{_share(budget.flip_share)} of the decisions" if budget.flip_share is not None else "",
        f"{budget.difference:g} of the logits' scale" if budget.difference is not None else "",
        f"flips within {budget.margin:g} of the threshold" if budget.margin is not None else "",
    ]
    return ", ".join(part for part in parts if part) or "none"


def _headline(parity: Parity, run: RunParity) -> str:
    against = f"{run.label} against {parity.reference}"
    if run.agreement is None:
        return f"{against}: nothing is decided"
    return f"{against}: {run.flips} of {run.decisions} decisions differ ({_share(run.agreement)} alike)"


def _tables(parity: Parity, run: RunParity, width: int) -> Iterator[RenderableType]:
    yield _fitting("logits at every exit, from the input on", *_exit_lines(parity, run), width=width)
    yield _fitting(
        f"stages, given {parity.reference}'s inputs: the output that differs most", *_stages(run), width=width
    )
    if run.policies:
        yield _fitting("exits with each policy", *_policies(parity, run), width=width)
        yield _fitting("decisions at each exit, all policies", *_counts("exit", _by_exit(run.policies)), width=width)
    for each in run.gates:
        yield from _gates(parity, each, width)
    flips = [(each.policy, flip) for each in run.policies for flip in each.flips]
    if flips:
        shown = sorted(flips, key=_farthest)[:FLIPS_SHOWN]
        title = f"flips, {len(shown)} of {len(flips)}, farthest from the threshold first"
        yield _fitting(title, *_flips(parity, shown), width=width)


def _exit_lines(parity: Parity, run: RunParity) -> tuple[list[str], Lines]:
    headings = ["exit", *_SPREAD, "other answers", *(["accuracy"] if parity.labelled else [])]
    lines = [
        [
            step.name,
            *_spread(step.spread),
            str(step.answers_changed),
            *([_change(step.accuracy_reference, step.accuracy)] if parity.labelled else []),
        ]
        for step in run.exits
    ]
    return headings, lines


def _stages(run: RunParity) -> tuple[list[str], Lines]:
    lines = [
        [stage.name, stage.worst.name.rpartition("/")[2], str(stage.rows), *_spread(stage.worst.spread)]
        for stage in run.stages
    ]
    return ["stage", "output", "rows", *_SPREAD], lines


def _policies(parity: Parity, run: RunParity) -> tuple[list[str], Lines]:
    headings = ["policy", "flips", "alike", "margin", "other answers"]
    headings += ["accuracy", "flips cost"] if parity.labelled else []
    lines = []
    for each in run.policies:
        margins = [flip.margin for flip in each.flips if flip.margin is not None and flip.after_gate is None]
        lines.append(
            [
                each.policy,
                str(len(each.flips)),
                _share(each.agreement),
                _figure(max(margins, default=None)),
                str(each.answers_changed),
                *(
                    [_change(each.accuracy_reference, each.accuracy), _points(each.flip_cost)]
                    if parity.labelled
                    else []
                ),
            ]
        )
    return headings, lines


def _by_exit(policies: Sequence[PolicyParity]) -> list[Count]:
    """Decisions at every exit, of all policies together."""
    every = [count for each in policies for count in each.exits]
    return [
        Count(
            name=name,
            compared=sum(count.compared for count in every if count.name == name),
            agreed=sum(count.agreed for count in every if count.name == name),
        )
        for name in dict.fromkeys(count.name for count in every)
    ]


def _counts(what: str, counts: Sequence[Count]) -> tuple[list[str], Lines]:
    lines = [[each.name, str(each.compared), str(each.agreed), _share(each.agreement)] for each in counts]
    return [what, "came in both", "decided alike", "alike"], lines


def _gates(parity: Parity, found: GatesParity, width: int) -> Iterator[RenderableType]:
    moved = ", ".join(f"{name} = {value:g}" for name, value in found.constants.items())
    text = f"gates{f' with {moved}' if moved else ''}: {len(found.flips)} of {found.samples} samples take another way"
    if parity.labelled and found.flips:
        text += f", which costs {_points(found.flip_cost)} points of accuracy at the last exit"
    yield Text(text)
    differing = [each for each in found.gates if each.agreed < each.compared]
    if differing:
        title = f"the {len(differing)} of {len(found.gates)} gates that were not always decided alike"
        yield _fitting(title, *_counts("gate", differing), width=width)


def _farthest(pair: tuple[str, Flip]) -> tuple[bool, float]:
    margin = pair[1].margin
    return margin is not None, -(margin or 0.0)


def _flips(parity: Parity, shown: Sequence[tuple[str, Flip]]) -> tuple[list[str], Lines]:
    exits = [step.name for step in parity.runs[0].exits]
    short = dict(zip(exits, short_names(exits, most=10), strict=True))
    lines = [
        [
            str(flip.sample),
            policy,
            f"{short[flip.reference_exit]} → {short[flip.exit]}",
            _score(flip.reference_score),
            _score(flip.score),
            _score(flip.threshold),
            _figure(flip.margin),
            _answer(flip),
        ]
        for policy, flip in shown
    ]
    return ["sample", "policy", "exit", "score", "other", "threshold", "margin", "answer"], lines


def _answer(flip: Flip) -> str:
    text = "other" if flip.answer_changed else "same"
    if flip.cost:
        text = "lost" if flip.cost > 0 else "won"
    return text if flip.after_gate is None else f"{text}, after gate"


_SPREAD = ("scale", "largest", "relative", "p99", "median")


def _spread(spread: Spread) -> list[str]:
    unlike = f" + {spread.unlike} NaN" if spread.unlike else ""
    figures = [spread.scale, spread.largest, spread.relative, spread.p99, spread.median]
    texts = [_figure(each) for each in figures]
    texts[1] += unlike
    return texts


def _figure(value: float | None) -> str:
    """Two significant figures: what a difference is worth."""
    return NONE if value is None else f"{value:.2g}"


def _score(value: float | None) -> str:
    """As many figures as float32 has."""
    return "NaN" if value is None else minus(f"{value:.8g}")


def _share(value: float | None) -> str:
    """Exact enough for one in a hundred thousand."""
    return percent(value, digits=3)


def _points(share: float | None) -> str:
    return NONE if share is None else minus(f"{100 * share:+.3g}" if share else "0")


def _change(reference: float | None, other: float | None) -> str:
    if reference is None or other is None:
        return NONE
    return percent(reference, digits=2) if reference == other else f"{100 * reference:.2f} → {percent(other, digits=2)}"


def _fitting(title: str, headings: Sequence[str], lines: Lines, *, width: int) -> Table:
    """With as long names as fit, in the first two columns."""
    for most in _NAMES:
        shown = [list(line) for line in lines]
        for column in (0, 1):
            names = list(dict.fromkeys(line[column] for line in lines))
            short = dict(zip(names, short_names(names, most=most), strict=True))
            for line in shown:
                line[column] = short[line[column]]
        table = _table(title, headings)
        for line in shown:
            table.add_row(*map(Text, line))
        if Console(width=10_000).measure(table).maximum <= width:
            break
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for index, heading in enumerate(headings):
        table.add_column(Text(heading), justify="left" if index == 0 else "right", no_wrap=True, overflow="ellipsis")
    return table


def _hanging(label: str, text: str, *, style: str) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text(label, style=f"bold {style}"), Text(text, style=style))
    return grid
