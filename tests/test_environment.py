"""Constructed trees of a board and of a virtual machine, and the machine that this runs on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from edgekit.environment import Environment
from edgekit.tree import UnreadableError

MACHINES = json.loads(Path(__file__).with_name("machines.json").read_text())
NO_COMMAND = "this one is a recording"


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
    assert {"busy", "competitors", "affinity"} <= set(look.unavailable)


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
        "load", "busy", "affinity", "core_types", "isolated", "boost", "clocks_fixed", "passive_trips_c", "cooling",
        "throttle_counts", "throttled", "alarms", "power_mode", "power_source", "swap_used_bytes", "competitors",
        "masked",
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


@pytest.fixture
def recorded(tmp_path):
    """A look at a constructed machine of machines.json."""

    def take(name, run=None, **changes) -> Environment:
        write(tmp_path, MACHINES[name] | changes)
        return Environment.take(root=tmp_path, run=run)

    return take


def test_a_pi_tells_throttling_in_words(recorded):
    asked = []

    def run(words):
        asked.append(tuple(words))
        return "throttled=0x50005\n"

    look = recorded("pi5", run)
    assert asked == [("vcgencmd", "get_throttled")]
    assert look.throttled == 0x50005
    assert look.throttled_now == ("under-voltage", "throttled")
    assert look.throttled_since_boot == ("under-voltage", "throttled")
    assert look.alarms == ("rpi_volt in0_lcrit_alarm",)
    assert look.cooling == {"pwm-fan": 4}
    assert look.passive_trips_c is None, "active trips turn a fan and slow nothing down"
    assert look.usable_cores == {"Cortex-A76": (0, 1, 2, 3)}


@pytest.mark.parametrize(
    ("bits", "now", "past"),
    [
        (0x0, (), ()),
        (0x2, ("frequency capped",), ()),
        (0x80008, ("soft temperature limit",), ("soft temperature limit",)),
        (0xE0000, (), ("frequency capped", "throttled", "soft temperature limit")),
    ],
)
def test_throttled_bits(recorded, bits, now, past):
    look = recorded("pi5", lambda words: f"throttled={bits:#x}")
    assert (look.throttled_now, look.throttled_since_boot) == (now, past)


def test_the_firmwares_file_needs_no_command(recorded):
    look = recorded("pi5", **{"sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n"})
    assert look.throttled == 0x50000


def test_a_command_that_fails_is_a_reason(recorded):
    def missing(words):
        raise UnreadableError(f"{words[0]} is not installed")

    assert "vcgencmd is not installed" in recorded("pi5", missing).unavailable["throttled"]
    assert "group video" in recorded("pi5", lambda words: "VCHI initialization failed").unavailable["throttled"]
    assert NO_COMMAND in recorded("pi5").unavailable["throttled"], "a recording runs nothing"


def test_a_jetson_tells_its_power_mode(recorded):
    look = recorded("jetson")
    assert look.power_mode == "25W"
    assert look.power_modes == {"0": "15W", "1": "25W", "2": "MAXN_SUPER"}
    assert look.clocks_fixed is False
    assert look.throttle_counts == {"oc1_event_cnt": 0, "oc3_event_cnt": 7}
    assert look.alarms == ()
    assert look.passive_trips_c == {"cpu-thermal": 99.0}
    assert look.power_source is None, "a USB port that negotiates is no sign of mains"


def test_nvpmodel_is_asked_where_no_file_tells(recorded):
    look = recorded("jetson", lambda words: "NV Power Mode: MAXN_SUPER\n2\n", **{"var/lib/nvpmodel/status": "\n"})
    assert look.power_mode == "MAXN_SUPER"
    assert NO_COMMAND in recorded("jetson", **{"var/lib/nvpmodel/status": "\n"}).unavailable["power_mode"]


def test_raised_current_alarms_have_their_rail(recorded):
    look = recorded("jetson", **{"sys/class/hwmon/hwmon1/curr1_crit_alarm": "1\n"})
    assert look.alarms == ("ina3221 VDD_IN curr1_crit_alarm",)


def test_jetson_clocks_leaves_a_sign(recorded):
    fixed = {name: "1728000" for name in MACHINES["jetson"] if name.endswith(("scaling_min_freq", "scaling_max_freq"))}
    assert recorded("jetson", **fixed).clocks_fixed is False, "the GPU's clock may still move"
    gpu = {"sys/class/devfreq/17000000.gpu/min_freq": "1020000000"}
    assert recorded("jetson", **fixed, **gpu).clocks_fixed is True


def test_a_laptop_on_battery(recorded):
    look = recorded("laptop")
    assert look.power_source == "battery"
    assert look.usable_cores == {"performance core": (0, 1, 2, 3), "efficiency core": (4, 5, 6, 7)}
    assert look.boost is True
    assert look.throttle_counts == {"core_throttle_count": 28, "package_throttle_count": 40}
    assert look.swap_used_bytes == (2097148 - 1998844) * 1024
    assert look.passive_trips_c is None, "a trip point at 0 is none"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"AC/online": "1", "BAT0/status": "Charging"}, "mains"),
        ({"AC/online": "1", "BAT0/status": "Discharging"}, "battery"),
        ({"AC/online": "0", "BAT0/status": "Full"}, "mains"),
        ({"AC/online": "0", "BAT0/status": "Unknown"}, None),
    ],
)
def test_power_sources(recorded, changes, expected):
    look = recorded("laptop", **{f"sys/class/power_supply/{name}": text for name, text in changes.items()})
    assert look.power_source == expected


def test_kinds_of_core_that_may_be_used(recorded):
    assert recorded("big_little").usable_cores == {"Cortex-A55": (0, 1, 2, 3), "Cortex-A76": (4, 5, 6, 7)}
    look = recorded("big_little", **{"proc/self/status": "Cpus_allowed_list:\t2,4-5\n"})
    assert look.usable_cores == {"Cortex-A55": (2,), "Cortex-A76": (4, 5)}


def test_cores_of_one_name_differ_by_capacity(recorded):
    weak = {f"sys/devices/system/cpu/cpu{number}/cpu_capacity": "800" for number in (4, 5)}
    assert list(recorded("big_little", **weak).usable_cores) == [
        "Cortex-A55", "Cortex-A76 of capacity 800", "Cortex-A76 of capacity 1024",
    ]  # fmt: skip
    unnamed = recorded("big_little", **{"proc/cpuinfo": "BogoMIPS: 48\n"})
    assert unnamed.core_types is not None
    assert unnamed.core_types["cpu7"] == "capacity 1024"


def test_unknown_parts_keep_their_numbers(recorded):
    first, second = ("CPU implementer : 0x51\nCPU part : 0x804\n", "CPU part : 0xd05\nCPU implementer : 0x41\n")
    text = f"processor : 0\n{first}\nprocessor : 1\n{second}"
    assert recorded("big_little", **{"proc/cpuinfo": text}).usable_cores == {
        "implementer 0x51 part 0x804": (0,),
        "Cortex-A55": (1,),
    }


def test_a_container_that_hides_folders(recorded):
    look = recorded("container")
    assert look.masked == ("/sys/devices/virtual/powercap", "/sys/firmware")
    assert look.container == "docker, virtual machine"


@pytest.mark.parametrize("name", sorted(set(MACHINES) - {"note"}))
def test_every_constructed_machine_survives_the_file(recorded, name):
    look = recorded(name)
    assert msgspec.json.decode(msgspec.json.encode(look), type=Environment) == look
    assert not {key for key, reason in look.unavailable.items() if "not what was expected" in reason}


def test_an_older_file_is_read(recorded):
    """A profile of an earlier edgekit has none of the later fields."""
    old = {"taken": "2026-01-01T00:00:00+00:00", "host": "h", "system": "Linux", "machine": "aarch64"}
    look = msgspec.convert(old, type=Environment)
    assert look.usable_cores == {}
    assert look.throttled_now == ()


def test_a_heavy_neighbour_is_named(monkeypatch):
    """A process that does nothing but run in circles; on a crowded machine it may not be the heaviest."""
    monkeypatch.setattr("edgekit.machine.SHOWN", 1000)
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            look = Environment.take(busy_over_s=0.4)
        finally:
            other.kill()
    assert other.pid in {each.pid for each in look.competitors or ()}
    assert look.busy is not None
    assert look.busy * (look.cores or 1) > 0.1


def test_nobody_who_does_not_wait_is_told_of_other_work():
    look = Environment.take(busy_over_s=0)
    assert look.busy is None
    assert look.unavailable["busy"] == look.unavailable["competitors"] == "nobody waited to see"
