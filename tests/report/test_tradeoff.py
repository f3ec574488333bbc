"""A trade-off in words, in the terminal, and as a page: complete, honest about what is not known, and really moving."""

import io
import json
import math
import re

import msgspec
import pytest
from rich.console import Console

from edgekit.certificate import Certificate, Point, ScoreFound, Target, Tradeoff
from edgekit.policy import Policy, Provenance
from edgekit.report.tradeoff import ACCEPTED, FAILED, TESTED, UNTESTED, Reading
from edgekit.report.tradeoff_page import tradeoff_html
from edgekit.report.tradeoff_terminal import tradeoff_tables

COSTS_S = (0.9e-3, 1.6e-3, 2.4e-3, 3.3e-3, 4.4e-3, 5.1e-3, 5.9e-3, 6.8e-3)
ASKED = 0.02
TARGETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.1)


def first_failure(count):
    """Place of the first policy that the test at :data:`ASKED` rejects: its interval comes above it."""
    return next((n for n in range(count) if 0.12 * (n / max(count - 1, 1)) ** 2.2 + 0.007 > ASKED), count)


def make_point(place, *, count, exits, labelled=True, latency=True, energy=False, macs=True):
    """Loss grows and cost falls along the path, as with MSDNet on CIFAR-10."""
    way = place / max(count - 1, 1)
    early = 0.97 * way**0.7 if exits > 1 else 0.0
    weights = [0.62**index for index in range(max(exits - 1, 0))]
    shares = (*(early * weight / sum(weights) for weight in weights), 1 - early)
    thresholds = tuple(max(0.99 - 0.6 * way - 0.02 * index, 0.2) for index in range(exits - 1))
    loss = 0.12 * way**2.2
    failing = first_failure(count)
    cost = sum(share * each for share, each in zip(shares, COSTS_S[:exits], strict=True)) * (1 - 0.3 * way)
    return Point(
        thresholds=thresholds if place else (math.inf,) * (exits - 1),
        constants={"gates.1": 0.5 + 0.4 * way} if exits == 1 and place else {},
        shares=shares,
        loss=loss,
        low=loss - 0.006 if place else 0.0,
        high=loss + 0.007 if place else 0.0,
        p_value=None if place > failing else 0.31 if place == failing else 0.001 * place,
        accuracy=0.924 - loss if labelled else None,
        macs=cost * 1.1e10 if macs else None,
        latency_s=cost if latency else None,
        energy_j=cost * 6 if energy else None,
    )


def make_tradeoff(*, exits=5, count=40, chosen=None, **known):
    points = tuple(make_point(place, count=count, exits=exits, **known) for place in range(count))
    places = [max((n for n in range(count) if points[n].high <= target), default=0) for target in TARGETS]
    labelled = known.get("labelled", True)
    return Tradeoff(
        exits=tuple(f"exit{index + 1}" for index in range(exits)),
        points=points,
        chosen=places[TARGETS.index(ASKED)] if chosen is None else chosen,
        confidence=0.9,
        targets=tuple(Target(epsilon=each, place=place) for each, place in zip(TARGETS, places, strict=True)),
        cost="latency" if known.get("latency", True) else "macs",
        cost_source="profile.json, onnxruntime 1.32.0 on bench-01",
        scores=tuple(
            ScoreFound(
                score=name, epsilon=ASKED, cost=cost, unit="s", auroc=tuple(auroc - 0.03 * n for n in range(exits - 1))
            )
            for name, cost, auroc in (("max_prob", 2.1e-3, 0.89), ("margin", 2.16e-3, 0.87), ("patience", 3.4e-3, 0.7))
        ),
        ece=tuple(0.021 + 0.004 * n for n in range(exits)) if labelled else None,
        auroc=tuple(0.88 - 0.03 * n for n in range(exits - 1)),
    )


def make_certificate(**changes):
    fields = {
        "epsilon": ASKED,
        "delta": 0.1,
        "loss": "gap",
        "test": "wsr",
        "samples": 1000,
        "needed": 114,
        "mean_loss": 0.0112,
        "p_value": 0.018,
        "tested": 19,
        "path": "3f9a1c0de55b" + "0" * 52,
        "path_samples": 5000,
        "path_source": "cifar10/calibration.npz",
        "seed": 0,
        "precision": "float32",
        "device": "bench-01, CPU",
    }
    return Certificate(**(fields | changes))


def make_policy(tradeoff, **settings):
    exits = len(tradeoff.exits)
    return Policy(
        score="max_prob",
        thresholds=tradeoff.points[tradeoff.chosen].thresholds,
        temperatures=(1.2,) * exits,
        provenance=Provenance(
            method="a path, tested in order",
            plan="3f9a1c0de55b" + "0" * 52,
            runtime="onnxruntime 1.32.0",
            data="cifar10/device.npz",
            data_sha256="c0ffee" + "0" * 58,
            samples=1000,
            settings=settings,
            results={"exit_accuracy": [0.924 - 0.03 * (exits - 1 - n) for n in range(exits)]},
            created="2026-11-20T10:04:12+00:00",
        ),
    )


def make_reading(certificate=None, settings=None, **known):
    tradeoff = make_tradeoff(**known)
    return Reading(tradeoff, certificate, make_policy(tradeoff, **(settings or {})))


def never_exit(**changes):
    """A path of one policy: too few samples."""
    tradeoff = msgspec.structs.replace(make_tradeoff(count=1, chosen=0), targets=(Target(epsilon=ASKED, place=0),))
    return tradeoff, make_certificate(samples=40, mean_loss=0.0, p_value=1.0, tested=0, **changes)


def page_of(tradeoff, certificate, *, title="msdnet-cifar10", **settings):
    pytest.importorskip("plotly", reason="the report extra is not installed")
    return tradeoff_html(tradeoff, certificate, title=title, policy=make_policy(tradeoff, **settings))


def data_of(page):
    """What the page's script reads; not even Python's reader may find a NaN in it."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)[1]
    return json.loads(text, parse_constant=refuse)


def seen(page):
    """The page's text without scripts and styles."""
    bare = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", bare).split()).replace("&#39;", "'").replace("&gt;", ">")


def printed(tradeoff, certificate, *, width=80, **settings):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    for each in tradeoff_tables(tradeoff, certificate, make_policy(tradeoff, **settings)):
        console.print(each)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    return text


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("gap", "loses at most 2 % of accuracy against the last exit"),
        ("consistency", "answers at most 2 % of inputs otherwise than the last exit does"),
        ("brier", "loses at most 2 % of Brier score against the last exit"),
        ("iou", "has a mean loss 'iou' of at most 2 %"),
    ],
)
def test_promise_in_words(loss, said):
    reading = make_reading(make_certificate(loss=loss))
    assert reading.headline == (
        f"With probability 90 % or more, over the drawing of the samples, policy 'default' {said}, "
        "on inputs like the 1000 that it was tested on."
    )
    assert reading.certified


def test_no_promise():
    assert make_reading().headline == "No guarantee: nothing is promised about other data."
    forced = make_reading(make_certificate(valid=False))
    assert forced.headline.startswith("No guarantee any more: this policy was put, by force, on artifacts")
    assert forced.detail.startswith("Of the artifacts that were tested it was certified: With probability 90 %")
    assert not forced.certified
    assert {forced.standing(each)[0] for each in forced.choices} == {"no guarantee"}


def test_too_few_samples_and_nothing_certified():
    tradeoff, certificate = never_exit()
    assert Reading(tradeoff, certificate, make_policy(tradeoff)).headline == (
        "Too few samples: 40 were there, and 114 are needed before anything but never-exit can be certified at "
        "ε = 2 % and δ = 10 %. Nobody leaves early."
    )
    failed = make_reading(make_certificate(), chosen=0)
    assert failed.headline == "Nobody leaves early: no cheaper policy was certified at ε = 2 % and δ = 10 %."


def test_conditional_promise_says_so():
    assert "among those alone who left at or before it" in make_reading(make_certificate(conditional=True)).headline


def test_statuses():
    reading = make_reading(make_certificate())
    failing = first_failure(40)
    found = [reading.status(place) for place in (0, 1, failing - 1, failing, failing + 1)]
    assert found == [ACCEPTED, ACCEPTED, ACCEPTED, FAILED, UNTESTED]
    assert make_reading().status(1) == TESTED
    assert make_reading(settings={"delta": 0.1}).status(failing) == FAILED


def test_choices_hold_the_target_asked_for_and_changes_alone():
    targets = tuple(Target(epsilon=each, place=place) for each, place in ((0.01, 3), (0.02, 7), (0.03, 7), (0.05, 9)))
    tradeoff = msgspec.structs.replace(make_tradeoff(chosen=8), targets=targets)
    reading = Reading(tradeoff, make_certificate(epsilon=0.02), make_policy(tradeoff))
    assert [(each.epsilon, each.place, each.asked) for each in reading.choices] == [
        (0.01, 3, False),
        (0.02, 8, True),
        (0.03, 7, False),
        (0.05, 9, False),
    ]
    assert [reading.standing(each)[0] for each in reading.choices] == ["valid alone", "certified"] + ["valid alone"] * 2
    same = msgspec.structs.replace(tradeoff, targets=(*targets, Target(epsilon=0.07, place=9)))
    assert len(Reading(same, make_certificate(), make_policy(same)).choices) == 4


def test_terminal():
    text = printed(make_tradeoff(energy=True), make_certificate())
    said = words(text)
    assert "With probability 90 % or more" in said
    assert "policy default: max_prob >= threshold" in said
    assert f"exit1 {make_tradeoff().points[first_failure(40) - 1].thresholds[0]:.4g}" in said
    assert "exit5 accepts all" in said
    for word in (
        "latency",
        "energy",
        "MACs",
        "never-exit 4.400 ms",
        "mean loss",
        "from ε",
        "certified",
        "valid alone",
        "AUROC",
    ):
        assert word in said
    assert re.search(r"max_prob +2 % +2\.100 ms +0\.890 0\.860", text)
    assert "they do not hold all together" in said
    assert "Only the choice for ε = 2 %, asked for beforehand, is certified, with probability 90 % or more." in said


def test_terminal_says_what_is_unknown():
    said = words(
        printed(make_tradeoff(labelled=False, latency=False, macs=False), make_certificate(loss="consistency"))
    )
    assert "agreement" in said
    for quantity in ("accuracy", "latency", "energy", "MACs", "ECE"):
        assert f"{quantity} unavailable: " in said
    assert "0.000 ms" not in said


@pytest.mark.parametrize("exits", [1, 2, 8])
@pytest.mark.parametrize("certificate", [None, make_certificate(), make_certificate(valid=False)])
def test_every_size(exits, certificate):
    tradeoff = make_tradeoff(exits=exits, count=64, energy=exits == 8)
    said = words(printed(tradeoff, certificate))
    assert ("gates.1 constant 0." in said) == (exits == 1)
    page = page_of(tradeoff, certificate)
    data = data_of(page)
    assert len(data["policies"]) == 64
    assert all(len(each["shares"]) == exits for each in data["policies"])
    assert ("Constants of gates" in seen(page)) == (exits == 1)


def test_never_is_a_word_and_no_number_is_infinite():
    tradeoff, certificate = never_exit()
    page = page_of(tradeoff, certificate)
    assert data_of(page)["policies"][0]["thresholds"] == ["never"] * 4 + ["accepts all"]
    assert "114 are needed" in seen(page)
    assert 'class="promise none" role="alert"' in page
    assert ">certified<" not in page
    assert "114 are needed" in words(printed(tradeoff, certificate))


def test_odd_numbers_are_unavailable_and_leave_the_json_readable():
    tradeoff = make_tradeoff()
    odd = {"loss": math.nan, "low": -math.inf, "high": math.nan, "accuracy": math.nan, "latency_s": math.inf}
    points = list(tradeoff.points)
    points[5] = msgspec.structs.replace(points[5], thresholds=(math.inf, 0.5, -math.inf, math.inf), **odd)
    tradeoff = msgspec.structs.replace(
        tradeoff, points=tuple(points), chosen=5, auroc=(None, math.nan, 0.7, 0.6), ece=(math.nan,) * 5
    )
    data = data_of(page_of(tradeoff, make_certificate(mean_loss=math.nan, p_value=math.nan)))
    assert data["policies"][5]["cards"]["answers"]["value"] == "unavailable"
    assert data["policies"][5]["cards"]["latency"]["value"] == "unavailable"
    assert data["policies"][5]["thresholds"] == ["never", "0.5", "always", "never", "accepts all"]
    assert "unavailable" in printed(tradeoff, make_certificate())


def test_page_stands_alone_and_names_are_no_markup():
    odd = "</script><img src=x onerror=alert(1)>"
    tradeoff = msgspec.structs.replace(make_tradeoff(exits=2), exits=(odd, "last"), cost_source=odd)
    page = page_of(tradeoff, make_certificate(device=odd, loss=odd), title=odd)
    assert "<img" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r'(src|href)="(?!data:)', re.sub(r"<script.*?</script>", "", page, flags=re.S))
    assert "default-src 'none'" in page


def test_page_says_why_figures_are_missing():
    page = page_of(make_tradeoff(labelled=False, latency=False), make_certificate(loss="consistency"))
    text = seen(page)
    assert "Latency unavailable: no profile gave the latency of the exits." in text
    assert "Energy unavailable: no profile gave the energy of the exits." in text
    assert "Accuracy unavailable: the samples have no labels." in text
    assert "Mean latency unavailable no profile" in text
    assert "Agreement" in text
    assert list(data_of(page)["figures"]) == ["macs"]
    bare = page_of(make_tradeoff(latency=False, macs=False), None)
    assert list(data_of(bare)["figures"]) == ["place"]


def test_page_without_targets_or_certificate():
    tradeoff = msgspec.structs.replace(make_tradeoff(), targets=(), scores=())
    text = seen(page_of(tradeoff, None))
    assert "No targets are known" in text
    assert "No guarantee: nothing is promised about other data." in text
    assert "Scores compared" not in text
    assert "what a looser" not in words(printed(tradeoff, None))


def test_slider_reaches_every_target():
    page = page_of(make_tradeoff(), make_certificate(epsilon=0.0125))
    (slider,) = re.findall(r'<input type="range"[^>]*>', page)
    assert 'max="10.00" step="0.01" value="1.25"' in slider


MOVE = """<script>
(() => {
  const text = (query) => document.querySelector(query).textContent;
  const all = (query) => [...document.querySelectorAll(query)].map((each) => each.textContent);
  const read = () => ({
    cards: Object.fromEntries([...document.querySelectorAll("[data-card]")].map(
      (card) => [card.dataset.card, card.querySelector(".figure").textContent])),
    shares: all('[data-line="shares"] td:not(:first-child)'),
    widths: [...document.getElementById("stack").children].map((each) => parseFloat(each.style.width)),
    thresholds: all('[data-line="thresholds"] td:not(:first-child)'),
    constants: all("[data-constant]"),
    standing: text("#standing"), announcement: text("#announcement"),
    slider: document.getElementById("epsilon").value, number: document.getElementById("epsilon-number").value,
    ring: [document.getElementById("curve").data.at(-1).x[0], document.getElementById("curve").data.at(-1).y[0]],
    now: all("#choices tr.now button"),
  });
  const set = (id, value) => {
    const input = document.getElementById(id);
    input.value = value;
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const steps = [
    () => {},
    () => set("epsilon", 5),
    () => set("epsilon", 4.9),
    () => set("epsilon-number", 0.1),
    () => set("epsilon-number", ""),
    () => document.querySelector(".control button").click(),
  ];
  const found = steps.map((step) => { step(); return read(); });
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
})();
</script></body>"""


def saved(page, folder):
    path = folder / "t.html"
    path.write_text(page, encoding="utf-8")
    return path


def moved(opened, page, folder, *options):
    """What the page showed after each step of :data:`MOVE`."""
    dom, console = opened(saved(page.replace("</body>", MOVE), folder), folder / "user", *options)
    assert console == []
    assert 'data-ready="yes"' in dom
    return json.loads(re.search(r'<pre id="found">(.*?)</pre>', dom, flags=re.S)[1])


@pytest.mark.browser
def test_moving_the_target_changes_what_is_shown(opened, tmp_path):
    tradeoff = make_tradeoff(energy=True)
    start, loose, between, strict, emptied, back = moved(opened, page_of(tradeoff, make_certificate()), tmp_path)

    def expected(place):
        point = tradeoff.points[place]
        energy, latency, macs = point.energy_j * 1e3, point.latency_s * 1e3, point.macs / 1e6
        return {
            "answers": f"{100 * point.accuracy:.2f} %",
            "loss": f"{100 * point.loss:.2f} %",
            "latency": f"{latency:.3f} ms",
            "energy": f"{energy:.2f} mJ" if energy > 10 else f"{energy:.3f} mJ",
            "macs": f"{macs:.2f} M",
        }

    places = {target.epsilon: target.place for target in tradeoff.targets}
    assert start["cards"] == expected(tradeoff.chosen)
    assert (start["standing"], start["now"], start["slider"]) == ("certified", ["2 %"], "2")
    assert loose["cards"] == expected(places[0.05])
    assert (loose["standing"], loose["now"], loose["number"]) == ("valid alone", ["5 %"], "5")
    assert "Target 5 %: policy" in loose["announcement"]
    point = tradeoff.points[places[0.05]]
    assert loose["ring"] == pytest.approx([1e3 * point.latency_s, point.loss])
    assert loose["widths"] == pytest.approx([100 * share for share in point.shares], abs=0.01)
    assert loose["thresholds"][:4] == [f"{each:.4g}" for each in point.thresholds]
    assert between["cards"] == expected(places[0.03])
    assert strict["cards"] == expected(0)
    assert strict["thresholds"] == ["never"] * 4 + ["accepts all"]
    assert (strict["standing"], strict["now"], strict["slider"]) == ("loses nothing", [], "0.1")
    assert emptied == strict | {"number": ""}
    assert back == start


@pytest.mark.browser
@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["--blink-settings=preferredColorScheme=0"], marks=pytest.mark.slow),
        pytest.param(["--window-size=420,900"], marks=pytest.mark.slow),
    ],
    ids=["light", "dark", "narrow"],
)
@pytest.mark.parametrize(
    ("known", "certificate"),
    [
        ({"exits": 1}, make_certificate()),
        ({"exits": 8, "count": 64, "energy": True}, make_certificate(valid=False)),
        ({"labelled": False, "latency": False, "macs": False}, None),
    ],
    ids=["one exit", "eight exits", "little known"],
)
def test_console_is_silent_on_every_screen(known, certificate, options, opened, tmp_path):
    found = moved(opened, page_of(make_tradeoff(**known), certificate, epsilon=ASKED), tmp_path, *options)
    assert found[0] != found[1]
    if known.get("exits") == 1:
        assert found[3]["constants"] == ["as trained"]
        assert found[1]["constants"] != found[0]["constants"]
    if "labelled" in known:
        assert {found[1]["cards"][key] for key in ("answers", "latency", "energy", "macs")} == {"unavailable"}


@pytest.mark.browser
def test_one_policy_alone(opened, tmp_path):
    tradeoff, certificate = never_exit()
    found = moved(opened, page_of(tradeoff, certificate), tmp_path)
    assert {each["cards"]["loss"] for each in found} == {"0.00 %"}
    untargeted = msgspec.structs.replace(make_tradeoff(), targets=())
    dom, console = opened(saved(page_of(untargeted, None), tmp_path), tmp_path / "user")
    assert console == []
    assert 'data-ready="yes"' in dom
