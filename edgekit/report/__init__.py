"""Shows what ``profiles`` measured: terminal, CSV, HTML, traces, MLflow, profiles compared; and plans as pictures.

Measures nothing.
"""

from __future__ import annotations

from edgekit.report.compare import Comparison, compare
from edgekit.report.picture import write_picture
from edgekit.report.terminal import comparison_table, print_comparison, print_profile, profile_table
from edgekit.report.to_csv import write_csv, write_raw_csv
from edgekit.report.to_html import write_html
from edgekit.report.to_mlflow import log_to_mlflow
from edgekit.report.to_trace import write_trace

__all__ = [
    "Comparison",
    "compare",
    "comparison_table",
    "log_to_mlflow",
    "print_comparison",
    "print_profile",
    "profile_table",
    "write_csv",
    "write_html",
    "write_picture",
    "write_raw_csv",
    "write_trace",
]
