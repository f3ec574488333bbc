"""ONNX stages in lower precision, by ONNX Runtime's own tools.

``int8`` is static: weights in int8, a scale for each output channel; activations in uint8, between QuantizeLinear and
DequantizeLinear; biases in int32. ``int8-symmetric`` is what TensorRT takes: activations in int8 with zero points of 0,
and biases in float. ``int8-dynamic`` finds the scale of an activation anew in every run. ``float16``
computes in half precision. In all of them, what a stage takes and gives stays as the plan says, and so does what
decides: the classifier of an exit and its scores, and the last product of a gate and what follows.

The files are those of :mod:`edgekit.exporters.to_onnx`, variants of one graph over one file of weights.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.bundle import variant
from edgekit.errors import LoweringError, require
from edgekit.exporters.quantize_graph import CARRIED, WEIGHTED, Graph, Node
from edgekit.exporters.quantize_ranges import activation_ranges, shared
from edgekit.exporters.to_onnx import write_variants
from edgekit.plan import SCORES, Stage

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import ModelProto

    from edgekit.exporters.survivors import Given

__all__ = ["OnnxQuantizer"]

SMALL_BYTES = 64
"""Constants up to this size stay in the graph files; the reference to a larger one is not much longer."""
ROW_BY_ROW = "edgekit.row_by_row"
"""Property of a file in which the answer of a row depends on the rows that it is run with."""


class OnnxQuantizer:
    """Writes ONNX stages in lower precision. See :class:`edgekit.exporters.quantize.Quantizer`."""

    target = "onnx"
    suffix = ".onnx"
    runtime = "onnxruntime"
    precisions: tuple[str, ...] = ("int8", "int8-symmetric", "int8-dynamic", "float16")

    def __init__(self) -> None:
        for module in ("onnx", "onnx_ir", "onnxruntime"):
            require(module, extra="export", purpose="Quantising ONNX stages")

    def write(
        self, stage: Stage, source: Path, path: Path, *, precision: str, given: Given, deciding: Collection[str]
    ) -> str | None:
        """See :meth:`edgekit.exporters.quantize.Quantizer.write`."""
        model = _folded(_whole(stage, source))
        graph = _graph(model, (*stage.head, *deciding))
        chosen = graph.lowered(every=precision == "float16")
        if not graph.with_weights(chosen):
            return "it has no convolution or product with weights beside those that decide"
        try:
            with _silent():
                if precision == "float16":
                    made = _half(model, graph.others(chosen))
                elif precision == "int8-dynamic":
                    made = _dynamic(model, chosen)
                else:
                    made = _static(model, graph, chosen, given, symmetric=precision == "int8-symmetric")
        except (ValueError, RuntimeError, AssertionError, KeyError) as error:
            line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise LoweringError(
                f"stage '{stage.name}' cannot be written in {precision} ({line}); keep it in float"
            ) from error
        _write(made, stage, path, row_by_row=precision == "int8-dynamic")
        return None

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that write the artifact."""
        return {name: version(name) for name in ("onnx", "onnxruntime")}


def _whole(stage: Stage, source: Path) -> ModelProto:
    """A stage's files as one graph with all its outputs; what they have in common has the same names."""
    import onnx

    files = [source, *(file for name in (*SCORES, "trunk") if stage.exit and (file := variant(source, name)).is_file())]
    whole, *others = (onnx.load(file) for file in files)
    made = {name for node in whole.graph.node for name in node.output}
    held = {tensor.name for tensor in whole.graph.initializer}
    outputs = {value.name: value for value in whole.graph.output}
    for other in others:
        whole.graph.node.extend(node for node in other.graph.node if made.isdisjoint(node.output))
        made.update(name for node in other.graph.node for name in node.output)
        whole.graph.initializer.extend(each for each in other.graph.initializer if each.name not in held)
        held.update(tensor.name for tensor in other.graph.initializer)
        outputs.update({value.name: value for value in other.graph.output})
    del whole.graph.output[:]
    whole.graph.output.extend(outputs[name] for name in stage.outputs)
    return whole


def _folded(model: ModelProto) -> ModelProto:
    """With batch normalisation folded into convolutions and constants computed; standard operators alone."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with TemporaryDirectory(prefix="edgekit-") as folder:
        file = Path(folder) / "folded.onnx"
        options.optimized_model_filepath = str(file)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        folded = onnx.load(file)
    used = {node.domain for node in folded.graph.node} | {""}
    kept = [each for each in folded.opset_import if each.domain in used]
    del folded.opset_import[:]
    folded.opset_import.extend(kept)
    return onnx.shape_inference.infer_shapes(folded)


def _graph(model: ModelProto, deciding: Collection[str]) -> Graph:
    """The model's nodes, which get names where they have none of their own; outputs of no floats decide as well."""
    import onnx

    taken: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}"
        taken.add(node.name)
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    floats = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in values
        if value.type.tensor_type.elem_type in kinds
    }
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    floats |= {name: len(tensor.dims) for name, tensor in constants.items() if tensor.data_type in kinds}
    return Graph(
        [
            Node(name=node.name, kind=node.op_type, inputs=tuple(node.input), outputs=tuple(node.output))
            for node in model.graph.node
        ],
        floats=floats,
        constants=constants.keys(),
        deciding={*deciding, *(value.name for value in model.graph.output if value.name not in floats)},
    )


def _copy(model: ModelProto) -> ModelProto:
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    return made


def _static(model: ModelProto, graph: Graph, chosen: Collection[str], given: Given, *, symmetric: bool) -> ModelProto:
    """Ranges from what the stage is given, then ONNX Runtime's quantiser."""
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    activations = graph.activations(chosen)
    ranges = activation_ranges(_runner(model, activations), given.feeds, symmetric=symmetric)
    ranges = shared(ranges, graph.joined(chosen))
    data = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        _copy(model),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data),
        nodes_to_quantize=sorted(chosen),
        nodes_to_exclude=[],
        op_types_to_quantize=sorted(WEIGHTED | CARRIED),
        extra_options={"WeightSymmetric": True, "ActivationSymmetric": symmetric, "QuantizeBias": not symmetric},
    )
    return _without_zeros(quantizer.quantize_model())


def _without_zeros(model: ModelProto) -> ModelProto:
    """Without zero points that are 0, of weights and biases: it is what is taken where none is given."""
    import onnx

    zeros = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.INT32)
        and not onnx.numpy_helper.to_array(tensor).any()
    }
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 3 and node.input[2] in zeros:
            del node.input[2]
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def _runner(model: ModelProto, activations: Sequence[str]) -> Any:
    """What gives activations of a feed."""
    import onnx
    import onnxruntime

    whole = _copy(model)
    inputs = {value.name for value in whole.graph.input}
    asked = [name for name in activations if name not in inputs]
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(feed: Any) -> dict[str, Any]:
        found = dict(zip(asked, session.run(asked, dict(feed)), strict=True))
        return found | {name: feed[name] for name in activations if name in inputs}

    return run


def _dynamic(model: ModelProto, chosen: Collection[str]) -> ModelProto:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory(prefix="edgekit-") as folder:
        file = Path(folder) / "dynamic.onnx"
        quantize_dynamic(
            model,
            file,
            op_types_to_quantize=["Conv", "MatMul"],
            weight_type=QuantType.QUInt8,
            nodes_to_quantize=sorted({*chosen, *(f"{name}_MatMul" for name in chosen)}),  # what a Gemm becomes
        )
        return onnx.load(file)


def _half(model: ModelProto, others: Sequence[str]) -> ModelProto:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    no_floats = {value.name for value in values if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT}
    made = convert_float_to_float16(model, keep_io_types=True, node_block_list=list(others))
    return _without_detours(made, no_floats)


def _without_detours(model: ModelProto, no_floats: Collection[str]) -> ModelProto:
    """Without casts of floats to half and back: what crosses a boundary, or decides, loses nothing."""
    import onnx

    def casts(kind: int) -> dict[str, str]:
        """Of each cast to a kind, what it makes and what it takes."""
        found = (node for node in model.graph.node if node.op_type == "Cast" and node.attribute[0].i == kind)
        return {node.output[0]: node.input[0] for node in found}

    halves = casts(onnx.TensorProto.FLOAT16)
    stands_for = {
        made: halves[taken]
        for made, taken in casts(onnx.TensorProto.FLOAT).items()
        if taken in halves and halves[taken] not in no_floats
    }
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in stands_for:
                node.input[place] = stands_for[name]
        if node.output and node.output[0] in stands_for and node.output[0] in outputs:
            node.op_type, node.input[0] = "Identity", stands_for[node.output[0]]
            del node.attribute[:]
    return model


def _write(model: ModelProto, stage: Stage, path: Path, *, row_by_row: bool) -> None:
    """Write the graph files, each with fewer outputs than the whole, and the weights beside them."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, TopologicalSortPass

    made = ir.serde.deserialize_model(model)
    made = TopologicalSortPass()(ClearMetadataAndDocStringPass()(made).model).model
    _shorten(made.graph)
    made.metadata_props.clear()
    if row_by_row:
        made.metadata_props[ROW_BY_ROW] = "1"
    write_variants(made, stage, path, small_bytes=SMALL_BYTES, save=_save)


def _save(model: ir.Model, file: Path) -> None:
    import onnx_ir as ir

    file.write_bytes(_bare(ir.serde.serialize_model(model)).SerializeToString())


def _shorten(graph: Any) -> None:
    """Short names inside: what quantisers write is long, and is repeated in every variant."""
    boundary = {value.name for value in (*graph.inputs, *graph.outputs)}
    initializers = list(graph.initializers.values())
    inner = [value for node in graph for value in node.outputs if value.name not in boundary]
    graph.initializers.clear()
    for number, value in enumerate([*initializers, *inner]):
        value.name = f"v{number}"
    for value in initializers:
        graph.initializers[value.name] = value


def _bare(model: ModelProto) -> ModelProto:
    """Without what every reader knows: shapes inside, names of conversions, attributes that are the defaults."""
    del model.graph.value_info[:]
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast"):
            node.ClearField("name")
        if node.op_type == "Conv":
            needed = [each for each in node.attribute if not _is_default(each)]
            del node.attribute[:]
            node.attribute.extend(needed)
    return model


def _is_default(attribute: Any) -> bool:
    """Of a convolution."""
    ones = attribute.name in ("dilations", "strides") and all(each == 1 for each in attribute.ints)
    zeros = attribute.name == "pads" and not any(attribute.ints)
    return ones or zeros or (attribute.name == "group" and attribute.i == 1) or attribute.s == b"NOTSET"


@contextmanager
def _silent() -> Iterator[None]:
    """Without the advice that ONNX Runtime's tools log: it does not concern whoever uses this."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
