"""What the ExecuTorch runtime needs of the library around its stages: loading, threads, its log, and its recordings."""

from __future__ import annotations

import gc
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakSet

import msgspec

from edgekit.errors import MeasurementError, PluginError, require

__all__ = ["first_line", "hold_threads", "listening", "load_library", "recorded_operators", "set_threads"]

LOG_LINE = re.compile(r"\[\w+\.(?:cpp|h):\d+\] (.*)")
"""How ExecuTorch writes a line to standard error."""

_holding: WeakSet[object] = WeakSet()
"""What holds the pool of threads: there is one for the process, so there is one list."""


def load_library() -> tuple[Any, Any]:
    """Torch, and ExecuTorch's library.

    Raises:
        MissingExtraError: one of them is not installed.
        PluginError: one of them does not load.
    """
    purpose = "Running on ExecuTorch"
    mend = "install versions of executorch and torch that belong together"
    require("executorch.version", extra="executorch", purpose=purpose)
    torch = require("torch", extra="executorch", purpose=purpose, mend=mend)
    # Not its public wrappers: they import the whole exporter, which takes seconds.
    return torch, require("executorch.extension.pybindings._C", extra="executorch", purpose=purpose, mend=mend)


def hold_threads(holder: object) -> None:
    """Say that something holds the pool of threads, for as long as it lives."""
    _holding.add(holder)


def set_threads(library: Any, threads: int) -> None:
    """Set the pool of threads of the process. What holds it would crash if it were replaced.

    Raises:
        PluginError: something holds one of another size.
    """
    with listening():
        now = library._threadpool_get_thread_count()
    if now == threads:
        return
    if _holding:
        gc.collect()  # what was bound may live on in a cycle for a while
    if _holding:
        raise PluginError(
            f"runtime 'executorch': open stages hold ExecuTorch's one pool of {now} threads; "
            f"close their session before opening one with threads={threads}"
        )
    with listening():
        library._unsafe_reset_threadpool(threads)


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collects the lines that ExecuTorch's library logs to ``sys.stderr``; what else is written there is passed on."""
    said: list[str] = []
    written = io.StringIO()
    try:
        with redirect_stderr(written):
            yield said
    finally:
        for line in written.getvalue().splitlines(keepends=True):
            found = LOG_LINE.match(line)
            if found:
                said.append(found[1].strip())
            elif sys.stderr is not None:
                sys.stderr.write(line)


def first_line(error: Exception) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class _Profile(msgspec.Struct):
    """Of a recording; times in nanoseconds."""

    name: str | None = None
    instruction_id: int = 0
    delegate_debug_id_str: str | None = None
    start_time: int = 0
    end_time: int = 0


class _Event(msgspec.Struct):
    profile_event: _Profile | None = None


class _Run(msgspec.Struct):
    name: str = ""
    events: list[_Event] | None = None


class _Recording(msgspec.Struct):
    run_data: list[_Run]


def recorded_operators(library: Any, program: Any) -> Iterator[tuple[str, str, float]]:
    """Place, kind and seconds of every call of an operator, in the order of a program's recording.

    Raises:
        MeasurementError: it cannot be read.
    """
    for event in _events(library, program):
        place, seconds = event.instruction_id, (event.end_time - event.start_time) * 1e-9
        if event.delegate_debug_id_str:  # XNNPACK numbers those of a kind
            kind = re.sub(r" #\d+$", "", event.delegate_debug_id_str)
            yield f"{place} {event.delegate_debug_id_str}", kind, seconds
        elif event.name and event.name.startswith("native_call_"):
            kind = event.name.removeprefix("native_call_")
            yield f"{place} {kind}", kind, seconds


def _events(library: Any, program: Any) -> list[_Profile]:
    """What a program recorded of its runs, which ExecuTorch's own ``flatc`` turns into JSON."""
    root = Path(library.__file__).parents[2]
    schema = root / "devtools" / "etdump" / "etdump_schema_flatcc.fbs"
    options = ("--json", "--defaults-json", "--strict-json", "--raw-binary", "--size-prefixed")
    with TemporaryDirectory(prefix="edgekit-operators-") as folder:
        dump = Path(folder) / "recorded.etdp"
        program.write_etdump_result_to_file(str(dump), None)
        command: list[str | Path] = [root / "data" / "bin" / "flatc", *options, "-o", folder, schema, "--", dump]
        try:
            subprocess.run(command, check=True, capture_output=True)
            found = msgspec.json.decode(dump.with_suffix(".json").read_bytes(), type=_Recording)
        except (OSError, subprocess.CalledProcessError, msgspec.DecodeError) as error:
            raise MeasurementError(
                f"ExecuTorch's recording cannot be read ({first_line(error)}); measure fewer runs"
            ) from error
    events = [event.profile_event for run in found.run_data if run.name == "Execute" for event in run.events or ()]
    return [event for event in events if event is not None]
