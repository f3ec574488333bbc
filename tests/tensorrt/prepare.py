"""Fetches what the proof of TensorRT without a GPU needs, into ``build/tensorrt``; what is there is kept.

::

    api-<version>/site    TensorRT's real bindings of a version
    api-<version>/lib     a stub of its libraries, enough for the bindings to be imported
    cuda-<version>/site   cuda-python's real bindings of a version
    rtx/site, rtx/lib     TensorRT-RTX: bindings and libraries, which build real engines without a GPU

Run: ``python tests/tensorrt/prepare.py``. Needs pip and gcc, and about 2 GB of disk for a while.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2] / "build" / "tensorrt"
BINDINGS = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "11.4.0": "tensorrt-cu12-bindings==11.4.0.106",
}
"""JetPack 6.0, JetPack 6.2, and the newest."""
CUDA = {
    "12.2": ("cuda-python==12.2.1",),
    "12.8": ("cuda-bindings==12.8.0",),
    "13.0": ("cuda-bindings==13.0.3", "cuda-pathfinder==1.3.2"),
}
RTX = ("tensorrt-rtx-cu13-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13")


def run(*words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


def install(folder, *packages):
    """Packages, without what they depend on, into a folder of their own."""
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *packages)


def made(folder):
    """Whether a folder has still to be filled; it counts only once it is wholly there."""
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        return None
    aside.mkdir(parents=True)
    return aside


def needed(library):
    """Names of the libraries that a library wants to load."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", library))


def wanted(library):
    """Functions that a library wants of those that it loads, other than the system's and Python's: about ten."""
    names = re.findall(r"^ +U (\w+)$", run("nm", "-D", "--undefined-only", library), re.MULTILINE)
    return [name for name in names if not re.match(r"_?Py|dl(open|close|sym)$", name)]


def bindings(version, package):
    folder = ROOT / f"api-{version}"
    aside = made(folder)
    if aside is None:
        return
    install(aside / "site", package)
    (aside / "lib").mkdir()
    compiled = next((aside / "site").rglob("tensorrt*.so"))
    source = aside / "lib" / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in wanted(compiled)))
    for name in needed(compiled):
        if name.startswith("libnv"):
            run("gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", aside / "lib" / name, source)
    aside.rename(folder)


def cuda(version, packages):
    folder = ROOT / f"cuda-{version}"
    aside = made(folder)
    if aside is not None:
        install(aside / "site", *packages)
        aside.rename(folder)


def rtx():
    folder = ROOT / "rtx"
    aside = made(folder)
    if aside is None:
        return
    install(aside / "site", *RTX)
    (aside / "lib").mkdir()
    for file in (aside / "site").rglob("lib*.so.*"):  # libcudart.so.13.4.36 is looked for as libcudart.so.13
        name = re.sub(r"(\.so\.\d+)\..*", r"\1", file.name)
        (aside / "lib" / name).symlink_to(Path("..") / file.relative_to(aside))
    aside.rename(folder)


def main():
    for version, package in BINDINGS.items():
        print(f"TensorRT {version}: bindings", flush=True)
        bindings(version, package)
    for version, packages in CUDA.items():
        print(f"CUDA {version}: bindings", flush=True)
        cuda(version, packages)
    print("TensorRT-RTX: bindings and libraries", flush=True)
    rtx()


if __name__ == "__main__":
    main()
