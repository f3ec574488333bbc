"""From scores to policies: proposed on some samples, tested on others, certified, and watched in use."""

from __future__ import annotations

from edgekit.calibration.audit import Audit
from edgekit.calibration.calibrate import Collected, calibrate_empirically, collect
from edgekit.calibration.certified import calibrate_certified
from edgekit.calibration.certify import certify, certify_strict, fixed_sequence
from edgekit.calibration.choose import choose
from edgekit.calibration.losses import LOSSES, Loss
from edgekit.calibration.modes import calibrate_anytime, calibrate_budget
from edgekit.calibration.proposal import find_loss, propose
from edgekit.calibration.risk import smallest_sample
from edgekit.calibration.scores import expected_calibration_error, negative_log_likelihood, score
from edgekit.calibration.solve import propose_budget, propose_path, shared_threshold_path
from edgekit.calibration.temperature import fit_temperature
from edgekit.calibration.thresholds import Choice, choose_thresholds, exits_taken

__all__ = [
    "LOSSES",
    "Audit",
    "Choice",
    "Collected",
    "Loss",
    "calibrate_anytime",
    "calibrate_budget",
    "calibrate_certified",
    "calibrate_empirically",
    "certify",
    "certify_strict",
    "choose",
    "choose_thresholds",
    "collect",
    "exits_taken",
    "expected_calibration_error",
    "find_loss",
    "fit_temperature",
    "fixed_sequence",
    "negative_log_likelihood",
    "propose",
    "propose_budget",
    "propose_path",
    "score",
    "shared_threshold_path",
    "smallest_sample",
]
