"""The master of a distributed load test: the shares of its workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPLACED = """
import json, sys
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

more = {"models": "", "target": "onnxruntime", "url": "", "inputs": ""}
wanted = LoadSettings(model="m", protocol="grpc", rate_rps=10.0, duration_s=1.0, workers=3, **more)
runner = Runner()
master = Master(SimpleNamespace(runner=runner), [wanted], Path(sys.argv[1]))
for name in ("a", "b", "c", "d"):  # c was lost before the start, and d replaced it
    master.take_prepared(name)
master.start()
print(json.dumps(runner.told))
"""  # in a child process, since Locust patches the process that imports it


def test_a_replacement_worker_sends_the_share_of_the_lost_one(tmp_path: Path) -> None:
    said = subprocess.run([sys.executable, "-c", REPLACED, tmp_path], check=True, capture_output=True, text=True).stdout
    assert json.loads(said) == [["begin", "a", 0, 3], ["begin", "b", 1, 3], ["begin", "d", 2, 3]]


JUMPED = """
import json, sys, time
from pathlib import Path
from types import SimpleNamespace
import gevent
from loadtests.load.workers.master import Master
from loadtests.results.settings import LoadSettings

class Runner:
    def send_message(self, msg_type, data=None, client_id=None):
        self.told, self.told_at = data, time.perf_counter()

    def quit(self):
        print(json.dumps({"told": self.told, "told_at": self.told_at, "ended_at": time.perf_counter()}))

more = {"models": "", "target": "onnxruntime", "url": "127.0.0.1:9", "inputs": "", "warmup_s": 0.5, "duration_s": 2.0}
wanted = LoadSettings(model="m", protocol="http", rate_rps=10.0, **more)
master = Master(SimpleNamespace(runner=Runner(), web_ui=None), [wanted], Path(sys.argv[1]), remote=sys.argv[2] == "remote")
master.take_prepared("local")
master.start()
master.take_last([[]], [[]], {"thread_cpu": 0, "process_cpu": 0, "machine_cpu": 0, "precedence": False})
time.time = lambda: 2e9
gevent.get_hub().join()
"""


@pytest.mark.parametrize("where", ["here", "remote"])
def test_the_window_keeps_its_length_if_the_wall_clock_jumps(tmp_path: Path, where: str) -> None:
    run = subprocess.run([sys.executable, "-c", JUMPED, tmp_path, where], check=True, capture_output=True, text=True)
    found = json.loads(run.stdout.splitlines()[-1])
    told = found["told"]
    assert 0 < told["starts_in_s"] <= 1.0  # the delay and the warm-up
    assert found["ended_at"] - found["told_at"] >= told["starts_in_s"] + 2
    if where == "here":
        assert told["starts_at"] + 2 <= found["ended_at"]
    else:
        assert "starts_at" not in told  # another machine has another clock
