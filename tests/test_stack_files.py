"""Files of the stack that must agree: entry points, Dockerfiles, compose files, the Makefile, Kubernetes."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.commands import COMMANDS
from cli.environment import TRITON_WHEEL
from cli.main import values_of
from deepseek.spec.machine.triton_release import TRITON_TAG
from serving.embedded.flags import CLOSED, OPENAI_DRAIN_S, server_flags
from serving.stack.server_sizes import OPENAI_MIB
from tests.conftest import RunHere
from tests.failing_servers import answering, mute, status

DOCKERFILES = sorted(Path("docker").glob("*.Dockerfile"))


def test_the_stacks_flags_are_the_embedded_servers_and_close_all_but_inference(run_here: RunHere) -> None:
    command = ("flags", "--repository", "/models", "--address", "0.0.0.0")
    stack = run_here(*command, "--behind-gateway", TRITON_ADMIN_KEY="secret").stdout.splitlines()
    plain = run_here(*command).stdout.splitlines()
    assert plain == server_flags("/models", address="0.0.0.0")
    assert set(plain) - set(stack) == {"--exit-timeout-secs=3"}
    names = ",".join(CLOSED)
    assert f"--http-restricted-api={names}:triton-admin-key=secret" in stack
    assert f"--grpc-restricted-protocol={names}:triton-admin-key=secret" in stack
    assert "--exit-timeout-secs=60" in run_here(*command, "--exit-timeout-s", "60").stdout.splitlines()


def test_nvidias_triton_starts_after_the_doctor_and_both_servers_behind_the_gateway() -> None:
    text = Path("docker/server.sh").read_text()
    assert text.index("set -euo pipefail") < text.index("cli doctor --repository /models --preflight\n")
    assert text.index("cli doctor") < text.index("\nexec tritonserver")
    assert "--behind-gateway" in text
    assert re.search(r"^exec python -m cli serve .*--behind-gateway", Path("docker/server-cpu.sh").read_text(), re.M)


ALLOW = "import resource as r; from deepseek.spec.machine.open_files import allow_open_files; allow_open_files()"
PYTHON = f"{sys.executable} -c '{ALLOW}; print(r.getrlimit(r.RLIMIT_NOFILE)[0])'; exit"


@pytest.mark.parametrize("name", ["server.sh", "gateway/gateway.sh", "python"])
@pytest.mark.parametrize(("hard", "soft"), [(2048, 2048), (70_000, 65_536)])
def test_entry_points_take_the_descriptors_that_they_may_have_within_bounds(name: str, hard: int, soft: int) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.skip(f"this machine allows fewer than {hard} descriptors")
    line = PYTHON
    if name != "python":
        (line,) = re.findall(r"^ulimit -Sn .*$", Path("docker", name).read_text(), re.MULTILINE)
    script = f"set -e; ulimit -Sn 1024; ulimit -Hn {hard}; {line}; ulimit -Sn"
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == (f"{soft}\n", "")


def test_the_embedded_server_waits_for_its_models_as_long_as_the_health_checks_do() -> None:
    (waits,) = re.findall(r' --timeout-s (\d+) "\$@"$', Path("docker/server-cpu.sh").read_text(), re.MULTILINE)
    (start,) = re.findall(r"--start-period=(\d+)s", Path("docker/server-cpu.Dockerfile").read_text())
    deployment, *_ = yaml.safe_load_all(Path("kubernetes/base/triton.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    assert waits == start == str(probe["periodSeconds"] * probe["failureThreshold"])


def test_the_gateway_looks_for_the_openai_routes_at_the_servers_port() -> None:
    port = values_of("serve").openai_port
    assert f"${{TRITON_OPENAI:-triton:{port}}}" in Path("docker/gateway/gateway.sh").read_text()
    assert f'{{name: TRITON_OPENAI, value: "triton:{port}"}}' in Path("kubernetes/base/gateway.yaml").read_text()
    assert f" {port}\n" in Path("docker/server-cpu.Dockerfile").read_text()
    on_cpu, on_gpu = services("compose.yaml"), services("docker/compose.openai.yaml")
    assert on_cpu["gateway"]["environment"]["TRITON_OPENAI"] == f"openai:{port}"
    assert on_cpu["triton"]["networks"]["inside"]["aliases"] == ["openai"]
    command = on_gpu["openai"]["command"]
    assert on_gpu["openai"]["deploy"]["resources"]["limits"]["memory"] == f"{OPENAI_MIB}m"
    assert dict(zip(command[::2], command[1::2], strict=True)) == {
        **{"--port": str(port), "--http-url": "triton:8000", "--repository": "/models"},
        **{"--drain-s": f"{OPENAI_DRAIN_S:g}"},
    }


def test_dockerfiles_have_the_versions_of_the_code() -> None:
    assert f"ARG TRITON_WHEEL={TRITON_WHEEL}\n" in Path("docker/server-cpu.Dockerfile").read_text()
    for image in ("server", "export"):
        assert f"ARG TRITON_TAG={TRITON_TAG}\n" in Path(f"docker/{image}.Dockerfile").read_text()


def test_dockerfiles_are_clean_by_hadolint() -> None:
    run = subprocess.run([Path(sys.prefix, "bin", "hadolint"), *DOCKERFILES], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("path", [path for path in DOCKERFILES if path.stem != "export"], ids=str)
def test_no_image_runs_as_root_or_takes_more_than_it_names(path: Path) -> None:
    text = path.read_text()
    users = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert users
    assert not users[-1].startswith(("0", "root"))
    assert not re.search(r"^(COPY|ADD) \. ", text, re.MULTILINE)
    assert "HEALTHCHECK" in text


@pytest.mark.parametrize("path", [path for path in DOCKERFILES if path.stem not in ("export", "observe")], ids=str)
def test_an_images_user_can_read_what_it_copies_under_any_umask(path: Path) -> None:
    """The images build without BuildKit: the classic builder has no COPY --chmod."""
    last = path.read_text().rpartition("\nFROM ")[2]
    (readable,) = re.findall(r"^RUN chmod -R a\+rX (.*)$", last, re.MULTILINE)
    assert last.rindex("\nCOPY ") < last.index("RUN chmod -R") < last.index("\nUSER ")
    for line in re.findall(r"^COPY (?!--from)(.*)$", last, re.MULTILINE):
        *sources, target = line.split()
        if target in ("./", "client/"):  # read by root, while the image is built
            continue
        to = {f"{target}{Path(source).name}" for source in sources} if target.startswith("/usr/") else {target}
        assert {each.split("/")[0] if each[0] != "/" else each for each in to} <= set(readable.split()), line


@pytest.mark.parametrize(
    ("image", "modules"),
    [
        ("server", ("cli.main", "serving.doctor.doctor", "serving.embedded.flags", "serving.openai.__main__")),
        ("server-cpu", ("cli.main", "serving.embedded.serve", "serving.openai.__main__", "serving.repository.fetch")),
        ("loadtests", ("cli.main", "loadtests.load.loadtest", "loadtests.slo.verdict")),
    ],
)
def test_an_image_copies_all_that_its_commands_import(image: str, modules: tuple[str, ...], tmp_path: Path) -> None:
    for line in re.findall(r"^COPY (?!--from)(.*)$", Path("docker", f"{image}.Dockerfile").read_text(), re.MULTILINE):
        *sources, target = line.split()
        for source in (each for each in sources if not target.startswith("/")):
            to = tmp_path / target / (Path(source).name if target.endswith("/") else "")
            if Path(source).is_dir():
                shutil.copytree(source, to, dirs_exist_ok=True)
            else:
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, to)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import {', '.join(modules)}, deepseek; print(deepseek.__file__)"
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.startswith(str(tmp_path)), run.stderr


def services(*files: str) -> dict[str, Any]:
    class Loader(yaml.SafeLoader):
        """Reads Compose's own YAML tags."""

    Loader.add_multi_constructor("!", lambda loader, _, node: loader.construct_sequence(node))
    return {
        name: service
        for file in files
        for name, service in yaml.load(Path(file).read_text(), Loader)["services"].items()
    }


@pytest.mark.parametrize("name", services("compose.yaml"))
def test_every_service_is_hardened_and_bounded(name: str) -> None:
    service = services("compose.yaml")[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not str(service["user"]).startswith("0")
    assert {"memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert "privileged" not in service
    assert "latest" not in service["image"]


def test_only_the_gateway_is_published_beyond_loopback() -> None:
    found = services("compose.yaml")
    published = [(name, port) for name, service in found.items() for port in service.get("ports", ())]
    assert [each for each in published if not each[1].startswith("127.0.0.1:")] == [
        ("gateway", "${GATEWAY_PORT:-8443}:8443")
    ]
    on_loopback = [port.rpartition(":")[2] for name, port in published if name == "gateway"]
    assert on_loopback == ["8443", "8000", "8001"]
    assert "ports" not in found["triton"]
    assert [*found["triton"]["networks"]] == ["inside"]


def test_the_gateway_goes_first_where_cores_are_short() -> None:
    shares = {name: service.get("cpu_shares") for name, service in services("compose.yaml").items()}
    assert {name: given for name, given in shares.items() if given} == {"gateway": 10240}  # the default is 1024


def test_the_gateways_log_holds_the_15_minutes_that_the_runbook_reads() -> None:
    options = services("compose.yaml")["gateway"]["logging"]["options"]
    assert int(options["max-size"].removesuffix("m")) * 10**6 * int(options["max-file"]) > 15 * 60 * 800 * 650
    assert "--since 15m gateway" in Path("docs/runbook.md").read_text()


def test_each_image_that_a_clone_builds_carries_the_digest_of_its_content() -> None:
    for file in ("compose.yaml", "docker/compose.gpu.yaml"):
        images = [service["image"] for service in services(file).values() if "build" in service]
        assert images
        assert all(re.search(r"\$\{(SERVER|GATEWAY|LOADTESTS)_TAG", image) for image in images), images


def test_no_setting_of_the_stack_has_the_name_of_a_make_variable() -> None:
    """Compose prefers the environment to the env file, and make exports its variables, such as TARGET=auto."""
    of_make = {option.variable_name for command in COMMANDS for option in command.options}
    files = ("compose.yaml", *map(str, Path("docker").glob("compose.*.yaml")))
    used = {name for file in files for name in re.findall(r"\$\{(\w+)", Path(file).read_text())}
    of_callers = {"GATEWAY_PORT", "LOCAL_PORTS", "MODEL", "TRITON_TAG", "TRACE_URL", "TRACE_EVERY"}
    assert used & of_make == of_callers


# ---- the image of NVIDIA's Triton, beside a start-up file like that of NVIDIA's shells ------------------

# Like /etc/shinit_v2 of NVIDIA's 25.08: it reads variables that are not set and takes the output of a failing command.
STARTUP = """\
if [ -n "$_CUDA_COMPAT_REALLIB" ]; then export LD_LIBRARY_PATH="$_CUDA_COMPAT_REALLIB"; fi
driver=$(false)
export STARTED=$((${STARTED:-0} + 1))
echo started >>"$MARK"
"""


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment as in NVIDIA's images, with stand-ins for the programs that the entry point calls."""
    (tmp_path / "startup").write_text(STARTUP)
    programs = {
        "python": 'case "$*" in *flags*) echo --model-repository=/models;; esac',
        "tritonserver": 'env; echo "$@"',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.defpath}", "MARK": str(tmp_path / "mark"), "BASH_ENV": str(tmp_path / "startup")}


def test_tritonserver_starts_after_nvidias_start_up_file_and_with_what_it_exported(shell: dict[str, str]) -> None:
    run = subprocess.run(["docker/server.sh"], env=shell, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *exported, flags = run.stdout.splitlines()
    assert flags == "--model-repository=/models --metrics-config=histogram_latencies=true"
    assert "STARTED=1" in exported
    assert not any(line.startswith("LD_PRELOAD=") for line in exported)  # the wake-up library was not tested here


@pytest.mark.parametrize(("line", "code"), [("200 OK", 0), ("404 Not Found", 1)])
def test_a_health_check_does_not_run_nvidias_start_up_file(shell: dict[str, str], line: str, code: int) -> None:
    def answer(connection: socket.socket) -> None:
        status(line)(connection)
        mute(connection)  # stays open until the check has written all of its request

    with answering(answer) as (url, seen):
        command = ["docker/healthy.sh", url.partition(":")[2], "/v2/health/ready"]
        run = subprocess.run(command, env=shell, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (code, "")
    assert seen[0].startswith(b"GET /v2/health/ready ")
    assert not Path(shell["MARK"]).exists()
