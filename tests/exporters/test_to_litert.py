"""Stages written for LiteRT, against eager PyTorch: values, decisions, refusals; and a process left undisturbed."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit.errors import BundleError, LoweringError, MissingExtraError, PluginError
from edgekit.exporters import export_bundle
from edgekit.exporters.litert_files import join, signatures
from edgekit.exporters.to_litert import LiteRTTarget
from edgekit.plan import Stage
from edgekit.policy import Policy
from edgekit.runtimes.litert import LiteRTRuntime
from edgekit.tensors import TensorSpec
from edgekit.zoo import digits, registry

pytest.importorskip("litert_torch", reason="writing for LiteRT needs the export-litert extra")
pytest.importorskip("ai_edge_litert", reason="running on LiteRT needs the litert extra")


@pytest.fixture(scope="module")
def target():
    return LiteRTTarget()


@pytest.fixture(scope="module")
def images():
    return digits.test_set().batch(slice(0, 60))


def export(model, example, folder, **options):
    return export_bundle(model.eval(), example, folder / "n.edgekit", targets=("litert",), **options)


def write_stage(target, folder, module, *, inputs, outputs):
    """Writes a module as a stage. ``inputs`` and ``outputs``: ``{name: (dtype, shape)}``."""
    specs = {name: TensorSpec(name, *kind) for name, kind in {**inputs, **outputs}.items()}
    stage = Stage(name="a.b", inputs=tuple(inputs), outputs=tuple(outputs), macs=None, weight_bytes=0, exit=False)
    given = tuple(torch.zeros(specs[name].concrete(3), dtype=getattr(torch, specs[name].dtype)) for name in inputs)
    rows = torch.export.Dim("batch")
    shapes = (tuple({0: rows} if specs[name].batched else None for name in inputs),)
    program = torch.export.export(Called(module).eval(), given, dynamic_shapes=shapes, strict=False)
    path = folder / "a.b.tflite"
    target.lower(program, stage, path, specs=specs)
    return specs, stage, path


def run_stage(specs, stage, path, given):
    """Outputs by name of a batch; ``given``: arrays by name."""
    runtime = LiteRTRuntime()
    rows = max(len(array) if specs[name].batched else 1 for name, array in given.items())
    buffers = {name: runtime.allocate(spec, rows) for name, spec in specs.items()}
    for name, array in given.items():
        buffers[name].write(array)
    runtime.open(stage, path).bind(buffers, rows=rows, outputs=stage.outputs)()
    return {name: buffers[name].read(rows) for name in stage.outputs}


class Written(nn.Module):
    """A forward, and layers to write it with."""

    def __init__(self, forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5)
        self.write = forward

    def forward(self, *tensors):
        return self.write(self, *tensors)


class Called(nn.Module):
    """A module with any number of inputs."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body

    def forward(self, *tensors):
        return self.body(*tensors)


class Exits(nn.Module):
    """Two exits; the first one's head is worth leaving out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.wide = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 60, 3), nn.Conv2d(4, 30, 3)
        self.early, self.late = nn.Linear(30, 5), nn.Linear(60, 5)

    def forward(self, x):
        y = self.a(x).relu()
        return self.early(self.wide(y).relu().mean((2, 3))), self.late(self.b(y).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    with export(Exits(), torch.randn(2, 3, 8, 9), tmp_path_factory.mktemp("exits")) as made:
        yield made


@pytest.fixture(scope="module")
def digits_bundle(tmp_path_factory):
    network = registry.find("msdnet-digits")
    with export(registry.load(network.name), network.example(), tmp_path_factory.mktemp("digits")) as made:
        yield made


def test_the_graphs_of_a_stage(bundle):
    first, last = (stage.name for stage in bundle.plan.stages)
    path = bundle.artifact("litert", first)
    assert signatures(path) == [first, f"{first}:trunk", last]
    trunk, whole = (len(join([(path, [name])])) for name in (f"{first}:trunk", first))
    assert trunk + 30 * 4 * 9 * 4 < whole, "the head's weights are left out"
    assert set(bundle.manifest.versions) >= {"litert-torch", "torch"}
    assert max(bundle.manifest.parity["litert"]["largest_difference"].values()) <= 1e-5


def test_every_exit_alone_and_in_batches(bundle):
    x = torch.randn(7, 3, 8, 9, generator=torch.Generator().manual_seed(1))
    with edgekit.load(bundle, runtime="litert") as session, torch.no_grad():
        for index, expected in enumerate(Exits()(x)):
            for rows in (slice(0, 7), slice(0, 1), slice(4, 6)):
                given = session.run(x[rows].numpy(), exit=index).logits
                np.testing.assert_allclose(given, expected[rows].numpy(), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["max_prob", "margin", "neg_entropy"])
def test_trained_digits_decide_as_eager(digits_bundle, images, score):
    model = registry.load("msdnet-digits")
    with torch.no_grad():
        eager = torch.stack(model(torch.from_numpy(images)))
    probabilities = torch.softmax(eager.double(), dim=2)
    top = probabilities.topk(2, dim=2).values
    scores = {
        "max_prob": top[..., 0],
        "margin": top[..., 0] - top[..., 1],
        "neg_entropy": (probabilities * probabilities.log()).sum(2),
    }[score].numpy()
    limits = [float(np.float32(np.median(scores[0]))), float(np.float32(np.quantile(scores[1], 0.3)))]
    expected = np.where(scores[0] >= limits[0], 0, np.where(scores[1] >= limits[1], 1, 2))
    assert len(set(expected.tolist())) == 3
    near = np.abs(scores[:2] - np.array(limits)[:, None]).min(0) < 1e-5
    assert near.sum() <= 2
    with edgekit.load(digits_bundle, runtime="litert", policy=Policy.fixed(limits, score=score)) as session:
        for size in (1, 7, 60):
            results = [session.run(images[at : at + size]) for at in range(0, 60, size)]
            taken = np.concatenate([result.exit for result in results])
            np.testing.assert_array_equal(taken[~near], expected[~near])
            logits = np.concatenate([result.logits for result in results])
            np.testing.assert_allclose(logits, eager[taken, np.arange(60)].numpy(), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_every_exit_of_trained_digits(digits_bundle, images):
    with torch.no_grad():
        eager = registry.load("msdnet-digits")(torch.from_numpy(images))
    with edgekit.load(digits_bundle, runtime="litert") as session:
        for index, expected in enumerate(eager):
            for rows in (slice(0, 60), slice(0, 1), slice(5, 8)):
                given = session.run(images[rows], exit=index)
                np.testing.assert_allclose(given.logits, expected[rows].numpy(), atol=1e-4, rtol=0)


def test_a_trunk_is_the_stage_without_its_head(bundle):
    plan, runtime = bundle.plan, LiteRTRuntime()
    stage = plan.stages[0]
    buffers = [{name: runtime.allocate(spec, 4) for name, spec in plan.tensors.items()} for _ in range(2)]
    runner = runtime.open(stage, bundle.artifact("litert", stage.name))
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 9)).astype(np.float32)
    for each, outputs in zip(buffers, (stage.outputs, stage.live), strict=True):
        each[plan.inputs[0].name].write(x)
        each[plan.exits[0].temperature].write(np.array(1, np.float32))
        runner.bind(each, rows=4, outputs=outputs)()
    for name in stage.live:
        assert buffers[0][name].read(4).any()
        np.testing.assert_array_equal(buffers[0][name].read(4), buffers[1][name].read(4))
    assert buffers[0][stage.head[0]].read(4).any()
    assert not buffers[1][stage.head[0]].read(4).any()


@pytest.mark.slow
def test_gates_free_and_forced(Net, tmp_path):
    def forward(net, x):
        y = x + net.hard(x)[:, None] * net.f(x)
        return net.early(y), net.head(y + net.hard(-y)[:, None] * net.g(y))

    net = Net(forward).eval()
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    with (
        export(net, x[:2], tmp_path, smallest_gate=1) as bundle,
        edgekit.load(bundle, runtime="litert") as session,
        torch.no_grad(),
    ):
        names = [gate.name for gate in bundle.plan.gates]
        assert len(names) == 2
        is_open = net.hard(x) != 0
        assert 0 < int(is_open.sum()) < 9
        for rows in (slice(0, 9), slice(3, 5), *(slice(row, row + 1) for row in range(9))):
            for index, expected in enumerate(net(x[rows])):
                given = session.run(x[rows].numpy(), exit=index)
                np.testing.assert_allclose(given.logits, expected.numpy(), atol=1e-5, rtol=0)
        y = x + net.f(x)
        every = session.run(x.numpy(), gates=dict.fromkeys(names, True)).logits
        np.testing.assert_allclose(every, net.head(y + net.g(y)).numpy(), atol=1e-5, rtol=0)
        none = session.run(x.numpy(), gates=dict.fromkeys(names, False)).logits
        np.testing.assert_allclose(none, net.head(x).numpy(), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_mixture_of_experts_by_its_router(tmp_path):
    network = registry.find("moe-digits")
    model = registry.load(network.name)
    images = digits.test_set().batch(slice(0, 40))
    with (
        export(model, network.example(), tmp_path) as bundle,
        edgekit.load(bundle, runtime="litert") as session,
        torch.no_grad(),
    ):
        assert len(bundle.plan.gates) == 8
        expected = model(torch.from_numpy(images)).numpy()
        for size in (1, 40):
            parts = [session.run(images[at : at + size]).logits for at in range(0, 40, size)]
            np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-4, rtol=0)


def test_an_image_that_is_flattened(tmp_path):
    """Its views are of channels before rows, where it lies channel-last now."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 7, 5))
    x = torch.randn(3, 3, 8, 9)
    with export(layers, x, tmp_path) as bundle, edgekit.load(bundle, runtime="litert") as session, torch.no_grad():
        np.testing.assert_allclose(session.run(x.numpy()).logits, layers(x).numpy(), atol=1e-5, rtol=0)


class Resized(nn.Module):
    """Images made larger and smaller, each way an output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.images = nn.ModuleList([
            nn.ConvTranspose2d(4, 6, 3, 2, 1),
            nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1),
            nn.ConvTranspose2d(4, 6, 3, 3, 1, output_padding=(2, 0), groups=2),
            nn.ConvTranspose2d(4, 6, 4, 2, 1),
            nn.ConvTranspose2d(4, 6, (3, 2), (1, 2), (1, 0), bias=False),
            nn.Upsample((11, 19)),
            nn.Upsample(scale_factor=1.5),
            nn.Upsample(scale_factor=2),
            nn.Upsample((4, 3)),
        ])  # fmt: skip
        self.row = nn.ConvTranspose1d(8, 3, 3, 2, 1, output_padding=1)

    def forward(self, x):
        return (*(layer(x) for layer in self.images), self.row(x.mean(1)))


def test_images_grow_and_shrink(target, tmp_path):
    module, x = Resized().eval(), torch.randn(2, 4, 8, 9)
    with torch.no_grad():
        expected = module(x)
    outputs = {f"y{place}": ("float32", ("batch", *each.shape[1:])) for place, each in enumerate(expected)}
    given = {"x": ("float32", ("batch", 4, 8, 9))}
    made = run_stage(*write_stage(target, tmp_path, module, inputs=given, outputs=outputs), {"x": x.numpy()})
    for name, each in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(made[name], each.numpy(), atol=1e-5, rtol=0, err_msg=name)


def test_a_volume_is_refused_before_the_converter_dies_of_it(trunk, tmp_path):
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv3d(1, 4, 3, 2, 1), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3, 4)))

    with pytest.raises(LoweringError, match=r"stage 'conv' cannot be written for LiteRT: aten\.conv3d\.default: "):
        export(Volume(), torch.randn(2, 1, 6, 6, 6), tmp_path)


def test_equal_values_rank_by_their_index(target, tmp_path):
    def forward(net, x):
        large, at = torch.ops.edgekit.topk(x, 3, 1)
        return large, at, *torch.topk(x, 2, dim=1, largest=False)

    kinds = {"v": ("float32", ("batch", 3)), "i": ("int64", ("batch", 3)),
             "s": ("float32", ("batch", 2)), "j": ("int64", ("batch", 2))}  # fmt: skip
    written = write_stage(target, tmp_path, Written(forward), inputs={"x": ("float32", ("batch", 5))}, outputs=kinds)
    x = np.array([[1, 2, 2, 1, 2], [0, 0, 0, 0, 0], [5, 4, 3, 2, 1]], np.float32)
    made = run_stage(*written, {"x": x})
    np.testing.assert_array_equal(made["i"], [[1, 2, 4], [0, 1, 2], [0, 1, 2]])
    np.testing.assert_array_equal(made["v"], np.take_along_axis(x, made["i"], 1))
    np.testing.assert_array_equal(made["j"], [[0, 3], [0, 1], [4, 3]])


def test_tensors_of_every_kind_cross_as_they_are(target, tmp_path):
    def forward(net, image, mask, number, count):
        y = net.conv(image) * mask
        return y, y > 0, (y.mean((2, 3)) * number).long() + count[:, None], y.flatten(1)[:, 0], count.int() * 2

    inputs = {
        "image": ("float32", ("batch", 3, 4, 7)),
        "mask": ("bool", ("batch", 6, 4, 7)),
        "number": ("float32", ()),
        "count": ("int64", ("batch",)),
    }
    outputs = {
        "y": ("float32", ("batch", 6, 4, 7)),
        "positive": ("bool", ("batch", 6, 4, 7)),
        "whole": ("int64", ("batch", 6)),
        "first": ("float32", ("batch",)),
        "twice": ("int32", ("batch",)),
    }
    module = Written(forward)
    written = write_stage(target, tmp_path, module, inputs=inputs, outputs=outputs)
    rng = np.random.default_rng(0)
    for rows in (1, 3):
        given = {
            "image": rng.standard_normal((rows, 3, 4, 7)).astype(np.float32),
            "mask": rng.random((rows, 6, 4, 7)) > 0.5,
            "number": np.array(1000.5, np.float32),
            "count": rng.integers(-(2**40), 2**40, rows),
        }
        with torch.no_grad():
            expected = module(*(torch.from_numpy(array) for array in given.values()))
        made = run_stage(*written, given)
        for name, value in zip(outputs, expected, strict=True):
            assert made[name].dtype == value.numpy().dtype
            np.testing.assert_allclose(made[name], value.numpy(), atol=1e-5 if name in ("y", "first") else 0, rtol=0)


def test_a_network_for_one_sample_at_a_time(trunk, tmp_path):
    def baked(self, x):
        first, _, third = self.features(x)
        return [self.h1(first.view(1, -1)), self.h3(third.view(1, -1))]

    model = trunk(baked)
    x = torch.randn(3, 8)
    with export(model, x[:1], tmp_path) as bundle, edgekit.load(bundle, runtime="litert") as session, torch.no_grad():
        assert not any(spec.batched for spec in bundle.plan.tensors.values())
        expected = torch.cat([model(x[row : row + 1])[1] for row in range(3)])
        np.testing.assert_allclose(session.run(x.numpy()).logits, expected.numpy(), atol=1e-5, rtol=0)


def test_logits_that_go_on_are_two_outputs(trunk, tmp_path):
    def ensemble(self, x):
        first, _, third = self.features(x)
        early = self.h1(first)
        return [early, (early + self.h3(third)) / 2]

    model = trunk(ensemble)
    x = torch.randn(5, 8)
    with export(model, x[:2], tmp_path) as bundle, edgekit.load(bundle, runtime="litert") as session, torch.no_grad():
        for index, expected in enumerate(model(x)):
            np.testing.assert_allclose(session.run(x.numpy(), exit=index).logits, expected, atol=1e-5, rtol=0)


def test_constants_are_told_apart_and_left_as_they_are(target, tmp_path):
    """Channel-last weights are not contiguous: their copies lie in the same place, one after the other."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layers = [nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(6)]
            self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)
            self.register_buffer("mask", torch.zeros(8).masked_fill(torch.arange(8) > 5, -torch.inf))

        def forward(self, x):
            return (torch.softmax(200 * self.layers(x).mean((2, 3)) + self.mask, 1),)

    model = Masked()
    written = write_stage(
        target,
        tmp_path,
        model,
        inputs={"x": ("float32", ("batch", 8, 5, 5))},
        outputs={"y": ("float32", ("batch", 8))},
    )
    assert model.mask.isinf().sum() == 2
    x = np.random.default_rng(0).standard_normal((4, 8, 5, 5)).astype(np.float32)
    with torch.no_grad():
        (expected,) = model(torch.from_numpy(x))
    assert expected.std(0).max() > 0.1
    np.testing.assert_allclose(run_stage(*written, {"x": x})["y"], expected, atol=1e-5, rtol=0)


def rearranged(net, x):
    at = x.argsort(1)[:, :3]
    hard = torch.nn.functional.one_hot(x.argmax(1), 5)
    gates = torch.zeros_like(x).scatter(1, at, torch.softmax(x[:, :3], 1))
    return torch.sort(x, dim=1, descending=True, stable=True)[1], x.sort(1)[0], gates, x.scatter(1, at, 7.0), hard


def test_routers_are_written_with_what_every_interpreter_has(target, tmp_path):
    kind, places = ("float32", ("batch", 5)), ("int64", ("batch", 5))
    outputs = dict(zip("abcde", (places, kind, kind, kind, places), strict=True))
    module = Written(rearranged)
    written = write_stage(target, tmp_path, module, inputs={"x": kind}, outputs=outputs)
    x = np.array([[1, 2, 2, 1, 2], [5, 4, 3, 2, 1], [0.5, -1, 3, 2.5, -7]], np.float32)
    made = run_stage(*written, {"x": x})
    for name, value in zip(outputs, module(torch.from_numpy(x)), strict=True):
        np.testing.assert_allclose(made[name], value.numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("forward", "operator"),
    [
        (lambda net, x: (torch.cummax(x, 1).values,), r"aten\.cummax"),
        (lambda net, x: (nn.functional.max_pool2d(x, 2, return_indices=True)[1].float(),), r"aten\.max_pool2d_with_"),
    ],
)
def test_what_cannot_be_written_is_named(target, tmp_path, forward, operator):
    kind = ("float32", ("batch", 3, 4, 4))
    with pytest.raises(LoweringError, match=rf"stage 'a\.b' cannot be written for LiteRT: .*{operator}") as caught:
        write_stage(target, tmp_path, Written(forward), inputs={"x": kind}, outputs={"y": kind})
    assert "\n" not in str(caught.value)


def test_what_is_written_and_not_run_is_named(trunk, tmp_path):
    def adds(self, x):
        return self.h1(self.a(x).scatter_add(1, torch.tensor([[1]]).expand(len(x), 1), x))

    with pytest.raises(
        LoweringError, match=r"stage '.+' does not open in ai-edge-litert .*STABLEHLO_SCATTER"
    ) as caught:
        export(trunk(adds), torch.randn(2, 8), tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(trunk, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BundleError, match=r"cannot be written .*No space left on device"):
        export(trunk(lambda self, x: self.h1(self.a(x))), torch.randn(2, 8), tmp_path)
    assert not list(tmp_path.iterdir())


def test_samples_that_need_one_another_are_refused(Net, tmp_path):
    def forward(net, x):
        return net.head(x + net.hard(x)[:, None] * net.f(x - x.mean(0)))

    with pytest.raises(LoweringError, match=r"stage 'f' cannot be written for LiteRT: samples of a batch need"):
        export(Net(forward), torch.randn(4, 8), tmp_path, smallest_gate=1)


UNDISTURBED = """
import logging, os, random, signal, sys, warnings
import numpy as np, torch
from pathlib import Path
from edgekit.exporters import capture, to_litert
from edgekit.plan import Stage
from edgekit.tensors import TensorSpec
import torch._dynamo, torch._inductor, torch._functorch

def state():
    names = ("", "torch", "torch._dynamo", "torch._functorch", "torch._inductor", "torch.export")
    loggers = [logging.getLogger(name) for name in names]
    return {
        "loggers": [(each.level, each.propagate, list(each.handlers)) for each in loggers],
        "logger class": logging.getLoggerClass(),
        "signals": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT)],
        "environment": dict(os.environ),
        "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()),
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "hooks": (sys.excepthook, sys.displayhook, warnings.showwarning),
        "filters": list(warnings.filters),
        "streams": (sys.stdout, sys.stderr, os.fstat(1).st_ino, os.fstat(2).st_ino),
    }

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
    def forward(self, x):
        return (self.conv(x).mean((2, 3)),)

before = state()
target = to_litert.LiteRTTarget()
imported = state()
specs = {"x": TensorSpec("x", "float32", ("batch", 3, 8, 8)), "y": TensorSpec("y", "float32", ("batch", 4))}
program = torch.export.export(Net().eval(), (torch.zeros(1, 3, 8, 8),))
stage = Stage(name="s", inputs=("x",), outputs=("y",), macs=None, weight_bytes=0, exit=False)
between = state()
target.lower(program, stage, Path(sys.argv[1]) / "s.tflite", specs=specs)
after = state()
for one, other in ((before, imported), (between, after)):
    for name, value in one.items():
        assert other[name] == value, (name, value, other[name])
"""


def test_nothing_is_printed_and_nothing_is_changed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", UNDISTURBED, str(tmp_path)], capture_output=True, text=True, check=False, timeout=600
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "s.tflite").stat().st_size > 0


def test_a_library_that_is_missing_or_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(MissingExtraError, match=r"Exporting to LiteRT needs litert_torch.*edgekit\[export-litert\]"):
        LiteRTTarget()


def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "litert_torch.py").write_text("raise ImportError('libpng.so.99: no such file')")
    monkeypatch.delitem(sys.modules, "litert_torch")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=r"litert_torch, which is installed but does not load \(libpng.so.99"):
        LiteRTTarget()
