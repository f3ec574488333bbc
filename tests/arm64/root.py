"""A Debian arm64 root in a folder, in which programs run under qemu on a processor of another kind.

Made once by debootstrap and kept. There are two ways to run in it. Where the kernel may start qemu for every arm64
program (``binfmt_misc``), the root is set up as on a device. Elsewhere packages are only unpacked, and qemu is named
explicitly, which is enough for Python but not for programs that it starts. Good for answers, never for timings.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

QEMU = Path("/usr/bin/qemu-aarch64-static")
BINFMT = Path("/proc/sys/fs/binfmt_misc")
TOOLS = {"debootstrap": "debootstrap", str(QEMU): "qemu-user-static", "update-binfmts": "binfmt-support"}
"""Programs, and the Debian packages that bring them."""
PACKAGES = "python3,python3-venv"
SHARED = "/mnt"
"""Where a folder of this machine is seen in the root."""

ENTER = """
root=$1 shared=$2 board=$3; shift 3
mount -t proc proc "$root/proc"
mount --bind "$board/cpuinfo" "$root/proc/cpuinfo"
mount --bind "$board/sys" "$root/sys"
mount --rbind /dev "$root/dev"
mount --bind "$shared" "$root/mnt"
exec chroot "$root" "$@"
"""
"""In namespaces of its own, so that nothing is left mounted, whatever happens, and there is no network. Libraries ask
the kernel what processor there is, and would be told about this machine's: they see a board's files instead."""

BASIC = "fp asimd evtstrm"
NEWER = f"{BASIC} aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
PROCESSORS = {
    "cortex-a57": (0xD07, f"{BASIC} crc32 cpuid"),
    "cortex-a72": (0xD08, f"{BASIC} crc32 cpuid"),
    "cortex-a76": (0xD0B, NEWER),
}
"""What qemu can stand for: its part number, as ARM gives them, and features, as Linux names them. The first is a Jetson
Nano's, the second a Raspberry Pi 4's, the third a Raspberry Pi 5's."""
CORES = 4


@dataclass(frozen=True)
class Root:
    """A root that is ready.

    Attributes:
        path: its folder.
        shared: a folder of this machine, which is :data:`SHARED` inside.
        by_kernel: whether the kernel starts qemu by itself.
    """

    path: Path
    shared: Path
    by_kernel: bool

    def run(self, *command: str, cpu: str) -> int:
        """Run a program of the root; returns its exit status.

        Args:
            command: a path inside, and arguments.
            cpu: one of :data:`PROCESSORS`.
        """
        settings = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
        settings |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "QEMU_CPU": cpu}
        words = list(command) if self.by_kernel else [str(QEMU), *command]
        with TemporaryDirectory(prefix="edgekit-board-") as board:
            _write_board(Path(board), cpu)
            entered = [
                "unshare",
                "--mount",
                "--net",
                "sh",
                "-euc",
                ENTER,
                "sh",
                str(self.path),
                str(self.shared),
                board,
                *words,
            ]
            return subprocess.run(entered, env=settings, check=False).returncode


def build(folder: Path, *, suite: str, shared: Path) -> Root:
    """The root of a Debian release, made when it is not there.

    Args:
        folder: that holds one for each release.
        suite: name of the release, as ``"bookworm"``.
        shared: a folder of this machine that programs inside may use.
    """
    if os.geteuid() != 0:
        sys.exit("making a Debian root and entering it needs root")
    _need_tools()
    root, mark = folder / suite, folder / f"{suite}.ready"
    if not mark.exists():
        shutil.rmtree(root, ignore_errors=True)
        options = ["--foreign", "--arch=arm64", "--variant=minbase", f"--include={PACKAGES}"]
        subprocess.run(["debootstrap", *options, suite, str(root), *_mirror()], check=True, stdout=sys.stderr)
        shutil.copy(QEMU, root / "usr/bin")
        set_up = _set_up(root)
        for name in ("proc", SHARED[1:]):  # debootstrap links the first to this machine's until it has finished
            if (root / name).is_symlink():
                (root / name).unlink()
            (root / name).mkdir(exist_ok=True)
        mark.write_text("set up" if set_up else "unpacked")
    by_kernel = mark.read_text() == "set up"
    if by_kernel and not _kernel_runs(root):
        sys.exit(f"{root} was set up with binfmt_misc, which is gone: remove {mark} to make it anew")
    return Root(root, shared, by_kernel)


def _write_board(folder: Path, cpu: str) -> None:
    """What a kernel on such a processor tells about it, as far as libraries ask."""
    part, features = PROCESSORS[cpu]
    lines = {"BogoMIPS": "108.00", "Features": features, "CPU implementer": "0x41", "CPU architecture": "8",
             "CPU variant": "0x0", "CPU part": f"{part:#x}", "CPU revision": "3"}  # fmt: skip
    cores = [{"processor": str(number), **lines} for number in range(CORES)]
    text = "\n".join("".join(f"{name}\t: {value}\n" for name, value in core.items()) for core in cores)
    (folder / "cpuinfo").write_text(text)
    processors = folder / "sys/devices/system/cpu"
    processors.mkdir(parents=True)
    for name in ("online", "possible", "present"):
        (processors / name).write_text(f"0-{CORES - 1}\n")


def _need_tools() -> None:
    lacking = sorted({package for program, package in TOOLS.items() if shutil.which(program) is None})
    if not lacking:
        return
    if shutil.which("apt-get") is None:
        sys.exit(f"install {', '.join(lacking)} by this machine's own means")
    quiet = {"DEBIAN_FRONTEND": "noninteractive", **os.environ}
    subprocess.run(["apt-get", "update", "-q"], env=quiet, check=True, stdout=sys.stderr)
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *lacking]
    subprocess.run(install, env=quiet, check=True, stdout=sys.stderr)


def _mirror() -> list[str]:
    """Where this machine gets its own Debian packages; nothing, which is debootstrap's choice, where it has none."""
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian"]
    found = subprocess.run([*asked, "Component: main"], capture_output=True, text=True, check=False).stdout.split()
    return [uri for uri in found if "security" not in uri][:1]


def _kernel_runs(root: Path) -> bool:
    """Whether the kernel runs programs of the root, after having been told how where it may be."""
    if _true(root):
        return True
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)], capture_output=True, check=False)
    subprocess.run(["update-binfmts", "--enable", "qemu-aarch64"], capture_output=True, check=False)
    return _true(root)


def _true(root: Path) -> bool:
    return subprocess.run(["chroot", str(root), "/bin/true"], capture_output=True, check=False).returncode == 0


def _set_up(root: Path) -> bool:
    """Finish the root: as on a device where its programs run, and otherwise by unpacking alone."""
    if _kernel_runs(root):
        second = ["unshare", "--mount", "chroot", str(root), "/debootstrap/debootstrap", "--second-stage"]
        subprocess.run(second, check=True, stdout=sys.stderr)
        return True
    for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
        unpack = 'dpkg-deb --fsys-tarfile "$1" | tar -x --keep-directory-symlink -C "$2"'
        subprocess.run(["sh", "-euc", unpack, "sh", str(package), str(root)], check=True)
    return False


def shown(path: Path, root: Root) -> str:
    """A file below the shared folder as the root sees it."""
    return f"{SHARED}/{path.relative_to(root.shared)}"
