"""Counts multiply-accumulates of each node, with PyTorch's own formulas, without computing anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs"]


def count_macs(program: ExportedProgram, *, rows: int) -> dict[Node, int] | None:
    """MACs of each node for one sample, or ``None`` where an operator has no shape function to count with.

    Args:
        program: whose placeholders carry example values.
        rows: samples in the example batch.

    A fused multiply-add is one MAC and two FLOPs, as :mod:`torch.utils.flop_counter` counts them.
    """
    counter = _Counter(program, rows)
    inputs = [_on_meta(node.meta.get("val"), rows) for node in program.graph.nodes if node.op == "placeholder"]
    try:
        with torch.no_grad():
            counter.run(*inputs)
    except (NotImplementedError, RuntimeError):
        return None
    return {node: flops // (2 * rows) for node, flops in counter.flops.items()}


class _Counter(Interpreter):
    """Runs a graph on the meta device, where tensors have shapes but no values."""

    def __init__(self, program: ExportedProgram, rows: int) -> None:
        super().__init__(program.graph_module)
        self.rows = rows
        self.flops: dict[Node, int] = {}
        self._mode = FlopCounterMode(display=False)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with self._mode:
            return super().run(*args, **kwargs)

    def run_node(self, n: Node) -> Any:
        if getattr(n.target, "_opname", "") in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            # No shape function, and no formula in PyTorch's counter.
            self.flops[n] = 2 * self.rows * _recurrent_macs(n)
            return pytree.tree_map(lambda value: _on_meta(value, self.rows), n.meta["val"])
        before = self._mode.get_total_flops()
        result = pytree.tree_map(_off_device, super().run_node(n))
        self.flops[n] = self._mode.get_total_flops() - before
        return result


def _recurrent_macs(node: Node) -> int:
    """Every weight of a recurrent layer is used once at each step."""
    given: dict[str, Any] = {
        argument.name: value
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False)  # type: ignore[union-attr]
    }
    steps = int(given["input"].meta["val"].shape[1 if given.get("batch_first") else 0])
    weights = [weight.meta["val"] for weight in given["params"]]
    return steps * sum(weight.numel() for weight in weights if weight.ndim == 2)


def _off_device(value: Any) -> Any:
    """What the forward itself makes, as zeros to add to, comes with values."""
    return value.to("meta") if isinstance(value, Tensor) else value


def _on_meta(value: Any, rows: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    shape = [size if isinstance(size, int) else rows for size in value.shape]
    return torch.empty(shape, dtype=value.dtype, device="meta")
