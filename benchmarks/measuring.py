"""What the benchmarks share: static graphs bound once, and medians of interleaved runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from edgekit.data import load_dataset
from edgekit.exporters.capture import quiet
from edgekit.zoo import registry

TURN = 8
"""Timed runs in a row before the next variant has its turn."""

DATA = Path("../shared/data/cifar10/test.tar.gz")


def write_onnx(model: nn.Module, path: Path) -> Path:
    """One static graph, as people export it."""
    with quiet():
        program = torch.onnx.export(
            model.eval(),
            (torch.zeros(2, 3, 32, 32),),
            dynamo=True,
            opset_version=18,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["x"],
        )
    program.save(path, external_data=False)
    return path


def open_static(model: Path | bytes) -> onnxruntime.InferenceSession:
    """A plain session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class Bound:
    """A static graph with its input and outputs ``(batch, 10)`` bound once."""

    def __init__(self, session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]):
        self.session = session
        self.binding = self.session.io_binding()
        self.feeds = {name: array.copy() for name, array in feeds.items()}
        names = [item.name for item in self.session.get_outputs()]
        self.results = [np.zeros((len(feeds["x"]), 10), dtype=np.float32) for _ in names]
        arrays = (*self.feeds.values(), *self.results)
        self.values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        for name, value in zip(self.feeds, self.values, strict=False):
            self.binding.bind_ortvalue_input(name, value)
        for name, value in zip(names, self.values[len(self.feeds) :], strict=True):
            self.binding.bind_ortvalue_output(name, value)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        np.copyto(self.feeds["x"], x)
        self.session.run_with_iobinding(self.binding)
        return self.results[-1].copy()


def interleaved(calls: Mapping[str, Callable[[], Any]], *, rounds: int, seed: int = 0) -> dict[str, float]:
    """Median seconds of each call.

    Every round gives each call a turn, in a new random order. A turn is one untimed run and then :data:`TURN` timed
    ones: in use, a network is followed by itself, not by another that empties the caches.
    """
    random = np.random.default_rng(seed)
    names = list(calls)
    samples: dict[str, list[int]] = {name: [] for name in names}
    for call in calls.values():
        for _ in range(10):
            call()
    for _ in range(rounds):
        for index in random.permutation(len(names)):
            call = calls[names[index]]
            call()
            for _ in range(TURN):
                begin = time.perf_counter_ns()
                call()
                samples[names[index]].append(time.perf_counter_ns() - begin)
    return {name: statistics.median(values) / 1e9 for name, values in samples.items()}


def load_images(network: registry.Network, data: Path | None) -> tuple[np.ndarray, str]:
    """64 CIFAR images, or noise where the data is absent; which of them is part of the output."""
    if data is not None and data.exists():
        found = load_dataset(data, preprocess=network.preprocess)
        return found.batch(np.arange(0, len(found), len(found) // 64)[:64]), str(data.name)
    return np.random.default_rng(0).standard_normal((64, 3, 32, 32)).astype(np.float32), "noise"
