"""ONNX Runtime's execution providers: short names, where each comes from, and which one every node went to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekit.errors import PluginError

__all__ = ["CPU", "NO_CPU", "ON_CUDA", "RECORD", "Assigned", "assigned", "options_text", "provider_name"]

CPU = "CPUExecutionProvider"

_COMES_WITH = {
    "acl": ("ACLExecutionProvider", "a build of ONNX Runtime with --use_acl"),
    "coreml": ("CoreMLExecutionProvider", "onnxruntime on macOS"),
    "cpu": (CPU, "every onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu, on a Jetson from NVIDIA's index for its JetPack"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
    "qnn": ("QNNExecutionProvider", "onnxruntime-qnn"),
    "rocm": ("ROCMExecutionProvider", "onnxruntime-rocm"),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu, on a Jetson from NVIDIA's index for its JetPack"),
    "xnnpack": ("XnnpackExecutionProvider", "a build of ONNX Runtime with --use_xnnpack"),
}

ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
"""Those that keep tensors in CUDA's memory."""

RECORD = "session.record_ep_graph_assignment_info"
"""Session configuration entry that makes :func:`assigned` possible."""
NO_CPU = "session.disable_cpu_ep_fallback"
"""Session configuration entry with which a session does not open when a node would go to the CPU."""

Assigned = dict[str, tuple[str, ...]]
"""Nodes, as ``"conv1 (Conv)"``, by the provider that runs them."""


def provider_name(given: str, available: list[str]) -> str:
    """ONNX Runtime's own name of a provider that is here; ``"cuda"`` is ``"CUDAExecutionProvider"``.

    Raises:
        PluginError: it is not here; the message says what brings it.
    """
    name, comes_with = _COMES_WITH.get(given.lower(), (given, ""))
    if name not in available:
        by_name = dict(_COMES_WITH.values())
        source = comes_with or by_name.get(name, "")
        raise PluginError(
            f"runtime 'onnxruntime': no provider '{given}' here (available: {', '.join(available)})"
            + (f"; it comes with {source}" if source else "")
        )
    return name


def options_text(given: Mapping[str, Any] | None) -> dict[str, str]:
    """Options as ONNX Runtime takes them: text, and 1 and 0 for true and false."""
    return {name: str(int(value)) if isinstance(value, bool) else str(value) for name, value in (given or {}).items()}


def assigned(session: Any) -> Assigned | None:
    """Which provider each node of an open session went to; ``None`` where this ONNX Runtime cannot tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    found: dict[str, list[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            found.setdefault(part.ep_name, []).append(f"{node.name or 'nameless'} ({node.op_type})")
    return {provider: tuple(nodes) for provider, nodes in found.items()}
