"""Walks a plan over open stages: run, decide, leave or go on. The hot path.

One sample goes through a flat loop of pre-bound stages. A batch decides row by row: rows that leave are copied out,
those that stay are moved together in the tensors that later stages still read, and the next stage runs on fewer rows.
Both compare the same float32 score with the same float32 threshold.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit import plugins
from edgekit.bundle import Bundle
from edgekit.errors import EdgekitError, InputError, PluginError
from edgekit.interfaces import Buffer, Runtime, StageRunner
from edgekit.plan import Plan, Run
from edgekit.policy import Policy
from edgekit.route import Hop, hops, read_by
from edgekit.tensors import BATCH, TensorSpec, check_inputs

__all__ = ["Result", "Session"]

BINDINGS_PER_STAGE = 64
"""Bindings kept per stage, least recently used first out: every number of rows that a batch of 64 can shrink to. One
holds a few kilobytes and is made again in some ten microseconds, little beside a stage on more than 64 rows."""

Arrays = list[NDArray[Any]]
_NAN = np.float32(np.nan)


class Result(msgspec.Struct, frozen=True, eq=False):
    """Answers of one run, rows in the order of the inputs. Owns its memory.

    Attributes:
        logits: ``(batch, classes) float32``, of the exit that each row took.
        exit: ``(batch,) int64``, index of that exit.
        score: ``(batch,) float32``, the policy's score at that exit, the last one included.
        executed: rows that each stage ran on; 0 when it did not run.
    """

    logits: NDArray[np.float32]
    exit: NDArray[np.int64]
    score: NDArray[np.float32]
    executed: dict[str, int]


class _Bound(msgspec.Struct, frozen=True, eq=False):
    """A hop bound to one row.

    Every Python instruction counts here: a stage leaves the processor's caches cold, and the interpreter with them.

    Attributes:
        run: the stages up to the decision.
        score: reads the score.
        threshold: from which a row leaves; NaN lets none leave.
        logits: reads the logits ``(1, classes)``.
        scores: reads the score ``(1,)``.
        exit: its index ``(1,)``.
        executed: the result's account of stages when this is the last hop.
        stages: names, for errors.
    """

    run: Callable[[], None]
    score: Callable[[], float]
    threshold: float
    logits: Callable[[int], NDArray[Any]]
    scores: Callable[[int], NDArray[Any]]
    exit: NDArray[np.int64]
    executed: dict[str, int]
    stages: tuple[str, ...]


class Session:
    """A network that is open and ready to run. A context manager; not for several threads at once.

    Args:
        plan: stages and steps.
        runtime: opens the artifacts and owns the memory; stays open when the session closes.
        artifacts: each stage's file, by name; empty for a runtime that opens none.
        policy: when to leave; ``None`` runs everything to the last exit.
        bundle: what the plan came from, for those who want to know.

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
    ) -> None:
        self._plan = plan
        self._runtime = runtime
        self._bundle = bundle
        self._policy = policy or Policy.never(len(plan.exits))
        self._policy.require_fits(plan)
        self._specs, self._one_by_one = _row_specs(plan)
        self._row = (self._specs[0].concrete(1), np.dtype(self._specs[0].dtype)) if len(self._specs) == 1 else None
        self._rows = 0
        self._bindings: OrderedDict[tuple[str, int, tuple[str, ...]], Callable[[], None]] = OrderedDict()
        self._routes: dict[int | None, tuple[Hop, ...]] = {}
        self._bound: dict[int | None, tuple[_Bound, ...]] = {}
        self._stack = ExitStack()
        self._runners: dict[str, StageRunner] = {}
        begin = time.perf_counter_ns()
        try:
            for stage in plan.stages:
                runner = runtime.open(stage, artifacts[stage.name] if runtime.target else Path())
                self._stack.callback(runner.close)
                self._runners[stage.name] = runner
            self._buffers = {name: runtime.allocate(spec, 1) for name, spec in plan.tensors.items()}
            self._rows = 1
            self.use(self._policy)
            self._flat(None)
        except BaseException:
            self._stack.close()
            raise
        self._load_s = (time.perf_counter_ns() - begin) / 1e9
        self._has_run = False

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        runtime: str | Runtime = "onnxruntime",
        policy: Policy | str | None = None,
        threads: int = 1,
        **options: Any,
    ) -> Session:
        """Open a bundle.

        Args:
            bundle: open, or where it lies.
            runtime: its registered name, or one that is ready; a ready one is not closed with the session.
            policy: one, or the name of a saved one; ``None`` takes the bundle's ``default``, or else never exits early.
            threads: for a runtime given by name.
            **options: further options for a runtime given by name.

        Raises:
            BundleError: the bundle is damaged or has no artifacts for this runtime.
            PolicyError: no such policy, or for another network.
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
            names = [stage.name for stage in bundle.plan.stages] if made.target else []
            artifacts = {name: bundle.artifact(made.target, name) for name in names}
            session = cls(bundle.plan, made, artifacts, policy=policy, bundle=bundle)
            stack.push(session._stack.pop_all())
            session._stack = stack.pop_all()
        return session

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the stages, and what :meth:`open` opened."""
        self._runners = {}
        self._forget()
        self._buffers = {}
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
            PolicyError: it is for another network.
        """
        policy.require_fits(self._plan)
        self._require_open()
        self._policy = policy
        for step, temperature in zip(self._plan.exits, policy.temperatures, strict=True):
            self._buffers[step.temperature].write(np.array(temperature, dtype=np.float32))
        self._routes.clear()
        self._bound.clear()

    def run(self, inputs: Any, *, exit: int | None = None) -> Result:  # noqa: A002
        """Run a batch; each row leaves where the policy lets it.

        Args:
            inputs: one array, a sequence in the plan's order, or a mapping by name; ``(batch, ...)`` each.
            exit: every row leaves at this exit (from 0), whatever its score, having paid all that a row of a real
                stream pays on the way: scores and comparisons of the exits that it passes.

        Raises:
            InputError: inputs that do not fit the plan, an empty batch, or no such exit.
        """
        bound = self._bound.get(exit)
        if bound is not None and type(inputs) is np.ndarray and (inputs.shape, inputs.dtype) == self._row:
            # One sample of the only input, and all is bound: what a stream gives, time after time.
            self._buffers[self._specs[0].name].write(inputs)
            return self._run_row(bound)
        if exit is not None and not 0 <= exit < len(self._plan.exits):
            raise InputError(f"exit {exit} does not exist; the network has exits 0 to {len(self._plan.exits) - 1}")
        arrays, rows = self._accept(inputs)
        if rows == 1 or self._one_by_one:
            return _joined([self._write_row(arrays, row, exit) for row in range(rows)])
        return self._run_rows(arrays, rows, exit)

    def run_exits(self, inputs: Any) -> tuple[NDArray[np.float32], ...]:
        """Logits of every exit, ``(batch, classes) float32`` each, in order. Nobody leaves early.

        Args:
            inputs: as for :meth:`run`.

        Raises:
            InputError: inputs that do not fit the plan, or an empty batch.
        """
        arrays, rows = self._accept(inputs)
        if self._one_by_one and rows > 1:
            parts = [self._all_logits([array[row : row + 1] for array in arrays], 1) for row in range(rows)]
            return tuple(np.concatenate(part) for part in zip(*parts, strict=True))
        return self._all_logits(arrays, rows)

    def _accept(self, inputs: Any) -> tuple[Arrays, int]:
        self._require_open()
        arrays, rows = check_inputs(self._specs, inputs)
        if rows == 0:
            raise InputError(f"input '{self._specs[0].name}': the batch is empty; give at least one row")
        self._has_run = True
        return arrays, rows

    def _require_open(self) -> None:
        if not self._runners:
            raise EdgekitError("the session is closed; open the bundle again")

    def _write(self, arrays: Arrays, rows: int) -> None:
        if rows > self._rows:
            self._forget()
            for spec in self._plan.tensors.values():
                if spec.batched:
                    self._buffers[spec.name] = self._runtime.allocate(spec, rows)
            self._rows = rows
        for spec, array in zip(self._specs, arrays, strict=True):
            self._buffers[spec.name].write(array)

    def _forget(self) -> None:
        self._bindings.clear()
        self._bound.clear()

    def _write_row(self, arrays: Arrays, row: int, exit: int | None) -> Result:  # noqa: A002
        self._write([array[row : row + 1] for array in arrays], 1)
        return self._run_row(self._bound.get(exit) or self._flat(exit))

    def _run_row(self, bound: tuple[_Bound, ...]) -> Result:
        finite = True
        try:
            for hop in bound:
                hop.run()
                if hop.score() >= hop.threshold and all(np.isfinite(hop.logits(1)[0]).tolist()):
                    break
            else:
                finite = all(np.isfinite(hop.logits(1)[0]).tolist())
        except EdgekitError:
            raise
        except Exception as error:
            raise self._failure(hop.stages, error) from error
        self._has_run = True
        score = hop.scores(1).copy()
        if not finite:
            score[0] = np.nan
        return Result(hop.logits(1).copy(), hop.exit.copy(), score, hop.executed.copy())

    def _failure(self, stages: Sequence[str], error: Exception) -> EdgekitError:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return EdgekitError(f"stage '{', '.join(stages)}' failed in {self._runtime.name} ({line})")

    def _run_rows(self, arrays: Arrays, rows: int, exit: int | None) -> Result:  # noqa: A002
        self._write(arrays, rows)
        route = self._route(exit)
        result = Result(
            np.empty((rows, self._plan.classes), dtype=np.float32),
            np.empty(rows, dtype=np.int64),
            np.empty(rows, dtype=np.float32),
            dict.fromkeys(self._runners, 0),
        )
        remaining = np.arange(rows)
        for hop in route:
            count = len(remaining)
            for stage, outputs in hop.stages:
                self._run_stage(stage, count, outputs)
                result.executed[stage] += count
            logits = self._buffers[hop.logits].read(count)
            # Kernels may drop a NaN on the way to the score, so the logits are looked at.
            score = np.where(np.isfinite(logits).all(axis=1), self._buffers[hop.score].read(count), _NAN)
            done = np.ones(count, dtype=np.bool_) if hop is route[-1] else score >= hop.threshold
            leaving = remaining[done]
            result.logits[leaving] = logits[done]
            result.exit[leaving] = hop.exit
            result.score[leaving] = score[done]
            staying = np.flatnonzero(~done)
            if len(staying) == 0:
                break
            if len(staying) < count:
                remaining = remaining[staying]
                for name in hop.live:
                    self._buffers[name].keep(staying)
        return result

    def _all_logits(self, arrays: Arrays, rows: int) -> tuple[NDArray[np.float32], ...]:
        self._write(arrays, rows)
        logits = [step.logits for step in self._plan.exits]
        needed = read_by(self._plan.steps, self._plan) | set(logits)
        for step in self._plan.steps:
            if isinstance(step, Run):
                outputs = tuple(name for name in self._plan.stage(step.stage).outputs if name in needed)
                self._run_stage(step.stage, rows, outputs)
        return tuple(self._buffers[name].read(rows).copy() for name in logits)

    def _run_stage(self, stage: str, rows: int, outputs: tuple[str, ...]) -> None:
        try:
            self._binding(stage, rows, outputs)()
        except EdgekitError:
            raise
        except Exception as error:
            raise self._failure([stage], error) from error

    def _binding(self, stage: str, rows: int, outputs: tuple[str, ...]) -> Callable[[], None]:
        """What runs a stage on so many rows, bound before or now."""
        key = (stage, rows, outputs)
        found = self._bindings.get(key)
        if found is None:
            found = self._runners[stage].bind(self._buffers, rows=rows, outputs=outputs)
            self._bindings[key] = found
            if len(self._bindings) > BINDINGS_PER_STAGE * len(self._runners):
                self._bindings.popitem(last=False)
        else:
            self._bindings.move_to_end(key)
        return found

    def _flat(self, exit: int | None) -> tuple[_Bound, ...]:  # noqa: A002
        """The route of one row, bound."""
        executed = dict.fromkeys(self._runners, 0)
        bound = []
        for hop in self._route(exit):
            for stage, _ in hop.stages:
                executed[stage] += 1
            logits, score = self._buffers[hop.logits], self._buffers[hop.score]
            bound.append(
                _Bound(
                    run=_in_turn([self._binding(stage, 1, outputs) for stage, outputs in hop.stages]),
                    score=_reader(score),
                    threshold=float(hop.threshold),
                    logits=logits.read,
                    scores=score.read,
                    exit=np.array([hop.exit], dtype=np.int64),
                    executed=executed.copy(),
                    stages=tuple(stage for stage, _ in hop.stages),
                )
            )
        self._bound[exit] = tuple(bound)
        return self._bound[exit]

    def _route(self, exit: int | None) -> tuple[Hop, ...]:  # noqa: A002
        """Decisions of a run that is forced to an exit, or of the policy's.

        The policy's leaves out exits that are never taken, so that their heads need not run; a forced one decides at
        every exit on the way and lets nobody leave.
        """
        if exit not in self._routes:
            last = len(self._plan.exits) - 1
            thresholds = dict(enumerate(self._policy.thresholds))
            if exit is None:
                deciding = {index: value for index, value in thresholds.items() if value != math.inf}
                if self._policy.comparator == ">":  # the next number up turns it into ">="
                    deciding = {index: np.nextafter(np.float32(v), np.float32(np.inf)) for index, v in deciding.items()}
                deciding[last] = math.nan
            else:
                deciding = dict.fromkeys(range(exit + 1), math.nan)
            self._routes[exit] = hops(self._plan, self._policy.score, deciding)
        return self._routes[exit]


def _reader(score: Buffer) -> Callable[[], float]:
    """What reads one row's score."""
    view = score.read(1)
    read: Callable[[], float] = view.item if score.shared else lambda: score.read(1).item()
    return read


def _in_turn(runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """One call for several; a single one is itself."""
    if len(runs) == 1:
        return runs[0]

    def run() -> None:
        for each in runs:
            each()

    return run


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
