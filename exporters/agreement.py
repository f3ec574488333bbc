"""Does a joined graph answer as the model, with the same outcomes forced and with those that the values have?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from edgekit.errors import CaptureError
from edgekit.exporters.forced import ForcedRun, Forward
from edgekit.exporters.graph import ancestors
from edgekit.exporters.source import Place
from edgekit.exporters.ways import Way

__all__ = ["DiffersError", "verify"]

TOLERANCE = 1e-4
"""Largest difference of a path to the eager model forced to take it, relative to the largest value, or absolute."""

COMBINATIONS = 24
"""Random combinations of outcomes that the joined graph is compared with the model on."""

NATURAL = 4
"""Samples on which the joined graph and the model take their own decisions."""

Pick = Callable[[Way, int, bool], bool]
"""The outcome of a decision of a way, given its number and the outcome that its value has."""


class DiffersError(CaptureError):
    """The joined graph answers otherwise than the model forced to the same outcomes."""


def verify(way: Way, forward: Forward) -> None:
    """Compare the joined graph with the model forced to take each way, some combinations, and its own ways.

    Raises:
        CaptureError: they differ.
    """
    generator = random.Random(0)
    noise = torch.Generator().manual_seed(0)

    def natural(way: Way, index: int, flag: bool) -> bool:
        return flag

    for number in range(COMBINATIONS):
        _compare(way, forward, forward.example, _Chance(generator, (number + 0.5) / COMBINATIONS), generator)
    for _ in range(NATURAL):
        inputs = pytree.tree_map_only(Tensor, lambda tensor: _like(tensor, noise), forward.example)
        _compare(way, forward, inputs, natural, generator)
    for each in _all(way):
        _compare(way, forward, forward.example, _Taking(each), generator)


class _Chance:
    """The other outcome with a probability."""

    def __init__(self, generator: random.Random, probability: float) -> None:
        self.generator = generator
        self.probability = probability

    def __call__(self, way: Way, index: int, flag: bool) -> bool:
        return way.outcomes[index] != (self.generator.random() < self.probability)


class _Taking:
    """The outcomes of a way, in order."""

    def __init__(self, way: Way) -> None:
        self.outcomes = iter(way.outcomes)

    def __call__(self, way: Way, index: int, flag: bool) -> bool:
        return next(self.outcomes, way.outcomes[index])


def _all(way: Way) -> Iterator[Way]:
    yield way
    for other in way.others.values():
        yield from _all(other)


def _like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Another sample with the values of an example in another order, or noise of their spread."""
    if tensor.is_floating_point():
        spread = float(tensor.double().std()) if tensor.numel() > 1 else 1.0
        noise = torch.randn(tensor.shape, generator=generator) * (spread or 1.0) + float(tensor.double().mean())
        return noise.to(tensor.dtype)
    return tensor.reshape(-1)[torch.randint(tensor.numel(), tensor.shape, generator=generator)]


class _Walk:
    """Which decision of the joined graph each decision of a running forward is."""

    def __init__(self, way: Way, pick: Pick) -> None:
        self.way = way
        self.index = 0
        self.pick = pick
        self.taken: dict[Node, tuple[bool, bool]] = {}
        """The value of each decision that was come by, and the outcome that it was given."""

    def __call__(self, place: Place, flag: Tensor) -> bool:
        while self.way.parent is not None and self.index >= self.way.shared:
            self.index += len(self.way.parent.places) - len(self.way.places)
            self.way = self.way.parent
        way, index = self.way, self.index
        if index >= len(way.places) or way.places[index] != place:
            raise DiffersError(f"a Python branch depends on tensor values{place} and comes by on other ways only")
        outcome = self.pick(way, index, bool(flag))
        if outcome != way.outcomes[index] and index not in way.others:
            outcome = way.outcomes[index]
        marker = way.markers[index]
        if marker is not None:
            self.taken[marker] = (bool(flag), outcome)
        if outcome != way.outcomes[index]:
            self.way = way.others[index]
        self.index = index + 1
        return outcome


def _compare(way: Way, forward: Forward, inputs: Any, pick: Pick, generator: random.Random) -> None:
    walk = _Walk(way, pick)
    try:
        done = forward.eager(walk, inputs)
    except CaptureError:
        raise
    except Exception:  # whatever the model raises: these outcomes never come together
        return
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    expected = pytree.tree_leaves(done.returned)
    markers = {marker for each in _all(way) for marker in each.markers if marker is not None}
    first = {marker: generator.random() < 0.5 for marker in markers}
    # A decision that was not come by must not matter, whatever its outcome.
    for others in (first, {marker: not outcome for marker, outcome in first.items()}):
        forced = {**others, **{marker: outcome for marker, (_, outcome) in walk.taken.items()}}
        evaluated = _Evaluated(way, forced, seen=walk.taken)
        pairs = zip(evaluated.returned(tensors), expected, strict=True)
        alike = all(_close(one, two) for one, two in pairs if isinstance(two, Tensor))
        if not alike or any(evaluated.values[marker] != value for marker, (value, _) in walk.taken.items()):
            raise DiffersError(_difference(way, done))


def _difference(way: Way, done: ForcedRun) -> str:
    pairs = zip(done.places, done.outcomes, way.outcomes, strict=False)
    place = next((place for place, outcome, usual in pairs if outcome != usual), done.places[0])
    return (
        f"a Python branch depends on tensor values{place}, and its two ways cannot be joined: one graph of both "
        "answers otherwise than the model"
    )


def _close(one: Tensor, two: Tensor) -> bool:
    if not two.is_floating_point():
        return torch.equal(one, two)
    finite = two[two.isfinite()].abs()
    allowed = TOLERANCE * max(1.0, float(finite.max()) if len(finite) else 0.0)
    return torch.allclose(one, two, rtol=0, atol=allowed, equal_nan=True)


class _Evaluated(Interpreter):
    """Runs a joined graph with its decisions forced, and of it what these outcomes need."""

    def __init__(self, way: Way, forced: Mapping[Node, bool], *, seen: Iterable[Node]) -> None:
        super().__init__(way.program.graph_module)
        self.way = way
        self.forced = forced
        self.values: dict[Node, bool] = {}
        self.needed = ancestors([way.output, *seen], sources=self._sources)

    def returned(self, inputs: Sequence[Tensor]) -> list[Any]:
        """What the model returns."""
        program = self.way.program
        given = iter(inputs)
        args = []
        for spec in program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                args.append(next(given) if isinstance(spec.arg, TensorArgument) else None)
            else:
                target = spec.target or ""
                args.append(program.state_dict[target] if target in program.state_dict else program.constants[target])
        with torch.no_grad():
            returned = self.run(*args)
        return [returned[slot] for slot in self.way.results]

    def _sources(self, node: Node) -> list[Node]:
        if node is self.way.output:
            returned: Any = node.args[0]
            return [returned[slot] for slot in self.way.results if isinstance(returned[slot], Node)]
        chosen = self._chosen(node)
        return node.all_input_nodes if chosen is None else [chosen]

    def _chosen(self, node: Node) -> Node | None:
        """Which operand a join is, when its decision is forced."""
        if node not in self.way.joins:
            return None
        condition, one, other = cast("tuple[Node, Node, Node]", node.args)
        marker = condition if condition in self.forced else condition.args[0]
        return None if marker not in self.forced else one if self.forced[marker] else other  # type: ignore[index]

    def run_node(self, n: Node) -> Any:
        if n not in self.needed and n.op == "call_function":
            return None
        chosen = self._chosen(n)
        if chosen is not None:
            return self.env[chosen]
        result = super().run_node(n)
        if n not in self.forced:
            return result
        self.values[n] = bool(result)
        return torch.full_like(result, self.forced[n])
