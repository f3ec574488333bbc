"""One pool of threads for everything in a process that runs on ONNX Runtime."""

from __future__ import annotations

from typing import Any

from edgekit.errors import PluginError

__all__ = ["require_own_threads", "share_threads"]

_shared: list[int] = []
"""Threads of the pool, once there is one: it is the process's, and stays."""


def share_threads(ort: Any, threads: int) -> None:
    """Make the pool, unless it is there already.

    Args:
        ort: the module ``onnxruntime``.
        threads: of the pool.

    Raises:
        PluginError: this version of ONNX Runtime has no such pool, or there is one with another number of threads.
    """
    if _shared:
        if _shared[0] != threads:
            raise PluginError(
                f"runtime 'onnxruntime': the one pool of this process has {_shared[0]} threads and cannot have "
                f"{threads}; give threads={_shared[0]}, or start another process"
            )
        return
    make = getattr(ort, "set_global_thread_pool_sizes", None)
    if make is None:
        raise PluginError(
            f"runtime 'onnxruntime': onnxruntime {ort.__version__} has no threads to share; leave out shared_threads, "
            "or install a newer version"
        )
    try:
        make(threads, 1)
    except Exception as error:  # of its own classes, which have nothing below Exception in common
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PluginError(
            f"runtime 'onnxruntime': threads cannot be shared ({reason}); leave out shared_threads"
        ) from error
    _shared.append(threads)


def require_own_threads() -> None:
    """Raises :class:`PluginError` where the process shares its threads: ONNX Runtime then refuses any others."""
    if _shared:
        raise PluginError(
            f"runtime 'onnxruntime': this process shares its {_shared[0]} threads, and ONNX Runtime then takes no "
            f"session with its own; give shared_threads=True and threads={_shared[0]}, or use another process"
        )
