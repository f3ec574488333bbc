"""Is the mean loss above ``epsilon``? p-values and bounds that hold at every sample size, and the sizes they need.

Each p-value is of the hypothesis ``E[x] > epsilon`` for independent losses ``x`` of one distribution: where the
hypothesis is true, ``P(p <= delta) <= delta``. Only numpy is used, so that a certificate never depends on which
libraries a device has.
"""

from __future__ import annotations

import math
import operator
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgekit.distributions import binomial_cdf, binomial_sf, bisect, first
from edgekit.errors import CalibrationError

__all__ = [
    "TESTS",
    "Test",
    "binomial_p_value",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "hoeffding_bentkus_p_value",
    "p_value",
    "require_confidence",
    "require_losses",
    "require_share",
    "samples_for_power",
    "smallest_sample",
    "ternary_p_value",
    "wsr_p_value",
]

Test = Literal["binomial", "ternary", "wsr", "hoeffding-bentkus"]
TESTS: tuple[Test, ...] = get_args(Test)
"""For losses of 0 and 1; of -1, 0 and 1; up to 1, negative ones too; from 0 to 1."""

LARGEST_BET = 0.99
"""Share of the wealth that one sample of loss 1 may cost."""
NUISANCE = 0.05
"""Share of delta that ``ternary`` spends on how many losses are not 0."""
CELL = 0.05
"""Width of the first cell of rates ``d`` that ``ternary`` looks through, in ``sqrt(d / n)``."""
WIDER = 1.35
"""By which each further one is wider: the probability is smaller there, so that its bound may be looser."""
ROUNDING = 1e-10
"""More than the rounding of a transform of probabilities."""
COUNTED = 20_000
"""Samples up to which ``ternary`` sums exactly; of more, ``wsr`` loses little and is faster."""
FEW = 1.5
"""Samples times epsilon, for each ``1 + ln(1 / delta)``, below which ``wsr`` passes more often than a sum does."""
WHOLE = 1e-9
"""A sum of losses this near to a whole number counts as that number: 10 losses of 0.1 are 1, however they round."""


def require_share(name: str, value: float) -> None:
    """Raises :class:`CalibrationError` unless ``value`` lies strictly between 0 and 1."""
    if not 0 < value < 1:
        raise CalibrationError(f"{name} must be above 0 and below 1, not {value}")


def require_confidence(delta: float) -> None:
    """Raises :class:`CalibrationError` unless ``delta`` leaves a confidence strictly between 0 and 1."""
    if not 0 < delta < 1:
        raise CalibrationError(
            f"confidence must be above 0 and below 1, not {1 - delta:g}: no sample is large enough to be certain"
        )


def require_losses(losses: NDArray[np.float64], test: str) -> None:
    """Raises :class:`CalibrationError` unless ``test`` is one of :data:`TESTS` and takes such losses; names the first.

    Args:
        losses: ``(samples,)`` or ``(exits, samples) float64``.
        test: ``binomial`` needs 0 or 1, ``hoeffding-bentkus`` 0 to 1, ``wsr`` finite values of at most 1.
    """
    if test == "binomial":
        good, need = (losses == 0) | (losses == 1), "of 0 or 1"
    elif test == "ternary":
        good, need = (losses == 0) | (losses == 1) | (losses == -1), "of -1, 0 or 1"
    elif test == "hoeffding-bentkus":
        good, need = (losses >= 0) & (losses <= 1), "from 0 to 1"
    elif test == "wsr":
        good, need = (losses <= 1) & (losses > -np.inf), "that are finite and at most 1"
    else:
        raise CalibrationError(f"test {test!r} is not one of {', '.join(TESTS)}")
    if not good.all():
        place = np.unravel_index(int(good.argmin()), good.shape)
        where = f"exit {place[0]} of sample {place[1]}" if good.ndim == 2 else f"sample {place[0]}"
        raise CalibrationError(f"test '{test}' needs losses {need}; {where} has {losses[place]}")


def p_value(losses: NDArray[np.float64], *, test: Test, epsilon: float, delta: float) -> float:
    """Of ``E[x] > epsilon``, by one of :data:`TESTS`; 1 for no samples.

    Args:
        losses: ``(samples,) float64``, in the order that they were drawn (only ``wsr`` looks at the order, and so
            ``ternary`` does where it leaves the test to it: with very few samples, or more than :data:`COUNTED`).
        test: whose range the losses keep, see :func:`require_losses`.
        epsilon: 0 to 1.
        delta: 0 to 1, of the decision to be made. ``wsr`` aims its bets at it, ``ternary`` spends a part of it.

    Raises:
        CalibrationError: a loss is not what the test needs, or an option is wrong.
    """
    if test == "wsr":
        return wsr_p_value(losses, epsilon, delta)
    require_losses(losses, test)
    if test == "binomial":
        return binomial_p_value(int(losses.sum()), len(losses), epsilon)
    if test == "ternary":
        few = FEW * (1 - math.log(delta)) if delta > 0 else math.inf
        if len(losses) > COUNTED or len(losses) * epsilon < few:
            return wsr_p_value(losses, epsilon, delta)
        lost, gained = int((losses == 1).sum()), int((losses == -1).sum())
        return ternary_p_value(lost, gained, len(losses), epsilon, delta)
    return hoeffding_bentkus_p_value(math.fsum(losses), len(losses), epsilon)


def binomial_p_value(successes: int, n: int, epsilon: float) -> float:
    """``P[Bin(n, epsilon) <= successes]``: exact for 0/1 losses, relative error about 1e-12.

    Clopper and Pearson 1934.

    Args:
        successes: samples with loss 1.
        n: samples.
        epsilon: 0 to 1.

    Raises:
        CalibrationError: not ``0 <= successes <= n``, or ``epsilon`` is not above 0 and below 1.
    """
    successes, n = _counts(successes, n)
    require_share("epsilon", epsilon)
    return binomial_cdf(successes, n, epsilon)


def ternary_p_value(lost: int, gained: int, n: int, epsilon: float, delta: float) -> float:
    """Of losses 1, -1 and 0: ``P[N+ - N- <= lost - gained]`` at its largest where ``P(x = 1) - P(x = -1) >= epsilon``.

    How often the loss is not 0 is not known. Berger and Boos (P Values Maximized Over a Confidence Set for the Nuisance
    Parameter, 1994): the largest over rates up to an upper bound that holds with probability ``1 - NUISANCE * delta``,
    plus that share. The probability falls with ``P(x = 1)`` and rises with ``P(x = -1)``, so over a cell of rates it is
    at most that of the cell's least ``P(x = 1)`` and greatest ``P(x = -1)``. Sums of ``n`` losses by a discrete Fourier
    transform, exact but for rounding.

    Args:
        lost: samples with loss 1.
        gained: samples with loss -1.
        n: samples.
        epsilon: 0 to 1.
        delta: 0 to 1, of the decision to be made.

    Raises:
        CalibrationError: counts that are none, or ``epsilon`` or ``delta`` is not above 0 and below 1.
    """
    lost, n = _counts(lost, n)
    gained, _ = _counts(gained, n - lost)
    require_share("epsilon", epsilon)
    require_share("delta", delta)
    if n == 0:
        return 1.0
    spent = NUISANCE * delta
    top = clopper_pearson_upper(lost + gained, n, spent)
    if top < epsilon:
        return spent
    edges, cell = [top], CELL
    while edges[-1] > epsilon:
        edges.append(max(epsilon, edges[-1] - cell * math.sqrt(edges[-1] / n)))
        cell *= WIDER
    high, low = np.asarray(edges[:-1] or [top]), np.asarray(edges[1:] or [top])
    tails = _walk_tails(lost - gained, n, plus=(low + epsilon) / 2, minus=(high - epsilon) / 2)
    return min(1.0, max(0.0, float(tails.max())) + spent + ROUNDING)


def _walk_tails(end: int, n: int, *, plus: NDArray[np.float64], minus: NDArray[np.float64]) -> NDArray[np.float64]:
    """``P[sum of n steps <= end]`` for steps of 1, -1 and 0, for several probabilities of the first two.

    In a window of at least 13 standard deviations and 40 steps to either side of what matters: by Bernstein's
    inequality less than 1e-12 lies outside of it.
    """
    spread = math.sqrt(n * float((plus + minus).max()))
    reach = min(n, math.ceil(13 * spread + n * float(np.abs(plus - minus).max()) + abs(end)) + 40)
    size = 1 << (2 * reach + 1).bit_length()
    turn = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
    single = (1 - plus - minus)[:, None] + plus[:, None] * turn + minus[:, None] * turn.conj()
    masses = np.fft.irfft(single**n, size)  # of 0, 1, ..., and from the end of -1, -2, ...
    ordered = np.roll(masses, size // 2, axis=1)
    return np.asarray(ordered[:, : size // 2 + end + 1].sum(axis=1))


def clopper_pearson_upper(successes: int, n: int, delta: float) -> float:
    """The largest rate that ``successes`` of ``n`` does not refute: true rates lie above it with probability <= delta.

    ``betaincinv(successes + 1, n - successes, 1 - delta)`` (Clopper and Pearson 1934), here by bisection; 1 where
    every sample is one.

    Raises:
        CalibrationError: not ``0 <= successes <= n``, or ``delta`` is not above 0 and below 1.
    """
    successes, n = _counts(successes, n)
    require_share("delta", delta)
    if successes == n:
        return 1.0
    return bisect(lambda rate: binomial_cdf(successes, n, rate) > delta)


def clopper_pearson_lower(successes: int, n: int, delta: float) -> float:
    """The smallest rate that ``successes`` of ``n`` does not refute: true rates lie below it with probability <= delta.

    ``betaincinv(successes, n - successes + 1, delta)`` (Clopper and Pearson 1934); 0 where no sample is one.

    Raises:
        CalibrationError: not ``0 <= successes <= n``, or ``delta`` is not above 0 and below 1.
    """
    successes, n = _counts(successes, n)
    require_share("delta", delta)
    if successes == 0:
        return 0.0
    return bisect(lambda rate: binomial_sf(successes - 1, n, rate) <= delta)


def hoeffding_bentkus_p_value(total: float, n: int, epsilon: float) -> float:
    """For losses from 0 to 1, ``min(exp(-n h1(min(R, epsilon), epsilon)), e P[Bin(n, epsilon) <= ceil(n R)])``.

    ``R = total / n`` and ``h1(a, b) = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b))`` with ``0 ln 0 = 0`` (Hoeffding
    1963; Bentkus 2004; both in Bates et al., Distribution-Free, Risk-Controlling Prediction Sets, 2021, section 3.1).

    Args:
        total: sum of the losses. Within :data:`WHOLE` of a whole number it counts as that number. Bentkus's own bound
            interpolates the tail between whole numbers, so this changes it by a factor below 1 + 1e-7.
        n: samples.
        epsilon: 0 to 1.

    Raises:
        CalibrationError: not ``0 <= total <= n``, or ``epsilon`` is not above 0 and below 1.
    """
    n = operator.index(n)
    require_share("epsilon", epsilon)
    if not -WHOLE <= total <= n + WHOLE:
        raise CalibrationError(f"a sum of {total} cannot come from {n} losses from 0 to 1")
    if abs(total - round(total)) <= WHOLE:
        total = round(total)
    if n == 0:
        return 1.0
    mean = min(total / n, epsilon)
    divergence = _x_log_ratio(mean, epsilon) + _x_log_ratio(1 - mean, 1 - epsilon)
    return min(math.exp(-n * divergence), math.e * binomial_cdf(math.ceil(total), n, epsilon), 1.0)


def wsr_p_value(losses: NDArray[np.float64], epsilon: float, delta: float) -> float:
    """``1 / max(1, max_i K_i)`` of a gambler who bets on losses below ``epsilon``. Needs only losses of at most 1.

    ``K_i = prod_{j <= i} (1 - nu_j (x_j - epsilon))``, with bets that use the past alone: ``nu_i = min(sqrt(2 ln(1 /
    delta) / (n v_{i-1})), .99 / (1 - epsilon))``, ``m_i = sum_{j <= i} x_j / (1 + i)`` and ``v_i = (1/4 + sum_{j <= i}
    (x_j - m_j)^2) / (1 + i)``. Where ``E[x] >= epsilon``, ``K`` is a non-negative supermartingale, and so exceeds
    ``1 / delta`` at any time with probability ``<= delta`` (Waudby-Smith and Ramdas, Estimating Means of Bounded Random
    Variables by Betting, 2024, section 4; Ville 1939). Each bet's wealth stays above 0 for every ``x <= 1``, however
    far below 0.

    Args:
        losses: ``(samples,) float64`` in the order that they were drawn, or shuffled by a seed chosen before they were
            seen: the value depends on the order.
        epsilon: 0 to 1.
        delta: 0 to 1, of the decision to be made; fixed beforehand. The value is valid at every level, sharpest here.

    Raises:
        CalibrationError: a loss is above 1 or no number, ``epsilon`` or ``delta`` is not above 0 and below 1.
    """
    require_share("epsilon", epsilon)
    require_share("delta", delta)
    losses = np.asarray(losses, dtype=np.float64)
    require_losses(losses, "wsr")
    n = len(losses)
    if n == 0:
        return 1.0
    growth = np.arange(2.0, n + 2)  # 1 + i
    means = np.cumsum(losses)
    means /= growth
    variances = np.subtract(losses, means, out=means)
    np.square(variances, out=variances)
    np.cumsum(variances, out=variances)
    variances += 0.25
    variances /= growth
    bets = growth
    bets[0] = 0.25
    bets[1:] = variances[:-1]
    np.divide(2 * math.log(1 / delta) / n, bets, out=bets)
    np.sqrt(bets, out=bets)
    np.minimum(bets, LARGEST_BET / (1 - epsilon), out=bets)
    wealth = np.subtract(epsilon, losses, out=variances)
    wealth *= bets
    np.log1p(wealth, out=wealth)
    np.cumsum(wealth, out=wealth)
    return math.exp(-max(0.0, float(wealth.max())))


def smallest_sample(epsilon: float, delta: float, test: Test = "binomial") -> int:
    """The fewest samples with which losses of 0 throughout give ``p <= delta``.

    For ``binomial`` and ``hoeffding-bentkus`` this is ``ceil(ln(delta) / ln(1 - epsilon))``.

    Raises:
        CalibrationError: ``epsilon`` or ``delta`` is not above 0 and below 1, or the test is unknown.
    """
    require_share("epsilon", epsilon)
    require_share("delta", delta)
    return first(lambda n: p_value(np.zeros(n), test=test, epsilon=epsilon, delta=delta) <= delta, above=0)


def samples_for_power(epsilon: float, delta: float, *, risk: float, power: float = 0.9, test: Test = "binomial") -> int:
    """The samples from which on a policy of that true ``risk`` is accepted with probability ``>= power``.

    Of 0/1 losses, exactly. Power is a saw: it falls with ``n`` until one loss more is allowed, so that fewer samples
    may happen to have it too. ``wsr`` depends on more than the mean loss and has no such count; ``binomial``'s is a
    guide for it.

    Args:
        epsilon: 0 to 1.
        delta: 0 to 1.
        risk: true mean loss, from 0 to below ``epsilon``.
        power: 0 to 1.
        test: ``binomial`` or ``hoeffding-bentkus``.

    Raises:
        CalibrationError: an option is outside its range, or the test is another.
    """
    for name, value in (("epsilon", epsilon), ("delta", delta), ("power", power)):
        require_share(name, value)
    if not 0 <= risk < epsilon:
        raise CalibrationError(f"risk must be from 0 to below epsilon, which is {epsilon}, not {risk}")
    p_values = {"binomial": binomial_p_value, "hoeffding-bentkus": hoeffding_bentkus_p_value}
    if test not in p_values:
        raise CalibrationError(f"the power of test {test!r} is not known; it is for {' and '.join(p_values)}")

    def first_with(count: int, above: int) -> int:
        """The fewest samples that accept with ``count`` losses."""
        return first(lambda n: p_values[test](min(count, n), n, epsilon) <= delta, above=above)

    count, n = 0, first_with(0, 0)
    if risk == 0:
        return n
    while binomial_cdf(count, (following := first_with(count + 1, n)) - 1, risk) < power:
        count, n = count + 1, following
    return n


def _counts(successes: int, n: int) -> tuple[int, int]:
    """Both as whole numbers."""
    try:
        successes, n = operator.index(successes), operator.index(n)
    except TypeError as error:
        raise CalibrationError(f"counts must be whole numbers, not {successes!r} of {n!r}") from error
    if not 0 <= successes <= n:
        raise CalibrationError(f"{successes} of {n} samples is no count")
    return successes, n


def _x_log_ratio(a: float, b: float) -> float:
    """``a ln(a / b)``, 0 for ``a = 0``."""
    return a * math.log(a / b) if a > 0 else 0.0
