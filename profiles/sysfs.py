"""Reading the kernel's files, the same way in every meter."""

from __future__ import annotations

from pathlib import Path

from edgekit.errors import MeasurementError

__all__ = ["board", "label", "number", "optional", "sense", "unreadable"]

SENTINELS = frozenset(
    limit * scale for limit in (2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1) for scale in (1, 1_000, 1_000_000)
)
"""What drivers hand out for "no value": all bits of a register, also after conversion from milli to micro units."""
BOARD_FILES = ("proc/device-tree/model", "proc/device-tree/compatible", "sys/devices/soc0/machine")
"""Who the board is. Containers often hide the device tree; the third file is the kernel's copy of the first."""


def number(path: Path) -> int:
    """The integer in a file; some drivers write its unit behind it, as ``0 ms``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no integer.
    """
    return int((path.read_text().split() or [""])[0])


def optional(path: Path) -> int | None:
    """The integer in a file; ``None`` when there is none."""
    try:
        return number(path)
    except (OSError, ValueError):
        return None


def label(path: Path) -> str:
    """The text in a file, without its line end; ``""`` when it cannot be read."""
    try:
        return path.read_text(errors="replace").strip().strip("\0")
    except OSError:
        return ""


def sense(meter: str, path: Path, *, counter: bool = False) -> int:
    """The integer in a sensor's file, in the midst of a measurement.

    Args:
        meter: name, for the message.
        path: of the file.
        counter: that any integer is possible; of other sensors, what stands for "no value" is refused.

    Raises:
        MeasurementError: it cannot be read, or has no value.
    """
    try:
        value = number(path)
    except (OSError, ValueError) as error:
        raise MeasurementError(f"{meter}: {path} can no longer be read ({_why(error)}); measure again") from error
    if value in SENTINELS and not counter:
        raise MeasurementError(f"{meter}: {path} says {value}, which stands for no value; use another meter")
    return value


def unreadable(path: Path, *, fix: str = "", counter: bool = False) -> str | None:
    """Why a sensor's file cannot be read, with what would help; ``None`` when it can.

    Args:
        path: of the file.
        fix: the command that permits it; without one, the command that permits this file until the next start.
        counter: as for :func:`sense`.
    """
    try:
        value = number(path)
    except PermissionError:
        return f"{path} is for root only; run as root, or allow it: {fix or f'sudo chmod a+r {path}'}"
    except (OSError, ValueError) as error:
        return f"{path} cannot be read ({_why(error)}); use another meter"
    if value in SENTINELS and not counter:
        return f"{path} says {value}, which stands for no value; use another meter"
    return None


def board(root: Path) -> str:
    """What the device tree says of the board: model, then what it is compatible with; ``""`` when it is not there."""
    texts = [label(root / path).replace("\0", " ") for path in BOARD_FILES]
    return " ".join(filter(None, texts))


def _why(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
