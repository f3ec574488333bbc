"""The verbs report and compare on synthetic profiles: files, exit codes, one line for errors."""

import csv
import json

import msgspec
import pytest
from typer.testing import CliRunner

from edgekit.cli import app


def typed(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    found = {
        "before": made(seed=1, full=True, joules=2.3e-3),
        "same": made(seed=2, full=True, joules=2.3e-3),
        "slow": made(seed=3, full=True, joules=2.3e-3, slow_stage=1.1),
    }
    host = msgspec.structs.replace(found["slow"].before, host="board-7")
    found["elsewhere"] = msgspec.structs.replace(found["slow"], before=host)
    found["stopped"] = msgspec.structs.replace(found["same"], complete=False)
    return {name: profile.save(folder / f"{name}.json") for name, profile in found.items()}


def test_nothing_worse_is_0_something_worse_is_3_an_error_is_1(files):
    good = typed("compare", files["before"], files["same"])
    assert (good.exit_code, good.stderr) == (0, "")
    assert "nothing got worse" in good.stdout
    bad = typed("compare", files["before"], files["slow"])
    assert bad.exit_code == 3
    assert bad.stdout.startswith("worse  ")
    assert "compute time of stage block2 got worse by 10.0 % ± " in bad.stdout
    none = typed("compare", files["before"], files["before"].with_name("none.json"))
    assert none.exit_code == 1
    assert none.stdout == ""


def test_compare_for_machines(files):
    done = typed("compare", files["before"], files["slow"], "--json")
    assert done.exit_code == 3
    found = json.loads(done.stdout)
    assert any(sentence.startswith("compute time of stage block2 got worse by") for sentence in found["worse"])
    (one,) = (
        each for each in found["pairs"][0]["differences"] if (each["name"], each["quantity"]) == ("block2", "compute")
    )
    assert one["verdict"] == "worse"
    assert one["low"] > 0.05
    assert found["tolerance"] == 0.05


def test_tolerance_and_confidence_are_given_as_shares(files):
    assert typed("compare", files["before"], files["slow"], "--tolerance", "20%").exit_code == 0
    assert json.loads(typed("compare", files["before"], files["same"], "--confidence", "0.9", "--json").stdout)[
        "confidence"
    ] == pytest.approx(0.9)
    assert "--tolerance lots" in typed("compare", files["before"], files["same"], "--tolerance", "lots").stderr


@pytest.mark.parametrize(
    ("name", "option", "match", "code"),
    [
        ("elsewhere", "--other-hosts", "host 'bench-01' and 'board-7'", 3),
        ("stopped", "--invalid", "is incomplete; measure it again", 0),
    ],
)
def test_what_is_not_comparable_needs_a_word(files, name, option, match, code):
    refused = typed("compare", files["before"], files[name])
    assert refused.exit_code == 1
    (line,) = refused.stderr.splitlines()
    assert match in line
    told = typed("compare", files["before"], files[name], option)
    assert told.exit_code == code
    assert ("but the machines differ" in told.stdout) == (name == "elsewhere")


def test_report_writes_what_it_is_asked_for(files, tmp_path):
    pytest.importorskip("plotly", reason="the report extra is not installed")
    pytest.importorskip("perfetto", reason="the trace extra is not installed")
    html, table, raw, trace = (tmp_path / name for name in ("r.html", "r.csv", "raw.csv", "t.pftrace"))
    options = ("-o", html, "--csv", table, "--raw-csv", raw, "--trace", trace)
    done = typed("report", files["before"], *options)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-4:] == [
        f"wrote {table}", f"wrote {raw}", f"wrote {trace}", f"report: {html}",
    ]  # fmt: skip
    assert all(path.stat().st_size for path in (html, table, raw, trace))
    found = json.loads(typed("report", files["before"], *options, "--json").stdout)
    assert found == {"html": str(html), "csv": str(table), "raw_csv": str(raw), "trace": str(trace), "mlflow": []}
    with open(raw, newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 700 * 6 + 200 * 2 + 700 * 3


def test_a_trace_is_of_one_profile(files, tmp_path):
    done = typed("report", files["before"], files["same"], "-o", tmp_path / "r.html", "--trace", tmp_path / "t")
    assert done.exit_code == 1
    assert "a trace is of one profile, and 2 are given" in done.stderr
    assert list(tmp_path.iterdir()) == []
