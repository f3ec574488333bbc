"""Build edgekit's wheel from a clean copy of the sources and print its path.

::

    python tests/install/build_wheel.py build/install

A build inside the tree would leave a folder whose modules a later wheel takes along, even when they are gone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("edgekit", "exporters", "profiles", "runtimes", "zoo")


def build(folder: Path) -> Path:
    """The wheel, the only one in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("edgekit-*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="edgekit-wheel-") as copy:
        for name in FILES:
            shutil.copy(ROOT / name, copy)
        for name in FOLDERS:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, Path(copy) / name, symlinks=True, ignore=ignored)
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), copy]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"the wheel cannot be built:\n{done.stdout}{done.stderr}")
    (wheel,) = folder.glob("edgekit-*.whl")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(description="Build edgekit's wheel from a clean copy of the sources.")
    parser.add_argument("folder", type=Path, help="where the wheel goes")
    print(build(parser.parse_args().folder.resolve()))


if __name__ == "__main__":
    main()
