"""Energy or power of an NVIDIA graphics card, from the driver's management library (NVML)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from edgekit.errors import MeasurementError, MissingExtraError, require
from edgekit.measured import MeterFacts
from edgekit.profiles.reading import PolledMeter

__all__ = ["NvmlMeter"]

UPDATE_S = 0.1
"""Of counter and gauge, about; the driver does not tell (ml.energy, "thermally stable profiling")."""
CAUTION = "sampled 25 % of the time on A100 and H100 (arXiv 2312.02741)"


class NvmlMeter(PolledMeter):
    """One graphics card: its energy counter (since Volta), or its power where it has none.

    The figures are of the whole card, its memory included, whoever uses it. The driver forms them from samples of its
    own: on A100 and H100 a quarter of the time is looked at (Yang et al., 2024, arXiv 2312.02741), so work that comes
    and goes faster than about 0.1 s may be over- or underestimated; measure long windows. Power is an average over one
    second on cards since Ampere, GA100 aside (nvml.h, ``nvmlDeviceGetPowerUsage``).

    The chip of a Jetson answers as a card that supports neither; see :mod:`edgekit.profiles.jetson`.

    Args:
        gpu: index as ``nvidia-smi`` counts, which ``CUDA_VISIBLE_DEVICES`` does not change. Not needed where there is
            one card; of several, nobody tells which the network runs on, as CUDA may count them in another order.
        root: unused; the driver speaks for this machine alone.
        clock: nanoseconds, as ``time.perf_counter_ns``.
    """

    name = "nvml"

    def __init__(
        self, *, gpu: int | None = None, root: Path = Path("/"), clock: Callable[[], int] = time.perf_counter_ns
    ) -> None:
        super().__init__(root=root, clock=clock)
        self._wanted, self._gpu = gpu, gpu or 0
        self._library: ModuleType | None = None
        self._handle: Any = None
        self._counts = True
        self._opened_mj = 0

    def unavailable(self) -> str | None:
        """Why it cannot measure here, with what would fix it; ``None`` when it can."""
        if self._root != Path("/"):
            return f"asks the driver, which knows nothing of {self._root}; leave root as it is"
        try:
            with self._session() as (library, handle):
                self._has_counter(library, handle)
        except (MeasurementError, MissingExtraError) as error:
            return str(error)
        return None

    def facts(self) -> MeterFacts:
        """Card, counter or gauge, steps of 1 mJ or 1 mW, and the update interval of about 0.1 s."""
        with self._session() as (library, handle):
            counts = self._has_counter(library, handle)
            card = library.nvmlDeviceGetName(handle)
        card = card.decode() if isinstance(card, bytes) else card
        return MeterFacts(
            name=self.name,
            quantity="energy" if counts else "power",
            scope="gpu",
            covers=f"GPU {self._gpu}, {card}, with its memory; {CAUTION}",
            parts=(card,),
            resolution=1e-3,
            update_interval_s=UPDATE_S,
        )

    def _start(self) -> None:
        library, handle = self._begin()
        try:
            self._counts = self._has_counter(library, handle)
            self._opened_mj = library.nvmlDeviceGetTotalEnergyConsumption(handle) if self._counts else 0
        except BaseException:
            library.nvmlShutdown()
            raise
        self._library, self._handle = library, handle

    def _stop(self) -> None:
        if self._library is not None:
            self._library.nvmlShutdown()
        self._library = self._handle = None

    def _value(self) -> float:
        library: Any = self._library
        try:
            if self._counts:
                return float(library.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._opened_mj) * 1e-3
            return float(library.nvmlDeviceGetPowerUsage(self._handle)) * 1e-3
        except library.NVMLError as error:
            raise MeasurementError(f"nvml: GPU {self._gpu} can no longer be read ({error}); measure again") from error

    def _begin(self) -> tuple[Any, Any]:
        """The started library and the card's handle.

        Raises:
            MissingExtraError: the library is not installed.
            MeasurementError: there is no driver, no such card, or it is not clear which.
        """
        library: Any = require("pynvml", extra="nvml", purpose="Reading an NVIDIA card's energy")
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            raise MeasurementError(f"no NVIDIA driver answers ({error}); install it, or give another meter") from error
        try:
            cards = library.nvmlDeviceGetCount() if self._wanted is None else 1
            if cards <= 1:
                return library, library.nvmlDeviceGetHandleByIndex(self._gpu)
        except library.NVMLError as error:
            library.nvmlShutdown()
            raise MeasurementError(
                f"GPU {self._gpu} cannot be opened ({error}); nvidia-smi -L lists those there are: NvmlMeter(gpu=0)"
            ) from error
        library.nvmlShutdown()
        raise MeasurementError(
            f"there are {cards} cards; give the one that the network runs on, as nvidia-smi -L counts: NvmlMeter(gpu=0)"
        )

    @contextmanager
    def _session(self) -> Iterator[tuple[Any, Any]]:
        library, handle = self._begin()
        try:
            yield library, handle
        finally:
            library.nvmlShutdown()

    def _has_counter(self, library: Any, handle: Any) -> bool:
        """Whether it has an energy counter; else it has a power gauge.

        Raises:
            MeasurementError: it has neither.
        """
        missing = (library.NVMLError_NotSupported, library.NVMLError_FunctionNotFound)  # the latter of an old driver
        for read in (library.nvmlDeviceGetTotalEnergyConsumption, library.nvmlDeviceGetPowerUsage):
            try:
                read(handle)
            except missing:
                continue
            except library.NVMLError as error:
                raise MeasurementError(f"GPU {self._gpu} tells no energy ({error}); use another meter") from error
            return read is library.nvmlDeviceGetTotalEnergyConsumption
        raise MeasurementError(
            f"GPU {self._gpu} supports neither energy nor power (NotSupported), as the chip of a Jetson or a card "
            "before Kepler; on a Jetson use the meter 'jetson'"
        )
