"""Staged execution against the ways people run a multi-exit network today. Prints one JSON.

    python benchmarks/staged.py --json

The CIFAR MSDNet of the zoo, batch 1, one thread. For every exit k, medians of interleaved runs of:

- edgekit, forced to exit k: input check and copy, stages, scores and comparisons on the way, the result;
- (a) one static ONNX graph with the heads 0..k, inputs and outputs bound beforehand in the same way;
- (b) the static graph truncated to exit k alone, no other head;
- (c) one ONNX graph with nested ``If``, built from the same stages;
- (d) eager PyTorch, stopping at exit k.

Then start-up in fresh processes, and a batch of 64 of which half leave at the first exit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from measuring import DATA, Bound, interleaved, load_images, open_static, write_onnx
from nested_if import nested_if
from torch import nn

import edgekit
from edgekit.bundle import variant
from edgekit.policy import Policy
from edgekit.zoo import registry

STARTUP = """
import json, resource, sys, time
import numpy as np
x = np.zeros((1, 3, 32, 32), dtype=np.float32)
begin = time.perf_counter()
if sys.argv[1] == "edgekit":
    import edgekit
    from edgekit import session
    import onnxruntime
    imported = time.perf_counter()
    opened = edgekit.load(sys.argv[2], threads=1, policy=edgekit.Policy.never(int(sys.argv[3])))
    opened.run(x)
else:
    import onnxruntime
    imported = time.perf_counter()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    opened = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
    opened.run(None, {opened.get_inputs()[0].name: x})
end = time.perf_counter()
rss = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
print(json.dumps({"import_s": imported - begin, "load_and_first_run_s": end - imported, "rss_bytes": rss}))
"""


class Truncated(nn.Module):
    """An MSDNet that stops at an exit, with all heads up to it or its own alone."""

    def __init__(self, network: nn.Module, last: int, *, all_heads: bool) -> None:
        super().__init__()
        self.network = network
        self.last = last
        self.all_heads = all_heads

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = self.network.stem(x)
        logits = []
        for index in range(self.last + 1):
            maps = self.network.blocks[index](maps)
            if self.all_heads or index == self.last:
                logits.append(self.network.heads[index](maps[-1]))
        return logits


def forced(
    bundle: edgekit.Bundle, network: nn.Module, x: np.ndarray, folder: Path, *, rounds: int
) -> list[dict[str, Any]]:
    """Each exit against the four ways."""
    session = edgekit.load(bundle, threads=1, policy=edgekit.Policy.never(len(bundle.plan.exits)))
    stages = {
        stage.name: onnx.load(variant(bundle.artifact("onnx", stage.name), "max_prob")) for stage in bundle.plan.stages
    }
    branching = nested_if(bundle.plan, stages).SerializeToString()
    tensor = torch.from_numpy(x)
    rows = []
    for index, step in enumerate(bundle.plan.exits):
        eager = Truncated(network, index, all_heads=True).eval()
        heads = Bound(open_static(write_onnx(eager, folder / f"heads{index}.onnx")), {"x": x})
        truncated = write_onnx(Truncated(network, index, all_heads=False), folder / f"alone{index}.onnx")
        alone = Bound(open_static(truncated), {"x": x})
        thresholds = np.full(len(bundle.plan.exits), np.inf, dtype=np.float32)
        thresholds[index] = -np.inf
        conditional = Bound(open_static(branching), {"x": x, "thresholds": thresholds})

        def run_eager(eager: nn.Module = eager) -> Any:
            with torch.inference_mode():
                return eager(tensor)[-1]

        def run_staged(index: int = index) -> Any:
            return session.run(x, exit=index).logits

        calls = {
            "edgekit": run_staged,
            "static_heads": lambda heads=heads: heads(x),
            "static_alone": lambda alone=alone: alone(x),
            "nested_if": lambda conditional=conditional: conditional(x),
            "eager": run_eager,
        }
        expected = run_eager().numpy()
        for name, call in calls.items():
            if not np.allclose(np.asarray(call()), expected, atol=1e-4):
                raise SystemExit(f"{name} answers otherwise at exit {index}: the comparison would mean nothing")
        seconds = interleaved(calls, rounds=rounds)
        rows.append(
            {
                "exit": step.name,
                "median_s": seconds,
                "edgekit_over_static_heads": seconds["edgekit"] / seconds["static_heads"],
                "edgekit_over_static_alone": seconds["edgekit"] / seconds["static_alone"],
                "nested_if_over_edgekit": seconds["nested_if"] / seconds["edgekit"],
                "eager_over_edgekit": seconds["eager"] / seconds["edgekit"],
            }
        )
    session.close()
    return rows


def startup(bundle: edgekit.Bundle, whole: Path, *, repeats: int) -> dict[str, Any]:
    """Time and memory of opening and one run, in fresh processes, interleaved."""
    found: dict[str, list[dict[str, float]]] = {"edgekit": [], "plain": []}
    for _ in range(repeats):
        for kind, path in (("edgekit", bundle.path), ("plain", whole)):
            command = [sys.executable, "-c", STARTUP, kind, str(path), str(len(bundle.plan.exits))]
            found[kind].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = {
        kind: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for kind, runs in found.items()
    }
    return {
        **medians,
        "time_ratio": medians["edgekit"]["load_and_first_run_s"] / medians["plain"]["load_and_first_run_s"],
        "rss_ratio": medians["edgekit"]["rss_bytes"] / medians["plain"]["rss_bytes"],
    }


def half_leaving(bundle: edgekit.Bundle, images: np.ndarray, *, rounds: int) -> dict[str, float]:
    """A batch of 64: half leave at the first exit, against nobody leaving."""
    exits = len(bundle.plan.exits)
    with (
        edgekit.load(bundle, threads=1, policy=Policy.never(exits)) as never,
        edgekit.load(bundle, threads=1, policy=Policy.never(exits)) as half,
    ):
        scores = np.sort(half.run(images, exit=0).score)
        middle = float((scores[31] + scores[32]) / 2)
        half.use(Policy.fixed([middle, *[float("inf")] * (exits - 2)]))
        left = int((half.run(images).exit == 0).sum())
        if left != 32:
            raise SystemExit(f"{left} of 64 left at the first exit instead of 32")
        seconds = interleaved({"half": lambda: half.run(images), "never": lambda: never.run(images)}, rounds=rounds)
    return {"half_s": seconds["half"], "never_s": seconds["never"], "ratio": seconds["half"] / seconds["never"]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone (the default; kept for clarity)")
    parser.add_argument("--rounds", type=int, default=50, help="interleaved turns of each variant")
    parser.add_argument("--repeats", type=int, default=9, help="fresh processes of each kind")
    parser.add_argument("--data", type=Path, default=DATA, help="CIFAR images")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    network = registry.find("msdnet-cifar10")
    model = registry.load("msdnet-cifar10")
    images, source = load_images(network, options.data)
    with tempfile.TemporaryDirectory(prefix="edgekit-benchmark-") as name:
        folder = Path(name)
        bundle = edgekit.export(model, torch.from_numpy(images[:2]), folder / "net.edgekit")
        whole = write_onnx(model, folder / "whole.onnx")
        result = {
            "network": "msdnet-cifar10",
            "images": source,
            "threads": 1,
            "batch": 1,
            "rounds": options.rounds,
            "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
            "exits": forced(bundle, model, images[:1], folder, rounds=options.rounds),
            "startup": startup(bundle, whole, repeats=options.repeats),
            "batch_64": half_leaving(bundle, images, rounds=10),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
