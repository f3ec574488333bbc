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
from edgekit.measured import Check, Closure, Energy, LatencySummary
from edgekit.policy import Policy
from edgekit.records import PROFILE_SCHEMA, ExitProfile, Profile, StreamProfile


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
        stream=stream, closure=Closure(predicted=2e-3, measured=3e-3), energy_closure=None, load_s=0.1,
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
    assert Closure(predicted=2.0, measured=3.0).ratio == 1.5


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


def test_a_file_of_the_first_schema_is_read(tmp_path):
    content = json.loads(msgspec.json.encode(profile()))
    for name in ("gates", "complete", "checks", "paths", "paced", "stages", "operators", "traces", "meter", "windows"):
        del content[name]
    del content["power"], content["steady_rss_bytes"], content["stream"]["macs"], content["stream"]["samples"]
    content |= {"schema": 1, "closure": {"predicted_s": 2e-3, "measured_s": 3e-3}}
    content["energy_closure"] = {"predicted_s": 0.5, "measured_s": 0.4}
    for part in (*content["exits"], content["stream"]):
        part["energy"] = {"gross_j": 0.1, "quantity": "counter", "meter": "rapl"}
    (tmp_path / "old.json").write_text(json.dumps(content))
    found = Profile.load(tmp_path / "old.json")
    assert found.closure == Closure(predicted=2e-3, measured=3e-3)
    assert found.energy_closure == Closure(quantity="energy", predicted=0.5, measured=0.4)
    assert found.exits[0].energy == Energy(gross_j=0.1, method="counter", meter="rapl")
    assert found.complete
    assert found.valid
    assert Profile.load(found.save(tmp_path / "new.json")) == found


def test_a_broken_rule_makes_a_profile_invalid():
    checks = (
        Check(rule="a", passed=True, says="well"),
        Check(rule="b", passed=None, says="not looked at"),
        Check(rule="c", passed=False, says="badly", advice="do it again"),
    )
    assert profile(checks=checks[:2]).valid
    assert not profile(checks=checks).valid
    assert profile(checks=checks).broken == checks[2:]
