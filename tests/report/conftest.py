"""Synthetic profiles that look like real ones (gamma-shaped latencies with a tail, from a seed), plans, a browser."""

from __future__ import annotations

import shutil
import subprocess

import msgspec
import numpy as np
import pytest

from edgekit.environment import Environment
from edgekit.plan import SCORES, Exit, Gate, Plan, Run, Stage
from edgekit.records import Closure, Energy, ExitProfile, GateShare, LatencySummary, Profile, StreamProfile
from edgekit.tensors import TensorSpec

MEANS_S = (0.9e-3, 1.6e-3, 2.4e-3, 3.3e-3, 4.4e-3)
ACCURACIES = (0.642, 0.731, 0.778, 0.805, 0.817)
SHARES = (0.46, 0.22, 0.14, 0.08, 0.10)
NO_METER = "no power sensor found (/sys/class/powercap is missing: a virtual machine); try a replay meter"
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=10000",
    "--dump-dom",
]


def summary(taken_ns):
    """Plain numpy, independent of the profiler."""
    x = np.asarray(taken_ns, float) / 1e9
    half = 1.96 * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else 0.0
    return LatencySummary(
        samples=len(x),
        min_s=float(x.min()),
        median_s=float(np.median(x)),
        mean_s=float(x.mean()),
        sd_s=float(x.std(ddof=1)) if len(x) > 1 else 0.0,
        p90_s=float(np.quantile(x, 0.9)) if len(x) >= 64 else None,
        p99_s=float(np.quantile(x, 0.99)) if len(x) >= 662 else None,
        median_low_s=float(np.median(x) - 1.2 * half),
        median_high_s=float(np.median(x) + 1.2 * half),
        mean_low_s=float(x.mean() - half),
        mean_high_s=float(x.mean() + half),
        confidence=0.95,
        outliers=int((x > np.quantile(x, 0.75) + 3 * (np.quantile(x, 0.75) - np.quantile(x, 0.25))).sum()),
    )


def latencies(random, mean_s, samples):
    base = mean_s * (0.94 + random.gamma(3.0, 0.02, samples))
    spikes = random.random(samples) < 0.01
    return np.where(spikes, base * random.uniform(1.5, 2.5, samples), base) * 1e9


def energy(joules):
    if joules is None:
        return Energy(reason=NO_METER, meter="rapl")
    return Energy(
        gross_j=joules,
        net_j=joules * 0.6,
        quantity="counter",
        scope="package-0: the whole socket",
        meter="rapl",
        window_s=10.0,
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


def make_profile(
    *, seed=0, samples=700, exits=5, labelled=True, joules=None, slower=1.0, scripted=None, warnings=(), **changes
):
    random = np.random.default_rng(seed)
    means = [mean * slower for mean in MEANS_S[:exits]]
    shares = np.asarray(SHARES[:exits]) / sum(SHARES[:exits])
    taken = [tuple(int(value) for value in latencies(random, mean, samples)) for mean in means]
    chosen = random.choice(exits, size=samples, p=shares)
    stream_ns = tuple(int(latencies(random, means[index], 1)[0]) for index in chosen)
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
    fields = {
        "created": "2026-11-20T10:04:12+00:00",
        "network": "msdnet-cifar10",
        "plan": "3f9a1c0de55b" + "0" * 52,
        "artifacts": {f"stages/onnx/block{index}.onnx": f"{index}" * 64 for index in range(exits)},
        "runtime": {
            "name": "onnxruntime",
            "version": "1.32.0",
            "device": "CPU",
            "threads": 1,
            "options": {"arena": True},
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
        "exits": items,
        "stream": stream,
        "closure": Closure(predicted_s=predicted, measured_s=stream.latency.mean_s),
        "energy_closure": None if joules is None else Closure(predicted_s=joules * 2, measured_s=joules * 2.1),
        "load_s": 0.0812,
        "first_run_s": 0.0063,
        "peak_rss_bytes": 141 * 2**20,
        "before": environment(),
        "after": environment(temperatures_c={"x86_pkg_temp": 63.5, "acpitz": 45.0}, load=0.92, busy=0.04),
        "warnings": tuple(warnings),
        "scripted": scripted,
    }
    return Profile(**(fields | changes))


@pytest.fixture(scope="session")
def profile():
    return make_profile(warnings=("governor is 'powersave', not 'performance': clocks may vary",))


@pytest.fixture(scope="session")
def with_energy():
    return make_profile(seed=3, joules=2.3e-3)


@pytest.fixture(scope="session")
def unlabelled():
    return make_profile(labelled=False)


@pytest.fixture(scope="session")
def one_exit():
    return make_profile(exits=1, samples=50)


@pytest.fixture(scope="session")
def scripted():
    return make_profile(scripted="runtime 'fake' answers from a script; its latencies mean nothing")


@pytest.fixture(scope="session")
def with_gates(profile):
    gates = (
        GateShare(name="blocks.1", reached=700, open=364, share=0.52),
        GateShare(name="<b>2</b>", reached=None, open=None, share=None),
    )
    stream = msgspec.structs.replace(profile.stream, macs=1_234_567.0)
    return msgspec.structs.replace(profile, gates=gates, stream=stream)


@pytest.fixture(scope="session")
def damaged_names(profile):
    """Names that are markup, script, templates and formulas."""
    nasty = "</script><img src=x onerror=alert(1)><b>{{ 7*7 }}%{x}"
    # The first is short enough to stand in the charts in full.
    names = ["<b>{{7*7}}</b>", nasty]
    renamed = [msgspec.structs.replace(item, name=name) for item, name in zip(profile.exits, names, strict=False)]
    return msgspec.structs.replace(
        profile, exits=(*renamed, *profile.exits[2:]), network=nasty, warnings=(nasty,), runtime={"name": nasty}
    )


class Planner:
    """Writes plans stage by stage, as an exporter would."""

    def __init__(self, name="x"):
        self.tensors, self.stages, self.steps = {}, [], []
        self.at = self.tensor(name)

    def tensor(self, name, shape=("batch", 16, 8, 8)):
        self.tensors[name] = TensorSpec(name, "float32", shape)
        return name

    def run(self, name, read, *, value=False, macs=1_000_000):
        """A stage that makes one tensor, and with ``value`` the one number of a gate as well."""
        outputs = [self.tensor(f"{name}/relu")] + ([self.tensor(f"{name}/gt", ("batch", 1))] if value else [])
        self.stages.append(
            Stage(
                name=name, module=f"net.{name}", inputs=(read,), outputs=tuple(outputs), macs=macs, weight_bytes=9_000,
                exit=False,
            )
        )  # fmt: skip
        return Run(name), *outputs

    def gate(self, name, value, steps, *, opened, closed, otherwise=()):
        output = self.tensor(f"{name}/add")
        made = Gate(name=name, value=value, steps=steps, otherwise=otherwise, outputs={output: (opened, closed)})
        return made, output

    def exit(self, name, read):
        scores = {score: f"{name}.{score}" for score in SCORES}
        logits = self.tensor(f"{name}.logits", ("batch", 10))
        temperature = self.tensor(f"{name}.temperature", ())
        for score in scores.values():
            self.tensor(score, ("batch",))
        outputs = (logits, *scores.values())
        self.stages.append(
            Stage(name=f"{name}.head", inputs=(read, temperature), outputs=outputs, macs=5_000, weight_bytes=100)
        )
        return Run(f"{name}.head"), Exit(name=name, logits=logits, temperature=temperature, scores=scores)

    def plan(self, *steps):
        first = next(iter(self.tensors.values()))
        return Plan(inputs=(first,), tensors=self.tensors, stages=tuple(self.stages), steps=steps)


def chained(gates):
    """As many skippable blocks one after the other, each asked by a stage of its own."""
    net, steps = Planner(), []
    for index in range(gates):
        ask, _, value = net.run(f"gate{index}", net.at, value=True)
        block, made = net.run(f"layer{index}", net.at)
        gate, net.at = net.gate(f"layer{index}", value, (block,), opened=made, closed=net.at)
        steps += [ask, gate]
    return net.plan(*steps, *net.exit("exit1", net.at))


def nested(name="x"):
    """Gates inside a gate, one with two ways, one that runs when closed, one that runs nothing, around an exit."""
    net = Planner(name)
    stem, before, outer = net.run("stem", net.at, value=True)
    ask, asked, inner = net.run("outer.ask", before, value=True)
    (one, a), (two, b) = net.run("outer.one", asked), net.run("outer.two", asked, macs=200_000)
    branch, joined = net.gate("outer.branch", inner, (one,), opened=a, closed=b, otherwise=(two,))
    middle, c, again = net.run("outer.middle", joined, value=True)
    deep, d = net.run("outer.deep", c)
    deepest, e = net.gate("outer.deep", again, (deep,), opened=d, closed="")
    whole, f = net.gate("outer", outer, (ask, branch, middle, deepest), opened=e, closed=before)
    head, early = net.exit("exit1", f)
    tail, g, last = net.run("tail", f, value=True)
    other, h = net.run("only_closed", g, macs=None)
    closed, i = net.gate("only_closed", last, (), opened=g, closed=h, otherwise=(other,))
    pick, j = net.gate("pick", last, (), opened=i, closed=g)
    return net.plan(stem, whole, head, early, tail, closed, pick, *net.exit("exit2", j))


def looped():
    """One stage run twice, the second time only where a gate is open."""
    net = Planner()
    step, once, value = net.run("step", net.at, value=True)
    names = {net.at: once, once: net.tensor("step_2/relu"), value: net.tensor("step_2/gt", ("batch", 1))}
    gate, out = net.gate("step_2", value, (Run("step", names),), opened=names[once], closed=once)
    return net.plan(step, gate, *net.exit("exit1", out))


@pytest.fixture(scope="session")
def plans():
    """By name; ``nasty`` has markup and control characters in its names."""
    nasty = nested("<img src=x onerror=alert(1)>&\x00\x1b]]>")
    return {"chain2": chained(2), "chain54": chained(54), "nested": nested(), "looped": looped(), "nasty": nasty}


@pytest.fixture(scope="session")
def opened():
    """Opens a page in headless Chromium: ``opened(page, folder, *options)``; the folder is the browser's own."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("no Chromium on the PATH (Debian: make browser)")

    def run(page, folder, *options):
        """The page after its scripts have run, and what it said on the console.

        Whatever the page tries to fetch is refused by its own Content-Security-Policy, which says so on the console.
        """
        command = [chromium, *QUIET, *options, f"--user-data-dir={folder}", page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=True)
        console = [line.split("CONSOLE", 1)[1] for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return done.stdout, console

    return run
