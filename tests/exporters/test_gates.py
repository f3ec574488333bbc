"""Gates found in networks written the ways that people write them, staged and compared with the eager model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import edgekit
from edgekit.calibration import Audit
from edgekit.errors import CaptureError, ParityError, PolicyError
from edgekit.exporters import export_bundle, stage_model
from edgekit.exporters.stages import stage_module
from edgekit.plan import Run
from edgekit.runtimes.eager import EagerRuntime
from edgekit.session import Session

ROWS = 9


def staged(model, *, smallest=1, rows=ROWS, exits=None):
    """Stages a network and compares it, alone and in batches, free and with its gates forced."""
    torch.manual_seed(1)
    x = torch.randn(rows, 8)
    made = stage_model(model.eval(), x[:2], exits=exits, smallest_gate=smallest)
    expected = made.eager([x])
    runtime = EagerRuntime({cut.name: stage_module(cut) for cut in made.cuts})
    with Session(made.plan, runtime, {}) as session:
        for batch in (slice(0, rows), slice(3, 5), *(slice(row, row + 1) for row in range(rows))):
            given_rows = x[batch].numpy()
            for one, other in zip(session.run_exits(given_rows), expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(one), other[batch], rtol=1e-5, atol=1e-5)
            last = torch.from_numpy(session.run(given_rows).logits)
            torch.testing.assert_close(last, expected[-1][batch], rtol=1e-5, atol=1e-5)
        for gates, whole in made.forced([x]):
            few = x[: len(whole[-1])].numpy()
            for rows_given, answer in ((few, whole[-1]), (few[:1], whole[-1][:1])):
                last = torch.from_numpy(session.run(rows_given, exit=len(made.exits) - 1, gates=gates).logits)
                torch.testing.assert_close(last, answer, rtol=1e-5, atol=1e-5)
        made.executed = session.run(x.numpy()).executed
    return made


class Net(nn.Module):
    """Layers to write a forward with."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.f, self.g, self.h = (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3))
        self.ask, self.ask2 = nn.Linear(8, 2), nn.Linear(8, 2)
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4))
        self.head, self.early = nn.Linear(8, 3), nn.Linear(8, 3)
        self.squeeze = nn.Linear(8, 8)
        self.write = forward

    def hard(self, x):
        return (self.ask(x)[:, 0] > 0).float()

    def forward(self, x):
        return self.write(self, x)


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
def test_one_gate_guards_f(forward):
    made = staged(Net(forward))
    assert [gate.name for gate in made.plan.gates] == ["f"]
    inside = [step.stage for step in (*made.plan.gates[0].steps, *made.plan.gates[0].otherwise)]
    assert [made.plan.stage(name).macs for name in inside] == [256]
    assert 0 < made.executed[inside[0]] < ROWS


def two_ways(net, x):
    mask = net.hard(x)[:, None]
    return net.head(mask * net.f(x) + (1 - mask) * net.g(x))


def two_ways_where(net, x):
    return net.head(torch.where(net.ask(x)[:, :1] > 0, net.f(x), net.g(x)))


def two_ways_complement(net, x):
    closed = net.hard(x)[:, None] == 0
    return net.head(closed * net.g(x) + ~closed * net.f(x))


@pytest.mark.parametrize("forward", [two_ways, two_ways_where, two_ways_complement], ids=lambda f: f.__name__)
def test_a_branch_runs_one_of_two(forward):
    made = staged(Net(forward))
    (gate,) = made.plan.gates
    names = [step.stage for step in (*gate.steps, *gate.otherwise)]
    assert [made.plan.stage(name).macs for name in names] == [256, 256]
    assert sum(made.executed[name] for name in names) == ROWS
    assert all(made.executed[name] for name in names)


def masked_sum(net, x):
    values, chosen = net.router(x).topk(2, dim=1)
    gates = torch.zeros(len(x), 4).scatter(1, chosen, values.softmax(1))
    y = torch.zeros_like(x)
    for index, expert in enumerate(net.experts):
        y = y + gates[:, index : index + 1] * expert(x)
    return net.head(y)


def python_sum(net, x):
    gates = F.one_hot(net.router(x).argmax(1), 4) * net.router(x).softmax(1)
    return net.head(sum(gates[:, index, None] * expert(x) for index, expert in enumerate(net.experts)))


def stacked(net, x):
    logits = net.router(x)
    kept = logits >= logits.topk(2, dim=1).values[:, -1:]
    gates = logits.masked_fill(~kept, float("-inf")).softmax(1)
    return net.head((torch.stack([expert(x) for expert in net.experts], 1) * gates.unsqueeze(-1)).sum(1))


def dispatch(net, x):
    gates = F.one_hot(net.router(x).argmax(1), 4) * net.router(x).softmax(1)
    y = torch.zeros_like(x)
    for index, expert in enumerate(net.experts):
        rows = gates[:, index].nonzero().squeeze(1)
        y = y.index_add(0, rows, expert(x.index_select(0, rows)) * gates[rows, index].unsqueeze(1))
    return net.head(y)


def dispatch_in_place(net, x):
    weights, chosen = net.router(x).softmax(1).max(1)
    y = torch.zeros_like(x)
    for index, expert in enumerate(net.experts):
        rows = torch.where(chosen == index)[0]
        y[rows] = expert(x[rows]) * weights[rows, None]
    return net.head(y)


def dispatch_of_pairs(net, x):
    """As in Mixtral: pairs of a place among the choices and a row."""
    weights, chosen = torch.topk(net.router(x).softmax(1), 2, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    mask = F.one_hot(chosen, num_classes=4).permute(2, 1, 0)
    y = torch.zeros(x.shape, dtype=x.dtype)
    for index, expert in enumerate(net.experts):
        places, rows = torch.where(mask[index])
        result = expert(x[None, rows].reshape(-1, 8)) * weights[rows, places, None]
        y.index_add_(0, rows, result.to(x.dtype))
    return net.head(y)


def dispatch_of_pairs_in_place(net, x):
    weights, chosen = torch.topk(net.router(x).softmax(1), 2, dim=1)
    y = torch.zeros_like(x)
    for index, expert in enumerate(net.experts):
        rows, places = torch.where(chosen == index)
        y[rows] += weights[rows, places, None] * expert(x[rows])
    return net.head(y)


def sorted_dispatch(net, x, *, weighted=True):
    values, chosen = net.router(x).softmax(1).topk(2, dim=1)
    gates = torch.zeros(len(x), 4).scatter(1, chosen, values)
    experts, order = torch.nonzero(gates).sort(0)
    rows = torch.nonzero(gates)[order[:, 1], 0]
    weights = torch.gather(gates[rows.flatten()], 1, experts.split(1, dim=1)[1])
    parts = torch.split(x[rows].squeeze(1), (gates > 0).sum(0).tolist(), dim=0)
    outputs = torch.cat([expert(part) for expert, part in zip(net.experts, parts, strict=True)], 0).sin()
    outputs = outputs.mul(weights) if weighted else outputs
    return net.head(torch.zeros(len(x), 8).index_add(0, rows, outputs.float()))


def sorted_dispatch_without_weights(net, x):
    return sorted_dispatch(net, x, weighted=False)


def selected(net, x):
    results = torch.stack([expert(x) for expert in net.experts], 1)
    return net.head(results[torch.arange(len(x)), net.router(x).argmax(1)])


def selected_of_a_list(net, x):
    results = torch.stack([expert(x) for expert in net.experts])
    return net.head(results[net.router(x).argmax(1), torch.arange(len(x))])


def selected_from_the_end(net, x):
    results = torch.stack([expert(x) for expert in net.experts], 1)
    return net.head(results[torch.arange(len(x)), net.router(x).argmax(1) - 1])


def gathered(net, x):
    weights, chosen = net.router(x).softmax(1).max(1)
    results = torch.cat([expert(x).unsqueeze(1) for expert in net.experts], 1)
    return net.head(weights[:, None] * results.gather(1, chosen.view(-1, 1, 1).expand(-1, 1, 8)).squeeze(1))


def gathered_of_a_list(net, x):
    results = torch.stack([expert(x) for expert in net.experts])
    return net.head(results.gather(0, net.router(x).argmax(1).view(1, -1, 1).expand(1, -1, 8))[0])


def gathered_best(net, x):
    values, chosen = net.router(x).topk(2, dim=1)
    results = torch.stack([expert(x) for expert in net.experts], 1)
    best = results.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 8))
    return net.head((best * values.softmax(1).unsqueeze(-1)).sum(1))


def summed_by_einsum(net, x):
    gates = F.one_hot(net.router(x).argmax(1), 4).float()
    return net.head(torch.einsum("be,ebd->bd", gates, torch.stack([expert(x) for expert in net.experts])))


def summed_by_matrix_product(net, x):
    gates = F.one_hot(net.router(x).argmax(1), 4).float()
    return net.head(torch.bmm(gates.unsqueeze(1), torch.stack([expert(x) for expert in net.experts], 1)).squeeze(1))


MIXTURES = {
    dispatch_of_pairs: 2,
    dispatch_of_pairs_in_place: 2,
    sorted_dispatch: 2,
    sorted_dispatch_without_weights: 2,
    masked_sum: 2,
    python_sum: 1,
    stacked: 2,
    dispatch: 1,
    dispatch_in_place: 1,
    selected: 1,
    selected_of_a_list: 1,
    selected_from_the_end: 1,
    gathered: 1,
    gathered_of_a_list: 1,
    gathered_best: 2,
    summed_by_einsum: 1,
    summed_by_matrix_product: 1,
}


@pytest.mark.parametrize("forward", MIXTURES, ids=lambda forward: forward.__name__)
def test_experts_run_on_the_rows_that_chose_them(forward):
    made = staged(Net(forward))
    runs = [step for gate in made.plan.gates for step in gate.steps if isinstance(step, Run)]
    experts = [made.plan.stage(step.stage) for step in runs]
    assert sorted(gate.name for gate in made.plan.gates) == [f"experts.{index}" for index in range(4)]
    assert [stage.macs for stage in experts] == [256] * 4
    assert sum(made.executed[stage.name] for stage in experts) == MIXTURES[forward] * ROWS


@pytest.mark.parametrize("listed", ["rows", "pairs", "mask"])
def test_experts_with_layers_that_ask_whether_there_is_any_row(listed):
    """Convolutions and batch norm on dispatched rows."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.router, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4), nn.Linear(4, 3)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(4)
            )

        def forward(self, x):
            x = self.stem(x.view(-1, 1, 4, 2))
            weights, chosen = (self.router(x.mean((2, 3))) * 20).softmax(1).topk(2, dim=1)
            y = torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                weight = (weights * (chosen == index)).sum(1)
                if listed == "mask":
                    mask = (chosen == index).any(1)
                    y[mask] = y[mask] + expert(x[mask]) * weight[mask].view(-1, 1, 1, 1)
                elif listed == "rows":
                    rows = torch.nonzero((chosen == index).any(1)).flatten()
                    y = y.index_add(0, rows, expert(x[rows]) * weight[rows].view(-1, 1, 1, 1))
                else:
                    rows, places = torch.where(chosen == index)
                    y[rows] += weights[rows, places].view(-1, 1, 1, 1) * expert(x[rows])
            return self.head(y.mean((2, 3)))

    made = staged(Net(), smallest=1000)
    assert made.captured.route == "torch.export non-strict"
    # Where a sum of weights guards an expert besides the list of rows, one gate lies in the other.
    assert {gate.name.removesuffix("_2") for gate in made.plan.gates} == {f"experts.{index}.0" for index in range(4)}
    runs = [step.stage for gate in made.plan.gates for step in gate.steps if isinstance(step, Run)]
    heavy = [name for name in runs if (made.plan.stage(name).macs or 0) >= 1000]
    assert len(heavy) == 4
    assert sum(made.executed[name] for name in heavy) == 2 * ROWS


def test_pairs_that_may_hold_a_row_twice_are_not_taken_for_rows():
    """Only distinct choices are: here a row may be listed twice, or no row at all, and is run as it is."""

    def forward(net, x):
        chosen = torch.stack([net.ask(x).argmax(1), net.ask2(x).argmax(1)], 1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(net.experts[:3]):
            rows, places = torch.where(chosen == index)
            y = y.index_add(0, rows, expert(x[rows]) * (places + 1)[:, None])
        return net.head(y)

    assert not staged(Net(forward)).plan.gates


def test_a_policy_that_scales_keeps_its_scale():
    def forward(net, x):
        policy = (net.ask(x) > 0).float() * 2.0
        x = x + policy[:, :1] * net.f(x)
        return net.head(x + policy[:, 1:] * net.g(x))

    assert [gate.name for gate in staged(Net(forward)).plan.gates] == ["f", "g"]


def test_a_sample_that_halts_takes_no_later_step():
    def forward(net, x):
        going = torch.stack([net.hard(x), net.hard(x.tanh())], 1).cumprod(1)
        return net.head(x + going[:, :1] * net.f(x) + going[:, 1:] * net.g(x))

    assert [gate.name for gate in staged(Net(forward)).plan.gates] == ["f", "g"]


def test_masked_rows_that_look_at_each_other_stay_as_they_are():
    def forward(net, x):
        y, rows = x.clone(), net.ask(x)[:, 0] > 0
        chosen = net.f(x[rows])
        y[rows] = chosen - chosen.mean(0)
        return net.head(y)

    made = stage_model(Net(forward).eval(), torch.randn(4, 8), smallest_gate=1)
    assert not made.plan.gates


def test_two_masks_of_rows_for_one_result_stay_as_they_are():
    def forward(net, x):
        y = x.clone()
        y[net.ask(x)[:, 0] > 0] += net.f(y[net.ask(x)[:, 0] > 0])
        return net.head(y)

    assert not staged(Net(forward)).plan.gates


def test_an_input_that_only_a_gate_reads():
    class Two(Net):
        def forward(self, x, other):
            return self.head(x + self.hard(x)[:, None] * self.f(other))

    net, x, other = Two(None).eval(), torch.randn(ROWS, 8), torch.randn(ROWS, 8)
    made = stage_model(net, (x[:2], other[:2]), smallest_gate=1)
    assert [gate.name for gate in made.plan.gates] == ["f"]
    runtime = EagerRuntime({cut.name: stage_module(cut) for cut in made.cuts})
    with Session(made.plan, runtime, {}) as session:
        result = session.run((x.numpy(), other.numpy()))
    torch.testing.assert_close(torch.from_numpy(result.logits), made.eager([x, other])[0], rtol=1e-5, atol=1e-5)
    assert 0 < result.executed["f"] < ROWS


def test_gates_nest():
    def forward(net, x):
        outer, inner = net.hard(x)[:, None], (net.ask2(x)[:, :1] > 0).float()
        y = net.f(x)
        return net.head(x + outer * (y + inner * net.g(y)))

    made = staged(Net(forward))
    outer, inner = made.plan.gates
    assert inner in outer.steps
    assert (outer.name, inner.name) == ("f", "g")


def test_a_gate_asked_inside_another():
    def forward(net, x):
        y = net.f(x)
        inner = (net.ask2(y)[:, :1] > 0).float()
        return net.head(x + net.hard(x)[:, None] * (y + inner * net.g(y)))

    made = staged(Net(forward))
    assert [gate.name for gate in made.plan.gates] == ["f", "g"]
    assert made.plan.gates[1] in made.plan.gates[0].steps


def test_of_a_product_of_two_gates_the_second_is_asked_only_where_the_first_is_open():
    def forward(net, x):
        both = net.hard(x)[:, None] * (net.ask2(x)[:, :1] > 0)
        return net.head(x + both * net.f(x))

    made = staged(Net(forward))
    outer, inner = made.plan.gates
    assert inner in outer.steps
    asked, ran = outer.steps[0].stage, inner.steps[0].stage
    assert ROWS > made.executed[asked] > made.executed[ran] > 0


def test_one_value_gates_two_places():
    def forward(net, x):
        mask = net.hard(x)[:, None]
        y = (x + mask * net.f(x)).tanh()
        y = net.h(y)
        return net.head(y + mask * net.g(y))

    made = staged(Net(forward))
    assert [gate.name for gate in made.plan.gates] == ["f", "g"]
    assert len({gate.value for gate in made.plan.gates}) == 1


def test_a_module_used_twice_is_gated_twice():
    def forward(net, x):
        y = x + net.hard(x)[:, None] * net.f(x)
        return net.head(y + net.hard(y)[:, None] * net.f(y))

    assert [gate.name for gate in staged(Net(forward)).plan.gates] == ["f", "f_2"]


def test_what_two_gates_share_runs_for_either():
    def forward(net, x):
        shared = net.h(x)
        one, two = net.hard(x)[:, None], (net.ask2(x)[:, :1] > 0).float()
        return net.head(x + one * net.f(shared) + two * net.g(shared))

    made = staged(Net(forward))
    assert sorted(gate.name for gate in made.plan.gates) == ["f", "g"]


def test_zeros_from_a_closed_gate_are_joined_to_other_features():
    def forward(net, x):
        return net.head(torch.cat([net.hard(x)[:, None] * net.f(x), x], 1)[:, :8] * 2)

    (gate,) = staged(Net(forward)).plan.gates
    assert [sources[1] for sources in gate.outputs.values()] == [""]


def test_gates_between_exits():
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


def test_returned_masks_and_gate_probabilities_are_not_taken_for_logits():
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


def test_soft_attention_is_no_gate():
    def forward(net, x):
        y = net.f(x) * net.squeeze(x).sigmoid()
        y = y * net.ask(y).softmax(1)[:, :1]
        y = y * F.hardsigmoid(net.ask2(y)[:, :1])
        return net.head(F.relu(net.squeeze(y)) * F.relu(net.g(y)) * y)

    made = staged(Net(forward))
    assert not made.plan.gates
    assert not made.gates.findings


def test_a_mask_per_channel_saves_nothing_and_says_so():
    made = staged(Net(lambda net, x: net.head(x + (net.squeeze(x) > 0).float() * net.f(x))))
    assert not made.plan.gates
    (finding,) = made.gates.findings
    assert finding.gate is None
    assert finding.reason == "a mask of shape (8,) for each sample, not one number: everything is computed"
    assert "test_gates.py" in finding.product


def test_a_part_too_cheap_for_a_stage_stays_where_it_is():
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


def test_a_constant_gate_is_computed_as_it_is():
    made = staged(Net(lambda net, x: net.head(x + torch.ones(len(x), 1).round() * net.f(x))))
    assert not made.plan.gates


def test_a_gate_on_its_own_result_cannot_leave_it_out():
    def forward(net, x):
        y = net.f(x)
        return net.head(x + (net.ask(y)[:, :1] > 0).float() * y)

    assert not staged(Net(forward)).plan.gates


def test_recurrent_state_with_the_batch_as_its_second_dimension_crosses():
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


def test_sampling_is_refused_with_its_line():
    with pytest.raises(CaptureError, match=r"samples at random .* with aten.bernoulli|differs between two runs"):
        staged(Net(lambda net, x: net.head(x + torch.bernoulli(net.ask(x)[:, :1].sigmoid()) * net.f(x))))


class Random(nn.Module):
    """A random nest of gates, branches, shared modules and exits."""

    def __init__(self, draw):
        super().__init__()
        torch.manual_seed(draw(st.integers(0, 10**6)))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.asks = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(3))
        self.program = [self.draw(draw, 3) for _ in range(draw(st.integers(1, 3)))]

    def draw(self, draw, depth):
        kinds = ["layer"] if depth == 0 else ["layer", "skip", "scale", "where", "zero", "chain"]
        kind = draw(st.sampled_from(kinds))
        if kind == "layer":
            return kind, draw(st.integers(0, 3))
        ask = draw(st.integers(0, 2))
        if kind in ("where", "chain"):
            return kind, ask, self.draw(draw, depth - 1), self.draw(draw, depth - 1)
        return kind, ask, self.draw(draw, depth - 1)

    def do(self, step, x):
        kind = step[0]
        if kind == "layer":
            return self.layers[step[1]](x).tanh()
        if kind == "chain":
            return self.do(step[3], self.do(step[2], x))
        soft = self.asks[step[1]](x)
        mask = (soft > 0).float()
        if kind == "skip":
            return mask * self.do(step[2], x) + (1 - mask) * x
        if kind == "scale":
            return x + mask * soft.sigmoid() * self.do(step[2], x)
        if kind == "zero":
            return (mask * self.do(step[2], x) + 1).sin()
        return torch.where(mask > 0, self.do(step[2], x), self.do(step[3], x))

    def forward(self, x):
        logits = []
        for step, head in zip(self.program, self.heads, strict=False):
            x = self.do(step, x)
            logits.append(head(x))
        return logits


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_random_networks(data):
    staged(Random(data.draw), rows=5)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_500_random_networks(part, data):
    staged(Random(data.draw), rows=5)


def test_ties_go_to_the_lowest_index_in_every_runtime(tmp_path):
    def forward(net, x):
        values, chosen = (net.router(x) * 0).topk(2, dim=1)
        gates = torch.zeros(len(x), 4).scatter(1, chosen, values.softmax(1))
        y = sum(gates[:, index, None] * expert(x) for index, expert in enumerate(net.experts))
        return net.head(y)

    net = Net(forward).eval()
    x = torch.randn(5, 8)
    with torch.no_grad():
        expected = net.head((net.experts[0](x) + net.experts[1](x)) / 2)
    bundle = export_bundle(net, x[:2], tmp_path / "ties.edgekit", smallest_gate=1)
    assert "8 of 8 golden samples tie in a top-k: the lowest index is taken" in bundle.manifest.notes
    made = stage_model(net, x[:2], smallest_gate=1)
    eager = EagerRuntime({cut.name: stage_module(cut) for cut in made.cuts})
    with Session.open(bundle) as onnx, Session(made.plan, eager, {}) as reference:
        for session in (onnx, reference):
            for rows in (x, x[:1]):
                result = session.run(rows.numpy())
                torch.testing.assert_close(torch.from_numpy(result.logits), expected[: len(rows)])
                assert [result.executed[f"experts.{index}"] for index in range(4)] == [len(rows), len(rows), 0, 0]


class Compared(nn.Module):
    """Blocks that are run where a probability is above a number, one number for two of them."""

    def __init__(self, written):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3))
        self.ask, self.policy, self.head = nn.Linear(8, 1), nn.Linear(8, 2), nn.Linear(8, 3)
        self.number, self.written = 0.5, written

    def forward(self, x):
        mask = self.written(torch.sigmoid(self.ask(x)), self.number)
        x = x + mask * self.blocks[0](x)
        chosen = (torch.sigmoid(self.policy(x)) >= self.number).float()
        for index in (0, 1):
            x = x + chosen[:, index, None] * self.blocks[1 + index](x)
        return self.head(x)


@pytest.mark.parametrize(
    "written",
    [lambda p, c: (p > c).float(), lambda p, c: 1 - (p < c).float(), lambda p, c: (p >= c).float() - p.detach() + p],
)
def test_what_a_gate_compares_its_score_with_is_an_input(written, tmp_path):
    net, x = Compared(written).eval(), torch.randn(16, 8)
    bundle = export_bundle(net, x[:2], tmp_path / "net.edgekit", smallest_gate=1)
    one, two = bundle.plan.constants
    assert (one.gates, two.gates) == (("blocks.0",), ("blocks.1", "blocks.2"))
    assert (one.value, two.value, two.comparison) == (0.5, 0.5, ">=")
    assert bundle.manifest.parity["onnx"]["gate_settings_compared"] >= 4
    with Session.open(bundle) as session:
        ran = set()
        for number in (0.3, 0.45, 0.5, 0.55, 0.7):
            net.number = number
            session.use(edgekit.Policy.fixed([], constants={one.name: number, two.name: number}))
            with torch.no_grad():
                expected = net(x)
            for batch in (slice(0, 16), slice(3, 4)):
                torch.testing.assert_close(
                    torch.from_numpy(session.run(x[batch].numpy()).logits), expected[batch], rtol=0, atol=1e-5
                )
            ran.add(tuple(session.run(x.numpy()).executed.values()))
        assert len(ran) > 3
        session.use(edgekit.Policy.fixed([]))
        net.number = 0.5
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(session.run(x.numpy()).logits), net(x), rtol=0, atol=1e-5)
        policy = edgekit.Policy.fixed([], constants={one.name: 0.9, two.name: 0.9})
        session.use(policy)
        served = session.run(x.numpy()).logits.argmax(1)
        with Audit(session, epsilon=0.05, fraction=1.0) as audit:  # the loss is against the gates as trained
            assert (audit.run(x.numpy()).logits.argmax(1) == served).all()
            with torch.no_grad():
                assert audit.status().mean == pytest.approx((served != net(x).argmax(1).numpy()).mean())
        assert session.policy is policy
        with pytest.raises(
            PolicyError, match=r"has a constant 'blocks.9', the network's gates have blocks.0, blocks.1"
        ):
            session.use(edgekit.Policy.fixed([], constants={"blocks.9": 0.1}))


def test_counts_and_ranks_have_no_constant_to_move():
    """What is compared is hard itself, or an integer: there is nothing between its values."""
    assert not staged(Net(dispatch_in_place)).plan.constants


def among_themselves(net, y):
    """Attention between the samples of a batch."""
    return torch.softmax(y @ y.T, 1) @ net.f(y)


MIXING = {
    "statistics": lambda net, y: net.f((y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()),
    "all pairs": among_themselves,
    "batch norm": lambda net, y: net.f(F.batch_norm(y, None, None, training=True)),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", list(MIXING))
def test_what_mixes_rows_inside_a_gate_is_run_for_all_if_one_needs_it(kind, threads, tmp_path):
    def forward(net, x):
        y = x + net.hard(x)[:, None] * MIXING[kind](net, x)
        return net.early(y), net.head(y + net.h(y))

    net = Net(forward).eval()
    export_bundle(net, torch.randn(4, 8), tmp_path / "net.edgekit", smallest_gate=1)
    with edgekit.load(tmp_path / "net.edgekit", threads=threads) as session:
        (note,) = [note for note in session.bundle.manifest.notes if "mixes the samples" in note]
        assert "test_gates.py" in note
        (gate,) = session.plan.gates
        assert gate.whole
        stages = [step.stage for step in gate.steps]
        for seed in range(4):
            x = torch.randn(9, 8, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                is_open, expected = net.hard(x) != 0, net(x)
            assert 0 < int(is_open.sum()) < 9
            for index, each in enumerate(expected):
                result = session.run(x.numpy(), exit=index)
                torch.testing.assert_close(torch.from_numpy(result.logits), each, rtol=0, atol=1e-4)
                assert [result.executed[stage] for stage in stages] == [9] * len(stages)
        closed = x[~is_open].numpy()
        assert [session.run(closed).executed[stage] for stage in stages] == [0] * len(stages)


def test_what_mixes_rows_is_found_even_if_it_was_never_open():
    def forward(net, x):
        mask = (net.ask(x)[:, :1] > 1000).float()
        return net.head(x + mask * net.f(x - x.mean(0, keepdim=True)))

    made = stage_model(Net(forward).eval(), torch.randn(4, 8), smallest_gate=1)
    assert [gate.whole for gate in made.plan.gates] == [True]


def test_a_gate_inside_one_that_mixes_rows():
    def forward(net, x):
        inner = x + net.hard(-x)[:, None] * net.g(x)
        return net.head(x + net.hard(x)[:, None] * net.f(inner - inner.mean(0)))

    net = Net(forward).eval()
    made = stage_model(net, torch.randn(4, 8), smallest_gate=1)
    assert {gate.name: gate.whole for gate in made.plan.gates} == {"g": True, "g_2": False}
    runtime = EagerRuntime({cut.name: stage_module(cut) for cut in made.cuts})
    x = torch.randn(9, 8)
    with Session(made.plan, runtime, {}) as session, torch.no_grad():
        result = session.run(x.numpy())
        torch.testing.assert_close(torch.from_numpy(result.logits), net(x), rtol=0, atol=1e-5)
        asked = int((net.hard(-x) != 0).sum())
    inner = made.plan.gates[1]
    assert 0 < asked < 9
    assert [result.executed[run.stage] for run in inner.steps] == [asked] * len(inner.steps)
    assert 9 in result.executed.values()


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda net, x: net.head(net.f(x - x.mean(0)) + net.hard(x)[:, None] * net.g(x)),
            r"exit '.+' answers otherwise when other samples are in the batch: mean 'mean' \(line \d+ of test_gates.py",
        ),
        (
            lambda net, x: (net.early(x), net.head(x + net.hard(x)[:, None] * net.f(x - x.mean(0)))),
            r"gate 'f' guards mixes the samples of a batch \(mean .*samples may have left at exit '.+' before it",
        ),
    ],
    ids=["outside every gate", "behind an exit"],
)
def test_rows_that_are_mixed_elsewhere_are_refused(forward, message, tmp_path):
    with pytest.raises(CaptureError, match=message):
        export_bundle(Net(forward).eval(), torch.randn(4, 8), tmp_path / "net.edgekit", smallest_gate=1)
    assert not list(tmp_path.iterdir())


def test_rows_that_are_sorted_and_put_back_are_no_mixture():
    def forward(net, x):
        order = x[:, 0].argsort()
        y = net.f(x[order])[order.argsort()]
        return net.head(x + net.hard(x)[:, None] * y)

    made = staged(Net(forward))
    assert not any(gate.whole for gate in made.plan.gates)


def test_an_infinity_that_a_closed_gate_would_multiply_by_zero_is_refused(tmp_path):
    def forward(net, x):
        return net.head(x + net.hard(x)[:, None] * (net.f(x) + 1 / F.relu(net.ask(x)[:, :1])))

    with pytest.raises(ParityError, match=r"NaN or infinity where the eager model has none.* 0 × inf"):
        export_bundle(Net(forward).eval(), torch.randn(4, 8), tmp_path / "net.edgekit", smallest_gate=1)
    assert not list(tmp_path.iterdir())
