"""Mixtures of experts written the ways that people write them: experts run on the rows that chose them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgekit.exporters import stage_model
from edgekit.plan import Run


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
def test_experts_run_on_the_rows_that_chose_them(staged, Net, rows, forward):
    made = staged(Net(forward))
    runs = [step for gate in made.plan.gates for step in gate.steps if isinstance(step, Run)]
    experts = [made.plan.stage(step.stage) for step in runs]
    assert sorted(gate.name for gate in made.plan.gates) == [f"experts.{index}" for index in range(4)]
    assert [stage.macs for stage in experts] == [256] * 4
    assert sum(made.executed[stage.name] for stage in experts) == MIXTURES[forward] * rows


@pytest.mark.parametrize("listed", ["rows", "pairs", "mask"])
def test_experts_with_layers_that_ask_whether_there_is_any_row(staged, rows, listed):
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
    assert sum(made.executed[name] for name in heavy) == 2 * rows


def test_pairs_that_may_hold_a_row_twice_are_not_taken_for_rows(staged, Net):
    """Only distinct choices are: here a row may be listed twice, or no row at all, and is run as it is."""

    def forward(net, x):
        chosen = torch.stack([net.ask(x).argmax(1), net.ask2(x).argmax(1)], 1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(net.experts[:3]):
            rows, places = torch.where(chosen == index)
            y = y.index_add(0, rows, expert(x[rows]) * (places + 1)[:, None])
        return net.head(y)

    assert not staged(Net(forward)).plan.gates


def test_masked_rows_that_look_at_each_other_stay_as_they_are(Net):
    def forward(net, x):
        y, rows = x.clone(), net.ask(x)[:, 0] > 0
        chosen = net.f(x[rows])
        y[rows] = chosen - chosen.mean(0)
        return net.head(y)

    made = stage_model(Net(forward).eval(), torch.randn(4, 8), smallest_gate=1)
    assert not made.plan.gates


def test_two_masks_of_rows_for_one_result_stay_as_they_are(staged, Net):
    def forward(net, x):
        y = x.clone()
        y[net.ask(x)[:, 0] > 0] += net.f(y[net.ask(x)[:, 0] > 0])
        return net.head(y)

    assert not staged(Net(forward)).plan.gates
