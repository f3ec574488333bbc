"""A parity report: complete in the terminal, and no wider than 100 columns; the same as a page, in a browser."""

import html
import io
import json
import re

import msgspec
import pytest
from rich.console import Console

from edgekit.environment import Environment
from edgekit.parity_records import (
    Budget,
    Count,
    ExitParity,
    Flip,
    GateFlip,
    GatesParity,
    Parity,
    PolicyParity,
    RunParity,
    Spread,
    StageParity,
    TensorParity,
)
from edgekit.report.parity import print_parity
from edgekit.report.parity_page import write_parity


def spread(largest=4e-5, scale=20.0, unlike=0):
    return Spread(scale=scale, largest=largest, median=1e-7, p99=2e-6, elements=640, unlike=unlike)


def flip(sample, margin, **options):
    given = {"cost": 0, "answer_changed": False, **options}
    return Flip(
        sample=sample,
        reference_exit="classifier.0",
        exit="classifier.2",
        at="classifier.0",
        threshold=0.5,
        reference_score=None if margin is None else 0.5 + margin,
        score=0.49999,
        margin=margin,
        **given,
    )


def policy(name, flips, **options):
    exits = tuple(Count(name=f"classifier.{place}", compared=5000 - place, agreed=5000 - place) for place in range(2))
    given = {"accuracy_reference": 0.8, "accuracy": 0.798, **options}
    return PolicyParity(
        policy=name,
        score="max_prob",
        comparator=">=",
        thresholds=(0.5, float("inf")),
        samples=5000,
        exits=exits,
        flips=tuple(flips),
        answers_changed=12,
        **given,
    )


@pytest.fixture
def parity():
    stages = tuple(
        StageParity(
            name=f"features.denseblock{place}.a-module-with-a-rather-long-name",
            rows=256,
            tensors=(
                TensorParity(name=f"features.denseblock{place}/add", spread=spread(1e-6)),
                TensorParity(name=f"features.denseblock{place}/relu_7", spread=spread(3e-6)),
            ),
        )
        for place in range(3)
    )
    exits = tuple(
        ExitParity(name=f"classifier.{place}", spread=spread(), answers_changed=1, accuracy_reference=0.8, accuracy=0.8)
        for place in range(3)
    )
    flips = [flip(3, 2e-5, cost=1, answer_changed=True), flip(7, None), flip(9, 0.25, after_gate="blocks.3")]
    run = RunParity(
        label="litert",
        runtime={"name": "litert", "version": "2.0"},
        artifacts="litert",
        exits=exits,
        stages=stages,
        policies=(policy("max_prob-q25", []), policy("max_prob-q50", flips)),
        gates=(
            GatesParity(
                constants={},
                samples=5000,
                gates=(
                    Count(name="blocks.1", compared=5000, agreed=5000),
                    Count(name="blocks.3", compared=5000, agreed=4999),
                ),
                flips=(GateFlip(sample=9, gate="blocks.3", reference_open=True, later=0, answer_changed=True, cost=1),),
            ),
        ),
    )
    return Parity(
        created="2026-11-27T05:00:00+00:00",
        network="msdnet-cifar10",
        plan="0" * 64,
        data="test.tar.gz",
        data_sha256="1" * 64,
        samples=5000,
        of_samples=10_000,
        recorded=256,
        labelled=True,
        reference="onnxruntime",
        reference_runtime={"name": "onnxruntime"},
        runs=(run,),
        budget=Budget(),
        exceeded=("litert: 4 of 15000 decisions differ from onnxruntime (0.0267 %, allowed 0.02 %)",),
        notes=("no sample came to 1 of 4 stages, as 'blocks.2'",),
        environment=Environment.take(busy_over_s=0),
    )


def printed(parity, *, width=100):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    print_parity(parity, console=console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


def row(text, *starts):
    """The cells of the one line that begins so."""
    (line,) = (line for line in text.splitlines() if line.split()[: len(starts)] == list(starts))
    return line.split()


def test_all_is_told(parity):
    text = printed(parity)
    assert text.splitlines()[0].split() == ["beyond", *parity.exceeded[0].split()]
    joined = " ".join(text.split())
    assert (
        "msdnet-cifar10: 5000 of 10000 samples of test.tar.gz, stages on 256; budget 0.020 % of the decisions, "
        in joined
    )
    assert "litert against onnxruntime: 4 of 15000 decisions differ (99.973 % alike)" in text
    assert row(text, "classifier.2") == ["classifier.2", "20", "4e-05", "2e-06", "2e-06", "1e-07", "1", "80.00", "%"]
    assert row(text, "max_prob-q50")[:4] == ["max_prob-q50", "3", "99.940", "%"]
    assert row(text, "max_prob-q50")[4:] == ["2e-05", "12", "80.00", "→", "79.80", "%", "+0.02"]
    assert row(text, "max_prob-q25")[4] == "–"
    assert row(text, "classifier.0", "10000") == ["classifier.0", "10000", "10000", "100.000", "%"]
    assert "gates: 1 of 5000 samples take another way, which costs +0.02 points of accuracy at the last exit" in joined
    assert row(text, "blocks.3") == ["blocks.3", "5000", "4999", "99.980", "%"]
    assert "blocks.1" not in text
    assert "no sample came to 1 of 4 stages" in text
    assert "relu_7" in text
    assert "denseblock1/add" not in text, "the worst output of a stage alone"
    assert "…" in text, "stage names are shortened"


def test_flips_farthest_first(parity):
    lines = printed(parity).partition("flips, 3 of 3")[2].splitlines()
    shown = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [cells[0] for cells in shown] == ["7", "9", "3"]
    assert shown[0][1:] == ["max_prob-q50", "…0", "→", "…2", "NaN", "0.49999", "0.5", "–", "same"]
    assert shown[1][-3:] == ["same,", "after", "gate"]
    assert shown[2][-4:] == ["0.49999", "0.5", "2e-05", "lost"]


def test_many_flips_are_cut(parity):
    run = parity.runs[0]
    many = msgspec.structs.replace(run, policies=(policy("p", [flip(at, at * 1e-3) for at in range(40)]),))
    text = printed(msgspec.structs.replace(parity, runs=(many,)))
    assert "flips, 10 of 40, farthest from the threshold first" in text
    shown = [line.split()[0] for line in text.partition("flips, 10 of 40")[2].splitlines() if " p " in line]
    assert shown == [str(at) for at in range(39, 29, -1)]


def test_nothing_to_decide_and_no_labels(parity):
    exits = tuple(
        msgspec.structs.replace(each, accuracy=None, accuracy_reference=None) for each in parity.runs[0].exits
    )
    run = msgspec.structs.replace(parity.runs[0], policies=(), gates=(), exits=exits)
    budget = Budget(flip_share=None, difference=None, margin=None)
    text = printed(
        msgspec.structs.replace(
            parity, runs=(run,), exceeded=(), notes=(), labelled=False, budget=budget, of_samples=5000
        )
    )
    assert text.startswith("all within the budget\n")
    assert "litert against onnxruntime: nothing is decided" in text
    assert "5000 samples of test.tar.gz, stages on 256; budget none" in text
    assert "accuracy" not in text


def test_what_has_no_scale_or_is_not_a_number(parity):
    step = msgspec.structs.replace(parity.runs[0].exits[0], spread=spread(1e-9, scale=0.0, unlike=3))
    run = msgspec.structs.replace(parity.runs[0], exits=(step,), policies=())
    text = printed(msgspec.structs.replace(parity, runs=(run,)))
    assert row(text, "classifier.0", "0")[:7] == ["classifier.0", "0", "1e-09", "+", "3", "NaN", "–"]


# The page


def page_of(parity, tmp_path):
    text = write_parity(parity, tmp_path / "parity.html").read_text(encoding="utf-8")
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.S)[1])
    return html.unescape(re.sub(r"<script.*?</script>", "", text, flags=re.S)), figures


def test_the_page_tells_what_the_terminal_does(parity, tmp_path):
    text, figures = page_of(parity, tmp_path)
    assert parity.exceeded[0] in text
    assert parity.notes[0] in text
    assert "Beyond the budget" in text
    assert "litert against onnxruntime: 4 of 15000 decisions differ (99.973 % alike)" in text
    assert "1 of 5000 samples take another way, which costs +0.02 points" in text
    rows = re.search(r'id="flips-table-0">.*?</table>', text, re.S)[0]
    assert re.findall(r'<th scope="row" data-value="(\d+)">', rows) == ["7", "9", "3"]
    apart = {trace["name"]: trace for trace in figures["apart-0"]["data"]}
    assert [len(trace["y"]) for trace in apart.values()] == [6, 6, 6]
    assert apart["largest"]["x"][:3] == pytest.approx([3e-6 / 20] * 3)
    assert apart["largest"]["x"][3:] == pytest.approx([4e-5 / 20] * 3)
    assert figures["apart-0"]["layout"]["shapes"][0]["x0"] == parity.budget.difference
    margins = {trace["name"]: trace["x"] for trace in figures["flips-0"]["data"]}
    # The one behind a gate and the one without a margin have no mark.
    assert margins == {"answer lost": [2e-5], "answer won": [], "other answer": [], "same answer": []}


def test_what_cannot_be_drawn_is_not_called_the_same(parity, tmp_path):
    """Logits that are NaN in one runtime alone; a threshold of minus infinity, which is infinitely far."""
    nothing = Spread(scale=3.0, largest=0.0, median=0.0, p99=0.0, elements=0, unlike=500)
    run = parity.runs[0]
    run = msgspec.structs.replace(
        run,
        exits=tuple(msgspec.structs.replace(each, spread=nothing) for each in run.exits),
        stages=(),
        policies=(policy("p", [flip(3, float("inf")), flip(5, 1e-3, answer_changed=True, cost=None)]),),
    )
    text, figures = page_of(msgspec.structs.replace(parity, runs=(run,)), tmp_path)
    assert "same bits" not in text
    assert "500 NaN" in text
    assert "Infinity" not in json.dumps(figures)
    assert {trace["name"]: trace["x"] for trace in figures["flips-0"]["data"] if trace["x"]} == {"other answer": [1e-3]}
    assert not re.search(r'data-value="-?(inf|nan)"', text)


def test_the_page_of_runtimes_with_the_same_bits(parity, tmp_path):
    same = spread(0.0)
    same = msgspec.structs.replace(same, median=0.0, p99=0.0)
    run = parity.runs[0]
    run = msgspec.structs.replace(
        run,
        exits=tuple(msgspec.structs.replace(each, spread=same) for each in run.exits),
        stages=tuple(
            msgspec.structs.replace(each, tensors=(TensorParity(name="a", spread=same),)) for each in run.stages
        ),
        policies=(policy("p", []),),
        gates=(),
    )
    text, figures = page_of(msgspec.structs.replace(parity, runs=(run,), exceeded=(), notes=()), tmp_path)
    assert "All within the budget" in text
    assert "gives the same bits" in text
    assert figures == {}


@pytest.mark.browser
@pytest.mark.parametrize("options", [[], ["--blink-settings=preferredColorScheme=0"], ["--window-size=420,900"]])
def test_the_page_in_a_browser(options, parity, opened, tmp_path):
    nasty = msgspec.structs.replace(parity.runs[0], label="<img src=x>", policies=(policy("<img>", [flip(3, 2e-5)]),))
    page = write_parity(msgspec.structs.replace(parity, runs=(*parity.runs, nasty)), tmp_path / "parity.html")
    assert page.stat().st_size < 6e6
    dom, console = opened(page, tmp_path / "user", *options)
    assert console == []
    assert 'data-plots="4"' in dom
    assert "<img" not in re.sub(r"<script.*?</script>", "", dom, flags=re.S)
