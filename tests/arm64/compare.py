"""Holds the answers of two machines against each other: values, decisions, and how near a threshold each flip lies.

::

    python compare.py x86_64.npz aarch64.npz --told litert@int8

Fails when logits of a float runtime differ by more than ``--tolerance``, when a decision differs although a score does
not lie within ``--margin`` of its threshold on both machines, when a stage ran on one machine and not on the other
where no exit's decision says so, or when an image alone is decided otherwise than in a batch. Runtimes given as
``--told`` are compared and never fail for differing between the machines.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MARGIN = 1e-4
TOLERANCE = 1e-4
"""Of a logit, relative to the largest of its exit, or absolute where that is below 1."""
SAME = ("edgekit", "network", "plan", "exits", "stages", "images", "alone", "policies")
"""What must be the same on both machines, or there is nothing to compare."""


@dataclass(frozen=True)
class Flip:
    """An image that left at another exit on the other machine.

    Attributes:
        image: its place.
        exits: that it took here and there.
        threshold: of the earlier of the two.
        scores: there, here and there.
    """

    image: int
    exits: tuple[int, int]
    threshold: float
    scores: tuple[float, float]

    @property
    def margin(self) -> float:
        """How far the score lies from the threshold, on the machine where it lies farther; NaN is far."""
        distances = [abs(score - self.threshold) for score in self.scores]
        return max((each if np.isfinite(each) else float("inf") for each in distances), default=float("inf"))


def scores_of(logits: NDArray[np.float32], score: str) -> NDArray[np.float64]:
    """Scores of ``(images, classes)`` logits at temperature 1, ``(images,)``, computed apart from any stage."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    probabilities = np.exp(logs)
    ordered = np.sort(probabilities, axis=1)
    if score == "max_prob":
        return ordered[:, -1]
    if score == "margin":
        return ordered[:, -1] - ordered[:, -2]
    return (probabilities * logs).sum(axis=1)


def flips(here: Any, there: Any, *, runtime: str, name: str, policy: dict[str, Any]) -> list[Flip]:
    """Images whose decisions differ. A score of the machine that left is its own; that of the other from its logits."""
    taken = [side[f"{runtime}/{name}/exit"] for side in (here, there)]
    found = []
    for image in np.flatnonzero(taken[0] != taken[1]).tolist():
        exits = (int(taken[0][image]), int(taken[1][image]))
        earlier = min(exits)
        scores = []
        for side, took in zip((here, there), exits, strict=True):
            logits = side[f"{runtime}/logits"][earlier, image : image + 1]
            left = took == earlier
            scores.append(
                float(side[f"{runtime}/{name}/score"][image] if left else scores_of(logits, policy["score"])[0])
            )
        found.append(Flip(image, exits, policy["thresholds"][earlier], (scores[0], scores[1])))
    return found


def values(here: Any, there: Any, runtime: str) -> tuple[float, float]:
    """Largest difference of a logit, and the same relative to the largest of its exit; infinite where one is NaN."""
    ours, theirs = here[f"{runtime}/logits"], there[f"{runtime}/logits"]
    difference = np.abs(ours.astype(np.float64) - theirs)
    if not np.array_equal(np.isfinite(ours), np.isfinite(theirs)):
        return float("inf"), float("inf")
    difference = np.where(np.isfinite(difference), difference, 0.0)
    scale = np.maximum(1.0, np.nan_to_num(np.abs(ours), posinf=0.0).max(axis=(1, 2)))
    return float(difference.max()), float((difference.max(axis=(1, 2)) / scale).max())


def other_ways(here: Any, there: Any, runtime: str, name: str) -> int:
    """Images alone that took one exit on both machines and yet ran other stages: a gate decided otherwise."""
    ran = here[f"{runtime}/{name}/alone/ran"] != there[f"{runtime}/{name}/alone/ran"]
    same = here[f"{runtime}/{name}/alone/exit"] == there[f"{runtime}/{name}/alone/exit"]
    return int((ran.any(axis=1) & same).sum())


def unlike_alone(side: Any, runtime: str, name: str, alone: list[int]) -> int:
    """Images that one machine decides otherwise alone than in a batch."""
    return int((side[f"{runtime}/{name}/exit"][alone] != side[f"{runtime}/{name}/alone/exit"]).sum())


def accuracy(side: Any, runtime: str, name: str) -> float | None:
    """Share of the images that are answered right at the exit they took; ``None`` without labels."""
    if "labels" not in side:
        return None
    taken = side[f"{runtime}/{name}/exit"]
    answers = side[f"{runtime}/logits"][taken, np.arange(len(taken))].argmax(axis=1)
    return float((answers == side["labels"]).mean())


def compare(here: Any, there: Any, *, margin: float, tolerance: float, told: list[str]) -> list[str]:
    """Print what differs; returns what must not.

    Args:
        here: the arrays of ``answers.py``, by name.
        there: those of the other machine.
        margin: how far from its threshold the score of a flip may lie.
        tolerance: of logits.
        told: runtimes that may differ.
    """
    ours, theirs = (json.loads(str(side["about"])) for side in (here, there))
    unlike = [key for key in SAME if ours[key] != theirs[key]]
    if unlike:
        return [f"the answers are not of one bundle, edgekit and data: {', '.join(unlike)} differ"]
    if not ours["runtimes"] or ours["runtimes"].keys() != theirs["runtimes"].keys():
        return [f"not the same runtimes: {sorted(ours['runtimes'])} and {sorted(theirs['runtimes'])}"]
    wrong = []
    machines = [f"{about['machine']}, Python {about['python']}" for about in (ours, theirs)]
    print(f"{ours['network']}: {' against '.join(machines)}")
    for runtime in ours["runtimes"]:
        versions = [about["runtimes"][runtime].get("version") for about in (ours, theirs)]
        worst, relative = values(here, there, runtime)
        spread = f"logits differ by {worst:.1e} at most, {relative:.1e} of the largest"
        print(f"  {runtime} {' / '.join(map(str, versions))}: {spread}")
        found = [] if relative <= tolerance else [f"logits differ by {relative:.1e} of the largest"]
        for name, policy in ours["policies"].items():
            found += _decisions(here, there, runtime, name, policy=policy, exits=ours["exits"], margin=margin)
        wrong += [f"{runtime}: {each}" for each in found if runtime not in told]
        for about, side in ((ours, here), (theirs, there)):
            for name in about["policies"]:
                count = unlike_alone(side, runtime, name, about["alone"])
                if count:
                    wrong.append(f"{runtime}: {name}: {count} images decide otherwise alone on {about['machine']}")
    return wrong


def _decisions(
    here: Any, there: Any, runtime: str, name: str, *, policy: dict[str, Any], exits: list[str], margin: float
) -> list[str]:
    found = flips(here, there, runtime=runtime, name=name, policy=policy)
    ways = other_ways(here, there, runtime, name)
    taken = here[f"{runtime}/{name}/exit"]
    left = np.bincount(taken, minlength=len(exits)).tolist()
    print(f"    {name}: {len(taken) - len(found)} of {len(taken)} decide the same; leave at {left}", end="")
    print(f"; {ways} of {len(here[f'{runtime}/{name}/alone/exit'])} alone run other stages", end="")
    accuracies = [accuracy(side, runtime, name) for side in (here, there)]
    print("" if None in accuracies else f"; accuracy {accuracies[0]:.4f} / {accuracies[1]:.4f}")
    for each in found:
        names = [exits[index] for index in each.exits]
        print(f"      image {each.image}: {names[0]} / {names[1]}, scores {each.scores[0]:.7f} / {each.scores[1]:.7f}, "
              f"threshold {each.threshold:.7f}, off by {each.margin:.1e}")  # fmt: skip
    far = [each for each in found if each.margin > margin]
    wrong = [f"{name}: {len(far)} flips farther than {margin:g} from their threshold"] if far else []
    return [*wrong, *([f"{name}: {ways} images run other stages to the same exit"] if ways else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Hold the answers of two machines against each other.")
    parser.add_argument("here", type=Path)
    parser.add_argument("there", type=Path)
    parser.add_argument("--margin", type=float, default=MARGIN)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--told", action="append", default=[], metavar="RUNTIME", help="may differ; told all the same")
    asked = parser.parse_args()
    with np.load(asked.here) as here, np.load(asked.there) as there:
        # Read once: an archive unpacks an array every time that it is asked for.
        sides = [{name: side[name] for name in side.files} for side in (here, there)]
    wrong = compare(*sides, margin=asked.margin, tolerance=asked.tolerance, told=asked.told)
    sys.exit("\n".join(f"FAILED: {each}" for each in wrong) or 0)


if __name__ == "__main__":
    main()
