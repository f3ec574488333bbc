"""Proposing and certifying thresholds: time and memory, and what the proposal costs against other ways.

    python benchmarks/calibrate.py [--scores logits.npz] [--json]

- time and peak memory of a million samples at eight exits, proposed and certified; time to certify a thousand samples;
- the search against brute force, on samples few enough for that;
- certified mean cost, on new samples, of paths by :func:`propose_path`, of one shared threshold, and of the best
  vectors in hindsight (coordinate search, with every combination of a grid up to four exits), over many draws;
- risk on new samples at fixed budgets, against MSDNet's published solver.

``--scores`` is an ``.npz`` with ``logits (exits, samples, classes)`` and ``labels (samples,)``, and may have ``costs
(exits,)``; without it the last two are of synthetic scores. Costs are shares of the dearest exit's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.calibration.candidates import Candidate, Samples, evaluate
from edgekit.calibration.certify import certify
from edgekit.calibration.frontier import search
from edgekit.calibration.scores import score
from edgekit.calibration.solve import msdnet_budget, propose_budget, propose_path, shared_threshold_path

EPSILONS = (0.01, 0.02, 0.05)
DELTA = 0.1
TESTED = 1000


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores ``(exits - 1, samples)``, losses ``(exits, samples)``, costs ``(exits,)`` and the test that fits."""

    name: str
    scores: np.ndarray
    losses: np.ndarray
    costs: np.ndarray
    test: str

    def rows(self, which: np.ndarray) -> Scored:
        return Scored(
            name=self.name, scores=self.scores[:, which], losses=self.losses[:, which], costs=self.costs, test=self.test
        )


def synthetic(exits: int, samples: int, *, seed: int = 0) -> Scored:
    """Accuracy gaps of exits that get better with depth, and scores that tell something of it."""
    random = np.random.default_rng(seed)
    difficulty = random.standard_normal(samples, dtype=np.float32)
    depth = np.linspace(0.2, 1.2, exits)
    scores = np.empty((exits - 1, samples), dtype=np.float32)
    right = np.empty((exits, samples), dtype=np.int8)
    for index in range(exits):
        right[index] = difficulty + 0.5 * random.standard_normal(samples, dtype=np.float32) < depth[index]
        if index < exits - 1:
            noise = 0.6 * random.standard_normal(samples, dtype=np.float32)
            scores[index] = 1 / (1 + np.exp(2 * (difficulty - depth[index] + noise)))
    costs = np.linspace(1, 3, exits) / 3
    return Scored(
        name=f"synthetic, {exits} exits", scores=scores, losses=right[-1] - right, costs=costs, test="ternary"
    )


def from_file(path: Path) -> list[Scored]:
    """Consistency and accuracy gap of recorded logits, by max probability."""
    with np.load(path) as file:
        logits, labels = file["logits"].astype(np.float32), file["labels"]
        costs = file["costs"].astype(np.float64) if "costs" in file else np.arange(1.0, len(logits) + 1)
    classes = logits.argmax(axis=2)
    right = (classes == labels).astype(np.int8)
    scores, costs = score(logits[:-1], name="max_prob"), costs / costs.max()
    consistency = (classes != classes[-1]).astype(np.int8)
    return [
        Scored(name=f"{path.name}, consistency", scores=scores, losses=consistency, costs=costs, test="binomial"),
        Scored(name=f"{path.name}, gap", scores=scores, losses=right[-1] - right, costs=costs, test="ternary"),
    ]


def seconds(call: Callable[[], Any], *, repeats: int) -> float:
    """Median."""
    found = []
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        call()
        found.append(time.perf_counter_ns() - begin)
    return float(np.median(found)) / 1e9


def peak_bytes(call: Callable[[], Any]) -> int:
    """Memory that was allocated at most during a call, numpy's included."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def thresholds(path: Sequence[Candidate]) -> list[tuple[float, ...]]:
    return [candidate.thresholds for candidate in path]


def speed(samples: int) -> dict[str, float]:
    """Of many samples, and of a thousand."""
    many = synthetic(8, samples)
    path = propose_path(many.scores, many.losses, many.costs)
    few = many.rows(np.arange(TESTED))

    def propose() -> None:
        propose_path(many.scores, many.losses, many.costs)

    def prove() -> None:
        certify(many.scores, many.losses, thresholds(path), epsilon=0.02, delta=DELTA, test="ternary")

    def prove_few() -> None:
        certify(few.scores, few.losses, thresholds(path), epsilon=0.05, delta=DELTA, test="ternary")

    given = many.scores.nbytes + many.losses.nbytes
    return {
        "samples": samples,
        "exits": 8,
        "input_bytes": given,
        "propose_s": seconds(propose, repeats=3),
        "certify_s": seconds(prove, repeats=3),
        "propose_peak_over_input": peak_bytes(propose) / given,
        "certify_peak_over_input": peak_bytes(prove) / given,
        "certify_1000_s": seconds(prove_few, repeats=9),
        "candidates": len(path),
    }


def against_brute_force(*, seeds: int = 10) -> dict[str, float]:
    """Cost at no more than each risk: the search's over that of the best of all vectors, worst of all problems."""
    ratios = []
    for exits, samples in ((3, 40), (5, 7)):
        for seed in range(seeds):
            small = synthetic(exits, samples, seed=seed)
            values = [[*np.unique(row).tolist(), np.inf] for row in small.scores]
            every = [
                evaluate(small.scores, small.losses, small.costs, thresholds=vector)
                for vector in itertools.product(*values)
            ]
            pool = search(Samples.checked(small.scores, small.losses, small.costs))
            for risk in (0.0, 0.05, 0.15):
                best = min(each.cost for each in every if each.risk <= risk + 1e-9)
                ratios.append(float(pool.cost[pool.loss <= risk + 1e-9].min()) / best)
    return {"problems": len(ratios), "worst_cost_ratio": max(ratios), "mean_cost_ratio": float(np.mean(ratios))}


def hindsight(scores: np.ndarray, losses: np.ndarray, costs: np.ndarray) -> list[tuple[float, ...]]:
    """The front on the samples that it was found on, as evenly spaced as 64 of it allow."""
    pool = search(Samples.checked(scores, losses, costs))
    chosen = np.unique(np.linspace(0, len(pool.loss) - 1, 63).round().astype(int))
    return [(np.inf,) * len(scores), *map(tuple, pool.thresholds[chosen].tolist())]


def certified(of: Scored, *, draws: int, server: int) -> dict[str, Any]:
    """Mean cost on new samples of the cheapest certified policy, by way of proposing and epsilon."""
    ways: dict[str, Callable[..., Any]] = {
        "proposed": lambda *given: thresholds(propose_path(*given)),
        "shared": lambda *given: thresholds(shared_threshold_path(*given)),
        "hindsight": hindsight,
    }
    total = {way: dict.fromkeys(EPSILONS, 0.0) for way in ways}
    for draw in range(draws):
        random = np.random.default_rng(draw)
        order = random.permutation(of.scores.shape[1])
        ours, new = of.rows(order[:server]), of.rows(order[server:])
        device = new.rows(random.integers(0, new.scores.shape[1], TESTED))
        for way, propose in ways.items():
            path = propose(ours.scores, ours.losses, ours.costs)
            costs = [evaluate(new.scores, new.losses, new.costs, thresholds=vector).cost for vector in path]
            for epsilon in EPSILONS:
                found = certify(device.scores, device.losses, path, epsilon=epsilon, delta=DELTA, test=of.test)
                total[way][epsilon] += min(costs[: len(found.accepted)]) / draws
    return {
        "of": of.name,
        "server_samples": server,
        "device_samples": TESTED,
        "draws": draws,
        "delta": DELTA,
        "mean_cost": {way: {str(epsilon): cost for epsilon, cost in costs.items()} for way, costs in total.items()},
    }


def budgets(of: Scored, *, server: int) -> dict[str, Any]:
    """Risk and cost on new samples of both solvers, at budgets between the cheapest and the dearest exit."""
    order = np.random.default_rng(0).permutation(of.scores.shape[1])
    ours, new = of.rows(order[:server]), of.rows(order[server:])
    rows = []
    for share in (0.2, 0.4, 0.6, 0.8):
        budget = float(of.costs.min() + share * (of.costs.max() - of.costs.min()))
        better = propose_budget(ours.scores, ours.losses, ours.costs, budget=budget).thresholds
        theirs = msdnet_budget(ours.scores, ours.costs, budget=budget)
        row: dict[str, float] = {"budget": budget}
        for name, vector in (("proposed", better), ("msdnet", theirs)):
            found = evaluate(new.scores, new.losses, new.costs, thresholds=vector)
            row |= {f"{name}_risk": found.risk, f"{name}_cost": found.cost}
        rows.append(row)
    return {"of": of.name, "server_samples": server, "budgets": rows}


def printed(result: dict[str, Any]) -> str:
    """For people."""
    fast, brute = result["speed"], result["brute_force"]
    lines = [
        f"{fast['samples']} samples, {fast['exits']} exits: proposed in {fast['propose_s']:.2f} s "
        f"({fast['propose_peak_over_input']:.2f}x the input at peak), certified in {fast['certify_s']:.2f} s "
        f"({fast['certify_peak_over_input']:.2f}x)",
        f"{TESTED} samples certified in {1e3 * fast['certify_1000_s']:.1f} ms",
        f"search over brute force: {brute['worst_cost_ratio']:.4f}x at worst of {brute['problems']}",
    ]
    for each in result["certified"]:
        lines.append(f"{each['of']}: certified cost by epsilon")
        lines += [
            f"  {way:10}" + "".join(f"  {epsilon}: {cost:.3f}" for epsilon, cost in costs.items())
            for way, costs in each["mean_cost"].items()
        ]
    for each in result["budgets"]:
        lines.append(f"{each['of']}: risk (cost) at a budget")
        lines += [
            f"  {row['budget']:.3f}  proposed {row['proposed_risk']:.4f} ({row['proposed_cost']:.3f})"
            f"  msdnet {row['msdnet_risk']:.4f} ({row['msdnet_cost']:.3f})"
            for row in each["budgets"]
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--scores", type=Path, help=".npz with logits and labels")
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the timing")
    parser.add_argument("--draws", type=int, default=50, help="of server and device samples")
    parser.add_argument("--server", type=int, default=2000, help="samples that propose")
    options = parser.parse_args(arguments)
    recorded = from_file(options.scores) if options.scores else [synthetic(3, 20_000), synthetic(8, 20_000)]
    result = {
        "speed": speed(options.samples),
        "brute_force": against_brute_force(),
        "certified": [certified(each, draws=options.draws, server=options.server) for each in recorded],
        "budgets": [budgets(each, server=options.server) for each in recorded],
    }
    print(json.dumps(result, indent=1) if options.json else printed(result))


if __name__ == "__main__":
    main()
