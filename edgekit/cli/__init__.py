"""The command line: one small file per verb. It draws and prints; what it shows is made elsewhere."""

from __future__ import annotations

from edgekit.cli.app import app, main

__all__ = ["app", "main"]
