"""The profiler's own bias and cost, and how well two of its profiles agree.

    python benchmarks/profiler.py [--network msdnet-cifar10] [--protocol standard] [--repeats 20] [--json]

- bias: the medians of ``edgekit.profile`` against those of a plain loop of ``perf_counter_ns`` pairs around
  ``session.run`` in the same shuffled turns, profile and loop taking turns themselves;
- reading a meter: latency while a file is read as often as a real sensor is, against without;
- taking apart: traced inferences against untraced ones;
- repeats: profiles of an unchanged bundle, each held by ``compare`` against the one just before and against the first:
  how far medians lie apart, and the reference work's; how far closure is from 1, and how many comparisons say that
  something got worse;
- injected slowness: a stage that takes 10 % longer, for every stage, against the last unchanged profile; whether
  ``compare`` finds it.

A machine with other work on it breaks the rule ``quiet-machine``; profiles are compared all the same, and it is said.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from measuring import DATA

import edgekit
from edgekit.data import Dataset, as_dataset
from edgekit.interfaces import Buffer
from edgekit.measured import MeterFacts
from edgekit.profiles import PUBLISHABLE, QUICK, STANDARD, Protocol, Reading
from edgekit.profiles.recorder import Recorder
from edgekit.profiles.system import collector_off
from edgekit.records import Profile
from edgekit.report.compare import compare
from edgekit.runtimes.ort import OrtRunner, OrtRuntime
from edgekit.zoo import registry

PROTOCOLS = {each.name: each for each in (QUICK, STANDARD, PUBLISHABLE)}
TURN_S = 2.0
"""Of profiles and plain loops, by turns: shorter than what the machine's speed takes to wander."""
FEW = 256
"""Samples in those turns, so that answers on all of them take no time."""
PARTS = ("bias", "reading", "repeats", "slowed")


class Slowed(OrtRuntime):
    """ONNX Runtime with one stage that spins after its work, for a share of the time that it took."""

    def __init__(self, stage: str, share: float, **options: Any) -> None:
        super().__init__(**options)
        self.stage, self.share = stage, share

    def open(self, stage: Any, artifact: Path) -> OrtRunner:
        runner = super().open(stage, artifact)
        if stage.name == self.stage:
            bind = runner.bind

            def slow(buffers: Mapping[str, Buffer], *, rows: int, outputs: Sequence[str]) -> Callable[[], None]:
                run = bind(buffers, rows=rows, outputs=outputs)
                return functools.partial(_longer, run, self.share)

            runner.bind = slow
        return runner


def _longer(run: Callable[[], None], share: float) -> None:
    start = time.perf_counter_ns()
    run()
    now = time.perf_counter_ns()
    end = now + (now - start) * share
    while now < end:
        now = time.perf_counter_ns()


class FileMeter:
    """Reads one file of /proc for every reading, as a sensor in /sys is read."""

    name = "file"

    def unavailable(self) -> str | None:
        return None

    def facts(self) -> MeterFacts:
        return MeterFacts(
            name="file", quantity="power", scope="recording", covers="nothing", update_interval_s=0.02, replay=True
        )

    def open(self) -> None:
        pass

    def read(self) -> Reading:
        text = Path("/proc/loadavg").read_text()
        return Reading(time.perf_counter_ns(), 1.0 + float(text.split()[0]))

    def close(self) -> None:
        pass


@contextmanager
def opened(bundle: edgekit.Bundle, runtime: Any = "onnxruntime") -> Iterator[edgekit.Session]:
    """The bundle with a policy that lets some leave everywhere."""
    policy = edgekit.Policy.fixed([0.9] * (len(bundle.plan.exits) - 1))
    with edgekit.load(bundle, runtime=runtime, policy=policy) as session:
        yield session


def bias(bundle: edgekit.Bundle, data: Dataset, *, seconds: float) -> dict[str, Any]:
    """Medians of the profiler over those of the plain loop, one ratio for each exit."""
    protocol = replace(QUICK, min_seconds=TURN_S, max_seconds=TURN_S, energy_window_s=0, stages_s=0)
    ratios: dict[str, list[float]] = {step.name: [] for step in bundle.plan.exits}
    data = data.take(slice(FEW))
    with opened(bundle) as session:
        for turn in range(max(3, round(seconds / TURN_S / 2))):
            for first in (True, False) if turn % 2 else (False, True):
                if first:
                    profile = edgekit.profile(session, data, protocol=protocol, seed=turn)
                else:
                    with collector_off():  # as the profiler has it
                        plain = plain_loop(session, data, seconds=TURN_S, seed=turn)
            for index, each in enumerate(profile.exits):
                ratios[each.name].append(each.latency.median_s / plain[index])
    found = {name: median(values) for name, values in ratios.items()}
    sure = {name: standard_error(values) for name, values in ratios.items()}
    worst = max(abs(value - 1) for value in found.values())
    return {"median_ratio": found, "standard_error": sure, "worst": worst, "bound": 0.01}


def standard_error(values: Sequence[float]) -> float:
    """Of their median, from the median distance to it: some turns are far off."""
    middle = median(values)
    return 1.25 * 1.48 * median(abs(value - middle) for value in values) / len(values) ** 0.5


def plain_loop(session: edgekit.Session, data: Dataset, *, seconds: float, seed: int) -> list[float]:
    """Median seconds of each exit, turns shuffled with the stream's as the profiler's are, nothing else done."""
    exits, rng = len(session.plan.exits), np.random.default_rng(seed)
    samples: list[list[int]] = [[] for _ in range(exits)]
    end = time.perf_counter_ns() + int(seconds * 1e9)
    while time.perf_counter_ns() < end:
        for turn in rng.permutation(2 * exits):
            row = int(rng.integers(len(data)))
            inputs, exit_index = data.batch(slice(row, row + 1)), int(turn) if turn < exits else None
            start = time.perf_counter_ns()
            session.run(inputs, exit=exit_index)
            stop = time.perf_counter_ns()
            if exit_index is not None:
                samples[exit_index].append(stop - start)
    return [median(each) * 1e-9 for each in samples]


def reading(bundle: edgekit.Bundle, data: Dataset, *, seconds: float) -> dict[str, float]:
    """Mean latency while a meter is read over that without, in turns of a second."""
    inputs, costs = data.batch(slice(0, 1)), []
    last = len(bundle.plan.exits) - 1
    with opened(bundle) as session, Recorder(FileMeter(), zero_ns=0) as recorder:

        def mean_ns() -> float:
            end, taken = time.perf_counter_ns() + 10**9, []
            while (start := time.perf_counter_ns()) < end:
                session.run(inputs, exit=last)
                taken.append(time.perf_counter_ns() - start)
            return fmean(taken)  # all: a reading hits few inferences, which are then the slowest

        for _ in range(max(3, int(seconds / 2))):
            with recorder.paused():
                alone = mean_ns()
            costs.append(mean_ns() / alone)
        count = recorder.series().times_s.size
    return {
        "ratio": median(costs),
        "standard_error": standard_error(costs),
        "bound": 1.02,
        "readings_per_s": count / len(costs),
    }


def apart(first: Profile, other: Profile) -> float:
    """How far the medians of two profiles lie apart at most, as a share."""
    pairs = zip(first.exits, other.exits, strict=True)
    return max(abs(after.latency.median_s / before.latency.median_s - 1) for before, after in pairs)


def reference_apart(first: Profile, other: Profile) -> float:
    """By how much the work that knows nothing of the network took longer."""
    return median(other.reference_ns) / median(first.reference_ns) - 1


def means_apart(first: Profile, other: Profile) -> float:
    """How far the streams' means lie apart: a median jumps between exits where half of the samples leave at one."""
    return abs(other.stream.latency.mean_s / first.stream.latency.mean_s - 1)


def repeats(
    bundle: edgekit.Bundle, data: Dataset, *, protocol: Protocol, count: int, keep: Path | None
) -> list[Profile]:
    """Profiles of the same thing, each in a session of its own; those that were kept are not measured again."""
    profiles: list[Profile] = []
    for seed in range(count + 1):
        kept = None if keep is None else keep / f"{seed:02}.json"
        if kept is not None and kept.exists():
            profiles.append(Profile.load(kept))
        else:
            with opened(bundle) as session:
                profiles.append(edgekit.profile(session, data, protocol=protocol, seed=seed))
            if kept is not None:
                profiles[-1].save(kept)
        said = compare(profiles[-2:], invalid=True).worse if seed else ()
        broken = [check.rule for check in profiles[-1].broken]
        print(f"profile {seed} of {count}: {len(said)} alarms, broken {broken}", file=sys.stderr, flush=True)
    return profiles


def judged(profiles: Sequence[Profile]) -> dict[str, Any]:
    """How far neighbours lie apart, and what ``compare`` says of them."""
    others = profiles[1:]
    pairs = list(zip(profiles, others, strict=False))
    alarms = [compare([before, after], invalid=True).worse for before, after in pairs]
    neighbours = [apart(before, after) for before, after in pairs]
    return {
        "repeats": len(others),
        "alarms": sum(map(bool, alarms)),
        "alarms_bound": 1,
        "alarms_of_valid_pairs": sum(
            bool(said) and before.valid and after.valid for said, (before, after) in zip(alarms, pairs, strict=True)
        ),
        "valid_pairs": sum(before.valid and after.valid for before, after in pairs),
        "alarms_against_the_first": sum(bool(compare([profiles[0], each], invalid=True).worse) for each in others),
        "said": [sentence for each in alarms for sentence in each],
        "medians_apart": {"median": median(neighbours), "worst": max(neighbours), "bound": 0.03, "each": neighbours},
        "reference_apart": list(starmap(reference_apart, pairs)),
        "stream_means_apart": {
            "median": median(starmap(means_apart, pairs)),
            "worst": max(starmap(means_apart, pairs)),
        },
        "closure_off": {
            "median": median(abs(each.closure.ratio - 1) for each in profiles),
            "worst": max(abs(each.closure.ratio - 1) for each in profiles),
            "bound": 0.03,
        },
        "tracing_overhead": median(each.settings["tracing_overhead"] for each in profiles),
        "broken_rules": sorted({check.rule for each in profiles for check in each.broken}),
    }


def slowed(bundle: edgekit.Bundle, data: Dataset, unchanged: Profile, *, protocol: Protocol) -> dict[str, Any]:
    """For every stage, what ``compare`` says of a profile in which it took 10 % longer."""
    found = {}
    for stage in bundle.plan.stages:
        runtime = Slowed(stage.name, 0.10)
        with opened(bundle, runtime) as session:
            profile = edgekit.profile(session, data, protocol=protocol, seed=99)
        runtime.close()
        found[stage.name] = list(compare([unchanged, profile], invalid=True).worse)
        print(f"slowed {stage.name}: {found[stage.name][:1]}", file=sys.stderr, flush=True)
    return {"found": sum(any(name in said for said in saids) for name, saids in found.items()), "of": len(found),
            "said": {name: said[:3] for name, said in found.items()}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", default="msdnet-cifar10")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="standard")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0, help="of each of the first two parts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--max-seconds", type=float, help="of a profile's latencies [default: the protocol's]")
    parser.add_argument(
        "--keep", type=Path, help="folder of the profiles of the repeats; those in it are taken as they are"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    network = registry.find(given.network)
    if given.data.exists():
        data = as_dataset(given.data, preprocess=network.preprocess)
    else:
        noise = np.random.default_rng(0).standard_normal((1000, 3, 32, 32)).astype(np.float32)
        data = Dataset(inputs=noise, source="noise")
    protocol = replace(PROTOCOLS[given.protocol], energy_window_s=0, paced_hz=())
    if given.max_seconds is not None:
        protocol = replace(protocol, max_seconds=given.max_seconds)
    with tempfile.TemporaryDirectory() as folder:
        bundle = edgekit.export(
            registry.load(given.network), network.example(), Path(folder) / "net.edgekit", preprocess=network.preprocess
        )
        result: dict[str, Any] = {"network": given.network, "data": data.source, "protocol": given.protocol}
        if "bias" in given.parts:
            result["bias"] = bias(bundle, data, seconds=given.seconds)
        if "reading" in given.parts:
            result["reading"] = reading(bundle, data, seconds=given.seconds)
        print(json.dumps(result), file=sys.stderr, flush=True)
        if {"repeats", "slowed"} & set(given.parts):
            count = given.repeats if "repeats" in given.parts else 1
            profiles = repeats(bundle, data, protocol=protocol, count=count, keep=given.keep)
            result["unchanged"] = judged(profiles)
        if "slowed" in given.parts:
            result["slowed"] = slowed(bundle, data, profiles[-1], protocol=protocol)
    print(json.dumps(result, indent=None if given.json else 1))


if __name__ == "__main__":
    main()
