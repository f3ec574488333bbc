from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from edgekit.zoo import digits


def test_split_has_every_image_once():
    sets = [digits.training_set(), digits.calibration_set(), digits.test_set()]
    assert [len(each) for each in sets] == [1085, 357, 355]
    images = np.concatenate([each.inputs.reshape(len(each), -1) for each in sets])
    assert len(images) == 1797
    assert len(np.unique(images, axis=0)) == 1797


def test_every_digit_is_split_alike():
    sizes = {"training": 3 / 5, "calibration": 1 / 5, "test": 1 / 5}
    total = np.bincount(load_digits().target)
    for name, share in sizes.items():
        counts = np.bincount(getattr(digits, f"{name}_set")().labels, minlength=10)
        assert (abs(counts - share * total) <= 1.5).all()


def test_pixels_are_those_of_scikit_learn():
    first = digits.training_set().inputs[:3, ..., 0] * (16 / 255)
    np.testing.assert_allclose(first, load_digits().images[:3], atol=0.04)


def test_training_pixels_are_normalised():
    data = digits.training_set()
    inputs = data.batch(slice(None))
    assert inputs.shape == (1085, 1, 8, 8)
    assert inputs.dtype == np.float32
    assert abs(inputs.mean()) < 1e-3
    assert abs(inputs.std() - 1) < 1e-3


def test_same_set_again():
    assert digits.test_set().sha256 == digits.test_set().sha256
    assert digits.test_set().sha256 != digits.calibration_set().sha256
