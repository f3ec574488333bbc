"""How long capture, partition and export take, against one plain export. Prints one JSON.

    python benchmarks/export.py --json

A network of 110 layers with a gate at each of its 54 blocks, as SkipNet's authors wrote it. The peer is one
``torch.onnx.export`` of the whole masked network. edgekit's time holds everything: finding the gates, cutting, writing
every stage, opening each in ONNX Runtime and comparing every gate setting with the whole graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import write_onnx

import edgekit
from edgekit.zoo import registry
from edgekit.zoo.skipnet import untrained_skipnet110


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone (the default; kept for clarity)")
    parser.add_argument("--network", help="of the zoo, instead of the one of 110 layers")
    parser.add_argument("--rounds", type=int, default=1, help="of both, in turn; several minutes each")
    options = parser.parse_args(arguments)
    model = registry.load(options.network) if options.network else untrained_skipnet110()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    measured: dict[str, list[float]] = {"torch.onnx.export": [], "edgekit.export": []}
    with tempfile.TemporaryDirectory(prefix="edgekit-benchmark-") as name:
        folder = Path(name)
        for _ in range(options.rounds):
            measured["torch.onnx.export"].append(seconds(lambda: write_onnx(model, folder / "whole.onnx")))
            measured["edgekit.export"].append(
                seconds(lambda: edgekit.export(model, x, folder / "net.edgekit", overwrite=True))
            )
        plan = edgekit.Bundle.open(folder / "net.edgekit").plan
    medians = {which: statistics.median(values) for which, values in measured.items()}
    print(
        json.dumps(
            {
                "versions": {"torch": torch.__version__},
                "network": options.network or "SkipNet, 110 layers",
                "gates": len(plan.gates),
                "stages": len(plan.stages),
                "rounds": options.rounds,
                "median_s": medians,
                "ratio": medians["edgekit.export"] / medians["torch.onnx.export"],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
