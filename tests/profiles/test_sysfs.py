from __future__ import annotations

import pytest

from edgekit.errors import MeasurementError
from edgekit.profiles import sysfs


@pytest.mark.parametrize(("text", "value"), [("42\n", 42), ("-7", -7), ("0 ms\n", 0)])
def test_numbers(tmp_path, text, value):
    path = tmp_path / "a"
    path.write_text(text)
    assert sysfs.number(path) == sysfs.optional(path) == sysfs.sense("m", path) == value
    assert sysfs.unreadable(path) is None


@pytest.mark.parametrize("text", ["", "\n", "N/A\n"])
def test_no_number(tmp_path, text):
    path = tmp_path / "a"
    path.write_text(text)
    assert sysfs.optional(path) is None
    assert "cannot be read" in (sysfs.unreadable(path) or "")
    with pytest.raises(MeasurementError, match=r"m: .*a can no longer be read"):
        sysfs.sense("m", path)


def test_a_missing_file_says_so_once(tmp_path):
    reason = sysfs.unreadable(tmp_path / "gone")
    assert reason == f"{tmp_path}/gone cannot be read (No such file or directory); use another meter"


def test_the_board(tmp_path):
    assert sysfs.board(tmp_path) == ""
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("Model A\0")
    (tmp_path / "proc/device-tree/compatible").write_text("maker,a\0maker,chip\0")
    assert sysfs.board(tmp_path) == "Model A maker,a maker,chip"
