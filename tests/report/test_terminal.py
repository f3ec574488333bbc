"""Terminal output: complete, and no wider than 100 columns."""

import io

import msgspec
import pytest
from rich.console import Console

from edgekit.measured import Closure
from edgekit.report import compare, print_comparison, print_profile


def printed(show, what, *, width=100):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    show(what, console=console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


def words(text):
    return " ".join(text.split())


def test_profile(profile):
    text = printed(print_profile, profile)
    for heading in ("exit", "share", "accuracy", "MACs", "median [ms]", "95 % CI", "p90", "p99"):
        assert heading in text
    rows = [line.split()[0] for line in text.splitlines() if line.startswith((" exit", " stream"))]
    assert rows == ["exit", "exit1", "exit2", "exit3", "exit4", "exit5", "stream"]
    assert f"= {profile.closure.ratio:.3f}" in text
    assert f"energy unavailable: {profile.stream.energy.reason}" in words(text)
    assert "guarantee: none: empirical" in text
    assert "warning governor is 'powersave', not 'performance': clocks may vary" in words(text)
    assert "…" not in text


def test_gates(profile, with_gates):
    assert "gates open blocks.1 52.0 %, <b>2</b> –" in words(printed(print_profile, with_gates))
    assert "gates" not in printed(print_profile, profile)


def test_energy_column(with_energy):
    text = printed(print_profile, with_energy)
    assert "energy [mJ]" in text
    assert "11.50" in text
    assert "unavailable" not in text
    assert "…" not in text


def test_energy_that_is_nothing_closes_nothing(with_energy):
    closure = Closure(quantity="energy", predicted=0.0, measured=0.0)
    text = words(printed(print_profile, msgspec.structs.replace(with_energy, energy_closure=closure)))
    assert "Σ share × energy of each exit 0.000 µJ = not known" in text


def test_scripted_banner(scripted):
    assert "Not a real measurement: runtime 'fake' answers from a script" in words(printed(print_profile, scripted))


def test_missing_figures(unlabelled, one_exit):
    assert "accuracy unavailable: the data has no labels" in printed(print_profile, unlabelled)
    assert "p99 –: needs 662 samples; the shortest row has 50" in printed(print_profile, one_exit)


def test_names_are_no_markup(profile):
    odd = "[red]b[/red] [/]"
    renamed = msgspec.structs.replace(
        profile, network=odd, warnings=(odd,), exits=(msgspec.structs.replace(profile.exits[0], name=odd),)
    )
    renamed = msgspec.structs.replace(renamed, stream=msgspec.structs.replace(profile.stream, exits=(0,)))
    assert printed(print_profile, renamed).count(odd) == 3


@pytest.mark.parametrize("width", [100, 80, 60])
def test_long_names_and_narrow_terminals(with_energy, width):
    exits = tuple(
        msgspec.structs.replace(item, name=f"module.backbone.layer{index}.exit_heads.{index}.classifier")
        for index, item in enumerate(with_energy.exits)
    )
    text = printed(print_profile, msgspec.structs.replace(with_energy, exits=exits), width=width)
    table = text[: text.index("speed-up")]
    for item in exits:
        assert f"{item.latency.median_s * 1e3:.3f}" in table
        assert f"{item.energy.gross_j * 1e3:.3f}"[:5] in table
    assert "layer4" in table
    assert ("left out, the terminal is" in words(text)) == (width < 100)
    assert not [line for line in table.splitlines() if line.rstrip().endswith("…")]


def test_validity_comes_first(full, invalid, profile):
    assert printed(print_profile, full).startswith("Valid; 2 rules kept, 1 could not be looked at")
    text = printed(print_profile, invalid)
    assert text.startswith("INVALID: 2 of 5 rules broken, and incomplete; 2 rules kept, 1 could not be looked at")
    assert "energy-window the windows of exit1 lasted 4.1 s, at least 10 s are needed; measure with" in words(text)
    assert "incomplete stopped before everything was measured" in words(text)
    assert text.index("quiet-machine") < text.index("median [ms]")
    assert printed(print_profile, profile).startswith("Not judged")


def test_broken_rules_are_red(invalid):
    console = Console(width=100, file=io.StringIO(), color_system="standard", force_terminal=True)
    print_profile(invalid, console=console)
    (line,) = (line for line in console.file.getvalue().splitlines() if "quiet-machine" in line)
    assert "\x1b[1;31m" in line


def test_every_part_has_its_table(full, profile):
    text = words(printed(print_profile, full))
    for expected in (
        "energy [mJ]",
        "2.300 ±0.058",
        "Where the time goes stage share compute [µs]",
        "block2 18.2 % 720.0 ±8.6",
        "What closing each gate saves",
        "without <b>2</b>",
        "spans zero",
        "At a fixed rate",
        "at 30 Hz",
    ):
        assert expected in text
    bare = printed(print_profile, profile)
    assert "Where the time goes" not in bare
    assert "At a fixed rate" not in bare


@pytest.mark.parametrize("width", [100, 70])
def test_tables_of_parts_fit(full, width):
    """What there is no room for is left out; no figure is cut."""
    assert "…" not in printed(print_profile, full, width=width)


def test_names_are_whole_where_there_is_room(full):
    stages = tuple(
        msgspec.structs.replace(stage, name=f"layers.{place}.mixture.experts.0")
        for place, stage in enumerate(full.stages)
    )
    named = msgspec.structs.replace(full, stages=stages)
    assert "layers.3.mixture.experts.0" in printed(print_profile, named, width=110)
    narrow = printed(print_profile, named, width=60)
    assert "layers.3" in narrow
    compared = compare([named, named])
    assert "layers.3.mixture.experts.0" in printed(print_comparison, compared, width=110)


@pytest.mark.parametrize("count", [2, 3])
def test_comparison(profile, with_energy, count):
    other = msgspec.structs.replace(with_energy, runtime={"name": "litert", "version": "2.1"})
    profiles = [profile, other, msgspec.structs.replace(other, runtime={"name": "tensorrt"})][:count]
    text = printed(print_comparison, compare(profiles, other_hosts=True))
    assert text.count("against msdnet-cifar10 · onnxruntime") == count - 1
    assert "runtime name" in text
    assert text.count("± ") + text.count(" to ") >= 13 * (count - 1)
    assert "…" not in text


def test_what_got_worse_comes_first(made):
    text = printed(print_comparison, compare([made(full=True), made(full=True, seed=1, slower=1.1)]))
    assert text.startswith("worse  median of exit1 got worse by ")
    assert printed(print_comparison, compare([made(), made(seed=1)])).startswith("nothing got worse")
