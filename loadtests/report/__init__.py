"""The report: one self-contained HTML file, drawn from saved files.

Enter: `deepseek report` (`report.py`). Imports: the packages whose results it draws.
"""
