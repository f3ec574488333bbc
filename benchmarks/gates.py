"""Networks with gates: what is left out on paper, and in time. Prints one JSON.

    python benchmarks/gates.py --json

Gated networks of the zoo on real images, one thread, batch 1 and 32. The peer is the network as its authors wrote it,
one static ONNX graph that computes everything and multiplies by masks, inputs and outputs bound beforehand. For every
batch, medians of interleaved runs of both; the sums over all batches are compared. At batch 1 also the staged network
with every gate forced open: what cutting costs when nothing is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from measuring import DATA, Bound, interleaved, load_images, open_static, write_onnx
from torch import Tensor, nn

import edgekit
from edgekit.session import Session
from edgekit.zoo import registry

NETWORKS = ("skipnet38-cifar10", "skipnet38-rnn-cifar10", "blockdrop-cifar10", "moe-cifar10")
BATCHES = (1, 32)


class LogitsOnly(nn.Module):
    """A network without the masks and probabilities that it returns besides: the peer need not hand them out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        returned = self.network(x)
        return returned if isinstance(returned, Tensor) else returned[0]


def macs(session: Session, executed: Mapping[str, int]) -> int:
    """Multiply-accumulates of so many rows of each stage."""
    counts = {stage.name: stage.macs for stage in session.plan.stages}
    return sum((counts[name] or 0) * rows for name, rows in executed.items())


def compare(
    session: Session, whole: onnxruntime.InferenceSession, images: np.ndarray, *, batch: int, rounds: int
) -> dict[str, Any]:
    """Staged against masked, summed over batches of images."""
    every = dict.fromkeys((gate.name for gate in session.plan.gates), True)
    totals = {"masked": 0.0, "staged": 0.0, "open": 0.0}
    used = all_open = 0
    for begin in range(0, len(images) - batch + 1, batch):
        x = np.ascontiguousarray(images[begin : begin + batch])
        peer = Bound(whole, {"x": x})
        if not np.allclose(peer(x), session.run(x).logits, atol=1e-4):
            raise SystemExit(f"images {begin} to {begin + batch}: the staged network answers otherwise")
        calls = {
            "masked": lambda peer=peer, x=x: peer(x),
            "staged": lambda x=x: session.run(x),
            "open": lambda x=x: session.run(x, gates=every),
        }
        for name, seconds in interleaved(calls, rounds=rounds).items():
            totals[name] += seconds
        used += macs(session, session.run(x).executed)
        all_open += macs(session, session.run(x, gates=every).executed)
    batches = len(images) // batch
    time_left_out, macs_left_out = 1 - totals["staged"] / totals["masked"], 1 - used / all_open
    return {
        "batch": batch,
        "mean_of_medians_s": {name: seconds / batches for name, seconds in totals.items()},
        "macs_left_out": macs_left_out,
        "time_left_out": time_left_out,
        "time_over_macs_left_out": time_left_out / macs_left_out if macs_left_out else None,
        "masked_over_staged": totals["masked"] / totals["staged"],
        "all_open_over_masked": totals["open"] / totals["masked"],
    }


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One network at every batch."""
    network, model = registry.find(name), registry.load(name)
    images, source = load_images(network, options.data)
    images = images[: options.images]
    bundle = edgekit.export(model, torch.from_numpy(images[:2]), folder / f"{name}.edgekit")
    whole = open_static(write_onnx(LogitsOnly(model), folder / f"{name}.onnx"))
    with edgekit.load(bundle, threads=1) as session:
        results = [compare(session, whole, images, batch=batch, rounds=options.rounds) for batch in BATCHES]
    return {
        "network": name,
        "images": source,
        "count": len(images),
        "gates": len(bundle.plan.gates),
        "results": results,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone (the default; kept for clarity)")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="of the zoo")
    parser.add_argument("--images", type=int, choices=(32, 64), default=64, help="how many")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved turns of each variant, for each batch")
    parser.add_argument("--data", type=Path, default=DATA, help="CIFAR images")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="edgekit-benchmark-") as name:
        measured = [measure(network, Path(name), options) for network in options.networks]
    ratios = [result["masked_over_staged"] for each in measured for result in each["results"]]
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    print(
        json.dumps({"versions": versions, "networks": measured, "median_speed_up": statistics.median(ratios)}, indent=1)
    )


if __name__ == "__main__":
    main()
