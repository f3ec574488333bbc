"""What LiteRT gains by several images at once. Prints one JSON.

    python benchmarks/batches.py --json

For each number of images: the whole network converted for so many at once, by litert-torch and its own interpreter; and
edgekit's stages, exported with ``LiteRTTarget(batch=...)``, on 64 images to the last exit, all gates open. Milliseconds
for each image, and those over the milliseconds of one at a time, medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from gates import LogitsOnly
from measuring import DATA, interleaved, load_images
from torch import nn

import edgekit
from edgekit.exporters.litert_quiet import converter, undisturbed
from edgekit.exporters.to_litert import LiteRTTarget
from edgekit.streams import unheard
from edgekit.zoo import registry

NETWORKS = ("msdnet-cifar10", "skipnet38-cifar10")


def write(model: nn.Module, images: int, path: Path) -> Path:
    """The whole network for a number of images at a time."""
    with undisturbed(), torch.no_grad():
        made = converter().convert(model.eval(), (torch.zeros(images, 3, 32, 32),))
        path.write_bytes(made.model_content())
    return path


def whole(files: dict[int, Path], images: np.ndarray, *, threads: int, rounds: int) -> dict[str, Any]:
    """The whole network, once on as many images as its file takes."""
    calls = {}
    for count, path in files.items():
        with unheard():
            interpreter = Interpreter(str(path), num_threads=threads)
            interpreter.allocate_tensors()
        given, x = interpreter.get_input_details()[0]["index"], np.ascontiguousarray(images[:count])

        def call(interpreter: Any = interpreter, given: int = given, x: np.ndarray = x) -> None:
            interpreter.set_tensor(given, x)
            interpreter.invoke()

        calls[str(count)] = call
    return each_image({name: seconds / int(name) for name, seconds in interleaved(calls, rounds=rounds).items()})


def staged(bundles: dict[int, Path], images: np.ndarray, *, threads: int, rounds: int) -> dict[str, Any]:
    """The stages, on all images at once."""
    with ExitStack() as stack:
        calls = {}
        for count, path in bundles.items():
            session = stack.enter_context(edgekit.load(path, runtime="litert", threads=threads))
            gates = dict.fromkeys((gate.name for gate in session.plan.gates), True)
            calls[str(count)] = partial(session.run, images, exit=len(session.plan.exits) - 1, gates=gates)
        return each_image({name: s / len(images) for name, s in interleaved(calls, rounds=rounds).items()})


def each_image(seconds: dict[str, float]) -> dict[str, Any]:
    """Milliseconds, and shares of those of one at a time."""
    return {
        "ms_per_image": {name: 1e3 * value for name, value in seconds.items()},
        "over_one_at_a_time": {name: value / seconds["1"] for name, value in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="one line")
    given = parser.parse_args()
    results = []
    for name in given.networks:
        network, model = registry.find(name), registry.load(name)
        images, source = load_images(network, given.data)
        answering = model if name.startswith("msdnet") else LogitsOnly(model)
        counts = (1, *given.batches)
        with tempfile.TemporaryDirectory() as folder:
            files = {count: write(answering, count, Path(folder) / f"{count}.tflite") for count in counts}
            bundles = {count: Path(folder) / f"{count}.edgekit" for count in counts}
            for count, path in bundles.items():
                target = LiteRTTarget(batch=count)
                edgekit.export(model, torch.from_numpy(images[:2]), path, targets=(target,)).close()
            for threads in given.threads:
                found = {
                    "network": name,
                    "images": source,
                    "threads": threads,
                    "whole": whole(files, images, threads=threads, rounds=given.rounds),
                    "staged": staged(bundles, images, threads=threads, rounds=max(1, given.rounds // 5)),
                }
                results.append(found)
                print(json.dumps(found), file=sys.stderr, flush=True)
    print(json.dumps({"litert": version("ai-edge-litert"), "results": results}, indent=None if given.json else 1))


if __name__ == "__main__":
    main()
