from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import PolicyError
from edgekit.plan import SCORES, Exit, Plan, Run, Stage
from edgekit.policy import Policy, Provenance
from edgekit.scoring import LearnedScorer
from edgekit.tensors import BATCH, TensorSpec

SCORER = LearnedScorer(classes=2, centres=((0.1, 0.2, -3.5, 1 / 3),), scales=((1.0,) * 4,), weights=((0.5,) * 5,))


@pytest.fixture
def plan():
    """One exit."""
    scores = {score: f"s.{score}" for score in SCORES}
    specs = [
        TensorSpec("x", "float32", (BATCH, 2)),
        TensorSpec("l", "float32", (BATCH, 2)),
        TensorSpec("t", "float32", ()),
    ]
    specs += [TensorSpec(name, "float32", (BATCH,)) for name in scores.values()]
    stage = Stage(name="a", inputs=("x", "t"), outputs=("l", *scores.values()), macs=1, weight_bytes=0)
    last = Exit(name="e", logits="l", temperature="t", scores=scores)
    tensors = {spec.name: spec for spec in specs}
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=(stage,), steps=(Run("a"), last))


def test_values_are_rounded_to_the_precision_of_scores():
    policy = Policy.fixed([0.7], temperatures=[1.1, 1.3])
    assert policy.thresholds == (float(np.float32(0.7)),)
    assert policy.temperatures == (float(np.float32(1.1)), float(np.float32(1.3)))
    assert policy.thresholds != (0.7,)


def test_by_hand_and_never():
    assert Policy.fixed([0.9, 0.8]).temperatures == (1.0, 1.0, 1.0)
    assert Policy.fixed([0.9]).provenance is None
    assert Policy.never(3).thresholds == (math.inf, math.inf)
    assert Policy.never(1).thresholds == ()


@given(
    st.lists(st.floats(allow_nan=False, width=32), max_size=4),
    st.sampled_from(SCORES),
    st.sampled_from([">=", ">"]),
    st.none() | st.builds(Provenance, method=st.text(), plan=st.text(), samples=st.integers(0, 9)),
)
def test_json_keeps_a_policy_infinities_included(thresholds, score, comparator, provenance):
    policy = msgspec.structs.replace(
        Policy.fixed(thresholds, score=score, comparator=comparator), provenance=provenance
    )
    assert Policy.from_mapping(msgspec.json.decode(msgspec.json.encode(policy.to_mapping()))) == policy


def test_json_keeps_a_scorer():
    policy = Policy.fixed([math.inf], score="learned", scorer=SCORER)
    assert Policy.from_mapping(msgspec.json.decode(msgspec.json.encode(policy.to_mapping()))) == policy
    mapping = policy.to_mapping()
    mapping["scorer"]["weights"][0][0] = "inf"
    with pytest.raises(PolicyError, match="a learned scorer has the wrong number of weights, or some that are no"):
        Policy.from_mapping(mapping)


def test_a_policy_from_before_scorers_is_read():
    mapping = Policy.fixed([0.5]).to_mapping()
    del mapping["scorer"]
    assert Policy.from_mapping(mapping) == Policy.fixed([0.5])


@pytest.mark.parametrize(("options", "message"), [
    ({"score": "energy"}, "score 'energy' is not one of max_prob, margin, neg_entropy, patience, learned"),
    ({"score": "learned"}, "the score 'learned' needs a scorer"),
    ({"scorer": SCORER}, "a scorer is for the score 'learned', not for 'max_prob'"),
    ({"score": "patience", "scorer": SCORER}, "a scorer is for the score 'learned', not for 'patience'"),
    ({"thresholds": [math.nan]}, "a threshold is NaN; use infinity for an exit that is never taken"),
    ({"temperatures": [1.0]}, "1 thresholds and 1 temperatures; give one threshold per exit but the last"),
    ({"temperatures": [1.0, 0.0]}, "temperatures must be positive"),
    ({"temperatures": [1.0, math.inf]}, "temperatures must be positive"),
    ({"temperatures": [1.0, math.nan]}, "temperatures must be positive"),
    ({"temperatures": [1.0, 1e-60]}, "temperatures must be positive"),
    ({"comparator": "<"}, "comparator must be '>=' or '>', not '<'"),
    ({"name": "../up"}, "use letters, digits"),
    ({"name": ".hidden"}, "use letters, digits"),
    ({"name": ""}, "use letters, digits"),
])  # fmt: skip
def test_policies_that_mean_nothing(options, message):
    with pytest.raises(PolicyError, match=message):
        Policy.fixed(**{"thresholds": [0.5], **options})


@pytest.mark.parametrize("mapping", [
    {}, {"score": "max_prob", "thresholds": ["soon"], "temperatures": [1, 1]}, {"score": 3}, [], "text",
])  # fmt: skip
def test_a_mapping_that_is_no_policy(mapping):
    with pytest.raises(PolicyError, match="not a policy"):
        Policy.from_mapping(mapping)


def test_fits_by_number_of_exits_and_by_network(plan):
    Policy.never(1).require_fits(plan)
    with pytest.raises(PolicyError, match="has thresholds for 2 exits, the network has 1: calibrate on this bundle"):
        Policy.never(2).require_fits(plan)
    own = msgspec.structs.replace(Policy.never(1), provenance=Provenance(method="m", plan=plan.fingerprint))
    own.require_fits(plan)
    foreign = msgspec.structs.replace(own, provenance=Provenance(method="m", plan="f" * 64))
    with pytest.raises(PolicyError, match=r"made for another network \(plan ffffffffffff"):
        foreign.require_fits(plan)
