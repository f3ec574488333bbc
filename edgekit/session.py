"""Walks a plan over open stages: run, decide, leave or go on. The hot path.

One sample goes through a flat loop of pre-bound stages (:mod:`edgekit.one_row`). A batch decides row by row: rows that
leave are copied out, those that stay are moved together, and rows for which a gate is open run its part together
(:mod:`edgekit.many_rows`). Both compare the same float32 score with the same float32 threshold.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit import plugins
from edgekit.artifacts import FLOAT, artifact_set
from edgekit.bundle import Bundle
from edgekit.engines import EngineBuilder, Instead, built_or_instead, engines_beside
from edgekit.errors import EdgekitError, InputError, PluginError
from edgekit.interfaces import Runtime
from edgekit.many_rows import Answers, ManyRows
from edgekit.measured import TracedRun
from edgekit.one_row import Node, OneRow, traced
from edgekit.plan import Plan
from edgekit.policy import Policy
from edgekit.route import Block, route
from edgekit.scoring import HOST_SCORES
from edgekit.slots import Slots
from edgekit.tensors import BATCH, TensorSpec, check_inputs

__all__ = ["Result", "Session"]

Arrays = list[NDArray[Any]]
Asked = tuple[int | None, frozenset[tuple[str, bool]]]
"""What a run is forced to: an exit, and outcomes of gates."""


class Result(msgspec.Struct, frozen=True, eq=False):
    """Answers of one run, rows in the order of the inputs. Owns its memory.

    Attributes:
        logits: ``(batch, classes) float32``, of the exit that each row took.
        exit: ``(batch,) int64``, index of that exit.
        score: ``(batch,) float32``, the policy's score at that exit, the last one included. NaN where the logits are
            not finite; patience also at the last exit when one before it was not run; a learned score also where
            logits of an earlier exit are not finite, and at the last exit, which nothing is learned for.
        executed: rows that each stage ran on; 0 when it did not run.
    """

    logits: NDArray[np.float32]
    exit: NDArray[np.int64]
    score: NDArray[np.float32]
    executed: dict[str, int]


class Session:
    """A network that is open and ready to run. A context manager; not for several threads at once.

    Args:
        plan: stages and steps.
        runtime: opens the artifacts and owns the memory; stays open when the session closes.
        artifacts: each stage's file, by name; empty for a runtime that opens none.
        policy: when to leave; ``None`` runs everything to the last exit.
        bundle: what the plan came from, for those who want to know.
        target: name of the bundle's set of artifacts that these are; the runtime's own when ``None``.
        instead: why this is another runtime than was asked for.

    Raises:
        BundleError: an artifact that is not the stage's.
        PolicyError: the policy is for another network.
        InputError: the network was exported for a fixed batch other than 1.
    """

    def __init__(
        self,
        plan: Plan,
        runtime: Runtime,
        artifacts: Mapping[str, Path],
        *,
        policy: Policy | None = None,
        bundle: Bundle | None = None,
        target: str | None = None,
        instead: Instead | None = None,
    ) -> None:
        self._plan = plan
        self._instead = instead
        self._runtime = runtime
        self._target = runtime.target if target is None else target
        self._artifacts = dict(artifacts)
        self._bundle = bundle
        self._policy = policy or Policy.never(len(plan.exits))
        self._policy.require_fits(plan)
        self._specs, self._one_by_one = _row_specs(plan)
        self._row = (self._specs[0].concrete(1), np.dtype(self._specs[0].dtype)) if len(self._specs) == 1 else None
        self._has_run = False
        self._stack = ExitStack()
        self._slots = Slots(plan, runtime, artifacts)
        self._stack.callback(self._slots.close)
        begin = time.perf_counter_ns()
        try:
            self._many = ManyRows(self._slots)
            self.use(self._policy)
            self._start(_FREE)
        except BaseException:
            self._stack.close()
            raise
        self._load_s = self._slots.open_s + (time.perf_counter_ns() - begin) / 1e9

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        runtime: str | Runtime = "onnxruntime",
        policy: Policy | str | None = None,
        threads: int = 1,
        precision: str = FLOAT,
        force: bool = False,
        **options: Any,
    ) -> Session:
        """Open a bundle.

        Args:
            bundle: open, or where it lies.
            runtime: its registered name, or one that is ready; a ready one is not closed with the session.
            policy: one, or the name of a saved one; ``None`` takes the bundle's ``default``, or else never exits early.
            threads: for a runtime given by name.
            precision: of the artifacts, as ``"int8"``; what ``edgekit quantize`` wrote.
            force: take a policy that is certified for other artifacts, without its certificate.
            **options: further options for a runtime given by name.

        Raises:
            BundleError: the bundle is damaged or has no artifacts for this runtime.
            PolicyError: no such policy, for another network, or certified for other artifacts.
            PluginError: no such runtime or option.
            MissingExtraError: the runtime's library is not installed.
        """
        with ExitStack() as stack:
            if not isinstance(bundle, Bundle):
                bundle = stack.enter_context(Bundle.open(bundle))
            if isinstance(runtime, str):
                made: Runtime = plugins.create("runtimes", runtime, threads=threads, **options)
                stack.callback(made.close)
            elif options:
                raise PluginError(f"runtime '{runtime.name}' is ready; give {', '.join(options)} to its constructor")
            else:
                made = runtime
            if policy is None and "default" in bundle.manifest.policies:
                policy = "default"
            if isinstance(policy, str):
                policy = bundle.policy(policy)
            target, artifacts = _artifacts(bundle, made, precision)
            instead = None
            if isinstance(made, EngineBuilder):
                made.keep_engines(engines_beside(bundle.path))
                if made.fallback is not None:
                    made, instead = built_or_instead(made, bundle.plan.stages, artifacts, threads=threads)
            if instead is not None:
                stack.callback(made.close)
                target, artifacts = _artifacts(bundle, made, precision)
            if policy is not None and force:
                policy = policy.without_promise(bundle.artifact_digests(target))
            session = cls(bundle.plan, made, artifacts, policy=policy, bundle=bundle, target=target, instead=instead)
            stack.push(session._stack.pop_all())
            session._stack = stack.pop_all()
        return session

    def again(self, runtime: Runtime | None = None, *, policy: Policy | None = None) -> Session:
        """The same artifacts opened once more, by another runtime of the same target or policy.

        Raises:
            BundleError: the runtime does not take them.
            PolicyError: the policy is for another network, or certified for other artifacts.
        """
        return Session(
            self._plan,
            runtime or self._runtime,
            self._artifacts,
            policy=policy or self._policy,
            bundle=self._bundle,
            target=self._target,
            instead=self._instead,
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the stages, and what :meth:`open` opened."""
        self._void()
        self._stack.close()

    @property
    def plan(self) -> Plan:
        """Stages and steps."""
        return self._plan

    @property
    def runtime(self) -> Runtime:
        """What runs the stages."""
        return self._runtime

    @property
    def policy(self) -> Policy:
        """What decides when to leave."""
        return self._policy

    @property
    def bundle(self) -> Bundle | None:
        """What the plan came from."""
        return self._bundle

    @property
    def artifacts(self) -> Mapping[str, Path]:
        """Each stage's file, by name; empty for a runtime that opens none."""
        return self._artifacts

    @property
    def target(self) -> str:
        """Name of the bundle's set of artifacts that it runs, as ``"onnx"`` or ``"onnx-int8"``; ``""`` for none."""
        return self._target

    @property
    def running(self) -> dict[str, Any]:
        """What the runtime says of itself, and which set of artifacts it runs: what measurements are made of."""
        instead = {} if self._instead is None else {"instead_of": msgspec.to_builtins(self._instead)}
        return {**self._runtime.describe(), "artifacts": self._target, **instead}

    @property
    def load_s(self) -> float:
        """Seconds that opening and binding the stages took."""
        return self._load_s

    @property
    def has_run(self) -> bool:
        """Whether anything has run yet: the first run of all is slower."""
        return self._has_run

    def use(self, policy: Policy) -> None:
        """Decide by another policy from now on.

        Raises:
            PolicyError: it is for another network, or certified for other artifacts.
        """
        policy.require_fits(self._plan)
        if self._bundle is not None:
            policy.require_tested(self._bundle.artifact_digests(self._target))
        self._require_open()
        self._policy = policy
        self._slots.use(policy)
        self._routes: dict[Asked, Block] = {}
        self._void()

    def run(
        self,
        inputs: Any,
        *,
        exit: int | None = None,  # noqa: A002
        gates: Mapping[str, bool] | None = None,
    ) -> Result:
        """Run a batch; each row leaves where the policy lets it, and each gate is open for the rows it is open for.

        Args:
            inputs: one array, a sequence in the plan's order, or a mapping by name; ``(batch, ...)`` each.
            exit: every row leaves at this exit (from 0), whatever its score, having paid all that a row of a real
                stream pays on the way: scores and comparisons of the exits that it passes.
            gates: by name, whether every row finds the gate open, whatever its value, which is computed all the same.

        Raises:
            InputError: inputs that do not fit the plan, an empty batch, or no such exit or gate.
        """
        asked = (exit, frozenset(gates.items())) if gates else (exit, _NO_GATES)
        node = self._starts.get(asked)
        if node is not None and type(inputs) is np.ndarray and (inputs.shape, inputs.dtype) == self._row:
            # One sample of the only input, and all is bound: what a stream gives, time after time.
            self._slots.given[self._specs[0].name].write(inputs)
            left, finite, way = self._one.run(node)
            return self._answer(left, finite, way)
        self._require_known(exit, gates or {})
        arrays, rows = self._accept(inputs)
        if rows == 1 or self._one_by_one:
            return _joined([self._write_row(arrays, row, asked) for row in range(rows)])
        self._write(arrays, rows)
        answers = Answers(rows, self._plan.classes, self._slots.runners, self._policy.row_scores(rows))
        self._many.run(self._route(asked), answers)
        return Result(answers.logits, answers.exit, answers.score, answers.executed)

    def trace(
        self,
        inputs: Any,
        *,
        exit: int | None = None,  # noqa: A002
        gates: Mapping[str, bool] | None = None,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> TracedRun:
        """Run one row as :meth:`run` does, reading ``clock`` (nanoseconds) around every piece.

        What the first run of its kind binds is bound before the clock starts. A gate that is forced decides nothing and
        has no span. ``start_s`` is 0, for the caller to replace.

        Raises:
            InputError: as for :meth:`run`, or there are several rows.
        """
        self._require_open()
        self._require_known(exit, gates or {})
        asked = (exit, frozenset(gates.items())) if gates else (exit, _NO_GATES)
        node = self._starts.get(asked) or self._start(asked)
        begin = clock()
        if type(inputs) is np.ndarray and (inputs.shape, inputs.dtype) == self._row:
            self._slots.given[self._specs[0].name].write(inputs)
        else:
            arrays, rows = self._accept(inputs)
            if rows != 1:
                raise InputError(f"one row can be traced, not {rows}: give one sample")
            self._write(arrays, 1)
        entered = clock()
        left, finite, way, marks = self._one.trace(node, clock)
        walked = clock()
        result = self._answer(left, finite, way)
        marks = [("input", "input", begin, entered), *marks, ("answer", "answer", walked, clock())]
        return traced("stream" if exit is None else self._plan.exits[exit].name, int(result.exit[0]), marks)

    def run_exits(self, inputs: Any) -> tuple[NDArray[np.float32], ...]:
        """Logits of every exit, ``(batch, classes) float32`` each, in order. Nobody leaves early.

        Args:
            inputs: as for :meth:`run`.

        Raises:
            InputError: inputs that do not fit the plan, or an empty batch.
        """
        arrays, rows = self._accept(inputs)
        everywhere = route(self._plan, None, dict.fromkeys(range(len(self._plan.exits)), math.nan))
        if not self._one_by_one or rows == 1:
            self._write(arrays, rows)
            return self._many.all_logits(everywhere, rows)
        parts = []
        for row in range(rows):
            self._write([array[row : row + 1] for array in arrays], 1)
            parts.append(self._many.all_logits(everywhere, 1))
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def _require_known(self, exit: int | None, gates: Mapping[str, bool]) -> None:  # noqa: A002
        if exit is not None and not 0 <= exit < len(self._plan.exits):
            raise InputError(f"exit {exit} does not exist; the network has exits 0 to {len(self._plan.exits) - 1}")
        known = [gate.name for gate in self._plan.gates]
        unknown = sorted(set(gates) - set(known))
        if unknown:
            raise InputError(f"gate '{unknown[0]}' does not exist; the network has {', '.join(known) or 'no gates'}")

    def _accept(self, inputs: Any) -> tuple[Arrays, int]:
        self._require_open()
        arrays, rows = check_inputs(self._specs, inputs)
        if rows == 0:
            raise InputError(f"input '{self._specs[0].name}': the batch is empty; give at least one row")
        self._has_run = True
        return arrays, rows

    def _require_open(self) -> None:
        if not self._slots.runners:
            raise EdgekitError("the session is closed; open the bundle again")

    def _void(self) -> None:
        """Forget what is bound to places that are no more, or to routes that were."""
        self._one = OneRow(self._slots, self._policy.row_scores(1))
        self._starts: dict[Asked, Node] = {}

    def _write(self, arrays: Arrays, rows: int) -> None:
        if self._slots.grow(rows):
            self._void()
        for spec, array in zip(self._specs, arrays, strict=True):
            self._slots.given[spec.name].write(array)

    def _write_row(self, arrays: Arrays, row: int, asked: Asked) -> Result:
        self._write([array[row : row + 1] for array in arrays], 1)
        return self._answer(*self._one.run(self._starts.get(asked) or self._start(asked)))

    def _answer(self, left: Node, finite: bool, way: Sequence[Node]) -> Result:
        self._has_run = True
        score = left.scores(1).copy()
        if not finite:
            score[0] = np.nan
        assert left.exit is not None
        return Result(left.logits(1).copy(), left.exit.copy(), score, self._one.executed(way))

    def _start(self, asked: Asked) -> Node:
        """The first node of one row's route, with what follows bound."""
        self._starts[asked] = self._one.start(self._route(asked))
        return self._starts[asked]

    def _route(self, asked: Asked) -> Block:
        """Decisions of a run that is forced to an exit, or of the policy's.

        The policy's leaves out exits that are never taken, so that their heads need not run, unless a later score
        needs their logits; a forced one decides at every exit on the way and lets nobody leave.
        """
        if asked not in self._routes:
            exit, gates = asked  # noqa: A001
            last = len(self._plan.exits) - 1
            on_host = self._policy.score in HOST_SCORES
            if exit is None:
                thresholds = self._policy.thresholds
                taken = [index for index, value in enumerate(thresholds) if value != math.inf]
                met = range(taken[-1] + 1) if on_host and taken else taken
                deciding = {index: thresholds[index] for index in met}
                if self._policy.comparator == ">":  # the next number up turns it into ">="
                    deciding = {index: np.nextafter(np.float32(v), np.float32(np.inf)) for index, v in deciding.items()}
                deciding[last] = math.nan
            else:
                deciding = dict.fromkeys(range(exit + 1), math.nan)
            score = None if on_host else self._policy.score
            self._routes[asked] = route(self._plan, score, deciding, dict(gates))
        return self._routes[asked]


_NO_GATES: frozenset[tuple[str, bool]] = frozenset()
_FREE: Asked = (None, _NO_GATES)


def _row_specs(plan: Plan) -> tuple[tuple[TensorSpec, ...], bool]:
    """What a run takes, and whether rows must run one by one, because the network was exported for one at a time.

    Raises:
        InputError: it was exported for another fixed batch.
    """
    if any(spec.batched for spec in plan.inputs):
        return plan.inputs, False
    for spec in plan.inputs:
        if spec.shape[:1] != (1,):
            raise InputError(
                f"input '{spec.name}' has the fixed shape {spec.shape}; only a fixed batch of 1 can be run: "
                "export again with a dynamic batch or with one sample"
            )
    return tuple(msgspec.structs.replace(spec, shape=(BATCH, *spec.shape[1:])) for spec in plan.inputs), True


def _joined(results: Sequence[Result]) -> Result:
    if len(results) == 1:
        return results[0]
    return Result(
        np.concatenate([result.logits for result in results]),
        np.concatenate([result.exit for result in results]),
        np.concatenate([result.score for result in results]),
        {name: sum(result.executed[name] for result in results) for name in results[0].executed},
    )


def _artifacts(bundle: Bundle, runtime: Runtime, precision: str) -> tuple[str, dict[str, Path]]:
    """Name of the set that a runtime runs, and each stage's file in it; none for a runtime that opens none."""
    target = artifact_set(runtime.target, precision)
    return target, bundle.artifacts(target) if target else {}
