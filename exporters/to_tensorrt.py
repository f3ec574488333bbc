"""Builds TensorRT engines from ONNX stages, on the device that runs them. Needs no torch and no onnx.

An engine is for one GPU and one version of TensorRT, so none is written when a bundle is exported: ``edgekit build``,
or the runtime when it first opens a stage, builds them from the bundle's ONNX stages and keeps them
(:mod:`edgekit.engines`).

Written for TensorRT 8.6, 10 and 11. In 8.6 precision is chosen by flags for the whole network; 10 can take it from the
file (strongly typed), and 11 does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import LoweringError, PluginError, require
from edgekit.plan import Stage
from edgekit.progress import Progress, silent
from edgekit.tensors import TensorSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["ALLOWED", "TensorRTTarget"]

ALLOWED = ("tf32", "float16")
"""Lower precision that a builder may be allowed to choose by itself for float32 stages, where its version still can."""

_ELSEWHERE = "run the network on another runtime, as onnxruntime, or use a newer TensorRT"
_INT8 = (
    "TensorRT takes static int8 with zero points of 0 and biases in float: edgekit quantize BUNDLE --precision "
    "int8-symmetric, and run that"
)

STEPS = 100
"""That the progress of one engine is told in."""


class TensorRTTarget:
    """Builds engines. As a target of an export it refuses: see :meth:`lower`.

    Args:
        trt: the ``tensorrt`` module; imported when the first engine is built, if not given.

    Attributes:
        log: what TensorRT said; TensorRT wants one for all that it makes. ``None`` until something was built.
    """

    name = "tensorrt"
    suffix = ".engine"
    runtime = "tensorrt"

    def __init__(self, trt: Any = None) -> None:
        self._trt = trt
        self.log: Any = None if trt is None else make_log(trt)

    def lower(self, program: ExportedProgram, stage: Stage, path: Path, *, specs: Mapping[str, TensorSpec]) -> None:
        """Never writes a stage.

        Raises:
            LoweringError: always; the message says what to do.
        """
        raise LoweringError(
            f"stage '{stage.name}': a TensorRT engine is built on the device that runs it: export with "
            "targets=('onnx',), then run there: edgekit build BUNDLE --runtime tensorrt"
        )

    def versions(self) -> dict[str, str]:
        """None: what is exported carries no engine."""
        return {}

    def build(
        self,
        file: Path,
        *,
        stage: str,
        batch: tuple[int, int, int] = (1, 1, 1),
        allow: Sequence[str] = (),
        workspace_bytes: int | None = None,
        timing: bytes = b"",
        configure: Callable[[Any], None] | None = None,
        progress: Progress = silent,
    ) -> tuple[bytes, bytes]:
        """Build the engine of one ONNX file; weights in files beside it are found.

        Args:
            file: the ONNX file.
            stage: name of its stage, for messages.
            batch: least, best and largest number of rows of its inputs.
            allow: of :data:`ALLOWED`: lower precision that TensorRT may choose by itself. Without any, float32 is
                computed in float32. What the file itself has in lower precision stays so.
            workspace_bytes: memory that one layer may use for scratch; all that the GPU has if ``None``.
            timing: a timing cache: what this returned before, of the same GPU and version.
            configure: given TensorRT's builder configuration before it builds, for settings that are not here.
            progress: told how far it is, where TensorRT tells (10 and newer).

        Returns:
            The engine, and the timing cache with what was learnt added; empty where there is none.

        Raises:
            LoweringError: TensorRT cannot take the stage; the message names the node where TensorRT does.
            PluginError: this version cannot choose the precision that is allowed.
            MissingExtraError: tensorrt is not installed.
        """
        if self._trt is None:
            self._trt = require("tensorrt", extra="tensorrt", purpose="Building TensorRT engines")
            self.log = make_log(self._trt)
        trt, log = self._trt, self.log
        _require_allowed(trt, allow)
        log.last = ""
        builder = trt.Builder(log)
        network = builder.create_network(_creation_flags(trt, allow))
        _parse(trt, network, log, file=file, stage=stage)
        config = builder.create_builder_config()
        if workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        _set_precision(trt, network, config, allow)
        _set_batch(builder, network, config, batch=batch, stage=stage)
        _give_timing(config, timing)
        watch = _watch(trt, config, stage, progress)
        if configure is not None:
            configure(config)
        engine = builder.build_serialized_network(network, config)
        if watch is not None and watch.raised is not None:
            raise watch.raised
        if engine is None:
            raise LoweringError(
                f"stage '{stage}': TensorRT {trt.__version__} could not build an engine of {file.name} "
                f"({log.last or 'it gives no reason'}); {_advice(log.last)}"
            )
        return bytes(engine), _take_timing(config)


def make_log(trt: Any) -> Any:
    """A TensorRT logger that keeps the latest error, for messages, and prints nothing.

    Args:
        trt: the ``tensorrt`` module.

    Returns:
        An ``ILogger`` with ``last``, the latest error's text, ``""`` where there was none.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.last = " ".join(message.split())

    return Log()


def _require_allowed(trt: Any, allow: Sequence[str]) -> None:
    unknown = [name for name in allow if name not in ALLOWED]
    if unknown:
        raise PluginError(
            f"runtime 'tensorrt': it cannot be allowed to choose '{unknown[0]}' (only {', '.join(ALLOWED)}); other "
            "precision comes from the artifacts: load(..., precision='int8')"
        )
    if "float16" in allow and not hasattr(trt.BuilderFlag, "FP16"):
        raise PluginError(
            f"runtime 'tensorrt': TensorRT {trt.__version__} takes precision from the artifacts and cannot choose "
            "float16 by itself: write float16 artifacts and load(..., precision='float16')"
        )


def _is_typed(trt: Any, allow: Sequence[str]) -> bool:
    """Whether precision is taken from the file alone."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") and "float16" not in allow


def _creation_flags(trt: Any, allow: Sequence[str]) -> int:
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):  # the only kind there is, from 10 on
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    if _is_typed(trt, allow) and hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return flags


def _parse(trt: Any, network: Any, log: Any, *, file: Path, stage: str) -> None:
    parser = trt.OnnxParser(network, log)
    # By its path, not its content: weights lie in a file beside it.
    if parser.parse_from_file(str(file)):
        return
    error = parser.get_error(0) if parser.num_errors else None
    if error is None or error.node() < 0:
        reason = log.last if error is None else " ".join(error.desc().split())
        raise LoweringError(
            f"stage '{stage}': TensorRT {trt.__version__} cannot read {file.name} ({reason or 'it gives no reason'}); "
            "copy the bundle again, or export again"
        )
    operator, node = "", f"node {error.node()}"
    if hasattr(trt.ParserError, "node_operator"):
        operator, node = error.node_operator(), f"'{error.node_name()}'" if error.node_name() else node
    raise LoweringError(
        f"stage '{stage}': TensorRT {trt.__version__} cannot take {' '.join(filter(None, (operator, node)))} of "
        f"{file.name} ({' '.join(error.desc().split())}); {_INT8 if 'QuantizeLinear' in operator else _ELSEWHERE}"
    )


def _set_precision(trt: Any, network: Any, config: Any, allow: Sequence[str]) -> None:
    """Say what may be computed in lower precision, where the file does not say it alone."""
    # On by default from Ampere on: float32 products of 10 bits' precision, enough to flip decisions.
    if "tf32" in allow:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if _is_typed(trt, allow):
        return
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds = {layer.type for layer in layers}
    tensors = [layer.get_output(index) for layer in layers for index in range(layer.num_outputs)]
    types = {tensor.dtype for tensor in tensors}
    if hasattr(trt.BuilderFlag, "FP16") and ("float16" in allow or trt.DataType.HALF in types):
        config.set_flag(trt.BuilderFlag.FP16)
    if hasattr(trt.BuilderFlag, "INT8") and trt.LayerType.QUANTIZE in kinds:
        config.set_flag(trt.BuilderFlag.INT8)


def _set_batch(builder: Any, network: Any, config: Any, *, batch: tuple[int, int, int], stage: str) -> None:
    """One optimisation profile for every input that has rows."""
    profile = builder.create_optimization_profile()
    has_rows = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 not in shape:
            continue
        first, *rest = shape
        if first != -1 or -1 in rest:
            raise LoweringError(
                f"stage '{stage}': input '{tensor.name}' is {shape}, and only its first size may be left "
                "open; export again"
            )
        least, best, most = ((rows, *rest) for rows in batch)
        profile.set_shape(tensor.name, least, best, most)
        has_rows = True
    if has_rows:
        config.add_optimization_profile(profile)


def _give_timing(config: Any, timing: bytes) -> None:
    """Let the builder start from what it has timed before. What it does not take, it times again."""
    cache = config.create_timing_cache(timing) or config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, False)


def _take_timing(config: Any) -> bytes:
    cache = config.get_timing_cache()
    return b"" if cache is None else bytes(cache.serialize())


def _watch(trt: Any, config: Any, stage: str, progress: Progress) -> Any:
    """Have ``progress`` told how far the builder is; ``None`` where the version cannot tell.

    What ``progress`` raises must not pass through TensorRT: it is kept as ``raised``, and the build is cancelled.
    """
    if not hasattr(trt, "IProgressMonitor"):
        progress(f"build {stage}", 0, 1)
        return None

    class Watch(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.raised: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps = self._steps.get(phase_name)
            if steps and self.raised is None:
                self._tell(min(step + 1, steps) * STEPS // steps)
            return self.raised is None

        def phase_finish(self, phase_name: str) -> None:
            if self._steps.pop(phase_name, None) is not None and self.raised is None:
                self._tell(STEPS)

        def _tell(self, done: int) -> None:
            try:
                progress(f"build {stage}", done, STEPS)
            except BaseException as error:  # Ctrl-C as well: it ends the build in an orderly way
                self.raised = error

    watch = Watch()
    config.progress_monitor = watch
    return watch


def _advice(reason: str) -> str:
    lowered = reason.lower()
    if "memory" in lowered or "workspace" in lowered:
        return "change its workspace or build for fewer rows: edgekit build BUNDLE --workspace 512MiB --max-batch 1"
    return _ELSEWHERE
