"""From scores to temperatures to thresholds. First form: empirical, without a guarantee on unseen data."""

from __future__ import annotations

from edgekit.calibration.calibrate import Collected, calibrate, collect
from edgekit.calibration.scores import expected_calibration_error, negative_log_likelihood, score
from edgekit.calibration.temperature import fit_temperature
from edgekit.calibration.thresholds import Choice, choose_thresholds, exits_taken

__all__ = [
    "Choice",
    "Collected",
    "calibrate",
    "choose_thresholds",
    "collect",
    "exits_taken",
    "expected_calibration_error",
    "fit_temperature",
    "negative_log_likelihood",
    "score",
]
