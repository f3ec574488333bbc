"""Samples that need one another: where a sample's result depends on which others are in its batch.

Inside a gate that is allowed, as with statistics over the batch or attention between samples: all rows are then run as
soon as one needs what the gate guards. Anywhere else the answers would change with the batch, and the model is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from edgekit.errors import CaptureError
from edgekit.exporters.capture import Captured
from edgekit.exporters.decisions import ExitPoint
from edgekit.exporters.gates import GatePoint, Gates
from edgekit.exporters.graph import batch_dimension
from edgekit.exporters.hard import operator_name
from edgekit.exporters.parity import ForcedGraph
from edgekit.exporters.partition import Cut, Part
from edgekit.exporters.source import where
from edgekit.tensors import BATCH

__all__ = ["mixing_gates", "require_all_rows"]

TOLERANCE = 1e-4
"""Largest difference that is rounding, relative to the largest value, or absolute below 1."""


def mixing_gates(
    captured: Captured, exits: Sequence[ExitPoint], gates: Gates, inputs: Sequence[Tensor]
) -> dict[str, str]:
    """The gates that give a sample another result when others are in its batch, and the operator that does it.

    Every part is run on the last half of a batch, from what it read with the whole batch. With all gates open, and
    with all closed, so that what no sample at hand needs is looked at too.

    Args:
        captured: the model's graph.
        exits: whose logits are needed.
        gates: of the graph.
        inputs: one tensor per network input, at least two rows.

    Raises:
        CaptureError: an exit depends on other samples through an operator outside all gates; it is named.
    """
    if captured.batch != BATCH:
        return {}
    found: dict[str, str] = {}
    for is_open in (True, False):
        forced = {gate.value: is_open for gate in gates.all() if gate.binary or not is_open}
        whole = ForcedGraph(captured, exits, forced)
        whole.exits(inputs)
        mixed: set[Node] = set()
        for gate in gates.all():
            culprit = _Half(whole, gate.nodes, forced).culprit(gate.outputs)
            if culprit is not None:
                found.setdefault(gate.name, _described(culprit))
                mixed |= gate.nodes
        always = _Half(whole, set(whole.env) - mixed, forced)
        for point in exits:
            culprit = always.culprit([point.node])
            if culprit is not None:
                raise CaptureError(
                    f"exit '{point.name}' answers otherwise when other samples are in the batch: "
                    f"{_described(culprit)} mixes them. edgekit needs dimension 0 of every input to be the batch, and "
                    "no mean or normalisation over it outside gates"
                )
    return found


def require_all_rows(parts: Sequence[Part], mixing: Mapping[str, str]) -> None:
    """Refuse a gate that mixes samples behind an exit, where some may have left.

    Raises:
        CaptureError: naming gate, operator and exit.
    """
    left = ""
    for part in parts:
        if isinstance(part, Cut):
            left = left or (part.point.name if part.point is not None else "")
            continue
        for gate in (part.gate, *_inside(part.gate)):
            if left and gate.name in mixing:
                raise CaptureError(
                    f"what gate '{gate.name}' guards mixes the samples of a batch ({mixing[gate.name]}), and samples "
                    f"may have left at exit '{left}' before it: normalise over each sample alone, or drop that exit"
                )


def _inside(gate: GatePoint) -> Iterable[GatePoint]:
    for inner in (*gate.open.gates, *gate.closed.gates):
        yield inner
        yield from _inside(inner)


def _described(node: Node) -> str:
    return f"{operator_name(node) or node.name} '{node.name}'{where(node)}"


class _Half:
    """Part of a graph, run on the last half of a batch; what it reads is taken from a run of the whole batch."""

    def __init__(self, whole: ForcedGraph, nodes: Collection[Node], forced: Mapping[Node, bool]) -> None:
        self.whole = whole
        self.rows = whole.captured.rows
        self.made: dict[Node, Any] = {}
        for node in whole.captured.program.graph.nodes:
            if node in nodes and node.op == "call_function":
                self.made[node] = self._run(node)
                if node in forced:
                    self.made[node] = torch.full_like(self.made[node], int(forced[node]))

    def culprit(self, outputs: Iterable[Node]) -> Node | None:
        """The operator that makes one of these other than with the whole batch."""
        node = next((each for each in outputs if self._differs(each)), None)
        while node is not None:
            before = next((each for each in node.all_input_nodes if self._differs(each)), None)
            if before is None:
                return node
            node = before
        return None

    def _run(self, node: Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), self._value)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _value(self, node: Node) -> Any:
        if node in self.made:
            return self.made[node]
        value = self.whole.env[node]
        if isinstance(value, Tensor):
            return self._half(node, value)
        if isinstance(value, int | float | bool) and node.op == "call_function":
            self.made[node] = self._run(node)  # a size: of half as many rows
            return self.made[node]
        return value

    def _half(self, node: Node, value: Tensor) -> Tensor:
        batch = batch_dimension(node, self.rows)
        return value if batch is None else value.tensor_split(2, batch)[1]

    def _differs(self, node: Node) -> bool:
        given, whole = self.made.get(node), self.whole.env.get(node)
        if not isinstance(given, Tensor) or not isinstance(whole, Tensor):
            return False
        expected = self._half(node, whole)
        if given.shape != expected.shape:  # one number for each pair of samples, or a list of rows
            return False
        given, expected = given.double(), expected.double()
        finite = expected[expected.isfinite()].abs()
        allowed = TOLERANCE * max(1.0, float(finite.max()) if len(finite) else 0.0)
        return not torch.isclose(given, expected, rtol=0, atol=allowed, equal_nan=True).all()
