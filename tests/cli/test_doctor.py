"""What the doctor says of constructed machines, what it would have done to them, and that it does nothing itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from edgekit.cli import doctor
from edgekit.cli.fixes import fixes, script
from edgekit.environment import Environment, OtherWork
from edgekit.interfaces import Reading
from edgekit.measured import MeterFacts

MACHINES = json.loads(Path(__file__).parents[1].joinpath("machines.json").read_text())
NAMES = sorted(set(MACHINES) - {"note"})
LOOKS = {("vcgencmd", "get_throttled"): "throttled=0x50005\n", ("nvpmodel", "-q"): "NV Power Mode: 25W\n1\n"}
"""Commands that only look, and what they say here."""
CPU = "/sys/devices/system/cpu"
GOVERNOR = f"echo performance | sudo tee {CPU}/cpu[0-9]*/cpufreq/scaling_governor > /dev/null"


@pytest.fixture
def machine(tmp_path):
    """A look at a constructed machine; a command that is not read-only fails the test."""

    take_look = Environment.take

    def take(name, **changes):
        for path, text in MACHINES[name].items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        look = take_look(root=tmp_path / name, run=lambda words: LOOKS[tuple(words)])
        return msgspec.structs.replace(look, **changes)

    return take


@pytest.fixture
def found(machine, tmp_path):
    def cures(name, *, meters=None, runtimes=None, as_root=False, **changes):
        return fixes(
            machine(name, **changes),
            meters=meters or {},
            runtimes=runtimes or {},
            root=tmp_path / name,
            as_root=as_root,
        )

    return cures


def live(cures):
    """Commands that the script would run."""
    return [fix.command for fix in cures if fix.command is not None and not fix.by_hand]


def by_hand(cures):
    return [fix.command for fix in cures if fix.by_hand]


def run_lines(text):
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def check_syntax(text):
    done = subprocess.run(["sh", "-n"], input=text, text=True, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_script_is_shell_and_runs_what_is_listed(found, name):
    cures = found(name)
    text = script(cures)
    check_syntax(text)
    assert run_lines(text) == live(cures)
    for fix in cures:
        assert f"# {fix.why}\n" in text


def test_a_pi(found):
    cures = found("pi5")
    assert live(cures) == [GOVERNOR]
    text = script(cures)
    assert "under-voltage, throttled now: use a supply that holds 5 V" in text
    assert "rpi_volt in0_lcrit_alarm" in text
    past = script(found("pi5", throttled=0x80000))
    assert "soft temperature limit since the start: fit a fan or a heat sink; restart" in past


def test_a_jetson(found):
    cures = found("jetson")
    assert live(cures) == ["sudo jetson_clocks"]
    assert by_hand(cures) == ["sudo nvpmodel -m 2"], "its fastest mode is not number 0"
    assert "The fastest is MAXN_SUPER" in cures[0].why
    assert found("jetson", power_mode="MAXN_SUPER", clocks_fixed=True) == ()


def test_a_laptop(found):
    cures = found("laptop")
    assert live(cures) == [GOVERNOR, f"echo 1 | sudo tee {CPU}/intel_pstate/no_turbo > /dev/null", "sudo swapoff -a"]
    assert by_hand(cures) == ["taskset -c 0-3 edgekit profile ...", "taskset -c 4-7 edgekit profile ..."]
    assert "plug in the mains" in script(cures)


def test_two_kinds_of_core(found):
    cures = found("big_little")
    assert live(cures) == []
    assert by_hand(cures) == ["taskset -c 0-3 edgekit profile ...", "taskset -c 4-7 edgekit profile ..."]
    assert "soc-thermal has 82 °C and is slowed down from 85 °C" in script(cures)


def test_processors_kept_free(found):
    (cure,) = found("ready", isolated=(2, 3))
    assert cure.command == "taskset -c 2-3 edgekit profile ..."
    assert found("ready", isolated=(2, 3), affinity=(2, 3)) == ()


def test_a_container(found):
    cures = found("container")
    assert live(cures) == []
    assert "/sys/devices/virtual/powercap" in cures[0].why


def test_a_ready_machine_needs_nothing(found):
    assert found("ready") == ()
    assert script(()) == ""


def test_boost_has_several_switches(found, tmp_path):
    assert live(found("ready", boost=True)) == [f"echo 0 | sudo tee {CPU}/cpufreq/boost > /dev/null"]
    look = Environment(taken="", host="h", system="Linux", machine="x86_64", boost=True)
    assert live(fixes(look, meters={}, runtimes={}, root=tmp_path / "empty")) == [
        f"echo 0 | sudo tee {CPU}/cpufreq/policy[0-9]*/boost > /dev/null"
    ]


def test_the_script_mends_what_it_says(found, tmp_path):
    """Run on the constructed tree, with a sudo that only passes on and a swapoff that does nothing."""
    root, tools = tmp_path / "laptop", tmp_path / "tools"
    text = script(found("laptop"))
    tools.mkdir()
    for name, does in {"sudo": 'exec "$@"', "swapoff": "exit 0"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["sh"],
        input=text.replace("/sys/", f"{root}/sys/"),
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
        env={"PATH": f"{tools}:{os.environ['PATH']}"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    after = Environment.take(root=root)
    assert set((after.governors or {}).values()) == {"performance"}
    assert after.boost is False
    assert live(fixes(after, meters={}, runtimes={}, root=root)) == ["sudo swapoff -a"]


def test_root_needs_no_sudo(found):
    assert "sudo" not in script(found("laptop", as_root=True))
    assert "sudo" in script(found("laptop"))


def test_permissions_of_meters(found):
    rapl = "/sys/class/powercap/intel-rapl:0/energy_uj is for root only; run as root, or allow it: "
    meters = {
        "rapl": {"works": False, "says": f"{rapl}sudo chmod a+r /sys/class/powercap/*/energy_uj"},
        "pmic": {"works": False, "says": "may not open it: sudo usermod -aG video $USER, then log in again"},
        "fine": {"works": True, "says": "sudo chmod a+r /nothing"},
        "evil": {"works": False, "says": "sudo chmod a+r /x; rm -rf /"},
    }
    cures = found("ready", meters=meters)
    assert live(cures) == [
        "sudo chmod a+r /sys/class/powercap/*/energy_uj",
        "sudo usermod -aG video $USER",
        "sudo chmod a+r /x",
    ]
    check_syntax(script(cures))


def test_one_permission_is_asked_for_once(found):
    told = {"throttled": "vcgencmd get_throttled failed (Can't open device file: /dev/vcio)"}
    pmic = {
        "works": False,
        "says": "vcgencmd fails; if it may not open /dev/vcio: sudo usermod -aG video $USER, then log in",
    }
    (cure,) = found("ready", unavailable=told, meters={"pmic": pmic})
    assert cure.command == "sudo usermod -aG video $USER"
    assert "throttling" in cure.why


def test_libraries_are_told_where_nothing_works_without(found):
    lacking = {"works": False, "says": "Running on X needs x, which is not installed: pip install 'edgekit[x]'"}
    scripted = {"works": True, "needs": ["handler"], "says": "made in Python, from its handler"}
    assert by_hand(found("ready", runtimes={"x": lacking, "fake": scripted})) == ["pip install 'edgekit[x]'"]
    assert by_hand(found("ready", meters={"x": lacking})) == ["pip install 'edgekit[x]'"]
    assert found("ready", runtimes={"x": lacking, "ort": {"works": True, "says": "onnxruntime"}}) == ()


def test_a_heavy_process_is_named_and_never_ended(found):
    cures = found("ready", competitors=(OtherWork(name="chrome", pid=4242, processors=1.3),))
    assert live(cures) == []
    assert "chrome (pid 4242) uses 1.3 processors" in script(cures)
    assert "kill" not in script(cures)
    assert found("ready", competitors=(OtherWork(name="sshd", pid=1, processors=0.06),)) == ()


@pytest.mark.parametrize("name", ["x\nrm -rf /", "x\rrm -rf /", "x\u2028rm -rf /", "$(rm -rf /)", "`rm`", "\\\n rm"])
def test_a_name_cannot_become_a_command(found, name):
    text = script(found("ready", competitors=(OtherWork(name=name, pid=7, processors=2.0),), alarms=(name,)))
    assert run_lines(text) == []
    check_syntax(text)


@pytest.fixture
def here(machine, monkeypatch):
    """The doctor on a constructed machine, without this one's plugins."""

    def on(name, **changes):
        look = machine(name, **changes)
        monkeypatch.setattr(Environment, "take", lambda: look)
        monkeypatch.setattr(doctor, "_is_root", lambda: False)
        monkeypatch.setattr(doctor, "_plugins", lambda kind, describe: {})

    return on


def test_fix_prints_the_script_and_nothing_else(shell, here):
    here("jetson")
    printed = shell.works("doctor", "--fix").stdout
    assert printed.startswith("#!/bin/sh\n")
    assert run_lines(printed) == ["sudo jetson_clocks"]
    check_syntax(printed)
    here("ready")
    assert shell.works("doctor", "--fix").stdout == ""


def test_fix_as_json_is_a_list(shell, here):
    here("jetson")
    mode, clocks = shell.json("doctor", "--fix")["fixes"]
    assert mode["by_hand"]
    assert clocks == {
        "why": "the clocks follow the load: hold them at the power mode's highest",
        "command": "sudo jetson_clocks",
        "by_hand": False,
    }
    here("ready")
    assert shell.json("doctor", "--fix") == {"fixes": []}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pi5", ["under-voltage now (get_throttled)", "4 × Cortex-A76"]),
        ("jetson", ["25W (of 15W, 25W, MAXN_SUPER)", "no sign of throttling"]),
        ("laptop", ["4 × performance core (0-3), 4 × efficiency core (4-7)", "battery", "96.0 MiB in use", "turbo"]),
        ("big_little", ["4 × Cortex-A55 (0-3), 4 × Cortex-A76 (4-7)", "fixed"]),
        ("container", ["/sys/devices/virtual/powercap, /sys/firmware"]),
    ],
)
def test_the_doctor_shows_what_the_machine_has(shell, here, name, words):
    here(name)
    text = " ".join(shell.works("doctor").stdout.split())
    for each in words:
        assert each in text
    assert "edgekit doctor --fix" in text


def test_other_work_and_limits_are_shown(shell, here):
    here("ready", busy=0.31, competitors=(OtherWork(name="chrome", pid=1, processors=1.2),), affinity=(0, 1))
    text = " ".join(shell.works("doctor").stdout.split())
    assert "31.0 % of the processors: chrome 1.2" in text
    assert "4: 4 × Cortex-A72; this process may use 0-1" in text


class Meter:
    """Measures nothing."""

    name = "made"

    def unavailable(self):
        return None

    def facts(self):
        return MeterFacts(
            name="made",
            quantity="energy",
            scope="board",
            covers="everything",
            parts=("VDD_IN",),
            resolution=6.1e-5,
            update_interval_s=1e-3,
        )

    def open(self):
        raise AssertionError("the doctor opens no meter")

    def read(self) -> Reading:
        raise AssertionError("the doctor reads no meter")

    def close(self):
        pass


def test_meters_are_shown_by_their_facts(monkeypatch):
    monkeypatch.setattr("edgekit.plugins.names", lambda kind: ("made",))
    monkeypatch.setattr("edgekit.plugins.load", lambda kind, name: Meter)
    found = doctor._plugins("meters", doctor._meter)
    assert found["made"]["works"]
    assert found["made"]["facts"]["covers"] == "everything"
    assert found["made"]["says"] == "energy of board: everything (VDD_IN); step 61.00 µJ, new every 1.000 ms"


def test_nothing_is_run_but_what_looks(shell, monkeypatch):
    """On this very machine, with its plugins."""
    harmless = {*LOOKS, ("vcgencmd", "pmic_read_adc")}
    start = subprocess.Popen.__init__

    def watched(self, words, *arguments, **keywords):
        assert not isinstance(words, str)
        assert tuple(words) in harmless, words
        start(self, words, *arguments, **keywords)

    def forbidden(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(subprocess.Popen, "__init__", watched)
    monkeypatch.setattr(os, "system", forbidden)
    text = shell.works("doctor", "--fix").stdout
    check = shell.json("doctor", "--fix")["fixes"]
    assert isinstance(check, list)
    monkeypatch.undo()
    check_syntax(text)
