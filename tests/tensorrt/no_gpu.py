"""Opens a CUDA device through the real cuda-python, and prints what is said where there is none, as JSON."""

from __future__ import annotations

import json

from edgekit.errors import PluginError
from edgekit.runtimes.cuda import Cuda, load_cuda

module = load_cuda("Testing")
error = None
try:
    Cuda(module).close()
except PluginError as raised:
    error = str(raised)
print(json.dumps({"module": module.__name__, "error": error}))
