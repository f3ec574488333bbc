"""Whether a device's install resolves to ready-made wheels on every Python and system that matters. No interpreter of
that Python is needed, and nothing is installed.

::

    python tests/install/wheels.py                      # a line for each of 16 installs
    python tests/install/wheels.py --python 3.10 --machine aarch64 --versions

pip resolves for another Python, system and processor (``--python-version``, ``--platform``) but reads the markers of
requirements (``python_version < "3.11"``) with its own Python. They are read again here, with the device's, and what
pip left out is asked for as well, until nothing is missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from build_wheel import ROOT, build
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("ort", "litert")
FOREIGN = ("jax", "jaxlib", "tensorflow", "torch", "triton")
ROUNDS = 5


@dataclass(frozen=True)
class System:
    """What a device runs: its Python and glibc decide which wheels fit."""

    python: str
    glibc: int
    seen_on: str

    def platforms(self, machine: str) -> list[str]:
        """Tags of wheels that run there, as PEP 600 has them."""
        return [f"manylinux_2_{minor}_{machine}" for minor in range(self.glibc, 16, -1)] + [f"manylinux2014_{machine}"]

    def markers(self, machine: str) -> dict[str, str]:
        """What its own pip would read the markers of a requirement with."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": machine,
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }


SYSTEMS = (
    System("3.10", 35, "JetPack 6, Ubuntu 22.04"),
    System("3.11", 36, "Raspberry Pi OS and Debian 12"),
    System("3.12", 39, "JetPack 7, Ubuntu 24.04"),
    System("3.13", 41, "Raspberry Pi OS and Debian 13"),
)


def resolve(wheel: Path, extra: str, *, system: System, machine: str) -> dict[str, str]:
    """Every package of an install and its version, all of them wheels.

    Raises:
        LookupError: pip finds no wheels that fit, in its own words.
    """
    asked = [f"{wheel}[{extra}]"]
    for _ in range(ROUNDS):
        found = _report(asked, system=system, machine=machine)
        missing = _missing(found, extra, system.markers(machine))
        if not missing:
            return {canonicalize_name(each["metadata"]["name"]): each["metadata"]["version"] for each in found}
        asked += missing
    raise LookupError(f"still missing after {ROUNDS} rounds: {', '.join(missing)}")


def _report(asked: list[str], *, system: System, machine: str) -> list[dict]:
    """What pip would install for another machine, as its report has it."""
    with TemporaryDirectory(prefix="edgekit-wheels-") as nowhere:
        report = Path(nowhere) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
        command += ["--ignore-installed", "--target", nowhere, "--report", str(report), "--only-binary=:all:"]
        command += ["--implementation", "cp", "--python-version", system.python]
        for platform in system.platforms(machine):
            command += ["--platform", platform]
        done = subprocess.run([*command, *asked], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            words = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise LookupError(words[-1].removeprefix("ERROR: ") if words else done.stderr.strip())
        return json.loads(report.read_text())["install"]


def _missing(found: list[dict], extra: str, markers: dict[str, str]) -> list[str]:
    """Requirements that hold on the device and are not among what was found."""
    there = {canonicalize_name(each["metadata"]["name"]): each["metadata"]["version"] for each in found}
    missing = set()
    for each in found:
        extras = [*each.get("requested_extras", []), *([extra] if each["metadata"]["name"] == "edgekit" else []), ""]
        for line in each["metadata"].get("requires_dist", []):
            needed = Requirement(line)
            holds = needed.marker is None or any(needed.marker.evaluate({**markers, "extra": name}) for name in extras)
            version = there.get(canonicalize_name(needed.name))
            if holds and (version is None or not needed.specifier.contains(version, prereleases=True)):
                needed.marker = None
                missing.add(str(needed))
    return sorted(missing)


def main() -> None:
    parser = argparse.ArgumentParser(description="Resolve a device's install on other Pythons and processors.")
    parser.add_argument("--python", choices=[each.python for each in SYSTEMS], action="append", help="[default: all]")
    parser.add_argument("--machine", choices=("aarch64", "x86_64"), action="append", help="[default: both]")
    parser.add_argument("--extra", action="append", help="[default: ort and litert]")
    parser.add_argument("--versions", action="store_true", help="tell the version of every package")
    asked = parser.parse_args()
    wheel = build(ROOT / "build" / "install" / "resolve")
    failed = 0
    for machine in asked.machine or ("aarch64", "x86_64"):
        for system in SYSTEMS:
            for extra in asked.extra or EXTRAS:
                if asked.python and system.python not in asked.python:
                    continue
                where = f"{machine:8} Python {system.python} ({system.seen_on}) edgekit[{extra}]"
                try:
                    found = resolve(wheel, extra, system=system, machine=machine)
                except LookupError as error:
                    print(f"{where}: FAILED: {error}", flush=True)
                    failed += 1
                    continue
                strangers = sorted(set(FOREIGN) & set(found))
                failed += bool(strangers)
                told = found if asked.versions else {each: found[each] for each in _main(extra) if each in found}
                words = ", ".join(f"{name} {version}" for name, version in sorted(told.items()))
                print(f"{where}: {len(found)} wheels; {words}", *(f"FAILED: {each}" for each in strangers), flush=True)
    sys.exit(1 if failed else 0)


def _main(extra: str) -> tuple[str, ...]:
    """The packages that matter most."""
    return ("numpy", "scipy", "onnxruntime" if extra == "ort" else "ai-edge-litert")


if __name__ == "__main__":
    main()
