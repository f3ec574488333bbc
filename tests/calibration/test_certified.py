"""The whole way: proposed, tested, certified, run; and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from scipy.stats import binomtest

from edgekit.calibration import Loss, calibrate_anytime, calibrate_budget, calibrate_certified, propose
from edgekit.calibration.bands import interval, smallest_epsilon
from edgekit.calibration.certified import halves as split_in_halves
from edgekit.calibration.losses import LOSSES
from edgekit.certificate import Proposal, to_mapping
from edgekit.errors import CalibrationError
from edgekit.policy import Policy


@pytest.fixture
def network(scripted_session, indexed_data, noisy_network):
    """A session of three exits, and two sets of samples."""
    logits, labels = noisy_network(samples=4000, seed=3)
    return scripted_session(logits), indexed_data(labels, 4000)


def part(data, rows):
    labels = None if data.labels is None else data.labels[rows]
    return replace(data, inputs=data.inputs[rows], labels=labels)


@pytest.fixture
def halves(network):
    session, data = network
    return session, part(data, slice(0, 2000)), part(data, slice(2000, 4000))


@pytest.mark.parametrize("loss", ["gap", "consistency", "brier"])
def test_a_policy_with_its_certificate(halves, loss):
    session, server, device = halves
    proposal = propose(session, server, loss=loss)
    policy = calibrate_certified(session, device, epsilon=0.05, delta=0.1, loss=loss, proposal=proposal)
    origin, found = policy.provenance, policy.provenance.certificate
    assert session.policy == policy
    assert (found.epsilon, found.delta, found.loss, found.samples) == (0.05, 0.1, loss, 2000)
    assert (found.path, found.path_samples, found.path_source) == (proposal.digest, 2000, "scripted")
    assert found.p_value <= 0.1
    assert found.mean_loss <= 0.05
    assert found.test == {"gap": "ternary", "consistency": "binomial", "brier": "wsr"}[loss]
    assert "with probability 0.9 over the drawing of the 2000 tested samples" in origin.guarantee
    assert origin.results["as_predicted"] == 1.0
    assert origin.results["expected_cost"] < origin.results["cost_of_last_exit"]
    point = origin.tradeoff.points[origin.tradeoff.chosen]
    assert point.loss == pytest.approx(found.mean_loss)
    assert point.low <= point.loss <= point.high
    assert origin.results["exit_shares"] == pytest.approx(list(point.shares))


def test_the_exact_p_value_of_the_answers_that_the_session_gives(halves):
    """Counted from the session's own answers, and tested by scipy."""
    session, server, device = halves
    policy = calibrate_certified(
        session,
        device,
        epsilon=0.05,
        delta=0.1,
        loss="consistency",
        proposal=propose(session, server, loss="consistency"),
    )
    answers = session.run(device.inputs).logits.argmax(axis=1)
    last = session.run_exits(device.inputs)[-1].argmax(axis=1)
    differing = int((answers != last).sum())
    expected = binomtest(differing, 2000, 0.05, alternative="less").pvalue
    assert policy.provenance.certificate.p_value == pytest.approx(expected, rel=1e-9)
    assert differing > 0


def test_labels_are_not_needed_for_consistency(halves):
    session, server, device = halves
    unlabelled = [replace(data, labels=None) for data in (server, device)]
    proposal = propose(session, unlabelled[0], loss="consistency", score="best")
    policy = calibrate_certified(session, unlabelled[1], epsilon=0.05, delta=0.1, loss="consistency", proposal=proposal)
    assert policy.thresholds != (math.inf,) * 2
    assert policy.provenance.tradeoff.points[0].accuracy is None
    assert "accuracy" not in policy.provenance.results
    with pytest.raises(CalibrationError, match="no labels"):
        calibrate_certified(session, unlabelled[1], epsilon=0.05, delta=0.1)


def test_without_a_proposal_half_proposes_and_half_tests(network):
    session, data = network
    policy = calibrate_certified(session, data, epsilon=0.05, delta=0.1, seed=5)
    found = policy.provenance.certificate
    assert (found.samples, found.path_samples, found.seed) == (2000, 2000, 5)
    again = calibrate_certified(session, data, epsilon=0.05, delta=0.1, seed=5)
    assert again.thresholds == policy.thresholds
    assert msgspec.structs.replace(again.provenance.certificate, path="") == msgspec.structs.replace(found, path="")


@pytest.mark.parametrize("score", ["max_prob", "margin", "neg_entropy", "patience", "learned", "best"])
def test_every_score_decides_as_it_was_certified(network, score):
    session, data = network
    policy = calibrate_certified(session, data, epsilon=0.05, delta=0.1, score=score)
    assert policy.provenance.results["as_predicted"] == 1.0
    compared = {found.score: found for found in policy.provenance.tradeoff.scores}
    assert set(compared) == {"max_prob", "margin", "neg_entropy", "patience", "learned"}
    if score == "best":
        assert compared[policy.score].cost == min(found.cost for found in compared.values())
    assert Policy.from_mapping(msgspec.json.decode(msgspec.json.encode(policy.to_mapping()))) == policy


def test_too_few_samples_leave_nobody_early_and_say_how_many_are_needed(halves):
    session, server, device = halves
    proposal = propose(session, server, loss="consistency")
    for samples, enough in ((44, False), (45, True)):
        policy = calibrate_certified(
            session, part(device, slice(0, samples)), epsilon=0.05, delta=0.1, loss="consistency", proposal=proposal
        )
        found = policy.provenance.certificate
        assert (found.needed, found.samples >= found.needed) == (45, enough)
        if not enough:
            assert policy.thresholds == (math.inf,) * 2
            assert "44 samples are too few to certify more, 45 are needed" in policy.provenance.guarantee
            assert (found.mean_loss, found.p_value, found.tested) == (0.0, 0.0, 0)


def test_those_who_leave_early_alone(halves):
    session, server, device = halves
    proposal = propose(session, server, loss="consistency")
    plain, strict = (
        calibrate_certified(
            session, device, epsilon=0.05, delta=0.1, loss="consistency", conditional=each, proposal=proposal
        )
        for each in (False, True)
    )
    assert strict.provenance.certificate.conditional
    assert strict.provenance.results["expected_cost"] >= plain.provenance.results["expected_cost"]
    assert "among those who leave early" in strict.provenance.guarantee
    taken = session.run(device.inputs).exit
    logits = session.run_exits(device.inputs)
    differs = np.stack([each.argmax(axis=1) != logits[-1].argmax(axis=1) for each in logits])
    for exit_index in (0, 1):
        early = taken <= exit_index
        if early.any():
            assert differs[taken[early], np.flatnonzero(early)].mean() <= 0.05


def test_a_loss_of_the_users_own(halves):
    session, server, device = halves
    costly = Loss(
        name="twice for class 0",
        per_sample=lambda logits, labels: (
            (logits.argmax(axis=2) != logits[-1].argmax(axis=1)) * np.where(labels == 0, 1.0, 0.5)
        ),
    )
    policy = calibrate_certified(
        session, device, epsilon=0.05, delta=0.1, loss=costly, proposal=propose(session, server, loss=costly)
    )
    assert policy.provenance.certificate.test == "hoeffding-bentkus"
    assert policy.provenance.certificate.mean_loss <= 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.0}, "max_drop must be above 0 and below 1"),
        ({"epsilon": 1.0}, "max_drop must be above 0 and below 1"),
        ({"delta": 0.0}, "confidence must be above 0"),
        ({"loss": "consistency"}, "ordered by loss 'gap', not 'consistency'"),
        ({"loss": "hinge"}, "loss 'hinge' is not one of gap, consistency, brier"),
        ({"minimize": "energy"}, "minimize='energy' needs measurements"),
    ],
)
def test_what_cannot_be_asked(halves, change, message):
    session, server, device = halves
    before = session.policy
    options = {"epsilon": 0.05, "delta": 0.1, **change}
    with pytest.raises(CalibrationError, match=message):
        calibrate_certified(session, device, proposal=propose(session, server), **options)
    assert session.policy == before


def test_a_proposal_must_be_of_this_network_and_of_other_samples(halves, scripted_session, noisy_network):
    session, server, device = halves
    proposal = propose(session, server)
    for rows, known in ((slice(0, 2000), 2000), (slice(1, 2000), 1999), (slice(None, None, -1), 2000)):
        with pytest.raises(CalibrationError, match=f"found on {known} of these very samples"):
            calibrate_certified(session, part(server, rows), epsilon=0.05, delta=0.1, proposal=proposal)
    with pytest.raises(CalibrationError, match="found on 2000 of these very samples"):  # whatever the labels
        calibrate_certified(
            session, replace(server, labels=(server.labels + 1) % 4), epsilon=0.05, delta=0.1, proposal=proposal
        )
    logits, _ = noisy_network(exits=2)
    with pytest.raises(CalibrationError, match="is for another network"):
        calibrate_certified(scripted_session(logits), device, epsilon=0.05, delta=0.1, proposal=proposal)


def test_several_losses_are_kept_together(halves):
    """The policy is one that passes every test; each p-value is that of its own losses."""
    session, server, device = halves
    proposal = propose(session, server)
    given = {"epsilon": 0.05, "delta": 0.1, "proposal": proposal}
    alone = calibrate_certified(session, device, **given)
    both = calibrate_certified(session, device, also=[("consistency", 0.04), ("brier", 0.05)], **given)
    found = both.provenance.certificate
    assert [each.loss for each in found.also] == ["consistency", "brier"]
    assert max(found.p_value, *(each.p_value for each in found.also)) <= 0.1
    answers = session.run(device.inputs).logits.argmax(axis=1)
    differing = int((answers != session.run_exits(device.inputs)[-1].argmax(axis=1)).sum())
    assert found.also[0].mean_loss == pytest.approx(differing / 2000)
    expected = binomtest(differing, 2000, 0.04, alternative="less").pvalue
    assert found.also[0].p_value == pytest.approx(expected, rel=1e-9)
    assert both.provenance.results["expected_cost"] > alone.provenance.results["expected_cost"]
    assert "and (consistency) at most 0.04, and (brier) at most 0.05 on inputs" in both.provenance.guarantee
    with pytest.raises(CalibrationError, match="largest mean of loss 'brier' must be above 0"):
        calibrate_certified(session, device, also=[("brier", 0.0)], **given)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda labels: np.full_like(labels, -1), "label -1 of sample 0 is outside 0 to 3"),
        (lambda labels: np.full_like(labels, 12), "label 12 of sample 0 is outside 0 to 3"),
        (np.zeros_like, "every sample is of class 0"),
    ],
)
def test_labels_that_are_none_test_nothing(halves, labels, message):
    session, server, device = halves
    proposal = propose(session, server)
    with pytest.raises(CalibrationError, match=message):
        calibrate_certified(
            session, replace(device, labels=labels(device.labels)), epsilon=0.05, delta=0.1, proposal=proposal
        )


def test_what_tests_has_no_part_in_what_is_proposed(scripted_session, indexed_data, noisy_network):
    logits, labels = noisy_network(samples=1200, seed=3)
    _, testing = split_in_halves(1200, 7)
    other = logits.copy()
    other[:, testing] = np.random.default_rng(0).normal(size=other[:, testing].shape)
    found = [
        calibrate_certified(scripted_session(each), indexed_data(labels, 1200), epsilon=0.05, delta=0.1, seed=7)
        for each in (logits, other)
    ]
    one, two = (policy.provenance.tradeoff.points for policy in found)
    assert [point.thresholds for point in one] == [point.thresholds for point in two]
    assert found[0].temperatures == found[1].temperatures
    assert [point.loss for point in one] != [point.loss for point in two]


def test_a_promise_says_how_sure_it_is(halves):
    session, server, device = halves
    proposal = propose(session, server)
    policy = calibrate_certified(session, device, epsilon=0.06, delta=1e-7, proposal=proposal)
    assert "with probability 0.9999999 over" in policy.provenance.guarantee


def test_doubtful_samples_are_told(network):
    session, data = network
    twice = part(data, np.r_[0:1000, 0:1000])
    policy = calibrate_certified(session, twice, epsilon=0.05, delta=0.1)
    told = policy.provenance.results["warnings"]
    assert "are among those that proposed the path: remove duplicates" in told[0]
    assert "duplicates make a certificate too confident" in told[1]
    shuffled = replace(data, labels=np.random.default_rng(0).permutation(data.labels))
    policy = calibrate_certified(session, shuffled, epsilon=0.05, delta=0.1)
    assert "about what guessing gives" in policy.provenance.results["warnings"][-1]
    assert calibrate_certified(session, data, epsilon=0.05, delta=0.1).provenance.results["warnings"] == []


def test_one_exit_has_nothing_to_leave_early(scripted_session, indexed_data, noisy_network):
    logits, labels = noisy_network(exits=1, samples=600)
    session, data = scripted_session(logits), indexed_data(labels, 600)
    policy = calibrate_certified(session, data, epsilon=0.05, delta=0.1)
    assert policy.thresholds == ()
    assert len(policy.provenance.tradeoff.points) == 1


def test_all_scores_tied(scripted_session, indexed_data):
    logits = np.tile(np.eye(4, dtype=np.float32)[0] * 3, (3, 1000, 1))
    labels = np.r_[np.zeros(700, dtype=np.int64), np.arange(300) % 4].astype(np.int64)
    session = scripted_session(logits)
    policy = calibrate_certified(session, indexed_data(labels, 1000), epsilon=0.05, delta=0.1)
    assert set(session.run(indexed_data(labels, 1000).inputs).exit.tolist()) == {0}  # all agree: everybody leaves
    assert policy.provenance.results["as_predicted"] == 1.0


def test_looser_targets_cost_no_more(network):
    session, data = network
    found = calibrate_certified(session, data, epsilon=0.03, delta=0.1).provenance.tradeoff
    assert 0.03 in [target.epsilon for target in found.targets]
    costs = [found.points[target.place].macs for target in found.targets]
    assert costs == sorted(costs, reverse=True)
    mine = next(target for target in found.targets if target.epsilon == 0.03)
    assert mine.place == found.chosen


def test_a_proposal_survives_json(halves):
    session, server, _ = halves
    proposal = propose(session, server, score="learned")
    again = Proposal.from_mapping(msgspec.json.decode(msgspec.json.encode(to_mapping(proposal))))
    assert again == proposal
    assert again.digest == proposal.digest
    with pytest.raises(CalibrationError, match="not a path of policies"):
        Proposal.from_mapping({"name": "x"})


def test_a_budget_is_kept_and_msdnet_stands_beside_it(network):
    session, data = network
    policy = calibrate_budget(session, data, budget=20.0)
    results = policy.provenance.results
    assert results["expected_cost"] <= 20.0
    taken = session.run(data.inputs).exit
    assert (taken + 1).mean() * 10 == pytest.approx(results["expected_cost"])
    assert results["msdnet"]["expected_cost"] <= 20.0
    assert policy.provenance.guarantee is None
    for budget, message in ((5.0, "costs 5.0 or less"), (math.nan, "positive mean cost"), (-1.0, "positive mean cost")):
        with pytest.raises(CalibrationError, match=message):
            calibrate_budget(session, data, budget=budget)
    assert session.policy == policy


def test_anytime_bounds_hold_together(network):
    session, data = network
    policy = calibrate_anytime(session, data, delta=0.1, loss="consistency")
    rows = policy.provenance.results["anytime"]
    assert [row["exit"] for row in rows] == ["exit0", "exit1"]
    logits = session.run_exits(data.inputs)
    for row, each in zip(rows, logits, strict=False):
        differing = int((each.argmax(axis=1) != logits[-1].argmax(axis=1)).sum())
        expected = binomtest(differing, len(data)).proportion_ci(confidence_level=1 - 0.1, method="exact").high
        assert row["bound"] == pytest.approx(expected, abs=1e-6)  # two-sided at 90 %: 5 % above, as for two exits
    assert set(session.run(data.inputs[:50]).exit.tolist()) == {2}


def test_intervals_and_bounds_by_hand():
    losses = np.r_[np.ones(3), np.zeros(97)]
    low, high = interval(losses, LOSSES["consistency"], 0.95)
    expected = binomtest(3, 100).proportion_ci(confidence_level=0.95, method="exact")
    assert (low, high) == (pytest.approx(expected.low, abs=1e-9), pytest.approx(expected.high, abs=1e-9))
    low, high = interval(np.r_[-np.ones(2), losses], LOSSES["gap"], 0.95)
    assert low < 1 / 102 < high
    low, high = interval(np.linspace(-0.1, 0.2, 500), LOSSES["brier"], 0.95)
    assert low < 0.05 < high
    assert interval(np.zeros(0), LOSSES["gap"], 0.95) == (-1.0, 1.0)
    assert smallest_epsilon(np.ones(50), test="binomial", delta=0.1) == pytest.approx(1.0)
