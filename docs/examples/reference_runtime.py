"""A runtime plugin, complete: stages run by onnx's reference evaluator, in plain numpy.

Slow, and therefore easy to follow: nothing is fused or reordered. Good for finding out whether a doubtful answer
comes from a stage's file or from the library that runs it. ``docs/adding-a-runtime.md`` walks through this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekit.bundle import variant
from edgekit.errors import BundleError, PluginError, require
from edgekit.interfaces import Buffer
from edgekit.plan import SCORES, Stage
from edgekit.runtimes.host import HostBuffer
from edgekit.tensors import TensorSpec

__all__ = ["ReferenceRuntime"]


class ReferenceRuntime:
    """Opens ``onnx`` artifacts in ``onnx.reference``. See :class:`edgekit.interfaces.Runtime`.

    Args:
        threads: must be 1; the evaluator has no more.

    Raises:
        MissingExtraError: onnx is not installed.
        PluginError: another number of threads is asked for.
    """

    name = "reference"
    target = "onnx"

    def __init__(self, *, threads: int = 1) -> None:
        if threads != 1:
            raise PluginError(f"runtime 'reference' runs in one thread, not {threads}: leave threads at 1")
        self._onnx = require("onnx", extra="export", purpose="The reference runtime")
        self._evaluator = require("onnx.reference", extra="export", purpose="The reference runtime").ReferenceEvaluator

    def open(self, stage: Stage, artifact: Path) -> ReferenceRunner:
        """One stage, in every variant of its graph that lies beside ``artifact``.

        Raises:
            BundleError: a file is no ONNX graph, or does not have the stage's inputs.
        """
        beside = (variant(artifact, name) for name in ("trunk", *SCORES))
        variants = [self._read(stage, file) for file in (artifact, *beside) if file.is_file()]
        return ReferenceRunner(stage, variants)

    def _read(self, stage: Stage, file: Path) -> Any:
        try:
            graph = self._evaluator(self._onnx.load(file))
        except Exception as error:  # onnx raises what protobuf and numpy raise
            raise BundleError(f"{file}: stage '{stage.name}' is no ONNX graph ({error}); export again") from error
        if set(graph.input_names) != set(stage.inputs):
            raise BundleError(f"{file}: its inputs are not those of stage '{stage.name}'; export again")
        return graph

    def allocate(self, spec: TensorSpec, rows: int) -> HostBuffer:
        """Host memory, which numpy reads in place."""
        return HostBuffer(spec, rows)

    def describe(self) -> dict[str, Any]:
        """What a policy and a profile will say they came from."""
        return {"name": self.name, "version": self._onnx.__version__, "device": "cpu", "threads": 1}

    def close(self) -> None:
        """Holds nothing: the runners have the graphs."""


class ReferenceRunner:
    """One open stage. See :class:`edgekit.interfaces.StageRunner`."""

    def __init__(self, stage: Stage, variants: Sequence[Any]) -> None:
        self._stage = stage
        self._variants = sorted(variants, key=lambda graph: len(graph.output_names))

    def bind(self, buffers: Mapping[str, Buffer], *, rows: int, outputs: Sequence[str]) -> Callable[[], None]:
        """Take the smallest variant that computes ``outputs``, and return what runs it.

        Raises:
            BundleError: no variant computes them together.
        """
        graph = next((graph for graph in self._variants if set(outputs) <= set(graph.output_names)), None)
        if graph is None:
            raise BundleError(f"stage '{self._stage.name}': no file computes {', '.join(outputs)}; export again")
        inputs, names = self._stage.inputs, list(outputs)

        def run() -> None:
            results = graph.run(names, {name: buffers[name].read(rows) for name in inputs})
            for name, result in zip(names, results, strict=True):
                buffers[name].write(result)

        return run

    def close(self) -> None:
        """Let go of the graphs."""
        self._variants = []
