"""Stages written for ExecuTorch, against eager PyTorch: values, layouts, refusals; and a process left undisturbed."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgekit
from edgekit.errors import InputError, LoweringError, MissingExtraError
from edgekit.exporters import export_bundle
from edgekit.exporters.ranking import topk
from edgekit.exporters.to_executorch import ROWS_TOGETHER, ExecuTorchTarget, _topk
from edgekit.plan import SCORES, Stage
from edgekit.runtimes.executorch import ExecuTorchRuntime
from edgekit.tensors import TensorSpec

pytest.importorskip("executorch.version", reason="writing for ExecuTorch needs the executorch extra")

FLOAT, BATCH = "float32", "batch"


class Written(nn.Module):
    """A forward with layers to write it with."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)
        self.write = forward

    def forward(self, *tensors):
        return self.write(self, *tensors)


def write_stage(folder, forward, *, inputs, outputs, whole=False):
    """Writes a forward as a stage. ``inputs`` and ``outputs``: dtype and shape of each."""
    module = Written(forward).eval()
    given = [TensorSpec(f"in{place}", kind[0], kind[1:]) for place, kind in enumerate(inputs)]
    made = [TensorSpec(f"out{place}", kind[0], kind[1:]) for place, kind in enumerate(outputs)]
    specs = {spec.name: spec for spec in (*given, *made)}
    names = [tuple(spec.name for spec in side) for side in (given, made)]
    stage = Stage(name="a.b", inputs=names[0], outputs=names[1], macs=None, weight_bytes=0, exit=False, whole=whole)
    rows = torch.export.Dim("batch")
    shapes = (tuple({0: rows} if spec.batched else None for spec in given),)
    program = torch.export.export(module, example(given, 2), dynamic_shapes=shapes, strict=False)
    path = folder / "a.b.pte"
    ExecuTorchTarget().lower(program, stage, path, specs=specs)
    return module, stage, specs, path


def example(specs, rows):
    generator = torch.Generator().manual_seed(rows)
    made = []
    for spec in specs:
        noise = torch.randn(spec.concrete(rows), generator=generator)
        made.append(noise if spec.dtype == FLOAT else (noise * 3).to(getattr(torch, spec.dtype)))
    return tuple(made)


def run_stage(stage, specs, path, given, rows):
    """Outputs of a batch, in order, from buffers that have room for more."""
    runtime = ExecuTorchRuntime()
    buffers = {name: runtime.allocate(spec, rows + 2) for name, spec in specs.items()}
    for name, tensor in zip(stage.inputs, given, strict=True):
        buffers[name].write(tensor.numpy())
    runtime.open(stage, path).bind(buffers, rows=rows, outputs=stage.outputs)()
    return [buffers[name].read(rows).copy() for name in stage.outputs]


def agrees(written, rows):
    module, stage, specs, path = written
    for count in rows:
        given = example([specs[name] for name in stage.inputs], count)
        with torch.no_grad():
            expected = module(*given)
        for one, other in zip(run_stage(stage, specs, path, given, count), expected, strict=True):
            assert one.dtype == other.numpy().dtype
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=2e-6)


STAGES = {
    "dtypes, and tensors without a batch": (
        lambda net, x, b, i, t: (x * t, b.logical_not(), i + 1, i > 2, x * b[:, :1], t * 2),
        [(FLOAT, BATCH, 8), ("bool", BATCH, 2), ("int64", BATCH, 3), (FLOAT,)],
        [(FLOAT, BATCH, 8), ("bool", BATCH, 2), ("int64", BATCH, 3), ("bool", BATCH, 3), (FLOAT, BATCH, 8), (FLOAT,)],
    ),
    "feature maps of odd sizes": (
        lambda net, x, i: (net.conv(x), x.mean((2, 3)), x > 0, i + 1, x.flatten(1)),
        [(FLOAT, BATCH, 8, 5, 7), ("int64", BATCH, 8, 5, 7)],
        [(FLOAT, BATCH, 8, 5, 7), (FLOAT, BATCH, 8), ("bool", BATCH, 8, 5, 7), ("int64", BATCH, 8, 5, 7),
         (FLOAT, BATCH, 280)],
    ),
    "handed through, seen otherwise, given twice": (
        lambda net, x, m: (x, m, m.view(-1, 4, 12), (y := x + 1), y, torch.arange(4)),
        [(FLOAT, BATCH, 8), (FLOAT, BATCH, 8, 2, 3)],
        [(FLOAT, BATCH, 8), (FLOAT, BATCH, 8, 2, 3), (FLOAT, BATCH, 4, 12), (FLOAT, BATCH, 8), (FLOAT, BATCH, 8),
         ("int64", 4)],
    ),
    "one pixel, few channels, other ranks, an input that nothing reads": (
        lambda net, x, y, z, unread: (net.conv(x), x.flatten(1), y * 2, y[:, :1], z + 1, z.sum((1, 2, 3, 4))),
        [(FLOAT, BATCH, 8, 1, 1), (FLOAT, BATCH, 3, 4, 5), (FLOAT, BATCH, 2, 3, 4, 5), (FLOAT, BATCH, 8, 2, 2)],
        [(FLOAT, BATCH, 8, 1, 1), (FLOAT, BATCH, 8), (FLOAT, BATCH, 3, 4, 5), (FLOAT, BATCH, 1, 4, 5),
         (FLOAT, BATCH, 2, 3, 4, 5), (FLOAT, BATCH)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(STAGES))
def test_every_kind_of_tensor_crosses_the_boundary(kind, tmp_path):
    forward, inputs, outputs = STAGES[kind]
    agrees(write_stage(tmp_path, forward, inputs=inputs, outputs=outputs), rows=(1, 3))


def test_a_fixed_batch_of_one(tmp_path):
    written = write_stage(
        tmp_path,
        lambda net, x: (net.conv(x), net.linear(x.mean((2, 3)))),
        inputs=[(FLOAT, 1, 8, 4, 4)],
        outputs=[(FLOAT, 1, 8, 4, 4), (FLOAT, 1, 8)],
    )
    agrees(written, rows=(1,))


def test_samples_that_need_one_another_are_computed_together(tmp_path):
    written = write_stage(
        tmp_path,
        lambda net, x, m, t: (torch.softmax(x @ x.T, 1) @ net.linear(x) * t, net.conv(m - m.mean(0, keepdim=True))),
        inputs=[(FLOAT, BATCH, 8), (FLOAT, BATCH, 8, 4, 5), (FLOAT,)],
        outputs=[(FLOAT, BATCH, 8), (FLOAT, BATCH, 8, 4, 5)],
        whole=True,
    )
    agrees(written, rows=(1, 2, 9, ROWS_TOGETHER, 3))
    _, stage, specs, path = written
    too_many = example([specs[name] for name in stage.inputs], ROWS_TOGETHER + 1)
    with pytest.raises(InputError, match=r"stage 'a.b' takes 64 samples at once in ExecuTorch, not 65"):
        run_stage(stage, specs, path, too_many, ROWS_TOGETHER + 1)


@pytest.mark.slow
def test_what_mixes_rows_in_a_gate_all_the_way(Net, tmp_path):
    def forward(net, x):
        y = x + net.hard(x)[:, None] * net.f(F.batch_norm(x, None, None, training=True))
        return net.early(y), net.head(y + net.h(y))

    net = Net(forward).eval()
    with (
        edgekit.export(
            net, torch.randn(4, 8), tmp_path / "n.edgekit", targets=("executorch",), smallest_gate=1
        ) as bundle,
        edgekit.load(bundle, runtime="executorch") as session,
    ):
        (gate,) = session.plan.gates
        assert gate.whole
        x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            is_open, expected = net.hard(x) != 0, net(x)
        assert 0 < int(is_open.sum()) < 9
        for index, each in enumerate(expected):
            given = session.run(x.numpy(), exit=index).logits
            np.testing.assert_allclose(given, each.numpy(), rtol=0, atol=1e-4)


def baked(self, x):
    first, _, third = self.features(x)
    return [self.h1(first.view(1, -1)), self.h3(third.view(1, -1))]


@pytest.mark.slow
def test_a_network_that_takes_one_sample_all_the_way(trunk, tmp_path):
    model = trunk(baked)
    with (
        export_bundle(model, torch.zeros(1, 8), tmp_path / "n.edgekit", targets=("executorch",)) as bundle,
        edgekit.load(bundle, runtime="executorch") as session,
    ):
        x = torch.randn(5, 8)
        for index, each in enumerate(session.run_exits(x.numpy())):
            with torch.no_grad():
                expected = torch.cat([model(row[None])[index] for row in x])
            np.testing.assert_allclose(each, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_ranking_as_the_rule_says(k, dim):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor(
        [[1.0, 3, 3, 2, 3], [0, 0, 0, 0, 0], [-inf, 1, -inf, inf, inf], [nan, 5, nan, -1, inf], [-0.0, 0, -1, 0, -0.0]]
    )
    for one, other in zip(_topk(x, k, dim), topk(x, k, dim), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_ties_go_to_the_lowest_index(Net, tmp_path):
    def forward(net, x):
        values, chosen = (net.router(x) * 0).topk(2, dim=1)
        gates = torch.zeros(len(x), 4).scatter(1, chosen, values.softmax(1))
        return net.head(sum(gates[:, index, None] * expert(x) for index, expert in enumerate(net.experts)))

    net = Net(forward).eval()
    x = torch.randn(5, 8)
    with torch.no_grad():
        expected = net.head((net.experts[0](x) + net.experts[1](x)) / 2).numpy()
    export_bundle(net, x[:2], tmp_path / "n.edgekit", targets=("executorch",), smallest_gate=1).close()
    with edgekit.load(tmp_path / "n.edgekit", runtime="executorch") as session:
        for rows in (x, x[:1]):
            result = session.run(rows.numpy())
            np.testing.assert_allclose(result.logits, expected[: len(rows)], rtol=0, atol=1e-5)
            assert [result.executed[f"experts.{index}"] for index in range(4)] == [len(rows), len(rows), 0, 0]


@pytest.fixture(scope="module")
def early_exits(tmp_path_factory):
    """A network of which both the trunk and the head have large weights, as a bundle."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 300), nn.Linear(300, 300)
            self.early = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 3))
            self.third, self.late = nn.Linear(300, 400), nn.Linear(400, 3)

        def forward(self, x):
            y = self.second(self.first(x).relu()).relu()
            return self.early(y), self.late(self.third(y).relu())

    path = tmp_path_factory.mktemp("early") / "n.edgekit"
    export_bundle(Net().eval(), torch.randn(2, 8), path, targets=("executorch",)).close()
    return path


def test_a_file_says_what_its_methods_take_and_give(early_exits):
    with edgekit.Bundle.open(early_exits) as bundle:
        first, last = bundle.plan.stages
        programs = [
            ExecuTorchRuntime().load(stage, bundle.artifact("executorch", stage.name)) for stage in (first, last)
        ]
    methods = [[program.get_method_name(index) for index in range(program.num_methods())] for program in programs]
    assert [sorted(names) for names in methods] == [
        sorted(["forward", "trunk", *SCORES, "tensors"]),
        sorted(["forward", *SCORES, "tensors"]),
    ]
    said = programs[0].load_method("tensors")
    said.execute()
    tensors = json.loads(said.get_outputs()[0])
    logits, *scores = first.head
    assert tensors["methods"]["forward"] == {"inputs": [first.inputs[0]], "outputs": [*first.live, logits]}
    assert tensors["methods"]["trunk"] == {"inputs": [first.inputs[0]], "outputs": list(first.live)}
    for score, name in zip(SCORES, scores, strict=True):
        assert tensors["methods"][score] == {"inputs": [logits, first.inputs[-1]], "outputs": [name]}
    assert (tensors["rows"], tensors["channels_last"]) == (1, [])


def test_weights_are_stored_once_for_all_methods(early_exits):
    with edgekit.Bundle.open(early_exits) as bundle:
        for stage in bundle.plan.stages:
            assert stage.weight_bytes <= bundle.artifact("executorch", stage.name).stat().st_size
            assert bundle.artifact("executorch", stage.name).stat().st_size < stage.weight_bytes + 30_000
        assert bundle.plan.stages[0].weight_bytes > 700_000


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda net, x: net.head(x.sort(dim=1).values),
            r"stage '\S+' does not open .*'aten::sort.values' not found\); ExecuTorch has no kernel",
        ),
        (lambda net, x: net.head(x.cummax(dim=1).values), r"stage '\S+' cannot be written for ExecuTorch: .*cummax"),
    ],
    ids=["no kernel", "no such operator"],
)
def test_an_operator_that_executorch_lacks_is_named_with_its_stage(forward, message, Net, tmp_path):
    def write(net, x):  # PyTorch keeps the lines of functions of this name only
        return forward(net, net.f(x))

    with pytest.raises(LoweringError, match=message) as caught:
        export_bundle(Net(write).eval(), torch.randn(2, 8), tmp_path / "n.edgekit", targets=("executorch",))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_no_fault_of_the_stage(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_stage(tmp_path, lambda net, x: (x + 1,), inputs=[(FLOAT, BATCH, 8)], outputs=[(FLOAT, BATCH, 8)])


@pytest.mark.slow
def test_nothing_is_printed_and_logging_stays_as_it_was(tmp_path):
    """In a process of its own: ExecuTorch configures the root logger when it is first imported."""
    script = """
import logging, sys
import torch
import edgekit
model = torch.nn.Linear(8, 3).eval()
edgekit.export(model, torch.zeros(1, 8), sys.argv[1], targets=("executorch",)).close()
with edgekit.load(sys.argv[1], runtime="executorch", threads=2) as session:
    session.run(torch.zeros(3, 8).numpy())
assert logging.getLogger().handlers == [] and logging.getLogger().level == logging.WARNING
"""
    command = [sys.executable, "-c", script, str(tmp_path / "n.edgekit")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_loggers_of_the_user_are_left_alone(tmp_path):
    handler = logging.NullHandler()
    root = logging.getLogger()
    before = list(root.handlers)
    root.addHandler(handler)
    try:
        write_stage(tmp_path, lambda net, x: (x + 1,), inputs=[(FLOAT, BATCH, 8)], outputs=[(FLOAT, BATCH, 8)])
        assert root.handlers == [*before, handler]
    finally:
        root.removeHandler(handler)


def test_a_missing_library_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.delitem(sys.modules, "executorch.version", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[executorch\]'"):
        ExecuTorchTarget()


def test_provenance():
    assert list(ExecuTorchTarget().versions()) == ["executorch", "torch"]
