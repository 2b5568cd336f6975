"""The master of a distributed load test: the shares of its workers, and that it needs no common clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseek.spec import InvalidMeasurement
from deepseek.spec.processes.children import free_ports
from loadtests.load import measure

REPLACED = """
import json, sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from locust.runners import MasterRunner, WorkerNode, WorkerNodes
from loadtests.load.workers.master import Master
from loadtests.results.settings import LoadSettings

class Runner(MasterRunner):
    def __init__(self):
        self.clients, self.told = WorkerNodes(), []
        for name in ("a", "b", "d"):
            self.clients[name] = WorkerNode(name)

    def send_message(self, msg_type, data=None, client_id=None):
        self.told.append((msg_type, client_id, data["rank"], data["workers"]))
        assert "starts_at" not in data  # a time of this machine's clock

more = {"models": "", "target": "onnxruntime", "url": "", "inputs": ""}
wanted = LoadSettings(model="m", protocol="grpc", rate_rps=10.0, duration_s=1.0, workers=3, **more)
runner = Runner()
master = Master(SimpleNamespace(runner=runner), [wanted], Path(sys.argv[1]), remote=True)
its = asdict(replace(wanted, **json.loads(sys.argv[2])))
for name in ("a", "b", "c", "d"):  # c was lost before the start, and d replaced it
    master.take_prepared(name, [its])
master.start()
print(json.dumps(runner.told))
"""  # in a child process, since Locust patches the process that imports it


def started(folder: Path, **its: Any) -> subprocess.CompletedProcess[str]:
    """A master that three workers with other settings, `its`, join."""
    command = [sys.executable, "-c", REPLACED, str(folder), json.dumps(its)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LOCUST_PARENT": "1"})


def test_a_replacement_worker_sends_the_share_of_the_lost_one(tmp_path: Path) -> None:
    run = started(tmp_path, url="its-name-of-the-server:8001", inputs="/its/copy.npz", target="tensorrt")
    assert json.loads(run.stdout) == [["begin", "a", 0, 3], ["begin", "b", 1, 3], ["begin", "d", 2, 3]], run.stderr


def test_a_worker_with_other_options_than_the_master_ends_the_test_before_any_load(tmp_path: Path) -> None:
    said = "a worker has rate_rps 20.0, the master 10.0; start each worker with all options of the master"
    for its, more in (({}, ""), ({"target": "tensorrt"}, ", and with --target onnxruntime")):
        run = started(tmp_path, rate_rps=20.0, **its)
        assert (run.returncode, json.loads(run.stdout)) == (3, {"unprepared": f"{said}{more}"})


def test_a_worker_says_that_it_waits_for_its_master_and_where_it_found_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (port,) = free_ports(1)
    monkeypatch.setattr(measure, "MASTER_PORT", port)
    monkeypatch.setattr(measure, "MASTER_WAIT_S", 0.1)
    with pytest.raises(InvalidMeasurement, match=f"no master at 127.0.0.1:{port} after 0.1 s .Connection refused"):
        measure.work_for("127.0.0.1", [])
    assert capsys.readouterr().err == f"waiting for the master at 127.0.0.1:{port}\n"
