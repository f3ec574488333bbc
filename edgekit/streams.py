"""Silence for libraries that write to standard error from C++."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["unheard"]

_redirecting = threading.RLock()
"""Of two threads at once, one would restore what the other has put there."""


@contextmanager
def unheard() -> Iterator[None]:
    """Send what is written to the descriptor of standard error nowhere."""
    with _redirecting:
        kept = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(nowhere)
            os.close(kept)
