"""MLflow, on a store of files: what was logged is read back from it."""

import re
import sys

import pytest

from edgekit.errors import MeasurementError, MissingExtraError
from edgekit.report import log_to_mlflow
from edgekit.report.to_mlflow import _metrics, _parameters


def test_figures_by_name(full, profile):
    found = dict(_metrics(full))
    assert found["exit2.latency_median_s"] == full.exits[1].latency.median_s
    assert found["exit2.latency_p90_s"] == full.exits[1].latency.p90_s
    assert found["stream.energy_gross_j"] == full.stream.energy.gross_j
    assert found["exit1.share"] == full.exits[0].share
    assert found["stream.accuracy"] == 0.811
    assert not any("energy" in name for name in dict(_metrics(profile)))


def test_parameters(full, damaged_names):
    found = dict(_parameters(full))
    assert found["network"] == "msdnet-cifar10"
    assert found["device"] == "Intel(R) Core(TM) i5-1240P"
    assert found["runtime.name"] == "onnxruntime"
    assert found["policy.name"] == "default"
    assert "scripted" not in found
    names = [name for name, _ in _metrics(damaged_names)]
    assert all(re.fullmatch(r"[\w\-. /]+", name) for name in names)
    assert len(set(names)) == len(names)


def test_without_mlflow(full, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[mlflow\]'"):
        log_to_mlflow(full)


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    found = pytest.importorskip("mlflow", reason="the mlflow extra is not installed")
    # MLflow would rather have a database than a folder of files; the folder needs nothing else to be installed.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    found.set_tracking_uri((tmp_path / "runs").as_uri())
    return found


def test_a_run_is_made_and_ended(mlflow, full, tmp_path):
    file = full.save(tmp_path / "profile.json")
    run = mlflow.get_run(log_to_mlflow(full, artifacts=[file]))
    assert run.info.status == "FINISHED"
    assert mlflow.active_run() is None
    assert run.data.metrics["stream.latency_mean_s"] == full.stream.latency.mean_s
    assert run.data.params["runtime.threads"] == "1"
    assert run.data.tags["edgekit.valid"] == "True"
    assert [item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id)] == ["profile.json"]


def test_the_active_run_is_used_and_stays_open(mlflow, full):
    with mlflow.start_run() as active:
        assert log_to_mlflow(full) == active.info.run_id
        assert mlflow.active_run().info.run_id == active.info.run_id


def test_missing_files_are_told_before_anything_is_logged(mlflow, full, tmp_path):
    with pytest.raises(MeasurementError, match=r"none\.json: no such file to log"):
        log_to_mlflow(full, artifacts=[tmp_path / "none.json"])
    assert not (tmp_path / "runs").exists()


def test_a_store_that_refuses_says_so_in_its_own_words(mlflow, full, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    mlflow.set_tracking_uri("nonsense://x")
    with pytest.raises(MeasurementError, match=r"MLflow at nonsense://x refuses the profile: .*; MLFLOW_TRACKING_URI"):
        log_to_mlflow(full)
