"""Releases: worse versions never serve, a good one loses no request at the switch, and rollback goes back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from deepseek_client import InferenceClient
from onnx import numpy_helper

from cli.main import values_of
from deepseek.spec import DeploymentSpec, FileDigest, GateFailed, InputError, InvalidMeasurement, PublishedManifest
from deepseek.spec.files.released import last_fate
from deepseek.spec.paired_drop import values_text
from export.stages.publish import publish_version
from serving.embedded.launcher import EmbeddedServer
from serving.release.candidate import Candidate
from serving.release.history import history
from serving.release.journal import ReleaseJournal, exclusive
from serving.release.live_server import LiveServer
from serving.release.release import Release
from serving.release.versions import newest
from serving.repository.checks import check_version
from tests.conftest import FREE, run_module
from tests.test_embedded import damage
from tests.waiting import wait_for

# The SLO can be proved in a second, and holds on a machine that is busy with other things.
SLO = '[slo]\nobjectives = ["p50_ms < 5000 @ 40 rps", "error_rate <= 0"]\n'


@dataclass(frozen=True)
class World:
    """A built model, a repository with version 1 of it, and the live server."""

    folder: Path
    server: EmbeddedServer

    @property
    def live(self) -> Path:
        """The model's folder in the served repository."""
        return self.folder / "repository" / "text"

    def command(self, command: str, *flags: str) -> tuple[str, ...]:
        """Arguments of a release or rollback of the served model."""
        which = ("--model", "text", "--models", str(self.folder / "models"))
        return ("cli", command, *which, "--repository", str(self.live.parent), "--url", self.server.grpc_url, *flags)

    def release(self, candidate: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        """Runs `deepseek release` with the shortest useful loads."""
        short = ("--requests", "200", "--threshold", "20", "--duration-s", "1", "--parity-rows", "8")
        command = self.command("release", "--new", str(candidate), *short, *flags)
        return run_module(*command, DEEPSEEK_BUILD=str(self.folder / "build"))

    def version(self) -> str:
        with InferenceClient(self.server.grpc_url) as client:
            client.infer("text", {"input_ids": np.ones((1, 5), np.int64), "attention_mask": np.ones((1, 5), np.int64)})
            return client.metadata("text").versions[-1]

    def expected(self) -> set[str]:
        """The versions that the stack's alerts expect."""
        rules = (self.folder / "build" / "observe" / "rules" / "deepseek.yml").read_text()
        return set(re.findall(r'version="(\d+)"', rules))

    def fate(self, version: Path) -> tuple[int, str] | None:
        """The last outcome for the content of a version, which `make engine` reads."""
        fate = last_fate("text", PublishedManifest.load(version / "manifest.json").files, self.live.parent)
        return (fate.version, fate.outcome) if fate else None

    def last(self) -> dict[str, Any]:
        run = run_module("cli", "releases", "--model", "text", "--json", DEEPSEEK_BUILD=str(self.folder / "build"))
        found: dict[str, Any] = json.loads(run.stdout)["releases"][0]
        return found


@pytest.fixture(scope="module")
def world(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server as behind the gateway, which follows the repository."""
    folder = tmp_path_factory.mktemp("release")
    (folder / "models" / "text").mkdir(parents=True)
    toml = Path("tests/models/text/deploy.toml").read_text()
    (folder / "models" / "text" / "deploy.toml").write_text(toml[: toml.index("[slo]")] + SLO)
    (folder / "models" / "text" / "model.py").write_bytes(Path("tests/models/text/model.py").read_bytes())
    shutil.copytree(built / "build", folder / "build")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_BUILD", str(folder / "build"))
        publish_version(DeploymentSpec.load(folder / "models" / "text"), "fp32", "onnxruntime", folder / "repository")
    stack = ("--repository", str(folder / "repository"), "--models", str(folder / "models"))
    made = run_module("cli", "stack", *stack, "--env-file", str(folder / "env"), DEEPSEEK_BUILD=str(folder / "build"))
    assert made.returncode == 0, made.stderr
    with EmbeddedServer(
        folder / "repository", poll_s=1, behind_gateway=True, exit_timeout_s=1, log_path=folder / "triton.log", **FREE
    ) as server:
        yield World(folder, server)


@pytest.fixture
def candidate(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the same engine and other batching: a new version that is as good."""
    monkeypatch.setenv("DEEPSEEK_BUILD", str(world.folder / "build"))
    toml = (world.folder / "models" / "text" / "deploy.toml").read_text()
    (tmp_path / "deploy.toml").write_text(toml.replace("queue_timeout_ms = 1000", "queue_timeout_ms = 900"))
    publish_version(DeploymentSpec.load(tmp_path), "fp32", "onnxruntime", tmp_path / "candidate")
    return tmp_path / "candidate"


def changed(version: Path, name: str, content: bytes) -> None:
    """Replaces a file of a version and updates its digests, as a build would."""
    (version / name).write_bytes(content)
    manifest = json.loads((version / "manifest.json").read_text())
    manifest["files"][name] = FileDigest.of(version / name).model_dump()
    (version / "manifest.json").write_text(json.dumps(manifest))


def with_noise(path: Path) -> bytes:
    """The graph with other weights than the model's."""
    graph = onnx.load(path)
    for tensor in graph.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim == 2 and values.dtype == np.float32:
            noise = np.random.default_rng(0).normal(0, values.std(), values.shape).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values + noise, tensor.name))
    return graph.SerializeToString()


def less_accurate(version: Path) -> None:
    changed(version, "model.onnx", with_noise(version / "model.onnx"))


def slower(version: Path) -> None:
    source = (version / "model.py").read_text()
    assert "    def execute(" in source
    slow = "__import__('time').sleep(0.03); return self.run_now(requests)"
    wrapped = source.replace("    def execute(", f"    def execute(self, requests): {slow}\n\n    def run_now(", 1)
    changed(version, "model.py", wrapped.encode())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("worse", "step", "said"),
    [(less_accurate, "parity", ""), (slower, "shadow", "slower: p50")],
    ids=["parity", "shadow"],
)
def test_a_worse_version_is_refused_and_the_old_one_keeps_serving(
    world: World, candidate: Path, worse: Callable[[Path], None], step: str, said: str
) -> None:
    worse(candidate / "text" / "1")
    run = world.release(candidate)
    assert run.returncode == 1, run.stdout + run.stderr
    assert said in run.stderr
    assert (world.version(), newest(world.live)) == ("1", 1)
    record = world.last()
    assert (record["outcome"], record["before"]) == ("refused", 1)
    assert (record["steps"][-1]["name"], record["steps"][-1]["state"]) == (step, "failed")
    assert "**failed**" in (Path(record["folder"]) / "report.md").read_text()


Measured = tuple[float, str | None]  # a metric, and its value for each row


def right(rows: int, lost: int) -> str:
    """A metric row by row: all right, but `lost` rows."""
    return values_text([0.0] * lost + [1.0] * (rows - lost))


@pytest.mark.parametrize(
    ("recorded", "base", "new", "said", "refused"),
    [
        ((1.0, None), None, (0.95, None), "drop 5.00%, outside the budget of 2.00%", True),
        ((1.0, right(500, 0)), None, (0.98, right(400, 8)), "drop 2.00%, inside the budget of 2.00%", False),
        ((1.0, right(500, 0)), None, (0.998, right(500, 1)), "budget 2.00%: inside", False),
        ((1.0, right(500, 0)), None, (0.974, right(500, 13)), "budget 2.00%: undecided on 500 rows; about ", True),
        # What the served version answers to the same rows counts more than its record.
        ((0.9, None), (0.5, right(500, 250)), (0.6, right(500, 200)), "version 1 has 0.5000: drop -20.00%", False),
        ((0.9, None), (0.0, right(500, 500)), (0.6, right(500, 200)), "version 1 has 0: no drop is possible", False),
    ],
    ids=["one number", "other rows", "the same rows", "undecided", "answered now", "none of these items is known"],
)
def test_the_accuracy_gate_judges_the_drop_against_the_served_version_as_the_build_does(
    recorded: Measured, base: Measured | None, new: Measured, said: str, refused: bool, built: Path, tmp_path: Path
) -> None:
    shutil.copytree(built / "repository" / "text", tmp_path / "text")
    manifest = tmp_path / "text" / "1" / "manifest.json"
    accuracy = {"metrics": {"acc": recorded[0]}, "values": recorded[1]}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"accuracy": accuracy}))
    options = values_of("release", "--model", "text", "--models", "tests/models", "--repository", str(tmp_path))
    journal = ReleaseJournal(tmp_path / "releases", "release", 2, before=1)
    gate = Candidate(options, DeploymentSpec.load("tests/models/text"), journal, 2)
    served = {"grpc": dict(zip(("value", "values"), new, strict=True))}
    answered = dict(zip(("value", "values"), base, strict=True)) if base else None
    gate._parity = {"metric": {"name": "acc", "max_drop": 0.02, "served": served, "base": answered}}
    if refused:
        with pytest.raises(GateFailed, match=re.escape(said)):
            gate.accuracy()
    else:
        assert said in gate.accuracy()


@pytest.mark.slow
def test_a_good_version_goes_live_under_load_without_a_failed_request_and_back(world: World, candidate: Path) -> None:
    run = world.release(candidate, "--threshold", "10000")  # how fast the machine is must not decide
    assert run.returncode == 0, run.stdout + run.stderr
    assert (world.version(), world.expected()) == ("2", {"2"})
    assert world.fate(world.live / "2") == (2, "live")
    record = world.last()
    assert (record["outcome"], record["steps"][-1]["name"], record["steps"][-1]["state"]) == ("live", "stack", "holds")
    found = json.loads((Path(record["folder"]) / "switch.json").read_text())
    assert (found["failed"], found["version"]) == (0, 2)
    assert found["before"]["requests"] > 50
    assert found["around"]["p99_ms"] > 0
    again = world.release(candidate)
    assert (again.returncode, len(again.stderr.splitlines())) == (2, 1)
    assert "nothing to release" in again.stderr
    back = run_module(*world.command("rollback"), DEEPSEEK_BUILD=str(world.folder / "build"))
    assert back.returncode == 0, back.stdout + back.stderr
    assert (world.version(), newest(world.live), world.expected()) == ("1", 1, {"1"})
    record = world.last()
    assert (record["kind"], record["outcome"]) == ("rollback", "rolled back")
    assert "not watched" not in record["steps"][0]["said"], record
    assert world.fate(Path(record["folder"]) / "withdrawn" / "2") == (2, "rolled back")
    assert (Path(record["folder"]) / "withdrawn" / "2" / "model.onnx").is_file()
    assert json.loads((Path(record["folder"]) / "switch.json").read_text())["failed"] == 0
    assert not [finding for finding in check_version(world.live, 1)[1] if finding]


@pytest.mark.slow
def test_a_switch_that_is_refused_costs_no_version_to_go_back_to(
    world: World, candidate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek.spec.files.repository.KEPT_VERSIONS", 1)
    switched = ("--switch-s", "0.001")  # no server takes it so soon
    options = values_of(*world.command("release", "--new", str(candidate), *switched)[1:])
    spec = DeploymentSpec.of_model(options.model, options.models)
    with exclusive("text") as releases:
        journal = ReleaseJournal(releases, "release", 2, before=1)
        candidate_2 = Candidate(options, spec, journal, 2)
        candidate_2.stage()
        with pytest.raises(GateFailed, match="still had version 1"):
            Release(candidate_2, LiveServer.find(options, 1)).switch()
    assert (newest(world.live), world.version()) == (1, "1")
    assert (journal.folder / "withdrawn" / "2" / "model.onnx").is_file()


def test_the_first_version_of_a_second_model_is_watched_until_the_server_has_it(
    world: World, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(world.folder / "build"))
    where = ("--repository", str(world.live.parent), "--url", world.server.grpc_url, "--new", str(built / "repository"))
    model = world.live.with_name("image")

    def switched(number: int) -> str:
        words = ("release", "--model", "image", "--models", "tests/models", "--new-build", str(built / "build"))
        options = values_of(*words, *where)
        with exclusive("image") as releases:
            journal = ReleaseJournal(releases, "release", number, before=None)
            new = Candidate(options, DeploymentSpec.load("tests/models/image"), journal, number)
            new.stage()
            return Release(new, LiveServer.find(options, None)).switch()

    with monkeypatch.context() as patch:
        patch.setattr(LiveServer, "look", lambda live: (None, "unknown model"))
        patch.setattr(LiveServer, "wait_for", lambda live, *_: live.look())
        with pytest.raises(InvalidMeasurement, match=r"did not load it within 60 s \(unknown model\): it refused it"):
            switched(1)
    assert not model.exists()
    assert (Path(history("image")[0].folder) / "withdrawn" / "1" / "model.onnx").is_file()
    assert "version 2 after" in switched(2)
    with InferenceClient(world.server.grpc_url) as client:
        assert client.metadata("image").versions == ("2",)
    assert history("image")[0].outcome == "live"
    shutil.rmtree(model)


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_the_old_one_serving_and_says_where_it_stopped(
    world: World, candidate: Path
) -> None:
    command = [sys.executable, "-m", *world.command("release", "--new", str(candidate))]
    environment = {**os.environ, "DEEPSEEK_BUILD": str(world.folder / "build")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("warm-up"):
            break
    wait_for(lambda: history("text")[0].steps[-1].name == "parity")
    process.kill()
    process.communicate()
    assert (world.version(), newest(world.live)) == ("1", 1)
    record = world.last()
    assert record["outcome"] == "not finished"
    assert (record["steps"][-1]["name"], record["steps"][-1]["state"]) == ("parity", "started")
    shown = run_module("cli", "releases", "--model", "text", DEEPSEEK_BUILD=str(world.folder / "build")).stdout
    assert "parity: started" in " ".join(shown.split())


def test_a_damaged_candidate_is_refused_before_anything_is_started(world: World, candidate: Path) -> None:
    damage(candidate / "text" / "1" / "model.onnx")
    run = world.release(candidate)
    assert (run.returncode, len(run.stderr.splitlines())) == (1, 1)
    assert re.search(r"text/\d+: model.onnx is damaged", run.stderr)
    assert (world.last()["steps"][-1]["name"], newest(world.live)) == ("doctor", 1)
    assert world.fate(candidate / "text" / "1") == (world.last()["version"], "refused")


def test_a_candidate_of_other_weights_is_compared_with_its_own_build_or_not_at_all(
    world: World, candidate: Path, tmp_path: Path
) -> None:
    theirs, own = tmp_path / "build" / "text" / "fp32" / "manifest.json", candidate / "text" / "1" / "manifest.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes((world.folder / "build" / "text" / "fp32" / "manifest.json").read_bytes())
    for manifest in (theirs, own):
        content = json.loads(manifest.read_text())
        content["sources"]["weights"] = "0123456789abcdef"
        manifest.write_text(json.dumps(content))

    def stage(*flags: str) -> str:
        options = values_of(*world.command("release", "--new", str(candidate), *flags)[1:])
        spec = DeploymentSpec.of_model(options.model, options.models)
        return Candidate(options, spec, ReleaseJournal(tmp_path / "releases", "release", 2, before=1), 2).stage()

    with pytest.raises(
        InputError, match=r"made from the weights 0123456789ab, but \S+/fp32/manifest.json has [0-9a-f]"
    ):
        stage()
    assert stage("--new-build", str(tmp_path / "build")).startswith("version 2, fp32 for onnxruntime, from ")


def test_a_server_with_another_version_stops_the_release_first(world: World, candidate: Path) -> None:
    (candidate / "text" / "1").rename(candidate / "text" / "7")
    run = world.release(candidate, "--repository", str(candidate))
    assert (run.returncode, len(run.stderr.splitlines())) == (2, 1)
    assert "has version 1 of text" in run.stderr
