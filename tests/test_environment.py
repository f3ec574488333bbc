"""Constructed trees of a board and of a virtual machine, and the machine that this runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from edgekit.environment import Environment


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def board(tmp_path) -> Path:
    """An ARM board with four processors, two kinds of them, and its sensors."""
    cpu = "sys/devices/system/cpu"
    files = {
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 108.00\n\nprocessor\t: 1\n",
        "proc/meminfo": "MemTotal:        8256732 kB\nMemFree:          123 kB\n",
        "proc/loadavg": "0.52 0.58 0.59 1/467 12345\n",
        f"{cpu}/online": "0-1,4,6\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48350\n",
        "sys/class/hwmon/hwmon2/name": "rp1_adc\n",
        "sys/class/hwmon/hwmon2/temp1_input": "51000\n",
        "sys/class/hwmon/hwmon3/name": "nvme\n",
        "sys/class/hwmon/hwmon3/temp1_input": "-5500\n",
        "sys/class/hwmon/hwmon3/temp1_label": "Composite\n",
    }
    for number, top in (("0", 1500000), ("10", 2400000), ("2", 2400000)):
        files |= {
            f"{cpu}/cpu{number}/cpufreq/scaling_governor": "ondemand\n",
            f"{cpu}/cpu{number}/cpufreq/scaling_cur_freq": f"{top - 100000}\n",
            f"{cpu}/cpu{number}/cpufreq/scaling_min_freq": "600000\n",
            f"{cpu}/cpu{number}/cpufreq/scaling_max_freq": f"{top}\n",
        }
    write(tmp_path, files)
    return tmp_path


def test_a_board_tells_all(board):
    look = Environment.take(root=board)
    assert look.processor == "Raspberry Pi 5 Model B Rev 1.0"
    assert look.cores == 4
    assert look.memory_bytes == 8256732 * 1024
    assert look.load == 0.52
    assert look.governors == {"cpu0": "ondemand", "cpu2": "ondemand", "cpu10": "ondemand"}
    assert list(look.governors) == ["cpu0", "cpu2", "cpu10"]
    assert look.frequencies_hz == {"cpu0": 1.4e9, "cpu2": 2.3e9, "cpu10": 2.3e9}
    assert look.frequency_limits_hz == (6e8, 2.4e9)
    assert look.temperatures_c == {"cpu-thermal": 48.35, "rp1_adc temp1": 51.0, "nvme Composite": -5.5}
    assert look.container is None
    assert set(look.unavailable) - {"affinity"} == {"busy"}


def test_two_sensors_of_one_name_stay_apart(board):
    zone = "sys/class/thermal/thermal_zone1"
    write(board, {f"{zone}/type": "cpu-thermal", f"{zone}/temp": "40000"})
    look = Environment.take(root=board)
    assert look.temperatures_c is not None
    assert look.temperatures_c["cpu-thermal (thermal_zone0)"] == 48.35
    assert look.temperatures_c["cpu-thermal (thermal_zone1)"] == 40.0


def test_a_sensor_that_refuses_is_named_and_the_others_are_read(board, monkeypatch):
    """Zones of a part that is switched off answer with an error."""
    read_text = Path.read_text

    def refused(path, *arguments, **keywords):
        if path.name == "temp":
            raise OSError(61, "No data available", str(path))
        return read_text(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", refused)
    look = Environment.take(root=board)
    assert look.temperatures_c == {"rp1_adc temp1": 51.0, "nvme Composite": -5.5}
    assert "No data available" in look.unavailable["temperatures_c.cpu-thermal"]


def test_nonsense_in_a_file_is_a_reason_and_no_crash(board):
    write(board, {"sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "<unknown>\n", "proc/loadavg": "\n"})
    look = Environment.take(root=board)
    assert look.frequencies_hz is None
    assert "not what was expected there" in look.unavailable["frequencies_hz"]
    assert look.load is None
    assert "load" in look.unavailable


def test_a_machine_that_tells_nothing_has_a_reason_for_everything(tmp_path):
    look = Environment.take(root=tmp_path)
    for name in (
        "processor", "cores", "memory_bytes", "governors", "frequencies_hz", "frequency_limits_hz", "temperatures_c",
        "load", "busy",
    ):  # fmt: skip
        assert getattr(look, name) is None
        assert look.unavailable[name]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({".dockerenv": ""}, "docker"),
        ({"proc/1/cgroup": "12:cpu:/docker/0a1b\n"}, "docker"),
        ({"proc/1/cgroup": "0::/kubepods/besteffort/pod1\n"}, "kubernetes"),
        ({"run/.containerenv": "", "run/systemd/container": "podman\n"}, "podman"),
        ({"run/systemd/container": "lxc\n"}, "lxc"),
        ({"proc/cpuinfo": "flags\t\t: fpu hypervisor avx\n"}, "virtual machine"),
        (
            {"proc/cpuinfo": "flags\t\t: fpu hypervisor\n", "sys/class/dmi/id/sys_vendor": "QEMU\n", ".dockerenv": ""},
            "docker, virtual machine (QEMU)",
        ),
    ],
)
def test_containers_and_virtual_machines(tmp_path, files, expected):
    write(tmp_path, files)
    assert Environment.take(root=tmp_path).container == expected


def test_the_first_processor_names_it(tmp_path):
    write(tmp_path, {"proc/cpuinfo": "model name\t: Big\n\nmodel name\t: Little\n"})
    assert Environment.take(root=tmp_path).processor == "Big"


def test_this_very_machine():
    look = Environment.take(busy_over_s=0.05)
    assert look.system.startswith(platform.system())
    assert look.machine == platform.machine()
    assert look.versions["python"] == platform.python_version()
    assert look.versions["numpy"] == np.__version__
    assert "edgekit" in look.versions
    assert look.memory_bytes is None or look.memory_bytes == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    if hasattr(os, "sched_getaffinity"):
        assert set(look.affinity or ()) == os.sched_getaffinity(0)
    assert look.busy is not None
    assert 0 <= look.busy <= 1
    for name in look.__struct_fields__:
        known = getattr(look, name) is not None or name == "container"
        assert known != (name in look.unavailable), f"{name}: either known or with its reason"
    assert msgspec.json.decode(msgspec.json.encode(look), type=Environment) == look


def test_libraries_that_are_not_loaded_are_not_listed(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    assert "onnxruntime" not in Environment.take(busy_over_s=0.01).versions
    monkeypatch.setitem(sys.modules, "tensorrt", type(sys)("tensorrt"))
    sys.modules["tensorrt"].__version__ = "10.3.0"
    assert Environment.take(busy_over_s=0.01).versions["tensorrt"] == "10.3.0"
