"""Prints what a module of compiled bindings has, as JSON: by class (``""`` for the module), each name's docstring.

Run on its own, with the folder of the bindings on PYTHONPATH and that of the libraries on LD_LIBRARY_PATH.
"""

from __future__ import annotations

import importlib
import json
import sys


def main(name):
    module = importlib.import_module(name)
    api = {"": {}}
    for each in dir(module):
        value = getattr(module, each)
        api[""][each] = getattr(value, "__doc__", None) or ""
        if isinstance(value, type):
            # Properties are read from the class: their getters need no object then.
            api[each] = {member: getattr(getattr(value, member, None), "__doc__", None) or "" for member in dir(value)}
    version = getattr(module, "__version__", "")
    print(json.dumps({"version": version, "api": api}))


main(sys.argv[1])
