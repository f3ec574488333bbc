"""Shows what ``profiles`` measured: terminal, CSV, self-contained HTML, and profiles compared; and plans as pictures.

Measures nothing.
"""

from __future__ import annotations

from edgekit.report.compare import Comparison, compare
from edgekit.report.picture import write_picture
from edgekit.report.terminal import comparison_table, print_comparison, print_profile, profile_table
from edgekit.report.to_csv import write_csv
from edgekit.report.to_html import write_html

__all__ = [
    "Comparison",
    "compare",
    "comparison_table",
    "print_comparison",
    "print_profile",
    "profile_table",
    "write_csv",
    "write_html",
    "write_picture",
]
