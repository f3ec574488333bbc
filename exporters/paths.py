"""Path capture: Python branches on tensor values, as ``if action.sum() == 0`` or ``if score > threshold: break``.

The forward is run with the outcome of each decision forced, and traced: once with every decision at the outcome that
does more, and once more for each decision with its other outcome. What the traces share is joined
(:mod:`edgekit.exporters.joins`) into one graph that computes every way and chooses with ``torch.where``, in which
gates are found as in any masked network. A sample decides for itself, so the graph takes a batch of one.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx import Interpreter, Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from edgekit.errors import CaptureError
from edgekit.exporters.graph import ancestors
from edgekit.exporters.joins import AmbiguousJoinError, Way, align, join
from edgekit.exporters.source import Place, reason, running

__all__ = ["Paths", "capture_paths"]

MOST_DECISIONS = 256
"""Decisions on one way through a forward. Each is one more trace, and a loop that goes on longer is not unrolled."""

MOST_TRACES = MOST_DECISIONS + 1
"""Traces where each decision is traced once more."""

MOST_TRACES_APART = 64
"""Traces where decisions hang together and all combinations of their outcomes are traced."""

TOLERANCE = 1e-4
"""Largest difference of a path to the eager model forced to take it, relative to the largest value, or absolute."""

COMBINATIONS = 24
"""Random combinations of outcomes that the joined graph is compared with the model on."""

NATURAL = 4
"""Samples on which the joined graph and the model take their own decisions."""

MOST_RETRIES = 8
"""Outcomes of later decisions that are changed, one after the other, where a forward fails with the usual ones."""

Pick = Callable[[Way, int, bool], bool]
"""The outcome of a decision of a way, given its number and the outcome that its value has."""

Choose = Callable[[Place, Tensor], bool]
"""The outcome of the next decision, given its place and the value ``(1,) bool`` that it is taken on."""


@dataclass(frozen=True)
class Paths:
    """A forward with Python branches, as one graph for a batch of one.

    Attributes:
        program: computes all ways.
        decisions: how many there are.
        traces: how many it took.
        notes: what was left out.
    """

    program: ExportedProgram
    decisions: int
    traces: int
    notes: tuple[str, ...]


def capture_paths(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    unchanged: Callable[[nn.Module], AbstractContextManager[None]],
    export: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], ExportedProgram],
) -> Paths | None:
    """Trace every decision of a forward both ways; ``None`` if it reads no value.

    Args:
        model: in evaluation mode.
        args: example inputs, one sample.
        kwargs: example inputs given by name.
        unchanged: puts back what a forward stores in a model.
        export: traces a model with an example.

    Raises:
        CaptureError: naming the decision's line: what the forward does with a value that it reads, two ways that
            cannot be joined, a loop without an end.
    """
    forward = _Forward(model, args, kwargs, unchanged, export)
    if not forward.eager(_natural).read:
        return None
    explorer = _Explorer(forward, apart=False)
    try:
        way = explorer.explore()
        verify(way, forward)
    except (AmbiguousJoinError, _DiffersError):
        explorer = _Explorer(forward, apart=True)
        way = explorer.explore()
        verify(way, forward)
    _drop_markers(way)
    return Paths(way.program, explorer.decisions, explorer.traces, tuple(explorer.notes))


def _natural(place: Place, flag: Tensor) -> bool:
    """The outcome that the values have."""
    return bool(flag)


class _DiffersError(CaptureError):
    """The joined graph answers otherwise than the model forced to the same outcomes."""


class _ImpossibleError(CaptureError):
    """An outcome with which the forward fails."""


@dataclass
class _Run:
    """What a forward did: returned tensors, and each decision's place and outcome.

    Attributes:
        read: every value that Python read, decisions and constants, in order.
        work: operators called.
    """

    returned: Any = None
    places: list[Place] = field(default_factory=list)
    outcomes: list[bool] = field(default_factory=list)
    read: list[Any] = field(default_factory=list)
    work: int = 0


class _Forward:
    """A model's forward whose decisions can be forced, run or traced."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], unchanged: Any, export: Any
    ) -> None:
        self.model = model
        self.example = (args, kwargs)
        self._unchanged = unchanged
        self._export = export

    def eager(self, choose: Choose, inputs: Any = None) -> _Run:
        """Run it on real tensors. An error of the forward's own is raised with what was done until then as ``run``."""
        # A forward may write into its inputs: it gets copies.
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs or self.example)
        done = _Run()
        with (
            torch.no_grad(),
            _patched(self.model, lambda code, inputs: _Reading(code, inputs, done, choose=choose)),
            self._unchanged(self.model),
        ):
            try:
                done.returned, _ = self.model(*args, **kwargs)
            except Exception as error:
                error.run = done  # type: ignore[attr-defined]
                raise
        return done

    def trace(self, done: _Run) -> ExportedProgram:
        """Trace it, reading what a run read."""
        traced: list[_Run] = []

        def reading(code: Any, inputs: Any) -> _Reading:
            traced.append(_Run())
            return _Reading(code, inputs, traced[-1], replayed=iter(done.read))

        with _patched(self.model, reading):
            try:
                program: ExportedProgram = self._export(self.model, *self.example)
            except CaptureError:
                raise
            except Exception as error:  # torch.export raises whatever the model or the tracer raised
                raise CaptureError(f"with the outcomes of its Python branches forced, {reason(error)}") from error
        if traced[-1].places != done.places:
            place = next((place for place in traced[-1].places if place not in done.places), "")
            raise CaptureError(f"a Python branch depends on tensor values{place} that only a trace shows")
        return program


@contextmanager
def _patched(model: nn.Module, reading: Callable[[Any, Any], _Reading]) -> Iterator[None]:
    """Let the forward run under a mode, and return the decisions' markers besides its own result."""
    original, own = model.forward, vars(model).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        mode = reading(forward.__code__, (args, kwargs))
        with mode:
            returned = original(*args, **kwargs)
        return returned, tuple(mode.markers)

    # A trace names its inputs after the parameters of the model's own forward.
    model.forward = functools.update_wrapper(forward, original)
    try:
        with mock.patch.object(torch, "cond", _cond), mock.patch.object(torch, "while_loop", _while_loop):
            yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _cond(pred: Any, true_fn: Any, false_fn: Any, operands: Any = ()) -> Any:
    """``torch.cond`` as the Python branch that it is."""
    return true_fn(*operands) if pred else false_fn(*operands)


def _while_loop(cond_fn: Any, body_fn: Any, carried_inputs: Any) -> Any:
    """``torch.while_loop`` as the Python loop that it is."""
    while cond_fn(*carried_inputs):
        carried_inputs = body_fn(*carried_inputs)
    return carried_inputs


_CONVERSIONS = (Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__complex__)
_READS = (Tensor.__bool__, Tensor.is_nonzero, torch.is_nonzero, Tensor.item, Tensor.tolist, *_CONVERSIONS)
_COMPARISONS: dict[Any, Any] = {
    torch.equal: torch.eq,
    Tensor.equal: torch.eq,
    torch.allclose: torch.isclose,
    Tensor.allclose: torch.isclose,
}
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class _Reading(TorchFunctionMode):
    """Sees every value that Python reads out of a tensor.

    What depends on the inputs is a decision, and forced; the rest is read as it is. A run keeps what was read, so that
    a trace, which has no values, can read the same.

    Args:
        until: code of the call in which the model runs.
        inputs: that values depend on.
        done: filled.
        choose: outcomes.
        replayed: what is read instead.
    """

    def __init__(
        self,
        until: Any,
        inputs: Any,
        done: _Run,
        *,
        choose: Choose = _natural,
        replayed: Iterator[Any] | None = None,
    ) -> None:
        super().__init__()
        self.until = until
        self.done = done
        self.choose = choose
        self.replayed = replayed
        self.markers: list[Tensor] = []
        # Kept alive: an identity that is used again would be another tensor's.
        self.dependent = {id(leaf): leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.done.work += 1
        if not any(id(leaf) in self.dependent for leaf in pytree.tree_leaves((args, kwargs))):
            return self._constant(func, args, kwargs)
        if func in _READS:
            return self._read(func, args[0])
        if func in _COMPARISONS:
            alike = args[0].shape == args[1].shape
            return alike and self._decide(_COMPARISONS[func](*args, **kwargs).all())
        result = self._computed(func, args, kwargs)
        written = args[0] if getattr(func, "__name__", "") == "__setitem__" else kwargs.get("out")
        for leaf in pytree.tree_leaves((result, written)):
            if isinstance(leaf, Tensor):
                self.dependent[id(leaf)] = leaf
        return result

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func == _DATA:
            # A trace refuses ``.data``, and without gradients it is the tensor itself.
            return args[0].detach()
        if func is Tensor.add and args[0].is_floating_point() and not isinstance(args[1], Tensor) and args[1] == 0:
            # ``0 + x``, as ``sum`` begins: like every later sum, so that a sum's parts can be left out one by one.
            return torch.zeros(args[0].shape, dtype=args[0].dtype) + args[0]
        return func(*args, **kwargs)

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What no input has a part in: values that are read are the same each time."""
        if func not in _READS and func not in _COMPARISONS:
            return func(*args, **kwargs)
        value = func(*args, **kwargs) if self.replayed is None else next(self.replayed)
        self.done.read.append(value)
        return value

    def _read(self, func: Any, value: Tensor) -> Any:
        if func in _CONVERSIONS:
            name = func.__name__.strip("_")
            raise CaptureError(
                f"the forward reads a value out of a tensor with {name}(){running(self.until)}: compute with the "
                "tensor itself, so that every sample keeps its own value"
            )
        if func is Tensor.item or func is Tensor.tolist:
            return self._numbers(value if func is Tensor.tolist else value.reshape(()))
        return self._decide(value)

    def _numbers(self, value: Tensor) -> Any:
        """A tensor for each number: what is compared with it is compared in the graph, too."""
        if value.ndim:
            return [self._numbers(part) for part in value.unbind()]
        self.dependent[id(value)] = value
        return value

    def _decide(self, value: Tensor) -> bool:
        place = running(self.until)
        if len(self.done.places) == MOST_DECISIONS:
            raise CaptureError(
                f"a Python branch depends on tensor values{place} and is taken more than {MOST_DECISIONS} times: "
                "the loop is too long to unroll, or never ends"
            )
        flag = value.detach().reshape(1)
        flag = (flag if flag.dtype == torch.bool else flag != 0).clone()
        outcome = self.choose(place, flag) if self.replayed is None else next(self.replayed)
        self.done.places.append(place)
        self.done.outcomes.append(outcome)
        self.done.read.append(outcome)
        self.markers.append(flag)
        return outcome


class _Explorer:
    """Traces ways through a forward.

    Args:
        forward: of the model.
        apart: trace all combinations of outcomes. Otherwise later decisions that two ways take alike are traced on one.
    """

    def __init__(self, forward: _Forward, *, apart: bool) -> None:
        self.forward = forward
        self.apart = apart
        self.usual: dict[Any, bool] = {}
        self.notes: list[str] = []
        self.decisions = 0
        self.traces = 0

    def explore(self) -> Way:
        """The way that does most, with all others joined to it."""
        try:
            way = self._way([])
        except _ImpossibleError:
            way = self._way(self.forward.eager(_natural).outcomes)
        self._others(way, 0)
        return way

    def _others(self, way: Way, first: int) -> None:
        """Join the ways on which a decision from ``first`` on is another, the last one first.

        What is joined earlier is there for what was joined later, as what is decided earlier for what comes later.
        """
        for index in reversed(range(first, way.shared)):
            self.decisions += 1
            forced = [*way.outcomes[:index], not way.outcomes[index]]
            try:
                other = self._way(forced)
            except _ImpossibleError as error:
                self._tell(f"a branch{way.places[index]} is never {forced[-1]}, the forward fails then: {error}")
                continue
            match = align(way, other, index, shared=0 if self.apart else None)
            self._others(other, index + 1)
            join(way, other, index, match)

    def _tell(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _way(self, forced: Sequence[bool]) -> Way:
        done = self._settled(forced)
        self.traces += 1
        most = MOST_TRACES_APART if self.apart else MOST_TRACES
        if self.traces > most:
            raise CaptureError(
                f"a Python branch depends on tensor values{done.places[0]}: what later branches do depends on it, and "
                f"all combinations would be more than {most} traces"
            )
        return Way(self.forward.trace(done), done.places, done.outcomes, pytree.tree_structure(done.returned))

    def _settled(self, forced: Sequence[bool]) -> _Run:
        """A run with these first outcomes, and the usual ones after; others where the forward fails with those."""
        try:
            return self._run(forced)
        except CaptureError:
            raise
        except Exception as error:  # whatever the model raises
            failed, made = error, error.run.outcomes  # type: ignore[attr-defined]
        for last in reversed(range(max(len(forced), len(made) - MOST_RETRIES), len(made))):
            with suppress(Exception):
                return self._run([*made[:last], not made[last]])
        raise _ImpossibleError(reason(failed)) from failed

    def _run(self, forced: Sequence[bool]) -> _Run:
        while True:
            outcomes = iter(forced)

            def choose(place: Place, flag: Tensor, outcomes: Iterator[bool] = outcomes) -> bool:
                wanted = next(outcomes, None)
                if wanted is None and place.line not in self.usual:
                    raise _UnknownError(place)
                return self.usual[place.line] if wanted is None else wanted

            try:
                return self.forward.eager(choose)
            except _UnknownError as unknown:
                self.usual[unknown.place.line] = self._learned(unknown.place, forced)

    def _learned(self, place: Place, forced: Sequence[bool]) -> bool:
        """The usual outcome of a line is the one with which the forward does more."""
        scores = []
        for outcome in (False, True):
            usual = {**self.usual, place.line: outcome}
            outcomes = iter(forced)

            def choose(
                at: Place, flag: Tensor, outcomes: Iterator[bool] = outcomes, usual: dict[Any, bool] = usual
            ) -> bool:
                wanted = next(outcomes, usual.get(at.line))
                return bool(flag) if wanted is None else wanted

            try:
                done = self.forward.eager(choose)
                scores.append((done.work, len(done.outcomes)))
            except CaptureError:
                raise
            except Exception:  # whatever the model raises: this outcome cannot be the usual one
                scores.append((-1, -1))
        return scores[1] > scores[0]


class _UnknownError(Exception):
    """A line whose usual outcome is not known yet."""

    def __init__(self, place: Place) -> None:
        super().__init__(str(place))
        self.place = place


def verify(way: Way, forward: _Forward) -> None:
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
            raise _DiffersError(f"a Python branch depends on tensor values{place} and comes by on other ways only")
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


def _compare(way: Way, forward: _Forward, inputs: Any, pick: Pick, generator: random.Random) -> None:
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
            raise _DiffersError(_difference(way, done))


def _difference(way: Way, done: _Run) -> str:
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


def _drop_markers(way: Way) -> None:
    """Return what the model returns and nothing else."""
    program = way.program
    signature = program.graph_signature
    kept = [
        slot
        for slot, spec in enumerate(signature.output_specs)
        if spec.kind is not OutputKind.USER_OUTPUT or slot in way.results
    ]
    returned: Any = way.output.args[0]
    way.output.args = (tuple(returned[slot] for slot in kept),)
    signature.output_specs[:] = [
        replace(spec, arg=TensorArgument(name=returned[slot].name)) if isinstance(returned[slot], Node) else spec
        for slot, spec in enumerate(signature.output_specs)
        if slot in kept
    ]
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
