"""The public verbs, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import edgekit
from edgekit.errors import DataError, MissingExtraError
from edgekit.zoo import digits


def test_public_names_resolve_and_verbs_are_no_modules():
    assert all(hasattr(edgekit, name) for name in edgekit.__all__)
    assert set(edgekit.__all__) <= set(dir(edgekit))
    for verb in ("add_exits", "train_exits", "export", "load", "calibrate", "profile"):
        assert callable(getattr(edgekit, verb))
        assert verb in getattr(edgekit, verb).__qualname__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = edgekit.nothing


def test_verbs_survive_the_import_of_every_room(tmp_path):
    code = """
import pkgutil, importlib, edgekit
for found in pkgutil.walk_packages(edgekit.__path__, "edgekit."):
    importlib.import_module(found.name)
assert all(type(getattr(edgekit, verb)).__name__ == "function" for verb in ("export", "load", "calibrate", "profile"))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_import_takes_no_time(tmp_path):
    code = "import time; begin = time.process_time(); import edgekit; print(time.process_time() - begin)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) <= 0.15


def test_calibrate_takes_arrays_and_saves_only_when_asked(digits_bundle):
    data = digits.calibration_set()
    pair = (data.batch(slice(None)), data.labels)
    with edgekit.load(digits_bundle) as session:
        policy = edgekit.calibrate(session, pair, save=False)
        assert session.policy == policy
        assert session.bundle.manifest.policies == {}
        edgekit.calibrate(session, data, name="kept")
    with edgekit.Bundle.open(digits_bundle) as bundle:
        assert bundle.policy("kept").thresholds == policy.thresholds


def test_other_classes_are_refused(exported_digits):
    inputs, labels = np.zeros((2, 1, 8, 8), np.float32), np.arange(2)
    data = edgekit.Dataset(inputs=inputs, labels=labels, classes=("a", "b"), source="letters")
    with (
        edgekit.load(exported_digits) as session,
        pytest.raises(DataError, match="letters: the network knows no class 'a'"),
    ):
        edgekit.calibrate(session, data)


def test_export_without_torch_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[export\]'"):
        edgekit.export(None, (), tmp_path / "net.edgekit")
