"""Ties in a top-k go to the lowest index."""

from __future__ import annotations

import torch

from edgekit.exporters import export_bundle, stage_model
from edgekit.exporters.stages import stage_module
from edgekit.runtimes.eager import EagerRuntime
from edgekit.session import Session


def test_ties_go_to_the_lowest_index_in_every_runtime(Net, tmp_path):
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
