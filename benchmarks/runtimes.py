"""Each runtime's staged network against that runtime's own whole static graph. Prints one JSON.

    python benchmarks/runtimes.py --json

The CIFAR MSDNet (exits) and SkipNet (gates) of the zoo, batch 1, with one thread and two, in float32 and int8. The peer
is what people ship: the whole network with all heads, or one that computes everything and multiplies by masks,
converted by the same library and called through its own interpreter. Medians of interleaved runs, over the peer's:

- ``last_exit``: staged, forced to the last exit, every gate open: what cutting costs;
- ``as_decided``: gates as the network has them; at exits, half of those that get there leave.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from gates import LogitsOnly
from measuring import DATA, interleaved, load_images
from peers import PEERS, Peer
from torch import nn

import edgekit
from edgekit.bundle import Bundle
from edgekit.data import load_dataset
from edgekit.runtimes.ort_threads import share_threads
from edgekit.session import Session
from edgekit.zoo import registry

NETWORKS = ("msdnet-cifar10", "skipnet38-cifar10")
TARGETS = {"onnxruntime": "onnx", "litert": "litert", "executorch": "executorch"}
INT8 = ("onnxruntime", "litert")
"""Runtimes whose whole peer is quantised here."""
SAMPLES = 512
"""That int8 is calibrated on."""
CLOSE = 1e-3
"""Largest difference from the peer's logits in float32, as a share of the largest of them."""


def halving(session: Session, images: np.ndarray) -> edgekit.Policy:
    """A policy under which half of the images that reach an exit leave there."""
    thresholds, staying = [], images
    for index in range(len(session.plan.exits) - 1):
        scores = session.run(staying, exit=index).score
        thresholds.append(float(np.median(scores)))
        staying = staying[scores < thresholds[-1]] if (scores < thresholds[-1]).any() else staying
    return edgekit.Policy.fixed(thresholds)


def compare(session: Session, peer: Peer, images: np.ndarray, *, rounds: int, exact: bool) -> dict[str, float]:
    """Staged against the peer, summed over images."""
    last = len(session.plan.exits) - 1
    every = dict.fromkeys((gate.name for gate in session.plan.gates), True)
    if last:
        session.use(halving(session, images))
    totals = {"peer": 0.0, "last_exit": 0.0, "as_decided": 0.0}
    for row in range(len(images)):
        x = np.ascontiguousarray(images[row : row + 1])
        calls: dict[str, Callable[[], Any]] = {
            "peer": lambda x=x: peer(x),
            "last_exit": lambda x=x: session.run(x, exit=last, gates=every),
            "as_decided": lambda x=x: session.run(x),
        }
        expected, given = peer(x), session.run(x, exit=last).logits
        if exact and np.abs(given - expected).max() > CLOSE * np.abs(expected).max():
            raise SystemExit(f"image {row}: the staged network answers otherwise than its peer")
        for name, seconds in interleaved(calls, rounds=rounds).items():
            totals[name] += seconds
    return {
        "peer_s": totals["peer"] / len(images),
        "last_exit_over_peer": totals["last_exit"] / totals["peer"],
        "as_decided_over_peer": totals["as_decided"] / totals["peer"],
    }


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One network with all files that are measured."""

    name: str
    bundle: Bundle
    whole: nn.Module
    path: Path
    images: np.ndarray
    source: str
    calibrating: np.ndarray


def prepare(name: str, folder: Path, options: argparse.Namespace) -> Prepared:
    """Export, quantise, and write the peers' files."""
    network, model = registry.find(name), registry.load(name)
    images, source = load_images(network, options.data)
    calibrating = np.random.default_rng(1).standard_normal((SAMPLES, *images.shape[1:])).astype(np.float32)
    if options.data.exists():
        calibrating = load_dataset(options.data, preprocess=network.preprocess).batch(np.arange(SAMPLES))
    whole = model if name.startswith("msdnet") else LogitsOnly(model)
    targets = [TARGETS[runtime] for runtime in options.runtimes]
    bundle = edgekit.export(model, torch.from_numpy(images[:2]), folder / f"{name}.edgekit", targets=targets)
    for runtime, precision in kinds(options):
        if precision == "int8":
            edgekit.quantize(bundle, calibrating, precision=precision, target=TARGETS[runtime])
        PEERS[runtime](whole, folder / name, calibrating[:64], precision=precision, threads=1)
    return Prepared(name=name, bundle=bundle, whole=whole, path=folder / name, images=images, source=source,
                    calibrating=calibrating)  # fmt: skip


def kinds(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Runtimes and precisions that are measured."""
    every = [(runtime, precision) for runtime in options.runtimes for precision in options.precisions]
    return [(runtime, precision) for runtime, precision in every if precision != "int8" or runtime in INT8]


def measure(
    network: Prepared, runtime: str, precision: str, threads: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One network on one runtime, in one precision, with a number of threads."""
    # With several threads ONNX Runtime's stages share a pool, and so does the peer: a process has one or the other.
    shared = {"shared_threads": True} if runtime == "onnxruntime" and threads > 1 else {}
    if shared:
        share_threads(onnxruntime, threads)
    peer = PEERS[runtime](network.whole, network.path, network.calibrating[:64], precision=precision, threads=threads)
    with edgekit.load(network.bundle, runtime=runtime, threads=threads, precision=precision, **shared) as session:
        measured = compare(
            session, peer, network.images[: options.images], rounds=options.rounds, exact=precision == "float32"
        )
        version_used = str(session.runtime.describe().get("version", ""))
    found = {
        "network": network.name,
        "images": network.source,
        "runtime": f"{runtime} {version_used}",
        "precision": precision,
        "threads": threads,
        **measured,
    }
    print(json.dumps(found), file=sys.stderr, flush=True)  # a runtime that crashes takes the rest along
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone (the default; kept for clarity)")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="of the zoo")
    parser.add_argument("--runtimes", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--precisions", nargs="+", default=["float32", "int8"], choices=["float32", "int8"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--images", type=int, default=8, help="how many are timed, of 64")
    parser.add_argument("--rounds", type=int, default=10, help="interleaved turns of each variant, for each image")
    parser.add_argument("--data", type=Path, default=DATA, help="CIFAR images")
    options = parser.parse_args(arguments)
    if len([threads for threads in options.threads if threads > 1]) > 1:
        parser.error("--threads: one number above 1 in a process, which has one pool of ONNX Runtime's threads")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="edgekit-benchmark-") as name:
        networks = [prepare(network, Path(name), options) for network in options.networks]
        found = [
            measure(network, runtime, precision, threads, options)
            for threads in sorted(options.threads)
            for network in networks
            for runtime, precision in kinds(options)
        ]
    print(json.dumps({"versions": {"torch": version("torch")}, "batch": 1, "results": found}, indent=1))


if __name__ == "__main__":
    main()
