"""What a machine answers: logits of every exit, and the decisions of several policies, on the same images everywhere.

Run on two machines and compared by ``compare.py``. Needs edgekit and a runtime, no torch.

::

    python answers.py net.edgekit images.npz answers.npz --runtime onnxruntime --runtime litert --runtime litert@int8

The file holds, for each runtime ``R`` (with its precision behind an ``@``, where it is not float):

- ``R/logits``: ``(exits, images, classes) float32``, nobody leaving;
- ``R/P/exit``: ``(images,) int64`` and ``R/P/score``: ``(images,) float32`` of each policy ``P``, in batches;
- ``R/P/alone/exit``, ``R/P/alone/score``: the same of some images, each run by itself;
- ``R/P/alone/ran``: ``(some, stages) int64``, how often each stage ran for each of them;

``labels``, ``(images,) int64``, where the images have any, and ``about``, a JSON text: machine, versions, policies, the
images' digest, the images run alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import edgekit
from edgekit.data import load_dataset

POLICIES = {
    "max_prob >= 0.6": ("max_prob", 0.6),
    "margin >= 0.7": ("margin", 0.7),
    "neg_entropy >= -0.1": ("neg_entropy", -0.1),
}
"""A score, and a threshold for every exit but the last."""


def policies(exits: int) -> dict[str, edgekit.Policy]:
    """Those that a network with so many exits can be run with."""
    if exits == 1:
        return {"to the end": edgekit.Policy.never(1)}
    return {
        name: edgekit.Policy.fixed([threshold] * (exits - 1), score=score)
        for name, (score, threshold) in POLICIES.items()
    }


def opened(bundle: edgekit.Bundle, runtime: str) -> edgekit.Session:
    """A session on a runtime, spelt ``NAME`` or ``NAME@PRECISION``."""
    name, _, precision = runtime.partition("@")
    asked = {"precision": precision} if precision else {}
    return edgekit.load(bundle, runtime=name, policy=edgekit.Policy.never(len(bundle.plan.exits)), **asked)


def answer(session: edgekit.Session, images: edgekit.Dataset, *, batch: int, alone: list[int]) -> dict[str, Any]:
    """All that one runtime answers, by the names of the docstring less the runtime's own."""
    every = [np.stack(session.run_exits(inputs)) for inputs in images.batches(batch)]
    found: dict[str, Any] = {"logits": np.concatenate(every, axis=1)}
    stages = [stage.name for stage in session.plan.stages]
    for name, policy in policies(len(session.plan.exits)).items():
        session.use(policy)
        together = [session.run(inputs) for inputs in images.batches(batch)]
        singly = [session.run(images.batch(slice(row, row + 1))) for row in alone]
        found[f"{name}/exit"] = np.concatenate([each.exit for each in together])
        found[f"{name}/score"] = np.concatenate([each.score for each in together])
        found[f"{name}/alone/exit"] = np.concatenate([each.exit for each in singly])
        found[f"{name}/alone/score"] = np.concatenate([each.score for each in singly])
        found[f"{name}/alone/ran"] = np.array([[each.executed[stage] for stage in stages] for each in singly])
    return found


def about(bundle: edgekit.Bundle, images: edgekit.Dataset, alone: list[int], said: Mapping[str, Any]) -> dict[str, Any]:
    """What the answers are worth nothing without."""
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "edgekit": edgekit.__version__,
        "network": bundle.manifest.name,
        "plan": bundle.plan.fingerprint,
        "exits": [step.name for step in bundle.plan.exits],
        "stages": [stage.name for stage in bundle.plan.stages],
        "gates": len(bundle.plan.gates),
        "images": images.sha256,
        "alone": alone,
        "policies": {
            name: {"score": policy.score, "thresholds": policy.thresholds}
            for name, policy in policies(len(bundle.plan.exits)).items()
        },
        "runtimes": dict(said),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write down what this machine answers.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--runtime", action="append", required=True)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--alone", type=int, default=100, help="how many images are also run by themselves")
    asked = parser.parse_args()
    arrays: dict[str, Any] = {}
    said: dict[str, Any] = {}
    try:
        with edgekit.Bundle.open(asked.bundle) as bundle:
            images = load_dataset(asked.images, preprocess=bundle.manifest.preprocess)
            alone = np.linspace(0, len(images) - 1, min(asked.alone, len(images))).astype(int).tolist()
            for runtime in asked.runtime:
                print(f"{platform.machine()}: {bundle.manifest.name} on {runtime}", flush=True)
                with opened(bundle, runtime) as session:
                    found = answer(session, images, batch=asked.batch, alone=alone)
                    said[runtime] = session.runtime.describe()
                arrays |= {f"{runtime}/{name}": value for name, value in found.items()}
            if images.labels is not None:
                arrays["labels"] = images.labels
            text = json.dumps(about(bundle, images, alone, said), default=str)
    except edgekit.EdgekitError as error:
        sys.exit(f"FAILED: {error}")
    np.savez(asked.output, about=np.array(text), **arrays)


if __name__ == "__main__":
    main()
