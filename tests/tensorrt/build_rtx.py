"""Builds ONNX files into TensorRT-RTX engines by edgekit's own builder, and prints what came of each, as JSON.

TensorRT-RTX has TensorRT's interface, and its builder needs no GPU when it is told what GPU to build for.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import tensorrt_rtx_bindings as trt

from edgekit.exporters.to_tensorrt import TensorRTTarget


def for_a_gpu(config):
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM120, 0)


def parsed(target, file):
    """Inputs and outputs as the parser reads them: dtype and shape by name."""
    builder = trt.Builder(target.log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, target.log)
    assert parser.parse_from_file(file)
    given = [network.get_input(index) for index in range(network.num_inputs)]
    made = [network.get_output(index) for index in range(network.num_outputs)]
    return [{each.name: [each.dtype.name, list(each.shape)] for each in side} for side in (given, made)]


def main(most, *files):
    target = TensorRTTarget(trt)
    told = {}
    timing = b""
    for file in files:
        steps = []
        begin = time.perf_counter()
        engine, timing = target.build(
            Path(file),
            stage=Path(file).stem,
            batch=(1, int(most), int(most)),
            workspace_bytes=256 << 20,
            timing=timing,
            configure=for_a_gpu,
            progress=lambda task, done, total, steps=steps: steps.append(done),
        )
        seconds = time.perf_counter() - begin
        given, made = parsed(target, file)
        told[file] = {
            "size_bytes": len(engine),
            "sha256": hashlib.sha256(engine).hexdigest(),
            "seconds": seconds,
            "steps": steps,
            "inputs": given,
            "outputs": made,
            "timing_bytes": len(timing),
        }
    print(json.dumps({"version": trt.__version__, "files": told}))


main(*sys.argv[1:])
