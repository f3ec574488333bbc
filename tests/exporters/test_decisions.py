"""Which outputs are exits, in which order, under which names."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn

from edgekit.errors import DecisionError, PartitionError
from edgekit.exporters import stage_model

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", "early late")


def names(staged):
    return [step.name for step in staged.plan.exits]


def two(self, x):
    first, _, third = self.features(x)
    return self.h1(first), self.h3(third)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda self, x: list(two(self, x)), ["exit1", "exit2"]),
        (lambda self, x: dict(zip(("early", "late"), two(self, x), strict=True)), ["early", "late"]),
        (lambda self, x: Pair(*two(self, x)), ["early", "late"]),
        (lambda self, x: {"logits": list(two(self, x))}, ["exit1", "exit2"]),
        (lambda self, x: {"aux": {"logits": two(self, x)[0]}, "out": two(self, x)[1]}, ["aux.logits", "out"]),
        (lambda self, x: {"exit2": two(self, x)[0], "rest": [two(self, x)[1]]}, ["exit2", "exit2_"]),
        (lambda self, x: (*two(self, x), self.features(x)[2], None, 3, "text"), ["exit1", "exit2"]),
        (lambda self, x: two(self, x)[1], ["exit1"]),
    ],
)
def test_structures(forward, expected, trunk, staged_equals_eager):
    assert names(staged_equals_eager(trunk(forward), X)) == expected


def test_final_logits_first_are_put_last_and_said_so(trunk, staged_equals_eager):
    staged = staged_equals_eager(trunk(lambda self, x: two(self, x)[::-1]), X)
    assert names(staged) == ["exit1", "exit2"]
    assert [point.path for point in staged.exits] == ["1", "0"]
    assert staged.notes == ("exits are in the order of the work that leads to them: outputs '1', '0'",)


def test_a_heavy_exit_head_does_not_make_its_exit_a_late_one(trunk, staged_equals_eager):
    def forward(self, x):
        first, second, third = self.features(x)
        return [self.heavy(first), self.h2(second), self.h3(third)]

    heavy = nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 5))
    staged = staged_equals_eager(trunk(forward, heavy=heavy), X)
    assert [point.path for point in staged.exits] == ["0", "1", "2"]


def test_outputs_and_modules_by_name(trunk, staged_equals_eager):
    def forward(self, x):
        first, _, third = self.features(x)
        return (self.h1(first), first), (self.h3(third), third)

    model = trunk(forward)
    assert names(staged_equals_eager(model, X, exits=["0.0", "1.0"])) == ["exit1", "exit2"]
    assert names(staged_equals_eager(model, X, exits=["h1", "h3"])) == ["h1", "h3"]
    assert names(staged_equals_eager(model, X, exits=["h3", "h1"])) == ["h3", "h1"]
    assert names(staged_equals_eager(model, X, exits=["h1", "1.0"])) == ["h1", "exit2"]


@pytest.mark.parametrize(
    ("exits", "match"),
    [
        (["nope"], r"'nope' is neither an output \('0.0', '0.1', '1.0', '1.1'\) nor a module"),
        (["0.1", "1.0"], r"disagree on the number of classes: \[5, 16\]"),
        ([], "must be a list of names"),
        ("h1", "must be a list of names"),
        (None, r"several kinds of outputs could be logits .* exits=\[\.\.\.\]"),
    ],
)
def test_names_that_do_not_tell_exits(exits, match, trunk):
    def forward(self, x):
        first, _, third = self.features(x)
        return (self.h1(first), first), (self.h3(third), third)

    with pytest.raises(DecisionError, match=match):
        stage_model(trunk(forward), X, exits=exits)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.h1(self.a(x)).argmax(1),
        lambda self, x: [self.h1(self.a(x)).mean(1, keepdim=True)],
        lambda self, x: self.a(x)[:, None],
        lambda self, x: None,
    ],
)
def test_outputs_that_are_no_logits(forward, trunk):
    with pytest.raises(DecisionError, match=r"no output is logits of shape \(batch, classes\)"):
        stage_model(trunk(forward), X)


@pytest.mark.parametrize("dim", [0, 1])
def test_stacked_exits_are_asked_for_as_a_list(dim, trunk):
    stacked = trunk(lambda self, x: torch.stack([self.h1(f) for f in self.features(x)], dim=dim))
    with pytest.raises(DecisionError, match="return exits in a list, not stacked in one tensor"):
        stage_model(stacked, X)


def test_a_module_that_runs_several_times_is_no_exit(trunk):
    with pytest.raises(DecisionError, match="module 'h1' gives 3 tensors"):
        stage_model(trunk(lambda self, x: [self.h1(f) for f in self.features(x)]), X, exits=["h1"])


def test_an_exit_without_input_is_refused(trunk):
    forward = lambda self, x: [self.prior[None].expand(len(x), 5), self.h3(self.features(x)[2])]  # noqa: E731
    with pytest.raises(PartitionError, match="does not depend on the input"):
        stage_model(trunk(forward, prior=nn.Parameter(torch.randn(5))), X)


@pytest.mark.parametrize(
    "softmax", [lambda t: t.softmax(1), lambda t: torch.nn.functional.softmax(t, dim=-1).view(-1, 5)]
)
def test_probabilities_are_taken_before_their_softmax(softmax, trunk, staged_equals_eager):
    staged = staged_equals_eager(trunk(lambda self, x: [softmax(one) for one in two(self, x)]), X)
    assert all(step.probabilities for step in staged.plan.exits)
    assert not any("softmax" in str(node.target) for cut in staged.cuts for node in cut.module.graph.nodes)


def test_a_module_that_ends_in_softmax(trunk, staged_equals_eager):
    head = nn.Sequential(nn.Linear(16, 5), nn.Softmax(1))
    model = trunk(lambda self, x: [self.head(self.a(x)), self.h3(self.features(x)[2]).softmax(1)], head=head)
    staged = staged_equals_eager(model, X, exits=["head", "1"])
    assert [step.probabilities for step in staged.plan.exits] == [True, True]


def test_log_softmax_is_as_good_as_logits(trunk, staged_equals_eager):
    staged = staged_equals_eager(trunk(lambda self, x: [one.log_softmax(1) for one in two(self, x)]), X)
    assert not any(step.probabilities for step in staged.plan.exits)


def test_probabilities_without_a_softmax_at_the_end_are_refused(trunk):
    with pytest.raises(DecisionError, match="holds probabilities"):
        stage_model(trunk(lambda self, x: [(one.softmax(1) + one.softmax(1)) / 2 for one in two(self, x)]), X)


def test_the_same_tensor_twice_is_one_exit(trunk, staged_equals_eager):
    staged = staged_equals_eager(trunk(lambda self, x: [two(self, x)[0], *two(self, x)]), X)
    assert len(staged.exits) == 3  # computed twice: different tensors

    def forward(self, x):
        early, late = two(self, x)
        return [early, early, late, late.softmax(1)]

    staged = staged_equals_eager(trunk(forward), X)
    assert names(staged) == ["exit1", "exit2"]
    assert [note for note in staged.notes if "same tensor" in note] == [
        "exits '0' and '1' are the same tensor: kept once",
        "exits '2' and '3' are the same tensor: kept once",
    ]


def test_gate_probabilities_are_not_taken_for_exits(trunk):
    def forward(self, x):
        first, second, third = self.features(x)
        return self.h3(third), [first[:, :2], second[:, :2]]

    with pytest.raises(DecisionError, match=r"several kinds of outputs could be logits"):
        stage_model(trunk(forward), X)
    assert names(stage_model(trunk(forward), X, exits=["0"])) == ["exit1"]
