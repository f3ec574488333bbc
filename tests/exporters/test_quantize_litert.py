"""LiteRT stages in int8: weights by hand, values against the eager network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgekit.exporters.survivors import Given

pytest.importorskip("litert_torch", reason="writing for LiteRT needs the export-litert extra")
pytest.importorskip("ai_edge_quantizer", reason="int8 for LiteRT needs the export-litert extra")


class Net(nn.Module):
    """Two convolutions, a residual sum and a concatenation, then a classifier on the mean."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.classifier = nn.Linear(16, 5)

    def forward(self, x):
        a = self.first(x).relu()
        b = (self.second(a) + a).relu()
        return self.classifier(torch.cat([a, b], dim=1).mean((2, 3)))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The eager network, its inputs, its stage, its float file and the same in int8."""
    from edgekit.exporters import stage_model
    from edgekit.exporters.quantize_litert import LiteRTQuantizer
    from edgekit.exporters.stages import trace_stage
    from edgekit.exporters.to_litert import LiteRTTarget

    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(40, 3, 9, 7)
    staged = stage_model(model, (x[:2],))
    (stage,) = staged.plan.stages
    folder = tmp_path_factory.mktemp("litert")
    source, path = folder / "float.tflite", folder / "int8.tflite"
    LiteRTTarget().lower(trace_stage(staged.cuts[0], stage, staged.plan), stage, source, specs=staged.plan.tensors)
    image, temperature = stage.inputs
    feeds = [{image: x[at : at + 8].numpy(), temperature: np.float32(1).reshape(())} for at in range(0, 40, 8)]
    given = Given(feeds=feeds, rows=40, reached=40)
    assert LiteRTQuantizer().write(stage, source, path, precision="int8", given=given, deciding=()) is None
    return model, x, stage, source, path


def tensors(path):
    """Constants by shape and dtype, with their scales."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(path))
    kinds = {value: name for name, value in vars(flatbuffer_utils.schema_fb.TensorType).items()}
    return [
        (kinds[each.type], tuple(each.shape), each.quantization.scale, model.buffers[each.buffer].data)
        for each in model.subgraphs[0].tensors
        if model.buffers[each.buffer].data is not None
    ]


def test_convolutions_have_int8_weights_with_a_scale_for_each_channel(quantized):
    model, _, _, _, path = quantized
    for convolution in (model.first, model.second):
        weights = convolution.weight.detach().numpy().transpose(0, 2, 3, 1)
        (found,) = [each for each in tensors(path) if each[0] == "INT8" and each[1] == weights.shape]
        scales = np.asarray(found[2], np.float32)
        np.testing.assert_allclose(scales, np.abs(weights).max((1, 2, 3)) / 127, rtol=1e-4)
        stored = np.asarray(found[3]).view(np.int8).reshape(weights.shape)
        np.testing.assert_allclose(stored * scales[:, None, None, None], weights, atol=scales.max() * 0.51)


def test_the_classifier_stays_in_float(quantized):
    model, _, _, _, path = quantized
    assert [each[0] for each in tensors(path) if each[1] == tuple(model.classifier.weight.shape)] == ["FLOAT32"]


def logits_of(path, stage, x):
    """Row by row; all that the file takes and gives is float32."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    runner = interpreter.get_signature_runner(stage.name)
    given = runner.get_input_details()
    details = {**given, **runner.get_output_details()}
    assert {np.dtype(each["dtype"]) for each in details.values()} == {np.dtype(np.float32)}
    image = next(name for name, each in given.items() if len(each["shape"]) == 4)
    others = {name: np.ones(each["shape"], np.float32) for name, each in given.items() if name != image}
    rows = x.permute(0, 2, 3, 1).contiguous().numpy()
    return np.concatenate([runner(**{image: row[None]}, **others)[stage.head[0]] for row in rows])


def test_what_it_gives_is_near_the_eager_network(quantized):
    model, x, stage, _, path = quantized
    made = logits_of(path, stage, x)
    with torch.inference_mode():
        expected = model(x).numpy()
    assert 0 < np.abs(made - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(("precision", "kind"), [("float16", "FLOAT16"), ("int8-dynamic", "INT8")])
def test_other_precisions_have_weights_of_their_own_and_stay_near(quantized, tmp_path, precision, kind):
    from edgekit.exporters.quantize_litert import LiteRTQuantizer

    model, x, stage, source, _ = quantized
    path = tmp_path / "other.tflite"
    assert LiteRTQuantizer().write(stage, source, path, precision=precision, given=Given(), deciding=()) is None
    for convolution in (model.first, model.second):
        shape = tuple(convolution.weight.permute(0, 2, 3, 1).shape)
        assert [each[0] for each in tensors(path) if each[1] == shape] == [kind]
    with torch.inference_mode():
        expected = model(x).numpy()
    assert np.abs(logits_of(path, stage, x) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.slow
def test_the_digits_network_on_litert(tmp_path):
    import edgekit
    from edgekit.exporters.quantize import quantize_bundle
    from edgekit.zoo import digits
    from edgekit.zoo.registry import find, load

    network = find("msdnet-digits")
    path = tmp_path / "net.edgekit"
    policy = edgekit.Policy.fixed((0.95, 0.95))
    with edgekit.export(load(network.name), (network.example(),), path, targets=("litert",)) as bundle:
        report = quantize_bundle(bundle, digits.training_set(), target="litert", policy=policy)
        bundle.verify()
    assert [each.precision for each in report.stages] == ["int8"] * 3
    assert abs(report.drop) <= 0.02
    with edgekit.load(path, runtime="litert", precision="int8", policy=policy) as session:
        inputs = digits.test_set().batch(slice(0, 40))
        single = np.concatenate([session.run(inputs[row : row + 1]).logits for row in range(40)])
        np.testing.assert_array_equal(session.run(inputs).logits, single)


def test_it_is_smaller(quantized):
    _, _, _, source, path = quantized
    assert path.stat().st_size < source.stat().st_size


def test_a_stage_whose_samples_need_one_another_stays_in_float(quantized):
    import msgspec

    from edgekit.exporters.quantize_litert import LiteRTQuantizer

    *_, stage, source, path = quantized
    whole = msgspec.structs.replace(stage, whole=True)
    reason = LiteRTQuantizer().write(whole, source, path, precision="int8", given=Given(), deciding=())
    assert reason == "samples of a batch need one another in it"


class ReadInside(nn.Module):
    """What crosses the boundary is read inside its stage too: by a float head, or by a convolution in 8 bits."""

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.inner = (nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16))
        self.norm = nn.Sequential(nn.MaxPool2d(3, 2), nn.LocalResponseNorm(3)) if normed else nn.Identity()
        self.early, self.late = nn.Linear(16, 5), nn.Linear(16, 5)
        self.normed = normed

    def forward(self, x):
        y = self.norm(self.a(x).relu())
        head = self.inner(y).relu() if self.normed else y
        return self.early(head.mean((2, 3))), self.late(self.b(y).relu().mean((2, 3)))


@pytest.mark.parametrize("normed", [False, True])
def test_what_crosses_a_boundary_and_is_read_inside(normed, tmp_path):
    import edgekit

    model = ReadInside(normed=normed).eval()
    x = np.random.default_rng(0).standard_normal((160, 3, 12, 12)).astype(np.float32)
    path = tmp_path / "n.edgekit"
    with edgekit.export(model, torch.from_numpy(x[:2]), path, targets=("litert",)) as bundle:
        report = edgekit.quantize(bundle, x, target="litert")
    assert [each.precision for each in report.stages] == ["int8"] * 2
    with edgekit.load(path, runtime="litert", precision="int8") as session, torch.no_grad():
        for index, expected in enumerate(model(torch.from_numpy(x[:8]))):
            made = session.run(x[:8], exit=index).logits
            assert 0 < np.abs(made - expected.numpy()).max() < 0.1 * expected.abs().max()
