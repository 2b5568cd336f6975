"""Pytest plugin of the mutation runs: runs quick tests first, and saves what failed.

Contract: writes `$MUTANTS_RECORD`, a JSON file with "seconds" by test and "failed", the first test that failed. The
"seconds" in the file `$MUTANTS_ORDER`, if it exists, give the order. A process that loops ends after `CPU_S` seconds of
CPU time, which does not depend on other load.
"""

from __future__ import annotations

import json
import os
import resource
from collections import Counter
from pathlib import Path

import pytest

CPU_S = 120
resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
_order = Path(os.environ["MUTANTS_ORDER"])
_before: dict[str, float] = json.loads(_order.read_text())["seconds"] if _order.exists() else {}
_seconds: Counter[str] = Counter()
_failed: list[str] = []


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts tests by duration: most mutants are caught before the slow tests begin."""
    items.sort(key=lambda item: _before.get(item.nodeid, 0.0))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Adds the time of a test's phase, and notes the first failure."""
    _seconds[report.nodeid] += report.duration  # type: ignore[assignment]
    if report.failed:
        _failed.append(report.nodeid)


def pytest_sessionfinish() -> None:
    """Saves the record."""
    record = {"seconds": _seconds, "failed": next(iter(_failed), "")}
    Path(os.environ["MUTANTS_RECORD"]).write_text(json.dumps(record))
