"""What an environment holds and weighs; run by its own interpreter, needs the standard library alone.

::

    .../bin/python tests/install/footprint.py --limit-mb 150

Fails when it weighs more than the limit, when a library that trains or compiles networks came along, or when anything
in it was built here rather than unpacked from a wheel that its authors made.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

TOOLS = ("pip", "setuptools", "wheel")
"""What a new environment comes with; no part of the install."""
FOREIGN = ("jax", "jaxlib", "tensorflow", "torch", "triton")
MB = 1e6


def on_disk(path: Path) -> int:
    """Bytes that a file takes on disk, or all files below a folder; ``du`` says the same."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.lstat().st_blocks * 512 for each in files)


def entries(distribution: metadata.Distribution) -> set[str]:
    """Names at the top of site-packages that a distribution brought."""
    return {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}


def look() -> dict[str, object]:
    """Packages with version and bytes, the whole in bytes, and what should not be there."""
    site = Path(sysconfig.get_paths()["purelib"])
    installed = {each.metadata["Name"]: each for each in metadata.distributions(path=[str(site)])}
    tools = {entry for name, each in installed.items() if name in TOOLS for entry in entries(each)}
    wanted = {name: each for name, each in installed.items() if name not in TOOLS}
    sizes = {name: sum(on_disk(site / entry) for entry in entries(each)) for name, each in wanted.items()}
    problems = [f"{name} came along" for name in sorted(wanted) if name.lower().replace("_", "-") in FOREIGN]
    problems += [f"{name} is not from a wheel" for name, each in sorted(wanted.items()) if not each.read_text("WHEEL")]
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "packages": {name: {"version": wanted[name].version, "bytes": sizes[name]} for name in sorted(wanted)},
        "bytes": sum(on_disk(each) for each in site.iterdir() if each.name not in tools | {"__pycache__"}),
        "problems": problems,
    }


def show(found: dict[str, object], limit_mb: float) -> list[str]:
    """Print it, the heaviest first; returns what is wrong."""
    packages = found["packages"]
    for name, each in sorted(packages.items(), key=lambda item: -item[1]["bytes"]):
        print(f"  {each['bytes'] / MB:7.1f} MB  {name} {each['version']}")
    print(f"  {found['bytes'] / MB:7.1f} MB  on Python {found['python']}, {found['machine']}, {found['libc']}")
    heavy = [f"{found['bytes'] / MB:.1f} MB on disk, more than {limit_mb:g}"] if found["bytes"] > limit_mb * MB else []
    return [*found["problems"], *heavy]


def main() -> None:
    parser = argparse.ArgumentParser(description="What this interpreter's environment holds and weighs.")
    parser.add_argument("--limit-mb", type=float, default=150.0)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    asked = parser.parse_args()
    found = look()
    if asked.json:
        print(json.dumps(found))
        return
    wrong = show(found, asked.limit_mb)
    sys.exit("\n".join(f"FAILED: {each}" for each in wrong) or 0)


if __name__ == "__main__":
    main()
