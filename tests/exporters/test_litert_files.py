"""Files of LiteRT joined and taken apart: the same bits as apart, weights once, what graphs call, the errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit import plugins
from edgekit.bundle import Bundle
from edgekit.errors import BundleError, LoweringError
from edgekit.exporters import export_bundle, litert_files
from edgekit.exporters.litert_files import LiteRTFiles, join, signatures
from edgekit.exporters.quantize_litert import LiteRTQuantizer
from edgekit.exporters.to_litert import LiteRTTarget
from edgekit.exporters.to_onnx import OnnxTarget
from edgekit.interfaces import Joining
from edgekit.runtimes.litert import LiteRTRuntime

interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="running on LiteRT needs the litert extra")
flatbuffer_utils = pytest.importorskip("ai_edge_litert.tools.flatbuffer_utils")
pytest.importorskip("litert_torch", reason="writing for LiteRT needs the export-litert extra")


class Tied(nn.Module):
    """Two exits whose heads have the same weights, between layers that do not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv2d(3, 40, 3), nn.Conv2d(40, 40, 3), nn.Linear(40, 400)

    def forward(self, x):
        first = self.a(x).relu()
        return self.head(first.mean((2, 3))), self.head(self.b(first).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied") / "n.edgekit"
    with export_bundle(Tied().eval(), torch.randn(2, 3, 9, 8), path, targets=("litert",)) as made:
        yield made


@pytest.fixture
def joined(bundle):
    return bundle.artifact("litert", bundle.plan.stages[0].name)


def answers(path):
    """Outputs of every signature of a file on numbers that are always the same, without delegates."""
    opened = interpreter.Interpreter(
        model_path=str(path),
        experimental_op_resolver_type=interpreter.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    found = {}
    for name in opened.get_signature_list():
        runner, rng = opened.get_signature_runner(name), np.random.default_rng(3)
        given = {}
        for key, each in sorted(runner.get_input_details().items()):
            given[key] = (rng.standard_normal(each["shape"]) + 2).astype(each["dtype"])
        found[name] = {key: value.copy() for key, value in runner(**given).items()}
    return found


def require_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name])


def test_a_network_is_one_file_with_every_weight_once(bundle, joined):
    (file,) = [name for name in bundle.manifest.files if name.startswith("stages/")]
    assert file == "stages/litert/network.tflite"
    first, last = (stage.name for stage in bundle.plan.stages)
    assert signatures(joined) == [first, f"{first}:trunk", last]
    weights = sum(parameter.numel() for parameter in Tied().parameters()) * 4
    assert weights < joined.stat().st_size < weights + 20_000, "the tied head is 64 kB, each convolution is there once"


def test_apart_and_joined_again_it_is_the_same(bundle, joined, tmp_path):
    files, before = [], answers(joined)
    for number, stage in enumerate(bundle.plan.stages):
        files.append(tmp_path / f"{number}.tflite")
        LiteRTFiles().part(joined, stage, files[-1])
        alone = answers(files[-1])
        assert set(alone) <= {stage.name, f"{stage.name}:trunk"}
        assert files[-1].stat().st_size < joined.stat().st_size
        for name, outputs in alone.items():
            require_same(outputs, before[name])
    again = tmp_path / "again.tflite"
    LiteRTFiles().join(files, again)
    assert again.stat().st_size == joined.stat().st_size
    after = answers(again)
    assert list(after) == list(before)
    for name, outputs in after.items():
        require_same(outputs, before[name])
    LiteRTFiles().join(files[::-1], again)
    assert signatures(again) == signatures(files[1]) + signatures(files[0])


def test_buffers_lie_where_the_schema_wants_them(joined):
    content = joined.read_bytes()
    model = flatbuffer_utils.read_model(str(joined))
    filled = [buffer.data.tobytes() for buffer in model.buffers if buffer.data is not None and len(buffer.data) > 32]
    assert len(filled) > 3
    for each in filled:
        assert content.index(each) % 16 == 0


def test_a_constant_without_bytes_stays_one(bundle, joined, tmp_path):
    """The shape of a single number: without it nothing behind has its memory before the first run."""
    model = flatbuffer_utils.read_model(str(joined))
    assert any(buffer.data is not None and not len(buffer.data) for buffer in model.buffers)
    runtime = LiteRTRuntime()
    for stage in bundle.plan.stages:
        runtime.open(stage, joined).close()


def branching(tmp_path, name, *, number):
    """A file that adds ``number`` where its input is true, else takes it away, by ``IF`` and two more graphs."""
    schema = flatbuffer_utils.schema_fb

    def tensor(name, kind, buffer=0):
        return schema.TensorT(name=name.encode(), shape=np.array([1], np.int32), type=kind, buffer=buffer)

    def graph(tensors, inputs, outputs, operators):
        made = schema.SubGraphT(tensors=tensors, operators=operators)
        made.inputs, made.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        return made

    def arithmetic(code, options):
        made = schema.OperatorT(opcodeIndex=code, builtinOptionsType=options[0], builtinOptions=options[1])
        made.inputs, made.outputs = np.array([0, 1], np.int32), np.array([2], np.int32)
        kind = schema.TensorType.FLOAT32
        return graph([tensor("x", kind), tensor("c", kind, 1), tensor("y", kind)], [0], [2], [made])

    kinds = schema.BuiltinOperator
    model = schema.ModelT(version=3)
    model.operatorCodes = [
        schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code, version=1)
        for code in (kinds.IF, kinds.ADD, kinds.SUB)
    ]
    model.buffers = [schema.BufferT(), schema.BufferT(data=np.frombuffer(np.float32(number).tobytes(), np.uint8))]
    options = schema.IfOptionsT()
    options.thenSubgraphIndex, options.elseSubgraphIndex = 2, 1
    branch = schema.OperatorT(opcodeIndex=0, builtinOptionsType=schema.BuiltinOptions.IfOptions, builtinOptions=options)
    branch.inputs, branch.outputs = np.array([0, 1], np.int32), np.array([2], np.int32)
    kind = schema.TensorType
    main = graph([tensor("b", kind.BOOL), tensor("x", kind.FLOAT32), tensor("y", kind.FLOAT32)], [0, 1], [2], [branch])
    model.subgraphs = [
        main,
        arithmetic(2, (schema.BuiltinOptions.SubOptions, schema.SubOptionsT())),
        arithmetic(1, (schema.BuiltinOptions.AddOptions, schema.AddOptionsT())),
    ]
    signature = schema.SignatureDefT(signatureKey=name.encode(), subgraphIndex=0)
    signature.inputs = [schema.TensorMapT(name=b"b", tensorIndex=0), schema.TensorMapT(name=b"x", tensorIndex=1)]
    signature.outputs = [schema.TensorMapT(name=b"y", tensorIndex=2)]
    model.signatureDefs = [signature]
    path = tmp_path / f"{name}.tflite"
    path.write_bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    return path


def test_graphs_that_call_others_find_them(tmp_path):
    numbers = {"one": 1.0, "two": 20.0, "three": 300.0}
    files = [branching(tmp_path, name, number=number) for name, number in numbers.items()]
    path = tmp_path / "joined.tflite"
    LiteRTFiles().join(files, path)
    taken = tmp_path / "taken.tflite"
    taken.write_bytes(join([(path, ["three", "one"])]))
    assert signatures(taken) == ["one", "three"]
    assert len(flatbuffer_utils.read_model(str(taken)).subgraphs) == 6
    for file in (path, taken):
        opened = interpreter.Interpreter(model_path=str(file))
        for name in signatures(file):
            run = opened.get_signature_runner(name)
            for is_true, sign in ((True, 1), (False, -1)):
                given = run(b=np.array([is_true]), x=np.array([5], np.float32))
                np.testing.assert_array_equal(given["y"], [5 + sign * numbers[name]])


def with_version(path, text):
    model = flatbuffer_utils.read_model(str(path))
    model.buffers.append(type(model.buffers[0])(data=np.frombuffer(text.ljust(16, b"\0"), np.uint8)))
    schema = flatbuffer_utils.schema_fb
    model.metadata = [schema.MetadataT(name=b"min_runtime_version", buffer=len(model.buffers) - 1)]
    path.write_bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def test_the_newest_runtime_that_a_part_needs_is_what_all_need(tmp_path):
    files = [branching(tmp_path, name, number=1) for name in ("a", "b", "c")]
    for file, text in zip(files, (b"1.9.0", b"2.10.0", b"2.9.1"), strict=True):
        with_version(file, text)
    path = tmp_path / "joined.tflite"
    LiteRTFiles().join(files, path)
    model = flatbuffer_utils.read_model(str(path))
    (entry,) = model.metadata
    assert model.buffers[entry.buffer].data.tobytes().rstrip(b"\0") == b"2.10.0"


def test_more_than_a_file_can_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(litert_files, "LARGEST", litert_files.OTHERS + 7)  # one number of four bytes, and not two
    files = [branching(tmp_path, name, number=number) for number, name in enumerate(("a", "b"))]
    LiteRTFiles().join(files[:1], tmp_path / "one.tflite")
    with pytest.raises(LoweringError, match=r"weights are more than a LiteRT file can hold"):
        LiteRTFiles().join(files, tmp_path / "joined.tflite")


def test_stages_share_one_interpreter_and_one_file_is_read_once(bundle, monkeypatch):
    opened, verified = [], []
    runtime = LiteRTRuntime(threads=2)
    made, verify = runtime._module.Interpreter, Bundle._verify
    monkeypatch.setattr(
        runtime._module, "Interpreter", lambda **options: opened.append(options) or made(**options), raising=True
    )
    monkeypatch.setattr(Bundle, "_verify", lambda self, name: verified.append(name) or verify(self, name))
    x = torch.randn(3, 3, 9, 8).numpy()
    with edgekit.load(bundle, runtime=runtime) as one, edgekit.load(bundle, runtime=runtime) as other:
        verified_by_both = [name for name in verified if name.startswith("stages/")]
        expected = one.run(x, exit=0).logits, one.run(x, exit=1).logits
        for exit_ in (1, 0, 1):  # in turn: what one leaves in the shared memory is nothing to the other
            np.testing.assert_array_equal(other.run(x[::-1].copy(), exit=exit_).logits[::-1], expected[exit_])
            np.testing.assert_array_equal(one.run(x, exit=exit_).logits, expected[exit_])
    assert len(opened) == 1
    assert verified_by_both == ["stages/litert/network.tflite"] * 2


def test_a_file_that_was_replaced_is_opened_anew(bundle, joined, tmp_path):
    stage, runtime = bundle.plan.stages[0], LiteRTRuntime()
    path = tmp_path / "s.tflite"
    LiteRTFiles().part(joined, stage, path)
    kept = runtime.open(stage, path)
    path.unlink()
    LiteRTFiles().part(joined, bundle.plan.stages[1], path)
    with pytest.raises(BundleError, match=rf"is not stage '{stage.name}' \(it holds {bundle.plan.stages[1].name},"):
        runtime.open(stage, path)
    kept.close()
    with pytest.raises(LoweringError, match=rf"holds no stage '{stage.name}'"):
        LiteRTFiles().part(path, stage, tmp_path / "none.tflite")


def test_a_stage_without_its_trunk_is_of_an_older_layout(bundle, joined, tmp_path):
    stage = bundle.plan.stages[0]
    path = tmp_path / "s.tflite"
    path.write_bytes(join([(joined, [stage.name])]))
    with pytest.raises(BundleError, match=rf"it holds {stage.name}, and no '{stage.name}:trunk'\); export again"):
        LiteRTRuntime().open(stage, path)


class Marked(LiteRTTarget):
    """A target of a third party: LiteRT's files with a mark behind them."""

    name = "marked"

    def lower(self, program, stage, path, *, specs):
        super().lower(program, stage, path, specs=specs)
        path.write_bytes(path.read_bytes() + b"mark")

    def join(self, files, path):
        if path.name == "network.tflite":
            assert all(file.read_bytes().endswith(b"mark") for file in files)
        super().join(files, path)


def test_two_targets_that_join_do_not_meet(tmp_path, monkeypatch):
    create = plugins.create
    monkeypatch.setattr(
        plugins, "create", lambda kind, name, **options: Marked() if name == "marked" else create(kind, name, **options)
    )
    targets = ("marked", "litert")
    with export_bundle(Tied().eval(), torch.randn(2, 3, 9, 8), tmp_path / "n.edgekit", targets=targets) as made:
        assert {str(path.parent.name) for path in map(made.artifact, targets, ["a", "a"])} == set(targets)
        assert not list((tmp_path / "n.edgekit").glob("**/.apart"))


def test_whoever_has_one_is_known():
    assert issubclass(LiteRTTarget, Joining)
    assert issubclass(LiteRTQuantizer, Joining)
    assert not issubclass(OnnxTarget, Joining)
