"""What the HTML pages share: how a template is loaded, with its partial templates and plotly's script."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING

from edgekit.errors import require
from edgekit.report.formats import moment

if TYPE_CHECKING:
    import jinja2

__all__ = ["template"]


def template(name: str, **filters: Callable[..., str]) -> jinja2.Template:
    """A page of ``templates/``, ready to render; ``plotly`` is its script in it.

    Args:
        name: file name.
        **filters: what the page writes values with, besides ``moment``.

    Raises:
        MissingExtraError: plotly or jinja2 is not installed.
    """
    library = require("jinja2", extra="report", purpose="An HTML report")
    plotly = require("plotly.offline", extra="report", purpose="An HTML report")
    environment: jinja2.Environment = library.Environment(
        loader=library.FunctionLoader(_source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=library.StrictUndefined,
    )
    # Figures are in the order in which the page offers them.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.filters |= {"moment": moment, **filters}
    environment.globals["plotly"] = plotly.get_plotlyjs()
    return environment.get_template(name)


def _source(name: str) -> str:
    return files("edgekit.report").joinpath("templates", name).read_text(encoding="utf-8")
