from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.calibration import calibrate_empirically as calibrate
from edgekit.calibration import collect
from edgekit.data import Dataset
from edgekit.environment import Environment
from edgekit.errors import CalibrationError
from edgekit.policy import Policy
from edgekit.records import Closure, Energy, ExitProfile, LatencySummary, Profile, StreamProfile


@pytest.fixture
def network(scripted_session, indexed_data, noisy_network):
    """A session of three exits on 300 samples, its data, logits and labels."""
    logits, labels = noisy_network()
    return scripted_session(logits), indexed_data(labels, len(labels)), logits, labels


def profile_of(session, means, **changes):
    """A profile with these mean latencies, in seconds."""

    def summary(mean):
        return LatencySummary(
            samples=3, min_s=mean, median_s=9 * mean, mean_s=mean, sd_s=0.0, p90_s=None, p99_s=None, median_low_s=mean,
            median_high_s=mean, mean_low_s=mean, mean_high_s=mean, confidence=0.95, outliers=0,
        )  # fmt: skip

    machine = Environment(taken="2026-01-01T00:00:00Z", host="h", system="s", machine="m")
    exits = tuple(
        ExitProfile(name=step.name, macs=None, accuracy=None, share=None, share_accuracy=None, latency_ns=(1,),
                    latency=summary(mean), energy=Energy(reason="not measured"))
        for step, mean in zip(session.plan.exits, means, strict=False)
    )  # fmt: skip
    stream = StreamProfile(accuracy=None, exits=(0,), latency_ns=(1,), latency=summary(1.0), energy=Energy(reason="no"))
    made = Profile(
        created="2026-01-02T00:00:00Z", network="n", plan=session.plan.fingerprint, artifacts={},
        runtime=session.runtime.describe(), policy={}, data="d", data_sha256="", samples=1, settings={}, exits=exits,
        stream=stream, closure=Closure(predicted=1.0, measured=1.0), energy_closure=None, load_s=None,
        first_run_s=None, peak_rss_bytes=None, before=machine, after=machine,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def accuracy_and_exits(session, data):
    result = session.run(data.inputs)
    return (result.logits.argmax(axis=1) == data.labels).mean(), result.exit


def test_collect_gives_every_exits_logits_in_order(network):
    session, data, logits, labels = network
    told = []
    found = collect(session, data, batch=77, progress=lambda *step: told.append(step))
    np.testing.assert_array_equal(found.logits, logits)
    np.testing.assert_array_equal(found.labels, labels)
    assert told[-1] == ("run every exit", 300, 300)


@pytest.mark.parametrize("score", ["max_prob", "margin", "neg_entropy"])
@pytest.mark.parametrize("temperature", [True, False])
def test_the_policy_saves_cost_within_the_drop_and_is_what_the_session_runs(network, score, temperature):
    session, data, logits, labels = network
    policy = calibrate(session, data, max_drop=0.02, score=score, temperature=temperature)
    assert session.policy == policy
    accuracy, exits = accuracy_and_exits(session, data)
    last = (logits[-1].argmax(axis=1) == labels).mean()
    assert last - accuracy <= 0.02 + 1e-12
    results = policy.provenance.results
    assert results["accuracy"] == pytest.approx(accuracy)
    assert results["accuracy_last"] == pytest.approx(last)
    assert results["drop"] == pytest.approx(last - accuracy)
    assert results["within_max_drop"] is True
    assert results["exit_shares"] == pytest.approx((np.bincount(exits, minlength=3) / 300).tolist())
    assert results["expected_cost"] == pytest.approx(10 * (exits + 1).mean())
    assert results["expected_cost"] < 0.9 * results["cost_of_last_exit"]
    assert (results["cost_of_last_exit"], results["cost_unit"]) == (30.0, "MACs")
    assert results["as_predicted"] == 1.0
    assert (policy.temperatures == (1.0,) * 3) is not temperature


def test_temperatures_lower_the_loss_of_every_exit(network):
    session, data, _, _ = network
    results = calibrate(session, data).provenance.results
    assert all(after < before for after, before in zip(results["nll"], results["nll_before"], strict=True))


def test_provenance_says_where_the_policy_came_from(network):
    session, data, _, _ = network
    provenance = calibrate(session, data, max_drop=0.05, name="mild").provenance
    assert provenance.method.startswith("empirical")
    assert provenance.guarantee is None
    assert provenance.plan == session.plan.fingerprint
    assert provenance.runtime == "fake (scripted: its results are not real)"
    assert (provenance.data, provenance.data_sha256, provenance.samples) == ("scripted", data.sha256, 300)
    assert provenance.settings["max_drop"] == 0.05
    assert provenance.settings["minimize"] == "macs"
    assert set(provenance.versions) == {"edgekit", "numpy"}
    assert provenance.created.endswith("+00:00")


def test_the_policy_survives_json_even_with_infinite_thresholds(scripted_session, indexed_data, noisy_network):
    logits, labels = noisy_network()
    session = scripted_session(logits)
    policy = calibrate(session, indexed_data(labels, 300), profile=profile_of(session, (1.0, 5.0, 4.0)))
    back = Policy.from_mapping(msgspec.json.decode(msgspec.json.encode(policy.to_mapping())))
    assert back.thresholds[1] == math.inf
    assert back == policy
    assert back.provenance.results == policy.provenance.results


def test_latency_decides_when_a_profile_is_given(network):
    """The middle exit, measured slower than the last, is never taken, although its MACs are fewer."""
    session, data, _, _ = network
    policy = calibrate(session, data, max_drop=0.05, profile=profile_of(session, (1e-3, 5e-3, 4e-3)))
    assert policy.thresholds[1] == math.inf
    assert policy.thresholds[0] < math.inf
    results = policy.provenance.results
    assert (results["cost_unit"], results["cost_of_last_exit"]) == ("s", 4e-3)
    assert results["exit_costs"] == [1e-3, 5e-3, 4e-3]
    assert policy.provenance.settings["profile"] == "2026-01-02T00:00:00Z"
    by_macs = calibrate(session, data, max_drop=0.05, minimize="macs", profile=profile_of(session, (1e-3, 5e-3, 4e-3)))
    assert by_macs.thresholds[1] < math.inf


def test_one_exit_needs_no_thresholds(scripted_session, indexed_data, noisy_network):
    logits, labels = noisy_network()
    policy = calibrate(scripted_session(logits[-1:]), indexed_data(labels, 300))
    assert policy.thresholds == ()
    assert len(policy.temperatures) == 1
    assert policy.provenance.results["exit_shares"] == [1.0]


@given(st.integers(0, 50), st.sampled_from([0.0, 0.01, 0.07, 0.29, 1.0]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_drop_on_the_calibration_set_holds_always(scripted_session, indexed_data, noisy_network, seed, max_drop):
    logits, labels = noisy_network(3, 100, seed=seed)
    session = scripted_session(logits)
    policy = calibrate(session, indexed_data(labels, 100), max_drop=max_drop)
    accuracy, _ = accuracy_and_exits(session, indexed_data(labels, 100))
    lost = round(100 * ((logits[-1].argmax(axis=1) == labels).mean() - accuracy))
    assert lost <= round(100 * max_drop)
    assert policy.provenance.results["expected_cost"] <= policy.provenance.results["cost_of_last_exit"]


def test_the_drop_is_counted_in_whole_answers(scripted_session, indexed_data):
    """0.29 of 100 samples is 29 lost answers, though 0.29 * 100 is 28.999999999999996 in floating point."""
    samples = np.arange(100)
    labels = samples % 2
    first = np.where((samples < 29)[:, None], 1 - np.eye(2)[labels], np.eye(2)[labels])  # wrong on the first 29
    logits = np.stack([first, np.eye(2)[labels]]).astype(np.float32)
    data = indexed_data(labels, 100)
    assert calibrate(scripted_session(logits), data, max_drop=0.29).provenance.results["exit_shares"] == [1.0, 0.0]
    assert calibrate(scripted_session(logits), data, max_drop=0.28).provenance.results["exit_shares"] == [0.0, 1.0]


def test_an_earlier_policy_comes_back_when_the_run_fails(network, monkeypatch):
    session, data, _, _ = network
    before = session.policy

    def interrupted(inputs):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(session, data)
    assert session.policy is before


def test_a_runtime_that_decides_otherwise_is_reported(network, monkeypatch):
    """Scores that shift between collecting and running show in the results, not in silence."""
    session, data, _, _ = network
    run = session.run
    monkeypatch.setattr(session, "run", lambda inputs: run(inputs, exit=0))
    results = calibrate(session, data, max_drop=0.0).provenance.results
    assert results["as_predicted"] < 1.0
    assert results["within_max_drop"] is False
    assert results["exit_shares"] == [1.0, 0.0, 0.0]


BAD_LABELS = {
    "has no labels; calibration needs one class index per sample": None,
    "label 4 of sample 7 is outside 0 to 3, the classes of the network": np.where(np.arange(300) == 7, 4, 0),
    "label -1 of sample 0 is outside 0 to 3": np.arange(300) - 1,
    "every sample is of class 2; give samples of all classes": np.full(300, 2),
}


@pytest.mark.parametrize("message", BAD_LABELS)
def test_labels_that_cannot_be_used(network, message):
    session, data, _, _ = network
    with pytest.raises(CalibrationError, match=f"^scripted: {message}"):
        calibrate(session, replace(data, labels=BAD_LABELS[message]))


def test_one_sample_is_too_few(network, indexed_data):
    session, _, _, labels = network
    with pytest.raises(CalibrationError, match="one sample is too few"):
        calibrate(session, indexed_data(labels[:1], 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_sample_that_is_no_number_is_named(network, bad):
    session, data, _, _ = network
    inputs = data.inputs.copy()
    inputs[130] = bad
    with pytest.raises(CalibrationError, match=r"^scripted: sample 130 is NaN or infinite; remove or repair it$"):
        calibrate(session, replace(data, inputs=inputs))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_logits_that_are_no_numbers_are_named(scripted_session, indexed_data, noisy_network, bad):
    logits, labels = noisy_network()
    logits[1, 222, 3] = bad
    with pytest.raises(CalibrationError, match="exit 'exit1' of sample 222 gave NaN or infinite logits"):
        calibrate(scripted_session(logits), indexed_data(labels, 300))


@pytest.mark.parametrize(("options", "message"), [
    ({"max_drop": -0.01}, "max_drop must be between 0 and 1, not -0.01"),
    ({"max_drop": 1.5}, "max_drop must be between 0 and 1, not 1.5"),
    ({"max_drop": math.nan}, "max_drop must be between 0 and 1, not nan"),
    ({"score": "energy"}, "score 'energy' is not one of max_prob, margin, neg_entropy"),
    ({"minimize": "joules"}, "minimize must be 'latency', 'energy' or 'macs', not 'joules'"),
    ({"minimize": "latency"}, r"minimize='latency' needs measurements: .*profile=\.\.\."),
])  # fmt: skip
def test_options_that_cannot_be_met(network, options, message):
    session, data, _, _ = network
    before = session.policy
    with pytest.raises(CalibrationError, match=message):
        calibrate(session, data, **options)
    assert session.policy is before


@pytest.mark.parametrize(("changes", "message"), [
    ({"plan": "0" * 64}, "the profile is of another network"),
    ({"runtime": {"name": "onnxruntime"}}, "measured on runtime 'onnxruntime', the session runs on 'fake'"),
    ({"exits": ()}, "no positive mean latency for every exit"),
])  # fmt: skip
def test_a_profile_of_something_else_is_refused(network, changes, message):
    session, data, _, _ = network
    with pytest.raises(CalibrationError, match=message):
        calibrate(session, data, profile=profile_of(session, (1.0, 2.0, 3.0), **changes))


def test_a_profile_without_times_is_refused(network):
    session, data, _, _ = network
    with pytest.raises(CalibrationError, match="no positive mean latency for every exit: profile again"):
        calibrate(session, data, profile=profile_of(session, (1.0, 0.0, 3.0)))


def test_unknown_macs_ask_for_a_profile(scripted_session, indexed_data, noisy_network):
    logits, labels = noisy_network()
    session = scripted_session(logits, macs=(10, None, 10))
    with pytest.raises(CalibrationError, match=r"MACs of some stages are not known; give a measured profile"):
        calibrate(session, indexed_data(labels, 300))


def test_integer_inputs_are_not_searched_for_nan(scripted_session, noisy_network):
    """The check passes them by; the network then says what it takes."""
    logits, labels = noisy_network()
    data = Dataset(inputs=np.arange(300)[:, None], labels=labels)
    with pytest.raises(Exception, match="expected float32, got int64"):
        collect(scripted_session(logits), data)
