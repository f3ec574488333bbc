"""Power of a Raspberry Pi 5's rails, from the converters of its power management chip."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from edgekit.errors import MeasurementError
from edgekit.measured import MeterFacts
from edgekit.profiles import sysfs
from edgekit.profiles.reading import PolledMeter
from edgekit.tree import Runner, UnreadableError, run_command

__all__ = ["PmicMeter"]

COMMAND = ("vcgencmd", "pmic_read_adc")
UPDATE_S = 0.2
"""It is asked twice in this time: an answer costs a process, and others ask at 10 Hz (zeus pull request 274)."""
LINE = re.compile(r"\s*(\w+)_([AV]) (?:current|volt)\(\d+\)=([0-9.]+)[AV]\s*")
"""As ``VDD_CORE_A current(7)=0.87A`` and ``VDD_CORE_V volt(15)=0.72V``."""
WITH_PMIC = re.compile(r"raspberry pi (?:5|500|compute module 5)\b")
"""Models whose firmware answers. A Raspberry Pi 4 has no such converters."""


class PmicMeter(PolledMeter):
    """Sum of voltage times current over every rail that tells both, twelve on a Raspberry Pi 5.

    The 5 V input tells its voltage only, so what hangs on 5 V directly is not seen: USB devices, a fan, a hat, and the
    losses of the converters. The board draws more than the sum; by how much differs from board to board, and no factor
    is applied here.

    The chip is asked by ``vcgencmd``, a process for each reading, which needs the group ``video``; there is no other
    way that is documented.

    Args:
        run: runs a command and returns what it printed; for tests.
        root: the folder that stands for ``/``.
        clock: nanoseconds, as ``time.perf_counter_ns``.
    """

    name = "pmic"

    def __init__(
        self,
        *,
        run: Runner = run_command,
        root: Path = Path("/"),
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        super().__init__(root=root, clock=clock)
        self._run = run
        self._rails: tuple[str, ...] = ()

    def unavailable(self) -> str | None:
        """Why it cannot measure here, with what would fix it; ``None`` when it can."""
        board = sysfs.board(self._root).lower()
        if "raspberry pi" not in board:
            return "not a Raspberry Pi 5, or a container that hides the device tree; use another meter"
        if not WITH_PMIC.search(board):
            return "this Raspberry Pi has no rail converters, only a Pi 5 has; use an external meter (ina, joulescope)"
        try:
            self._powers_w()
        except MeasurementError as error:
            return str(error)
        return None

    def facts(self) -> MeterFacts:
        """Rails, and how often asking makes sense. The converters' steps are not documented: ``None``."""
        return MeterFacts(
            name=self.name,
            quantity="power",
            scope="board",
            covers="the board's rails behind its power chip, without USB and other 5 V loads and converter losses",
            parts=tuple(self._powers_w()),
            update_interval_s=UPDATE_S,
        )

    def _start(self) -> None:
        self._rails = tuple(self._powers_w())

    def _value(self) -> float:
        powers_w = self._powers_w()
        if tuple(powers_w) != self._rails:
            missing = ", ".join(sorted(set(self._rails) ^ set(powers_w)))
            raise MeasurementError(f"pmic: the rails changed ({missing}); measure again")
        return sum(powers_w.values())

    def _powers_w(self) -> dict[str, float]:
        """Power of every rail that tells voltage and current.

        Raises:
            MeasurementError: the command cannot be run, or prints something else.
        """
        try:
            printed = self._run(COMMAND)
        except UnreadableError as error:
            raise MeasurementError(
                f"{error}; sudo apt install raspi-utils brings it, and sudo usermod -aG video $USER allows it from the "
                "next login on"
            ) from error
        parts: dict[str, dict[str, float]] = {}
        for line in filter(None, map(LINE.fullmatch, printed.splitlines())):
            rail, kind, value = line.groups()
            parts.setdefault(rail, {})[kind] = float(value)
        powers_w = {rail: each["A"] * each["V"] for rail, each in parts.items() if len(each) == 2}
        if not powers_w:
            raise MeasurementError(f"{' '.join(COMMAND)} told no rail ({printed.strip()[:80]!r}); update the firmware")
        return powers_w
