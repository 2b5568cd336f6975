"""The report: one self-contained HTML file, drawn from saved files.

Enter: `deepseek report` (`report.py`). Imports: the packages whose results it draws.
"""

from loadtests.report.run_page import page, write_report

__all__ = ["page", "write_report"]
