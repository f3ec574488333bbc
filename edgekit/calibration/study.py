"""Do the promises hold? ``python -m edgekit.calibration.study``: a study that anyone can rerun.

::

    python -m edgekit.calibration.study                                    # synthetic losses only, half a minute
    python -m edgekit.calibration.study --scores logits.npz                # and real logits: (exits, samples, classes)
    python -m edgekit.calibration.study --bundle net.edgekit --data test.npz

It ends with exit code 1 if a promise is broken, or if one of the methods that are known to be wrong is not caught: a
study without the power to catch them would show nothing. Where a rate is compared with ``delta``, three standard errors
``sqrt(delta (1 - delta) / repetitions)`` are allowed for.
"""

from __future__ import annotations

import argparse
import math
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.certify import Certification, Risk, certify, fixed_sequence
from edgekit.calibration.losses import LOSSES, Loss
from edgekit.calibration.risk import Test, p_value
from edgekit.calibration.scores import score
from edgekit.calibration.solve import propose_path, shared_threshold_path
from edgekit.calibration.thresholds import choose_thresholds, exits_taken
from edgekit.errors import CalibrationError, EdgekitError
from edgekit.progress import Progress, silent

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Check", "Recording", "boundary", "controls", "draws", "load_recording", "main", "record"]

DELTAS = (0.05, 0.1, 0.2)
EPSILONS = (0.01, 0.02, 0.05)
SAMPLES = 1000
"""In each draw from real logits."""
REPETITIONS = 1000
BOUNDARY_REPETITIONS = 3
"""Repetitions at the boundary, per repetition of the rest."""

Floats = NDArray[np.float64]
Policies = Sequence[Sequence[float]]
"""Thresholds of a path's policies, never-exit first."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the study.

    Attributes:
        part: of the study.
        what: was looked at.
        found: a rate, or a ratio of costs.
        must: how it has to compare with ``limit``; ``None`` for what is only told.
        limit: of ``found``.
    """

    part: str
    what: str
    found: float
    must: Literal["<=", ">"] | None = None
    limit: float = math.nan

    @property
    def holds(self) -> bool:
        """Whether it is as it must be."""
        if self.must is None:
            return True
        return self.found <= self.limit if self.must == "<=" else self.found > self.limit


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Real answers of every exit.

    Attributes:
        logits: ``(exits, samples, classes) float32``.
        labels: ``(samples,) int64``, or ``None``.
        costs: ``(exits,)`` of leaving at each.
        source: where they come from.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    costs: Floats
    source: str

    def __post_init__(self) -> None:
        if self.logits.ndim != 3 or self.logits.shape[1] < 2:
            raise CalibrationError(f"{self.source}: logits must be (exits, samples, classes), not {self.logits.shape}")
        if not np.isfinite(self.logits).all():
            raise CalibrationError(f"{self.source}: logits must be finite")
        if self.costs.shape != self.logits.shape[:1]:
            raise CalibrationError(f"{self.source}: {self.costs.shape} costs for {len(self.logits)} exits")


def allowed(delta: float, repetitions: int) -> float:
    """``delta`` and three standard errors of a rate that is ``delta``."""
    return delta + 3 * math.sqrt(delta * (1 - delta) / repetitions)


def boundary(repetitions: int, *, epsilon: float = 0.05, seed: int = 0, progress: Progress = silent) -> list[Check]:
    """How often each test rejects ``E[x] > epsilon`` for losses of mean ``epsilon`` exactly: at most ``delta``.

    The distributions differ in variance and shape; ``wsr`` also sees some that reach far below 0.
    """
    checks = []
    cases = [(test, name, n) for test, names in BOUNDARY_KINDS.items() for name in names for n in (60, 200, 1000)]
    for done, (test, name, n) in enumerate(cases):
        rng = np.random.default_rng((seed, done))
        rejected = dict.fromkeys(DELTAS, 0)
        for _ in range(repetitions):
            losses = BOUNDARY_LOSSES[name](rng, n, epsilon)
            for delta in DELTAS:
                rejected[delta] += p_value(losses, test=test, epsilon=epsilon, delta=delta) <= delta
        for delta, count in rejected.items():
            what = f"{test}, {name}, n={n}, delta={delta}: rejections"
            limit = allowed(delta, repetitions)
            checks.append(Check(part="boundary", what=what, found=count / repetitions, must="<=", limit=limit))
        progress("at the boundary", done + 1, len(cases))
    return checks


def _signed(share: float) -> Callable[[np.random.Generator, int, float], Floats]:
    """1 with probability ``share + epsilon``, -1 with probability ``share``."""

    def losses(rng: np.random.Generator, n: int, epsilon: float) -> Floats:
        drawn = rng.random(n)
        return np.asarray(drawn < share + epsilon, dtype=np.float64) - (drawn > 1 - share)

    return losses


BOUNDARY_LOSSES: dict[str, Callable[[np.random.Generator, int, float], Floats]] = {
    "0 or 1": lambda rng, n, epsilon: np.asarray(rng.random(n) < epsilon, dtype=np.float64),
    "0 or 1/2": lambda rng, n, epsilon: (rng.random(n) < 2 * epsilon) / 2,
    "uniform": lambda rng, n, epsilon: rng.uniform(0, 2 * epsilon, n),
    "constant": lambda rng, n, epsilon: np.full(n, epsilon),
    "signed, rare": _signed(0.01),
    "signed": _signed(0.1),
    "signed, often": _signed(0.45),
    "1 or -4": lambda rng, n, epsilon: np.where(rng.random(n) < (4 + epsilon) / 5, 1.0, -4.0),
    "1 - exponential": lambda rng, n, epsilon: 1 - rng.exponential(1 - epsilon, n),
}
"""Each of mean ``epsilon`` exactly."""

BOUNDARY_KINDS: dict[Test, tuple[str, ...]] = {
    "binomial": ("0 or 1",),
    "hoeffding-bentkus": ("0 or 1", "0 or 1/2", "uniform", "constant"),
    "ternary": ("0 or 1", "signed, rare", "signed", "signed, often"),
    "wsr": tuple(BOUNDARY_LOSSES),
}


def controls(repetitions: int, *, seed: int = 0, progress: Progress = silent) -> list[Check]:
    """Methods that are known to be wrong have to be caught, on a coarse grid with a jump of risk; the right one holds.

    Three thresholds have risks .01, .055 and .2, ``epsilon`` is .05. *Naive* takes the loosest whose mean loss is
    within ``epsilon``; *off by one* returns the policy that failed; *path from the test data* tests a hundred policies
    of risk .055 in the order of their mean losses on the very samples that test them; *normal* is the usual z-test, at
    the boundary.
    """
    epsilon, delta, n = 0.05, 0.1, 200
    bands, lost = np.array([0.9, 0.5, 0.1], dtype=np.float32), np.array([0.03, 0.135, 0.435])
    truth = np.append(0.0, lost.cumsum() / len(bands))
    path = [(math.inf,), *((value,) for value in bands.tolist())]
    right = ("the right sequence", "a fixed order")
    broken = dict.fromkeys((*right, "naive", "off by one", "path from test data", "normal"), 0)
    for done in range(repetitions):
        rng = np.random.default_rng((seed, done))
        band = rng.integers(0, len(bands), n)
        losses = np.zeros((2, n))
        losses[0] = rng.random(n) < lost[band]
        found = certify(bands[None, band], losses, path, epsilon=epsilon, delta=delta, test="binomial", seed=done)
        means = [float(losses[0, band < place].sum()) / n for place in range(len(path))]
        naive = max(place for place, mean in enumerate(means) if mean <= epsilon)
        broken["the right sequence"] += bool(truth[found.accepted[-1].place] > epsilon)
        broken["naive"] += bool(truth[naive] > epsilon)
        broken["off by one"] += found.failed is not None and bool(truth[found.failed.place] > epsilon)

        many = np.asarray(rng.random((100, n)) < 0.055, dtype=np.float64)
        chosen = many[np.argsort(many.sum(axis=1), kind="stable")]
        for name, order in (("a fixed order", many), ("path from test data", chosen)):
            outcome = fixed_sequence(((row,) for row in order), [Risk(epsilon=epsilon, test="binomial")], delta)
            broken[name] += bool(outcome.accepted)

        few = BOUNDARY_LOSSES["0 or 1"](rng, 20, epsilon)
        broken["normal"] += bool(few.mean() + 1.2816 * few.std() / math.sqrt(len(few)) <= epsilon)
        progress("methods that are wrong", done + 1, repetitions)
    limit = allowed(delta, repetitions)
    return [
        Check(part="control", what=f"{name}: promise broken", found=count / repetitions, limit=limit,
              must="<=" if name in right else ">")
        for name, count in broken.items()
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Half:
    """Half of a recording, as one loss sees it."""

    scores: NDArray[np.float32]
    losses: Floats
    costs: Floats

    def judge(self, path: Policies) -> tuple[Floats, Floats]:
        """Mean loss and mean cost of every policy on all of these samples."""
        taken = [exits_taken(self.scores, thresholds) for thresholds in path]
        rows = np.arange(self.scores.shape[1])
        risks = [self.losses[each, rows].mean() for each in taken]
        return np.asarray(risks), np.asarray([self.costs[each].mean() for each in taken])

    def certified(
        self, path: Policies, repetitions: int, *, epsilon: float, delta: float, test: Test, seed: int
    ) -> Iterator[tuple[Certification, int]]:
        """Of samples drawn with replacement, again and again: what is certified, and which policy is then used."""
        rng = np.random.default_rng(seed)
        for draw in range(repetitions):
            rows = rng.integers(0, self.scores.shape[1], SAMPLES)
            found = certify(
                self.scores[:, rows], self.losses[:, rows], path, epsilon=epsilon, delta=delta, test=test, seed=draw
            )
            yield found, min(found.accepted, key=lambda each: float(each.exits @ self.costs)).place


def draws(
    recording: Recording, repetitions: int, *, score_name: str = "max_prob", floor: float | None = None, seed: int = 0,
    progress: Progress = silent,
) -> list[Check]:  # fmt: skip
    """A path proposed on one half of real logits, certified on draws from the other, judged on all of that other half.

    The promise is broken in a draw if *any* policy is accepted whose mean loss on that half is above ``epsilon``.

    Args:
        recording: real logits.
        repetitions: draws per loss, ``epsilon`` and ``delta``.
        score_name: one of :data:`edgekit.plan.SCORES`.
        floor: most that a policy may cost on average, in costs of the oracle that knows the true risks on the path, for
            the loss ``gap``, ``epsilon`` .02 and ``delta`` .1; told only if not given.
        seed: of the halves and the draws.
        progress: told where it stands.
    """
    scores = score(recording.logits[:-1], name=score_name)
    order = np.random.default_rng(seed).permutation(recording.logits.shape[1])
    checks: list[Check] = []
    losses = [loss for loss in LOSSES.values() if recording.labels is not None or not loss.needs_labels]
    for done, loss in enumerate(losses):
        values = loss(recording.logits, recording.labels)
        proposing, judging = (
            _Half(scores=scores[:, rows], losses=values[:, rows], costs=recording.costs)
            for rows in (order[: len(order) // 2], order[len(order) // 2 :])
        )
        path, shared = (
            [
                candidate.thresholds
                for candidate in propose(proposing.scores, proposing.losses, recording.costs.tolist())
            ]
            for propose in (propose_path, shared_threshold_path)
        )
        for place, epsilon in enumerate(EPSILONS):
            checks += _validity(judging, path, loss, repetitions, epsilon=epsilon, seed=seed)
            checks += _power(judging, path, shared, loss, repetitions, epsilon=epsilon, floor=floor, seed=seed)
            progress("draws from real logits", done * len(EPSILONS) + place + 1, len(losses) * len(EPSILONS))
    return checks


def _validity(
    judging: _Half, path: Policies, loss: Loss, repetitions: int, *, epsilon: float, seed: int
) -> Iterator[Check]:
    risks, _ = judging.judge(path)
    bad = risks > epsilon + 1e-12
    for delta in DELTAS:
        certified = judging.certified(path, repetitions, epsilon=epsilon, delta=delta, test=loss.test, seed=seed)
        rate = sum(any(bad[each.place] for each in found.accepted) for found, _ in certified) / repetitions
        what = f"{loss.name} by {loss.test}, epsilon={epsilon}, delta={delta}: promise broken"
        what += "" if bad.any() else " (no policy can)"
        yield Check(part="validity", what=what, found=rate, must="<=", limit=allowed(delta, repetitions))
    rows = np.arange(judging.scores.shape[1])
    lost = np.stack([judging.losses[exits_taken(judging.scores, each), rows] for each in path])
    rng = np.random.default_rng(seed)
    samples = (rng.integers(0, len(rows), SAMPLES) for _ in range(repetitions))
    chosen = (np.flatnonzero(lost[:, drawn].mean(axis=1) <= epsilon)[-1] for drawn in samples)
    rate = sum(bool(bad[place]) for place in chosen) / repetitions
    yield Check(part="validity", what=f"{loss.name}, epsilon={epsilon}: promise broken by the naive choice", found=rate)


def _power(
    judging: _Half, path: Policies, shared: Policies, loss: Loss, repetitions: int, *, epsilon: float,
    floor: float | None, seed: int,
) -> Iterator[Check]:  # fmt: skip
    delta = 0.1
    risks, means = judging.judge(path)
    oracle = float(means[risks <= epsilon].min())
    _, shared_means = judging.judge(shared)
    options: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "test": loss.test, "seed": seed}
    costs = means[[used for _, used in judging.certified(path, repetitions, **options)]]
    shared_costs = shared_means[[used for _, used in judging.certified(shared, repetitions, **options)]]
    mean = float(costs.mean())
    where = f"{loss.name}, epsilon={epsilon}, delta={delta}: mean cost"
    yield Check(part="power", what=f"{where} in costs of the last exit", found=mean / float(judging.costs[-1]))
    asked = floor is not None and (loss.name, epsilon) == ("gap", 0.02)
    yield Check(
        part="power", what=f"{where} in costs of the oracle on the path", found=mean / oracle,
        must="<=" if asked else None, limit=floor if asked and floor is not None else math.nan,
    )  # fmt: skip
    if loss.whole:
        best = _best_cost(judging, epsilon)
        yield Check(part="power", what=f"{where} in costs of the oracle over all thresholds", found=mean / best)
    shared_mean = float(shared_costs.mean())
    error = float((costs - shared_costs).std()) / math.sqrt(repetitions) / shared_mean
    yield Check(
        part="power", what=f"{where} in costs of one shared threshold", found=mean / shared_mean, must="<=",
        limit=1 + 3 * error + 1e-9,
    )  # fmt: skip


def _best_cost(half: _Half, epsilon: float) -> float:
    """Least mean cost of any thresholds whose mean loss on these samples is within ``epsilon``."""
    # Losses of -1, 0 and 1 are those of a last exit that is always right, or wrong where another one gains.
    gained = (half.losses < 0).any(axis=0)
    right = np.where(gained, half.losses < 0, half.losses == 0)
    right[-1] = ~gained
    count = math.floor(epsilon * half.scores.shape[1] + 1e-9)
    return choose_thresholds(half.scores, right, costs=half.costs.tolist(), allowed=count).cost


def load_recording(path: Path) -> Recording:
    """Logits from an ``.npz`` of ``logits (exits, samples, classes)``, ``labels (samples,)`` and ``costs (exits,)``.

    Labels may be missing: only losses that need none are then studied. So may costs: each exit then costs one more.

    Raises:
        CalibrationError: the file cannot be read, or an array does not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path}: not an .npz file of arrays ({error})") from error
    if "logits" not in arrays:
        raise CalibrationError(f"{path}: has no array 'logits' (exits, samples, classes)")
    logits, labels = arrays["logits"].astype(np.float32), arrays.get("labels")
    return Recording(
        logits=logits,
        labels=None if labels is None else labels.astype(np.int64),
        costs=np.asarray(arrays.get("costs", np.arange(1.0, len(logits) + 1)), dtype=np.float64),
        source=str(path),
    )


def record(bundle: Path, data: str, *, progress: Progress = silent) -> Recording:
    """Run every sample of ``data`` to every exit of a bundle's network. Costs are multiply-accumulates, where known.

    Raises:
        EdgekitError: the bundle or the data cannot be read, or do not fit.
    """
    from edgekit.bundle import Bundle
    from edgekit.calibration.calibrate import collect
    from edgekit.data import as_dataset
    from edgekit.policy import Policy
    from edgekit.session import Session

    with (
        Bundle.open(bundle) as opened,
        Session.open(opened, policy=Policy.never(len(opened.plan.exits))) as session,
    ):
        manifest = opened.manifest
        samples = as_dataset(data, preprocess=manifest.preprocess, classes=manifest.classes, progress=progress)
        collected = collect(session, samples, progress=progress)
        macs = session.plan.exit_macs()
    known = [float(count) for count in macs if count is not None]
    costs = known if len(known) == len(macs) else range(1, len(macs) + 1)
    return Recording(
        logits=collected.logits, labels=collected.labels, costs=np.asarray(costs, dtype=np.float64),
        source=f"{bundle} on {data}",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and show it: 0 if all is as it must be, 1 if not, 2 if it cannot be run."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    options = _options().parse_args(arguments)
    errors = Console(stderr=True, highlight=False)
    try:
        with Bars(console=errors, disable=not errors.is_terminal, transient=True) as bars:
            task = bars.add_task("")
            checks = _study(options, lambda what, done, total: bars.update(
                task, description=what, completed=done, total=total
            ))  # fmt: skip
    except EdgekitError as error:
        errors.print(f"study: {error}", soft_wrap=True, markup=False)
        return 2
    holds = all(check.holds for check in checks)
    if options.json:
        lines = [{**msgspec.to_builtins(check), "holds": check.holds} for check in checks]
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        sys.stdout.write(msgspec.json.encode({"holds": holds, "settings": settings, "checks": lines}).decode() + "\n")
    else:
        _draw(checks, Console(highlight=False, width=None if sys.stdout.isatty() else 140))
    return 0 if holds else 1


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m edgekit.calibration.study", description="Do the promises hold?")
    real = parser.add_mutually_exclusive_group()
    real.add_argument("--scores", type=Path, metavar="FILE.npz", help="logits, labels and perhaps costs of every exit")
    real.add_argument("--bundle", type=Path, help="collect the logits by running a bundle on --data")
    parser.add_argument("--data", help="labelled samples for --bundle")
    parser.add_argument("--score", default="max_prob", help="confidence that thresholds are for [default: max_prob]")
    parser.add_argument(
        "--repetitions", type=int, default=REPETITIONS, help="of each draw; at the boundary three times"
    )
    parser.add_argument(
        "--floor", type=float, help="most that the mean cost may be, in costs of the oracle on the path"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def _study(options: argparse.Namespace, progress: Progress) -> list[Check]:
    if options.repetitions < 2:
        raise CalibrationError(f"a rate needs at least 2 repetitions, not {options.repetitions}")
    if (options.bundle is None) != (options.data is None):
        raise CalibrationError("--bundle and --data go together")
    recording = None
    if options.scores is not None:
        recording = load_recording(options.scores)
    elif options.bundle is not None:
        recording = record(options.bundle, options.data, progress=progress)
    checks = boundary(BOUNDARY_REPETITIONS * options.repetitions, seed=options.seed, progress=progress)
    checks += controls(options.repetitions, seed=options.seed, progress=progress)
    if recording is not None:
        checks += draws(
            recording, options.repetitions, score_name=options.score, floor=options.floor, seed=options.seed,
            progress=progress,
        )  # fmt: skip
    return checks


def _draw(checks: Sequence[Check], console: Console) -> None:
    from rich.table import Table

    table = Table()
    for heading in ("part", "what", "found", "must be", "holds"):
        table.add_column(heading, justify="left" if heading in ("part", "what") else "right")
    previous = None
    for check in _worst_at_the_boundary(checks):
        if check.part != previous:
            table.add_section()
        told = check.must is None
        table.add_row(
            check.part if check.part != previous else "", check.what, f"{check.found:.4f}",
            "" if told else f"{check.must} {check.limit:.4f}", "" if told else "yes" if check.holds else "NO",
            style=None if check.holds else "bold red",
        )  # fmt: skip
        previous = check.part
    console.print(table)
    asked = [check for check in checks if check.must is not None]
    wrong = sum(not check.holds for check in asked)
    console.print(f"{len(asked) - wrong} of {len(asked)} are as they must be" + (f"; {wrong} ARE NOT" if wrong else ""))


def _worst_at_the_boundary(checks: Sequence[Check]) -> list[Check]:
    """All checks, but of those at the boundary that hold only the largest rate of each test and limit."""
    worst: dict[tuple[str, float], Check] = {}
    for check in checks:
        if check.part == "boundary" and check.holds:
            key = (check.what.partition(",")[0], check.limit)
            worst[key] = max(worst.get(key, check), check, key=lambda each: each.found)
    kept = set(map(id, worst.values()))
    return [check for check in checks if check.part != "boundary" or not check.holds or id(check) in kept]


if __name__ == "__main__":
    raise SystemExit(main())
