"""Ranking with a rule for ties: of equal values the one with the lowest index comes first, in every runtime.

``torch.topk`` leaves it open which of equal values it takes, and takes others than ONNX Runtime does. A router that was
initialised with zeros always ties.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

__all__ = ["rank_by_rule", "topk"]


@torch.library.custom_op("edgekit::topk", mutates_args=())
def topk(x: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest values along a dimension, descending, and their indices ``int64``; ties by lowest index."""
    values, indices = torch.sort(x, dim=dim, descending=True, stable=True)
    return values.narrow(dim, 0, k).clone(), indices.narrow(dim, 0, k).clone()


@topk.register_fake
def _(x: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    shape = list(x.shape)
    shape[dim] = k
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def rank_by_rule(program: ExportedProgram) -> None:
    """Put :func:`topk` in the place of ``torch.topk``."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.topk.default and node.args[3:4] != (False,):
            given: Any = node.args
            node.target = torch.ops.edgekit.topk.default
            node.args = (given[0], given[1], given[2] if len(given) > 2 else -1)
            node.kwargs = {}
