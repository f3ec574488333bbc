"""CSV: SI values that read back as they were measured."""

import csv

import msgspec
import pytest

from edgekit.errors import MeasurementError
from edgekit.report import write_csv


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


def test_names_with_separators(profile, tmp_path):
    odd = 'a,"b"\nc'
    renamed = msgspec.structs.replace(profile, network=odd)
    assert {row["network"] for row in read(write_csv([renamed], tmp_path / "p.csv"))} == {odd}


def test_errors(profile, tmp_path):
    with pytest.raises(MeasurementError, match="no profile to write"):
        write_csv([], tmp_path / "p.csv")
    with pytest.raises(MeasurementError, match="cannot be written"):
        write_csv([profile], tmp_path / "missing" / "p.csv")
    assert list(tmp_path.iterdir()) == []
