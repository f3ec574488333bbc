"""What a parity report says of one runtime, each part as a table: for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from edgekit.parity_records import Count, Flip, GatesParity, Parity, PolicyParity, RunParity, Spread
from edgekit.report.formats import NONE, minus, percent
from edgekit.report.sheets import Cell, Sheet
from edgekit.report.tables import short_names

__all__ = ["budget_text", "headline", "parity_sheets", "subject"]

_SPREAD = ("scale", "largest", "relative", "p99", "median")
_OWN = "Differences are absolute; relative is the largest by the scale, the largest magnitude in the reference."


def subject(parity: Parity) -> str:
    """What was compared on what."""
    few = f" of {parity.of_samples}" if parity.samples < parity.of_samples else ""
    return f"{parity.network}: {parity.samples}{few} samples of {parity.data}, stages on {parity.recorded}"


def budget_text(parity: Parity) -> str:
    """What may differ."""
    budget = parity.budget
    parts = [
        f"{budget.flips} flips" if budget.flips is not None else "",
        f"{_share(budget.flip_share)} of the decisions" if budget.flip_share is not None else "",
        f"{budget.difference:g} of the logits' scale" if budget.difference is not None else "",
        f"flips within {budget.margin:g} of the threshold" if budget.margin is not None else "",
    ]
    return ", ".join(part for part in parts if part) or "none"


def headline(parity: Parity, run: RunParity) -> str:
    """How many decisions differ."""
    against = f"{run.label} against {parity.reference}"
    if run.agreement is None:
        return f"{against}: nothing is decided"
    return f"{against}: {run.flips} of {run.decisions} decisions differ ({_share(run.agreement)} alike)"


def parity_sheets(parity: Parity, run: RunParity) -> Iterator[Sheet]:
    """Exits, stages, policies, decisions at each exit, gates that differed, flips: those that there are."""
    yield _exits(parity, run)
    yield _stages(parity, run)
    if run.policies:
        yield _policies(parity, run)
        yield _counts(
            "exit",
            _by_exit(run.policies),
            key="decisions",
            title="decisions at each exit, all policies",
            lead="Of samples that came there in both runtimes.",
        )
    yield from (_gates(parity, found, number) for number, found in enumerate(run.gates))
    flips = [(each.policy, flip) for each in run.policies for flip in each.flips]
    if flips:
        yield _flips(run, sorted(flips, key=_farthest))


def _exits(parity: Parity, run: RunParity) -> Sheet:
    headings = ("exit", *_SPREAD, "other answers", *(["accuracy"] if parity.labelled else []))
    lines = tuple(
        (
            Cell(step.name, place),
            *_spread(step.spread),
            _count(step.answers_changed),
            *([_change(step.accuracy_reference, step.accuracy)] if parity.labelled else []),
        )
        for place, step in enumerate(run.exits)
    )
    return Sheet(key="exits", title="logits at every exit, from the input on", lead=_OWN, headings=headings,
                 lines=lines)  # fmt: skip


def _stages(parity: Parity, run: RunParity) -> Sheet:
    lines = tuple(
        (
            Cell(stage.name, place),
            Cell(stage.worst.name.rpartition("/")[2]),
            _count(stage.rows),
            *_spread(stage.worst.spread),
        )
        for place, stage in enumerate(run.stages)
    )
    return Sheet(
        key="stages",
        title=f"stages, given {parity.reference}'s inputs: the output that differs most",
        lead=f"Differences of earlier stages do not add up here. {_OWN}",
        headings=("stage", "output", "rows", *_SPREAD),
        lines=lines,
    )


def _policies(parity: Parity, run: RunParity) -> Sheet:
    headings = ["policy", "flips", "alike", "margin", "other answers"]
    headings += ["accuracy", "flips cost"] if parity.labelled else []
    lines = []
    for place, each in enumerate(run.policies):
        margins = [flip.margin for flip in each.flips if flip.margin is not None and flip.after_gate is None]
        widest = max(margins, default=None)
        line = [
            Cell(each.policy, place),
            _count(len(each.flips)),
            Cell(_share(each.agreement), each.agreement),
            Cell(_figure(widest), widest),
            _count(each.answers_changed),
        ]
        if parity.labelled:
            line += [_change(each.accuracy_reference, each.accuracy), Cell(_points(each.flip_cost), each.flip_cost)]
        lines.append(tuple(line))
    return Sheet(
        key="policies",
        title="exits with each policy",
        lead="A flip is a sample that takes another exit; the margin is the largest from the threshold to a flipped "
        "sample's score in the reference; what flips cost is accuracy, in points.",
        headings=tuple(headings),
        lines=tuple(lines),
    )


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


def _gates(parity: Parity, found: GatesParity, number: int) -> Sheet:
    """One setting of the gates; without lines where all were decided alike."""
    moved = ", ".join(f"{name} = {value:g}" for name, value in found.constants.items())
    lead = f"gates{f' with {moved}' if moved else ''}: {len(found.flips)} of {found.samples} samples take another way"
    if parity.labelled and found.flips:
        lead += f", which costs {_points(found.flip_cost)} points of accuracy at the last exit"
    differing = [each for each in found.gates if each.agreed < each.compared]
    title = "all gates were always decided alike"
    if differing:
        title = f"the {len(differing)} of {len(found.gates)} gates that were not always decided alike"
    return _counts("gate", differing, key=f"gates-{number}", title=title, lead=lead)


def _counts(what: str, counts: Sequence[Count], *, key: str, title: str, lead: str) -> Sheet:
    lines = tuple(
        (
            Cell(each.name, place),
            _count(each.compared),
            _count(each.agreed),
            Cell(_share(each.agreement), each.agreement),
        )
        for place, each in enumerate(counts)
    )
    headings = (what, "came in both", "decided alike", "alike")
    return Sheet(key=key, title=title, lead=lead, headings=headings, lines=lines)


def _farthest(pair: tuple[str, Flip]) -> tuple[bool, float]:
    margin = pair[1].margin
    return margin is not None, -(margin or 0.0)


def _flips(run: RunParity, flips: Sequence[tuple[str, Flip]]) -> Sheet:
    exits = [step.name for step in run.exits]
    short = dict(zip(exits, short_names(exits, most=10), strict=True))
    lines = tuple(
        (
            Cell(str(flip.sample), flip.sample),
            Cell(policy),
            Cell(f"{short[flip.reference_exit]} → {short[flip.exit]}"),
            Cell(_score(flip.reference_score), flip.reference_score),
            Cell(_score(flip.score), flip.score),
            Cell(_score(flip.threshold), flip.threshold),
            Cell(_figure(flip.margin), flip.margin),
            Cell(_answer(flip)),
        )
        for policy, flip in flips
    )
    return Sheet(
        key="flips",
        title="flips, farthest from the threshold first",
        lead="Scores of the reference and of the other runtime where only one of them let the sample leave.",
        headings=("sample", "policy", "exit", "score", "other", "threshold", "margin", "answer"),
        lines=lines,
    )


def _answer(flip: Flip) -> str:
    text = "other" if flip.answer_changed else "same"
    if flip.cost:
        text = "lost" if flip.cost > 0 else "won"
    return text if flip.after_gate is None else f"{text}, after gate"


def _spread(spread: Spread) -> tuple[Cell, ...]:
    figures = (spread.scale, spread.largest, spread.relative, spread.p99, spread.median)
    cells = [Cell(_figure(each), each) for each in figures]
    if spread.unlike:
        cells[1] = Cell(f"{cells[1].text} + {spread.unlike} NaN", math.inf)
    return tuple(cells)


def _count(value: int) -> Cell:
    return Cell(str(value), value)


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


def _change(reference: float | None, other: float | None) -> Cell:
    if reference is None or other is None:
        return Cell(NONE)
    same = percent(reference, digits=2)
    return Cell(same if reference == other else f"{100 * reference:.2f} → {percent(other, digits=2)}", other)
