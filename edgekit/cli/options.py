"""Options that several verbs share, and how their text is read."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgekit.artifacts import FLOAT
from edgekit.errors import InputError

if TYPE_CHECKING:
    from edgekit.interfaces import Meter, Target
    from edgekit.session import Session

__all__ = [
    "BundlePath",
    "DataSource",
    "Force",
    "Json",
    "LossName",
    "Minimize",
    "Overwrite",
    "Packed",
    "PolicyName",
    "Precision",
    "ProfilePath",
    "Runtime",
    "Targets",
    "Temperature",
    "Threads",
    "find_users_code",
    "meter",
    "names",
    "numbers",
    "runtime_options",
    "share",
    "targets",
    "uncalibrated",
]

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle folder or packed file.")]
DataSource = Annotated[
    str,
    typer.Option("--data", help="An .npz file, an image folder, a tar or zip of one, or module:callable."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Take a policy certified for other artifacts; its certificate ends.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for machines.")]
Minimize = Annotated[
    Literal["latency", "energy", "macs"] | None,
    typer.Option("--minimize", help="Latency is measured here unless --profile is given. [default: macs]"),
]
ProfilePath = Annotated[Path | None, typer.Option("--profile", help="Latency and energy from edgekit profile.")]
Temperature = Annotated[bool, typer.Option("--temperature/--no-temperature", help="Fit one per exit first.")]
LossName = Annotated[
    str,
    typer.Option("--loss", help="gap (accuracy), consistency (with the last exit; no labels needed) or brier."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there already.")]
Packed = Annotated[bool, typer.Option("--packed", help="Write one file instead of a folder.")]
PolicyName = Annotated[
    str | None,
    typer.Option("--policy", help="A saved policy. Without it: 'default' when there is one, else no early exit."),
]
Precision = Annotated[
    str, typer.Option("--precision", help="Of the artifacts: float32, or what edgekit quantize wrote, as int8.")
]
Runtime = Annotated[
    str,
    typer.Option("--runtime", help="What runs the stages, as onnxruntime:provider=cuda; edgekit doctor lists them."),
]
Targets = Annotated[
    str, typer.Option("--target", help="Kinds of device to write for, separated by commas, as onnx,litert:batch=8.")
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of the runtime.")]


def names(text: str) -> tuple[str, ...]:
    """``"a,b"`` is ``("a", "b")``.

    Raises:
        InputError: a name is empty.
    """
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise InputError(f"'{text}': a name is missing; separate names by single commas")
    return parts


def numbers(text: str, *, option: str) -> tuple[float, ...]:
    """``"0.5,0.25"`` is ``(0.5, 0.25)``.

    Raises:
        InputError: something else.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(value) for value in values):
        raise InputError(f"{option} {text}: expected numbers separated by commas, as {option} 0.5,0.5,0.5")
    return values


def share(text: str, *, option: str) -> float:
    """``"1%"`` and ``"0.01"`` are 0.01.

    Raises:
        InputError: something else, or not between 0 and 1.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if rest or not 0 <= value <= 1:
        raise InputError(f"{option} {text}: expected a share, as {option} 1% or {option} 0.01")
    return value


def meter(text: str | None) -> Meter | None:
    """A meter by name, with options: ``replay:power.csv``, or ``ina:chip=ina226,bus=1,address=0x40,shunt_ohms=0.1``.

    Raises:
        PluginError: there is none of that name, or it does not take these options.
    """
    if text is None:
        return None
    from edgekit import plugins

    name, given = _named(text, alone="path")
    made: Meter = plugins.create("meters", name, **given)
    return made


def runtime_options(text: str) -> dict[str, Any]:
    """``onnxruntime:provider=cuda`` as the arguments of :func:`edgekit.load`: the name, and options of the runtime.

    Raises:
        InputError: an option has no value.
    """
    name, given = _named(text, alone="")
    if "" in given:
        raise InputError(f"--runtime {text}: options are name=value, as --runtime onnxruntime:provider=cuda")
    return {"runtime": name, **given}


def targets(text: str) -> tuple[str | Target, ...]:
    """``onnx,litert:batch=8`` as the argument of :func:`edgekit.export`: one with an option is made.

    Raises:
        InputError: a name is empty, or an option has no value.
        PluginError: there is no such target, or it does not take that option.
        MissingExtraError: the library behind it is not installed.
    """
    from edgekit import plugins

    found: list[str | Target] = []
    for part in names(text):
        name, given = _named(part, alone="")
        if "" in given:
            raise InputError(f"--target {part}: an option is name=value, as --target litert:batch=8")
        made: str | Target = plugins.create("targets", name, **given) if given else name
        found.append(made)
    return tuple(found)


def _named(text: str, *, alone: str) -> tuple[str, dict[str, bool | int | float | str]]:
    """``name:key=value,key=value``; a single value without a key has the key ``alone``."""
    name, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",")] if rest else []
    if len(pairs) == 1 and not pairs[0][1]:
        pairs = [(alone, "=", rest)]
    return name, {key: _plain(value) for key, _, value in pairs}


def _plain(text: str) -> bool | int | float | str:
    """``0x40`` is 64, ``0.1`` a number, ``true`` and ``false`` are what they say, anything else text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    with suppress(ValueError):
        return int(text, 0)
    with suppress(ValueError):
        return float(text)
    return text


@contextmanager
def uncalibrated(path: Path, *, runtime: str, threads: int, precision: str = FLOAT) -> Iterator[Session]:
    """A session that no saved policy can keep from opening, as one made for other artifacts."""
    import edgekit
    from edgekit.bundle import Bundle

    with Bundle.open(path) as bundle:
        never = edgekit.Policy.never(len(bundle.plan.exits))
        with edgekit.load(
            bundle, **runtime_options(runtime), threads=threads, precision=precision, policy=never
        ) as session:
            yield session


def find_users_code() -> None:
    """Let ``module:callable`` name a module in the current folder."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
