"""Whole networks as people ship them: converted by the runtime's own library, called through its own interpreter."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch
from measuring import Bound, write_onnx
from torch import nn

__all__ = ["PEERS", "Peer"]


LITERT_INT8 = ("AVERAGE_POOL_2D", "CONCATENATION", "CONV_2D", "FULLY_CONNECTED", "MAX_POOL_2D", "PAD", "RESHAPE")
"""Operators of a whole network that are quantised. With ADD among them, masks and all, LiteRT 2.3 ends the process."""


class Peer(Protocol):
    """One whole network, open."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Logits ``(1, classes)`` of the last output for one image."""
        ...


def onnxruntime_peer(model: nn.Module, path: Path, images: np.ndarray, *, precision: str, threads: int) -> Peer:
    """Inputs and outputs bound beforehand; int8 by ``quantize_static``, calibrated on all images."""
    file = path.with_suffix(".onnx")
    if not file.exists():
        write_onnx(model, file)
    if precision == "int8":
        whole, file = file, path.with_suffix(".int8.onnx")
        if not file.exists():
            _quantize_onnx(whole, file, images)
    options = onnxruntime.SessionOptions()
    if threads == 1:
        options.intra_op_num_threads = 1
    else:
        options.use_per_session_threads = False  # those of the process, as the stages have
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return Bound(session, {"x": images[:1]})


def _quantize_onnx(whole: Path, file: Path, images: np.ndarray) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(range(len(images)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.rows, None)
            return None if row is None else {"x": images[row : row + 1]}

    quantize_static(
        whole,
        file,
        Images(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def litert_peer(model: nn.Module, path: Path, images: np.ndarray, *, precision: str, threads: int) -> Peer:
    """Converted whole by litert-torch; int8 by ai-edge-quantizer, calibrated on all images."""
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    file = path.with_suffix(".tflite")
    if not file.exists():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # the converter prints its steps
            litert_torch.convert(model.eval(), (torch.from_numpy(images[:1]),)).export(str(file))
    if precision == "int8":
        whole, file = file, path.with_suffix(".int8.tflite")
        if not file.exists():
            _quantize_litert(whole, file, images)
    interpreter = Interpreter(str(file), num_threads=threads)
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    last = max(interpreter.get_output_details(), key=lambda each: each["name"])
    (scale, zero), is_float = given["quantization"], given["dtype"] == np.float32

    def run(x: np.ndarray) -> np.ndarray:
        interpreter.tensor(given["index"])()[...] = x if is_float else np.rint(x / scale + zero).clip(-128, 127)
        interpreter.invoke()
        logits: np.ndarray = interpreter.get_tensor(last["index"])
        return logits

    return run


def _quantize_litert(whole: Path, file: Path, images: np.ndarray) -> None:
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.quantizer import Quantizer

    ((key, signature),) = Interpreter(str(whole)).get_signature_list().items()
    (name,) = signature["inputs"]
    made = Quantizer(str(whole))
    for operator in LITERT_INT8:
        made.add_static_config(".*", TFLOperationName(operator), activation_num_bits=8, weight_num_bits=8)
    found = made.calibrate({key: [{name: images[row : row + 1]} for row in range(len(images))]}, num_threads=1)
    made.quantize(found, enable_progress_bar=False, enable_progress_report=False).export_model(str(file))


def executorch_peer(model: nn.Module, path: Path, images: np.ndarray, *, precision: str, threads: int) -> Peer:
    """Lowered whole to XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    if precision != "float32":
        raise ValueError("the whole network is not quantised for ExecuTorch here")
    _unsafe_reset_threadpool(threads)
    file = path.with_suffix(".pte")
    if not file.exists():
        program = torch.export.export(model.eval(), (torch.from_numpy(images[:1]),))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        file.write_bytes(lowered.buffer)
    method = Runtime.get().load_program(file).load_method("forward")

    def run(x: np.ndarray) -> np.ndarray:
        made: Any = method.execute([torch.from_numpy(x)])
        logits: np.ndarray = made[-1].numpy()
        return logits

    return run


PEERS = {"onnxruntime": onnxruntime_peer, "litert": litert_peer, "executorch": executorch_peer}
