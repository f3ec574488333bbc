"""``edgekit zoo``: list, train and export the reference networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from edgekit.cli import options, output
from edgekit.cli.export import show_written
from edgekit.errors import require
from edgekit.report.formats import percent

if TYPE_CHECKING:
    from edgekit.zoo.training import TrainingState

__all__ = ["EXAMPLE", "app"]

EXAMPLE = "edgekit zoo export msdnet-digits -o digits.edgekit"

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", epilog=f"Example: {EXAMPLE}")

NetworkName = Annotated[str, typer.Argument(metavar="NAME", help="As edgekit zoo list names it.")]


@app.callback()
def _zoo() -> None:
    """Small reference networks: list them, train them, export them."""


def _require_torch() -> Any:
    require("safetensors", extra="export", purpose="The zoo")
    return require("torch", extra="export", purpose="The zoo")


@app.command("list", epilog="Example: edgekit zoo list")
def list_networks(json: options.Json = False) -> None:
    """Show the networks, their data, and whether trained weights are there."""
    _require_torch()
    from edgekit.zoo.registry import NETWORKS, WEIGHTS

    found = [
        {
            "name": network.name,
            "summary": network.summary,
            "exits": network.config.exits,
            "input_shape": network.input_shape,
            "data": list(network.files),
            "trained": (WEIGHTS / f"{network.name}.safetensors").exists(),
        }
        for network in NETWORKS.values()
    ]

    def draw(console: Console) -> None:
        table = Table()
        for heading in ("name", "what", "weights", "trained from"):
            table.add_column(heading)
        for each in found:
            files = each["data"]
            needs = ", ".join(files) if isinstance(files, list) and files else "data that come with scikit-learn"
            table.add_row(str(each["name"]), str(each["summary"]), "yes" if each["trained"] else "no", needs)
        console.print(table)

    output.show({"networks": found}, as_json=json, draw=draw)


@app.command(epilog="Example: edgekit zoo train msdnet-cifar10 --data cifar10/ --output trained/")
def train(
    name: NetworkName,
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder of checkpoint, weights and model card.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of the training data, where one is needed.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Instead of the recipe's.")] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of torch; its own choice if not given.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Train a network, then write its weights and model card.

    Run again after an interruption, it goes on from the last whole epoch; after the end, it evaluates and writes.
    """
    torch = _require_torch()
    from edgekit.zoo.produce import CHECKPOINT, produce

    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = folder / CHECKPOINT
    with output.Bars() as progress:

        def report(state: TrainingState) -> None:
            done = (state.epoch - 1) * state.steps + state.step
            progress("train", done, state.epochs * state.steps)
            if state.accuracy is not None:
                exits = " ".join(percent(value) for value in state.accuracy)
                output.remark(
                    f"epoch {state.epoch}/{state.epochs}  loss {state.loss:.3f}  exits {exits}  {state.elapsed_s:.0f} s"
                )

        try:
            training = produce(name, folder, data=data, epochs=epochs, report=report, progress=progress)
        except KeyboardInterrupt:
            kept = f"run it again to go on from {checkpoint}" if checkpoint.exists() else "no epoch was finished"
            raise KeyboardInterrupt(f"training interrupted; {kept}") from None

    def draw(console: Console) -> None:
        exits = ", ".join(percent(value) for value in training.accuracy)
        console.print(f"{name}: {training.parameters:,} parameters, accuracy of the exits {exits}")
        console.print(f"wrote {folder / name}.safetensors and {folder / name}.md", soft_wrap=True)

    output.show({**msgspec.to_builtins(training), "output": str(folder)}, as_json=json, draw=draw)


@app.command(epilog="Example: edgekit zoo export msdnet-digits -o digits.edgekit")
def export(
    name: NetworkName,
    path: Annotated[Path, typer.Option("-o", "--output", help="Bundle to write.")],
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Trained by yourself, instead of those that come with edgekit.")
    ] = None,
    targets: options.Targets = "onnx",
    overwrite: options.Overwrite = False,
    packed: options.Packed = False,
    json: options.Json = False,
) -> None:
    """Export a trained network as a bundle."""
    _require_torch()
    import edgekit
    from edgekit.zoo.registry import find, load

    network = find(name)
    with output.Bars() as progress:
        bundle = edgekit.export(
            load(name, weights=weights),
            (network.example(),),
            path,
            targets=options.targets(targets),
            name=name,
            preprocess=network.preprocess,
            classes=network.classes,
            overwrite=overwrite,
            packed=packed,
            progress=progress,
        )
    with bundle:
        show_written(bundle, as_json=json)
