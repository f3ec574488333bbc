"""Which of a stage's files computes what is asked for, for runtimes that compute every node of a file.

See :mod:`edgekit.exporters.to_onnx` for the files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from edgekit.bundle import variant
from edgekit.errors import BundleError
from edgekit.plan import SCORES, Stage

__all__ = ["serving", "variants"]


def variants(stage: Stage, artifact: Path) -> dict[tuple[str, ...], Path]:
    """The stage's files by the outputs that they compute; a file with nothing beside it computes all."""
    beside = {name: variant(artifact, name) for name in (*SCORES, "trunk")}
    found = {name: file for name, file in beside.items() if stage.exit and file.is_file()}
    if not found:
        return {stage.outputs: artifact}
    live, (logits, *scores) = stage.live, stage.head
    outputs = {name: (*live, logits, score) for name, score in zip(SCORES, scores, strict=True)}
    outputs["trunk"] = live
    return {(*live, logits): artifact, **{outputs[name]: file for name, file in found.items()}}


def serving(
    stage: Stage,
    files: Mapping[tuple[str, ...], Path],
    outputs: Sequence[str],
    *,
    opened: Collection[tuple[str, ...]],
) -> tuple[str, ...]:
    """Outputs of the file to use: one that is open already, or the smallest that computes what is asked for.

    Raises:
        BundleError: none computes all of it.
    """
    fitting = [made for made in files if set(outputs).issubset(made)]
    if not fitting:
        raise BundleError(f"stage '{stage.name}': no file computes {', '.join(outputs)} together")
    return next((made for made in fitting if made in opened), min(fitting, key=len))
