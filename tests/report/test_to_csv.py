"""CSV: SI values that read back as they were measured."""

import csv

import msgspec
import pytest

from edgekit.errors import MeasurementError
from edgekit.report import write_csv, write_raw_csv


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_values_read_back(profile, with_energy, tmp_path):
    found = read(write_csv([profile, with_energy], tmp_path / "p.csv"))
    assert [(row["kind"], row["name"]) for row in found[:6]] == [
        *(("exit", f"exit{index}") for index in range(1, 6)),
        ("stream", "stream"),
    ]
    assert len(found) == 12
    for row, item in zip(found, profile.exits, strict=False):
        assert float(row["median_s"]) == item.latency.median_s
        assert float(row["p99_s"]) == item.latency.p99_s
        assert float(row["accuracy"]) == item.accuracy
        assert int(row["macs"]) == item.macs
        assert row["energy_gross_j"] == ""
        assert row["energy_reason"] == item.energy.reason
    assert float(found[6]["energy_gross_j"]) == with_energy.exits[0].energy.gross_j


def test_what_is_missing_is_empty_and_scripted_is_said(one_exit, scripted, tmp_path):
    row = read(write_csv([one_exit], tmp_path / "p.csv"))[0]
    assert row["p90_s"] == row["p99_s"] == row["scripted"] == ""
    assert read(write_csv([scripted], tmp_path / "s.csv"))[0]["scripted"] == scripted.scripted


def test_every_part_has_its_lines(full, tmp_path):
    found = read(write_csv([full], tmp_path / "p.csv"))
    by = {(row["kind"], row["name"]): row for row in found}
    assert len(by) == len(found) == 6 + 3 + 2 + 5
    exit3 = by["exit", "exit3"]
    assert float(exit3["energy_low_j"]) == full.exits[2].energy.low_j
    assert float(exit3["p90_high_s"]) == full.exits[2].latency.p90_high_s
    assert float(exit3["added_low_j"]) == full.exits[2].added_j.low
    assert exit3["valid"] == "True"
    assert float(by["path", "without blocks.1"]["saved_s"]) == full.paths[1].saved_s.value
    assert float(by["paced", "stream at 10 Hz"]["rate_hz"]) == 10
    assert float(by["stage", "block1"]["head_high_s"]) == full.stages[1].head.high
    assert by["stage", "block4"]["head_s"] == by["stage", "block4"]["median_s"] == ""


def test_raw_samples_are_exact_and_in_order(full, tmp_path):
    device = tuple(taken - 1000 for taken in full.stream.latency_ns)
    clocked = msgspec.structs.replace(full, stream=msgspec.structs.replace(full.stream, device_ns=device))
    found = [row for row in read(write_raw_csv([clocked], tmp_path / "raw.csv")) if row["kind"] == "stream"]
    assert [row["sample"] for row in found] == [str(index) for index in range(700)]
    assert [round(float(row["latency_s"]) * 1e9) for row in found] == list(full.stream.latency_ns)
    assert [round(float(row["device_s"]) * 1e9) for row in found] == list(device)
    assert [row["exit"] for row in found] == [f"exit{index + 1}" for index in full.stream.exits]
    assert len(found[0]["latency_s"].split(".")[1]) == 9


def test_names_with_separators(profile, tmp_path):
    odd = 'a,"b"\nc'
    renamed = msgspec.structs.replace(profile, network=odd)
    assert {row["network"] for row in read(write_csv([renamed], tmp_path / "p.csv"))} == {odd}


def test_errors(profile, tmp_path):
    with pytest.raises(MeasurementError, match="no profile to write"):
        write_csv([], tmp_path / "p.csv")
    with pytest.raises(MeasurementError, match="cannot be written"):
        write_csv([profile], tmp_path / "missing" / "p.csv")
    with pytest.raises(MeasurementError, match="no profile to write"):
        write_raw_csv([], tmp_path / "p.csv")
    assert list(tmp_path.iterdir()) == []
