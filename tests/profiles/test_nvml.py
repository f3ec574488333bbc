"""The real nvidia-ml-py over a driver made of Python functions: no card was at hand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import edgekit.profiles.nvml as module
from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles.nvml import NvmlMeter

pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py: pip install 'edgekit[nvml]'")


class Driver:
    """Answers as libnvidia-ml does: a return code, and values written to where the library points.

    Args:
        energy_mj: of card 0; an error code when negative.
        power_mw: likewise.
        cards: how many.
    """

    def __init__(self, *, energy_mj: int = 5_000, power_mw: int = 70_000, cards: int = 1) -> None:
        self.energy_mj, self.power_mw, self.cards = energy_mj, power_mw, cards
        self.users = 0
        self.init = 0

    def function(self, name: str):
        return getattr(self, name)

    def nvmlInitWithFlags(self, flags):
        self.users += self.init == 0
        return self.init

    def nvmlShutdown(self):
        self.users -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        return self._answer(count, self.cards)

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        return 0 if index.value < self.cards else pynvml.NVML_ERROR_INVALID_ARGUMENT

    def nvmlDeviceGetName(self, handle, text, size):
        text.value = b"NVIDIA H100 80GB HBM3"
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, millijoules):
        return self._answer(millijoules, self.energy_mj)

    def nvmlDeviceGetPowerUsage(self, handle, milliwatts):
        return self._answer(milliwatts, self.power_mw)

    @staticmethod
    def _answer(reference, value: int) -> int:
        if value < 0:
            return -value
        reference._obj.value = value
        return 0


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(pynvml, "_LoadNvmlLibrary", lambda: None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer", made.function)
    yield made
    assert made.users == 0, "every start of the library needs its shutdown"


def test_the_counter_comes_first(driver, clock):
    meter = NvmlMeter(clock=clock)
    assert isinstance(meter, Meter)
    assert meter.unavailable() is None
    facts = meter.facts()
    assert (facts.quantity, facts.scope, facts.parts) == ("energy", "gpu", ("NVIDIA H100 80GB HBM3",))
    assert (facts.resolution, facts.update_interval_s) == (1e-3, 0.1)
    assert "sampled 25 % of the time on A100 and H100" in facts.covers
    meter.open()
    driver.energy_mj += 12_345
    clock.pass_s(2)
    reading = meter.read()
    assert reading.value == pytest.approx(12.345)
    assert reading.time_ns == 2_000_000_000
    meter.close()
    meter.open()
    assert meter.read().value == 0
    meter.close()


@pytest.mark.parametrize("code", ["NVML_ERROR_NOT_SUPPORTED", "NVML_ERROR_FUNCTION_NOT_FOUND"])
def test_power_where_there_is_no_counter(driver, code):
    driver.energy_mj = -getattr(pynvml, code)
    meter = NvmlMeter()
    assert meter.unavailable() is None
    assert meter.facts().quantity == "power"
    meter.open()
    assert meter.read().value == pytest.approx(70.0)
    meter.close()


def test_a_jetson_answers_and_supports_nothing(driver):
    driver.energy_mj = driver.power_mw = -pynvml.NVML_ERROR_NOT_SUPPORTED
    meter = NvmlMeter()
    reason = meter.unavailable()
    assert reason is not None
    assert "NotSupported" in reason
    assert "use the meter 'jetson'" in reason
    with pytest.raises(MeasurementError, match="nvml: GPU 0 supports neither"):
        meter.open()


def test_no_driver(driver):
    driver.init = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    assert "no NVIDIA driver answers (Driver Not Loaded)" in (NvmlMeter().unavailable() or "")


def test_another_card(driver):
    assert "GPU 1 cannot be opened (Invalid Argument)" in (NvmlMeter(gpu=1).unavailable() or "")
    driver.cards = 2
    assert NvmlMeter(gpu=1).unavailable() is None
    assert NvmlMeter(gpu=1).facts().covers.startswith("GPU 1, ")


def test_of_several_cards_one_must_be_chosen(driver):
    driver.cards = 2
    assert "there are 2 cards; give the one that the network runs on" in (NvmlMeter().unavailable() or "")
    assert NvmlMeter(gpu=0).unavailable() is None


def test_no_permission(driver):
    driver.energy_mj = -pynvml.NVML_ERROR_NO_PERMISSION
    assert "tells no energy (Insufficient Permissions)" in (NvmlMeter().unavailable() or "")


def test_a_card_that_goes(driver):
    meter = NvmlMeter()
    meter.open()
    driver.energy_mj = -pynvml.NVML_ERROR_GPU_IS_LOST
    with pytest.raises(MeasurementError, match=r"GPU 0 can no longer be read \(GPU is lost\)"):
        meter.read()
    meter.close()


def test_a_counter_that_started_again_with_the_driver(driver):
    meter = NvmlMeter()
    meter.open()
    driver.energy_mj = 10
    with pytest.raises(MeasurementError, match="which cannot be"):
        meter.read()
    meter.close()


def test_another_machine_is_not_asked(driver, tmp_path):
    assert "leave root as it is" in (NvmlMeter(root=tmp_path).unavailable() or "")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'edgekit[nvml]'" in (NvmlMeter().unavailable() or "")


def test_the_library_has_every_name_that_is_used():
    names = set(re.findall(r"library\.(\w+)", Path(module.__file__).read_text()))
    assert {"nvmlInit", "NVMLError_NotSupported"} <= names
    assert [name for name in sorted(names) if not hasattr(pynvml, name)] == []
