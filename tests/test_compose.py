"""`docker compose up` for real on a machine without a GPU: images, gateway, client, load test, Prometheus, a version that
is switched under load, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from deepseek_client import AccessDenied, InferenceClient, InferenceError

from deepseek.spec import DeploymentSpec
from deepseek.spec.processes.children import free_ports
from deepseek.spec.processes.stack_triton import stack_command
from loadtests.results.settings import LoadSettings
from loadtests.search.local_server import local_server
from serving.release.versions import move_in, stage
from serving.stack.api_keys import new_key
from serving.stack.refresh import refresh
from tests.checkout import BUSY, Checkout, blocks
from tests.conftest import run_module
from tests.docker_engine import HERE, answers, own_engine, run
from tests.gateway import free_port
from tests.waiting import wait_for

PROJECT = f"deepseek-test-{os.getpid()}"
IMAGES = "deepseek-test"  # not those of a stack in use here; kept, so that the next run need not build them
OBSERVED = ("--file", "compose.yaml", "--file", "docker/compose.offline.yaml", "--profile", "observe")
# Decided by few requests, and kept on a machine that is busy with other things.
SLO = '[slo]\nobjectives = ["p50_ms < 5000", "error_rate <= 0"]\n'
PROFILES = ("--profile", "loadtest", "--profile", "observe")
pytestmark = pytest.mark.slow(minutes=1)


@pytest.fixture(scope="module")
def docker() -> Iterator[dict[str, str]]:
    """Environment in which `docker` reaches an engine: this machine's, or one that is started for the tests."""
    if answers():
        yield {"BUILD_NETWORK": "host"} if HERE.is_file() else {}
        return
    with own_engine("") as environment:
        yield environment


@dataclass(frozen=True, kw_only=True)
class Stack:
    folder: Path
    port: int
    local_ports: tuple[int, ...]
    """HTTP and gRPC on loopback, without TLS and key."""
    docker: dict[str, str]

    @property
    def gateway(self) -> Path:
        """Certificate, keys and limits."""
        return self.folder / "build" / "gateway"

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    def compose(
        self, *arguments: str, check: bool = True, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = ("docker", "compose", "--env-file", str(self.folder / "env"), "--project-name", PROJECT)
        return run(*command, *arguments, check=check, environment={**self.docker, **(environment or {})})

    def inspect(self, service: str) -> dict:
        """What Docker says of a service's container."""
        name = self.compose("ps", "--all", "--quiet", service).stdout.strip()
        return json.loads(run("docker", "inspect", name, environment=self.docker).stdout)[0]

    def one_off(self, service: str) -> dict:
        """What Docker says of a container that `docker compose run` started; empty if there is none."""
        labels = {"project": PROJECT, "service": service, "oneoff": "True"}
        filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]
        found = run("docker", "ps", "--all", "--quiet", *filters, environment=self.docker).stdout.split()
        return json.loads(run("docker", "inspect", *found, environment=self.docker).stdout)[0] if found else {}

    def client(self, protocol: str = "grpc", **settings: object) -> InferenceClient:
        access = {"ca_cert": str(self.gateway / "ca.crt"), "api_key": new_key(self.gateway, "test", rate_rps=10_000)}
        return InferenceClient(f"localhost:{self.port}", protocol, **{**access, **settings})  # type: ignore[arg-type]

    def wait_until_served(self) -> None:
        """Until the endpoint is ready again."""

        def ready() -> bool:
            with contextlib.suppress(InferenceError):
                return client.ready("text")
            return False

        with self.client() as client:
            wait_for(ready)


@pytest.fixture(scope="module")
def stack(
    docker: dict[str, str], built: Path, built_sentence: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """Triton and the gateway, built and up; down again at the end, with nothing left."""
    running = Stack(
        folder=tmp_path_factory.mktemp("stack"), port=free_port(), local_ports=tuple(free_ports(2)), docker=docker
    )
    running.folder.chmod(0o755)
    shutil.copytree(built / "repository", running.repository)
    shutil.copytree(built_sentence / "repository" / "sentence", running.repository / "sentence")  # takes texts
    places = ("--repository", str(running.repository), "--models", "tests/models", "--folder", str(running.gateway))
    ports = ("--gateway-port", str(running.port), "--local-ports", ",".join(map(str, running.local_ports)))
    settings = (*places, *ports, "--env-file", str(running.folder / "env"), "--project", IMAGES)
    done = run_module("cli", "stack", *settings)
    assert done.returncode == 0, done.stderr
    inputs = Path("build", "text", "evaluation.npz")  # where load tests look for them
    (running.folder / inputs).parent.mkdir()
    shutil.copyfile(built / inputs, running.folder / inputs)
    try:
        running.compose("--profile", "loadtest", "build", "--quiet")
        running.compose("up", "--detach", "--wait")
        yield running
    finally:
        running.compose(*PROFILES, "down", "--volumes", check=False)
    for listing in ("ps --all", "network ls", "volume ls"):
        ours = ("--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}")
        assert run("docker", *listing.split(), *ours, environment=docker).stdout == ""


def row() -> dict[str, np.ndarray]:
    """A request to the model `text`."""
    spec = DeploymentSpec.load("tests/models/text")
    return {name: np.ones(spec.shape(name, "min"), tensor.dtype) for name, tensor in spec.inputs.items()}


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_client_infers_through_the_gateway_and_at_the_local_ports(stack: Stack, protocol: str) -> None:
    with stack.client(protocol) as client:
        assert client.ready("text")
        assert np.isfinite(client.infer("text", row())["embedding"]).all()
    with stack.client(protocol, api_key="dsk_" + "A" * 43) as stranger, pytest.raises(AccessDenied):
        stranger.infer("text", row())
    url = f"127.0.0.1:{dict(zip(('http', 'grpc'), stack.local_ports, strict=True))[protocol]}"
    with InferenceClient(url, protocol) as client:  # type: ignore[arg-type]
        assert np.isfinite(client.infer("text", row())["embedding"]).all()
        assert client.model_statistics("text")["model_stats"]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{stack.local_ports[0]}/v1", api_key="unused") as over_openai:
        assert len(over_openai.embeddings.create(model="sentence", input="ab").data[0].embedding) == 32


def test_the_local_ports_are_for_this_machine_alone_and_may_be_off(stack: Stack) -> None:
    ask = "exec 3<>/dev/tcp/gateway/8000; printf 'GET /v2 HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3; cat <&3"
    seen = stack.compose("exec", "triton", "bash", "-c", ask).stdout  # from another container
    assert seen.startswith("HTTP/1.1 401"), seen
    files = ("--file", "compose.yaml", "--file", "docker/compose.closed.yaml")
    settings = json.loads(stack.compose(*files, "config", "--format", "json").stdout)["services"]["gateway"]
    assert [port["target"] for port in settings["ports"]] == [8443]
    assert settings["environment"]["LOCAL_PORTS"] == "0"


def test_a_search_starts_the_stacks_triton_over_each_candidate(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**stack.docker, "COMPOSE_PROJECT_NAME": PROJECT}.items():
        monkeypatch.setenv(name, value)
    candidate = shutil.copytree(stack.repository, tmp_path / "candidate")
    settings = LoadSettings(
        model="text", models="tests/models", target="onnxruntime", protocol="grpc", url="", inputs=""
    )
    with local_server(stack_command(stack.folder / "env"), candidate, tmp_path, settings) as server:
        mounts = [mount["Source"] for mount in stack.one_off("triton")["Mounts"]]
        assert mounts == [str(candidate)]
        with InferenceClient(server.settings.url) as client:
            assert np.isfinite(client.infer("text", row())["embedding"]).all()
    assert not stack.one_off("triton")


def test_other_containers_cannot_bypass_the_gateway(stack: Stack) -> None:
    assert not any(stack.inspect("triton")["NetworkSettings"]["Ports"].values())
    networks = stack.inspect("triton")["NetworkSettings"]["Networks"]
    (address,) = (network["IPAddress"] for network in networks.values())
    knock = f"timeout 3 bash -c 'exec 3<>/dev/tcp/{address}/8000'"
    for network in ("bridge", f"{PROJECT}_outside"):
        outsider = ("--network", network, "--entrypoint", "bash", f"{IMAGES}-gateway", "-c", knock)
        assert run("docker", "run", "--rm", *outsider, check=False, environment=stack.docker).returncode != 0
    inside = ("exec", "gateway", "bash", "-c", "exec 3<>/dev/tcp/triton/8000")
    assert stack.compose(*inside).returncode == 0  # the knock itself works


def test_the_server_wakes_its_batcher_in_time(stack: Stack) -> None:
    """By the library that the image brings: it has no compiler."""
    script = "for maps in /proc/[0-9]*/maps; do grep -q bin/tritonserver $maps && grep -o '/[^ ]*wakeup.so' $maps; done"
    found = stack.compose("exec", "triton", "bash", "-c", script, check=False).stdout.split()
    assert set(found) == {"/opt/serving/serving/embedded/libwakeup.so"}
    assert "C compiler" not in stack.compose("logs", "triton").stdout


@pytest.mark.parametrize("image", [f"{IMAGES}-server-cpu", f"{IMAGES}-loadtests"])
def test_an_image_that_calls_over_https_knows_the_systems_authorities(stack: Stack, image: str) -> None:
    count = "import ssl; print(ssl.create_default_context().cert_store_stats()['x509_ca'])"
    asked = ("--entrypoint", "env", image, "--unset=SSL_CERT_FILE", "python", "-c", count)
    assert int(run("docker", "run", "--rm", *asked, environment=stack.docker).stdout) > 0


def test_a_load_test_through_the_gateway_ends_in_a_verdict(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    toml = Path("tests/models/text/deploy.toml").read_text()
    (tmp_path / "text" / "deploy.toml").write_text(toml[: toml.index("[slo]")] + SLO)
    tmp_path.chmod(0o755)
    settings = {"MODEL": "text", "DEEPSEEK_API_KEY": new_key(stack.gateway, "loadtest")}
    settings |= {"STACK_MODELS": str(tmp_path), "BUILD": "build", "MODELS": "models", "TARGET": "auto"}  # make's own
    flags = ("--rate", "20", "--duration-s", "3", "--warmup-s", "1")
    done = stack.compose("run", "--rm", "-T", "loadtest", *flags, check=False, environment=settings)
    told = f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    assert "60 requests, 60 answered, 0 failed" in done.stdout.replace("\n", " "), told
    verdict = {0: "holds  /results/", 3: "error: "}[done.returncode]  # 3: a busy machine could not send on time
    assert verdict in done.stdout + done.stderr, told
    (saved,) = stack.gateway.with_name("stack").rglob("run.json")
    found = json.loads(saved.read_text())
    assert found["settings"]["url"] == "gateway:8443"
    assert settings["DEEPSEEK_API_KEY"] not in saved.read_text()


def test_a_server_that_is_killed_comes_back_behind_the_same_gateway(stack: Stack) -> None:
    before = stack.inspect("triton")
    top = run("docker", "top", before["Id"], "-eo", "pid,comm", environment=stack.docker).stdout.splitlines()
    os.kill(int(next(line.split()[0] for line in top if line.endswith("tritonserver"))), 9)
    wait_for(lambda: stack.inspect("triton")["State"]["StartedAt"] != before["State"]["StartedAt"])
    stack.wait_until_served()
    with stack.client() as client:
        client.infer("text", row())


def test_idle_connections_of_the_gateway_do_not_delay_a_stop(stack: Stack) -> None:
    with stack.client("http") as client:
        client.infer("text", row())
        stack.compose("stop", "triton")
        assert "Exit timeout expired" not in stack.compose("logs", "triton").stdout
        with pytest.raises(InferenceError):
            client.infer("text", row())
    stack.compose("start", "triton")
    stack.wait_until_served()


def test_an_engine_that_does_not_fit_is_not_served_and_the_log_says_why(stack: Stack, built: Path) -> None:
    flags = ("--read-only", "--cap-drop", "ALL", "--tmpfs", "/tmp:exec")  # as in compose.yaml
    mount = f"--volume={built / 'repository' / 'text'}:/models/other:ro"
    command = ("docker", "run", "--rm", *flags, mount, f"{IMAGES}-server-cpu")
    done = run(*command, check=False, environment=stack.docker)
    assert done.returncode == 1
    assert "other/1: is an engine of 'text'" in done.stdout + done.stderr


# ---- what the stack tells, and how it changes --------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Prometheus of the stack, on loopback."""

    port: int

    def ask(self, path: str) -> Any:
        """The data of an answer of its API; None until it answers."""
        with contextlib.suppress(OSError):
            return json.load(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}", timeout=5))["data"]
        return None

    def targets(self) -> dict[str, str]:
        """Health of what is scraped, by job."""
        found = self.ask("targets?state=active") or {"activeTargets": []}
        return {target["labels"]["job"]: target["health"] for target in found["activeTargets"]}

    def rules(self) -> list[dict[str, Any]]:
        found = self.ask("rules") or {"groups": []}
        return [rule for group in found["groups"] for rule in group["rules"]]

    def expects(self, version: int) -> bool:
        """Whether the alert of `text` that is loaded expects that version."""
        asked = [rule["query"] for rule in self.rules() if rule["name"] == "VersionMismatch"]
        return any("text" in query and f'version="{version}"' in query for query in asked)


@pytest.fixture(scope="module")
def observed(stack: Stack) -> Observed:
    """The profile `observe` beside the stack, from Debian's packages."""
    ports = {name: str(free_port()) for name in ("PROMETHEUS_PORT", "ALERTMANAGER_PORT")}
    stack.compose(*OBSERVED, "build", "--quiet", "prometheus")
    stack.compose(*OBSERVED, "up", "--detach", "--wait", "prometheus", "alertmanager", environment=ports)
    return Observed(port=int(ports["PROMETHEUS_PORT"]))


def test_prometheus_scrapes_all_programs_and_every_rule_evaluates(stack: Stack, observed: Observed) -> None:
    wait_for(observed.targets, {"triton": "up", "gateway": "up", "openai": "up"}.__eq__)
    wait_for(lambda: {rule["health"] for rule in observed.rules()}, {"ok"}.__eq__)
    wait_for(lambda: (observed.ask("alertmanagers") or {}).get("activeAlertmanagers"))
    wait_for(lambda: [rule["alerts"] for rule in observed.rules() if rule.get("alerts")], [].__eq__)


def test_a_rollback_through_the_gateway_costs_no_request_and_the_alerts_go_with_it(
    stack: Stack, observed: Observed, tmp_path: Path
) -> None:
    move_in(stage(stack.repository / "text", number=2, folder=tmp_path), 2, stack.repository / "text", before=1)
    assert refresh(stack.repository, stack.gateway)
    with stack.client() as client:
        wait_for(lambda: client.metadata("text").versions == ("2",))
    wait_for(lambda: observed.expects(2))
    which = ("--model", "text", "--models", "tests/models", "--repository", str(stack.repository), "--json")
    there = ("--url", f"localhost:{stack.port}", "--ca-cert", str(stack.gateway / "ca.crt"))
    settings = {"DEEPSEEK_BUILD": str(stack.folder / "build"), "DEEPSEEK_API_KEY": new_key(stack.gateway, "release")}
    done = run_module("cli", "rollback", *which, *there, **settings)
    assert done.returncode == 0, done.stdout + done.stderr + stack.compose("logs", "--tail", "30").stdout
    record = json.loads(done.stdout)
    assert "not watched" not in done.stdout, record
    switch = json.loads(Path(record["folder"], "switch.json").read_text())
    assert (record["outcome"], switch["version"], switch["failed"]) == ("rolled back", 1, 0)
    assert switch["before"]["requests"] > 10
    wait_for(lambda: observed.expects(1))


def test_the_readmes_production_commands_run(docker: dict[str, str], tmp_path: Path) -> None:
    """All but the profile `observe`, whose images no registry provides here, and a release, which has tests of its own."""
    (script,) = (block for block in blocks("README.md", "sh") if "docker compose up" in block)
    checkout, port = Checkout.copied_to(tmp_path), free_port()
    commands = script.replace("localhost:8443", f"localhost:{port}").splitlines()
    lines = [line for line in commands if not line.startswith(("make release", "docker compose --profile observe"))]
    assert len(lines) == len(commands) - 2
    local = ",".join(map(str, checkout.ports[:2]))
    settings = {"DEEPSEEK_GATEWAY_PORT": str(port), "DEEPSEEK_LOCAL_PORTS": local, "DEEPSEEK_PROJECT": IMAGES}
    environment = {**docker, **settings, "COMPOSE_PROJECT_NAME": f"{PROJECT}-readme"}
    try:
        for line in lines:
            done = checkout.sh("export DEEPSEEK_API_KEY=$(cat build/key 2>/dev/null)\n" + line, **environment)
            told = f"{line}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
            assert done.returncode == 0 or ("verdict" in line and done.returncode in BUSY), told
        assert "items" in checkout.sh("make infer", **environment).stdout
    finally:
        checkout.sh("docker compose down --volumes", **environment)
