"""scikit-learn's bundled handwritten digits, split for training, calibration and test. Needs no download.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(CC BY 4.0); scikit-learn carries its 1,797 test images as :func:`sklearn.datasets.load_digits`.
"""

from __future__ import annotations

import numpy as np

from edgekit.data import Dataset, Preprocess
from edgekit.errors import require

__all__ = ["CLASSES", "PREPROCESS", "calibration_set", "test_set", "training_set"]

CLASSES = tuple("0123456789")
"""Class names in label order."""

PREPROCESS = Preprocess(mean=(0.3045,), std=(0.3758,), size=(8, 8), channels=1)
"""Normalisation by mean and standard deviation of the training set's pixels."""


def training_set() -> Dataset:
    """Three of every five images of each digit: 1,085 images ``(8, 8, 1) uint8`` with labels."""
    return _split("training", (0, 1, 2))


def calibration_set() -> Dataset:
    """The fourth of every five images of each digit: 357 images, for thresholds and temperatures only."""
    return _split("calibration", (3,))


def test_set() -> Dataset:
    """The fifth of every five images of each digit: 355 images that no weight was fitted to.

    The digits network's sizes were chosen looking at results on them.
    """
    return _split("test", (4,))


def _split(name: str, turns: tuple[int, ...]) -> Dataset:
    """The images whose running number within their class, modulo five, is one of ``turns``.

    Every digit has the same share in each part, and no random generator has to stay the same for the split to.
    """
    datasets = require("sklearn.datasets", extra="demo", purpose="The digits data set")
    bunch = datasets.load_digits()
    labels = np.asarray(bunch.target, dtype=np.int64)
    turn = np.empty(len(labels), dtype=np.int64)
    for label in range(len(CLASSES)):
        rows = np.flatnonzero(labels == label)
        turn[rows] = np.arange(len(rows)) % 5
    chosen = np.isin(turn, turns)
    # The file has 17 grey levels, 0 to 16; as 8-bit images they go through the same preprocessing as any picture.
    images = np.rint(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)[chosen][..., None]
    return Dataset(
        inputs=images,
        labels=labels[chosen],
        classes=CLASSES,
        source=f"scikit-learn digits, {name} split",
        preprocess=PREPROCESS,
    )
