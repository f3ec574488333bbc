"""The whole way: what is written answers as the model does, and what fails leaves nothing."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgekit import plugins
from edgekit.bundle import Bundle
from edgekit.errors import BundleError, CaptureError, LoweringError, MissingExtraError, ParityError, PluginError
from edgekit.exporters import export_bundle
from edgekit.exporters.to_onnx import OnnxTarget
from edgekit.session import Session

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_bundle_answers_as_the_model_at_every_batch(trunk, tmp_path):
    model = trunk()
    told = []
    bundle = export_bundle(model, X[:1], tmp_path / "n.edgekit", progress=lambda *step: told.append(step))
    bundle.verify()
    assert left_in(tmp_path) == ["n.edgekit"]
    assert all(0 <= done <= total for _, done, total in told)
    assert max(bundle.manifest.parity["onnx"]["largest_difference"].values()) <= 1e-5
    with Session.open(bundle) as session:
        for rows in (1, 7, 64):
            x = torch.randn(rows, 8)
            with torch.no_grad():
                expected = model(x)
            for index, logits in enumerate(expected):
                given = session.run(x.numpy(), exit=index).logits
                np.testing.assert_allclose(given, logits.numpy(), rtol=1e-5, atol=1e-5)
    golden = bundle.golden()
    with torch.no_grad():
        again = model(torch.from_numpy(golden["input:x"]))
    np.testing.assert_allclose(golden["exit:exit3"], again[2].numpy(), rtol=1e-6, atol=1e-6)


def softmax_ends(self, x):
    first, _, third = self.features(x)
    return {"early": (200 * self.h1(first)).softmax(1), "late": self.h3(third).softmax(1)}


def ensemble(self, x):
    first, _, third = self.features(x)
    early = self.h1(first)
    return [early, early * 2, (early + self.h3(third)) / 2]


def squeezed(self, x):
    first, _, third = self.features(x)
    return [self.h1(first[:, :, None, None].squeeze()), self.h3(third[:, None].squeeze())]


def baked(self, x):
    first, _, third = self.features(x)
    return [self.h1(first.view(1, -1)), self.h3(third.view(1, -1))]


@pytest.mark.parametrize("forward", [softmax_ends, ensemble, squeezed, baked, lambda self, x: self.h1(self.a(x))])
def test_unusual_networks_all_the_way(forward, trunk, tmp_path):
    model = trunk(forward)
    with export_bundle(model, torch.zeros(1, 8), tmp_path / "n.edgekit") as bundle:
        golden = bundle.golden()
        assert golden["input:x"].std() > 0.5
        with Session.open(bundle) as session:
            result = session.run(golden["input:x"])
        np.testing.assert_array_equal(result.exit, len(bundle.plan.exits) - 1)
        assert np.isfinite(result.logits).all()


def test_two_classes_and_a_thousand(tmp_path):
    for classes in (2, 1000):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)).eval()
        assert export_bundle(model, torch.randn(1, 4), tmp_path / f"{classes}.edgekit").plan.classes == classes


def rows_mix(self, x):
    first, _, third = self.features(x - x.mean(0))
    return [self.h1(first), self.h3(third)]


@pytest.mark.parametrize(
    "make",
    [
        lambda trunk: trunk(rows_mix),
        lambda trunk: trunk(
            lambda self, x: [self.h1(self.n(self.a(x)))], n=nn.BatchNorm1d(16, track_running_stats=False)
        ),
        lambda trunk: trunk(lambda self, x: [self.h1(self.a(x)) / len(x)]),
    ],
)
def test_samples_that_depend_on_each_other_are_refused(make, trunk, tmp_path):
    with pytest.raises(CaptureError, match=r"answers otherwise when other samples are in the batch"):
        export_bundle(make(trunk), X, tmp_path / "n.edgekit")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("golden", [torch.randn(3, 9), torch.randn(3, 8).double(), (torch.randn(3, 8),) * 2])
def test_golden_inputs_that_do_not_fit(golden, trunk, tmp_path):
    with pytest.raises(CaptureError, match=r"golden inputs are .* only the batch may differ"):
        export_bundle(trunk(), X, tmp_path / "n.edgekit", golden=golden)


def test_golden_inputs_are_compared_and_kept(trunk, tmp_path):
    more = torch.randn(5, 8)
    bundle = export_bundle(trunk(), X, tmp_path / "n.edgekit", golden=more)
    np.testing.assert_array_equal(bundle.golden()["input:x"][2:], more.numpy())
    assert bundle.manifest.parity["onnx"]["samples"] == 7


class Wrong(OnnxTarget):
    """Writes weights that are a little off."""

    def lower(self, program, stage, path, *, specs):
        super().lower(program, stage, path, specs=specs)
        for file in path.parent.glob(f"{path.stem}*.onnx"):
            model = onnx.load(file)
            for tensor in model.graph.initializer:
                value = numpy_helper.to_array(tensor)
                if value.dtype == np.float32:
                    tensor.CopyFrom(numpy_helper.from_array(value * np.float32(1.01), tensor.name))
            onnx.save(model, file)


class Broken(OnnxTarget):
    """Writes something that is no ONNX file."""

    def lower(self, program, stage, path, *, specs):
        super().lower(program, stage, path, specs=specs)
        for file in path.parent.glob(f"{path.stem}*.onnx"):
            file.write_bytes(b"not a model")


@pytest.mark.parametrize(
    ("target", "error", "match"),
    [(Wrong, ParityError, "exit 'exit1': differs from the eager model by"), (Broken, LoweringError, "does not open")],
)
def test_what_does_not_answer_or_open_is_not_written(target, error, match, trunk, tmp_path, monkeypatch):
    create = plugins.create
    monkeypatch.setattr(
        plugins,
        "create",
        lambda kind, name, **options: target() if kind == "targets" else create(kind, name, **options),
    )
    with pytest.raises(error, match=match) as caught:
        export_bundle(trunk(), X, tmp_path / "n.edgekit")
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == []


def test_interrupt_leaves_the_old_bundle(trunk, tmp_path):
    path = tmp_path / "n.edgekit"
    model = trunk()
    export_bundle(model, X, path)
    before = (path / "manifest.json").read_bytes()

    def interrupt(task, done, total):
        if task.startswith("write b"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(model, X, path, overwrite=True, progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(model, X, tmp_path / "new.edgekit", progress=interrupt)
    assert left_in(tmp_path) == ["n.edgekit"]
    assert (path / "manifest.json").read_bytes() == before
    Bundle.open(path).verify()


def test_full_disk(trunk, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(BundleError, match=r"cannot be written .*No space left on device"):
        export_bundle(trunk(), X, tmp_path / "n.edgekit")
    assert left_in(tmp_path) == []


def test_an_existing_bundle_is_not_replaced_unasked(trunk, tmp_path):
    (tmp_path / "n.edgekit").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        export_bundle(trunk(), X, tmp_path / "n.edgekit")
    with pytest.raises(BundleError, match="is not a bundle"):
        export_bundle(trunk(), X, tmp_path / "n.edgekit", overwrite=True)


def test_targets_that_are_none(trunk, tmp_path, monkeypatch):
    with pytest.raises(PluginError, match=r"no target is called 'tpu' \(known: .*onnx"):
        export_bundle(trunk(), X, tmp_path / "n.edgekit", targets=("tpu",))
    with pytest.raises(LoweringError, match="must be a sequence, as"):
        export_bundle(trunk(), X, tmp_path / "n.edgekit", targets="onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"needs onnxscript.*pip install 'edgekit\[export\]'"):
        export_bundle(trunk(), X, tmp_path / "n.edgekit")
    assert left_in(tmp_path) == []


@pytest.mark.slow
def test_memory_stays_within_three_times_the_model(tmp_path):
    """200 MB of weights in two stages: the growth of the process's peak is at most 600 MB."""
    script = """
        import sys, torch, onnx, onnxscript, onnxruntime
        from torch import nn
        from edgekit.exporters import export_bundle

        def peak():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

        class Net(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.a, self.b = nn.Linear(8, width), nn.Linear(width, width)
                self.c, self.d = nn.Linear(width, width), nn.Linear(width, 5)

            def forward(self, x):
                first = self.b(self.a(x).relu()).relu()
                return [self.d(first), self.d(self.c(first).relu())]

        export_bundle(Net(8).eval(), torch.randn(1, 8), sys.argv[1] + "/small.edgekit")
        baseline = peak()
        model = Net(5000).eval()
        size = sum(p.nbytes for p in model.parameters())
        export_bundle(model, torch.randn(1, 8), sys.argv[1] + "/large.edgekit")
        print(size, peak() - baseline)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True, check=True
    )
    size, growth = map(int, done.stdout.split())
    assert size > 190e6
    assert growth <= 3 * size, f"{growth / size:.2f} times the model"
