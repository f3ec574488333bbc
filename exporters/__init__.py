"""From a trained torch model to a bundle: capture one graph, find its exits, cut it there, lower and compare.

This room and the zoo are where torch lives. A device never needs it: what leaves here is a bundle on disk, which the
core and a runtime read on their own.
"""

if __name__ != "edgekit.exporters":
    raise ImportError(
        f"import edgekit.exporters, not {__name__}: a second copy of every class would not be the first one's equal"
    )

from edgekit.exporters.attach import add_exits, train_exits
from edgekit.exporters.export import Staged, export_bundle, stage_model

__all__ = ["Staged", "add_exits", "export_bundle", "stage_model", "train_exits"]
