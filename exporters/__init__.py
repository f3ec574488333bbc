"""From a trained torch model to a bundle: capture one graph, find its exits, cut it there, lower and compare.

This room and the zoo are where torch lives. A device never needs it: what leaves here is a bundle on disk, which the
core and a runtime read on their own. What a device does use, the builder of TensorRT's engines, imports no torch, so
the verbs are imported when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "edgekit.exporters":
    raise ImportError(
        f"import edgekit.exporters, not {__name__}: a second copy of every class would not be the first one's equal"
    )

if TYPE_CHECKING:
    from edgekit.exporters.attach import add_exits, train_exits
    from edgekit.exporters.export import Staged, export_bundle, stage_model

__all__ = ["Staged", "add_exits", "export_bundle", "stage_model", "train_exits"]

_HOMES = {"add_exits": "attach", "train_exits": "attach"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"edgekit.exporters.{_HOMES.get(name, 'export')}"), name)
