"""The report: one HTML file that needs nothing else, drawn from saved files.

`python -m loadtests.report` (`make report`) is the command. `page` is the frame, `verdict` what stands first, `curves`
the charts of one run or several, `details` the tables, `searches` capacity and tuning.
"""

from loadtests.report.run_page import page, write_report

__all__ = ["page", "write_report"]
