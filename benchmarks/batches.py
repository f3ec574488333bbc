"""Whether LiteRT would gain by batches: whole networks written for one image and for several. Prints one JSON.

    python benchmarks/batches.py --json

A file takes a fixed number of images, and edgekit writes stages for one, so that a batch is a loop. The peer of that is
the same network converted for 4, 8 and 32 images: its time for each image over that of the file for one, both by
litert-torch and its own interpreter, medians of interleaved runs. Above 1, the loop is faster.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from gates import LogitsOnly
from measuring import DATA, interleaved, load_images
from torch import nn

from edgekit.exporters.litert_quiet import converter, undisturbed
from edgekit.streams import unheard
from edgekit.zoo import registry

NETWORKS = ("msdnet-cifar10", "skipnet38-cifar10")


def write(model: nn.Module, images: int, path: Path) -> Path:
    """The whole network for a number of images at a time."""
    with undisturbed(), torch.no_grad():
        made = converter().convert(model.eval(), (torch.zeros(images, 3, 32, 32),))
        path.write_bytes(made.model_content())
    return path


def measure(files: dict[int, Path], images: np.ndarray, *, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds for each image, and those over the milliseconds of one at a time."""
    calls, opened = {}, []
    for count, path in files.items():
        with unheard():
            interpreter = Interpreter(str(path), num_threads=threads)
            interpreter.allocate_tensors()
        opened.append(interpreter)
        given, x = interpreter.get_input_details()[0]["index"], np.ascontiguousarray(images[:count])

        def call(interpreter: Any = interpreter, given: int = given, x: np.ndarray = x) -> None:
            interpreter.set_tensor(given, x)
            interpreter.invoke()

        calls[str(count)] = call
    each_s = {name: seconds / int(name) for name, seconds in interleaved(calls, rounds=rounds).items()}
    return {
        "ms_per_image": {name: 1e3 * seconds for name, seconds in each_s.items()},
        "over_one_at_a_time": {name: seconds / each_s["1"] for name, seconds in each_s.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="one line")
    given = parser.parse_args()
    results = []
    for name in given.networks:
        network, model = registry.find(name), registry.load(name)
        images, source = load_images(network, given.data)
        whole = model if name.startswith("msdnet") else LogitsOnly(model)
        with tempfile.TemporaryDirectory() as folder:
            files = {count: write(whole, count, Path(folder) / f"{count}.tflite") for count in (1, *given.batches)}
            for threads in given.threads:
                found = measure(files, images, threads=threads, rounds=given.rounds)
                results.append({"network": name, "images": source, "threads": threads, **found})
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"litert": version("ai-edge-litert"), "results": results}, indent=None if given.json else 1))


if __name__ == "__main__":
    main()
