"""One set of artifacts in the making: stages in lower precision, written, measured, and handed to the bundle."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import numpy as np

from edgekit.artifacts import CALIBRATED, FLOAT, artifact_set
from edgekit.bundle import Bundle
from edgekit.data import Dataset
from edgekit.errors import BundleError, LoweringError
from edgekit.exporters.quantize_effects import Effect, HeldOut, stage_times
from edgekit.exporters.survivors import Given, closest, everyone, given_to
from edgekit.interfaces import Joining, Runtime
from edgekit.plan import Plan, Run, Stage, walk
from edgekit.policy import Policy
from edgekit.precision import PrecisionReport, StagePrecision
from edgekit.progress import Progress

__all__ = ["CALIBRATION_ROWS", "FEWEST_ROWS", "On", "Quantizer", "Work"]

CALIBRATION_ROWS = 512
"""Of what a stage is given, kept to find its ranges."""
FEWEST_ROWS = 128
"""Where fewer survive to a stage, as many that come closest to it calibrate it."""
FEW_NUMBERS = 16
"""A stage's output of so few numbers for a sample is a score or a gate's, whatever reads it: it stays in float."""

On = Literal["survivors", "all"]


class Quantizer(Protocol):
    """Writes stages of one target in lower precision. Made without arguments."""

    target: str
    suffix: str
    runtime: str
    """Name of the runtime that opens what it writes."""
    precisions: tuple[str, ...]

    def write(
        self, stage: Stage, source: Path, path: Path, *, precision: str, given: Given, deciding: Collection[str]
    ) -> str | None:
        """Write a stage, and what belongs to it beside it.

        Args:
            stage: names of its inputs and outputs.
            source: its float artifact, which holds no other stage.
            path: file to write.
            precision: one of :attr:`precisions`.
            given: what the stage is given.
            deciding: outputs that gates compare, which stay in float, as the exit's do.

        Returns:
            Why there is nothing to write, and the stage stays in float; ``None`` when it was written.

        Raises:
            LoweringError: it cannot be written.
        """
        ...

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that write the artifact, by name."""
        ...


@dataclass(kw_only=True)
class _Stage:
    """What is known of one stage so far; ``path`` is ``None`` where there is nothing in lower precision."""

    stage: Stage
    path: Path | None = None
    kept: str | None = None
    reached: int | None = None
    rows: int | None = None
    times: tuple[float, float] | None = None
    alone: Effect | None = None


class Work:
    """Stages in lower precision, in a folder of their own until the bundle takes them."""

    def __init__(
        self,
        *,
        bundle: Bundle,
        quantizer: Quantizer,
        runtime: Runtime,
        policy: Policy,
        folder: Path,
        precision: str,
        progress: Progress,
    ) -> None:
        self.bundle = bundle
        self.plan = bundle.plan
        self.quantizer = quantizer
        self.runtime = runtime
        self.policy = policy
        self.folder = folder
        self.precision = precision
        self.progress = progress
        self.target = quantizer.target
        self.deciding = _deciding(self.plan)
        self.float = bundle.artifacts(self.target)
        self.apart = self._taken_apart()
        self.stages = {stage.name: _Stage(stage=stage) for stage in self.plan.stages}
        self.chosen: dict[str, Path] = {}

    def _taken_apart(self) -> dict[str, Path]:
        """Each stage's float artifact by itself."""
        if not isinstance(self.quantizer, Joining):
            return self.float
        found = {}
        for stage in self.plan.stages:
            found[stage.name] = self.folder / "float" / stage.name / f"{stage.name}{self.quantizer.suffix}"
            found[stage.name].parent.mkdir(parents=True)
            self.quantizer.part(self.float[stage.name], stage, found[stage.name])
        return found

    def write(self, data: Dataset, calibrate_on: On, keep_float: Sequence[str]) -> None:
        """Write every stage that can be, and time it against float."""
        plan, policy = (self.plan, self.policy) if calibrate_on == "survivors" else everyone(self.plan, self.policy)
        for name in keep_float:
            self.stages[name].kept = "asked for"
        asked = [stage for stage in self.plan.stages if stage.name not in keep_float]
        calibrates = self.precision in CALIBRATED
        short = []
        for stage, given in self._given(asked, plan, policy, data, CALIBRATION_ROWS if calibrates else 1):
            self.stages[stage.name].reached = given.reached if calibrates else None
            if calibrates and given.rows < FEWEST_ROWS:
                short.append(stage)
            else:
                self._write_stage(self.stages[stage.name], given)
        if short:
            plan, policy = everyone(self.plan, self.policy)
            few = closest(self.plan, self.runtime, self.float, policy=self.policy, data=data, rows=FEWEST_ROWS)
            for stage, given in self._given(short, plan, policy, few, CALIBRATION_ROWS):
                self._write_stage(self.stages[stage.name], given)
        if not any(each.path for each in self.stages.values()):
            raise LoweringError(
                f"{self.bundle.path}: no stage can be written in {self.precision} "
                f"({'; '.join(f'{name}: {each.kept}' for name, each in list(self.stages.items())[:3])})"
            )

    def _given(
        self, stages: Sequence[Stage], plan: Plan, policy: Policy, data: Dataset, rows: int
    ) -> Iterator[tuple[Stage, Given]]:
        found = given_to(
            stages, plan, self.runtime, self.float, policy=policy, data=data, rows=rows, progress=self.progress
        )
        for number, (stage, given) in enumerate(found):
            yield stage, given
            self.progress(f"write stages in {self.precision}", number + 1, len(stages))

    def _write_stage(self, found: _Stage, given: Given) -> None:
        stage = found.stage
        if self.precision in CALIBRATED:
            found.rows = given.rows
            if not given.rows:
                found.kept = "no sample came to it, not even where gates let all through"
                return
        path = self.folder / "lower" / stage.name / f"{stage.name}{self.quantizer.suffix}"
        path.parent.mkdir(parents=True)
        source = self.apart[stage.name]
        found.kept = self.quantizer.write(
            stage, source, path, precision=self.precision, given=given, deciding=self.deciding[stage.name]
        )
        if found.kept is not None:
            return
        found.path = path
        self._require_opens(stage, path)
        if given.feeds:
            found.times = stage_times(
                stage, (source, path), given.feeds[0], plan=self.plan, runtime=self.runtime, score=self.policy.score
            )

    def _require_opens(self, stage: Stage, path: Path) -> None:
        """Bind what a session can ask of a stage: a target may keep it in files of their own."""
        live, head = stage.live, stage.head
        asked = [live, *((*live, head[0], *some) for some in ((), *((each,) for each in head[1:])))] if head else [live]
        buffers = {name: self.runtime.allocate(self.plan.tensors[name], 1) for name in (*stage.inputs, *stage.outputs)}
        try:
            for outputs in filter(None, asked):
                runner = self.runtime.open(stage, path)
                runner.bind(buffers, rows=1, outputs=outputs)
                runner.close()
        except BundleError as error:
            raise LoweringError(
                f"what was written in {self.precision} does not open: {error}; or keep the stage in float: "
                f"--keep-float {stage.name}"
            ) from error

    def measure(self, data: Dataset, max_drop: float | None) -> PrecisionReport:
        """Each stage alone, then the set, with the worst kept in float until the drop is within bounds."""
        held = HeldOut(self.plan, self.runtime, self.float, policy=self.policy, data=data, progress=self.progress)
        lowered = [each for each in self.stages.values() if each.path is not None]
        for each in lowered:
            assert each.path is not None
            each.alone = held.alone(each.stage, each.path)
        worst = sorted(lowered, key=_harm, reverse=True)
        self.chosen = self.artifacts()
        effect, exits = held.whole(self.chosen)
        while max_drop is not None and effect.drop > max_drop and worst:
            each = worst.pop(0)
            each.kept = f"with it in {self.precision} the set lost {100 * effect.drop:.2f} %"
            self.chosen = self.artifacts()
            effect, exits = held.whole(self.chosen)
        return self._report(held, effect, exits, max_drop)

    def artifacts(self) -> dict[str, Path]:
        """Each stage's file in the set, by name, as the bundle will have it."""
        if not isinstance(self.quantizer, Joining):
            return self.float | self._lowered()
        path = self.folder / "set" / f"network{self.quantizer.suffix}"
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # not written over, since a runtime may have it in memory still
        self.quantizer.join(list((self.apart | self._lowered()).values()), path)
        return dict.fromkeys(self.stages, path)

    def _lowered(self) -> dict[str, Path]:
        return {name: each.path for name, each in self.stages.items() if each.path and each.kept is None}

    def _report(
        self, held: HeldOut, effect: Effect, exits: tuple[float, ...], max_drop: float | None
    ) -> PrecisionReport:
        float_s, time_s = held.times(self.chosen)
        stages = tuple(self._stage_report(each) for each in self.stages.values())
        float_bytes = self.bundle.artifact_bytes(self.target)
        size = sum(each.size_bytes if each.lowered and each.size_bytes else each.float_bytes for each in stages)
        if isinstance(self.quantizer, Joining):
            size = sum(path.stat().st_size for path in set(self.chosen.values()))
        labels = held.data.labels
        accuracy = held.float_accuracy
        return PrecisionReport(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            network=self.bundle.manifest.name,
            plan=self.plan.fingerprint,
            target=self.target,
            precision=self.precision,
            artifacts=artifact_set(self.target, self.precision),
            policy=self.policy.name,
            calibrated_on=None,
            data="",
            data_sha256="",
            calibration_samples=0,
            samples=len(held.data),
            measure="agreement" if labels is None else "accuracy",
            drop=effect.drop,
            max_drop=max_drop,
            float_accuracy=accuracy,
            accuracy=None if accuracy is None else accuracy - effect.drop,
            float_exits=held.float_exits,
            exits=exits,
            flips=effect.flips,
            changed=effect.changed,
            largest_difference=effect.largest_difference,
            float_bytes=float_bytes,
            size_bytes=size,
            float_s=float_s,
            time_s=time_s,
            runtime=self.runtime.describe(),
            stages=stages,
            warnings=(
                *_warnings(self.plan, self.policy, stages, max_drop, effect.drop),
                *_size_warnings(stages, float_bytes=float_bytes, size_bytes=size),
            ),
        )

    def _stage_report(self, each: _Stage) -> StagePrecision:
        alone = each.alone
        return StagePrecision(
            name=each.stage.name,
            precision=FLOAT if each.kept is not None else self.precision,
            kept=each.kept,
            reached=each.reached,
            calibrated=each.rows,
            float_bytes=self._float_bytes(each.stage),
            size_bytes=None if each.path is None else sum(file.stat().st_size for file in _files(each.path)),
            float_s=each.times[0] if each.times else None,
            time_s=each.times[1] if each.times else None,
            largest_difference=alone.largest_difference if alone else None,
            mean_difference=alone.mean_difference if alone else None,
            flips=alone.flips if alone else None,
            drop=alone.drop if alone else None,
        )

    def _float_bytes(self, stage: Stage) -> int:
        if isinstance(self.quantizer, Joining):
            return self.apart[stage.name].stat().st_size
        return self.bundle.artifact_bytes(self.target, stage.name)

    def save(self, report: PrecisionReport) -> None:
        """Let the bundle take what was chosen."""
        with TemporaryDirectory(prefix="edgekit-") as folder:
            lowered = self._lowered()
            if isinstance(self.quantizer, Joining):
                lowered, files = self.chosen, sorted(set(self.chosen.values()))
            else:
                files = [file for path in lowered.values() for file in _files(path)]
            for file in files:
                file.rename(Path(folder) / file.name)
            self.bundle.add_artifacts(
                report.artifacts,
                Path(folder),
                {name: path.name for name, path in lowered.items()},
                shared={name: self.target for name in self.stages if name not in lowered},
                parity=_kept_of(report),
                versions=self.quantizer.versions(),
            )


def _kept_of(report: PrecisionReport) -> dict[str, Any]:
    """What the bundle keeps of a report: enough to know what the set is good for."""
    names = ("precision", "policy", "calibrated_on", "data", "samples", "measure", "drop", "flips", "changed")
    return {
        **{name: getattr(report, name) for name in names},
        "largest_difference": report.largest_difference,
        "in_float": {each.name: each.kept for each in report.stages if each.kept is not None},
    }


def _harm(each: _Stage) -> tuple[float, float]:
    """What sorts stages: the drop that each makes alone, then how far it moves logits."""
    assert each.alone is not None
    return each.alone.drop, each.alone.mean_difference or 0.0


def _files(artifact: Path) -> list[Path]:
    """An artifact in the folder of its stage, and what was written beside it."""
    return sorted(artifact.parent.iterdir())


def _size_warnings(stages: Sequence[StagePrecision], *, float_bytes: int, size_bytes: int) -> list[str]:
    if size_bytes < float_bytes:
        return []
    kept = ", ".join(each.name for each in stages if not each.lowered)
    shared = f" ({kept} stay in float, and stages that share weights with them no longer do)" if kept else ""
    return [f"the set is not smaller than the float one: {size_bytes:,} bytes of {float_bytes:,}{shared}"]


def _warnings(
    plan: Plan, policy: Policy, stages: Sequence[StagePrecision], max_drop: float | None, drop: float
) -> list[str]:
    found = []
    if len(plan.exits) > 1 and all(value == np.inf for value in policy.thresholds):
        found.append("nobody leaves early under this policy: every sample survives to every stage")
    few = [each.name for each in stages if each.reached is not None and each.reached < FEWEST_ROWS and each.lowered]
    if few:
        found.append(
            f"fewer than {FEWEST_ROWS} samples survive to {', '.join(few)}: calibrated on as many that come closest; "
            "give more data"
        )
    if max_drop is not None and drop > max_drop:
        found.append("the drop is not within what was asked for with every stage in float that can be")
    return found


def _deciding(plan: Plan) -> Mapping[str, set[str]]:
    """For each stage its outputs that gates compare, and those of a few numbers, by their names in the stage."""
    values = {gate.value for gate in plan.gates}
    grown = True
    while grown:
        ways = {
            source for gate in plan.gates for name, both in gate.outputs.items() if name in values for source in both
        }
        grown = not ways <= values
        values |= ways
    found: dict[str, set[str]] = {stage.name: set() for stage in plan.stages}
    for step in walk(plan.steps):
        if isinstance(step, Run):
            live = plan.stage(step.stage).live
            found[step.stage] |= {
                name
                for name, called in zip(live, step.called(live), strict=True)
                if called in values or plan.tensors[name].row_size <= FEW_NUMBERS
            }
    return found
