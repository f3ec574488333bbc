"""Puts the verbs together and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgekit.cli import (
    build,
    calibrate,
    compare,
    doctor,
    export,
    inspect,
    output,
    parity,
    profile,
    propose,
    quantize,
    report,
    run,
    zoo,
)
from edgekit.errors import EdgekitError

__all__ = ["app", "main"]

FAILED = 1
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


class Verbs(TyperGroup):
    """The verbs, in the order in which they are used; errors made on purpose become one line on standard error."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except EdgekitError as error:
            output.complain(str(error))
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            output.complain(str(error) or "interrupted; nothing half-written was left")
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: edgekit doctor",
)

for name, verb in {
    "export": export,
    "inspect": inspect,
    "parity": parity,
    "quantize": quantize,
    "build": build,
    "run": run,
    "propose": propose,
    "calibrate": calibrate,
    "profile": profile,
    "report": report,
    "compare": compare,
    "doctor": doctor,
}.items():
    app.command(name, epilog=f"Example: {verb.EXAMPLE}")(verb.command)
app.add_typer(zoo.app, name="zoo")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"edgekit {version('edgekit')}")
        raise typer.Exit


@app.callback()
def _edgekit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """Dynamic networks on edge devices: cut where they decide, run stage by stage, calibrated, measured."""


def main() -> None:
    """What the ``edgekit`` command runs."""
    app(prog_name="edgekit")
