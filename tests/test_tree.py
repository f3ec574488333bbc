from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.tree import Tree, UnreadableError, list_of, numbers_of, run_command


@pytest.mark.parametrize(
    ("text", "numbers"), [("0-3", (0, 1, 2, 3)), ("0-1,4,6-7", (0, 1, 4, 6, 7)), ("5", (5,)), ("", ()), ("\n", ())]
)
def test_lists_of_processors(text, numbers):
    assert numbers_of(text) == numbers
    assert list_of(numbers) == text.strip()


@given(st.sets(st.integers(0, 300)))
def test_lists_come_back(numbers):
    assert set(numbers_of(list_of(numbers))) == numbers


def test_a_list_that_is_none_is_refused():
    with pytest.raises(ValueError, match="invalid literal"):
        numbers_of("all")


def test_a_command_and_its_failures(monkeypatch):
    assert run_command((sys.executable, "-c", "print('said')")) == "said\n"
    with pytest.raises(UnreadableError, match="no-such-program is not installed"):
        run_command(("no-such-program",))
    with pytest.raises(UnreadableError, match=r"failed \(refused\)"):
        run_command((sys.executable, "-c", "raise SystemExit('refused')"))
    with pytest.raises(UnreadableError, match=r"failed \(exit code 3\)"):
        run_command((sys.executable, "-c", "raise SystemExit(3)"))
    monkeypatch.setattr("edgekit.tree.PATIENCE_S", 0.1)
    with pytest.raises(UnreadableError, match=r"no answer in 0\.1 s"):
        run_command((sys.executable, "-c", "import time; time.sleep(9)"))


def test_a_recording_runs_nothing_unless_told(tmp_path):
    with pytest.raises(UnreadableError, match="recording"):
        Tree(tmp_path).command("vcgencmd", "get_throttled")
    assert Tree(tmp_path, run=lambda words: " ".join(words)).command("a", "b") == "a b"
    assert Tree(Path("/")).live


def test_numbers_in_names_give_the_order(tmp_path):
    for name in ("zone10", "zone2", "zone1"):
        (tmp_path / name).touch()
    assert [path.name for path in Tree(tmp_path).found("zone*")] == ["zone1", "zone2", "zone10"]


def test_reasons_are_kept_by_name(tmp_path):
    tree = Tree(tmp_path)
    assert tree.at("gone", lambda: (tmp_path / "gone").read_text()) is None
    assert tree.at("words", lambda: int("many")) is None
    assert tree.at("seven", lambda: 7) == 7
    assert "No such file" in tree.unavailable["gone"]
    assert tree.unavailable["words"].startswith("not what was expected")
    assert "seven" not in tree.unavailable
