"""Everything edgekit raises on purpose.

::

    EdgekitError
    ├── MissingExtraError      a library that an optional part needs is not installed
    ├── CaptureError           a model cannot become one graph
    │   └── DecisionError      its exits cannot be told from its outputs
    ├── PartitionError         the graph cannot be cut into stages
    ├── LoweringError          a stage cannot be written for a target, or does not open in its runtime
    ├── ParityError            the written stages do not answer as the eager model does
    ├── BundleError            a bundle is damaged, foreign, or written by a newer edgekit
    ├── PolicyError            thresholds that do not fit the network or are not numbers
    ├── InputError             a tensor with the wrong name, dtype or shape
    ├── DataError              a data set that cannot be read or used
    ├── CalibrationError       no thresholds can be chosen from this data
    ├── MeasurementError       a measurement that would not mean anything
    ├── PluginError            a runtime, target or meter that is unknown or broken
    └── TrainingError          a zoo network cannot be trained as asked

Every message names what failed (file, stage or tensor) and what to do about it, in one line.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

__all__ = [
    "BundleError",
    "CalibrationError",
    "CaptureError",
    "DataError",
    "DecisionError",
    "EdgekitError",
    "InputError",
    "LoweringError",
    "MeasurementError",
    "MissingExtraError",
    "ParityError",
    "PartitionError",
    "PluginError",
    "PolicyError",
    "TrainingError",
    "require",
]

_MEND = "install the one made for this Python and system"


class EdgekitError(Exception):
    """Root of every error that edgekit raises on purpose."""


class MissingExtraError(EdgekitError, ImportError):
    """A library that an optional part of edgekit needs is not installed."""


class CaptureError(EdgekitError):
    """A model cannot become one graph."""


class DecisionError(CaptureError):
    """The exits of a model cannot be told from its outputs."""


class PartitionError(EdgekitError):
    """A captured graph cannot be cut into stages."""


class LoweringError(EdgekitError):
    """A stage cannot be written for a target, or what was written does not open in its runtime."""


class ParityError(EdgekitError):
    """The written stages do not answer as the eager model does."""


class BundleError(EdgekitError):
    """A bundle is damaged, foreign, or was written by a newer edgekit."""


class PolicyError(EdgekitError):
    """Thresholds that do not fit the network, or are not numbers."""


class InputError(EdgekitError, ValueError):
    """A tensor with the wrong name, dtype or shape."""


class DataError(EdgekitError):
    """A data set that cannot be read or used."""


class CalibrationError(EdgekitError):
    """No thresholds can be chosen from this data."""


class MeasurementError(EdgekitError):
    """A measurement that would not mean anything."""


class PluginError(EdgekitError):
    """A runtime, target or meter that is unknown or broken."""


class TrainingError(EdgekitError):
    """A zoo network cannot be trained as asked."""


def require(module: str, *, extra: str, purpose: str, mend: str = _MEND) -> ModuleType:
    """Import a library of an optional extra.

    Args:
        module: dotted module name, as in ``import module``.
        extra: the edgekit extra that brings it.
        purpose: what needs it, as the start of a sentence ("Running on ONNX Runtime").
        mend: what to do where it is installed and does not load.

    Raises:
        MissingExtraError: it is not installed; the message is the install line.
        PluginError: it is, but does not load: what it needs is missing, or made for another system.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        name = (error.name if isinstance(error, ModuleNotFoundError) else None) or ""
        if name == library or (name.startswith(f"{library}.") and importlib.util.find_spec(library) is None):
            raise MissingExtraError(
                f"{purpose} needs {library}, which is not installed: pip install 'edgekit[{extra}]'"
            ) from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PluginError(
            f"{purpose} needs {library}, which is installed but does not load ({reason}); {mend}"
        ) from error
