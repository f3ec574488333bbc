"""docs/profile-format.md and docs/profile.schema.json say what the file holds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edgekit import measured, records, shares
from edgekit.records import Profile

DOCS = Path(__file__).resolve().parents[2] / "docs"
STRUCTS = [
    item
    for module in (measured, records, shares)
    for item in vars(module).values()
    if isinstance(item, type) and issubclass(item, msgspec.Struct) and item.__module__ == module.__name__
    if not item.__name__.startswith("_")
]


def test_the_schema_is_current():
    current = json.loads(msgspec.json.encode(msgspec.json.schema(Profile)))
    assert json.loads((DOCS / "profile.schema.json").read_text(encoding="utf-8")) == current, (
        "write docs/profile.schema.json anew; docs/profile-format.md says how"
    )


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_field_is_documented(struct):
    text = (DOCS / "profile-format.md").read_text(encoding="utf-8")
    missing = [name for name in struct.__struct_fields__ if name != "before" and f"`{name}`" not in text]
    assert missing == []


def test_the_ten_lines_run(full, tmp_path):
    text = (DOCS / "profile-format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(code.split("\n\n")[1].splitlines()) <= 10
    full.save(tmp_path / "profile.json")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("exit1 0.00089")
    assert len(lines) == 6


def test_a_saved_profile_has_no_other_names(full, tmp_path):
    """Required names and types by the schema itself, without a library for it."""
    schema = json.loads((DOCS / "profile.schema.json").read_text(encoding="utf-8"))["$defs"]
    found = json.loads(full.save(tmp_path / "p.json").read_text(encoding="utf-8"))
    assert set(found) == set(schema["Profile"]["properties"])
    assert set(found["exits"][0]) == set(schema["ExitProfile"]["properties"])
    assert set(found["stages"][0]) == set(schema["StageTime"]["properties"])
    assert set(found["windows"][0]) == set(schema["Window"]["properties"])
