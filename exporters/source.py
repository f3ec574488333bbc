"""Places in the model's own source, for errors that say which line."""

from __future__ import annotations

import linecache
import re
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch.fx import Node

__all__ = ["Place", "reason", "running", "where"]


def where(node: Node) -> str:
    """The line that made a node, as ``" (line 3 of net.py: y = f(x))"``; empty when unknown."""
    return next(reversed(_own_frames(node.meta.get("stack_trace") or "")), "")


def _own_frames(text: str) -> list[str]:
    """Places in the model's own source that a text of PyTorch's names, outermost first."""
    found = re.findall(r'File "([^"<]+)", line (\d+), in [^,\n]+(?:, code: |\n\s+)(.*)', text)
    return [f" (line {line} of {Path(file).name}: {code})" for file, line, code in found if _is_own(file)]


def _is_own(file: str) -> bool:
    """Whether a source file is the model's, not a library's or ours."""
    ours = (str(Path(__file__).parent), str(Path(torch.__file__).parent), sys.base_prefix)
    return "site-packages" not in file and not file.startswith(("<", *ours))


def reason(error: BaseException) -> str:
    """Why a capture failed, in one line, with the place in the model's own source."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    place = _place(error)
    if "data-dependent" in str(error).lower() or type(error).__name__ == "GuardOnDataDependentSymNode":
        return f"a Python branch depends on tensor values{place}"
    return f"{type(error).__name__}: {text}{place}"


def _place(error: BaseException) -> str:
    """The innermost frame that belongs to the model's own source."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _is_own(frame.filename):
            return f" (line {frame.lineno} of {Path(frame.filename).name}: {frame.line})"
    return next(iter(_own_frames(str(error))), "")


@dataclass(frozen=True)
class Place:
    """Where a running forward is.

    Attributes:
        calls: every call on the way there, with the module that it is of: tells one layer's line from another's.
        line: the innermost one alone.
        text: as :func:`where` writes it.
    """

    calls: tuple[tuple[str, int, int, int], ...]
    line: tuple[str, int, int]
    text: str = field(compare=False)

    def __str__(self) -> str:
        return self.text


def running(until: CodeType) -> Place:
    """The place in the model's source that is being run, inside the call of ``until``."""
    calls = []
    frame: FrameType | None = sys._getframe(1)
    libraries = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    while frame is not None and frame.f_code is not until:
        if not frame.f_code.co_filename.startswith(libraries):
            owner = frame.f_locals.get("self")
            module = id(owner) if isinstance(owner, torch.nn.Module) else 0
            calls.append((frame.f_code.co_filename, frame.f_lineno, frame.f_lasti, module))
        frame = frame.f_back
    file, line, instruction, _ = calls[0] if calls else ("", 0, 0, 0)
    code = linecache.getline(file, line).strip()
    text = f" (line {line} of {Path(file).name}: {code})" if code else ""
    return Place(tuple(calls), (file, line, instruction), text)
