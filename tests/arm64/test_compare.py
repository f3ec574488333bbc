"""What compares two machines can fail: answers are altered by hand, and each alteration is told or forgiven."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

IMAGES, CLASSES, EXITS = 40, 5, 3
POLICIES = {"max_prob": 0.7, "margin": 0.5, "neg_entropy": -0.6}
NEAR = 3
"""Image whose score at the first exit is put next to a threshold."""


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("arm64_compare", Path(__file__).with_name("compare.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def scores(logits, score):
    probabilities = softmax(logits.astype(np.float64), axis=-1)
    top = np.sort(probabilities, axis=-1)
    return {
        "max_prob": top[..., -1],
        "margin": top[..., -1] - top[..., -2],
        "neg_entropy": (probabilities * log_softmax(logits.astype(np.float64), axis=-1)).sum(axis=-1),
    }[score]


def leave(logits, score, threshold):
    """Exit and score of each image."""
    found = scores(logits, score)
    passes = found >= threshold
    passes[-1] = True
    taken = passes.argmax(axis=0)
    return taken, found[taken, np.arange(found.shape[1])].astype(np.float32)


def answers(logits, machine):
    """A file of ``answers.py``, made by hand."""
    alone = list(range(0, IMAGES, 4))
    found = {"r/logits": logits}
    for name, threshold in POLICIES.items():
        taken, score = leave(logits, name, threshold)
        found |= {f"r/{name}/exit": taken, f"r/{name}/score": score}
        found |= {f"r/{name}/alone/exit": taken[alone], f"r/{name}/alone/score": score[alone]}
        found[f"r/{name}/alone/ran"] = (np.arange(EXITS) <= taken[alone, None]).astype(np.int64)
    about = {
        "machine": machine, "python": "3.11.2", "edgekit": "1", "network": "n", "plan": "p", "images": "i",
        "exits": ["a", "b", "c"], "stages": ["s", "t", "u"], "alone": alone,
        "policies": {name: {"score": name, "thresholds": [value] * 2} for name, value in POLICIES.items()},
        "runtimes": {"r": {"version": "2"}},
    }  # fmt: skip
    return {**found, "about": np.array(json.dumps(about))}


@pytest.fixture
def logits():
    made = np.random.default_rng(0).normal(0, 2, (EXITS, IMAGES, CLASSES)).astype(np.float32)
    rest = (1 - 0.7) / (CLASSES - 1)
    made[0, NEAR] = np.log([0.7 + 2e-5, *[rest - 5e-6] * (CLASSES - 1)])
    return made


def compared(tool, here, there, **options):
    return tool.compare(here, there, **{"margin": 1e-4, "tolerance": 1e-4, "told": [], **options})


def test_equal_answers_pass(tool, logits, capsys):
    assert compared(tool, answers(logits, "x86_64"), answers(logits.copy(), "aarch64")) == []
    printed = capsys.readouterr().out
    assert printed.count("40 of 40 decide the same") == 3
    assert "x86_64" in printed.splitlines()[0]


def test_accuracy_of_both_machines_is_told_where_labels_are(tool, logits, capsys):
    here = answers(logits, "x86_64")
    taken = here["r/max_prob/exit"]
    right = np.array([logits[left, image].argmax() for image, left in enumerate(taken)])
    here["labels"] = np.where(np.arange(IMAGES) < IMAGES // 4, right, (right + 1) % CLASSES)
    assert tool.accuracy(here, "r", "max_prob") == 0.25
    there = {**answers(logits.copy(), "aarch64"), "labels": here["labels"]}
    assert compared(tool, here, there) == []
    assert "accuracy 0.2500 / 0.2500" in capsys.readouterr().out


@pytest.mark.parametrize("score", POLICIES)
def test_scores_are_those_of_scipy(tool, logits, score):
    np.testing.assert_allclose(tool.scores_of(logits[1], score), scores(logits[1], score), rtol=1e-12)


def test_a_flip_beside_its_threshold_is_told_and_forgiven(tool, logits, capsys):
    moved = logits.copy()
    moved[0, NEAR, 0] -= np.float32(2e-4)  # d max_prob = p (1 - p) d logit, so some -4e-5
    assert leave(moved, "max_prob", 0.7)[0][NEAR] > 0 == leave(logits, "max_prob", 0.7)[0][NEAR]
    for here, there in ((logits, moved), (moved, logits)):
        assert compared(tool, answers(here, "x86_64"), answers(there, "aarch64"), tolerance=1e-3) == []
        assert "image 3: " in capsys.readouterr().out
    (wrong,) = compared(tool, answers(logits, "x"), answers(moved, "y"), tolerance=1e-3, margin=1e-5)
    assert wrong == "r: max_prob: 1 flips farther than 1e-05 from their threshold"


def test_a_flip_far_from_its_threshold_on_either_side_fails(tool, logits):
    moved = logits.copy()
    moved[0, NEAR, 0] -= 1
    for here, there in ((logits, moved), (moved, logits)):
        wrong = compared(tool, answers(here, "x86_64"), answers(there, "aarch64"), tolerance=1)
        assert "r: max_prob: 1 flips farther than 0.0001 from their threshold" in wrong
    assert compared(tool, answers(logits, "x"), answers(moved, "y"), told=["r"]) == []


def test_other_logits_fail(tool, logits):
    moved = logits.copy()
    moved[-1] += np.float32(1e-2)  # scores and decisions are the same
    (wrong,) = compared(tool, answers(logits, "x86_64"), answers(moved, "aarch64"))
    assert wrong.startswith("r: logits differ by ")


def test_nan_on_one_machine_fails(tool, logits):
    moved = answers(logits, "aarch64")
    moved["r/logits"] = logits.copy()
    moved["r/logits"][-1, 0] = np.nan
    assert compared(tool, answers(logits, "x86_64"), moved) == ["r: logits differ by inf of the largest"]


def test_another_decision_alone_fails(tool, logits):
    moved = answers(logits, "aarch64")
    moved["r/margin/alone/exit"] = (moved["r/margin/alone/exit"] + 1) % EXITS
    assert "r: margin: 10 images decide otherwise alone on aarch64" in compared(
        tool, answers(logits, "x86_64"), moved, told=["r"]
    )


def test_another_way_to_the_same_exit_fails(tool, logits):
    moved = answers(logits, "aarch64")
    moved["r/margin/alone/ran"][0, 1] += 1
    assert compared(tool, answers(logits, "x86_64"), moved) == ["r: margin: 1 images run other stages to the same exit"]


@pytest.mark.parametrize("key", ["images", "plan", "policies"])
def test_unlike_things_are_not_compared(tool, logits, key):
    moved = answers(logits, "aarch64")
    about = json.loads(str(moved["about"]))
    moved["about"] = np.array(json.dumps({**about, key: "other"}))
    (wrong,) = compared(tool, answers(logits, "x86_64"), moved)
    assert wrong == f"the answers are not of one bundle, edgekit and data: {key} differ"
