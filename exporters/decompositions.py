"""Operators that few targets have, in terms of those that all have.

They are replaced in the captured graph itself, so that whoever looks for decisions, counts MACs or writes a stage sees
the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.operator_schemas import normalize_function

__all__ = ["decompositions"]


def decompositions(graph: Graph) -> dict[Any, Callable[..., Any]]:
    """What to replace in a graph, by operator: those of which every use can be."""
    aten = torch.ops.aten
    known: dict[Any, tuple[Callable[[Node], bool], Callable[..., Any]]] = {
        aten.adaptive_max_pool2d.default: (_gives_no_places, _adaptive_max),
        aten.avg_pool3d.default: (_is_over_channels, _mean_over_channels),
        aten.bilinear.default: (lambda node: True, _bilinear),
        aten.rrelu.default: (lambda node: not _given(node)["training"], _rrelu),
    }
    used = [node for node in graph.nodes if node.target in known]
    kept = {node.target for node in used if not known[node.target][0](node)}
    return {node.target: known[node.target][1] for node in used if node.target not in kept}


def _given(node: Node) -> dict[str, Any]:
    """An operator's arguments by name, with those that were left out."""
    found = normalize_function(node.target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)  # type: ignore[arg-type]
    assert found is not None
    return dict(found.kwargs)


def _gives_no_places(node: Node) -> bool:
    return not any(user.target is operator.getitem and user.args[1] == 1 and user.users for user in node.users)


def _adaptive_max(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The largest of each cell; the places, which nobody reads, are zeros."""
    for dim, count in zip((-2, -1), output_size, strict=True):
        size = x.shape[dim]
        ends = [(place * size // count, -(-(place + 1) * size // count)) for place in range(count)]
        x = torch.cat([x.narrow(dim, begin, end - begin).amax(dim, keepdim=True) for begin, end in ends], dim)
    return x, torch.zeros_like(x, dtype=torch.int64)


def _is_over_channels(node: Node) -> bool:
    """As in local response normalisation, which pads before."""
    given = _given(node)
    kernel, stride, padding = (list(given[name]) for name in ("kernel_size", "stride", "padding"))
    return kernel[1:] == [1, 1] and set(stride) == {1} and set(padding) == {0} and given["divisor_override"] is None


def _mean_over_channels(x: Tensor, kernel_size: Sequence[int], *others: Any, **options: Any) -> Tensor:
    count = kernel_size[0]
    size = x.shape[-3] - count + 1
    total = x.narrow(-3, 0, size)
    for place in range(1, count):
        total = total + x.narrow(-3, place, size)
    return total / count


def _bilinear(one: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y_o = x1^T W_o x2 + b_o``; ``weight``: ``(outputs, in1, in2)``."""
    left = torch.matmul(one[..., None, None, :], weight).squeeze(-2)
    made = torch.matmul(left, other[..., :, None]).squeeze(-1)
    return made if bias is None else made + bias


def _rrelu(x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *others: Any) -> Tensor:
    """As in evaluation."""
    return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)
