from __future__ import annotations

import msgspec

from edgekit.plan import SCORES, Exit, Gate, Plan, Run, Stage
from edgekit.shares import GateShare, gate_shares, mean_macs
from edgekit.tensors import TensorSpec


def gated() -> Plan:
    """A gate with one in it, an exit, one that runs when closed, one whose stage is run before as well, an exit."""
    tensors = {name: TensorSpec(name, "float32", ("batch", 1)) for name in "xabcdefghij"}
    made = [("ask", "x", "a"), ("outer", "a", "b"), ("inner", "b", "c"), ("closed", "e", "f"), ("again", "g", "h")]
    stages = [
        Stage(name=name, inputs=(read,), outputs=(output,), macs=100, weight_bytes=0, exit=False)
        for name, read, output in made
    ]
    inner = Gate(name="inner", value="b", steps=(Run("inner"),), outputs={"d": ("c", "b")})
    outer = Gate(name="outer", value="a", steps=(Run("outer"), inner), outputs={"e": ("d", "a")})
    second = Gate(name="second", value="e", steps=(), otherwise=(Run("closed"),), outputs={"g": ("e", "f")})
    twice = Gate(name="twice", value="g", steps=(Run("again", {"g": "h", "h": "i"}),), outputs={"j": ("i", "h")})
    exits = []
    for number, read in enumerate("ej"):
        scores = {score: f"{score}{number}" for score in SCORES}
        names = (f"logits{number}", *scores.values())
        tensors |= {names[0]: TensorSpec(names[0], "float32", ("batch", 2))}
        tensors |= {name: TensorSpec(name, "float32", ("batch",)) for name in scores.values()}
        tensors |= {f"t{number}": TensorSpec(f"t{number}", "float32", ())}
        stages.append(Stage(name=f"head{number}", inputs=(read, f"t{number}"), outputs=names, macs=10, weight_bytes=0))
        leave = Exit(name=f"exit{number}", logits=names[0], temperature=f"t{number}", scores=scores)
        exits.append((Run(f"head{number}"), leave))
    steps = (Run("ask"), outer, *exits[0], second, Run("again"), twice, *exits[1])
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=tuple(stages), steps=steps)


def test_shares_of_gates_are_told_by_the_stages_that_ran():
    # Ten rows; seven find the outer gate open, two of them the inner; four leave; of six, five take the closed way.
    executed = {"ask": 10, "outer": 7, "inner": 2, "head0": 10, "closed": 5, "again": 9, "head1": 6}
    shares = gate_shares(gated(), [0] * 4 + [1] * 6, executed)
    assert shares == (
        GateShare(name="outer", reached=10, open=7, share=0.7),
        GateShare(name="inner", reached=7, open=2, share=2 / 7),
        GateShare(name="second", reached=6, open=1, share=1 / 6),
        GateShare(name="twice", reached=6, open=None, share=None),
    )
    assert mean_macs(gated(), executed, samples=10) == (10 + 7 + 2 + 5 + 9) * 10 + 16


def test_a_gate_that_nobody_came_to_has_no_share():
    executed = dict.fromkeys(("ask", "outer", "inner", "head0", "closed", "again", "head1"), 0)
    executed |= {"ask": 3, "head0": 3}
    shares = gate_shares(gated(), [0, 0, 0], executed)
    assert [(each.reached, each.open, each.share) for each in shares[:3]] == [(3, 0, 0.0), (0, 0, None), (0, 0, None)]


def test_macs_that_were_not_counted_are_not_guessed():
    plan = gated()
    stages = tuple(
        msgspec.structs.replace(stage, macs=None) if stage.name == "inner" else stage for stage in plan.stages
    )
    plan = msgspec.structs.replace(plan, stages=stages)
    executed = {stage.name: 1 for stage in stages}
    assert mean_macs(plan, executed, samples=1) is None
    assert mean_macs(plan, executed | {"inner": 0}, samples=1) == 420
