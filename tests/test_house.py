"""The house: packages, rooms and links agree, the wheel carries what it should, and the core stands on its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("exporters", "profiles", "runtimes", "zoo")
HEAVY = ("jinja2", "onnx", "onnxruntime", "pandas", "plotly", "scipy", "sklearn", "torch")
DATA_FOLDERS = {
    "edgekit/report/templates": ROOT / "edgekit/report/templates",
    "edgekit/zoo/weights": ROOT / "zoo/weights",
}

READ_PROJECT = """
import json, sys
from setuptools.config.pyprojecttoml import read_configuration
print(json.dumps(read_configuration(sys.argv[1])["tool"]["setuptools"]))
"""


def run_python(code: str, *arguments: str, cwd: Path, python: str | Path = sys.executable) -> str:
    """Run code in a fresh interpreter and return what it printed; its errors become this test's."""
    done = subprocess.run(
        [str(python), "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def setuptools_table() -> dict[str, object]:
    """``[tool.setuptools]`` of pyproject.toml, as setuptools itself reads it (Python 3.10 has no TOML reader)."""
    return json.loads(run_python(READ_PROJECT, str(ROOT / "pyproject.toml"), cwd=ROOT))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a clean copy of the sources, so that no build folder is left among them."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("edgekit", *ROOMS, "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def source_folders() -> dict[str, Path]:
    """Every package by import name, found by following the links under edgekit/."""
    found: dict[str, Path] = {}
    waiting = [("edgekit", ROOT / "edgekit")]
    while waiting:
        name, folder = waiting.pop()
        if (folder / "__init__.py").is_file():
            found[name] = folder
            waiting += [(f"{name}.{child.name}", child) for child in folder.iterdir() if child.is_dir()]
    return found


def test_package_list_is_the_folders(setuptools_table):
    assert sorted(setuptools_table["packages"]) == sorted(source_folders())


def test_every_folder_with_code_is_a_package():
    strays = {
        path.parent.relative_to(ROOT)
        for top in ("edgekit", *ROOMS)
        for path in (ROOT / top).rglob("*.py")
        if not (path.parent / "__init__.py").is_file()
    }
    assert not strays


def test_folder_map_and_links_agree(setuptools_table):
    mapped = {"edgekit": "edgekit", **{f"edgekit.{room}": room for room in ROOMS}}
    assert setuptools_table["package-dir"] == mapped
    for room in ROOMS:
        link = ROOT / "edgekit" / room
        assert link.is_symlink(), f"{link} must be a link: git config core.symlinks true, then check it out again"
        assert link.readlink() == Path("..") / room


@pytest.mark.parametrize("room", ROOMS)
def test_room_refuses_its_bare_name(room):
    done = subprocess.run(
        [sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert f"ImportError: import edgekit.{room}, not {room}" in done.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_room_lies_at_the_top_level(room, tmp_path):
    code = f"import importlib.util as u; print(u.find_spec('edgekit.{room}').origin)"
    assert Path(run_python(code, cwd=tmp_path).strip()).resolve() == ROOT / room / "__init__.py"


def test_import_edgekit_is_light(tmp_path):
    code = f"import sys, edgekit; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run_python(code, cwd=tmp_path).strip() == "[]"


def test_every_public_name_resolves(tmp_path):
    code = """
import edgekit
names = edgekit.__all__
assert names and len(set(names)) == len(names), names
missing = [name for name in names if not hasattr(edgekit, name)]
assert not missing, missing
unlisted = set(names) - set(dir(edgekit))
assert not unlisted, unlisted
"""
    run_python(code, cwd=tmp_path)


def test_entry_points_name_what_exists(tmp_path):
    code = """
from importlib.metadata import entry_points
for group in ("edgekit.targets", "edgekit.runtimes", "edgekit.meters"):
    ours = [point for point in entry_points(group=group) if point.value.startswith("edgekit.")]
    assert ours, group
    for point in ours:
        assert point.load().name == point.name, point
"""
    run_python(code, cwd=tmp_path)


def test_wheel_has_every_module_and_no_other(wheel_files):
    expected = {
        f"{name.replace('.', '/')}/{path.name}"
        for name, folder in source_folders().items()
        for path in folder.glob("*.py")
    }
    assert {name for name in wheel_files if name.endswith(".py")} == expected


def test_wheel_has_the_type_marker_and_the_licence(wheel_files):
    assert "edgekit/py.typed" in wheel_files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_files)


@pytest.mark.parametrize("packed", sorted(DATA_FOLDERS))
def test_wheel_has_every_data_file(packed, wheel_files):
    expected = {f"{packed}/{path.name}" for path in DATA_FOLDERS[packed].glob("*") if "cifar10" not in path.name}
    assert expected, f"{DATA_FOLDERS[packed]} is empty"
    assert {name for name in wheel_files if name.startswith(f"{packed}/")} == expected


BARE_IMPORTS = """
import importlib, importlib.util, pkgutil
assert importlib.util.find_spec("torch") is None
import edgekit
needs_torch = ("edgekit.exporters", "edgekit.zoo.", "edgekit.runtimes.eager", "edgekit.__main__")
for module in pkgutil.walk_packages(edgekit.__path__, "edgekit."):
    if not module.name.startswith(needs_torch):
        importlib.import_module(module.name)
        print(module.name)
"""

BARE_RUN = """
import importlib.util, json, sys
import numpy as np
import edgekit
assert importlib.util.find_spec("torch") is None
policy = edgekit.Policy.fixed([0.5], score="max_prob")
result = edgekit.load(sys.argv[1], runtime="onnxruntime", policy=policy).run(np.load(sys.argv[2]))
print(json.dumps({"logits": result.logits.tolist(), "exit": result.exit.tolist()}))
"""


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device's environment: the wheel, one runtime, and no torch."""
    folder = tmp_path_factory.mktemp("device")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=300)
    python = folder / "bin" / "python"
    pins = str(ROOT / "constraints.txt")
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", pins, f"{wheel}[ort]"]
    done = subprocess.run(install, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return python


@pytest.fixture(scope="module")
def two_exit_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with two exits, exported here, where torch is."""
    import torch
    from torch import nn

    import edgekit

    class TwoExits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
            self.early = nn.Linear(4, 3)
            self.body = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
            self.late = nn.Linear(8, 3)

        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            features = self.stem(image)
            early = self.early(features.mean((2, 3)))
            return [early, self.late(self.body(features).mean((2, 3)))]

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bundle") / "two.edgekit"
    edgekit.export(TwoExits().eval(), (torch.randn(2, 1, 8, 8),), path, targets=("onnx",))
    return path


@pytest.mark.slow
def test_core_imports_without_torch(bare_python, tmp_path):
    imported = run_python(BARE_IMPORTS, cwd=tmp_path, python=bare_python).split()
    assert {"edgekit.session", "edgekit.bundle", "edgekit.calibration", "edgekit.cli", "edgekit.profiles"} <= set(
        imported
    )


@pytest.mark.slow
def test_device_runs_a_bundle_without_torch(bare_python, two_exit_bundle, tmp_path):
    import numpy as np

    import edgekit

    rows = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    answer = json.loads(
        run_python(BARE_RUN, str(two_exit_bundle), str(tmp_path / "rows.npy"), cwd=tmp_path, python=bare_python)
    )
    here = edgekit.load(
        two_exit_bundle, runtime="onnxruntime", policy=edgekit.Policy.fixed([0.5], score="max_prob")
    ).run(rows)
    np.testing.assert_allclose(answer["logits"], here.logits, rtol=1e-5, atol=1e-6)
    assert answer["exit"] == here.exit.tolist()


@pytest.mark.slow
def test_missing_torch_names_the_extra(bare_python, tmp_path):
    code = """
import edgekit
try:
    edgekit.export(None, (), "x.edgekit")
except edgekit.EdgekitError as error:
    print(error)
"""
    assert "pip install 'edgekit[export]'" in run_python(code, cwd=tmp_path, python=bare_python)
