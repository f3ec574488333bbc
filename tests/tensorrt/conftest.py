"""TensorRT without a GPU: its real bindings over a stub of its libraries, and its real builder."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PREPARED = HERE.parents[1] / "build" / "tensorrt"


def _beside(name):
    """A module in this folder; tests are no package."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def uses():
    """What reads the uses out of a source; see uses.py."""
    return _beside("uses")


@pytest.fixture(scope="session")
def prepared():
    """Runs a script of this folder with one of the prepared sets of libraries, and gives the JSON that it prints."""

    def run(name, script, *arguments):
        folder = PREPARED / name
        if not folder.is_dir():
            pytest.skip(f"build/tensorrt/{name} is not there: python tests/tensorrt/prepare.py")
        environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "LD_LIBRARY_PATH": str(folder / "lib")}
        done = subprocess.run(
            [sys.executable, str(HERE / script), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def standins():
    """What stands for CUDA and for TensorRT in other tests."""
    return _beside("fake_cuda"), _beside("fake_trt")
