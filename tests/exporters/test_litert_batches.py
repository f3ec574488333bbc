"""LiteRT stages that take several samples at once: the same answers, in any batch, in float and in int8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit.cli import options
from edgekit.errors import InputError, LoweringError, PluginError
from edgekit.exporters import export_bundle
from edgekit.exporters.litert_files import read_model, signatures
from edgekit.exporters.to_litert import LiteRTTarget
from edgekit.policy import Policy
from edgekit.runtimes.litert_graph import Graph

pytest.importorskip("litert_torch", reason="writing for LiteRT needs the export-litert extra")
pytest.importorskip("ai_edge_litert", reason="running on LiteRT needs the litert extra")

ROWS = 11


class Gated(nn.Module):
    """Two exits, and between them a layer that half of the samples skip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.ask, self.early, self.late = nn.Linear(8, 1), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x):
        y = self.a(x).relu()
        early = self.early(y.mean((2, 3)))
        gate = (self.ask(y.mean((2, 3))) > 0.19).float()[..., None, None]
        y = y + gate * self.b(y).relu()
        return early, self.late(self.c(y).relu().mean((2, 3)))


def images(rows=ROWS):
    return torch.randn(rows, 3, 8, 9, generator=torch.Generator().manual_seed(1))


def export(folder, batch, **given):
    target = LiteRTTarget(batch=batch)
    return export_bundle(Gated().eval(), images(2), folder / f"{batch}.edgekit", targets=(target,), **given)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The network for one sample at a time, and for four."""
    folder = tmp_path_factory.mktemp("batches")
    with export(folder, 1) as one, export(folder, 4) as four:
        yield one, four


def test_each_graph_is_there_for_one_and_for_several(bundles):
    one, four = (signatures(bundle.artifact("litert", bundle.plan.stages[0].name)) for bundle in bundles)
    assert {name for name in four if "@" not in name} == set(one)
    assert {name.removesuffix("@4") for name in four if "@" in name} == set(one)
    constants = [
        each.data.tobytes() for each in read_model(bundles[1].artifact("litert", "a")).buffers if each.data is not None
    ]
    assert len(set(constants)) == len(constants), "weights are in it once"
    assert np.moveaxis(Gated().b.weight.detach().numpy(), 1, -1).tobytes() in constants


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, ROWS])
def test_any_batch_answers_as_the_eager_model(bundles, rows, threads):
    x = images()[:rows]
    with torch.no_grad():
        expected = [logits.numpy() for logits in Gated()(x)]
    with edgekit.load(bundles[1], runtime="litert", threads=threads) as session:
        for place, logits in enumerate(expected):
            np.testing.assert_allclose(session.run(x.numpy(), exit=place).logits, logits, atol=1e-5, rtol=0)


def test_decisions_are_those_of_one_at_a_time(bundles):
    x = images(64).numpy()
    with edgekit.load(bundles[0], runtime="litert") as one, edgekit.load(bundles[1], runtime="litert") as four:
        threshold = float(np.median(one.run(x, exit=0).score))
        for session in (one, four):
            session.use(Policy.fixed([threshold]))
        expected, found = one.run(x), four.run(x)
        assert set(expected.exit.tolist()) == {0, 1}
        np.testing.assert_array_equal(found.exit, expected.exit)
        np.testing.assert_array_equal(found.executed, expected.executed)
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-6, rtol=0)


def test_as_many_at_once_as_go_and_what_is_left_one_by_one(bundles, monkeypatch):
    bound = []

    def noted(graph, memory, *, batched, rows):
        bound.append((graph.rows, list(rows)))
        return real(graph, memory, batched=batched, rows=rows)

    real = Graph.bind
    monkeypatch.setattr(Graph, "bind", noted)
    for rows, expected in ((ROWS, [(4, [0, 4]), (1, [8, 9, 10])]), (4, [(4, [0])]), (3, [(1, [0, 1, 2])])):
        with edgekit.load(bundles[1], runtime="litert") as session:
            bound.clear()
            session.run(images()[:rows].numpy(), exit=0)
        assert bound[: len(expected)] == expected


def test_int8_takes_several_as_well(bundles, tmp_path):
    pytest.importorskip("ai_edge_quantizer", reason="lower precision needs the export-litert extra")
    x, found = images(128).numpy(), []
    for bundle in bundles:
        edgekit.quantize(bundle, x, precision="int8", target="litert")
        with edgekit.load(bundle, runtime="litert", precision="int8") as session:
            found.append([session.run(x, exit=place).logits for place in (0, 1)])
    assert any("@4" in name for name in signatures(bundles[1].artifact("litert-int8", bundles[1].plan.stages[0].name)))
    for one, four in zip(*found, strict=True):
        assert np.abs(one - four).max() <= 1e-5 * np.abs(one).max()


def test_a_number_that_the_eager_model_is_not_compared_on_is_refused(tmp_path):
    with pytest.raises(LoweringError, match=r"16 samples at once .* on 5: give 16 golden inputs or more"):
        export(tmp_path, 16, golden=images(3))
    assert not any(tmp_path.iterdir())


def test_the_eager_model_is_compared_on_as_many(tmp_path):
    folder, model = tmp_path / "n.edgekit", nn.Sequential(nn.Linear(4, 3))
    with export_bundle(model.eval(), torch.randn(2, 4), folder, targets=(LiteRTTarget(batch=16),)) as made:
        assert len(made.golden()["exit:exit1"]) == 16


@pytest.mark.parametrize("batch", [0, -1, True, 2.5, "8"])
def test_numbers_that_are_none(batch):
    with pytest.raises(PluginError, match=r"target 'litert': batch cannot be .*; give 1 or more samples"):
        LiteRTTarget(batch=batch)


def test_a_target_that_is_not_in_a_sequence(tmp_path):
    with pytest.raises(LoweringError, match=r"targets must be a sequence, as \('onnx',\)"):
        export_bundle(nn.Linear(4, 3).eval(), torch.randn(2, 4), tmp_path / "n.edgekit", targets=LiteRTTarget(batch=2))


def test_a_target_that_is_there_twice(tmp_path):
    with pytest.raises(LoweringError, match=r"one is there twice \(litert, litert\)"):
        export_bundle(
            nn.Linear(4, 3).eval(), torch.randn(2, 4), tmp_path / "n.edgekit", targets=("litert", LiteRTTarget(batch=2))
        )
    assert not any(tmp_path.iterdir())


def test_the_command_line_names_it():
    onnx, litert = options.targets("onnx, litert:batch=8")
    assert onnx == "onnx"
    assert (litert.name, litert.batch) == ("litert", 8)
    with pytest.raises(InputError, match=r"--target litert:8: an option is name=value"):
        options.targets("litert:8")
    with pytest.raises(PluginError, match="target 'onnx' does not take these options"):
        options.targets("onnx:batch=8")
    with pytest.raises(PluginError, match="no target is called 'lite'"):
        options.targets("lite:batch=8")
