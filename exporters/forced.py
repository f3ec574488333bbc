"""A forward whose Python branches on tensor values are forced: run on real tensors, or traced.

Every value that Python reads out of a tensor passes a :class:`torch.overrides.TorchFunctionMode`. What depends on the
inputs is a decision. Its outcome is chosen, and what it was taken on is kept as a marker that the forward returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from edgekit.errors import CaptureError
from edgekit.exporters.source import Place, reason, running

__all__ = ["MOST_DECISIONS", "Choose", "ForcedRun", "Forward", "natural"]

MOST_DECISIONS = 256
"""Decisions on one way through a forward. Each is one more trace, and a loop that goes on longer is not unrolled."""

Choose = Callable[[Place, Tensor], bool]
"""The outcome of the next decision, given its place and the value ``(1,) bool`` that it is taken on."""


def natural(place: Place, flag: Tensor) -> bool:
    """The outcome that the values have."""
    return bool(flag)


@dataclass
class ForcedRun:
    """What a forward did: returned tensors, and each decision's place and outcome.

    Attributes:
        read: every value that Python read, decisions and constants, in order.
        settled: whether each conjunction or disjunction with a constant has that constant's value, in order.
        work: operators called.
    """

    returned: Any = None
    places: list[Place] = field(default_factory=list)
    outcomes: list[bool] = field(default_factory=list)
    read: list[Any] = field(default_factory=list)
    settled: list[bool] = field(default_factory=list)
    work: int = 0


class Forward:
    """A model's forward whose decisions can be forced, run or traced."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], unchanged: Any, export: Any
    ) -> None:
        self.model = model
        self.example = (args, kwargs)
        self._unchanged = unchanged
        self._export = export

    def eager(self, choose: Choose, inputs: Any = None) -> ForcedRun:
        """Run it on real tensors. An error of the forward's own is raised with what was done until then as ``run``."""
        # A forward may write into its inputs: it gets copies.
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs or self.example)
        done = ForcedRun()
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

    def trace(self, done: ForcedRun) -> ExportedProgram:
        """Trace it, reading what a run read."""
        traced: list[ForcedRun] = []

        def reading(code: Any, inputs: Any) -> _Reading:
            traced.append(ForcedRun())
            return _Reading(code, inputs, traced[-1], replayed=(iter(done.read), iter(done.settled)))

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


def _equal(one: Tensor, other: Tensor) -> Tensor | None:
    return (one == other).all() if one.shape == other.shape else None


def _close(one: Tensor, other: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.isclose(one, other, *args, **kwargs).all()


def _contains(one: Tensor, element: Any) -> Tensor:
    return (one == element).any()


_QUESTIONS: dict[Any, Callable[..., Tensor | None]] = {
    torch.equal: _equal,
    Tensor.equal: _equal,
    torch.allclose: _close,
    Tensor.allclose: _close,
    Tensor.__contains__: _contains,
}
"""What answers with a truth value of Python's own, and the tensor that it asks; ``None``: the answer is no."""

_SETTLES: dict[Any, bool] = {
    **dict.fromkeys((torch.logical_and, torch.bitwise_and, Tensor.logical_and, Tensor.bitwise_and), False),
    **dict.fromkeys((Tensor.__and__, Tensor.__rand__), False),
    **dict.fromkeys((torch.logical_or, torch.bitwise_or, Tensor.logical_or, Tensor.bitwise_or), True),
    **dict.fromkeys((Tensor.__or__, Tensor.__ror__), True),
}
"""What a truth value is settled by, whatever the other one is: ``(step < 5) & (score < t)`` ends after five steps."""

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
        replayed: what is read instead, and what is settled.
    """

    def __init__(
        self,
        until: Any,
        inputs: Any,
        done: ForcedRun,
        *,
        choose: Choose = natural,
        replayed: tuple[Iterator[Any], Iterator[bool]] | None = None,
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
        if func in _QUESTIONS:
            asked = _QUESTIONS[func](*args, **kwargs)
            return asked is not None and self._decide(asked)
        result = self._computed(func, args, kwargs)
        if func in _SETTLES and self._settled(_SETTLES[func], args):
            return result
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

    def _settled(self, by: bool, operands: Sequence[Any]) -> bool:
        """Whether one of two truth values is no input's and settles the result."""
        constants = [each for each in operands if id(each) not in self.dependent]
        single = [each for each in operands if not isinstance(each, Tensor) or each.numel() == 1]
        if len(constants) != 1 or len(single) != 2:
            return False
        settled = bool(constants[0]) is by if self.replayed is None else next(self.replayed[1])
        self.done.settled.append(settled)
        return settled

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What no input has a part in: values that are read are the same each time."""
        if func not in _READS and func not in _QUESTIONS:
            return func(*args, **kwargs)
        value = func(*args, **kwargs) if self.replayed is None else next(self.replayed[0])
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
        outcome = self.choose(place, flag) if self.replayed is None else next(self.replayed[0])
        self.done.places.append(place)
        self.done.outcomes.append(outcome)
        self.done.read.append(outcome)
        self.markers.append(flag)
        return outcome
