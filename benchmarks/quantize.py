"""int8 calibrated on the samples that survive to each stage, against int8 calibrated on all of them, on zoo networks.

    python benchmarks/quantize.py [NETWORK ...] [--data FOLDER] [--draws 5] [--samples 500] [--drop 0.01]
        [--bundles FOLDER] [--json]

int8 is calibrated on draws from the training set. A fifth of the test set finds thresholds and the rest tests (of the
digits all of it; training images find them). For each draw both ways are written from the same samples. Told of the
test, for float and both ways:

- accuracy with float's thresholds, and how far logits are from float's where a sample leaves at the same exit,
  the first of several left out, which all samples reach;
- accuracy with thresholds found anew for the same target on the first part (where there is more than one exit), and
  the mean MACs that they cost;
- size of all stages' files over float's, and time of one sample under the policy over float's, in turn.

Differences are of the same images; the interval is that of the mean over draws and images (bootstrap of images).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import edgekit
from edgekit.bundle import Bundle
from edgekit.data import Dataset
from edgekit.exporters.quantize_effects import HeldOut
from edgekit.exporters.quantize_onnx import OnnxQuantizer
from edgekit.exporters.quantize_work import Work
from edgekit.progress import silent
from edgekit.runtimes.ort import OrtRuntime
from edgekit.session import Session
from edgekit.shares import mean_macs
from edgekit.zoo import digits, registry

NAMES = (
    "msdnet-digits", "moe-digits", "switch-digits", "act-digits", "msdnet-cifar10", "skipnet38-cifar10",
    "cascade-cifar10",
)  # fmt: skip
DATA = Path("../shared/data/cifar10")
WAYS = ("survivors", "all")


def parts(network: registry.Network, folder: Path) -> tuple[Dataset, Dataset, Dataset]:
    """Samples for thresholds, to draw calibration samples from, and to test."""
    train, test = network.data(folder if network.files else None)
    if not network.files:
        return digits.calibration_set(), train, test
    order = np.random.default_rng(0).permutation(len(test))
    first = len(test) // 5
    return test.take(order[:first]), train, test.take(order[first:])


def answers(session: edgekit.Session, data: Dataset) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Logits and exit of each sample, and mean MACs."""
    results, executed = [], dict.fromkeys((stage.name for stage in session.plan.stages), 0)
    for inputs in data.batches(64):
        results.append(session.run(inputs))
        for name, rows in results[-1].executed.items():
            executed[name] += rows
    logits = np.concatenate([each.logits for each in results])
    exits = np.concatenate([each.exit for each in results])
    return logits, exits, mean_macs(session.plan, executed, samples=len(data))


def measured(
    session: edgekit.Session, policy: edgekit.Policy, thresholds: Dataset, test: Dataset, drop: float
) -> dict[str, Any]:
    """Right answers with these thresholds, and with new ones for the same target."""
    session.use(policy)
    logits, exits, macs = answers(session, test)
    found = {"logits": logits, "exits": exits, "fixed": logits.argmax(axis=1) == test.labels}
    if len(session.plan.exits) > 1:
        edgekit.calibrate(session, thresholds, max_drop=drop, confidence=None, save=False)
        logits, _, macs = answers(session, test)
    return {**found, "target": logits.argmax(axis=1) == test.labels, "macs": macs}


def written(
    bundle: Bundle, runtime: OrtRuntime, policy: edgekit.Policy, data: Dataset, way: str, folder: Path
) -> tuple[dict[str, Path], float, list[str]]:
    """Stages in int8, their size over float's, and which are in float."""
    work = Work(
        bundle=bundle, quantizer=OnnxQuantizer(), runtime=runtime, policy=policy, folder=folder, precision="int8",
        progress=silent,
    )  # fmt: skip
    work.write(data, way, ())
    chosen = work.artifacts()
    kept = [name for name in chosen if chosen[name] == work.float[name]]
    lowered = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    size = lowered + sum(bundle.artifact_bytes("onnx", name) for name in kept)
    return chosen, size / bundle.artifact_bytes("onnx"), kept


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Mean absolute difference of logits, of samples that left at the same exit, and not at the first of several."""
    several = other["exits"].max() > 0
    same = (one["exits"] == other["exits"]) & ((other["exits"] > 0) | ~several)
    return float(np.abs(one["logits"] - other["logits"])[same].mean())


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean over draws and images, and where it may lie: 95 %, images drawn again."""
    each = differences.mean(axis=0)
    rng = np.random.default_rng(0)
    drawn = [each[rng.integers(0, len(each), len(each))].mean() for _ in range(1000)]
    return float(each.mean()), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def compare(name: str, folder: Path, *, draws: int, samples: int, drop: float, data: Path) -> dict[str, Any]:
    network = registry.find(name)
    thresholds, pool, test = parts(network, data)
    path = folder / f"{name}.edgekit"
    if not path.exists():
        edgekit.export(
            registry.load(name), (network.example(),), path, name=name, preprocess=network.preprocess,
            classes=network.classes,
        ).close()  # fmt: skip
    with Bundle.open(path) as bundle:
        plan, runtime = bundle.plan, OrtRuntime()
        files = {stage.name: bundle.artifact("onnx", stage.name) for stage in plan.stages}
        policy = edgekit.Policy.never(len(plan.exits))
        with Session(plan, runtime, files) as session:
            if len(plan.exits) > 1:
                policy = edgekit.calibrate(session, thresholds, max_drop=drop, confidence=None, save=False)
            reference = measured(session, policy, thresholds, test, drop)
        few = HeldOut(plan, runtime, files, policy=policy, data=test.take(slice(0, 100)))
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for draw in range(draws):
            rows = np.random.default_rng(draw).permutation(len(pool))[:samples]
            for way in WAYS:
                with TemporaryDirectory() as aside:
                    chosen, size, kept = written(bundle, runtime, policy, pool.take(rows), way, Path(aside))
                    with Session(plan, runtime, chosen) as session:
                        made = measured(session, policy, thresholds, test, drop)
                    before, after = few.times(chosen)
                made |= {"distance": distance(made, reference), "size": size, "time": after / before, "kept": kept}
                found[way].append(made)
    summary: dict[str, Any] = {
        "network": name,
        "test": len(test),
        "draws": draws,
        "float": {"fixed": float(reference["fixed"].mean()), "target": float(reference["target"].mean()),
                  "macs": reference["macs"]},
    }  # fmt: skip
    for way in WAYS:
        each = found[way]
        summary[way] = {
            "fixed": float(np.mean([one["fixed"].mean() for one in each])),
            "target": float(np.mean([one["target"].mean() for one in each])),
            "macs": statistics.fmean(one["macs"] for one in each),
            "distance": statistics.fmean(one["distance"] for one in each),
            "size": statistics.fmean(one["size"] for one in each),
            "time": statistics.median(one["time"] for one in each),
            "kept": sorted({stage for one in each for stage in one["kept"]}),
        }
    for kind in ("fixed", "target"):
        pairs = zip(found["survivors"], found["all"], strict=True)
        summary[f"survivors_less_all_{kind}"] = interval(
            np.stack([one[kind].astype(float) - other[kind].astype(float) for one, other in pairs])
        )
    return summary


def draw(found: dict[str, Any]) -> None:
    print(f"{found['network']}: {found['test']} test images, {found['draws']} draws of calibration samples")
    for name in ("float", *WAYS):
        row = found[name]
        print(
            f"  {name:10s} accuracy {100 * row['fixed']:.2f} % with float's thresholds, {100 * row['target']:.2f} % at "
            f"the same target, {row['macs'] / 1e6:.2f} M MACs"
        )
        if name != "float":
            print(
                f"  {'':10s} logits {row['distance']:.4f} off, size {row['size']:.3f}x, time {row['time']:.2f}x, "
                f"in float {', '.join(row['kept']) or 'none'}"
            )
    for kind in ("fixed", "target"):
        mean, low, high = (100 * value for value in found[f"survivors_less_all_{kind}"])
        print(f"  survivors less all, {kind}: {mean:+.3f} points ({low:+.3f} to {high:+.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NAMES)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--drop", type=float, default=0.01, help="of accuracy, for which thresholds are found")
    parser.add_argument("--bundles", type=Path, help="where exported networks are kept from run to run")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    with TemporaryDirectory() as folder:
        for name in chosen.networks:
            found = compare(
                name, chosen.bundles or Path(folder), draws=chosen.draws, samples=chosen.samples, drop=chosen.drop,
                data=chosen.data,
            )  # fmt: skip
            if chosen.json:
                print(json.dumps(found), flush=True)
            else:
                draw(found)


if __name__ == "__main__":
    main()
