"""Operators that litert-torch 0.10 does not take, or writes as ones that no interpreter has, or only new ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

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
        aten.conv_transpose1d.default: _transposed,
        aten.conv_transpose2d.input: _transposed,
        aten.upsample_nearest2d.vec: _nearest,
        aten.view.default: aten.reshape.default,  # an image lies channel-last now, which no view of it may see
    }
    for node in list(module.graph.nodes):
        node.target = replacements.get(node.target, node.target)
        if node.target in (aten._assert_async.default, aten._assert_async.msg):
            module.graph.erase_node(node)
        elif (
            node.target is operator.getitem
            and node.args[1] == 1
            and node.users
            and "max_pool" in str(node.args[0].target)
        ):
            raise LoweringError(f"{node.args[0].target}: where the largest values are is not to be had")
        elif node.target in (aten.conv3d.default, aten.conv3d.padding):
            raise LoweringError(f"{node.target}: litert-torch 0.10 takes the process down with it")
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


def _transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
) -> Tensor:
    """A transposed convolution as LiteRT has it, which pads nothing or so that sizes grow by the stride.

    Others are computed without padding, and a part is cut out; what lies beyond is the bias alone. A row is an image of
    that height.
    """
    if x.ndim == 3:
        sizes = ((1, *stride), (0, *padding), (0, *output_padding), groups, (1, *dilation))
        return _transposed(x[:, :, None], weight[:, :, None], bias, *sizes).squeeze(2)
    stride, padding, output_padding, dilation = (
        tuple(each) * (2 // len(each)) for each in (stride, padding, output_padding, dilation)
    )
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    grows_by_stride = all(r - s == 2 * p for r, s, p in zip(reach, stride, padding, strict=True))
    function = torch.ops.aten.conv_transpose2d.input
    if not any(output_padding) and (grows_by_stride or not any(padding)):
        return cast("Tensor", function(x, weight, bias, stride, padding, output_padding, groups, dilation))
    count = x.shape[1] // groups
    parts = [(x.narrow(1, at, count), weight.narrow(0, at, count)) for at in range(0, x.shape[1], count)]
    made = torch.cat([function(part, of, None, stride, (0, 0), (0, 0), 1, dilation) for part, of in parts], 1)
    for dim, (before, after) in enumerate(zip(padding, output_padding, strict=True), start=2):
        size = made.shape[dim] - 2 * before + after
        missing = max(0, before + size - made.shape[dim])
        made = torch.nn.functional.pad(made, (0, missing) if dim == 3 else (0, 0, 0, missing))
        made = made.narrow(dim, before, size)
    return made if bias is None else made + bias[:, None, None]


def _nearest(x: Tensor, output_size: Sequence[int] | None, scale_factors: Sequence[float] | None = None) -> Tensor:
    """LiteRT's own, as litert-torch 0.10 writes it, has pixels' centres at halves: right for whole factors alone."""
    before = x.shape[2:]
    sizes = output_size or [int(size * factor) for size, factor in zip(before, scale_factors or (), strict=True)]
    if all(after % size == 0 for after, size in zip(sizes, before, strict=True)):
        return cast("Tensor", torch.ops.aten.upsample_nearest2d.vec(x, output_size, scale_factors))
    for place, (after, size) in enumerate(zip(sizes, before, strict=True)):
        step = size / after if scale_factors is None else 1 / scale_factors[place]
        index = (torch.arange(after, dtype=torch.float32) * step).to(torch.int64).clamp(max=size - 1)
        x = x.index_select(2 + place, index)
    return x
