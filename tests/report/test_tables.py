"""Rows, columns and facts of a profile."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.report import facts, tables


def texts(profile):
    columns = tables.columns([profile])
    return {row.name: {column.title: column.text(row) for column in columns} for row in tables.rows(profile)}


def test_rows_are_the_exits_then_the_stream(profile):
    every = tables.rows(profile)
    assert [row.name for row in every] == ["exit1", "exit2", "exit3", "exit4", "exit5", "stream"]
    assert [row.stream for row in every] == [False] * 5 + [True]
    expected = sum(profile.exits[index].macs for index in profile.stream.exits) / len(profile.stream.exits)
    assert every[-1].macs == pytest.approx(expected)


def test_the_stream_has_no_macs_when_one_of_its_exits_has_none(profile):
    exits = (msgspec.structs.replace(profile.exits[0], macs=None), *profile.exits[1:])
    assert tables.rows(msgspec.structs.replace(profile, exits=exits))[-1].macs is None


def test_gates_have_shares_and_the_stream_the_macs_of_what_ran(profile, with_gates):
    assert tables.gate_lines(profile) == ()
    assert tables.gate_lines(with_gates) == (("blocks.1", "52.0 %", "700"), ("<b>2</b>", "–", "–"))
    assert texts(with_gates)["stream"]["MACs"] == "1.23 M"
    (macs,) = (column for column in tables.columns([with_gates]) if column.title == "MACs")
    assert "with every gate open" in macs.help


def test_units_suit_the_slowest_row(profile, one_exit):
    assert texts(profile)["exit1"]["median [ms]"] == f"{profile.exits[0].latency.median_s * 1e3:.3f}"
    assert texts(one_exit)["exit1"]["median [µs]"] == f"{one_exit.exits[0].latency.median_s * 1e6:.1f}"


def test_what_was_not_measured_has_no_figure_and_a_reason(one_exit, unlabelled, profile):
    shown = texts(one_exit)["exit1"]
    assert shown["p90"] == shown["p99"] == "–"
    assert tables.notes(one_exit) == (
        "p90 –: needs 64 samples; the shortest row has 50",
        "p99 –: needs 662 samples; the shortest row has 50",
    )
    assert texts(unlabelled)["stream"]["accuracy"] == "–"
    assert "accuracy unavailable: the data has no labels" in tables.notes(unlabelled)
    assert not any("energy" in title for title in texts(profile)["exit1"])
    assert tables.energy_reasons(profile) == (f"energy unavailable: {profile.stream.energy.reason}",)


def test_energy_of_some_rows(with_energy, profile):
    assert texts(with_energy)["exit2"]["energy [mJ]"] == "4.600 ±0.12"
    assert tables.energy_reasons(with_energy) == ()
    exits = (*with_energy.exits[:4], msgspec.structs.replace(with_energy.exits[4], energy=profile.exits[4].energy))
    partly = msgspec.structs.replace(with_energy, exits=exits)
    assert texts(partly)["exit5"]["energy [mJ]"] == "unavailable"
    assert tables.energy_reasons(partly)[0].startswith("energy unavailable for exit5: no power sensor")


def test_what_an_exit_adds_and_whether_that_is_known(full):
    shown = texts(full)
    assert shown["exit1"]["added [ms]"] == shown["exit1"]["added [ms] CI"] == "–"
    assert shown["exit2"]["added [mJ] CI"] == "−0.460 to 5.060, spans zero"
    assert shown["exit3"]["added [mJ]"] == "2.300"
    assert shown["exit3"]["added [mJ] CI"] == "2.231–2.369"
    median = full.exits[2].latency.median_s - full.exits[1].latency.median_s
    assert shown["exit3"]["added [ms]"] == f"{1e3 * median:.3f}"


def test_columns_sort_by_their_figures(full, profile):
    every = {row.name: row for row in tables.rows(full)}
    columns = {column.title: column for column in tables.columns([full])}
    assert columns["p90"].value(every["exit4"]) == full.exits[3].latency.p90_s
    assert columns["added [mJ]"].value(every["exit1"]) is None
    assert columns["energy [mJ]"].value(every["stream"]) == full.stream.energy.gross_j
    assert not any("added" in title or "device" in title for title in texts(profile)["exit1"])


def test_the_devices_own_clock(profile):
    first = msgspec.structs.replace(profile.exits[0], device=profile.exits[1].latency)
    shown = texts(msgspec.structs.replace(profile, exits=(first, *profile.exits[1:])))
    assert shown["exit1"]["on the device"] == f"{1e3 * profile.exits[1].latency.median_s:.3f}"
    assert shown["stream"]["on the device"] == "–"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["exit1", "exit2"], ["exit1", "exit2"]),
        (["net.layer1.exit_head", "net.layer10.exit_head"], ["…layer1…", "…layer10…"]),
        (["one_very_long_name_of_an_exit"], ["one_ver…an_exit"]),
        (["a" * 30 + "b" + "a" * 30, "a" * 30 + "c" + "a" * 30], ["#1", "#2"]),
        ([], []),
    ],
)
def test_short_names(names, short):
    assert tables.short_names(names) == tuple(short)


@given(st.lists(st.text("ab._1", min_size=1, max_size=40), min_size=1, max_size=6, unique=True))
def test_short_names_are_short_and_told_apart(names):
    short = tables.short_names(names)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= 16
    assert all(short)


def test_labels_tell_profiles_apart(profile):
    other_runtime = msgspec.structs.replace(profile, runtime={"name": "litert"})
    assert tables.labels([profile]) == ("msdnet-cifar10",)
    assert tables.labels([profile, other_runtime]) == ("msdnet-cifar10 · onnxruntime", "msdnet-cifar10 · litert")
    assert tables.labels([profile, profile]) == ("msdnet-cifar10 #1", "msdnet-cifar10 #2")


def test_cards(profile, with_energy, unlabelled, one_exit):
    accuracy, speed_up, early, energy = facts.cards(with_energy)
    assert (accuracy.value, accuracy.detail) == ("81.1 %", "−0.6 points against 81.7 % at the last exit")
    ratio = with_energy.exits[-1].latency.mean_s / with_energy.stream.latency.mean_s
    assert speed_up.value == f"{ratio:.2f}×"
    leaving = sum(index < 4 for index in with_energy.stream.exits) / 700
    assert early.value == f"{100 * leaving:.1f} %"
    assert (energy.value, energy.detail) == ("4.830 mJ", "−58 % against 11.50 mJ at the last exit")
    assert facts.cards(profile)[3].value == "unavailable"
    assert facts.cards(profile)[3].detail == profile.stream.energy.reason
    assert facts.cards(unlabelled)[0].detail == "the data has no labels"
    assert facts.cards(one_exit)[2].detail == "the network has one exit: nothing can leave early"


def test_closure(full):
    assert facts.closure_text(full.energy_closure) == (
        "measured stream 4.830 mJ / Σ share × energy of each exit 4.600 mJ = 1.050"
    )
    assert facts.closure_text(full.closure).startswith("measured stream 1.")
    assert "× latency of each exit" in facts.closure_text(full.closure)


def test_meter_facts(full, profile):
    found = {fact.name: fact.value for fact in facts.run_facts(full)}
    assert found["meter"] == "rapl: energy of processor packages (scope: socket, counter)"
    assert found["meter resolution"] == "6.1e-05 J, new every 1.000 ms"
    assert found["steady resident memory"] == "120.0 MiB"
    assert "meter" not in {fact.name for fact in facts.run_facts(profile)}


def test_a_policy_without_guarantee_says_so(profile):
    assert facts.guarantee_text(profile.policy) == "none: empirical, the thresholds fit the calibration set only"
    assert facts.guarantee_text({"name": "by-hand"}) == "none: thresholds set by hand"
    assert facts.guarantee_text({"provenance": {"guarantee": "risk ≤ 1 %"}}) == "risk ≤ 1 %"


def test_an_exit_never_taken_reads_the_same_before_and_after_json(profile):
    def thresholds(values):
        changed = msgspec.structs.replace(profile, policy=profile.policy | {"thresholds": values})
        return next(fact.value for fact in facts.policy_facts(changed) if fact.name == "thresholds")

    assert thresholds([0.5, float("inf")]) == thresholds([0.5, None]) == "0.5, never"


def test_environment_says_what_changed_and_what_could_not_be_read(profile):
    found = {fact.name: fact for fact in facts.environment_facts(profile)}
    assert found["temperature"].changed
    assert found["temperature"].after == "63.5 °C (x86_pkg_temp, the hottest of 2)"
    assert not found["processor"].changed
    assert found["container"].value == "unavailable: nothing says that this is one"
    assert found["affinity"].value == "0–3"
    assert found["governor"].value == "powersave ×4"
    assert found["frequency"].value == "1.4 GHz to 3.2 GHz"


def test_run_facts_survive_a_bare_profile(profile):
    bare = msgspec.structs.replace(
        profile, runtime={}, policy={}, settings={}, load_s=None, first_run_s=None, peak_rss_bytes=None
    )
    found = {fact.name: fact.value for fact in facts.run_facts(bare)}
    assert found["peak resident memory"] == found["first inference"] == "–"
    assert {fact.name: fact.value for fact in facts.policy_facts(bare)}["thresholds"] == "–"
