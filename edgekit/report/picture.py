"""A plan as a picture: stages as boxes, gates as diamonds, exits as arrows out. SVG that stands on its own.

Rows flow down. At a gate, those for which it is open turn aside through what it guards; the others go straight on.
Every part is drawn at its own origin and knows its size; whoever holds it moves it to its place.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from textwrap import wrap

from edgekit.errors import InputError
from edgekit.plan import Exit, Gate, Plan, Run, Step
from edgekit.report.charts import exit_colours
from edgekit.report.files import write_aside
from edgekit.report.formats import size
from edgekit.report.work import handed_through, macs_of, macs_text

__all__ = ["picture", "write_picture"]

BOX, BOX_HEIGHT = 262, 62
FLOW = 34
"""Where the line of flow lies in a part, from its left edge."""
GAP = 20
ASIDE = 56
"""From the line of flow to what lies aside of it: room for the words open and closed."""
PAD = 10
LINE = 15
DIAMOND = 13
"""Half its height and width."""
PILL_HEIGHT = 42
MARGIN, GUTTER = 28, 44
SHAPE = 1.5
"""Width over height that columns are chosen for."""
TALLEST = 900
"""A picture no taller than this stays one column."""
NARROWEST = 520

_STYLE = """
text { font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif }
text { fill: #16191f }
.name { font: 600 12px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace }
.title { font-size: 20px; font-weight: 650 }
.soft { fill: #5b6472 }
.word { font-size: 10.5px; fill: #5b6472 }
.page { fill: #f5f6f8 }
.box { fill: #ffffff; stroke: #c3cad6 }
.pill { fill: #ffffff; stroke-width: 1.6 }
.bar { fill: #3b82f6 }
.open { fill: #8b5cf6; fill-opacity: .09; stroke: #8b5cf6; stroke-opacity: .5 }
.closed { fill: #64748b; fill-opacity: .09; stroke: #64748b; stroke-opacity: .55; stroke-dasharray: 4 3 }
.diamond { fill: #8b5cf6 }
.line { fill: none; stroke: #79849a; stroke-width: 1.5 }
.tip { fill: #79849a }
@media (prefers-color-scheme: dark) {
  text { fill: #e7eaf0 }
  .soft, .word { fill: #98a2b3 }
  .page { fill: #0f1218 }
  .box, .pill { fill: #1b212b }
  .box { stroke: #3d4757 }
  .line { stroke: #8a94a6 }
  .tip { fill: #8a94a6 }
}
"""
_ADVANCE = {"name": 7.3, "soft": 6.1, "title": 12.0}
"""Pixels that a letter of a text takes, in the wider ones of the fonts above."""
_TIP = (
    '<marker id="tip" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path class="tip" d="M0 0.5 8 4 0 7.5z"/></marker>'
)


def picture(plan: Plan, *, name: str, reasons: Mapping[str, str] | None = None) -> str:
    """The SVG.

    Args:
        plan: stages, gates and exits.
        name: of the network: the heading.
        reasons: why gates are gates, by name; shown when the pointer rests on one.
    """
    return _Artist(plan, reasons or {}).draw(name)


def write_picture(plan: Plan, path: str | Path, *, name: str, reasons: Mapping[str, str] | None = None) -> Path:
    """Write the picture as ``.svg``, or as ``.html`` with the same inside. Aside and renamed.

    Raises:
        InputError: another suffix.
        MeasurementError: the file cannot be written.
    """
    path = Path(path)
    drawn = picture(plan, name=name, reasons=reasons)
    if path.suffix == ".svg":
        return write_aside(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{drawn}\n')
    if path.suffix in (".html", ".htm"):
        return write_aside(path, _PAGE.format(title=_escaped(name), drawn=drawn))
    raise InputError(f"{path}: a picture is written as .svg or .html; give it one of these suffixes")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ margin: 0; background: #f5f6f8 }}
@media (prefers-color-scheme: dark) {{ body {{ background: #0f1218 }} }}
</style>
</head>
<body>
{drawn}
</body>
</html>
"""


@dataclass(frozen=True)
class _Part:
    """Something drawn at the origin.

    Attributes:
        svg: elements.
        width: from the left edge.
        height: rows come in at the top and leave at the bottom, both on the line of flow.
        tipped: whether the line that leads here ends in an arrow head.
    """

    svg: str
    width: float
    height: float
    tipped: bool = True

    def at(self, x: float, y: float) -> str:
        """The part moved to a place."""
        return f'<g transform="translate({x:g} {y:g})">{self.svg}</g>'


class _Artist:
    def __init__(self, plan: Plan, reasons: Mapping[str, str]) -> None:
        self.plan = plan
        self.reasons = reasons
        self.whole = macs_of(plan, plan.steps)
        self.largest = max(stage.macs or 0 for stage in plan.stages)
        self.met: set[str] = set()
        self.colours = dict(zip((step.name for step in plan.exits), exit_colours(len(plan.exits)), strict=True))

    def draw(self, name: str) -> str:
        columns = _columns([self._inputs(), *self._rows()])
        inner = sum(column.width for column in columns) + GUTTER * (len(columns) - 1)
        width = max(inner + 2 * MARGIN, NARROWEST)
        heading = self._heading(name, width - 2 * MARGIN)
        top = MARGIN + heading.height + (GAP if len(columns) == 1 else 2 * GAP)
        height = top + max(column.height for column in columns) + MARGIN
        drawn = [heading.at(MARGIN, MARGIN)]
        x: float = MARGIN
        for column, following in zip(columns, [*columns[1:], None], strict=True):
            drawn.append(column.at(x, top))
            if following is not None:
                drawn.append(_over(x, top + column.height, x + column.width + GUTTER, top))
            x += column.width + GUTTER
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
            f'viewBox="0 0 {width:g} {height:g}" role="img"><title>{_escaped(name)}</title><style>{_STYLE}</style>'
            f'<defs>{_TIP}</defs><rect class="page" width="100%" height="100%"/>{"".join(drawn)}</svg>'
        )

    def _heading(self, name: str, width: float) -> _Part:
        """Name, what there is, and how to read it."""
        plan = self.plan
        counts = [(len(plan.stages), "stage"), (len(plan.gates), "gate"), (len(plan.exits), "exit")]
        told = [f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counts if count]
        told += [macs_text(self.whole, None), f"weights {size(sum(stage.weight_bytes for stage in plan.stages))}"]
        lines = [", ".join(told)]
        if plan.gates:
            least = macs_of(plan, plan.steps, is_open=False)
            lines[0] += f"; with every gate closed {macs_text(least, self.whole)}"
            lines.append("Rows for which a gate is open turn aside through what it guards; the others go straight on.")
            lines.append("Figures are for one sample; shares are of the MACs with every gate open.")
        wrapped = [part for line in lines for part in wrap(line, int(width / _ADVANCE["soft"]))]
        texts = [_text(name, 0, 18, width, kind="title")]
        texts += [
            _text(line, 0, 18 + 6 + LINE * place, width, kind="soft") for place, line in enumerate(wrapped, start=1)
        ]
        return _Part("".join(texts), width, 24 + LINE * len(wrapped))

    def _inputs(self) -> _Part:
        lines = [(spec.name, f"({', '.join(map(str, spec.shape))}) {spec.dtype}") for spec in self.plan.inputs]
        texts = "".join(
            _text(name, 12, 18 + 2 * LINE * place, BOX - 24, kind="name")
            + _text(shape, 12, 18 + LINE + 2 * LINE * place, BOX - 24, kind="soft")
            for place, (name, shape) in enumerate(lines)
        )
        height = 2 * LINE * len(lines) + 12
        title = _title(*(f"input {name}: {shape}" for name, shape in lines))
        box = f'<rect class="box" width="{BOX}" height="{height}" rx="{min(height / 2, 20):g}"/>'
        return _Part(f'<g class="inputs">{title}{box}{texts}</g>', BOX, height)

    def _rows(self) -> Iterator[_Part]:
        """The outermost steps; an exit stays with what leads to it, so that no column begins with one."""
        held: list[_Part] = []
        for place, step in enumerate(self.plan.steps):
            held.append(self._step(step))
            following = self.plan.steps[place + 1 : place + 2]
            if not (following and isinstance(following[0], Exit)):
                yield _stacked(held)
                held = []

    def _step(self, step: Step) -> _Part:
        if isinstance(step, Run):
            return self._run(step)
        return self._exit(step) if isinstance(step, Exit) else self._gate(step)

    def _run(self, step: Run) -> _Part:
        """A stage where it is run; the weights are told the first time."""
        stage = self.plan.stage(step.stage)
        inputs, live = step.called(stage.inputs), step.called(stage.live)
        handed = sum(self.plan.tensors[name].row_bytes for name in live)
        carried = "weights as before" if stage.name in self.met else f"weights {size(stage.weight_bytes)}"
        carried += f", hands on {size(handed)}" if handed else ""
        self.met.add(stage.name)
        lines = (macs_text(stage.macs, self.whole), carried)
        texts = _text(stage.name, 12, 18, BOX - 24, kind="name")
        texts += "".join(
            _text(line, 12, 18 + LINE * place, BOX - 24, kind="soft") for place, line in enumerate(lines, start=1)
        )
        filled = max(3, (BOX - 24) * stage.macs / self.largest) if stage.macs else 0
        bar = f'<rect class="bar" x="12" y="{BOX_HEIGHT - 9}" width="{filled:.1f}" height="3" rx="1.5"/>'
        title = _title(
            f"stage {stage.name}",
            f"module {stage.module}" if stage.module else "",
            *lines,
            f"reads {', '.join(inputs)}",
            f"hands on {', '.join(live)}" if live else "",
        )
        box = f'<rect class="box" width="{BOX}" height="{BOX_HEIGHT}" rx="7"/>'
        return _Part(f'<g class="stage">{title}{box}{texts}{bar}</g>', BOX, BOX_HEIGHT)

    def _exit(self, step: Exit) -> _Part:
        index = self.plan.exits.index(step)
        is_last = index == len(self.plan.exits) - 1
        after = f"after {macs_text(self.plan.exit_macs()[index], self.whole)}"
        x, width, middle = FLOW + ASIDE, BOX - 40, PILL_HEIGHT / 2
        down = f"M{FLOW} 0V{middle:g}" if is_last else f"M{FLOW} 0V{PILL_HEIGHT}"
        lines = _line(down) + _line(f"M{FLOW} {middle:g}H{x}", tipped=True)
        pill = (
            f'<rect class="pill" x="{x}" width="{width}" height="{PILL_HEIGHT}" rx="{middle:g}" '
            f'style="stroke: {self.colours[step.name]}"/>'
        )
        texts = _text(step.name, x + 18, 18, width - 36, kind="name")
        texts += _text(after, x + 18, 18 + LINE, width - 36, kind="soft")
        ends = "takes every row that is left" if is_last else "rows whose score passes leave here"
        svg = f'<g class="exit">{_title(f"exit {step.name}", after, ends)}{lines}{pill}{texts}</g>'
        return _Part(svg, x + width, PILL_HEIGHT, tipped=False)

    def _gate(self, gate: Gate) -> _Part:
        """A diamond on the line of flow, and a panel aside for each way on which something is run."""
        ways = [is_open for is_open in (True, False) if (gate.steps if is_open else gate.otherwise)]
        panels = [self._panel(gate, is_open, first=is_open is ways[0]) for is_open in ways]
        panels = panels or [self._panel(gate, None, first=True)]
        left = FLOW + ASIDE
        places = [sum(panel.height + 2 * PAD for panel in panels[:place]) for place in range(len(panels))]
        width = left + max(panel.width for panel in panels) + (PAD + 6 if len(ways) == 2 else 0)
        end = places[-1] + panels[-1].height + PAD
        corners = f"M{FLOW} 0L{FLOW + DIAMOND} {DIAMOND} {FLOW} {2 * DIAMOND} {FLOW - DIAMOND} {DIAMOND}z"
        told = map("".join, self._facts(gate, fully=True))
        svg = [_title(f"gate {gate.name}", *told, self.reasons.get(gate.name, ""))]
        svg += [panel.at(left, y) for panel, y in zip(panels, places, strict=True)]
        if len(ways) == 2:
            entry = places[1] + DIAMOND
            svg.append(_line(f"M{FLOW} {2 * DIAMOND}V{entry:g}H{left}", tipped=True))
            svg.append(_word("closed", FLOW + 6, entry - 5))
        else:
            svg.append(_line(f"M{FLOW} {2 * DIAMOND}V{end:g}", kind="bypass"))
        if len(ways) == 1:
            svg.append(_word("closed" if ways[0] else "open", FLOW + 6, 2 * DIAMOND + 14))
        if ways:
            svg.append(_line(f"M{FLOW + DIAMOND} {DIAMOND}H{left}", tipped=True))
            svg.append(_word("open" if ways[0] else "closed", FLOW + DIAMOND + 4, DIAMOND - 5))
            svg += self._returns(panels, places, left=left, right=width, end=end)
        svg.append(f'<path class="diamond" d="{corners}"/>')
        return _Part(f'<g class="gate">{"".join(svg)}</g>', width, end)

    def _returns(
        self, panels: Sequence[_Part], places: Sequence[float], *, left: float, right: float, end: float
    ) -> Iterator[str]:
        """From the end of each panel back to the line of flow; the first of two goes round the second."""
        x, bottom = left + PAD + FLOW, places[-1] + panels[-1].height
        yield _line(f"M{x} {bottom - PAD:g}V{end:g}H{FLOW}", tipped=len(panels) == 1)
        if len(panels) == 2:
            first = panels[0].height
            yield _line(f"M{x} {first - PAD:g}V{first + PAD:g}H{right:g}V{end:g}H{x}")

    def _panel(self, gate: Gate, is_open: bool | None, *, first: bool) -> _Part:
        """What is run one way, under what there is to say; ``None`` has nothing to run."""
        facts = self._facts(gate) if first else [("closed", "", "")]
        lines = [*([("name", "", gate.name, "")] if first else []), *(("soft", *fact) for fact in facts)]
        body = self._flow(gate.steps if is_open else gate.otherwise) if is_open is not None else _Part("", BOX, 0)
        above, room = 14 + LINE * len(lines), body.width - PAD - 4
        texts = "".join(
            _text(name, PAD + 2, 5 + LINE * place, room, kind=kind, before=before, after=after)
            for place, (kind, before, name, after) in enumerate(lines, start=1)
        )
        width, height = body.width + 2 * PAD, above + body.height + PAD
        kind = "closed" if is_open is False else "open"
        box = f'<rect class="{kind}" width="{width:g}" height="{height:g}" rx="9"/>'
        return _Part(box + texts + body.at(PAD, above), width, height)

    def _facts(self, gate: Gate, *, fully: bool = False) -> list[tuple[str, str, str]]:
        """What there is to say of a gate: words, a tensor's name, words. Only fully are several tensors named."""
        facts = [("open if ", gate.value, " ≠ 0")]
        for is_open, state in ((True, "open"), (False, "closed")):
            steps = gate.steps if is_open else gate.otherwise
            if steps:
                facts.append((f"{state}: {macs_text(macs_of(self.plan, steps), self.whole)}", "", ""))
            handed = handed_through(self.plan, gate, is_open=is_open)
            if handed:
                shown = ", ".join(handed) if len(handed) == 1 or fully else f"{len(handed)} tensors"
                facts.append((f"{state}: hands on ", shown, ""))
        return facts

    def _flow(self, steps: Sequence[Step]) -> _Part:
        return _stacked([self._step(step) for step in steps])


def _stacked(parts: Sequence[_Part]) -> _Part:
    """Parts one below the other, joined by the line of flow."""
    svg, y = [], 0.0
    for place, part in enumerate(parts):
        if place:
            svg.append(_line(f"M{FLOW} {y:g}v{GAP}", tipped=part.tipped))
            y += GAP
        svg.append(part.at(0, y))
        y += part.height
    return _Part("".join(svg), max((part.width for part in parts), default=0), y, parts[0].tipped if parts else True)


def _columns(rows: Sequence[_Part]) -> list[_Part]:
    """Rows put one below the other, in as many columns as give the picture a good shape, of much the same height."""
    total = sum(row.height + GAP for row in rows)
    wide = max(row.width for row in rows) + GUTTER
    count = 1 if total <= TALLEST else max(1, round((SHAPE * total / wide) ** 0.5))
    limit = max(total / count, *(row.height for row in rows))
    columns = _filled(rows, limit)
    while len(columns) > count:
        limit += GAP
        columns = _filled(rows, limit)
    return [_stacked(column) for column in columns]


def _filled(rows: Sequence[_Part], limit: float) -> list[list[_Part]]:
    """Rows in order, in columns of at most this height."""
    columns: list[list[_Part]] = [[]]
    height = 0.0
    for row in rows:
        if columns[-1] and height + row.height > limit:
            columns.append([])
            height = 0.0
        columns[-1].append(row)
        height += row.height + GAP
    return columns


def _over(x: float, bottom: float, following: float, top: float) -> str:
    """From the end of a column to the begin of the next."""
    between, above = following - GUTTER / 2 + 6, top - GAP + 2
    return _line(f"M{x + FLOW:g} {bottom:g}v{GAP - 4}H{between:g}V{above:g}H{following + FLOW:g}V{top:g}", tipped=True)


def _line(path: str, *, tipped: bool = False, kind: str = "") -> str:
    tip = ' marker-end="url(#tip)"' if tipped else ""
    return f'<path class="{f"line {kind}".strip()}" d="{path}"{tip}/>'


def _word(text: str, x: float, y: float) -> str:
    return f'<text class="word" x="{x:g}" y="{y:g}">{text}</text>'


def _text(text: str, x: float, y: float, width: float, *, kind: str, before: str = "", after: str = "") -> str:
    """A line of text, its middle left out where it is too long; what stands before and after it is kept."""
    room = width / _ADVANCE[kind] - _letters(before + after)
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{_escaped(before + _fitted(text, room) + after)}</text>'


def _fitted(text: str, room: float) -> str:
    """Text of at most so many narrow letters."""
    if _letters(text) <= room:
        return text
    keep = len(text)
    while keep > 1:
        keep -= 1
        shorter = f"{text[: keep // 2]}…{text[len(text) - (keep - keep // 2) :]}"
        if _letters(shorter) <= room:
            return shorter
    return "…"


def _letters(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _title(*lines: str) -> str:
    """What is shown when the pointer rests on a part."""
    return f"<title>{_escaped(chr(10).join(line for line in lines if line))}</title>"


def _escaped(text: str) -> str:
    """Text for XML, without the characters that XML does not allow."""
    return escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))
