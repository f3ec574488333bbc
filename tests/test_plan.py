from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edgekit.errors import BundleError
from edgekit.plan import SCORES, Exit, Plan, Run, Stage
from edgekit.tensors import BATCH, TensorSpec


def parts() -> dict[str, Any]:
    """A plan of two exits, as arguments: a body that both share, then a stage for the second."""
    tensors = {"x": TensorSpec("x", "float32", (BATCH, 8)), "h": TensorSpec("h", "float32", (BATCH, 4))}
    exits = []
    for name in ("early", "late"):
        scores = {score: f"{name}.{score}" for score in SCORES}
        tensors[f"{name}.logits"] = TensorSpec(f"{name}.logits", "float32", (BATCH, 3))
        tensors[f"{name}.t"] = TensorSpec(f"{name}.t", "float32", ())
        tensors |= {score: TensorSpec(score, "float32", (BATCH,)) for score in scores.values()}
        exits.append(Exit(name=name, logits=f"{name}.logits", temperature=f"{name}.t", scores=scores))
    early, late = exits
    stages = (
        Stage(name="a", inputs=("x", "early.t"), outputs=("h", "early.logits", *early.scores.values()), macs=5,
              weight_bytes=1),
        Stage(name="b", inputs=("h", "late.t"), outputs=("late.logits", *late.scores.values()), macs=7, weight_bytes=1),
    )  # fmt: skip
    steps = (Run("a"), early, Run("b"), late)
    return {"inputs": (tensors["x"],), "tensors": tensors, "stages": stages, "steps": steps}


def changed(struct, **changes):
    return msgspec.structs.replace(struct, **changes)


def test_what_a_plan_tells():
    plan = Plan(**parts())
    assert [step.name for step in plan.exits] == ["early", "late"]
    assert plan.classes == 3
    assert plan.exit_macs() == (5, 12)
    assert [stage.name for stage in plan.stages_before(1)] == ["a", "b"]
    assert plan.stage("b").macs == 7


def test_macs_that_could_not_be_counted_stay_unknown():
    given = parts()
    given["stages"] = (given["stages"][0], changed(given["stages"][1], macs=None))
    assert Plan(**given).exit_macs() == (5, None)


def test_json_keeps_the_plan_and_its_fingerprint():
    plan = Plan(**parts())
    back = msgspec.json.decode(msgspec.json.encode(plan), type=Plan)
    assert back == plan
    assert back.fingerprint == plan.fingerprint


def test_the_fingerprint_tells_plans_apart_but_not_the_order_of_tensors():
    plan, given = Plan(**parts()), parts()
    given["tensors"] = dict(reversed(given["tensors"].items()))
    assert Plan(**given).fingerprint == plan.fingerprint
    given["stages"] = (changed(given["stages"][0], macs=6), given["stages"][1])
    assert Plan(**given).fingerprint != plan.fingerprint


def test_a_network_of_fixed_batch_one_is_a_plan():
    given = parts()
    given["tensors"] = {
        name: changed(spec, shape=(1, *spec.shape[1:])) if spec.batched else spec
        for name, spec in given["tensors"].items()
    }
    given["inputs"] = (given["tensors"]["x"],)
    assert Plan(**given).classes == 3


def breaks(**changes):
    return lambda given: {**given, **{key: change(given[key]) for key, change in changes.items()}}


INVALID = {
    "the last step must be an exit": breaks(steps=lambda steps: steps[:-1]),
    "it has no inputs": breaks(inputs=lambda _: ()),
    "two exits are called 'early'": breaks(steps=lambda steps: (*steps[:-1], steps[1])),
    "two stages are called 'a'": breaks(stages=lambda stages: (stages[0], stages[0])),
    "tensor 'h' is listed with the specification of 'x'": breaks(tensors=lambda all_: {**all_, "h": all_["x"]}),
    "tensor 'late.t' has no specification": breaks(
        tensors=lambda all_: {name: spec for name, spec in all_.items() if name != "late.t"}
    ),
    "input 'x' has two specifications": breaks(inputs=lambda _: (TensorSpec("x", "float32", (BATCH, 9)),)),
    "it runs stage 'b', which does not exist": breaks(stages=lambda stages: stages[:1]),
    "stage 'b' needs 'h' before anything has made it": breaks(steps=lambda steps: steps[2:]),
    "output 'z' of stage 'b' has no specification": breaks(
        stages=lambda stages: (stages[0], changed(stages[1], outputs=("z", *stages[1].outputs)))
    ),
    "exit 'late' must have the scores max_prob, margin, neg_entropy": breaks(
        steps=lambda steps: (*steps[:-1], changed(steps[-1], scores={"max_prob": "late.max_prob"}))
    ),
    "exit 'late' needs 'late.logits' before anything has made it": breaks(
        steps=lambda steps: (steps[0], steps[1], steps[3])
    ),
    r"logits of exit 'late' must be \(batch, classes\)": breaks(
        steps=lambda steps: (*steps[:-1], changed(steps[-1], logits="late.margin"))
    ),
    "exits tell different numbers of classes apart": breaks(
        tensors=lambda all_: {**all_, "late.logits": TensorSpec("late.logits", "float32", (BATCH, 4))}
    ),
    "a stage is never run": breaks(
        stages=lambda stages: (*stages, Stage(name="c", inputs=(), outputs=(), macs=0, weight_bytes=0))
    ),
}


@pytest.mark.parametrize("message", INVALID)
def test_a_plan_that_cannot_run_says_why(message):
    with pytest.raises(BundleError, match=f"^plan: {message}"):
        Plan(**INVALID[message](parts()))
