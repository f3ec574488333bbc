"""litert-torch as a guest: what it and its libraries print, log and change in the process is undone."""

from __future__ import annotations

import io
import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from types import ModuleType

import numpy as np
import torch

from edgekit.errors import require
from edgekit.exporters.capture import quiet
from edgekit.streams import unheard

__all__ = ["converter", "undisturbed"]

_SETTINGS = {"LITERT_TORCH_SHOW_PROGRESS": "0", "LITERT_TORCH_SILENCE_TORCH_LOGS": "0"}
"""Read at every conversion: do not print, and leave PyTorch's loggers their handlers."""


def converter() -> ModuleType:
    """The module ``litert_torch``.

    Raises:
        MissingExtraError: it is not installed.
        PluginError: it is, but does not load.
    """
    with nullcontext() if "litert_torch" in sys.modules else undisturbed():
        return require(
            "litert_torch",
            extra="export-litert",
            purpose="Exporting to LiteRT",
            mend="pip install --force-reinstall 'edgekit[export-litert]'",
        )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep what is done inside to itself: output, logging, warnings, environment variables and random numbers.

    The libraries below print from C++, which only the file descriptor knows.
    """
    environment = dict(os.environ)
    loggers = [logging.getLogger(), *(each for each in logging.Logger.manager.loggerDict.values())]
    known = [logger for logger in loggers if isinstance(logger, logging.Logger)]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in known]
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002 the old global one is what is drawn from
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=()))
        stack.enter_context(quiet())
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(unheard())
        os.environ.update(_SETTINGS)
        try:
            yield
        finally:
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])  # noqa: NPY002
            for logger, (level, propagate, handlers) in zip(known, before, strict=True):
                logger.setLevel(level)
                logger.propagate, logger.handlers[:] = propagate, handlers
