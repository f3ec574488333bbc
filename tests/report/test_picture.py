"""Pictures of plans without a browser: well-formed, complete, nothing on top of anything else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import combinations
from xml.etree import ElementTree

import pytest

from edgekit.errors import InputError, MeasurementError
from edgekit.plan import Run, walk
from edgekit.report.picture import picture, write_picture

NAMES = ["chain2", "chain54", "nested", "looped", "nasty"]
SVG = "{http://www.w3.org/2000/svg}"


class Drawn:
    """Rectangles and texts of a picture in its own coordinates."""

    def __init__(self, text):
        self.root = ElementTree.fromstring(text)
        self.width, self.height = (float(self.root.get(side)) for side in ("width", "height"))
        self.rectangles, self.texts = {}, []
        self._walk(self.root, 0.0, 0.0)

    def _walk(self, element, x, y):
        moved = re.fullmatch(r"translate\(([\d.]+) ([\d.]+)\)", element.get("transform", ""))
        if moved:
            x, y = x + float(moved[1]), y + float(moved[2])
        kind = element.get("class", "")
        if element.tag == f"{SVG}rect" and kind != "page":
            left, top = x + float(element.get("x", 0)), y + float(element.get("y", 0))
            place = (left, top, left + float(element.get("width")), top + float(element.get("height")))
            self.rectangles.setdefault(kind, []).append(place)
        if element.tag == f"{SVG}text":
            self.texts.append((x + float(element.get("x")), y + float(element.get("y")), element.text))
        for child in element:
            self._walk(child, x, y)

    def count(self, kind):
        return sum(element.get("class") == kind for element in self.root.iter())


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def inside(inner, outer):
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


@pytest.mark.parametrize("name", NAMES)
def test_one_box_for_each_run_one_diamond_for_each_gate_one_pill_for_each_exit(name, plans):
    plan = plans[name]
    drawn = Drawn(picture(plan, name=name))
    runs = [step for step in walk(plan.steps) if isinstance(step, Run)]
    assert drawn.count("stage") == len(runs)
    assert len(drawn.rectangles["box"]) == len(runs) + 1  # and the inputs
    assert drawn.count("diamond") == drawn.count("gate") == len(plan.gates)
    assert len(drawn.rectangles["pill"]) == drawn.count("exit") == len(plan.exits)
    ways = sum(bool(gate.steps) + bool(gate.otherwise) or 1 for gate in plan.gates)
    assert len(drawn.rectangles["open"]) + len(drawn.rectangles.get("closed", [])) == ways
    straight_on = sum(not (gate.steps and gate.otherwise) for gate in plan.gates)
    assert drawn.count("line bypass") == straight_on


@pytest.mark.parametrize("name", NAMES)
def test_nothing_lies_on_anything_else_or_beside_the_page(name, plans):
    drawn = Drawn(picture(plans[name], name=name))
    page = (0, 0, drawn.width, drawn.height)
    boxes = [*drawn.rectangles["box"], *drawn.rectangles["pill"]]
    panels = [*drawn.rectangles["open"], *drawn.rectangles.get("closed", [])]
    assert all(inside(each, page) for each in (*boxes, *panels))
    assert all(0 <= x < drawn.width and 0 <= y <= drawn.height for x, y, _ in drawn.texts)
    assert not any(overlap(one, other) for one, other in combinations(boxes, 2))
    for one, other in combinations([*panels, *boxes], 2):
        assert not overlap(one, other) or inside(one, other) or inside(other, one)
    # Texts that start in one another's place would hide one another.
    assert len({(x, y) for x, y, _ in drawn.texts}) == len(drawn.texts)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_and_figure_is_there(name, plans):
    plan = plans[name]
    root = ElementTree.fromstring(picture(plan, name="the network", reasons={"outer": "because of a product"}))
    titles = [element.text for element in root.iter(f"{SVG}title")]
    whole = "\n".join(titles)
    for stage in plan.stages:
        assert f"stage {stage.name}\n" in whole
        assert not stage.module or f"module {stage.module}" in whole
    for gate in plan.gates:
        assert f"gate {gate.name}\nopen if {gate.value} ≠ 0" in whole
    for step in plan.exits:
        assert f"exit {step.name}\nafter " in whole
    assert titles[0] == "the network"
    assert ("because of a product" in whole) == ("outer" in {gate.name for gate in plan.gates})
    assert "MACs" in whole
    assert "KiB" in whole


def test_a_long_chain_stands_in_columns_and_a_short_one_in_one(plans):
    long, short = (Drawn(picture(plans[name], name=name)) for name in ("chain54", "chain2"))
    assert 1 < long.width / long.height < 2.5
    lefts = {left for left, *_ in long.rectangles["box"]}
    assert len(lefts) > 6
    assert len({left for left, *_ in short.rectangles["open"]}) == 1


def test_gates_nest_and_say_what_they_hand_through(plans):
    drawn = Drawn(picture(plans["nested"], name="nested"))
    panels = [*drawn.rectangles["open"], *drawn.rectangles["closed"]]
    depth = [sum(inside(one, other) for other in panels if other is not one) for one in panels]
    assert sorted(depth) == [0, 0, 0, 1, 1, 1]
    texts = [text for _, _, text in drawn.texts]
    assert "closed: hands on zeros" in texts
    assert "closed: hands on stem/relu" in texts
    assert "closed: 200 k MACs" in [text.partition(" (")[0] for text in texts]
    assert "MACs not counted" in texts


def test_an_equal_stage_is_drawn_again_without_its_weights(plans):
    texts = [text for _, _, text in Drawn(picture(plans["looped"], name="looped")).texts]
    assert texts.count("step") == 2
    assert sum(text.startswith("weights as before") for text in texts) == 1


def test_long_names_lose_their_middle(plans):
    name = "a_very_long_name." * 9
    texts = [text for _, _, text in Drawn(picture(plans["chain2"], name=name)).texts]
    assert texts[0].startswith("a_very_long")
    assert texts[0].endswith("name.")
    assert "…" in texts[0]
    assert len(texts[0]) < len(name)


def test_names_stay_text(plans, tmp_path):
    path = write_picture(plans["nasty"], tmp_path / "p.html", name="</title><script>alert(1)</script>{drawn}")
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;\ufffd\ufffd]]&gt;" in page


@pytest.mark.parametrize("name", ["p.svg", "p.html", "p.htm"])
def test_the_file_stands_on_its_own(name, plans, tmp_path):
    page = write_picture(plans["nested"], tmp_path / name, name="nested").read_text(encoding="utf-8")
    assert page.startswith("<?xml" if name.endswith("svg") else "<!doctype html>")
    assert "prefers-color-scheme: dark" in page
    assert not re.findall(r"@import|url\((?!#tip\))|<script|<image|<foreignObject", page)
    assert set(re.findall(r"\w+://[^\"\s]+", page)) == {"http://www.w3.org/2000/svg"}
    assert os.listdir(tmp_path) == [name]


def test_another_suffix_is_refused(plans, tmp_path):
    with pytest.raises(InputError, match=r"plan\.png: a picture is written as \.svg or \.html"):
        write_picture(plans["nested"], tmp_path / "plan.png", name="nested")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(plans, tmp_path):
    with pytest.raises(MeasurementError, match=r"p\.svg: the report cannot be written"):
        write_picture(plans["nested"], tmp_path / "nowhere" / "p.svg", name="nested")


def test_nothing_of_the_report_extra_is_needed(tmp_path):
    code = (
        "import sys; sys.modules.update(jinja2=None, plotly=None); import edgekit.report.picture as made; "
        "print(made.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "edgekit.report.picture"
