"""Gates found in networks written the ways that people write them, staged and compared with the eager model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgekit.errors import CaptureError, ParityError
from edgekit.exporters import export_bundle, stage_model
from edgekit.exporters.stages import stage_module
from edgekit.runtimes.eager import EagerRuntime
from edgekit.session import Session


def through(soft, hard):
    return hard.detach() - soft.detach() + soft


def skip(net, x):
    mask = net.hard(x).view(-1, 1)
    return net.head(mask.expand_as(x) * net.f(x) + (1 - mask).expand_as(x) * x)


def residual(net, x):
    return net.head(x + net.hard(x)[:, None] * net.f(x))


def straight_through(net, x):
    prob = net.ask(x).softmax(1)[:, 1]
    mask = through(prob, (prob > 0.5).float()).view(-1, 1)
    return net.head(mask * net.f(x) + (1 - mask) * x)


def straight_through_the_other_way(net, x):
    prob = net.ask(x).sigmoid()[:, 1:]
    mask = prob + (torch.round(prob) - prob).detach()
    return net.head(x + mask * net.f(x))


def where(net, x):
    return net.head(torch.where((net.ask(x)[:, :1] > 0), net.f(x), x))


def masked_fill(net, x):
    closed = net.ask(x)[:, :1] <= 0
    return net.head(x + net.f(x).masked_fill(closed, 0.0))


def sign(net, x):
    return net.head(x + F.relu(torch.sign(net.ask(x)[:, :1])) * net.f(x))


def argmax(net, x):
    chosen = net.ask(x).argmax(1)
    return net.head(x + (chosen == 1).float().unsqueeze(1) * net.f(x))


def gumbel_one_hot(net, x):
    chosen = F.one_hot(net.ask(x).argmax(1), 2).float()
    return net.head(x + chosen[:, 1:] * net.f(x))


def rounded_in_place(net, x):
    policy = net.ask(x).sigmoid().clone()
    policy[policy < 0.5] = 0.0
    policy[policy >= 0.5] = 1.0
    mask = policy[:, 1].contiguous().float().view(-1, 1)
    return net.head(net.f(x) * mask + x * (1 - mask))


def addcmul(net, x):
    return net.head(torch.addcmul(x, net.hard(x)[:, None], net.f(x), value=0.5))


def lerp(net, x):
    return net.head(torch.lerp(x, net.f(x), net.hard(x)[:, None]))


def einsum(net, x):
    return net.head(x + torch.einsum("nc,n->nc", net.f(x), net.hard(x)))


def integer(net, x):
    return net.head(x + net.ask(x).argmax(1, keepdim=True) * net.f(x))


def shifted_sign(net, x):
    return net.head(x + (torch.sign(net.ask(x)[:, :1]) + 1) / 2 * net.f(x))


def where_tensor(net, x):
    return net.head(x + torch.where(net.ask(x)[:, :1] > 0, net.f(x), torch.tensor(0.0)))


def rectified(net, x):
    return net.head(x + F.relu(torch.tanh(net.ask(x)))[:, :1] * net.f(x))


def rectified_by_maximum(net, x):
    return net.head(x + torch.max(net.ask(x), torch.zeros(1))[:, :1] * net.f(x))


def scatter_into_data(net, x):
    soft = net.ask(x).softmax(1)
    hard = soft.data.clone().zero_().scatter_(1, soft.data.max(1, keepdim=True)[1], 1)
    return net.head(x + (hard - soft.data + soft)[:, 1:] * net.f(x))


def rows_listed(net, x):
    y, rows = x.clone(), torch.nonzero(net.ask(x)[:, 0] > 0).flatten()
    y[rows] = net.f(x[rows])
    return net.head(y)


def rows_by_mask(net, x):
    y, rows = x.clone(), net.ask(x)[:, 0] > 0
    y[rows] = net.f(x[rows])
    return net.head(y)


def rows_by_mask_in_place(net, x):
    y, rows = x.clone(), net.ask(x)[:, 0] > 0
    y[rows] += net.f(y[rows])
    return net.head(y)


def rows_of_a_result_by_mask(net, x):
    y, rows = torch.zeros_like(x), net.ask(x)[:, 0] > 0
    y[~rows] = net.f(x)[~rows]
    return net.head(x + y)


ONE_GATE = [skip, residual, straight_through, straight_through_the_other_way, where, masked_fill, sign, argmax]

ONE_GATE += [gumbel_one_hot, rounded_in_place, addcmul, lerp, einsum, integer, shifted_sign, where_tensor]

ONE_GATE += [
    rectified,
    rectified_by_maximum,
    scatter_into_data,
    rows_listed,
    rows_by_mask,
    rows_by_mask_in_place,
    rows_of_a_result_by_mask,
]


@pytest.mark.parametrize("forward", ONE_GATE, ids=lambda forward: forward.__name__)
def test_one_gate_guards_f(staged, Net, rows, forward):
    made = staged(Net(forward))
    assert [gate.name for gate in made.plan.gates] == ["f"]
    inside = [step.stage for step in (*made.plan.gates[0].steps, *made.plan.gates[0].otherwise)]
    assert [made.plan.stage(name).macs for name in inside] == [256]
    assert 0 < made.executed[inside[0]] < rows


def two_ways(net, x):
    mask = net.hard(x)[:, None]
    return net.head(mask * net.f(x) + (1 - mask) * net.g(x))


def two_ways_where(net, x):
    return net.head(torch.where(net.ask(x)[:, :1] > 0, net.f(x), net.g(x)))


def two_ways_complement(net, x):
    closed = net.hard(x)[:, None] == 0
    return net.head(closed * net.g(x) + ~closed * net.f(x))


@pytest.mark.parametrize("forward", [two_ways, two_ways_where, two_ways_complement], ids=lambda f: f.__name__)
def test_a_branch_runs_one_of_two(staged, Net, rows, forward):
    made = staged(Net(forward))
    (gate,) = made.plan.gates
    names = [step.stage for step in (*gate.steps, *gate.otherwise)]
    assert [made.plan.stage(name).macs for name in names] == [256, 256]
    assert sum(made.executed[name] for name in names) == rows
    assert all(made.executed[name] for name in names)


def test_a_policy_that_scales_keeps_its_scale(staged, Net):
    def forward(net, x):
        policy = (net.ask(x) > 0).float() * 2.0
        x = x + policy[:, :1] * net.f(x)
        return net.head(x + policy[:, 1:] * net.g(x))

    assert [gate.name for gate in staged(Net(forward)).plan.gates] == ["f", "g"]


def test_a_sample_that_halts_takes_no_later_step(staged, Net):
    def forward(net, x):
        going = torch.stack([net.hard(x), net.hard(x.tanh())], 1).cumprod(1)
        return net.head(x + going[:, :1] * net.f(x) + going[:, 1:] * net.g(x))

    assert [gate.name for gate in staged(Net(forward)).plan.gates] == ["f", "g"]


def test_an_input_that_only_a_gate_reads(Net, rows):
    class Two(Net):
        def forward(self, x, other):
            return self.head(x + self.hard(x)[:, None] * self.f(other))

    net, x, other = Two(None).eval(), torch.randn(rows, 8), torch.randn(rows, 8)
    made = stage_model(net, (x[:2], other[:2]), smallest_gate=1)
    assert [gate.name for gate in made.plan.gates] == ["f"]
    runtime = EagerRuntime({cut.name: stage_module(cut) for cut in made.cuts})
    with Session(made.plan, runtime, {}) as session:
        result = session.run((x.numpy(), other.numpy()))
    torch.testing.assert_close(torch.from_numpy(result.logits), made.eager([x, other])[0], rtol=1e-5, atol=1e-5)
    assert 0 < result.executed["f"] < rows


def test_gates_nest(staged, Net):
    def forward(net, x):
        outer, inner = net.hard(x)[:, None], (net.ask2(x)[:, :1] > 0).float()
        y = net.f(x)
        return net.head(x + outer * (y + inner * net.g(y)))

    made = staged(Net(forward))
    outer, inner = made.plan.gates
    assert inner in outer.steps
    assert (outer.name, inner.name) == ("f", "g")


def test_a_gate_asked_inside_another(staged, Net):
    def forward(net, x):
        y = net.f(x)
        inner = (net.ask2(y)[:, :1] > 0).float()
        return net.head(x + net.hard(x)[:, None] * (y + inner * net.g(y)))

    made = staged(Net(forward))
    assert [gate.name for gate in made.plan.gates] == ["f", "g"]
    assert made.plan.gates[1] in made.plan.gates[0].steps


def test_of_a_product_of_two_gates_the_second_is_asked_only_where_the_first_is_open(staged, Net, rows):
    def forward(net, x):
        both = net.hard(x)[:, None] * (net.ask2(x)[:, :1] > 0)
        return net.head(x + both * net.f(x))

    made = staged(Net(forward))
    outer, inner = made.plan.gates
    assert inner in outer.steps
    asked, ran = outer.steps[0].stage, inner.steps[0].stage
    assert rows > made.executed[asked] > made.executed[ran] > 0


def test_one_value_gates_two_places(staged, Net):
    def forward(net, x):
        mask = net.hard(x)[:, None]
        y = (x + mask * net.f(x)).tanh()
        y = net.h(y)
        return net.head(y + mask * net.g(y))

    made = staged(Net(forward))
    assert [gate.name for gate in made.plan.gates] == ["f", "g"]
    assert len({gate.value for gate in made.plan.gates}) == 1


def test_a_module_used_twice_is_gated_twice(staged, Net):
    def forward(net, x):
        y = x + net.hard(x)[:, None] * net.f(x)
        return net.head(y + net.hard(y)[:, None] * net.f(y))

    assert [gate.name for gate in staged(Net(forward)).plan.gates] == ["f", "f_2"]


def test_what_two_gates_share_runs_for_either(staged, Net):
    def forward(net, x):
        shared = net.h(x)
        one, two = net.hard(x)[:, None], (net.ask2(x)[:, :1] > 0).float()
        return net.head(x + one * net.f(shared) + two * net.g(shared))

    made = staged(Net(forward))
    assert sorted(gate.name for gate in made.plan.gates) == ["f", "g"]


def test_zeros_from_a_closed_gate_are_joined_to_other_features(staged, Net):
    def forward(net, x):
        return net.head(torch.cat([net.hard(x)[:, None] * net.f(x), x], 1)[:, :8] * 2)

    (gate,) = staged(Net(forward)).plan.gates
    assert [sources[1] for sources in gate.outputs.values()] == [""]


def test_gates_between_exits(staged, Net):
    def forward(net, x):
        mask = net.hard(x)[:, None]
        y = x + mask * net.f(x)
        early = net.early(y)
        z = y + (net.ask2(y)[:, :1] > 0) * net.g(y)
        return [early, net.head(z)]

    made = staged(Net(forward))
    kinds = [type(step).__name__ for step in made.plan.steps]
    assert kinds == ["Run", "Gate", "Run", "Exit", "Run", "Gate", "Run", "Exit"] or kinds.count("Gate") == 2
    first = made.plan.steps.index(made.plan.exits[0])
    assert made.plan.steps.index(made.plan.gates[0]) < first < made.plan.steps.index(made.plan.gates[1])


def test_returned_masks_and_gate_probabilities_are_not_taken_for_logits(staged, Net):
    def forward(net, x):
        prob = net.ask(x).softmax(1)
        mask = through(prob[:, 1], (prob[:, 1] > 0.5).float())[:, None]
        second = net.ask2(x).softmax(1)
        again = (second[:, 1:] > 0.5).float()
        y = x + mask * net.f(x)
        return net.head(y + again * net.g(y)), [mask, again], [prob.log(), second]

    made = staged(Net(forward))
    assert [point.path for point in made.exits] == ["0"]
    assert [gate.name for gate in made.plan.gates] == ["f", "g"]


def test_soft_attention_is_no_gate(staged, Net):
    def forward(net, x):
        y = net.f(x) * net.squeeze(x).sigmoid()
        y = y * net.ask(y).softmax(1)[:, :1]
        y = y * F.hardsigmoid(net.ask2(y)[:, :1])
        return net.head(F.relu(net.squeeze(y)) * F.relu(net.g(y)) * y)

    made = staged(Net(forward))
    assert not made.plan.gates
    assert not made.gates.findings


def test_a_mask_per_channel_saves_nothing_and_says_so(staged, Net):
    def forward(net, x):
        return net.head(x + (net.squeeze(x) > 0).float() * net.f(x))

    made = staged(Net(forward))
    assert not made.plan.gates
    (finding,) = made.gates.findings
    assert finding.gate is None
    assert finding.reason == "a mask of shape (8,) for each sample, not one number: everything is computed"
    assert "test_gates.py" in finding.product


def test_a_part_too_cheap_for_a_stage_stays_where_it_is(staged, Net):
    made = staged(Net(skip), smallest=1000)
    assert not made.plan.gates
    # It reads 8 numbers and the gate's truth value, and gives 8: 65 bytes, at 1,000 MACs for 10,000 of them.
    assert made.gates.findings[0].reason == (
        "it guards 256 MACs, fewer than a stage of its own and the 65 bytes that a sample would carry across its "
        "boundary cost (1006)"
    )


def test_bytes_that_cross_count_as_much_as_the_work():
    """The same MACs pay where little crosses, and do not where much does."""

    class Depthwise(nn.Module):
        def __init__(self, side, channels):
            super().__init__()
            self.f = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
            self.head = nn.Linear(channels, 3)
            self.side = side

        def forward(self, x):
            gate = (x[:, :1, :1, :1] > 0).float()
            return self.head((x + gate * self.f(x)).mean((2, 3)))

    class Dense(Depthwise):
        def __init__(self, side, channels):
            super().__init__(side, channels)
            self.f = nn.Conv2d(channels, channels, 3, padding=1)

    def gates(model, channels, side):
        return stage_model(model.eval(), torch.randn(2, channels, side, side), smallest_gate=10_000).gates

    thin, thick = gates(Depthwise(64, 1), 1, 64), gates(Dense(16, 16), 16, 16)
    assert not thin.gates  # 36,864 MACs for 32 KiB
    assert "36864 MACs" in thin.findings[0].reason
    assert "(42769)" in thin.findings[0].reason  # 10,000 + 32,768 + 1 byte of the gate's truth value
    assert [gate.macs for gate in thick.gates] == [589_824]  # for the same bytes


def test_a_constant_gate_is_computed_as_it_is(staged, Net):
    made = staged(Net(lambda net, x: net.head(x + torch.ones(len(x), 1).round() * net.f(x))))
    assert not made.plan.gates


def test_a_gate_on_its_own_result_cannot_leave_it_out(staged, Net):
    def forward(net, x):
        y = net.f(x)
        return net.head(x + (net.ask(y)[:, :1] > 0).float() * y)

    assert not staged(Net(forward)).plan.gates


def test_recurrent_state_with_the_batch_as_its_second_dimension_crosses(staged, Net):
    class Recurrent(Net):
        def __init__(self):
            super().__init__(None)
            self.rnn = nn.LSTM(8, 4)
            self.to_mask = nn.Linear(4, 1)
            self.hidden = None

        def mask(self, x):
            out, self.hidden = self.rnn(x[None], self.hidden)
            return (self.to_mask(out[0]).sigmoid() > 0.5).float()

        def forward(self, x):
            self.hidden = (torch.zeros(1, len(x), 4), torch.zeros(1, len(x), 4))
            x = x + self.mask(x) * self.f(x)
            x = x + self.mask(x) * self.g(x)
            return self.head(x + self.mask(x) * self.h(x))

    made = staged(Recurrent())
    assert [gate.name for gate in made.plan.gates] == ["f", "g", "h"]
    assert all(stage.macs is not None for stage in made.plan.stages)


def test_sampling_is_refused_with_its_line(staged, Net):
    with pytest.raises(CaptureError, match=r"samples at random .* with aten.bernoulli|differs between two runs"):
        staged(Net(lambda net, x: net.head(x + torch.bernoulli(net.ask(x)[:, :1].sigmoid()) * net.f(x))))


def test_an_infinity_that_a_closed_gate_would_multiply_by_zero_is_refused(Net, tmp_path):
    def forward(net, x):
        return net.head(x + net.hard(x)[:, None] * (net.f(x) + 1 / F.relu(net.ask(x)[:, :1])))

    with pytest.raises(ParityError, match=r"NaN or infinity where the eager model has none.* 0 × inf"):
        export_bundle(Net(forward).eval(), torch.randn(4, 8), tmp_path / "net.edgekit", smallest_gate=1)
    assert not list(tmp_path.iterdir())
