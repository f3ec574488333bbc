"""A trade-off as rich tables that fit 80 columns."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from edgekit.certificate import Certificate, Tradeoff
from edgekit.policy import Policy
from edgekit.report.formats import percent
from edgekit.report.grid import headed
from edgekit.report.tables import short_names
from edgekit.report.tradeoff import UNAVAILABLE, Reading, epsilon_text, finite

__all__ = ["tradeoff_tables"]


def tradeoff_tables(tradeoff: Tradeoff, certificate: Certificate | None, policy: Policy) -> list[RenderableType]:
    """What is promised, the policy's figures and exits, what other targets would buy, and the scores compared.

    Args:
        tradeoff: the path on the tested samples.
        certificate: of the policy; ``None`` says plainly that nothing is promised.
        policy: as it was saved.
    """
    reading = Reading(tradeoff, certificate, policy)
    shown: list[RenderableType] = [Text(reading.headline, style="bold green" if reading.gains else "bold yellow")]
    if reading.detail:
        shown.append(Text(reading.detail))
    shown += [_figures(reading), _exits(reading)]
    if reading.choices:
        note = f'"Change" is against {reading.never_name}. {reading.targets_note}'
        shown += [_choices(reading), Text(note, style="dim")]
    if reading.score_lines():
        shown += [_scores(reading), Text(reading.score_note, style="dim")]
    shown += [Text(note, style="dim") for note in reading.missing]
    return shown


def _figures(reading: Reading) -> Table:
    point = reading.chosen
    answers, best = reading.answers(point), reading.answers(reading.never)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    level = percent(reading.tradeoff.confidence, digits=0)
    loss = f"{percent(finite(point.loss), digits=2)}, {level} interval {reading.band(point)} ({reading.loss_words})"
    grid.add_row("mean loss", Text(loss))
    if answers is not None:
        against = "" if reading.agreement else f"; {reading.never_name} {percent(best, digits=2)}"
        grid.add_row(reading.answers_title, Text(f"{percent(answers, digits=2)}{against}"))
    for cost in reading.known_costs:
        full = f"{reading.never_name} {cost.text(cost.of(reading.never))}"
        grid.add_row(cost.title, Text(f"{cost.text(cost.of(point))}, {reading.change(cost, point)}; {full}"))
    for name, value in reading.constants_of(point):
        grid.add_row(Text(name), Text(f"constant {value}"))
    grid.add_row("costs", Text(reading.tradeoff.cost_source))
    return grid


def _exits(reading: Reading) -> Table:
    policy = reading.policy
    table = headed(
        f"policy {policy.name}: {policy.score} {policy.comparator} threshold",
        ["exit", "threshold", "share", "accuracy", "ECE", "AUROC"],
    )
    for short, line in zip(short_names(reading.tradeoff.exits), reading.exit_lines(), strict=True):
        table.add_row(*map(Text, (short, *line[1:])))
    return table


def _choices(reading: Reading) -> Table:
    cost = next(iter(reading.known_costs), None)
    headings = ["from ε", "mean loss", reading.answers_title, "early", "standing"]
    if len(reading.tradeoff.exits) == 1:
        headings.remove("early")
    if cost is not None:
        headings[3:3] = [cost.title, "change"]
    table = headed("what a looser or stricter ε would buy", headings)
    for choice in reading.choices:
        point = reading.tradeoff.points[choice.place]
        answers = reading.answers(point)
        cells = [
            epsilon_text(choice.epsilon),
            percent(finite(point.loss), digits=2),
            UNAVAILABLE if answers is None else percent(answers),
            percent(reading.early(point)),
            reading.standing(choice)[0],
        ]
        if len(point.shares) == 1:
            del cells[3]
        if cost is not None:
            cells[3:3] = [cost.text(cost.of(point)), reading.change(cost, point)]
        table.add_row(*map(Text, cells), style="bold" if choice.asked else "")
    return table


def _scores(reading: Reading) -> Table:
    table = headed("scores compared: mean cost, and AUROC at each exit", ["score", "ε", "cost", "AUROC"])
    table.columns[3].no_wrap, table.columns[3].justify = False, "left"
    for name, epsilon, cost, *aurocs in reading.score_lines():
        table.add_row(Text(name), Text(epsilon), Text(cost), Text(" ".join(aurocs)))
    return table
