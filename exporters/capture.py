"""Model to one graph: checks, then ``torch.export`` by several routes, then functional form.

Routes are tried in order; the one that worked and why the earlier ones did not are kept. Non-strict export runs the
forward as Python and records what it does; strict export reads its bytecode; each takes models on which the other
fails. Both are tried with a batch of any size, then with a batch of one for models that bake the batch into a shape.
Where Python branches on tensor values, every way through the forward is traced (:mod:`edgekit.exporters.paths`).
"""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from edgekit.errors import CaptureError
from edgekit.exporters.decompositions import decompositions
from edgekit.exporters.graph import (
    drop_same_size,
    drop_some_rows,
    fills_by_mask,
    keep_batch,
    merge_views,
    refuse_control_flow,
    refuse_random,
    refuse_state,
    refuse_values,
)
from edgekit.exporters.mixtures import mixtures_as_sums
from edgekit.exporters.paths import capture_paths
from edgekit.exporters.ranking import rank_by_rule
from edgekit.exporters.source import reason
from edgekit.tensors import BATCH

__all__ = ["Attempt", "Captured", "Output", "capture"]


@dataclass(frozen=True)
class Attempt:
    """A capture route that did not work, and why, in one line."""

    route: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Output:
    """One tensor that the model returns.

    Attributes:
        path: keys and indices that lead to it, joined by dots; ``"0"`` for the first of a tuple, ``""`` alone.
        node: that computes it in the captured graph.
        value: what the eager model returned there for the example.
    """

    path: str
    node: Node
    value: Tensor


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A model as one functional ATen graph.

    Attributes:
        program: weights are placeholders of its graph; nothing in it writes in place.
        inputs: placeholder nodes of the tensors that the user gives, in order.
        outputs: tensors that the model returns.
        example: the example inputs, flattened, with two rows (one when ``batch`` is 1).
        structure: how the flattened inputs make up the forward's arguments.
        batch: symbolic :data:`~edgekit.tensors.BATCH`, or 1 when the model bakes the batch in.
        route: that worked.
        attempts: that did not.
        notes: what was left out.
    """

    program: ExportedProgram
    inputs: tuple[Node, ...]
    outputs: tuple[Output, ...]
    example: tuple[Tensor, ...]
    structure: tuple[list[Any], pytree.TreeSpec]
    batch: str | int
    route: str
    attempts: tuple[Attempt, ...]
    notes: tuple[str, ...]

    @property
    def rows(self) -> Any:
        """The batch as it appears in shapes: an expression, or 1."""
        return 1 if self.batch != BATCH else self.inputs[0].meta["val"].shape[0].node.expr

    def run(self, model: nn.Module, inputs: Sequence[Tensor]) -> Any:
        """What the eager ``model`` returns for flattened ``inputs``; it is left as it was."""
        leaves, spec = self.structure
        remaining = iter(inputs)
        args, kwargs = pytree.tree_unflatten(
            [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        )
        with torch.no_grad(), _unchanged(model):
            return _run(model, args, kwargs)


def capture(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Captured:
    """Record what ``model`` does with an example.

    Args:
        model: in evaluation mode, as its authors wrote it. It is not changed.
        args: example inputs; every tensor's dimension 0 is the batch.
        kwargs: example inputs given by name.

    Raises:
        CaptureError: training mode, a forward that fails or needs more, inputs that disagree on the batch, random
            or data-dependent computation, state that changes; the message names the place in the model's source.
    """
    _require_evaluation_mode(model)
    two = _batch_of_two(model, *_bound(model, args, kwargs or {}))
    attempts: list[Attempt] = []
    failures: list[_ForwardError] = []
    for batch, suffix, example in ((BATCH, "", two), (1, ", batch of one", _rows(*two, slice(0, 1)))):
        try:
            reference = _reference(model, *example)
        except _ForwardError as error:
            failures.append(error)
            attempts.append(Attempt(f"eager{suffix}", str(error)))
            continue
        for strict in (False, True):
            route = f"torch.export {'strict' if strict else 'non-strict'}{suffix}"
            try:
                program = _export(model, *example, strict=strict, dynamic=batch == BATCH)
            except Exception as error:  # torch.export raises whatever the model or the tracer raised
                attempts.append(Attempt(route, reason(error)))
                continue
            return _captured(program, reference, example, batch=batch, route=route, attempts=attempts)
        if batch == 1:
            captured = _by_paths(model, reference, example, attempts)
            if captured is not None:
                return captured
    if len(failures) == 2:
        raise failures[0]
    reasons: dict[str, str] = {}
    for attempt in attempts:
        reasons.setdefault(attempt.reason, attempt.route)
    told = "; ".join(f"{route}: {reason}" for reason, route in reasons.items())
    raise CaptureError(f"{type(model).__name__} cannot be captured as one graph. {told}")


class _ForwardError(CaptureError):
    """The forward itself fails."""


def _reference(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the eager model returns, the same each time."""
    with torch.no_grad(), _unchanged(model):
        reference = _run(model, args, kwargs)
        _require_known(model, reference)
        _require_deterministic(reference, _run(model, args, kwargs))
    return reference


@contextmanager
def _data_detached() -> Iterator[None]:
    """Make ``x.data`` what ``x.detach()`` is: a trace would take it for a constant."""
    if "data" in vars(Tensor):  # already so, further out
        yield
        return
    Tensor.data = property(Tensor.detach, Tensor.data.__set__)  # type: ignore[attr-defined, assignment]
    try:
        yield
    finally:
        del Tensor.data  # what it had from its base class is there again


class _ChosenRows(TorchFunctionMode):
    """Rows that are chosen by value are traced as some: layers ask whether there are none, which no trace can tell.

    That there are some must not become part of the graph: :func:`~edgekit.exporters.graph.drop_some_rows`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        rows: Any = result.shape[0] if isinstance(result, Tensor) and result.ndim else None
        if isinstance(rows, torch.SymInt):
            torch._check(rows != 0)
        return result


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, strict: bool, dynamic: bool
) -> ExportedProgram:
    shapes = None
    if dynamic:
        dimension = Dim("batch")

        def spec(leaf: Any) -> Any:
            return {0: dimension} if isinstance(leaf, Tensor) and leaf.ndim else None

        shapes = _dynamic_shapes(model, pytree.tree_map(spec, args), pytree.tree_map(spec, kwargs))
    chosen = nullcontext() if strict else _ChosenRows()
    with torch.no_grad(), _unchanged(model), quiet(), _data_detached():
        with chosen:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
        refuse_control_flow(program)
        # Even an empty table makes the graph functional (no relu_, no batch-norm state).
        program = program.run_decompositions(decompositions(program.graph))
    drop_some_rows(program)
    return program


def _dynamic_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Shapes by parameter name, as torch.export wants them, variadic parameters included."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    shapes: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = inspect.signature(model.forward).parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            shapes.update(value)
        else:
            shapes[name] = value
    return shapes


def _captured(
    program: ExportedProgram,
    reference: Any,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    batch: str | int,
    route: str,
    attempts: Sequence[Attempt],
    notes: Sequence[str] = ("the model bakes the batch into a shape: stages take one sample at a time",),
) -> Captured:
    signature = program.graph_signature
    refuse_random(program)
    keep_batch(program)
    drop_same_size(program)
    fills_by_mask(program)
    rank_by_rule(program)
    mixtures_as_sums(program)
    merge_views(program)
    used_names = {str(name) for name in signature.user_inputs}
    inputs = tuple(node for node in program.graph.nodes if node.op == "placeholder" and node.name in used_names)
    tensors = tuple(leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor))
    placeholders = tuple(node for node in inputs if isinstance(node.meta.get("val"), Tensor))
    paths, _ = pytree.tree_flatten_with_path(reference)
    returned = zip(program.graph.output_node().args[0], signature.output_specs, strict=True)
    nodes = [node for node, spec in returned if spec.kind is OutputKind.USER_OUTPUT]
    outputs = tuple(
        Output(path=_path(path), node=node, value=leaf)
        for (path, leaf), node in zip(paths, nodes, strict=True)
        if isinstance(leaf, Tensor) and isinstance(node, Node)
    )
    refuse_state(program, [output.node for output in outputs])
    refuse_values(inputs, [output.node for output in outputs])
    return Captured(
        program=program,
        inputs=placeholders,
        outputs=outputs,
        example=tensors,
        structure=pytree.tree_flatten(example),
        batch=batch,
        route=route,
        attempts=tuple(attempts),
        notes=() if batch == BATCH else tuple(notes),
    )


def _by_paths(
    model: nn.Module, reference: Any, example: tuple[tuple[Any, ...], dict[str, Any]], attempts: Sequence[Attempt]
) -> Captured | None:
    """The route for a forward with Python branches on tensor values; ``None`` where it has none."""
    try:
        paths = capture_paths(
            model, *example, unchanged=_unchanged, export=partial(_export, strict=False, dynamic=False)
        )
    except CaptureError as error:
        raise CaptureError(f"{type(model).__name__} cannot be captured as one graph. path capture: {error}") from error
    if paths is None:
        return None
    return _captured(
        paths.program,
        reference,
        example,
        batch=1,
        route=f"path capture, {paths.decisions} decisions, {paths.traces} traces",
        attempts=attempts,
        notes=("every sample decides for itself in Python branches: stages take one sample at a time", *paths.notes),
    )


def _path(keys: Sequence[Any]) -> str:
    parts = []
    for key in keys:
        value = next((getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)), key)
        parts.append(str(value))
    return ".".join(parts)


def _require_evaluation_mode(model: nn.Module) -> None:
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        what = f"its module '{training}'" if training else type(model).__name__
        raise CaptureError(f"{what} is in training mode: call model.eval() before export")


def _bound(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example in the order of the forward's parameters."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        return bound.args, bound.kwargs
    except TypeError as error:
        raise CaptureError(
            f"{type(model).__name__}.forward{inspect.signature(model.forward)} does not take the example inputs "
            f"({error}): give one example per argument"
        ) from error


def _batch_of_two(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with two rows: one row would be taken for a fixed batch, many only cost time."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not leaves:
        raise CaptureError("the example holds no tensor: give the model's inputs as torch tensors")
    if any(leaf.ndim == 0 for leaf in leaves):
        raise CaptureError("an example input has no dimension: every input needs the batch as dimension 0")
    rows = sorted({len(leaf) for leaf in leaves})
    if len(rows) > 1:
        raise CaptureError(f"example inputs disagree on the batch: dimension 0 is {' and '.join(map(str, rows))}")
    if rows[0] == 0:
        raise CaptureError("the example batch is empty: give at least one sample")
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    if device.type != "cpu":
        raise CaptureError(f"the model is on {device}: move it and the example to the CPU (model.cpu())")
    index = torch.tensor([0, 1] if rows[0] > 1 else [0, 0])
    return _rows(args, kwargs, index)


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any], rows: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def pick(leaf: Any) -> Any:
        return leaf.detach()[rows].contiguous() if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(pick, args), pytree.tree_map(pick, kwargs)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # A forward may write into its inputs: it gets copies.
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    try:
        return model(*args, **kwargs)
    except Exception as error:
        rows = next(len(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        samples = "one sample" if rows == 1 else f"{rows} samples"
        raise _ForwardError(f"{type(model).__name__} fails on {samples} like the example: {reason(error)}") from error


def _require_known(model: nn.Module, returned: Any) -> None:
    for path, leaf in pytree.tree_flatten_with_path(returned)[0]:
        if not isinstance(leaf, Tensor | int | float | str | None):
            place = f" at output '{_path(path)}'" if path else ""
            raise CaptureError(
                f"{type(model).__name__} returns a {type(leaf).__name__}{place}: return tensors in a tuple, list, dict "
                "or named tuple, or register a dataclass with torch.export.register_dataclass"
            )


def _require_deterministic(first: Any, second: Any) -> None:
    for (path, one), other in zip(pytree.tree_flatten_with_path(first)[0], pytree.tree_leaves(second), strict=True):
        if isinstance(one, Tensor) and not torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)):
            raise CaptureError(
                f"output '{_path(path)}' differs between two runs on the same input: the model samples at random or "
                "keeps state in evaluation mode; replace sampling by its mean before export"
            )


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what a forward stores: attributes, what lists and dictionaries in them hold, values of buffers.

    Tracing would leave its stand-in tensors there.
    """
    modules = list(model.modules())
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    held = [value for module in modules for value in vars(module).values()]
    lists = [(value, list(value)) for value in held if isinstance(value, list)]
    tables = [(value, dict(value)) for value in held if isinstance(value, dict)]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for now, before in (*attributes, *tables):
            now.clear()
            now.update(before)
        for items, kept in lists:
            items[:] = kept
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's own chatter out of the user's terminal; errors are raised, not printed."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.fx", "torch.export", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
