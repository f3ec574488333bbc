"""New nodes in a captured graph, with what their results look like."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

__all__ = ["drop_unread", "made_before", "remember", "total"]


def made_before(program: ExportedProgram, at: Node, operation: Any, *args: Any) -> Node:
    """A new node before another, which it comes from."""
    with program.graph.inserting_before(at):
        made = program.graph.call_function(operation, args)
    made.meta = {key: value for key, value in at.meta.items() if key != "val"}
    remember(made)
    return made


def total(program: ExportedProgram, at: Node, parts: Sequence[Node]) -> Node:
    """The sum of some tensors, made before another."""
    return functools.reduce(lambda one, two: made_before(program, at, torch.ops.aten.add.Tensor, one, two), parts)


def remember(node: Node) -> None:
    """Work out anew what a node's result looks like."""
    if node.op != "call_function":
        return
    target: Any = node.target
    values = pytree.tree_map(lambda arg: arg.meta["val"] if isinstance(arg, Node) else arg, (node.args, node.kwargs))
    fakes = [value for value in pytree.tree_leaves(values) if isinstance(value, torch._subclasses.FakeTensor)]
    if not fakes:
        node.meta["val"] = target(*values[0], **values[1])
        return
    with fakes[0].fake_mode, torch.no_grad():
        node.meta["val"] = target(*values[0], **values[1])


def drop_unread(program: ExportedProgram) -> None:
    """Remove what nothing reads any more, checks of row counts among it."""
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and not node.users:
            program.graph.erase_node(node)
