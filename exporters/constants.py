"""Constants that gates compare a score with become inputs: ``p > 0.5`` becomes ``p > threshold``.

As with an exit's temperature, another value then needs no other file: a policy says it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

from edgekit.exporters.capture import Captured
from edgekit.exporters.gates import Gates
from edgekit.exporters.hard import operator_name

__all__ = ["Compared", "constants_as_inputs"]

_TENSORS = {name: getattr(torch.ops.aten, name).Tensor for name in ("gt", "ge", "lt", "le")}
_OPERATORS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Compared:
    """A comparison that opens and closes gates.

    Attributes:
        placeholder: of the constant, from now on an input of the graph.
        name: of the constant.
        score: what is compared with it.
        operator: ``score <operator> constant``.
        value: of the constant as the network was trained.
        gates: names of the gates.
    """

    placeholder: Node
    name: str
    score: Node
    operator: str
    value: float
    gates: tuple[str, ...]


def constants_as_inputs(captured: Captured, gates: Gates) -> tuple[Compared, ...]:
    """Rewrite in place every comparison of a floating-point score with a number that a gate's value comes from."""
    gates_of: dict[Node, list[str]] = {}
    for gate in gates.all():
        origin = gates.hard[gate.value].origin
        if _compares(origin, gates):
            gates_of.setdefault(origin, []).append(gate.name)
    return tuple(_as_input(captured, origin, tuple(names)) for origin, names in gates_of.items())


def _compares(node: Node, gates: Gates) -> bool:
    if operator_name(node) not in _TENSORS or len(node.args) != 2 or not isinstance(node.args[1], int | float):
        return False
    score = node.args[0]
    value = score.meta.get("val") if isinstance(score, Node) and score not in gates.hard else None
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _as_input(captured: Captured, origin: Node, names: tuple[str, ...]) -> Compared:
    program, name = captured.program, operator_name(origin)
    score, number = origin.args
    assert isinstance(score, Node)
    assert isinstance(number, int | float)
    with program.graph.inserting_before(next(iter(program.graph.nodes))):
        placeholder = program.graph.placeholder(f"gate_constant_{origin.name}")
    with score.meta["val"].fake_mode:
        placeholder.meta["val"] = torch.empty((), dtype=torch.float32)
    argument = TensorArgument(name=placeholder.name)
    program.graph_signature.input_specs.insert(
        0, InputSpec(kind=InputKind.CONSTANT_TENSOR, arg=argument, target=placeholder.name)
    )
    program.constants[placeholder.name] = torch.tensor(float(number))
    origin.target, origin.args = _TENSORS[name], (score, placeholder)
    return Compared(placeholder, names[0], score, _OPERATORS[name], float(number), names)
