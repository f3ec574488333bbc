"""Reports are written aside and renamed into place: a crash leaves the old file or the new one, never half of one."""

from __future__ import annotations

import os
from pathlib import Path

from edgekit.errors import MeasurementError

__all__ = ["write_aside"]


def write_aside(path: str | Path, content: str | bytes) -> Path:
    """Write a file; text as UTF-8.

    Raises:
        MeasurementError: it cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.part")
    try:
        try:
            aside.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise MeasurementError(f"{path}: the report cannot be written ({error.strerror}); name another") from error
    return path
