"""``edgekit export``: a trained model to a bundle."""

from __future__ import annotations

import importlib
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import typer
from rich.console import Console

from edgekit.cli import inspect, options, output
from edgekit.data import Preprocess
from edgekit.errors import CaptureError, InputError, require

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit export my.models:msdnet --weights w.safetensors --input 1x3x32x32 --target onnx -o net.edgekit"

_DTYPES = ("float32", "float16", "float64", "int64", "int32", "int8", "uint8", "bool")
_INPUT = re.compile(r"(?P<sizes>[0-9]+(x[0-9]+)*)(:(?P<dtype>[a-z0-9]+))?")


def command(
    factory: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="Makes the model, called without arguments.")
    ],
    inputs: Annotated[str, typer.Option("--input", help="Shapes, batch first: 1x3x32x32[:dtype], more after commas.")],
    path: Annotated[Path, typer.Option("-o", "--output", help="Bundle to write.")],
    weights: Annotated[Path | None, typer.Option("--weights", help="A .safetensors file to load into it.")] = None,
    targets: options.Targets = "onnx",
    exits: Annotated[str | None, typer.Option("--exits", help="Outputs or modules that are exits, in order.")] = None,
    smallest_gate: Annotated[
        int, typer.Option("--smallest-gate", min=0, metavar="MACS", help="A part that saves less is always computed.")
    ] = 10_000,
    name: Annotated[str | None, typer.Option("--name", help="Of the network; the model's class if not given.")] = None,
    mean: Annotated[
        str | None, typer.Option("--mean", help="Of the channels, full scale is 1: 0.49,0.48,0.45.")
    ] = None,
    std: Annotated[str | None, typer.Option("--std", help="Of the channels: 0.25,0.24,0.26.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="Images are resized to HEIGHTxWIDTH: 32x32.")] = None,
    classes: Annotated[str | None, typer.Option("--classes", help="Class names in label order.")] = None,
    overwrite: options.Overwrite = False,
    packed: options.Packed = False,
    json: options.Json = False,
) -> None:
    """Cut a trained network at its exits and gates into stages and write them as a bundle."""
    import edgekit

    preprocess = read_preprocess(mean, std, size)
    example = example_inputs(inputs)
    model = make_model(factory)
    if weights is not None:
        from edgekit.zoo.weight_files import load_weights

        load_weights(model, weights)
    with output.Bars() as progress:
        bundle = edgekit.export(
            model.eval(),
            example,
            path,
            targets=options.targets(targets),
            exits=options.names(exits) if exits is not None else None,
            smallest_gate=smallest_gate,
            name=name,
            preprocess=preprocess,
            classes=options.names(classes) if classes is not None else (),
            overwrite=overwrite,
            packed=packed,
            progress=progress,
        )
    with bundle:
        show_written(bundle, as_json=json)


def show_written(bundle: Any, *, as_json: bool) -> None:
    """A bundle just written: its tree, what was found, and where it lies."""

    def draw(console: Console) -> None:
        inspect.draw(bundle, console)
        console.print(f"found {inspect.found(bundle)}")
        console.print(f"wrote {bundle.path}", soft_wrap=True)

    output.show(inspect.facts(bundle), as_json=as_json, draw=draw)


def make_model(text: str) -> nn.Module:
    """What ``package.module:factory`` makes; a module that is there already is taken as it is.

    Raises:
        CaptureError: it cannot be imported, fails, or makes something else.
    """
    torch = require("torch", extra="export", purpose="Exporting")
    module, colon, attribute = text.partition(":")
    if not (module and colon and attribute):
        raise CaptureError(f"'{text}': a model is named package.module:factory")
    options.find_users_code()
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        made = found if isinstance(found, torch.nn.Module) else found()
    except Exception as error:  # whatever a user's module does is reported as one line, with its place
        raise CaptureError(
            f"{text}: {type(error).__name__}: {error}{_place(error)}; "
            "it must import from here and make the model when called without arguments"
        ) from error
    if not isinstance(made, torch.nn.Module):
        raise CaptureError(f"{text}: made a {type(made).__name__}, not a torch.nn.Module")
    return cast("nn.Module", made)


def _place(error: Exception) -> str:
    """Where in the user's code it happened, when it was there."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename != __file__ and Path(frame.filename).is_file() and "importlib" not in frame.filename:
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


def example_inputs(text: str) -> tuple[NDArray[Any], ...]:
    """Noise, or zeros for integers, of shapes written as ``1x3x32x32[:dtype]``, separated by commas.

    Raises:
        InputError: something else.
    """
    return tuple(_example(part.strip(), text) for part in text.split(","))


def _example(part: str, text: str) -> NDArray[Any]:
    match = _INPUT.fullmatch(part)
    if match is None:
        raise InputError(f"--input {text}: '{part}' is no shape; write 1x3x32x32 or 1x3x32x32:float32, batch first")
    shape = [int(size) for size in match["sizes"].split("x")]
    if 0 in shape:
        raise InputError(f"--input {text}: '{part}' has a size of 0")
    name = match["dtype"] or "float32"
    if name not in _DTYPES:
        raise InputError(f"--input {text}: '{name}' is no dtype; use {', '.join(_DTYPES)}")
    if not name.startswith("float"):
        return np.zeros(shape, dtype=name)
    return np.random.default_rng(0).standard_normal(shape).astype(name)


def read_preprocess(mean: str | None, std: str | None, size: str | None) -> Preprocess | None:
    """Preprocessing as the options say, ``None`` when they say nothing.

    Raises:
        InputError: only some are given, or one cannot be read.
    """
    if mean is None and std is None and size is None:
        return None
    if mean is None or std is None:
        raise InputError("preprocessing needs both --mean and --std, one number per channel")
    means = options.numbers(mean, option="--mean")
    pixels = None
    if size is not None:
        match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", size)
        if match is None:
            raise InputError(f"--size {size}: expected HEIGHTxWIDTH, as --size 32x32")
        pixels = (int(match[1]), int(match[2]))
    return Preprocess(mean=means, std=options.numbers(std, option="--std"), size=pixels, channels=len(means))
