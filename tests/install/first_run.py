"""A bundle runs in this environment and answers as the eager model did when it was exported. Needs no torch.

::

    .../bin/python tests/install/first_run.py net.edgekit --runtime onnxruntime
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

import numpy as np

import edgekit

TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest one: that of :func:`edgekit.export`."""


def check(path: str, runtime: str) -> str:
    """One line about the run.

    Raises:
        AssertionError: torch is here, or the answers are not the eager model's.
    """
    assert importlib.util.find_spec("torch") is None, "torch is here: this is no device's environment"
    with edgekit.Bundle.open(path) as bundle:
        exits = bundle.plan.exits
        golden = bundle.golden()
        inputs = {spec.name: golden[f"input:{spec.name}"] for spec in bundle.plan.inputs}
        policy = edgekit.Policy.fixed([0.5] * (len(exits) - 1))
        with edgekit.load(bundle, runtime=runtime, policy=policy) as session:
            every = session.run_exits(inputs)
            left = np.bincount(session.run(inputs).exit, minlength=len(exits)).tolist()
            version = session.runtime.describe()["version"]
    worst = 0.0
    for step, logits in zip(exits, every, strict=True):
        expected = golden[f"exit:{step.name}"]
        worst = max(worst, float(np.abs(logits - expected).max() / max(1.0, np.abs(expected).max())))
    assert worst <= TOLERANCE, f"{runtime} is off by {worst:.1e} of the largest logit"
    return f"{runtime} {version}: {len(exits)} exits, off by {worst:.1e} of the largest logit; rows left at {left}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a bundle here and compare with its golden answers.")
    parser.add_argument("bundle")
    parser.add_argument("--runtime", default="onnxruntime")
    asked = parser.parse_args()
    try:
        print(check(asked.bundle, asked.runtime))
    except (AssertionError, edgekit.EdgekitError) as error:
        sys.exit(f"FAILED: {error}")


if __name__ == "__main__":
    main()
