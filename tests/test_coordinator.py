"""The master of a distributed load test: who sends which share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPLACED = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from locust.runners import MasterRunner, WorkerNode, WorkerNodes
from loadtests.coordinator import Coordinator
from loadtests.results import Settings

class Master(MasterRunner):
    def __init__(self):
        self.clients, self.told = WorkerNodes(), []
        for name in ("a", "b", "d"):
            self.clients[name] = WorkerNode(name)

    def send_message(self, msg_type, data=None, client_id=None):
        self.told.append((msg_type, client_id, data["rank"], data["workers"]))

more = {"models": "", "target": "onnxruntime", "url": "", "inputs": ""}
wanted = Settings(model="m", protocol="grpc", rate_rps=10.0, duration_s=1.0, workers=3, **more)
master = Master()
coordinator = Coordinator(SimpleNamespace(runner=master), [wanted], Path(sys.argv[1]))
for name in ("a", "b", "c", "d"):  # c was lost before the start, and d came for it
    coordinator.take_prepared(name)
coordinator.start()
print(json.dumps(master.told))
"""  # in a process of its own: Locust changes the one that it is imported in


def test_a_worker_that_took_anothers_place_sends_that_ones_share(tmp_path: Path) -> None:
    said = subprocess.run([sys.executable, "-c", REPLACED, tmp_path], check=True, capture_output=True, text=True).stdout
    assert json.loads(said) == [["begin", "a", 0, 3], ["begin", "b", 1, 3], ["begin", "d", 2, 3]]
