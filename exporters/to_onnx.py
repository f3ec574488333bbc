"""Lowers a stage to ONNX with a batch of any size.

ONNX Runtime computes every node of a file, whether or not its result is asked for. So a stage is written several
times, with and without what is optional, over one file of weights (one that ends in no exit, once)::

    blocks.1.onnx             live tensors and logits
    blocks.1-max_prob.onnx    and that score; likewise margin and neg_entropy
    blocks.1-trunk.onnx       live tensors only, for an exit that is never taken; none for a last stage
    blocks.1-weights.bin      what all of them read
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.bundle import variant
from edgekit.errors import LoweringError, require
from edgekit.exporters import ranking  # noqa: F401 registers the operator
from edgekit.exporters.capture import quiet
from edgekit.plan import SCORES, Stage
from edgekit.tensors import TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram

__all__ = ["OnnxTarget", "write_variants"]

OPSET = 18
"""Newest operator set that TensorRT 8.6, the oldest runtime aimed at, reads whole."""

SMALL_BYTES = 1024
"""Constants up to this size stay in the graph files."""


class OnnxTarget:
    """ONNX through PyTorch's exporter. See :class:`edgekit.interfaces.Target`."""

    name = "onnx"
    suffix = ".onnx"
    runtime = "onnxruntime"

    def __init__(self) -> None:
        for module in ("onnx", "onnxscript", "onnx_ir"):
            require(module, extra="export", purpose="Exporting to ONNX")

    def lower(self, program: ExportedProgram, stage: Stage, path: Path, *, specs: Mapping[str, TensorSpec]) -> None:
        """Write a stage. See :meth:`edgekit.interfaces.Target.lower`."""
        import torch

        try:
            with quiet(), _operators_listed_once():
                onnx_program = torch.onnx.export(
                    program,
                    dynamo=True,
                    input_names=list(stage.inputs),
                    output_names=list(stage.outputs),
                    opset_version=OPSET,
                    custom_translation_table={torch.ops.edgekit.topk.default: _topk},
                    verbose=False,
                )
        except torch.onnx.errors.OnnxExporterError as error:
            cause = error.__cause__ or error
            line = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            raise LoweringError(f"stage '{stage.name}' cannot be written as ONNX: {line}") from error
        assert onnx_program is not None
        _make_unique(onnx_program.model.graph)
        _pool_globally(onnx_program.model.graph)
        write_variants(onnx_program.model, stage, path)

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that write the artifact."""
        return {name: version(name) for name in ("onnx", "onnxscript", "torch")}


_listed: list[Any] = []


@contextmanager
def _operators_listed_once() -> Iterator[None]:
    """Keep the exporter's list of operators: it parses the source of all of them for every file that it writes.

    That takes longer than a small stage. Where the exporter keeps its list elsewhere, nothing is changed.
    """
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("onnxscript._framework_apis.")]
    given = {module: vars(module)["get_torchlib_ops"] for module in modules if "get_torchlib_ops" in vars(module)}

    def listed() -> list[Any]:
        if not _listed:
            _listed.extend(next(iter(given.values()))())
        return list(_listed)

    for module in given:
        module.get_torchlib_ops = listed  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, original in given.items():
            module.get_torchlib_ops = original  # type: ignore[attr-defined]


def _topk(x: Any, k: int, dim: int) -> Any:
    """ONNX's TopK takes the lowest index of equal values, as :func:`edgekit.exporters.ranking.topk` does."""
    from onnxscript import opset18

    count: Any = opset18.Constant(value_ints=[k])
    return opset18.TopK(x, count, axis=dim, largest=1, sorted=1)


def _make_unique(graph: ir.Graph) -> None:
    """Rename inner values that share a name with an input or output: ONNX has one name space for both."""
    boundary = [*graph.inputs, *graph.outputs]
    taken = {value.name for value in boundary}
    inner = [value for node in graph for value in node.outputs if not value.is_graph_output()]
    for value in [*inner, *graph.initializers.values()]:
        if value.name in taken and not any(value is other for other in boundary):
            value.name = f"{value.name}.inner"


def _pool_globally(graph: ir.Graph) -> None:
    """Write means over height and width as GlobalAveragePool.

    ONNX Runtime's ReduceMean rounds by where a row lies in memory, so a row's answer would differ from batch to batch.
    """
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) != 2:
            continue
        image, axes = node.inputs
        known = axes.const_value if axes is not None else None
        if image is None or image.shape is None or len(image.shape) != 4 or known is None:
            continue
        if sorted(axis % 4 for axis in known.numpy().tolist()) != [2, 3]:
            continue
        kept = node.attributes.get_int("keepdims", 1)
        pooled = ir.node("GlobalAveragePool", [image])
        graph.insert_before(node, pooled)
        operator, settings = ("Identity", None) if kept else ("Flatten", {"axis": 1})
        shaped = ir.node(operator, pooled.outputs, attributes=settings)
        graph.insert_before(node, shaped)
        made = node.outputs[0]
        shaped.outputs[0].type, shaped.outputs[0].shape = made.type, made.shape  # an output of the file must have them
        name = made.name
        ir.convenience.replace_all_uses_with(node.outputs, shaped.outputs, replace_graph_outputs=True)
        node.outputs[0].name, shaped.outputs[0].name = f"{name}.mean", name
        graph.remove(node, safe=True)


def write_variants(
    model: ir.Model,
    stage: Stage,
    path: Path,
    *,
    small_bytes: int = SMALL_BYTES,
    save: Callable[[ir.Model, Path], object] | None = None,
) -> None:
    """Write the graph files, each with fewer outputs than the whole, and the weights beside them.

    Args:
        model: of the whole stage; the metadata of its nodes are dropped.
        stage: that it computes.
        path: of the file with live tensors and logits.
        small_bytes: constants up to this size stay in the graph files.
        save: writes one graph; ``onnx_ir.save`` if ``None``.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

    # The exporter leaves stack traces, with the paths of the machine that it ran on, in every node.
    model = ClearMetadataAndDocStringPass()(model).model
    variants = {path: stage.outputs}
    if stage.exit:
        logits, *scores = stage.head
        variants = {path: (*stage.live, logits)}
        for name, score in zip(SCORES, scores, strict=True):
            variants[variant(path, name)] = (*stage.live, logits, score)
        if stage.live:
            variants[variant(path, "trunk")] = stage.live
    ir.external_data.unload_from_model(model, path.parent, f"{path.stem}-weights.bin", size_threshold_bytes=small_bytes)
    for file, outputs in variants.items():
        pruned = model.clone()
        kept = {value.name: value for value in pruned.graph.outputs}
        pruned.graph.outputs[:] = [kept[name] for name in outputs]
        (save or ir.save)(RemoveUnusedNodesPass()(pruned).model, file)
