"""Finds the exits: which of a model's outputs are logits, and in which order they are reached."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from edgekit.errors import DecisionError
from edgekit.exporters.capture import Captured, Output
from edgekit.exporters.graph import ancestors
from edgekit.exporters.hard import operator_name

__all__ = ["ExitPoint", "find_exits"]

_VIEWS = ("view", "reshape", "flatten", "squeeze", "unsqueeze", "clone", "alias", "_to_copy", "contiguous")
_SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)


@dataclass(frozen=True, kw_only=True)
class ExitPoint:
    """A place where the network can stop.

    Attributes:
        name: of the exit; empty until an output of a tuple or list is given its number.
        path: of the output it was found in, as :attr:`edgekit.exporters.capture.Output.path`; ``None`` when the user
            named a module.
        node: that computes its logits ``(batch, classes)``.
        probabilities: the model returns ``softmax(logits)``; ``node`` is what enters that softmax.
    """

    name: str
    path: str | None
    node: Node
    probabilities: bool = False


def find_exits(
    captured: Captured,
    *,
    names: Sequence[str] | None = None,
    macs: Mapping[Node, int] | None = None,
    gate_values: Sequence[Node] = (),
) -> tuple[tuple[ExitPoint, ...], tuple[str, ...]]:
    """The exits in the order in which they are reached, and notes on what was left out.

    Args:
        captured: the model's graph.
        names: outputs (their paths, as ``"0"`` or ``"aux.logits"``) or modules (as ``"branch1"``) that are exits, in
            order; found by themselves when ``None``: the 2-D floating-point outputs with one row per sample.
        macs: of each node. With them, outputs that a model returns in another order than it computes them (the final
            one first, as GoogLeNet does) are put in order of the work that leads to them.
        gate_values: hard values. Outputs that lead to one (a gate's probabilities, which networks return to train it)
            are not taken for logits where there are others.

    Raises:
        DecisionError: no output is logits, or several kinds of outputs could be.
    """
    if names is None:
        points = [_point(captured, output) for output in _logits(captured, macs or {}, gate_values)]
    elif isinstance(names, str) or not names:
        raise DecisionError("exits must be a list of names, as ['branch1', 'branch2']; leave it out to have them found")
    else:
        points = [_named(captured, name) for name in names]
    notes = _left_out(captured.outputs, {point.path for point in points})
    points, doubled = _distinct(points)
    notes.extend(doubled)
    if names is None and macs is not None:
        ordered = _in_order(points, macs)
        if ordered != points:
            points = ordered
            listing = ", ".join(f"'{point.path}'" for point in points)
            notes.append(f"exits are in the order of the work that leads to them: outputs {listing}")
    sizes = {int(point.node.meta["val"].shape[1]) for point in points}
    if len(sizes) > 1:
        raise DecisionError(f"exits disagree on the number of classes: {sorted(sizes)}")
    return _numbered(points), tuple(notes)


def _left_out(outputs: Sequence[Output], exits: Container[str | None]) -> list[str]:
    """Notes on outputs that are no exits; those of one list or dictionary together."""
    groups: dict[str, list[Output]] = defaultdict(list)
    for output in outputs:
        if output.path not in exits:
            groups[output.path.rpartition(".")[0] or output.path].append(output)
    return [
        f"output '{members[0].path}' {tuple(members[0].value.shape)} is not an exit and is left out"
        if len(members) == 1
        else f"{len(members)} outputs '{group}.*' are no exits and are left out"
        for group, members in groups.items()
    ]


def _in_order(points: Sequence[ExitPoint], macs: Mapping[Node, int]) -> list[ExitPoint]:
    """The points as they are, or sorted where an earlier one takes more work.

    What counts first is the work that leads to a point and to another one too, the trunk: a heavy exit head does not
    make its exit a late one.
    """
    leading = {point.node: ancestors([point.node]) for point in points}
    shared = Counter(node for nodes in leading.values() for node in nodes)

    def effort(point: ExitPoint) -> tuple[int, int]:
        trunk = sum(macs.get(node, 0) for node in leading[point.node] if shared[node] > 1)
        return trunk, _work(point.node, macs)[0]

    return sorted(points, key=effort)


def _work(node: Node, macs: Mapping[Node, int]) -> tuple[int, int]:
    """What it takes to compute a node: MACs, then operators."""
    needed = ancestors([node])
    return sum(macs.get(other, 0) for other in needed), len(needed)


def _numbered(points: Sequence[ExitPoint]) -> tuple[ExitPoint, ...]:
    """Exits without a name of their own are called after their place: ``exit1``, ``exit2``."""
    taken = {point.name for point in points}
    return tuple(
        point if point.name else replace(point, name=_unused(f"exit{place}", taken))
        for place, point in enumerate(points, start=1)
    )


def _unused(wish: str, taken: Container[str]) -> str:
    return wish if wish not in taken else _unused(f"{wish}_", taken)


def _logits(captured: Captured, macs: Mapping[Node, int], gate_values: Sequence[Node]) -> list[Output]:
    """The outputs that can only be logits: the largest group of one shape, if the last answer is among them."""
    rows = len(captured.example[0])
    groups: dict[int, list[Output]] = defaultdict(list)
    for output in captured.outputs:
        value = output.value
        if value.ndim == 2 and value.is_floating_point() and len(value) == rows and value.shape[1] > 1:
            groups[value.shape[1]].append(output)
    listing = ", ".join(
        f"'{output.path}' {output.value.dtype} {tuple(output.value.shape)}" for output in captured.outputs
    )
    if not groups:
        stacked = any(output.value.ndim == 3 and rows in output.value.shape[:2] for output in captured.outputs)
        mend = "return exits in a list, not stacked in one tensor" if stacked else "return logits"
        raise DecisionError(
            f"no output is logits of shape (batch, classes); the model returns {listing or 'no tensor'}: "
            f"{mend}, or name the module that gives them with exits=[...]"
        )
    if len(groups) > 1:
        leading = ancestors(gate_values)
        apart = {size: group for size, group in groups.items() if not all(_before(o.node) in leading for o in group)}
        groups = apart or groups
    largest = max(len(group) for group in groups.values())
    candidates = [group for group in groups.values() if len(group) == largest]
    last = max((output for group in groups.values() for output in group), key=lambda output: _work(output.node, macs))
    if len(candidates) > 1 or not any(output is last for output in candidates[0]):
        raise DecisionError(
            f"several kinds of outputs could be logits ({listing}): name the exits, in order, with exits=[...]"
        )
    return candidates[0]


def _named(captured: Captured, name: str) -> ExitPoint:
    output = next((output for output in captured.outputs if output.path == name), None)
    if output is not None:
        point = _point(captured, output)
    else:
        node = _module_output(captured, name)
        before = _before_softmax(node)
        point = ExitPoint(name=name, path=None, node=before or node, probabilities=before is not None)
    value = point.node.meta["val"]
    if value.ndim != 2 or not value.is_floating_point() or value.shape[1] < 2:
        raise DecisionError(f"exit '{name}' is {value.dtype} {tuple(value.shape)}, not logits (batch, classes)")
    return point


def _point(captured: Captured, output: Output) -> ExitPoint:
    name = output.path
    before = _before_softmax(output.node)
    if before is None and _looks_like_probabilities(output):
        raise DecisionError(
            f"output '{output.path}' holds probabilities, not logits, and no softmax at its end was found: "
            "return the logits"
        )
    return ExitPoint(
        name="" if name.split(".")[-1].isdigit() else name,
        path=output.path,
        node=before or output.node,
        probabilities=before is not None,
    )


def _before_softmax(node: Node) -> Node | None:
    """What enters the softmax over classes that ends in ``node``, if one does."""
    shape = tuple(node.meta["val"].shape)
    while node.op == "call_function" and operator_name(node) in _VIEWS:
        node = node.all_input_nodes[0]
    if node.op != "call_function" or node.target not in _SOFTMAX:
        return None
    source, dimension = node.args[0], node.args[1]
    if isinstance(source, Node) and tuple(source.meta["val"].shape) == shape and dimension in (1, -1):
        return source
    return None


def _before(node: Node) -> Node:
    """What a tensor is a mere softmax or view of."""
    while node.op == "call_function" and (
        operator_name(node) in _VIEWS or "softmax" in operator_name(node) or operator_name(node) in ("log", "sigmoid")
    ):
        node = node.all_input_nodes[0]
    return node


def _looks_like_probabilities(output: Output) -> bool:
    value = output.value.double()
    if value.ndim != 2:
        return False
    sums = value.sum(1)
    return bool((value >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)


def _module_output(captured: Captured, path: str) -> Node:
    """The one tensor that leaves a module."""

    def inside(node: Node) -> bool:
        stack = node.meta.get("nn_module_stack") or {}
        return any(name == path or name.startswith(path + ".") for name, _ in stack.values())

    body = [node for node in captured.program.graph.nodes if node.op == "call_function" and inside(node)]
    leaving = [node for node in body if any(not inside(user) for user in node.users)]
    if not body:
        outputs = ", ".join(f"'{output.path}'" for output in captured.outputs)
        raise DecisionError(f"exit '{path}' is neither an output ({outputs}) nor a module that the forward runs")
    if len(leaving) != 1:
        raise DecisionError(f"module '{path}' gives {len(leaving)} tensors, an exit needs one: name another module")
    return leaving[0]


def _distinct(points: Sequence[ExitPoint]) -> tuple[list[ExitPoint], list[str]]:
    """Exits that are one and the same tensor count once, under the last name."""
    kept: dict[Node, ExitPoint] = {}
    notes = []
    for point in points:
        if point.node in kept:
            notes.append(f"exits {_called(kept[point.node])} and {_called(point)} are the same tensor: kept once")
            del kept[point.node]
        kept[point.node] = point
    return list(kept.values()), notes


def _called(point: ExitPoint) -> str:
    return f"'{point.name if point.path is None else point.path}'"
