"""A device's install in fresh environments: what it weighs, that it has no torch and no compiler, that it runs.

::

    python tests/install/device.py net.edgekit                      # edgekit[ort] and edgekit[litert]
    python tests/install/device.py net.edgekit --extra ort --with 'onnxruntime<1.32'

Everything must come as a wheel (``--only-binary``), so nothing is compiled.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from build_wheel import ROOT, build

RUNTIMES = {"ort": "onnxruntime", "litert": "litert"}
"""What an extra brings."""
HERE = Path(__file__).parent


def install(wheel: Path, extra: str, *, also: list[str], folder: Path) -> Path:
    """A new environment with the wheel and one extra; its interpreter."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*pip, "--only-binary=:all:", f"{wheel}[{extra}]", *also], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description="Install edgekit as a device would, weigh it and run a bundle.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--extra", choices=RUNTIMES, action="append", help="[default: each]")
    parser.add_argument("--with", dest="also", action="append", default=[], metavar="REQUIREMENT")
    parser.add_argument("--limit-mb", type=float, default=150.0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "install")
    asked = parser.parse_args()
    wheel = build(asked.folder.resolve() / "wheel")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
    failed = 0
    for extra in asked.extra or RUNTIMES:
        print(f"edgekit[{extra}]", *asked.also, flush=True)
        python = install(wheel, extra, also=asked.also, folder=asked.folder.resolve() / extra)
        for script in (
            ["footprint.py", "--limit-mb", str(asked.limit_mb)],
            ["first_run.py", str(asked.bundle.resolve()), "--runtime", RUNTIMES[extra]],
        ):
            command = [str(python), str(HERE / script[0]), *script[1:]]
            failed += subprocess.run(command, cwd=asked.folder, check=False).returncode != 0
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
