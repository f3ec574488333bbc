"""Proof on ARM without a board: a Debian arm64 root under qemu installs edgekit as a device does, and its answers are
held against this machine's.

::

    python tests/arm64/prove.py                                     # the CIFAR MSDNet, 500 images
    python tests/arm64/prove.py --suite trixie --extra ort          # Python 3.13
    python tests/arm64/prove.py --cpu cortex-a57 --cpu cortex-a76 --images 100
    python tests/arm64/prove.py --network skipnet38-cifar10 --images 100
    python tests/arm64/prove.py --precision int8                    # in float and in int8, quantised here

For each extra (``ort``, ``litert``): wheels for arm64 are downloaded here, by this machine's own pip; in the root,
a new environment takes the extra from them and from edgekit's wheel, with no network, no compiler and no torch; it is
weighed; every network is run from its bundle on the processors asked for, and compared. What is slow to make (the root,
the wheels) is kept in ``build/arm64``. qemu is right about answers and says nothing about time. Lower precision rounds
otherwise on another processor: its decisions and accuracy are told on both, and may differ.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
from root import PROCESSORS, SHARED, Root, build, shown

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
INSTALL = PROJECT / "tests" / "install"
PINS = PROJECT / "constraints.txt"
DATA = PROJECT.parent / "shared" / "data" / "cifar10" / "test.tar.gz"
CALIBRATION = DATA.with_name("train.tar.gz")
CALIBRATION_IMAGES = 1000
"""Training images that lower precision is made with: half calibrate, half measure."""
SUITES = {"bookworm": ("3.11", 36), "trixie": ("3.13", 41)}
"""Debian releases, with the Python and the minor version of glibc that they come with."""
EXTRAS = {"ort": ("onnx", "onnxruntime"), "litert": ("litert", "litert")}
"""Target and runtime of an extra."""
NETWORKS = ("msdnet-cifar10",)
LIMIT_MB = 150


def call(*command: object) -> None:
    """Run a program of this machine; ends here when it fails."""
    done = subprocess.run([str(each) for each in command], stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        sys.exit(f"FAILED: {' '.join(str(each) for each in command[:4])} ... ended with {done.returncode}")


def images(source: Path, count: int, file: Path) -> None:
    """Some of the images, evenly spaced so that all classes are there, 8-bit as a device gets them."""
    from edgekit.data import load_dataset
    from edgekit.zoo.registry import find

    if not source.exists():
        sys.exit(f"{source}: no CIFAR-10 images; put a tar of them there, or give other test images with --data")
    every = load_dataset(source, preprocess=find(NETWORKS[0]).preprocess)
    rows = np.linspace(0, len(every) - 1, count).astype(int)
    np.savez(file, inputs=every.inputs[rows], labels=every.labels[rows])


def made_wheel(folder: Path) -> Path:
    """edgekit's own wheel, of the sources as they are."""
    command = [sys.executable, str(INSTALL / "build_wheel.py"), str(folder)]
    return Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())


def wheels(wheel: Path, extra: str, *, suite: str, folder: Path) -> None:
    """Ready-made arm64 wheels of an install, at the versions that this machine has."""
    python, glibc = SUITES[suite]
    tags = [f"manylinux_2_{minor}_aarch64" for minor in range(glibc, 16, -1)] + ["manylinux2014_aarch64"]
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--dest", folder]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    command += [word for tag in tags for word in ("--platform", tag)]
    call(*command, "--constraint", PINS, f"{wheel}[{extra}]")


def install(root: Root, wheel: Path, extra: str, *, folder: Path, cpu: str) -> str:
    """A new environment in the root, installed from wheels alone; its interpreter's path inside."""
    inside = f"/opt/{extra}"
    shutil.rmtree(root.path / inside[1:], ignore_errors=True)
    (pip,) = (root.path / "usr/share/python-wheels").glob("pip-*.whl")
    python = f"{inside}/bin/python"
    pip_of_root = [python, f"/{pip.relative_to(root.path)}/pip", "install", "--quiet", "--no-compile", "--no-index"]
    for command in (
        ["/usr/bin/python3", "-m", "venv", "--without-pip", inside],
        [
            *pip_of_root,
            "--find-links",
            shown(folder, root),
            "--constraint",
            f"{SHARED}/scripts/constraints.txt",
            f"{shown(wheel, root)}[{extra}]",
        ],
    ):
        if root.run(*command, cpu=cpu) != 0:
            sys.exit(f"FAILED: edgekit[{extra}] does not install in the root")
    return python


def prove(root: Root, python: str, extra: str, *, networks: list[str], asked: argparse.Namespace) -> int:
    """Run every network here and there; returns how many comparisons failed."""
    runtimes = [EXTRAS[extra][1], *(f"{EXTRAS[extra][1]}@{precision}" for precision in asked.precision)]
    told = [word for runtime in runtimes[1:] for word in ("--told", runtime)]
    failed = 0
    for network in networks:
        bundle, data = root.shared / f"{network}.edgekit", root.shared / "images.npz"
        here = root.shared / f"{network}-{extra}-here.npz"
        options = [word for runtime in runtimes for word in ("--runtime", runtime)]
        options += ["--alone", str(asked.alone), "--batch", str(asked.batch)]
        call(sys.executable, HERE / "answers.py", bundle, data, here, *options)
        for cpu in asked.cpu:
            there = root.shared / f"{network}-{extra}-{cpu}.npz"
            command = [python, f"{SHARED}/scripts/answers.py", *(shown(each, root) for each in (bundle, data, there))]
            status = root.run(*command, *options, cpu=cpu)
            if status != 0:
                sys.exit(f"FAILED: {network} does not run on {extra} on a {cpu} (exit status {status})")
            print(f"on a {cpu}:", flush=True)
            compared = [sys.executable, str(HERE / "compare.py"), str(here), str(there), *told]
            failed += subprocess.run(compared, check=False).returncode != 0
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="Install and run edgekit in a Debian arm64 root, and compare.")
    parser.add_argument("--suite", choices=SUITES, default="bookworm")
    parser.add_argument("--extra", choices=EXTRAS, action="append", help="[default: both]")
    parser.add_argument("--network", action="append", help="of the zoo [default: the CIFAR MSDNet]")
    parser.add_argument("--precision", choices=("int8",), action="append", default=[], help="beside float")
    parser.add_argument("--cpu", choices=PROCESSORS, action="append", help="that qemu stands for [default: cortex-a72]")
    parser.add_argument("--data", type=Path, default=DATA, help="CIFAR-10 test images, a tar or folder")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--alone", type=int, default=100, help="images that are also run one by one")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=PROJECT / "build" / "arm64")
    asked = parser.parse_args()
    asked.cpu = asked.cpu or ["cortex-a72"]
    extras, networks = asked.extra or list(EXTRAS), asked.network or list(NETWORKS)
    shared = asked.folder.resolve() / "shared"
    (shared / "scripts").mkdir(parents=True, exist_ok=True)
    for file in (HERE / "answers.py", INSTALL / "footprint.py", INSTALL / "first_run.py", PINS):
        shutil.copy(file, shared / "scripts")
    images(asked.data, asked.images, shared / "images.npz")
    if asked.precision:
        images(CALIBRATION, CALIBRATION_IMAGES, shared / "calibration.npz")
    edgekit = Path(sys.executable).with_name("edgekit")
    targets = ",".join(EXTRAS[extra][0] for extra in extras)
    for network in networks:
        call(edgekit, "zoo", "export", network, "-o", shared / f"{network}.edgekit", "--target", targets, "--overwrite")
        for extra, precision in product(extras, asked.precision):
            options = ["--data", shared / "calibration.npz", "--precision", precision, "--target", EXTRAS[extra][0]]
            call(edgekit, "quantize", shared / f"{network}.edgekit", *options)
    root = build(asked.folder.resolve(), suite=asked.suite, shared=shared)
    print(f"{root.path.name} arm64, {'set up' if root.by_kernel else 'unpacked only: qemu is named explicitly'}")
    wheel, failed = made_wheel(shared), 0
    for extra in extras:
        folder = shared / f"wheels-{asked.suite}"
        wheels(wheel, extra, suite=asked.suite, folder=folder)
        python = install(root, wheel, extra, folder=folder, cpu=asked.cpu[0])
        print(f"edgekit[{extra}] on {asked.suite}", flush=True)
        footprint = [f"{SHARED}/scripts/footprint.py", "--limit-mb", str(LIMIT_MB)]
        failed += root.run(python, *footprint, cpu=asked.cpu[0]) != 0
        for network in networks:
            first = [f"{SHARED}/scripts/first_run.py", shown(shared / f"{network}.edgekit", root)]
            failed += root.run(python, *first, "--runtime", EXTRAS[extra][1], cpu=asked.cpu[0]) != 0
        failed += prove(root, python, extra, networks=networks, asked=asked)
    print(f"{failed} failed" if failed else "the same answers and decisions")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
