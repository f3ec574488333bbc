from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from edgekit.calibration import state_file
from edgekit.calibration.audit import WAITING, Audit
from edgekit.calibration.audit_state import random_share
from edgekit.calibration.state_file import StateFile
from edgekit.errors import CalibrationError, InputError
from edgekit.plan import Plan
from edgekit.policy import Policy, Provenance
from edgekit.runtimes.fake import FakeRuntime
from edgekit.session import Session
from edgekit.tensors import TensorSpec

SAMPLES = 400


def logits_of(answers, confidence):
    """``(samples, 3) float32``: class ``answers``, of max probability about ``confidence``."""
    rest = (1 - confidence) / 2
    return np.where(np.eye(3)[answers] > 0, np.log(confidence)[:, None], np.log(rest)[:, None]).astype(np.float32)


@pytest.fixture
def network(scripted_session):
    """Makes a session whose first exit takes 3 of 4 samples and disagrees with the last on some of these; labels."""

    def make(disagree=0.0, seed=0):
        rng = np.random.default_rng(seed)
        last = rng.integers(0, 3, SAMPLES)
        first = np.where(rng.random(SAMPLES) < disagree, (last + 1) % 3, last)
        confident = np.where(np.arange(SAMPLES) % 4 < 3, 0.95, 0.5)
        session = scripted_session(np.stack([logits_of(first, confident), logits_of(last, np.full(SAMPLES, 0.99))]))
        session.use(Policy.fixed([0.9]))
        return session, first, last

    return make


def stream(rounds=1, batch=1):
    for start in range(0, rounds * SAMPLES, batch):
        yield (np.arange(start, start + batch) % SAMPLES).astype(np.float32)[:, None]


def state_of(audit):
    return msgspec.json.encode(audit._state)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_caller_gets_the_policys_answers(network, batch, fraction):
    session, _, _ = network(disagree=0.5)
    with Audit(session, epsilon=0.1, fraction=fraction) as audit:
        for inputs in stream(batch=batch):
            expected, result = session.run(inputs), audit.run(inputs)
            np.testing.assert_array_equal(result.logits, expected.logits)
            np.testing.assert_array_equal(result.exit, expected.exit)
            assert result.executed == expected.executed


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_the_same_samples_are_audited_however_they_come(network, batch):
    session, first, last = network(disagree=0.2)
    with Audit(session, epsilon=0.1, fraction=0.3, seed=3) as audit:
        for inputs in stream(rounds=7, batch=batch):
            audit.run(inputs)
        status = audit.status()
    early = np.arange(SAMPLES) % 4 < 3
    chosen, place, draw = [], -1, 0
    while place < 7 * SAMPLES:
        place += 1 + int(math.log(random_share(3, draw)) / math.log(0.7))
        draw += 1
        chosen.append(place)
    chosen = np.array(chosen[:-1]) % SAMPLES
    assert status.audits == len(chosen)
    assert status.mean == pytest.approx(((first != last) & early)[chosen].mean())
    assert status.audits / status.samples == pytest.approx(0.3, abs=0.03)
    assert status.low < status.mean < status.high


def test_choice_is_a_known_generator_and_fair():
    shares = np.array([random_share(1234567, counter) for counter in range(20_000)])
    # The published first outputs of SplitMix64 for this seed.
    for share, word in zip(shares, (6457827717110365317, 3203168211198807973, 9817491932198370423), strict=False):
        assert share == ((word >> 11) + 0.5) * 2.0**-53
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert np.corrcoef(shares[:-1], shares[1:])[0, 1] == pytest.approx(0, abs=0.03)


def test_a_sample_that_went_to_the_end_is_not_run_again(network):
    session, _, _ = network()
    session.use(Policy.never(2))
    calls = session.runtime.calls
    with Audit(session, epsilon=0.1, fraction=1.0) as audit:
        for inputs in stream():
            audit.run(inputs)
        assert audit.status().mean == 0
    assert calls["stage1"] == SAMPLES
    session.use(Policy.fixed([0.9]))
    calls.clear()
    with Audit(session, epsilon=0.1, fraction=1.0) as audit:
        for inputs in stream(batch=SAMPLES):
            audit.run(inputs)
    assert session.runtime.rows["stage1"] == 2 * SAMPLES, "each sample once: the early ones by the audit"


def of_other_shapes(session, one_by_one):
    """The same network with a second input that has no rows; or exported for one sample at a time."""
    plan = session.plan
    tensors = {**plan.tensors, "k": TensorSpec("k", "float32", (2,))}
    if one_by_one:
        shapes = {name: tuple(1 if size == "batch" else size for size in spec.shape) for name, spec in tensors.items()}
        tensors = {name: msgspec.structs.replace(spec, shape=shapes[name]) for name, spec in tensors.items()}
        inputs, stages = (tensors["x"],), plan.stages
    else:
        inputs = (tensors["x"], tensors["k"])
        stages = [msgspec.structs.replace(stage, inputs=("x", "k", *stage.inputs[1:])) for stage in plan.stages]
    plan = Plan(inputs=inputs, tensors=tensors, stages=tuple(stages), steps=plan.steps)
    return Session(plan, FakeRuntime(session.runtime.handler), {}, policy=session.policy)


@pytest.mark.parametrize("form", ["rows one by one", "a tuple", "a mapping"])
def test_rows_of_every_form_of_input_are_found(network, form):
    session, _, _ = network(disagree=0.3)
    forms = {
        "rows one by one": lambda x: x,
        "a tuple": lambda x: (x, np.zeros(2, np.float32)),
        "a mapping": lambda x: {"k": np.zeros(2, np.float32), "x": x},
    }
    found = []
    for each, shape in ((session, lambda x: x), (of_other_shapes(session, form == "rows one by one"), forms[form])):
        with Audit(each, epsilon=0.1, fraction=0.4) as audit:
            for inputs in stream(batch=8):
                audit.run(shape(inputs))
            found.append(audit.status())
    assert found[0] == found[1]
    assert found[0].mean > 0.05


def test_bad_inputs_leave_no_trace(network):
    session, _, _ = network()
    with Audit(session, epsilon=0.1, fraction=1.0) as audit:
        before = state_of(audit)
        with pytest.raises(InputError):
            audit.run(np.zeros((2, 5), np.float32))
        assert state_of(audit) == before


def test_the_gap_waits_for_labels(network):
    session, first, last = network(disagree=0.3)
    labels = np.where(np.arange(SAMPLES) % 2, first, last)  # where they differ, each is right now and then
    with Audit(session, epsilon=0.1, fraction=0.5, loss="gap") as audit:
        for start in range(0, SAMPLES, 8):
            audit.run(np.arange(start, start + 8, dtype=np.float32)[:, None])
        chosen = np.array(audit.waiting)
        assert (audit.status().audits, audit.status().waiting) == (0, len(chosen))
        for sample in chosen.tolist():
            audit.label(sample, labels[sample])
            audit.label(sample, labels[sample])  # a second time is passed over
        status = audit.status()
    served = np.where(np.arange(SAMPLES) % 4 < 3, first, last)
    gap = (served != labels).astype(int) - (last != labels)
    assert status.mean == pytest.approx(gap[chosen].mean())
    assert {-1, 1} <= set(gap[chosen])
    assert (status.audits, status.waiting) == (len(chosen), 0)


def test_labels_that_never_come_take_no_more_room(network):
    session, _, _ = network()
    with Audit(session, epsilon=0.1, fraction=1.0, loss="gap") as audit:
        for inputs in stream(rounds=3, batch=100):
            audit.run(inputs)
        assert audit.waiting == tuple(range(3 * SAMPLES - WAITING, 3 * SAMPLES))


def test_no_alarm_in_order_and_one_when_it_is_not(network):
    for disagree, alarm in ((0.02, False), (0.4, True)):
        session, _, _ = network(disagree)
        with Audit(session, epsilon=0.05, fraction=0.25) as audit:
            for inputs in stream(rounds=10, batch=20):
                audit.run(inputs)
            status = audit.status()
        assert status.alarm is alarm
        assert (status.evidence >= status.limit) is alarm
        assert status.serving == "calibrated", "an alarm is told, nothing else, unless that is wanted"


def test_after_an_alarm_nobody_leaves_until_certified_again(network, tmp_path):
    session, _, _ = network(disagree=0.4)
    base = session.policy
    options = {"epsilon": 0.1, "fraction": 1.0, "on_alarm": "revert", "state": tmp_path / "audit.json"}
    with Audit(session, **options) as audit:
        for inputs in stream(rounds=2, batch=20):
            audit.run(inputs)
        status = audit.status()
        assert (status.serving, status.thresholds) == ("never-exit", ["inf"])
        assert set(audit.run(next(stream(batch=8))).exit) == {1}
        assert status.attempts >= 1, "the candidate goes on being tested, and fails"
    assert session.policy is base, "the session is as it was"
    mended, _, _ = network(disagree=0.01)
    with Audit(mended, **options) as audit:
        assert audit.status().serving == "never-exit", "it stays so after a restart"
        for inputs in stream(rounds=8, batch=20):
            audit.run(inputs)
        after = audit.status()
        assert (after.serving, after.alarm) == ("calibrated", False)
        assert after.attempts > status.attempts
        assert 0 < after.delta_spent < after.delta
        assert after.mean < 0.1
        assert set(audit.run(next(stream(batch=8))).exit) == {0, 1}


def test_reverting_by_hand(network):
    session, _, _ = network()
    with Audit(session, epsilon=0.1, fraction=1.0) as audit:
        audit.revert()
        status = audit.status()
        assert (status.serving, status.fresh, status.attempts) == ("never-exit", 0, 0)
        for inputs in stream(batch=50):
            audit.run(inputs)
        assert audit.status().serving == "calibrated"


def test_answers_from_before_the_revert_count_for_nothing(network):
    session, _, _ = network()
    with Audit(session, epsilon=0.1, fraction=1.0, loss="gap") as audit:
        audit.run(next(stream(batch=10)))
        audit.revert()
        assert audit.waiting == ()
        audit.label(3, 0)
        assert audit.status().fresh == 0


def test_adaptation_shifts_the_sessions_thresholds(network):
    session, _, _ = network(disagree=0.4)
    base = session.policy
    with Audit(session, epsilon=0.05, fraction=0.5, gamma=0.02) as audit:
        for inputs in stream(rounds=10):
            audit.run(inputs)
        status = audit.status()
        assert status.serving == "adapted"
        assert session.policy.thresholds[0] == pytest.approx(base.thresholds[0] + status.shift, abs=1e-6)
        assert status.mean - 0.05 <= status.excess_bound
        assert status.mean < 0.1
        assert status.drift is None, "shares under other thresholds tell nothing"
    assert session.policy is base


def test_drift_is_compared_with_calibration(network):
    session, _, _ = network()
    provenance = Provenance(
        method="m", plan=session.plan.fingerprint, samples=1000, results={"exit_shares": [0.2, 0.8]}
    )
    session.use(msgspec.structs.replace(session.policy, provenance=provenance))
    with Audit(session, epsilon=0.1, fraction=0.0, window=200) as audit:
        for inputs in stream(batch=10):
            audit.run(inputs)
        status = audit.status()
    assert status.drift.shares == (0.75, 0.25)
    assert status.drift_warning
    assert (status.audits, status.drift_windows, status.drift_notable) == (0, 2, 2)


# ── restarts ──


@pytest.mark.parametrize("options", [
    {}, {"gamma": 0.05}, {"loss": "gap"}, {"on_alarm": "revert"}, {"window": 37},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("cuts", [[137], [1, 2, 399, 700]])
def test_a_restart_goes_on_as_if_nothing_had_been(network, tmp_path, options, cuts):
    options = {"epsilon": 0.1, "fraction": 0.4, "seed": 9, **options}
    inputs = list(stream(rounds=3))

    def go(session, part, **where):
        with Audit(session, **options, **where) as audit:
            for each in part:
                audit.run(each)
                for sample in audit.waiting[:-5]:
                    audit.label(sample, 1)
            return json.loads(state_of(audit))

    whole = go(network(0.3)[0], inputs)
    for start, end in zip([0, *cuts], [*cuts, len(inputs)], strict=True):
        parts = go(network(0.3)[0], inputs[start:end], state=tmp_path / "audit.json")
    assert parts == whole
    assert whole["mean"]["audits"] or whole["recertification"]["attempts"]
    with closing(StateFile(tmp_path / "audit.json")) as file:
        assert json.loads(file.read()) == whole, "what was closed is on the disk"


def test_another_fraction_goes_on_from_here(network, tmp_path):
    session, _, _ = network()
    for fraction in (0.0, 1.0, 0.0):
        with Audit(session, epsilon=0.1, fraction=fraction, state=tmp_path / "audit.json") as audit:
            audit.run(next(stream(batch=10)))
            status = audit.status()
    assert (status.samples, status.audits) == (30, 10)


@pytest.mark.parametrize(("change", "message"), [
    ({"epsilon": 0.2}, "written with epsilon 0.1, now it is 0.2; give 0.1, or name another file"),
    ({"seed": 1}, "written with seed 0, now it is 1"),
    ({"loss": "gap"}, "written with loss consistency, now it is gap"),
])  # fmt: skip
def test_a_state_of_other_settings_is_refused(network, tmp_path, change, message):
    session, _, _ = network()
    path = tmp_path / "audit.json"
    Audit(session, epsilon=0.1, state=path).close()
    content = path.read_bytes()
    with pytest.raises(CalibrationError, match=message) as caught:
        Audit(session, **{"epsilon": 0.1, "state": path, **change})
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content
    Audit(session, epsilon=0.1, state=path).close()  # the lock is free again


def test_a_state_of_another_policy_or_network_is_refused(network, scripted_session, tmp_path):
    session, _, _ = network()
    path = tmp_path / "audit.json"
    Audit(session, epsilon=0.1, state=path).close()
    session.use(Policy.fixed([0.8]))
    with pytest.raises(CalibrationError, match="belongs to another policy; name another file, or move it away"):
        Audit(session, epsilon=0.1, state=path)
    with pytest.raises(CalibrationError, match="belongs to another network"):
        Audit(scripted_session(np.zeros((3, 4, 2), np.float32)), epsilon=0.1, state=path)
    session.use(Policy.fixed([0.9]))
    session._bundle = SimpleNamespace(artifact_digests=lambda target: {"stages/x": "0"})
    with pytest.raises(CalibrationError, match="belongs to another export of the network"):
        Audit(session, epsilon=0.1, state=path)
    session._bundle = None
    session.use(Policy.fixed([0.9], name="same-rules-another-name"))
    Audit(session, epsilon=0.1, state=path).close()


@pytest.mark.parametrize("damage", [
    lambda content: content[:-20],
    lambda content: content.replace(b'"samples":0', b'"samples":7'),
    lambda content: b"",
    lambda content: b"\xff\xfe",
    lambda content: b'{"sha256": "", "state": {}}',
    lambda content: b"[]",
], ids=["cut", "changed", "empty", "bytes", "bare", "list"])  # fmt: skip
def test_a_damaged_state_is_refused_and_left_as_it_is(network, tmp_path, damage):
    session, _, _ = network()
    path = tmp_path / "audit.json"
    Audit(session, epsilon=0.1, state=path).close()
    path.write_bytes(damaged := damage(path.read_bytes()))
    with pytest.raises(CalibrationError, match=r"audit\.json: .*move it away to start anew"):
        Audit(session, epsilon=0.1, state=path)
    assert path.read_bytes() == damaged


def sealed(path, content):
    file = StateFile(path)
    file.save(content)
    file.close()


@pytest.mark.parametrize("change", [
    {"schema": 2}, {"samples": "many"}, {"monitor": {}},
    {"monitor": {"epsilon": 5.0, "limit": 100.0}},
], ids=str)  # fmt: skip
def test_a_state_of_another_edgekit_is_refused(network, tmp_path, change):
    session, _, _ = network()
    path = tmp_path / "audit.json"
    with Audit(session, epsilon=0.1) as audit:
        sealed(path, msgspec.json.encode({**json.loads(state_of(audit)), **change}))
    with pytest.raises(CalibrationError, match=r"audit\.json: (schema 2|a state that this edgekit cannot read)"):
        Audit(session, epsilon=0.1, state=path)


def test_two_audits_cannot_share_a_file(network, tmp_path):
    session, _, _ = network()
    path = tmp_path / "audit.json"
    with Audit(session, epsilon=0.1, state=path):
        with pytest.raises(
            CalibrationError, match=r"audit\.json: another audit is using it; give each process its own"
        ):
            Audit(session, epsilon=0.1, state=path)
        code = f"from edgekit.calibration.state_file import StateFile; StateFile({str(path)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
        assert "another audit is using it" in done.stderr
    StateFile(path).close()


def test_a_kill_before_the_rename_leaves_the_old_state(tmp_path):
    path = tmp_path / "audit.json"
    sealed(path, b'{"n":1}')
    code = f"""
        import os, time
        from edgekit.calibration import state_file
        state_file.os.replace = lambda *names: os._exit(9)
        file = state_file.StateFile({str(path)!r})
        assert file.read() == b'{{"n":1}}'
        file.save(b'{{"n":2}}')
        time.sleep(30)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=60)
    assert done.returncode == 9
    assert (tmp_path / ".audit.json.part").exists(), "it was killed between write and rename"
    file = StateFile(path)  # the lock went with the process
    assert file.read() == b'{"n":1}'
    file.save(b'{"n":3}')
    file.close()
    assert not (tmp_path / ".audit.json.part").exists()


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        call = getattr(state_file.os, name)
        monkeypatch.setattr(state_file.os, name, lambda *given, name=name, call=call: done.append(name) or call(*given))
    sealed(tmp_path / "audit.json", b"{}")
    assert done == ["fsync", "replace", "fsync"], "the content, the name, the folder that holds the name"


def test_the_latest_state_is_written_and_nothing_waits_for_the_disk(tmp_path, monkeypatch):
    synced = []

    def slow(descriptor):
        time.sleep(0.1)
        synced.append(descriptor)

    monkeypatch.setattr(state_file.os, "fsync", slow)
    file = StateFile(tmp_path / "audit.json")
    begin = time.perf_counter()
    for number in range(1000):
        file.save(b'{"n":%d}' % number)
    took = time.perf_counter() - begin
    file.close()
    assert took < 1, "a thousand writes of 0.2 s each would take minutes"
    assert len(synced) <= 6, "what came in between was not written"
    with closing(StateFile(tmp_path / "audit.json")) as again:
        assert again.read() == b'{"n":999}'


def test_a_full_disk_is_told_and_stops_nothing(network, tmp_path, monkeypatch):
    session, _, _ = network()
    path = tmp_path / "audit.json"
    Audit(session, epsilon=0.1, state=path).close()
    content = path.read_bytes()
    audit = Audit(session, epsilon=0.1, fraction=1.0, state=path)

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_file.os, "replace", full)
    audit.run(next(stream()))
    deadline = time.monotonic() + 10
    while audit.status().state_failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert audit.status().state_failure == f"{path}: No space left on device"
    audit.run(next(stream()))
    with pytest.raises(CalibrationError, match="No space left on device; the latest audits are not in it"):
        audit.close()
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_is_refused_at_once(network, tmp_path):
    session, _, _ = network()
    with pytest.raises(CalibrationError, match=r"nowhere/audit\.json: cannot be written .*; name another file"):
        Audit(session, epsilon=0.1, state=tmp_path / "nowhere" / "audit.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CalibrationError, match="folder: cannot be read"):
        Audit(session, epsilon=0.1, state=tmp_path / "folder")


@pytest.mark.parametrize(("options", "message"), [
    ({"epsilon": 0.0}, "epsilon must be"),
    ({"alpha": 1.0}, "alpha must be"),
    ({"fraction": 1.1}, "fraction must be from 0 to 1"),
    ({"fraction": math.nan}, "fraction must be from 0 to 1"),
    ({"loss": "brier"}, "loss 'brier' is not one of consistency, gap"),
    ({"on_alarm": "ring"}, "on_alarm 'ring' is not one of report, revert"),
    ({"seed": -1}, "seed must be"),
    ({"gamma": -1.0}, "gamma must be above 0"),
    ({"delta": 0.0}, "delta must be"),
    ({"window": 0}, "at least one sample"),
    ({"run_length": 0.5}, "limit must be at least 1"),
])  # fmt: skip
def test_bad_options_touch_no_file(network, tmp_path, options, message):
    session, _, _ = network()
    with pytest.raises(CalibrationError, match=message):
        Audit(session, **{"epsilon": 0.1, "state": tmp_path / "audit.json", **options})
    assert list(tmp_path.iterdir()) == []
