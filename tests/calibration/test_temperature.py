from __future__ import annotations

import numpy as np
import pytest
import scipy.special

from edgekit.calibration import fit_temperature
from edgekit.calibration.temperature import TEMPERATURE_RANGE


def drawn(true_temperature: float, *, samples: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from softmax(logits / true_temperature)."""
    rng = np.random.default_rng(5)
    logits = rng.normal(scale=3, size=(samples, 5)).astype(np.float32)
    noise = rng.gumbel(size=logits.shape)
    return logits, (logits / true_temperature + noise).argmax(axis=1)


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_recovered(true_temperature):
    assert fit_temperature(*drawn(true_temperature)) == pytest.approx(true_temperature, rel=0.03)


def test_it_is_the_best_of_a_fine_grid():
    logits, labels = drawn(1.7, samples=2000)
    grid = np.exp(np.linspace(np.log(0.5), np.log(5), 4001))
    rows = np.arange(len(labels))
    losses = [-scipy.special.log_softmax(logits / value, axis=1)[rows, labels].mean() for value in grid]
    assert fit_temperature(logits, labels) == pytest.approx(grid[int(np.argmin(losses))], rel=1e-3)


def test_never_wrong_or_always_wrong_ends_at_a_bound():
    logits, _ = drawn(1.0, samples=200)
    low, high = TEMPERATURE_RANGE
    assert fit_temperature(logits, logits.argmax(axis=1)) == pytest.approx(low, rel=1e-3)
    assert fit_temperature(logits, logits.argmin(axis=1)) == pytest.approx(high, rel=1e-3)


def test_the_value_is_a_float32():
    value = fit_temperature(*drawn(1.3, samples=100))
    assert float(np.float32(value)) == value
