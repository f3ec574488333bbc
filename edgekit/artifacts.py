"""Names of a bundle's sets of artifacts, one for every kind of device and precision, and of graphs in them."""

from __future__ import annotations

from edgekit.errors import InputError

__all__ = ["CALIBRATED", "FLOAT", "PRECISIONS", "artifact_set", "batch_of", "precision_of", "trunk_of", "unbatched"]

FLOAT = "float32"
"""As the network was exported."""
CALIBRATED = ("int8", "int8-symmetric")
"""Precisions whose ranges of activations come from samples."""
PRECISIONS = (FLOAT, "float16", *CALIBRATED, "int8-dynamic")
"""What stages compute in. Tensors that cross between stages keep the plan's dtypes, whatever it is."""


def artifact_set(target: str, precision: str = FLOAT) -> str:
    """``"onnx"`` and ``"int8"`` are ``"onnx-int8"``; float has the target's own name, and no target has no set.

    Raises:
        InputError: no such precision.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision '{precision}' is not one of {', '.join(PRECISIONS)}")
    return target if precision == FLOAT or not target else f"{target}-{precision}"


def precision_of(artifacts: str) -> str:
    """The precision in a set's name: of ``"onnx-int8"``, ``"int8"``."""
    return next((name for name in PRECISIONS if artifacts.endswith(f"-{name}")), FLOAT)


def trunk_of(stage: str) -> str:
    """What a stage without its exit's head is called in a file that holds both."""
    return f"{stage}:trunk"


def batch_of(graph: str, rows: int) -> str:
    """What a graph of a stage that takes so many rows at once is called in a file that holds that for one as well."""
    return f"{graph}@{rows}"


def unbatched(graph: str) -> tuple[str, int]:
    """The graph for one row, and the rows at once: of ``"blocks.1:trunk@8"``, ``("blocks.1:trunk", 8)``."""
    name, mark, rows = graph.rpartition("@")
    return (name, int(rows)) if mark and rows.isdigit() else (graph, 1)
