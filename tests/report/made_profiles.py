"""Synthetic profiles that look like real ones: gamma-shaped latencies with a tail, from a seed."""

from itertools import pairwise

import msgspec
import numpy as np

from edgekit.environment import Environment
from edgekit.measured import (
    Check,
    Closure,
    Energy,
    Interval,
    LatencySummary,
    MeterFacts,
    OperatorTime,
    PowerTrace,
    Span,
    StageTime,
    TracedRun,
    Window,
)
from edgekit.records import ExitProfile, PacedProfile, PathProfile, Profile, StreamProfile
from edgekit.shares import GateShare

MEANS_S = (0.9e-3, 1.6e-3, 2.4e-3, 3.3e-3, 4.4e-3)
ACCURACIES = (0.642, 0.731, 0.778, 0.805, 0.817)
SHARES = (0.46, 0.22, 0.14, 0.08, 0.10)
NO_METER = "no power sensor found (/sys/class/powercap is missing: a virtual machine); try a replay meter"
IDLE_W, WINDOW_S, ROUNDS = 1.2, 10.0, 5


def summary(taken_ns):
    """Plain numpy, independent of the profiler."""
    x = np.asarray(taken_ns, float) / 1e9
    half = float(1.96 * x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else 0.0
    p90 = float(np.quantile(x, 0.9)) if len(x) >= 64 else None
    return LatencySummary(
        samples=len(x),
        min_s=float(x.min()),
        median_s=float(np.median(x)),
        mean_s=float(x.mean()),
        sd_s=float(x.std(ddof=1)) if len(x) > 1 else 0.0,
        p90_s=p90,
        p95_s=float(np.quantile(x, 0.95)) if len(x) >= 130 else None,
        p99_s=float(np.quantile(x, 0.99)) if len(x) >= 662 else None,
        median_low_s=float(np.median(x) - 1.2 * half),
        median_high_s=float(np.median(x) + 1.2 * half),
        mean_low_s=float(x.mean() - half),
        mean_high_s=float(x.mean() + half),
        p90_low_s=None if p90 is None else p90 - 1.7 * half,
        p90_high_s=None if p90 is None else p90 + 1.7 * half,
        confidence=0.95,
        outliers=int((x > np.quantile(x, 0.75) + 3 * (np.quantile(x, 0.75) - np.quantile(x, 0.25))).sum()),
        far_from_median=2,
        independent=0.6 * len(x),
    )


def drifting(random, samples, strength, memory=0.98):
    """Factors around 1 that wander, as clocks do: an autoregressive series of that standard deviation."""
    steps, found = random.normal(0, strength * np.sqrt(1 - memory**2), samples), np.empty(samples)
    level = random.normal(0, strength)
    for index, step in enumerate(steps):
        found[index] = level = memory * level + step
    return np.exp(found)


def latencies(random, mean_s, samples, *, drift=0.0):
    base = mean_s * (0.94 + random.gamma(3.0, 0.02, samples))
    spikes = random.random(samples) < 0.01
    taken = np.where(spikes, base * random.uniform(1.5, 2.5, samples), base) * 1e9
    return taken * drifting(random, samples, drift) if drift else taken


def interval(value, spread=0.03):
    return Interval(value=value, low=value - abs(value) * spread, high=value + abs(value) * spread)


def energy(joules, *, net=True):
    if joules is None:
        return Energy(reason=NO_METER, meter="rapl")
    return Energy(
        gross_j=joules,
        low_j=joules * 0.98,
        high_j=joules * 1.03,
        net_j=joules * 0.6 if net else None,
        net_low_j=joules * 0.55 if net else None,
        net_high_j=joules * 0.65 if net else None,
        method="counter",
        scope="package-0: the whole socket",
        meter="rapl",
        windows=ROUNDS,
        window_s=WINDOW_S,
        inferences=4000,
    )


def environment(**changes):
    fields = {
        "taken": "2026-11-20T10:00:00+00:00",
        "host": "bench-01",
        "system": "Linux 6.1.0-28-amd64",
        "machine": "x86_64",
        "processor": "Intel(R) Core(TM) i5-1240P",
        "cores": 4,
        "affinity": (0, 1, 2, 3),
        "memory_bytes": 8 * 2**30,
        "governors": {f"cpu{index}": "powersave" for index in range(4)},
        "frequencies_hz": {"cpu0": 1.4e9, "cpu1": 3.2e9},
        "frequency_limits_hz": (4e8, 4.4e9),
        "temperatures_c": {"x86_pkg_temp": 51.0, "acpitz": 44.0},
        "load": 0.31,
        "busy": 0.02,
        "versions": {"python": "3.11.2", "edgekit": "0.1.0", "onnxruntime": "1.32.0", "numpy": "2.4.6"},
        "unavailable": {"container": "nothing says that this is one"},
    }
    return Environment(**(fields | changes))


CHECKS = (
    Check(rule="steady-clock", passed=True, says="processor frequency changed by 1.2 %, at most 5 % is allowed"),
    Check(rule="enough-samples", passed=True, says="700 samples of every exit, 64 are needed for p90"),
    Check(rule="no-throttling", passed=None, says="this machine has no throttle counter"),
)
BROKEN = (
    Check(
        rule="energy-window",
        passed=False,
        says="the windows of exit1 lasted 4.1 s, at least 10 s are needed",
        advice="measure with --seconds 60",
    ),
    Check(
        rule="quiet-machine",
        passed=False,
        says="other work took 31 % of the processors, at most 10 % is allowed (<b>indexer</b>)",
        advice="stop what edgekit doctor lists, then measure again",
    ),
)


def stage_times(means, *, slower=1.0):
    """Each stage as what its exit takes more than the one before, ``slower`` for the third."""
    found = []
    every = [mean - (means[index - 1] if index else 0.0) for index, mean in enumerate(means)]
    every = [each * (slower if index == 2 else 1.0) for index, each in enumerate(every)]
    for index, compute in enumerate(every):
        last = index == len(means) - 1
        stage = StageTime(
            name=f"block{index}",
            compute=interval(compute * 0.9, 0.012),
            head=None if last else interval(compute * 0.12, 0.3),
            decision=None if last else interval(11e-6),
            boundary=interval(16e-6 if index else 30e-6),
            share=compute / means[-1],
            relative=interval(compute / (sum(every) - compute), 0.004) if len(every) > 1 else None,
        )
        found.append(stage)
    return tuple(found)


def operator_times(exits):
    shares = {"Conv": 0.71, "Relu": 0.09, "Gemm": 0.2}
    return tuple(
        OperatorTime(
            stage=f"block{index}",
            name=f"/{kind.lower()}",
            kind=kind,
            mean_s=share * 4e-4 * (index + 1),
            calls=50,
            share=share,
        )
        for index in range(exits)
        for kind, share in shares.items()
    )


def traces(means):
    found = []
    for number in range(3 * (len(means) + 1)):
        row, stream = divmod(number, 3)[0], number >= 3 * len(means)
        last = min(row, len(means) - 1) if not stream else number % 2
        spans, now = [Span(name="input", kind="input", start_ns=0, stop_ns=30_000)], 32_000
        for index in range(last + 1):
            takes = int((means[index] - (means[index - 1] if index else 0.0)) * 0.9e9)
            spans.append(Span(name=f"block{index}", kind="compute", start_ns=now, stop_ns=now + takes))
            spans.append(
                Span(name=f"exit{index + 1}", kind="decision", start_ns=now + takes + 500, stop_ns=now + takes + 9_000)
            )
            now += takes + 10_000
        spans.append(Span(name=f"exit{last + 1}", kind="answer", start_ns=now, stop_ns=now + 6_000))
        run = TracedRun(
            name="stream" if stream else f"exit{row + 1}",
            exit=last,
            start_s=1.0 + 0.02 * number,
            total_ns=now + 7_000,
            spans=tuple(spans),
        )
        found.append(run)
    return tuple(found)


def windows(random, spent, means):
    """Idle, five rounds of every row, idle; and the power that was seen meanwhile, ten times a second."""
    rounds = [("idle", "idle", IDLE_W * WINDOW_S, 0)]
    for _ in range(ROUNDS):
        for name, kind in spent:
            joules, mean = spent[name, kind], means[name]
            rounds.append((name, kind, joules / mean * WINDOW_S, round(WINDOW_S / mean)))
    rounds.append(("idle", "idle", IDLE_W * WINDOW_S, 0))
    found, start = [], 5.0
    for name, kind, joules, count in rounds:
        used = joules * random.normal(1, 0.004)
        found.append(
            Window(
                name=name, kind=kind, start_s=start, stop_s=start + WINDOW_S, inferences=count, energy_j=used,
                bound_j=0.02, updates=9_800, median_s=means.get(name),
            )
        )  # fmt: skip
        start += WINDOW_S + 0.5
    times = np.arange(5.0, start, 0.1)
    power = np.full(len(times), IDLE_W)
    for window in found:
        power[(times >= window.start_s) & (times <= window.stop_s)] = window.energy_j / WINDOW_S
    power += random.normal(0, 0.15, len(times))
    return tuple(found), PowerTrace(
        times_s=tuple(round(float(t), 3) for t in times), power_w=tuple(round(float(p), 4) for p in power)
    )


def paths(random, mean_s, samples, drift):
    gates = {"blocks.1": 0.12, "<b>2</b>": 0.0}
    full = tuple(int(value) for value in latencies(random, mean_s, samples, drift=drift))
    every = [("all gates open", dict.fromkeys(gates, True), full, None)]
    for name, saves in gates.items():
        taken = tuple(int(value) for value in latencies(random, mean_s * (1 - saves), samples, drift=drift))
        saved = Interval(value=saves * mean_s, low=(saves - 0.01) * mean_s, high=(saves + 0.01) * mean_s)
        every.append((f"without {name}", {other: other != name for other in gates}, taken, saved))
    return tuple(
        PathProfile(
            name=name, gates=outcome, macs=9_000_000, latency_ns=taken, latency=summary(taken), energy=energy(None),
            saved_s=saved,
        )
        for name, outcome, taken, saved in every
    )  # fmt: skip


def paced(random, stream_ns, rates, joules):
    found = []
    for rate in rates:
        taken = tuple(int(value * (1.0 + 0.6 / rate)) for value in random.permutation(stream_ns)[:200])
        spent = energy(None if joules is None else joules + IDLE_W / rate, net=False)
        found.append(PacedProfile(rate_hz=rate, latency_ns=taken, latency=summary(taken), late=1, energy=spent))
    return tuple(found)


def added(items, joules):
    """What each exit costs more than the one before; the second exit's energy may as well be nothing."""
    found = [items[0]]
    for before, item in pairwise(items):
        more_s = item.latency.median_s - before.latency.median_s
        more_j = Interval(value=joules, low=-0.2 * joules, high=2.2 * joules) if joules else None
        more_j = interval(joules) if joules and len(found) > 1 else more_j
        found.append(msgspec.structs.replace(item, added_s=interval(more_s), added_j=more_j))
    return tuple(found)


def make_profile(
    *, seed=0, samples=700, exits=5, labelled=True, joules=None, slower=1.0, drift=0.0, scripted=None, warnings=(),
    full=False, slow_stage=1.0, **changes,
):  # fmt: skip
    """A profile; ``full`` has every part that schema 2 knows, ``slow_stage`` slows the third stage."""
    random = np.random.default_rng(seed)
    means = [mean * slower for mean in MEANS_S[:exits]]
    stages = stage_times(means, slower=slow_stage)
    means = [mean + (slow_stage - 1) * stages[2].compute.value if i > 1 else mean for i, mean in enumerate(means)]
    shares = np.asarray(SHARES[:exits]) / sum(SHARES[:exits])
    taken = [tuple(int(value) for value in latencies(random, mean, samples, drift=drift)) for mean in means]
    chosen = random.choice(exits, size=samples, p=shares)
    wander = drifting(random, samples, drift) if drift else np.ones(samples)
    stream_ns = tuple(int(latencies(random, means[index], 1)[0] * wander[at]) for at, index in enumerate(chosen))
    found = [float((chosen == index).mean()) for index in range(exits)]
    items = tuple(
        ExitProfile(
            name=f"exit{index + 1}",
            macs=int(4.9e6 * (index + 1) ** 1.3),
            accuracy=ACCURACIES[index] if labelled else None,
            share=found[index],
            share_accuracy=0.93 - 0.06 * index if labelled else None,
            latency_ns=taken[index],
            latency=summary(taken[index]),
            energy=energy(None if joules is None else joules * (index + 1)),
        )
        for index in range(exits)
    )
    stream = StreamProfile(
        accuracy=0.811 if labelled else None,
        exits=tuple(int(index) for index in chosen),
        latency_ns=stream_ns,
        latency=summary(stream_ns),
        energy=energy(None if joules is None else joules * 2.1),
    )
    predicted = sum(share * item.latency.mean_s for share, item in zip(found, items, strict=True))
    fields = _conditions(samples=samples, exits=exits, seed=seed) | {
        "exits": added(items, joules) if full else items,
        "stream": stream,
        "closure": Closure(predicted=predicted, measured=stream.latency.mean_s),
        "energy_closure": None
        if joules is None
        else Closure(quantity="energy", predicted=joules * 2, measured=joules * 2.1),
        "warnings": tuple(warnings),
        "scripted": scripted,
    }
    if full:
        fields |= {
            "stages": stages,
            "operators": operator_times(exits),
            "traces": traces(means),
            "checks": CHECKS,
            "paths": paths(random, means[-1], samples, drift),
            "paced": paced(random, stream_ns, (10.0, 30.0), None if joules is None else joules * 2.1),
            "steady_rss_bytes": 120 * 2**20,
            "gates": (
                GateShare(name="blocks.1", reached=700, open=364, share=0.52),
                GateShare(name="<b>2</b>", reached=None, open=None, share=None),
            ),
        }
    if full and joules is not None:
        spent = {(item.name, "exit"): item.energy.gross_j for item in items} | {
            ("stream", "stream"): stream.energy.gross_j
        }
        by_name = {item.name: item.latency.mean_s for item in items} | {"stream": stream.latency.mean_s}
        fields["windows"], fields["power"] = windows(random, spent, by_name)
        fields["meter"] = MeterFacts(
            name="rapl", quantity="energy", scope="socket", covers="processor packages", parts=("package-0",),
            resolution=61e-6, update_interval_s=1e-3,
        )  # fmt: skip
    return Profile(**(fields | changes))


def _conditions(*, samples, exits, seed):
    return {
        "created": "2026-11-20T10:04:12+00:00",
        "network": "msdnet-cifar10",
        "plan": "3f9a1c0de55b" + "0" * 52,
        "artifacts": {f"stages/onnx/block{index}.onnx": f"{index}" * 64 for index in range(exits)},
        "runtime": {
            "name": "onnxruntime", "version": "1.32.0", "device": "CPU", "threads": 1, "options": {"arena": True},
        },
        "policy": {
            "name": "default",
            "score": "max_prob",
            "comparator": ">=",
            "thresholds": [0.93, 0.9, 0.88, None][: exits - 1],
            "temperatures": [1.4, 1.3, 1.2, 1.1, 1.05][:exits],
            "provenance": {
                "method": "thresholds within max_drop at least mean cost, on the calibration set",
                "guarantee": None,
                "data": "cifar10/calibration.npz",
                "samples": 5000,
                "runtime": "onnxruntime 1.32.0",
                "settings": {"max_drop": 0.01, "minimize": "latency"},
            },
        },
        "data": "cifar10/test.npz",
        "data_sha256": "c0ffee" + "0" * 58,
        "samples": samples,
        "settings": {"warmup_s": 0.2, "rounds": samples, "seed": seed, "interleaved": True},
        "load_s": 0.0812,
        "first_run_s": 0.0063,
        "peak_rss_bytes": 141 * 2**20,
        "before": environment(),
        "after": environment(temperatures_c={"x86_pkg_temp": 63.5, "acpitz": 45.0}, load=0.92, busy=0.04),
    }  # fmt: skip
