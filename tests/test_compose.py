"""`docker compose up` for real on a machine without a GPU: images, gateway, client, load test, Prometheus, a version that
is switched under load, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import AccessDenied, InferenceClient, InferenceError

from deepseek.spec import DeploymentSpec
from serving.keys import digest, ensure_folder, new_key
from serving.stack import refresh
from serving.versions import put_live, stage
from tests.conftest import run_module
from tests.gateway import free_port

HERE = Path("../shared/docker_here.sh")  # gives a machine without a registry an engine and Debian's image
PROJECT = f"deepseek-test-{os.getpid()}"
IMAGES = "deepseek-test"  # not those of a stack in use here; kept, so that the next run need not build them
OBSERVED = ("--file", "compose.yaml", "--file", "docker/compose.offline.yaml", "--profile", "observe")
FOLLOWING = ("--file", "compose.yaml", "--file", "docker/compose.follow.yaml")
# Proved by few requests, and kept on a machine that is busy with other things.
SLO = '[slo]\nobjectives = ["p50_ms < 5000", "error_rate <= 0.01"]\n'
PROFILES = ("--profile", "loadtest", "--profile", "observe")
pytestmark = pytest.mark.slow


def run(
    *command: str, check: bool = True, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command to its end."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    assert not check or done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done


def answers(**environment: str) -> bool:
    """Whether a Docker engine with Compose is there."""
    asked = (("docker", "compose", "version"), ("docker", "info"))
    found = shutil.which("docker") is not None
    return found and all(run(*each, check=False, environment=environment).returncode == 0 for each in asked)


@pytest.fixture(scope="module")
def docker() -> Iterator[dict[str, str]]:
    """Environment in which `docker` reaches an engine: this machine's, or one that is started for the tests."""
    network = {"BUILD_NETWORK": "host"} if HERE.is_file() else {}
    if answers():
        yield network
        return
    if not HERE.is_file() or os.getuid() != 0:
        pytest.skip("no Docker engine with Compose answers, and none can be started (that takes root)")
    folder = os.environ.get("DOCKER_HERE") or f"{os.environ.get('TMPDIR', '/tmp')}/docker-here"
    ran = answers(DOCKER_HOST=f"unix://{folder}/docker.sock")
    lines = run(str(HERE)).stdout.splitlines()
    yield {**dict(word.split("=", 1) for word in lines[-1].split()[1:]), **network}
    if not ran:
        run(str(HERE), "stop")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What was started, and how to speak to it."""

    folder: Path
    port: int
    docker: dict[str, str]

    @property
    def gateway(self) -> Path:
        """Certificate, keys and limits."""
        return self.folder / "build" / "gateway"

    @property
    def repository(self) -> Path:
        """What it serves."""
        return self.folder / "repository"

    def compose(
        self, *arguments: str, check: bool = True, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`docker compose …` of this stack."""
        command = ("docker", "compose", "--env-file", str(self.folder / "env"), "--project-name", PROJECT)
        return run(*command, *arguments, check=check, environment={**self.docker, **(environment or {})})

    def inspect(self, service: str) -> dict:
        """What Docker says of a service's container."""
        name = self.compose("ps", "--all", "--quiet", service).stdout.strip()
        return json.loads(run("docker", "inspect", name, environment=self.docker).stdout)[0]

    def client(self, protocol: str = "grpc", **settings: object) -> InferenceClient:
        """The client that an application uses."""
        access = {"ca_cert": str(self.gateway / "ca.crt"), "api_key": new_key(self.gateway, "test", rate_rps=10_000)}
        return InferenceClient(f"localhost:{self.port}", protocol, **{**access, **settings})  # type: ignore[arg-type]

    def wait_until_served(self, timeout_s: float = 60) -> None:
        """Until the endpoint is ready again."""
        started = time.monotonic()
        with self.client() as client:
            while time.monotonic() - started < timeout_s:
                with contextlib.suppress(InferenceError):
                    if client.ready("text"):
                        return
                time.sleep(0.2)
        raise AssertionError(self.compose("logs", "--tail", "20").stdout)


@pytest.fixture(scope="module")
def stack(docker: dict[str, str], built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Triton and the gateway, built and up; down again at the end, with nothing left."""
    running = Stack(folder=tmp_path_factory.mktemp("stack"), port=free_port(), docker=docker)
    running.folder.chmod(0o755)
    shutil.copytree(built / "repository", running.repository)
    arguments = ("--repository", str(running.repository), "--models", "tests/models")
    settings = ("--gateway-port", str(running.port), "--env-file", str(running.folder / "env"), "--project", IMAGES)
    done = run_module("serving.stack", *arguments, *settings, "--folder", str(running.gateway))
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
    for kind in ("container", "network", "volume"):
        flags = ("--all",) if kind == "container" else ()
        left = run(
            "docker",
            kind,
            "ls",
            *flags,
            "--quiet",
            "--filter",
            f"label=com.docker.compose.project={PROJECT}",
            environment=docker,
        )
        assert left.stdout == ""


def row() -> dict[str, np.ndarray]:
    """A request to the model `text`."""
    spec = DeploymentSpec.load("tests/models/text")
    return {name: np.ones(spec.shape(name, "min"), tensor.dtype) for name, tensor in spec.inputs.items()}


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_client_infers_through_the_gateway(stack: Stack, protocol: str) -> None:
    with stack.client(protocol) as client:
        assert client.ready("text")
        assert np.isfinite(client.infer("text", row())["embedding"]).all()
    with stack.client(protocol, api_key="dsk_" + "A" * 43) as stranger, pytest.raises(AccessDenied):
        stranger.infer("text", row())


@pytest.mark.parametrize("service", ["triton", "gateway"])
def test_containers_run_bounded_without_root_capabilities_or_a_writable_disk(stack: Stack, service: str) -> None:
    found = stack.inspect(service)
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["Memory"] > 0
    status = stack.compose("exec", service, "cat", "/proc/self/status").stdout
    assert "NoNewPrivs:\t1" in status
    assert "CapEff:\t0000000000000000" in status
    assert "Uid:\t0" not in status
    assert stack.compose("exec", service, "touch", "/opt/x", check=False).returncode != 0


def test_nobody_gets_round_the_gateway_from_another_container(stack: Stack) -> None:
    assert not any(stack.inspect("triton")["NetworkSettings"]["Ports"].values())
    networks = stack.inspect("triton")["NetworkSettings"]["Networks"]
    (address,) = (network["IPAddress"] for network in networks.values())
    knock = f"timeout 3 bash -c 'exec 3<>/dev/tcp/{address}/8000'"
    for network in ("bridge", f"{PROJECT}_outside"):
        outsider = (
            "docker",
            "run",
            "--rm",
            "--network",
            network,
            "--entrypoint",
            "bash",
            f"{IMAGES}-gateway",
            "-c",
            knock,
        )
        assert run(*outsider, check=False, environment=stack.docker).returncode != 0
    inside = ("exec", "gateway", "bash", "-c", "exec 3<>/dev/tcp/triton/8000")
    assert stack.compose(*inside).returncode == 0  # the knock itself works


def test_the_server_wakes_its_batcher_in_time(stack: Stack) -> None:
    """By the library that the image brings: it has no compiler."""
    script = (
        "for maps in /proc/[0-9]*/maps; do grep -q bin/tritonserver $maps && grep -o '/[^ ]*libwakeup.so' $maps; done"
    )
    found = stack.compose("exec", "triton", "bash", "-c", script, check=False).stdout.split()
    assert set(found) == {"/opt/serving/serving/libwakeup.so"}
    assert "C compiler" not in stack.compose("logs", "triton").stdout


def test_the_cpu_servers_image_is_under_a_gigabyte(stack: Stack) -> None:
    size = run(
        "docker", "image", "inspect", "--format", "{{.Size}}", f"{IMAGES}-server-cpu", environment=stack.docker
    ).stdout
    assert int(size) < 1e9


@pytest.mark.parametrize("image", [f"{IMAGES}-server-cpu", f"{IMAGES}-loadtests"])
def test_an_image_that_calls_over_https_knows_the_systems_authorities(stack: Stack, image: str) -> None:
    count = "import ssl; print(ssl.create_default_context().cert_store_stats()['x509_ca'])"
    asked = ("--entrypoint", "env", image, "--unset=SSL_CERT_FILE", "python", "-c", count)
    assert int(run("docker", "run", "--rm", *asked, environment=stack.docker).stdout) > 0


def test_an_image_of_a_clone_that_its_owner_alone_may_read_starts(stack: Stack, tmp_path: Path) -> None:
    shutil.copytree("docker", tmp_path / "docker")
    for path in tmp_path.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
    network = ("--network", stack.docker.get("BUILD_NETWORK", "default"))
    build = ("docker", "build", "--quiet", *network, "--file", f"{tmp_path}/docker/gateway.Dockerfile", str(tmp_path))
    image = run(*build, environment=stack.docker).stdout.strip()
    look = "test -x /opt/gateway/gateway.sh -a -x /usr/local/bin/healthy.sh && cat /opt/gateway/*"
    try:
        run("docker", "run", "--rm", "--entrypoint", "bash", image, "-c", look, environment=stack.docker)
    finally:
        run("docker", "image", "rm", image, environment=stack.docker)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_key_that_the_gateway_may_not_read_is_told_and_given_to_it_by_roots_next_one(stack: Stack) -> None:
    key = new_key(stack.gateway, "shop")
    path = stack.gateway / "keys" / f"{digest(key)}.json"
    os.chown(path, 0, 0)
    with stack.client(api_key=key) as client:
        with pytest.raises(AccessDenied):
            client.infer("text", row())
        assert f"{path.name} gives no key (Permission denied)" in stack.compose("logs", "gateway").stdout
        ensure_folder(stack.gateway, [])
        client.infer("text", row())


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
    before = stack.inspect("triton")["State"]["StartedAt"]
    os.kill(tritonserver_of(stack), 9)
    deadline = time.monotonic() + 60
    while stack.inspect("triton")["State"]["StartedAt"] == before:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    stack.wait_until_served()
    with stack.client() as client:
        client.infer("text", row())


def tritonserver_of(stack: Stack) -> int:
    """Process id of the server in the container, as the host has it."""
    lines = run(
        "docker", "top", stack.inspect("triton")["Id"], "-eo", "pid,comm", environment=stack.docker
    ).stdout.splitlines()
    return int(next(line.split()[0] for line in lines if line.endswith("tritonserver")))


def test_a_server_that_is_told_to_stop_is_not_held_up_by_the_gateways_idle_connections(stack: Stack) -> None:
    with stack.client("http") as client:
        client.infer("text", row())
        stack.compose("stop", "triton")
        assert "Exit timeout expired" not in stack.compose("logs", "triton").stdout
        with pytest.raises(InferenceError):
            client.infer("text", row())
    stack.compose("start", "triton")
    stack.wait_until_served()


def test_an_engine_that_does_not_fit_is_not_served_and_the_log_says_why(stack: Stack, built: Path) -> None:
    (version,) = (built / "repository" / "text").glob("[0-9]*")
    mounts = ("--volume", f"{built / 'repository' / 'text'}:/models/other:ro")
    hardening = ("--read-only", "--cap-drop", "ALL", "--tmpfs", "/tmp")
    done = run(
        "docker", "run", "--rm", *hardening, *mounts, f"{IMAGES}-server-cpu", check=False, environment=stack.docker
    )
    assert done.returncode == 1
    assert f"other/{version.name}: is an engine of 'text'" in done.stdout + done.stderr


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
        """Its rules, with what came of them."""
        found = self.ask("rules") or {"groups": []}
        return [rule for group in found["groups"] for rule in group["rules"]]

    def expects(self, version: int) -> bool:
        """Whether the alert of `text` is evaluated, expects that version and no other, and does not fire."""
        alerts = [rule for rule in self.rules() if rule["name"] == "VersionMismatch" and "text" in rule["query"]]
        return [(rule["health"], rule["state"]) for rule in alerts] == [("ok", "inactive")] and all(
            f'version="{version}"' in rule["query"] for rule in alerts
        )


def wait_until(holds: Callable[[], bool], tell: Callable[[], object], timeout_s: float = 60) -> None:
    """Until it is so; else what there is to tell."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, tell()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def observed(stack: Stack) -> Observed:
    """The profile `observe` beside the stack, from Debian's packages."""
    ports = {name: str(free_port()) for name in ("PROMETHEUS_PORT", "ALERTMANAGER_PORT")}
    stack.compose(*OBSERVED, "build", "--quiet", "prometheus")
    stack.compose(*OBSERVED, "up", "--detach", "--wait", "prometheus", "alertmanager", environment=ports)
    return Observed(port=int(ports["PROMETHEUS_PORT"]))


def test_prometheus_finds_both_programs_and_alertmanager_and_every_rule_is_well(
    stack: Stack, observed: Observed
) -> None:
    def logs() -> str:
        return stack.compose(*OBSERVED, "logs", "--tail", "20", "prometheus", "alertmanager").stdout

    wait_until(lambda: observed.targets() == {"triton": "up", "gateway": "up"}, lambda: (observed.targets(), logs()))
    wait_until(lambda: {rule["health"] for rule in observed.rules()} == {"ok"}, lambda: (observed.rules(), logs()))
    wait_until(lambda: bool((observed.ask("alertmanagers") or {}).get("activeAlertmanagers")), logs)
    wait_until(lambda: not any(rule.get("alerts") for rule in observed.rules()), observed.rules)


def test_a_rollback_through_the_gateway_costs_no_request_and_the_alerts_go_with_it(
    stack: Stack, observed: Observed, tmp_path: Path
) -> None:
    put_live(stage(stack.repository / "text", number=2, folder=tmp_path), 2, stack.repository / "text", before=1)
    assert refresh(stack.repository, stack.gateway) == []
    stack.compose(*FOLLOWING, "up", "--detach", "--wait", "triton")
    stack.wait_until_served()
    wait_until(lambda: observed.expects(2), observed.rules)
    which = ("--model", "text", "--models", "tests/models", "--repository", str(stack.repository), "--json")
    there = ("--url", f"localhost:{stack.port}", "--ca-cert", str(stack.gateway / "ca.crt"))
    settings = {"BUILD": str(stack.folder / "build"), "DEEPSEEK_API_KEY": new_key(stack.gateway, "release")}
    done = run_module("serving.rollback", *which, *there, **settings)
    assert done.returncode == 0, done.stdout + done.stderr + stack.compose("logs", "--tail", "30").stdout
    record = json.loads(done.stdout)
    switch = json.loads(Path(record["folder"], "switch.json").read_text())
    assert (record["outcome"], switch["version"], switch["failed"]) == ("rolled back", 1, 0)
    assert switch["before"]["requests"] > 10
    wait_until(lambda: observed.expects(1), observed.rules)
