"""LiteRT stages in lower precision, by ai-edge-quantizer.

``int8`` has weights with a scale for each channel and activations by the ranges of what they see; ``int8-dynamic`` the
same weights, and finds the ranges of activations in every run; ``float16`` has weights in half precision, and whatever
runs them decides what it computes in. What a file takes and gives stays float, and so does what decides, as in
:mod:`edgekit.exporters.quantize_onnx`. The files are those of :mod:`edgekit.exporters.to_litert`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import LoweringError, require
from edgekit.exporters.litert_files import LiteRTFiles, join, read_model, signatures, write_model
from edgekit.exporters.litert_quiet import undisturbed
from edgekit.exporters.quantize_graph import Graph, Node
from edgekit.exporters.quantize_ranges import activation_ranges, shared
from edgekit.plan import Stage

if TYPE_CHECKING:
    from edgekit.exporters.survivors import Given

__all__ = ["LiteRTQuantizer"]

KINDS = {
    "ADD": "Add", "AVERAGE_POOL_2D": "AveragePool", "CONCATENATION": "Concat", "CONV_2D": "Conv",
    "DEPTHWISE_CONV_2D": "Conv", "FULLY_CONNECTED": "Gemm", "MAX_POOL_2D": "MaxPool", "PAD": "Pad", "RELU": "Relu",
    "RESHAPE": "Reshape", "SLICE": "Slice", "SPLIT": "Split", "STRIDED_SLICE": "Slice", "TRANSPOSE": "Transpose",
    "TRANSPOSE_CONV": "ConvTranspose",
}  # fmt: skip
"""LiteRT's operators that take lower precision, by ONNX's name for them."""


class LiteRTQuantizer(LiteRTFiles):
    """Writes LiteRT stages in lower precision. See :class:`edgekit.exporters.quantize.Quantizer`."""

    target = "litert"
    suffix = ".tflite"
    runtime = "litert"
    precisions: tuple[str, ...] = ("int8", "int8-dynamic", "float16")

    def __init__(self) -> None:
        for module in ("ai_edge_litert", "ai_edge_quantizer"):
            with undisturbed():
                require(module, extra="export-litert", purpose="Quantising LiteRT stages")

    def write(
        self, stage: Stage, source: Path, path: Path, *, precision: str, given: Given, deciding: Collection[str]
    ) -> str | None:
        """See :meth:`edgekit.exporters.quantize.Quantizer.write`."""
        if stage.whole:
            return "samples of a batch need one another in it"
        with TemporaryDirectory(prefix="edgekit-") as folder:
            lowered = []
            for number, name in enumerate(signatures(source)):
                before, after = (Path(folder) / f"{number}-{kind}{self.suffix}" for kind in ("float", precision))
                before.write_bytes(join([(source, [name])]))
                kept = self._lower(stage, before, after, precision=precision, given=given, deciding=deciding)
                if kept is not None:
                    return kept
                lowered.append(after)
            self.join(lowered, path)
        return None

    def _lower(
        self, stage: Stage, source: Path, path: Path, *, precision: str, given: Given, deciding: Collection[str]
    ) -> str | None:
        """One signature of a stage, alone in a file."""
        with undisturbed():
            file = _File(source, stage, (*stage.head, *deciding))
        chosen = file.graph.lowered()
        if not file.graph.with_weights(chosen):
            return "it has no convolution or product with weights beside those that decide"
        try:
            with undisturbed():
                file.write(path, chosen, given, precision=precision)
        except (ValueError, RuntimeError, KeyError) as error:
            line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise LoweringError(
                f"stage '{stage.name}' cannot be written in {precision} ({line}); keep it in float"
            ) from error
        return None

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that write the artifact."""
        return {name: version(name) for name in ("ai-edge-quantizer", "ai-edge-litert")}


class _File:
    """One float file, its operators and tensors by name."""

    def __init__(self, path: Path, stage: Stage, deciding: Collection[str]) -> None:
        from ai_edge_litert.tools import flatbuffer_utils

        self._path = path
        self._stage = stage
        model = read_model(path)
        self._subgraph = model.subgraphs[0]
        (signature,) = model.signatureDefs
        self._inputs = {_text(each.name): each.tensorIndex for each in signature.inputs}
        outputs = {_text(each.name): each.tensorIndex for each in signature.outputs}
        self._numbers = {name: list(self._subgraph.outputs).index(place) for name, place in outputs.items()}
        self._operators = [
            flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex) for operator in self._subgraph.operators
        ]
        tensors = dict(enumerate(self._subgraph.tensors))
        is_float = flatbuffer_utils.schema_fb.TensorType.FLOAT32
        floats = {str(place): len(each.shape) for place, each in tensors.items() if each.type == is_float}
        constants = {str(place) for place, each in tensors.items() if model.buffers[each.buffer].data is not None}
        self.graph = Graph(
            [
                Node(
                    name=str(number),
                    kind=KINDS.get(kind, kind),
                    inputs=_places(operator.inputs, first=kind == "TRANSPOSE_CONV"),
                    outputs=_places(operator.outputs),
                )
                for number, (kind, operator) in enumerate(zip(self._operators, self._subgraph.operators, strict=True))
            ],
            floats=floats,
            constants=constants,
            deciding={str(place) for name, place in outputs.items() if name in deciding or str(place) not in floats},
        )

    def write(self, path: Path, chosen: Collection[str], given: Given, *, precision: str) -> None:
        """The file again, these operators in lower precision."""
        from ai_edge_quantizer.quantizer import Quantizer

        quantizer = Quantizer(str(self._path))
        if precision == "int8":
            for scope in map(self._scope, sorted(chosen, key=int)):
                quantizer.add_static_config(*scope, activation_num_bits=8, weight_num_bits=8)
        else:
            for scope in map(self._scope, sorted(self.graph.with_weights(chosen), key=int)):
                if precision == "int8-dynamic":
                    quantizer.add_dynamic_config(*scope, num_bits=8)
                else:
                    quantizer.update_quantization_recipe(*scope, *_half())
        ranges = self._ranges(chosen, given) if precision == "int8" else None
        made = quantizer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
        made.export_model(str(path))
        self._mend_signature(path)

    def _mend_signature(self, path: Path) -> None:
        """Let graph and signature give what they gave, in float.

        ai-edge-quantizer (0.10) leaves the signature at a tensor of 8 bits where an output is read inside as well; and
        it gives that tensor out where what reads it inside has 8 bits and what makes it has not.
        """
        from ai_edge_litert.tools import flatbuffer_utils

        model = read_model(path)
        graph, (signature,) = model.subgraphs[0], model.signatureDefs  # graphs that it calls come behind
        made = {
            operator.outputs[0]: operator.inputs[0]
            for operator in graph.operators
            if flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex) == "QUANTIZE"
        }
        for each in signature.outputs:
            number = self._numbers[_text(each.name)]
            graph.outputs[number] = made.get(graph.outputs[number], graph.outputs[number])
            each.tensorIndex = graph.outputs[number]
        path.write_bytes(write_model(model))

    def _scope(self, name: str) -> tuple[str, Any]:
        """What ai-edge-quantizer knows an operator by: a pattern of what it makes, and its kind."""
        from ai_edge_quantizer.qtyping import TFLOperationName

        kind, operator = self._operators[int(name)], self._subgraph.operators[int(name)]
        made = "".join(f"{_text(self._subgraph.tensors[place].name)};" for place in operator.outputs)
        return f"^{re.escape(made)}$", TFLOperationName(_AEQ.get(kind, kind))

    def _ranges(self, chosen: Collection[str], given: Given) -> dict[str, dict[str, NDArray[np.float32]]]:
        activations = self.graph.activations(chosen)
        ranges = activation_ranges(self._runner(activations), given.feeds)
        found = {}
        for name, ends in shared(ranges, self.graph.joined(chosen)).items():
            tensor = self._subgraph.tensors[int(name)]
            low, high = (np.full((1,) * len(tensor.shape), end, dtype=np.float32) for end in ends)
            found[_text(tensor.name)] = {"min": low, "max": high}
        return found

    def _runner(self, activations: Collection[str]) -> Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
        """What gives activations of a feed, a row each, by as many rows at once as the graph takes."""
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        interpreter = Interpreter(
            model_path=str(self._path),
            num_threads=1,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
        )
        interpreter.allocate_tensors()
        names = {place: _input_name(self._stage, name) for name, place in self._inputs.items()}
        shapes = {each["index"]: tuple(each["shape"]) for each in interpreter.get_input_details()}

        def run(feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            rows = max(len(feed[name]) if feed[name].ndim else 1 for name in names.values())
            at_once = max(shapes[place][0] if feed[name].ndim else 1 for place, name in names.items())
            made: dict[str, list[NDArray[Any]]] = {name: [] for name in activations}
            for first in range(0, rows, at_once):
                chosen = np.arange(first, first + at_once).clip(max=rows - 1)  # the last row fills up
                for place, name in names.items():
                    interpreter.set_tensor(place, _rows(feed[name], chosen).reshape(shapes[place]))
                interpreter.invoke()
                for name in activations:
                    several = interpreter.get_tensor(int(name))
                    has_rows = several.shape[:1] == (at_once,)
                    made[name] += np.split(several, at_once)[: rows - first] if has_rows else [several]
            return {name: np.stack(each) for name, each in made.items()}

        return run


_AEQ = {"TRANSPOSE_CONV": "CONV_2D_TRANSPOSE"}
"""Operators that ai-edge-quantizer calls otherwise."""


def _half() -> tuple[Any, str]:
    """Weights in half precision, turned to float where a kernel wants that."""
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    config = qtyping.OpQuantizationConfig(
        weight_tensor_config=weights, compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True
    )
    return config, AlgorithmName.FLOAT_CASTING


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _places(tensors: Any, *, first: bool = False) -> tuple[str, ...]:
    """Tensors as names; of a transposed convolution without the shape that it takes first, and image before weights."""
    places = [str(place) for place in tensors if place >= 0]
    return (places[2], places[1], *places[3:]) if first else tuple(places)


def _input_name(stage: Stage, name: str) -> str:
    """``args_2`` is the stage's third input; a name of the stage is itself."""
    return name if name in stage.inputs else stage.inputs[int(name.rpartition("_")[2])]


def _rows(array: NDArray[Any], chosen: NDArray[np.intp]) -> NDArray[Any]:
    if array.ndim == 0:
        return array
    some = array[chosen]
    return np.ascontiguousarray(some.transpose(0, 2, 3, 1)) if some.ndim == 4 else some
