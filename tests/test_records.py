from __future__ import annotations

import errno
import json
import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.environment import Environment
from edgekit.errors import MeasurementError
from edgekit.plan import SCORES, Exit, Gate, Plan, Run, Stage
from edgekit.policy import Policy
from edgekit.records import (
    PROFILE_SCHEMA,
    Closure,
    Energy,
    ExitProfile,
    GateShare,
    LatencySummary,
    Profile,
    StreamProfile,
    gate_shares,
    mean_macs,
)
from edgekit.tensors import TensorSpec


def profile(**changes) -> Profile:
    latency = LatencySummary(
        samples=3, min_s=1e-3, median_s=2e-3, mean_s=2e-3, sd_s=1e-4, p90_s=None, p99_s=None, median_low_s=1e-3,
        median_high_s=3e-3, mean_low_s=1e-3, mean_high_s=3e-3, confidence=0.95, outliers=0,
    )  # fmt: skip
    machine = Environment(taken="2026-01-01T00:00:00Z", host="h", system="s", machine="aarch64")
    energy = Energy(reason="no sensor")
    first = ExitProfile(
        name="early", macs=10, accuracy=0.5, share=1.0, share_accuracy=0.5, latency_ns=(1, 2, 3), latency=latency,
        energy=energy,
    )  # fmt: skip
    stream = StreamProfile(accuracy=0.5, exits=(0, 0, 0), latency_ns=(1, 2, 3), latency=latency, energy=energy)
    made = Profile(
        created="2026-01-01T00:00:00Z", network="net", plan="p", artifacts={"a": "b"}, runtime={"name": "fake"},
        policy=Policy.never(2).to_mapping(), data="d", data_sha256="e", samples=3, settings={"seed": 0}, exits=(first,),
        stream=stream, closure=Closure(predicted_s=2e-3, measured_s=3e-3), energy_closure=None, load_s=0.1,
        first_run_s=0.2, peak_rss_bytes=None, before=machine, after=machine,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def test_what_was_saved_is_loaded(tmp_path):
    path = profile().save(tmp_path / "profile.json")
    assert Profile.load(path) == profile()
    assert os.listdir(tmp_path) == ["profile.json"]
    assert Policy.from_mapping(Profile.load(path).policy) == Policy.never(2)


@given(st.lists(st.integers(0, 10**12), max_size=5), st.floats(0, 1e3), st.text(max_size=5))
def test_json_keeps_every_sample(latency_ns, load_s, network):
    first = msgspec.structs.replace(profile().exits[0], latency_ns=tuple(latency_ns))
    made = profile(exits=(first,), load_s=load_s, network=network)
    assert msgspec.json.decode(msgspec.json.encode(made), type=Profile) == made


def test_closure_is_measured_over_predicted():
    assert Closure(predicted_s=2.0, measured_s=3.0).ratio == 1.5


def test_the_file_can_be_read_by_people_and_says_its_schema(tmp_path):
    content = profile().save(tmp_path / "p.json").read_text()
    assert json.loads(content)["schema"] == PROFILE_SCHEMA
    assert content.count("\n") > 20


@pytest.mark.parametrize(("content", "message"), [
    (None, "cannot be read"),
    (b"", "not a profile"),
    (b'{"schema": 1, "created"', "not a profile"),
    (b'{"created": "x"}', "not a profile .*schema"),
    (b'{"schema": 1}', "not a profile .*created"),
    (b'{"schema": 99, "new": 1}', "profile schema 99 is newer than this edgekit knows; upgrade it"),
])  # fmt: skip
def test_files_that_are_no_profiles(tmp_path, content, message):
    path = tmp_path / "p.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MeasurementError, match=f"p.json: {message}"):
        Profile.load(path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_keeps_the_older_profile(tmp_path, monkeypatch, error):
    path = profile(network="older").save(tmp_path / "p.json")

    def broken(source, target):
        raise error

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises((MeasurementError, KeyboardInterrupt)):
        profile(network="newer").save(path)
    assert Profile.load(path).network == "older"
    assert os.listdir(tmp_path) == ["p.json"]


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(MeasurementError, match=r"cannot be written \(No such file or directory\)"):
        profile().save(tmp_path / "none" / "p.json")


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


def test_a_profile_from_before_gates_is_read(tmp_path):
    content = json.loads(msgspec.json.encode(profile()))
    del content["gates"], content["stream"]["macs"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert Profile.load(tmp_path / "old.json") == profile()
