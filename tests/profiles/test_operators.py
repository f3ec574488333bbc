"""Operators of the digits network, by ONNX Runtime's profiler."""

from __future__ import annotations

import tempfile
from collections import defaultdict

import numpy as np
import pytest

from edgekit.data import Dataset
from edgekit.errors import MeasurementError
from edgekit.policy import Policy
from edgekit.profiles.operators import time_operators
from edgekit.progress import silent
from edgekit.runtimes.fake import FakeRuntime
from edgekit.runtimes.operators import operator_times
from edgekit.session import Session

RUNS = 40


@pytest.fixture
def images() -> Dataset:
    return Dataset(inputs=np.random.default_rng(0).standard_normal((20, 1, 8, 8)).astype(np.float32))


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary files go meanwhile."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("score", ["max_prob", "patience"])
def test_every_stage_has_its_operators_and_nothing_is_left_behind(exported_digits, images, temporary, score):
    pytest.importorskip("onnxruntime", reason="running needs the ort extra")
    told = []
    with Session.open(exported_digits, policy=Policy.fixed([0.9, 0.9], score=score)) as session:
        found = time_operators(
            session,
            images,
            runs=RUNS,
            rng=np.random.default_rng(0),
            progress=lambda task, done, total: told.append(done / total),
        )
        assert list(dict.fromkeys(each.stage for each in found)) == [stage.name for stage in session.plan.stages]
        session.run(images.batch(slice(0, 1)))
    assert list(temporary.iterdir()) == []
    assert told == sorted(told)
    assert told[-1] == 1
    assert {each.calls for each in found} == {RUNS}
    spent: defaultdict[str, float] = defaultdict(float)
    for each in found:
        spent[each.kind.removeprefix("Fused")] += each.mean_s
    assert max(spent, key=lambda kind: spent[kind]) == "Conv"
    for stage in {each.stage for each in found}:
        here = [each for each in found if each.stage == stage]
        assert sum(each.share for each in here) == pytest.approx(1)
        assert len({each.name for each in here}) == len(here)
        assert any(each.kind == "Softmax" for each in here) == (score == "max_prob"), "the policy's own score"


def test_a_failed_run_leaves_nothing_behind(exported_digits, temporary):
    pytest.importorskip("onnxruntime", reason="running needs the ort extra")
    wrong = Dataset(inputs=np.zeros((2, 3, 8, 8), np.float32))
    with Session.open(exported_digits) as session, pytest.raises(ValueError, match="expected shape"):
        time_operators(session, wrong, runs=2, rng=np.random.default_rng(0), progress=silent)
    assert list(temporary.iterdir()) == []


def test_a_runtime_that_cannot(session, data):
    assert isinstance(session.runtime, FakeRuntime)
    with pytest.raises(MeasurementError, match="runtime 'fake' cannot time its operators"):
        time_operators(session, data, runs=2, rng=np.random.default_rng(0), progress=silent)


def test_means_and_shares_by_hand():
    calls = {
        ("s0", "a", "Conv"): [9.0, 9.0, 9.0, 2.0, 4.0],
        ("s0", "b", "Relu"): [1.0, 3.0],
        ("s1", "a", "Conv"): [9.0, 9.0, 9.0, 0.0],
        ("s1", "b", "Relu"): [],
    }
    found = [(each.stage, each.name, each.mean_s, each.calls, each.share) for each in operator_times(calls)]
    assert found == [("s0", "a", 3.0, 2, 0.6), ("s0", "b", 2.0, 2, 0.4), ("s1", "a", 0.0, 1, 0.0)]
