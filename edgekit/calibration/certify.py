"""Which policies of a proposed path may be trusted: fixed-sequence testing on samples that the path has never seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.losses import check_losses
from edgekit.calibration.risk import Test, p_value, require_losses, require_share, smallest_sample
from edgekit.calibration.thresholds import exits_taken
from edgekit.errors import CalibrationError

__all__ = [
    "Also",
    "Certification",
    "Outcome",
    "Risk",
    "Setting",
    "Tested",
    "Verdict",
    "certify",
    "certify_settings",
    "certify_strict",
    "fixed_sequence",
    "shuffled",
]

BLOCK = 2**15
"""Samples at a time when exits are looked up: what that needs besides the scores stays in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class Risk:
    """A mean loss that must not exceed ``epsilon``, and the test of it: one of :data:`edgekit.calibration.risk.TESTS`.

    The test is part of the question: choose it before the data are seen.
    """

    epsilon: float
    test: Test


@dataclass(frozen=True, kw_only=True)
class Also:
    """One more risk that every policy of a path has to keep.

    Attributes:
        risk: its target and test.
        losses: ``(exits, samples) float64`` of leaving at each exit, given a policy's place in the path.
    """

    risk: Risk
    losses: Callable[[int], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Tested:
    """One candidate's figures; each tuple has an entry per risk.

    Attributes:
        place: in the sequence, from 0.
        samples: that tell of the risk.
        losses: mean of them, NaN where there are none.
        p_values: of ``E[loss] > epsilon``.
    """

    place: int
    samples: tuple[int, ...]
    losses: tuple[float, ...]
    p_values: tuple[float, ...]

    @property
    def p_value(self) -> float:
        """Of the hypothesis that any of the risks is above its epsilon: the largest."""
        return max(self.p_values)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a fixed-sequence test found.

    Attributes:
        accepted: the candidates before the first failure, in order.
        failed: that failure; ``None`` where all were accepted.
    """

    accepted: tuple[Tested, ...]
    failed: Tested | None


@dataclass(frozen=True, kw_only=True)
class Verdict(Tested):
    """A policy of the path, tested.

    Attributes:
        thresholds: one per exit but the last, float32 values.
        exits: how many of the samples leave at each exit.
    """

    thresholds: tuple[float, ...]
    exits: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Certification:
    """What the samples say about a path.

    Attributes:
        accepted: the policies that may be used, in the path's order. Never-exit comes first, always: its loss is 0 by
            definition, so it is not tested and its p-value is 0.
        failed: the policy at which testing stopped; ``None`` where the path ended first, or nothing was tested.
        samples: how many there were.
        needed: with how many losses of 0 throughout would do. With fewer samples nothing is tested.
        epsilon: as asked.
        delta: as asked.
        test: as asked.
        seed: as asked.
    """

    accepted: tuple[Verdict, ...]
    failed: Verdict | None
    samples: int
    needed: int
    epsilon: float
    delta: float
    test: Test
    seed: int

    @property
    def enough(self) -> bool:
        """Whether there were samples enough to accept anything but never-exit."""
        return self.samples >= self.needed


def fixed_sequence(candidates: Iterable[Sequence[NDArray[np.float64]]], risks: Sequence[Risk], delta: float) -> Outcome:
    """Test candidates in order, each at the full ``delta``, and stop at the first that fails.

    With probability ``>= 1 - delta`` every accepted candidate has every risk within its epsilon: the first candidate
    for which that is false, if there is one, has to be accepted wrongly before any other is (Angelopoulos et al., Learn
    then Test, 2021; Laufer-Goldshtein et al., Pareto Testing, 2022). This needs the order, and the risks' tests, to be
    chosen without these samples. Of several risks a candidate's p-value is the largest: its hypothesis is that any of
    them is exceeded.

    Args:
        candidates: each the losses ``(samples,) float64`` of each risk, in the order that the samples were drawn or
            shuffled; asked for one at a time, so none is made after the first failure.
        risks: one per vector of a candidate.
        delta: 0 to 1.

    Raises:
        CalibrationError: a loss is not what its test needs, or an option is outside its range.
    """
    require_share("delta", delta)
    if not risks:
        raise CalibrationError("a fixed-sequence test needs at least one risk")
    accepted: list[Tested] = []
    for place, candidate in enumerate(candidates):
        if len(candidate) != len(risks):
            raise CalibrationError(f"candidate {place} has losses for {len(candidate)} risks, not {len(risks)}")
        pairs = list(zip(candidate, risks, strict=True))
        tested = Tested(
            place=place,
            samples=tuple(len(losses) for losses in candidate),
            losses=tuple(float(losses.mean()) if len(losses) else math.nan for losses in candidate),
            p_values=tuple(p_value(losses, test=r.test, epsilon=r.epsilon, delta=delta) for losses, r in pairs),
        )
        if tested.p_value > delta:
            return Outcome(accepted=tuple(accepted), failed=tested)
        accepted.append(tested)
    return Outcome(accepted=tuple(accepted), failed=None)


def certify(
    scores: NDArray[np.float32],
    losses: NDArray[np.float64],
    path: Sequence[Sequence[float]],
    *,
    epsilon: float,
    delta: float,
    test: Test,
    seed: int = 0,
    also: Sequence[Also] = (),
) -> Certification:
    """The policies of a path whose risk is within ``epsilon``, all at once with probability ``>= 1 - delta``.

    The risk of a policy is the mean loss, over inputs such as these, of leaving where it does. The probability is over
    the drawing of these samples; they have to be independent of the path and of whatever made the scores.

    Args:
        scores: ``(exits - 1, samples) float32``. A sample leaves at the first exit whose score reaches its threshold,
            one equal to it included; a NaN never does.
        losses: ``(exits, samples) float64`` of leaving at each exit: at most 1, the last exit's 0.
        path: thresholds, one per exit but the last; first never-exit (infinity throughout), then in the order to test.
        epsilon: 0 to 1.
        delta: 0 to 1.
        test: one of :data:`edgekit.calibration.risk.TESTS`, as the loss's range allows; chosen before the data are.
        seed: of the order in which ``wsr`` sees the samples; chosen before the data are. Other tests know no order.
        also: more risks, all of which a policy has to keep.

    Raises:
        CalibrationError: the shapes do not fit, the path does not begin with never-exit, a loss is not what the test
            needs, or an option is outside its range.
    """
    found = _Samples.of(scores, losses, test, seed)
    return _along(
        path, lambda _: found, len(found), _everyone, epsilon=epsilon, delta=delta, test=test, seed=seed, also=also
    )


def certify_strict(
    scores: NDArray[np.float32],
    losses: NDArray[np.float64],
    path: Sequence[Sequence[float]],
    *,
    epsilon: float,
    delta: float,
    test: Test = "binomial",
    seed: int = 0,
    also: Sequence[Also] = (),
) -> Certification:
    """As :func:`certify`, but of the samples that leave early alone, so that late exits cannot make up for early ones.

    With probability ``>= 1 - delta``, for every accepted policy and every exit ``t`` but the last at or before which
    it lets any input leave: ``E[loss | left at t or before] <= epsilon``. That is stronger than :func:`certify`'s
    promise, for ``E[loss] = P(left early) E[loss | left early]``. It is about all who left up to ``t``, not about those
    who left at ``t``, and it needs the same of the samples: independent of the path (two splits, one that proposes and
    this one that tests).

    Why it holds: given which of the samples leave at ``t`` or before, their losses are independent draws from that
    conditional distribution, so any of the tests applies to them as to a sample of its own (a binomial count of 0/1
    losses); the largest p-value over ``t`` is that of "the promise is broken at some ``t``" (Ringel et al., Early Time
    Classification with Accumulated Accuracy Gap Control, 2024, section 4). An exit at or before which a threshold is
    finite but nobody left has p-value 1; before the first finite threshold there is nothing to break.

    Args:
        scores: as in :func:`certify`.
        losses: as there.
        path: as there. Every exit that is used needs samples of its own: hundreds have to leave there or before.
        epsilon: as there.
        delta: as there.
        test: as there.
        seed: as there.
        also: as there, of all inputs.

    Returns:
        Verdicts with an entry per exit but the last, of those who leave at it or before (until the first finite
        threshold, those of that threshold's exit).

    Raises:
        CalibrationError: as there.
    """
    found = _Samples.of(scores, losses, test, seed)
    return _along(
        path, lambda _: found, len(found), _up_to_each_exit, epsilon=epsilon, delta=delta, test=test, seed=seed,
        also=also,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A policy to test whose scores and losses may be its own, as gates with other constants make them.

    Attributes:
        thresholds: one per exit but the last.
        scores: gives ``(exits - 1, samples) float32``; asked for when it is this policy's turn.
        losses: gives ``(exits, samples) float64`` of leaving at each exit, against the last exit of never-exit.
    """

    thresholds: Sequence[float]
    scores: Callable[[], NDArray[np.float32]]
    losses: Callable[[], NDArray[np.float64]]


def certify_settings(
    settings: Sequence[Setting],
    *,
    samples: int,
    epsilon: float,
    delta: float,
    test: Test,
    seed: int = 0,
    also: Sequence[Also] = (),
) -> Certification:
    """As :func:`certify`, of policies that do not share their scores and losses.

    Args:
        settings: the first is never-exit, whose last exit all losses are against.
        samples: how many there are.
        epsilon: as in :func:`certify`.
        delta: as there.
        test: as there.
        seed: as there.
        also: as there.

    Raises:
        CalibrationError: as there.
    """

    def drawn(place: int) -> _Samples:
        scores, losses = settings[place].scores(), settings[place].losses()
        return _Samples.of(scores, losses, test, seed, against_itself=False)

    path = [setting.thresholds for setting in settings]
    return _along(path, drawn, samples, _everyone, epsilon=epsilon, delta=delta, test=test, seed=seed, also=also)


def shuffled(samples: int, seed: int) -> NDArray[np.intp]:
    """An order of the samples that depends on the seed and on how many they are, the same on every machine.

    From the raw stream of PCG64, which numpy promises never to change.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(samples), kind="stable")


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """Checked input.

    Attributes:
        scores: ``(exits - 1, samples) float32``.
        losses: ``(exits, samples) float64``.
        order: ``(samples,)`` in which they are tested.
    """

    scores: NDArray[np.float32]
    losses: NDArray[np.float64]
    order: NDArray[np.intp]

    @classmethod
    def of(
        cls,
        scores: NDArray[np.float32],
        losses: NDArray[np.float64],
        test: Test,
        seed: int,
        *,
        against_itself: bool = True,
    ) -> _Samples:
        scores = np.asarray(scores, dtype=np.float32)
        if scores.ndim != 2:
            raise CalibrationError(f"scores have shape {scores.shape}; give (exits - 1, samples)")
        shape = len(scores) + 1, scores.shape[1]
        losses = check_losses(losses, shape, zero_at_last=against_itself)
        require_losses(losses, test)
        infinite = np.isposinf(scores)
        if infinite.any():
            exit_index, sample = np.unravel_index(int(infinite.argmax()), scores.shape)
            raise CalibrationError(
                f"exit {exit_index} of sample {sample} has an infinite score, which never-exit lets leave"
            )
        return cls(scores=scores, losses=losses, order=shuffled(scores.shape[1], seed))

    def __len__(self) -> int:
        return len(self.order)

    def leave(self, thresholds: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int16]]:
        """Loss and exit of every sample under these thresholds, ``(samples,)`` each, in the order of testing."""
        samples = self.scores.shape[1]
        losses, taken = np.empty(samples), np.empty(samples, dtype=np.int16)
        values = thresholds.tolist()
        for start in range(0, samples, BLOCK):
            rows = slice(start, start + BLOCK)
            exits = exits_taken(self.scores[:, rows], values)
            losses[rows] = np.take_along_axis(self.losses[:, rows], exits[None], axis=0)[0]
            taken[rows] = exits
        return losses[self.order], taken[self.order]


Split = Callable[[NDArray[np.float64], NDArray[np.int16], NDArray[np.float32]], tuple[NDArray[np.float64], ...]]
"""Turns the samples' losses and exits under some thresholds into a vector of losses per risk."""


def _everyone(
    losses: NDArray[np.float64], taken: NDArray[np.int16], thresholds: NDArray[np.float32]
) -> tuple[NDArray[np.float64], ...]:
    return (losses,)


def _up_to_each_exit(
    losses: NDArray[np.float64], taken: NDArray[np.int16], thresholds: NDArray[np.float32]
) -> tuple[NDArray[np.float64], ...]:
    early = len(thresholds)
    first = int(np.append(thresholds < np.inf, True).argmax())
    return tuple(losses[taken <= max(last, first)] for last in range(max(early, 1)))


def _along(
    path: Sequence[Sequence[float]],
    drawn: Callable[[int], _Samples],
    count: int,
    split: Split,
    *,
    epsilon: float,
    delta: float,
    test: Test,
    seed: int,
    also: Sequence[Also],
) -> Certification:
    """Fixed-sequence testing of a path's policies after never-exit; ``drawn`` gives the samples of each."""
    policies = _policies(path)
    exits = len(policies[0]) + 1
    others = [each.risk for each in also]
    needed = max(
        smallest_sample(each.epsilon, delta, each.test) for each in (Risk(epsilon=epsilon, test=test), *others)
    )
    shares: list[tuple[int, ...]] = []

    def candidates() -> Iterator[tuple[NDArray[np.float64], ...]]:
        for place, thresholds in enumerate(policies[1:], start=1):
            samples = drawn(place)
            if len(samples.scores) != len(thresholds):
                raise CalibrationError(
                    f"policy {place} of the path must have {len(samples.scores)} thresholds, not {len(thresholds)}"
                )
            losses, taken = samples.leave(thresholds)
            shares.append(tuple(np.bincount(taken, minlength=exits).tolist()))
            more = (each.losses(place)[:, samples.order] for each in also)
            yield (
                *split(losses, taken, thresholds),
                *(np.take_along_axis(each, taken[None].astype(np.intp), axis=0)[0] for each in more),
            )

    asked = [Risk(epsilon=epsilon, test=test)] * (1 if split is _everyone else max(exits - 1, 1)) + others
    risks = len(asked)
    outcome = fixed_sequence(candidates() if count >= needed else (), asked, delta)

    def verdict(tested: Tested) -> Verdict:
        thresholds = tuple(policies[tested.place + 1].tolist())
        return Verdict(
            place=tested.place + 1, samples=tested.samples, losses=tested.losses, p_values=tested.p_values,
            thresholds=thresholds, exits=shares[tested.place],
        )  # fmt: skip

    never = Verdict(
        place=0, samples=(count,) * risks, losses=(0.0,) * risks, p_values=(0.0,) * risks,
        thresholds=tuple(policies[0].tolist()), exits=(0,) * (exits - 1) + (count,),
    )  # fmt: skip
    return Certification(
        accepted=(never, *map(verdict, outcome.accepted)),
        failed=verdict(outcome.failed) if outcome.failed is not None else None,
        samples=count, needed=needed, epsilon=epsilon, delta=delta, test=test, seed=seed,
    )  # fmt: skip


def _policies(path: Sequence[Sequence[float]]) -> list[NDArray[np.float32]]:
    """The path's thresholds as float32, the precision of scores."""
    with np.errstate(over="ignore"):
        policies = [np.asarray(thresholds, dtype=np.float32) for thresholds in path]
    for place, thresholds in enumerate(policies):
        if thresholds.shape != policies[0].shape or thresholds.ndim != 1 or np.isnan(thresholds).any():
            raise CalibrationError(
                f"policy {place} of the path must have {policies[0].size} thresholds that are numbers"
            )
    if not policies or not np.isposinf(policies[0]).all():
        raise CalibrationError("a path begins with never-exit, infinite thresholds throughout: it is what remains")
    return policies
