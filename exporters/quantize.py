"""The verb: one more set of a bundle's artifacts, in lower precision, each stage calibrated on what survives to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np

from edgekit import plugins
from edgekit.artifacts import CALIBRATED, PRECISIONS
from edgekit.bundle import Bundle
from edgekit.data import Dataset
from edgekit.errors import CalibrationError, InputError
from edgekit.exporters.quantize_litert import LiteRTQuantizer
from edgekit.exporters.quantize_onnx import OnnxQuantizer
from edgekit.exporters.quantize_work import On, Quantizer, Work
from edgekit.interfaces import Runtime
from edgekit.policy import Policy
from edgekit.precision import PrecisionReport
from edgekit.progress import Progress, silent

__all__ = ["FEWEST_SAMPLES", "QUANTIZERS", "quantize_bundle"]

FEWEST_SAMPLES = 128
"""Half of them calibrate, half measure."""
QUANTIZERS: dict[str, type[Quantizer]] = {"onnx": OnnxQuantizer, "litert": LiteRTQuantizer}
"""By target."""


def quantize_bundle(
    bundle: Bundle,
    data: Dataset,
    *,
    precision: str = "int8",
    target: str = "onnx",
    policy: Policy | str | None = None,
    max_drop: float | None = None,
    calibrate_on: On = "survivors",
    keep_float: Sequence[str] = (),
    seed: int = 0,
    threads: int = 1,
    progress: Progress = silent,
) -> PrecisionReport:
    """Write a set of artifacts in lower precision into a bundle, and tell what it does.

    Half of the samples find the ranges, the other half measures. The policy's thresholds are the same for both.

    Args:
        bundle: open; what its set of this name was is replaced.
        data: samples, with labels where accuracy is to be told.
        precision: of :data:`edgekit.artifacts.PRECISIONS`.
        target: whose float artifacts are taken.
        policy: under which samples survive, or the name of a saved one; ``None`` takes the bundle's ``default``, or
            else nobody leaves early.
        max_drop: largest drop on the samples held out; the worst stages are kept in float until it holds.
        calibrate_on: for each stage the samples that survive to it, or all, as in a static graph.
        keep_float: names of stages to keep in any case.
        seed: of the split.
        threads: of the runtime that measures.
        progress: told what is being done.

    Raises:
        InputError: no such precision, target or stage, or samples that do not fit the network.
        CalibrationError: too few samples.
        LoweringError: a stage cannot be written, or there is nothing to lower.
        PolicyError: no such policy, or one for another network.
        BundleError: the bundle is damaged or cannot be written. Whatever is raised, the bundle is as it was.
    """
    quantizer = _quantizer(bundle, precision, target, keep_float)
    if max_drop is not None and not 0 <= max_drop <= 1:
        raise InputError(f"max_drop {max_drop}: expected a share between 0 and 1")
    if len(data) < FEWEST_SAMPLES:
        raise CalibrationError(
            f"{data.source}: {len(data)} samples are too few for {precision}: at least {FEWEST_SAMPLES} are needed, "
            "half to calibrate and half to measure; give more data"
        )
    order = np.random.default_rng(seed).permutation(len(data))
    half = len(data) // 2
    runtime: Runtime = plugins.create("runtimes", quantizer.runtime, threads=threads)
    with TemporaryDirectory(prefix="edgekit-") as folder:
        try:
            work = Work(
                bundle=bundle,
                quantizer=quantizer,
                runtime=runtime,
                policy=_policy(bundle, policy),
                folder=Path(folder),
                precision=precision,
                progress=progress,
            )
            work.write(data.take(order[:half]), calibrate_on, keep_float)
            report = work.measure(data.take(order[half:]), max_drop)
        finally:
            runtime.close()
        report = msgspec.structs.replace(
            report,
            data=data.source,
            data_sha256=data.sha256,
            calibrated_on=calibrate_on if precision in CALIBRATED else None,
            calibration_samples=half if precision in CALIBRATED else 0,
        )
        work.save(report)
    return report


def _quantizer(bundle: Bundle, precision: str, target: str, keep_float: Sequence[str]) -> Quantizer:
    if target not in QUANTIZERS or target not in bundle.manifest.artifacts:
        able = [name for name in QUANTIZERS if name in bundle.manifest.artifacts]
        raise InputError(
            f"{bundle.path}: nothing can be quantised for target '{target}' "
            f"(possible here: {', '.join(able) or 'none'}); export for {' or '.join(QUANTIZERS)} first"
        )
    quantizer = QUANTIZERS[target]()
    if precision not in PRECISIONS or precision not in quantizer.precisions:
        raise InputError(
            f"precision '{precision}' is not one of {', '.join(quantizer.precisions)}, which target '{target}' has"
        )
    known = [stage.name for stage in bundle.plan.stages]
    unknown = sorted(set(keep_float) - set(known))
    if unknown:
        raise InputError(f"stage '{unknown[0]}' does not exist; the network has {', '.join(known)}")
    return quantizer


def _policy(bundle: Bundle, policy: Policy | str | None) -> Policy:
    if policy is None:
        policy = "default" if "default" in bundle.manifest.policies else Policy.never(len(bundle.plan.exits))
    found = bundle.policy(policy) if isinstance(policy, str) else policy
    found.require_fits(bundle.plan)
    return found
