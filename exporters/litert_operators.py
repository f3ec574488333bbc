"""Operators that litert-torch 0.10 does not take, or writes as ones that no interpreter has, or only new ones."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from edgekit.errors import LoweringError
from edgekit.exporters import ranking  # noqa: F401 registers the operator

__all__ = ["rewrite_operators"]


def rewrite_operators(module: GraphModule) -> None:
    """Put others in their place; the module is traced again afterwards.

    Raises:
        LoweringError: an operator that would be written wrong; the message names it.
    """
    aten = torch.ops.aten
    replacements: dict[Any, Callable[..., Any]] = {
        torch.ops.edgekit.topk.default: _largest,
        aten.topk.default: _largest,
        aten.sort.default: _sorted,
        aten.sort.stable: _stably_sorted,
        aten.argsort.default: _places,
        aten.scatter.src: _scattered,
        aten.scatter.value: _scattered,
        aten.one_hot.default: _one_hot,
        aten.view.default: aten.reshape.default,  # an image lies channel-last now, which no view of it may see
    }
    for node in list(module.graph.nodes):
        node.target = replacements.get(node.target, node.target)
        if node.target in (aten._assert_async.default, aten._assert_async.msg):
            module.graph.erase_node(node)
        elif node.target is operator.getitem and node.args[1] == 1 and "max_pool" in str(node.args[0].target):
            raise LoweringError(f"{node.args[0].target}: where the largest values are is not to be had")
    module.recompile()


def _largest(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:  # noqa: A002, FBT
    """LiteRT's own top-k, which takes the lowest index of equal values, as ours does."""
    x = x.movedim(dim, -1)
    values, places = torch.ops.tfl.topk_v2(x if largest else -x, k)
    return (values if largest else -values).movedim(-1, dim), places.long().movedim(-1, dim)


def _sorted(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """The largest of all, in order, equal values in the order in which they are: stable."""
    return _largest(x, x.shape[dim], dim, descending)


def _stably_sorted(x: Tensor, *, stable: bool = True, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    return _sorted(x, dim, descending)


def _places(x: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    return _sorted(x, dim, descending)[1]


def _scattered(x: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """``x.scatter(dim, index, value)`` by comparing the index with every place along the dimension.

    Only where index and tensor have the same size in all other dimensions, as a router's have. Where an index is there
    twice, PyTorch leaves open which value is taken; here it is the later one.
    """
    others = [size for place, size in enumerate(x.shape) if place != dim % x.ndim]
    if others != [size for place, size in enumerate(index.shape) if place != dim % x.ndim]:
        return torch.ops.aten.scatter(x, dim, index, value)
    made, places = x.movedim(dim, -1), torch.arange(x.shape[dim])
    for number in range(index.shape[dim]):
        chosen = index.select(dim, number)[..., None] == places
        made = torch.where(chosen, value.select(dim, number)[..., None] if isinstance(value, Tensor) else value, made)
    return made.movedim(-1, dim)


def _one_hot(x: Tensor, classes: int = -1) -> Tensor:
    if classes < 0:
        raise LoweringError("aten.one_hot.default: the number of classes must be given")
    return (x[..., None] == torch.arange(classes)).long()
