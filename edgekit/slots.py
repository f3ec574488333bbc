"""Open stages and the memory that they share: which buffer a tensor lives in, and stages bound to buffers."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from edgekit.errors import EdgekitError
from edgekit.interfaces import Buffer, Runtime, StageRunner
from edgekit.plan import ZERO, Plan
from edgekit.policy import Policy
from edgekit.route import Call, Edge
from edgekit.tensors import TensorSpec

__all__ = ["BINDINGS_PER_STAGE", "Places", "Slots"]

BINDINGS_PER_STAGE = 64
"""Bindings kept per stage, least recently used first out: every number of rows that a batch of 64 can shrink to. One
holds a few kilobytes and is made again in some ten microseconds, little beside a stage on more than 64 rows."""

Places = dict[str, Buffer]
"""The buffer that each tensor lives in."""


class Slots:
    """The stages of a plan, open, and buffers for their tensors.

    Tensors of one dtype and shape take turns in as few buffers as possible: one that nothing reads any more is written
    again. So a tensor that a closed gate hands through can stay where it is, and what follows finds its input in one of
    few places, for each of which it is bound once.

    Args:
        plan: stages and tensors.
        runtime: opens the stages and owns the memory.
        artifacts: each stage's file, by name; empty for a runtime that opens none.
    """

    def __init__(self, plan: Plan, runtime: Runtime, artifacts: Mapping[str, Path]) -> None:
        self.plan = plan
        self.runtime = runtime
        self.rows = 1
        self.runners: dict[str, StageRunner] = {}
        self._stack = ExitStack()
        begin = time.perf_counter_ns()
        try:
            for stage in plan.stages:
                runner = runtime.open(stage, artifacts[stage.name] if runtime.target else Path())
                self._stack.callback(runner.close)
                self.runners[stage.name] = runner
        except BaseException:
            self._stack.close()
            raise
        self.open_s = (time.perf_counter_ns() - begin) / 1e9
        names = [*(step.temperature for step in plan.exits), *(each.tensor for each in plan.constants)]
        self._numbers = {name: self._allocate(plan.tensors[name]) for name in names}
        self._forget()

    def close(self) -> None:
        """Close the stages and let go of the memory."""
        self.runners = {}
        self._forget()
        self._stack.close()

    def _forget(self) -> None:
        self._pool: defaultdict[tuple[str, tuple[int | str, ...]], list[Buffer]] = defaultdict(list)
        self._zeros: dict[tuple[str, tuple[int | str, ...]], Buffer] = {}
        self._bindings: OrderedDict[tuple[object, ...], Callable[[], None]] = OrderedDict()
        self.given: Places = dict(self._numbers)
        if self.runners:
            for spec in self.plan.inputs:
                self.given[spec.name] = self.take(spec, self.given.values())

    def grow(self, rows: int) -> bool:
        """Make room for so many rows. Whether everything was allocated anew, and what was bound is void."""
        if rows <= self.rows:
            return False
        self.rows = rows
        self._forget()
        return True

    def use(self, policy: Policy) -> None:
        """Write the policy's temperatures and constants, where every stage reads them."""
        numbers = {step.temperature: t for step, t in zip(self.plan.exits, policy.temperatures, strict=True)}
        numbers |= {each.tensor: policy.constants.get(each.name, each.value) for each in self.plan.constants}
        for name, number in numbers.items():
            self._numbers[name].write(np.array(number, dtype=np.float32))

    def take(self, spec: TensorSpec, held: Iterable[Buffer]) -> Buffer:
        """A buffer for a tensor, none of those that are held."""
        taken = {id(buffer) for buffer in held}
        pool = self._pool[spec.dtype, spec.shape]
        for buffer in pool:
            if id(buffer) not in taken:
                return buffer
        pool.append(self._allocate(spec))
        return pool[-1]

    def is_zero(self, buffer: Buffer) -> bool:
        """Whether it holds the zeros that closed gates give, and must not be written."""
        return any(buffer is zero for zero in self._zeros.values())

    def follow(self, edge: Edge, places: Places) -> Places:
        """Where the tensors are that the edge's block needs."""
        found = {}
        for name in edge.block.needed:
            source = edge.stands_for.get(name, name)
            found[name] = self._zero(self.plan.tensors[name]) if source == ZERO else places[source]
        return found

    def place(self, call: Call, places: Places, held: Iterable[Buffer] = ()) -> Places:
        """Give the outputs of a call their buffers; returns where everything is that is read by it or after it."""
        inputs = {name for name, _ in call.inputs}
        kept = {name: buffer for name, buffer in places.items() if name in call.live or name in inputs}
        for name, _ in call.outputs:
            kept[name] = self.take(self.plan.tensors[name], [*held, *kept.values()])
        return kept

    def bind(self, call: Call, places: Places, rows: int) -> Callable[[], None]:
        """What runs a call on its tensors in their places; bound before or now.

        Raises:
            EdgekitError: the runtime cannot bind it.
        """
        buffers = {inside: places[name] for name, inside in (*call.inputs, *call.outputs)}
        outputs = tuple(inside for _, inside in call.outputs)
        key = (call.stage, rows, outputs, *(id(buffer) for buffer in buffers.values()))
        found = self._bindings.get(key)
        if found is None:
            try:
                found = self.runners[call.stage].bind(buffers, rows=rows, outputs=outputs)
            except EdgekitError:
                raise
            except Exception as error:
                raise self.failure([call.stage], error) from error
            self._bindings[key] = found
            if len(self._bindings) > BINDINGS_PER_STAGE * len(self.runners):
                self._bindings.popitem(last=False)
        else:
            self._bindings.move_to_end(key)
        return found

    def failure(self, stages: Iterable[str], error: Exception) -> EdgekitError:
        """What a runtime raised, with the stage it happened in."""
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return EdgekitError(f"stage '{', '.join(stages)}' failed in {self.runtime.name} ({line})")

    def _zero(self, spec: TensorSpec) -> Buffer:
        kind = spec.dtype, spec.shape
        if kind not in self._zeros:
            self._zeros[kind] = self._allocate(spec)
            self._zeros[kind].write(np.zeros(spec.concrete(self.rows), dtype=spec.dtype))
        return self._zeros[kind]

    def _allocate(self, spec: TensorSpec) -> Buffer:
        return self.runtime.allocate(spec, self.rows)
