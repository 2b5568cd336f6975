"""Locust alone, with `loadtests/locustfile.py`, as people run it who have their own scripts around Locust."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tritonclient.grpc import service_pb2

from tests.conftest import run_module
from tests.fake_kserve import grpc_serving
from tests.saved_runs import load_settings

SPEC = """
name = "m"
inputs.x = { dtype = "float32", shape = ["batch", "length"] }
outputs.y = { dtype = "float32", shape = ["batch", "length"] }
axes.batch = { min = 1, opt = 4, max = 8 }
axes.length = { min = 1, opt = 4, max = 8 }
slo = { p99_ms = 200, rate_rps = 40 }
"""
LOCUST = ("locust", "--locustfile", "loadtests/locustfile.py", "--headless")
WRONG = {
    "{": "Invalid JSON",
    "{}": "Input should be a valid array; see loadtests/results/settings.py",
    json.dumps([{**asdict(load_settings(rate_rps=5.0)), "duration_s": -1.0}]): "0: duration_s: Input should be greater",
}
READ = """
import sys
from pathlib import Path
from loadtests.locustfile import InputError, read_settings

for name in sys.argv[1:]:
    try:
        read_settings(Path(name))
    except InputError as error:
        print(error)
"""  # in a child process, since Locust patches the process that imports it


def test_wrong_settings_of_locust_alone_are_one_line(tmp_path: Path) -> None:
    for number, content in enumerate(WRONG):
        (tmp_path / f"{number}").write_text(content)
    files = [str(tmp_path / f"{number}") for number in range(len(WRONG))]
    read = subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, text=True)
    for line, message in zip(read.stdout.splitlines(), WRONG.values(), strict=True):
        assert message in line
    absent = ("--settings", str(tmp_path / "absent"))
    run = run_module(*LOCUST, *absent)
    (line,) = (line for line in run.stderr.splitlines() if "INFO" not in line)
    assert (run.returncode, line.startswith("error: --s")) == (2, True)
    assert "No such file or directory; give a JSON list" in line


def test_locusts_json_is_alone_on_standard_output_and_the_reader_of_the_log_may_leave(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "deploy.toml").write_text(SPEC)
    np.savez(tmp_path / "rows.npz", **{"00000/x": np.ones((1, 3), np.float32)})  # type: ignore[arg-type]
    wrong = service_pb2.ModelInferResponse().SerializeToString()
    read, write = os.pipe()
    os.close(read)
    with grpc_serving(lambda _: wrong) as url, os.fdopen(write) as log:
        load = load_settings(model="m", models=str(tmp_path), inputs=str(tmp_path / "rows.npz"), url=url)
        load = replace(load, rate_rps=20.0, duration_s=0.5, warmup_s=0.0, timeout_s=1.0)
        (tmp_path / "settings.json").write_text(json.dumps([asdict(load)]))
        command = [sys.executable, "-m", *LOCUST, "--json", "--settings", str(tmp_path / "settings.json")]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, timeout=120)
    assert (run.returncode, json.loads(run.stdout)[0]["num_requests"]) == (0, 10)


def test_tags_are_refused_in_one_line(tmp_path: Path) -> None:
    run = run_module(*LOCUST, "--loglevel", "WARNING", "--tags", "smoke", "--settings", str(tmp_path / "absent"))
    assert (run.returncode, run.stderr) == (2, "error: --tags smoke: this Locust file has no tags; leave --tags out\n")
