"""Stages: lazy, complete, and together the same network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgekit.errors import PartitionError
from edgekit.exporters import stage_model
from edgekit.exporters.graph import ancestors
from edgekit.exporters.macs import count_macs
from edgekit.exporters.stages import stage_module

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def require_lazy(staged):
    """Up to each exit exactly what its and earlier exits need has been computed, and nothing crosses in vain."""
    counts = count_macs(staged.captured.program, rows=len(staged.captured.example[0]))
    for index, total in enumerate(staged.plan.exit_macs()):
        needed = ancestors([point.node for point in staged.exits[: index + 1]])
        assert total == sum(counts[node] for node in needed)
    for position, stage in enumerate(staged.plan.stages):
        later = {name for other in staged.plan.stages[position + 1 :] for name in other.inputs}
        assert {name for name in stage.outputs if "/" in name} <= later


class RandomNet(nn.Module):
    """A random graph of layers, skip connections, cats and cheap operators, with heads at random places."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.pick = torch.Generator().manual_seed(seed)
        self.steps = [(self.draw(8), self.draw(100), self.draw(100)) for _ in range(4 + self.draw(8))]
        self.places = sorted({self.draw(len(self.steps)) for _ in range(1 + self.draw(4))} | {len(self.steps) - 1})
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in self.steps)
        self.heads = nn.ModuleList(nn.Linear(6, 4) for _ in range(1 + self.draw(len(self.places))))

    def draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.pick))

    def forward(self, x):
        made, exits = [x], []
        for number, (kind, one, two) in enumerate(self.steps):
            first, second = made[-1 - one % min(2, len(made))], made[two % len(made)]
            match kind:
                case 0 | 1 | 2:
                    y = F.relu(self.layers[number](first))
                case 3:
                    y = self.layers[one % (number + 1)](first) + second
                case 4:
                    y = torch.cat([first[:, :2], second[:, 2:]], 1)
                case 5:
                    y = F.relu(first).mul_(0.5).add_(second)
                case 6:
                    y = torch.stack(first.chunk(2, 1)).sum(0).repeat(1, 2) + first.topk(1, 1).values
                case _:
                    y = second.sigmoid() * first
            made.append(y)
            if number in self.places:
                exits.append(self.heads[number % len(self.heads)](y + 0.1 * made[number // 2]))
        return exits


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_any_network_is_the_sum_of_its_stages(seed):
    model = RandomNet(seed).eval()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    staged = stage_model(model, x)
    require_lazy(staged)
    known = {"x": x} | {step.temperature: torch.ones(()) for step in staged.plan.exits}
    with torch.no_grad():
        for cut, stage in zip(staged.cuts, staged.plan.stages, strict=True):
            known.update(zip(stage.outputs, stage_module(cut)(*(known[name] for name in stage.inputs)), strict=True))
        for step, expected in zip(staged.plan.exits, staged.eager([x]), strict=True):
            torch.testing.assert_close(known[step.logits], expected, rtol=1e-6, atol=1e-6)


def test_stages_take_the_names_of_their_modules(trunk, staged_equals_eager):
    staged = staged_equals_eager(trunk(), X)
    assert [cut.name for cut in staged.cuts] == ["a", "b", "c"]
    require_lazy(staged)


def test_skips_over_several_boundaries(trunk, staged_equals_eager):
    def forward(self, x):
        first, second, third = self.features(x)
        return [self.h1(first), self.h2(second), self.h3(third + first * second)]

    staged = staged_equals_eager(trunk(forward), X)
    require_lazy(staged)
    assert set(staged.plan.stages[2].inputs) >= {"a/relu", "b/relu_1"}


def test_shared_layers_and_heads(trunk, staged_equals_eager):
    def forward(self, x):
        first = F.relu(self.a(x))
        second = F.relu(self.b(first))
        third = F.relu(self.b(second))
        return [self.h1(first), self.h1(second), self.h1(third)]

    staged = staged_equals_eager(trunk(forward), X)
    assert [cut.name for cut in staged.cuts] == ["a", "b", "b_2"]


@pytest.mark.parametrize(
    "combine",
    [
        lambda one, two: [one, (one + two) / 2],
        lambda one, two: [one, two, (one + two) / 2],
        lambda one, two: [one, one * 2, two],
        lambda one, two: [one * 2, one, two],
        lambda one, two: [(one + two) / 2, one, two],
    ],
)
def test_exits_made_of_exits(combine, trunk, staged_equals_eager):
    model = trunk(lambda self, x: combine(self.h1(self.features(x)[0]), self.h3(self.features(x)[2])))
    staged_equals_eager(model, X)

    def forward(self, x):
        first, _, third = self.features(x)
        return combine(self.h1(first), self.h3(third))

    staged = staged_equals_eager(trunk(forward), X)
    require_lazy(staged)
    names = [str(index) for index in range(len(staged.exits))]
    require_lazy(staged_equals_eager(trunk(forward), X, exits=names))
    require_lazy(staged_equals_eager(trunk(forward), X, exits=names[::-1]))


def test_parts_of_tuples_cross(trunk, staged_equals_eager):
    def forward(self, x):
        first, _, third = self.features(x)
        left, right = first.chunk(2, 1)
        best, places = first.topk(3, 1)
        largest = first.max(1)
        early = self.h1(first) + left[:, :5] + largest.values[:, None]
        late = self.h3(third) + right[:, :5] + best.sum(1, keepdim=True) + places[:, :1] + largest.indices[:, None]
        return [early, late]

    require_lazy(staged_equals_eager(trunk(forward), X))


def test_states_of_a_recurrent_cell_cross(staged_equals_eager):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.head = nn.LSTMCell(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            state, exits = (torch.zeros(len(x), 8), x.new_zeros(len(x), 8)), []
            for step in range(3):
                state = self.cell(x[:, step], state)
                exits.append(self.head(state[0]))
            return exits

    staged = staged_equals_eager(Loop(), torch.randn(2, 3, 8))
    assert [len([name for name in stage.inputs if "/" in name]) for stage in staged.plan.stages] == [0, 2, 2]


def test_cheap_work_is_done_again_where_that_carries_less(trunk, staged_equals_eager):
    def forward(self, x):
        first, _, third = self.features(x)
        wide = torch.cat([first] * 8, 1)
        return [self.h1(first) + wide[:, :5], self.h3(third + wide[:, 64:80])]

    staged = staged_equals_eager(trunk(forward), X)
    crossing = [name for name in staged.plan.stages[0].outputs if "/" in name]
    assert [staged.plan.tensors[name].row_bytes for name in crossing] == [64]


def test_a_batch_folded_into_another_dimension_cannot_cross(staged_equals_eager):
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            y = self.a(x.reshape(len(x) * 3, 4)).sigmoid()
            z = self.b(y).sigmoid()
            return [self.head(t.reshape(len(x), 3, 8).mean(1)) for t in (y, z)]

    with pytest.raises(
        PartitionError, match=r"'sigmoid' .* is needed after exit 'exit1' .* has no dimension that is the batch"
    ):
        stage_model(Folded().eval(), torch.randn(2, 3, 4))


def test_exits_on_the_input_itself(trunk, staged_equals_eager):
    staged_equals_eager(trunk(lambda self, x: [x[:, :5], self.h3(self.features(x)[2])]), X)
    staged = staged_equals_eager(trunk(lambda self, x: [x, x.cos(), x.sin() * x.cos()]), X)
    assert [stage.weight_bytes for stage in staged.plan.stages] == [0, 0, 0]


def test_names_that_clash_or_are_no_file_names(staged_equals_eager):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.x = nn.ModuleDict({"y_z": nn.Linear(8, 8), "re lu:1": nn.Linear(8, 8)})
            self.x_y = nn.ModuleDict({"z": nn.Linear(8, 8)})
            self.stage2, self.relu = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, linear):
            one = self.x["y_z"](linear).sin()
            two = self.x_y["z"](one).sin()
            three = self.x["re lu:1"](two).sin()
            return {"linear.logits": self.relu(one), "sin": self.relu(two), "x": self.relu(self.stage2(three.sin()))}

    staged = staged_equals_eager(Odd(), X)
    assert all(
        set(cut.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") for cut in staged.cuts
    )


def test_macs_by_hand(trunk):
    staged = stage_model(trunk(), X)
    assert staged.plan.exit_macs() == (
        8 * 16 + 16 * 5,
        8 * 16 + 16 * 16 + 2 * 16 * 5,
        8 * 16 + 2 * 16 * 16 + 3 * 16 * 5,
    )
