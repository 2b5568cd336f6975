"""The checks before any load, at a real Triton that is unloading something."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from deepseek_client import InferenceClient

from deepseek.spec import DeploymentSpec, InputError
from loadtests.load.preflight import check
from serving.embedded.launcher import EmbeddedServer
from tests.add_one import replace_in
from tests.conftest import FREE
from tests.saved_runs import load_settings
from tests.sleeper import write_sleeper
from tests.waiting import wait_for

FINALIZE = """
    def finalize(self):
        import os
        ends_at = time.monotonic() + 120
        while not os.path.exists("{go}") and time.monotonic() < ends_at:
            time.sleep(0.05)
"""


def test_a_model_that_serves_is_measured_while_triton_unloads_another(tmp_path: Path) -> None:
    """Triton calls the whole server not ready until the other model is gone."""
    repository = write_sleeper(tmp_path, 0.0)
    goes = Path(shutil.copytree(repository / "tiny", repository / "goes"))
    replace_in(goes / "config.pbtxt", '"tiny"', '"goes"')
    with (goes / "1" / "model.py").open("a") as code:
        code.write(FINALIZE.format(go=tmp_path / "go"))
    with EmbeddedServer(repository, **FREE) as server, InferenceClient(server.grpc_url, "grpc") as client:
        unload = threading.Thread(target=server._control.change, args=("goes", "unload"))
        unload.start()
        wait_for(lambda: not client.ready())
        inputs = str(tmp_path / "inputs.npz")
        settings = load_settings(url=server.grpc_url, inputs=inputs, rate_rps=10.0, duration_s=1.0)
        assert check(settings, DeploymentSpec.load(tmp_path / "models" / "tiny")).versions == ("1",)
        assert not client.ready()  # it still unloads: the checks met that state
        (tmp_path / "go").touch()
        unload.join()


def test_a_model_that_the_server_lacks_is_a_line_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sleeper(tmp_path, 0.0)
    monkeypatch.setattr(InferenceClient, "ready", lambda client, model=None: model is None)
    settings = load_settings(url="127.0.0.1:9", inputs=str(tmp_path / "inputs.npz"), rate_rps=10.0, duration_s=1.0)
    with pytest.raises(InputError, match=r"is it in the model repository\? .*POLL_S=2"):
        check(settings, DeploymentSpec.load(tmp_path / "models" / "tiny"))
