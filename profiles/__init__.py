"""Measures what each exit costs on this device: milliseconds, millijoules, and how sure either figure is.

One file per meter, reached by its entry point (group ``edgekit.meters``). This room measures and keeps the raw
samples; what people see is made by ``edgekit.report``.
"""

if __name__ != "edgekit.profiles":
    raise ImportError(
        f"import edgekit.profiles, not {__name__}: a second copy of every class would not be the first one's equal"
    )

from edgekit.profiles.profile import ProfileStopped, profile
from edgekit.profiles.protocol import PUBLISHABLE, QUICK, STANDARD, Protocol
from edgekit.profiles.rapl import RaplMeter
from edgekit.profiles.reading import Reading
from edgekit.profiles.replay import ReplayMeter

__all__ = [
    "PUBLISHABLE",
    "QUICK",
    "STANDARD",
    "ProfileStopped",
    "Protocol",
    "RaplMeter",
    "Reading",
    "ReplayMeter",
    "profile",
]
