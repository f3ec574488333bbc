"""Samples that need one another: run together inside a gate, refused elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import edgekit
from edgekit.errors import CaptureError
from edgekit.exporters import export_bundle, stage_model
from edgekit.exporters.stages import stage_module
from edgekit.runtimes.eager import EagerRuntime
from edgekit.session import Session


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
def test_what_mixes_rows_inside_a_gate_is_run_for_all_if_one_needs_it(Net, kind, threads, tmp_path):
    def forward(net, x):
        y = x + net.hard(x)[:, None] * MIXING[kind](net, x)
        return net.early(y), net.head(y + net.h(y))

    net = Net(forward).eval()
    export_bundle(net, torch.randn(4, 8), tmp_path / "net.edgekit", smallest_gate=1)
    with edgekit.load(tmp_path / "net.edgekit", threads=threads) as session:
        (note,) = [note for note in session.bundle.manifest.notes if "mixes the samples" in note]
        assert "test_mixing.py" in note
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


def test_what_mixes_rows_is_found_even_if_it_was_never_open(Net):
    def forward(net, x):
        mask = (net.ask(x)[:, :1] > 1000).float()
        return net.head(x + mask * net.f(x - x.mean(0, keepdim=True)))

    made = stage_model(Net(forward).eval(), torch.randn(4, 8), smallest_gate=1)
    assert [gate.whole for gate in made.plan.gates] == [True]


def test_a_gate_inside_one_that_mixes_rows(Net):
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
    ("written", "message"),
    [
        (
            lambda net, x: net.head(net.f(x - x.mean(0)) + net.hard(x)[:, None] * net.g(x)),
            r"exit '.+' answers otherwise when other samples are in the batch: mean 'mean' "
            r"\(line \d+ of test_mixing.py",
        ),
        (
            lambda net, x: (net.early(x), net.head(x + net.hard(x)[:, None] * net.f(x - x.mean(0)))),
            r"gate 'f' guards mixes the samples of a batch \(mean .*samples may have left at exit '.+' before it",
        ),
    ],
    ids=["outside every gate", "behind an exit"],
)
def test_rows_that_are_mixed_elsewhere_are_refused(Net, written, message, tmp_path):
    def forward(net, x):  # PyTorch keeps the lines of functions of this name only
        return written(net, x)

    with pytest.raises(CaptureError, match=message):
        export_bundle(Net(forward).eval(), torch.randn(4, 8), tmp_path / "net.edgekit", smallest_gate=1)
    assert not list(tmp_path.iterdir())


def test_rows_that_are_sorted_and_put_back_are_no_mixture(staged, Net):
    def forward(net, x):
        order = x[:, 0].argsort()
        y = net.f(x[order])[order.argsort()]
        return net.head(x + net.hard(x)[:, None] * y)

    made = staged(Net(forward))
    assert not any(gate.whole for gate in made.plan.gates)
