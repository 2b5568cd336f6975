"""What docker compose reads: the server that fits what was built, and limits from deploy.toml."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cli.main import values_of
from deepseek.spec import DeploymentSpec, InputError
from deepseek.spec.files.image_tag import image_tag
from serving.repository.served_models import MIB, ServedModel, served_models
from serving.stack import stack
from serving.stack.env_file import OWN, WRITTEN
from serving.stack.gateway_limits import LEAST_RATE_RPS, gateway_sizes, limits
from serving.stack.refresh import refresh
from serving.stack.server_sizes import server_sizes
from tests.conftest import run_module, write_add_one
from tests.failing_servers import sign_itself

TEXT = ServedModel(
    name="text",
    needs_gpu=False,
    instances=2,
    weights_bytes=10_000_000,
    input_bytes=64_000,
    output_bytes=16_000,
    input_numbers=8_000,
    queue_timeout_ms=200,
    p99_ms=80,
    rate_rps=100,
)


def settings_of(path: Path) -> dict[str, str]:
    """The variables of an env file."""
    return dict(
        line.replace("'", "").split("=", 1) for line in path.read_text().splitlines() if "=" in line and line[0] != "#"
    )


def write(repository: Path, *arguments: str) -> dict[str, str]:
    folder = repository.parent
    run = run_module(
        "cli", "stack", "--repository", str(repository), "--env-file", str(folder / "env"), *arguments,
        DEEPSEEK_BUILD=str(folder / "build"),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return settings_of(folder / "env")


def test_what_needs_no_gpu_is_served_by_the_embedded_triton(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    found = write(tmp_path / "repository", "--gateway-port", "9443")
    assert found["COMPOSE_FILE"] == "compose.yaml"
    assert found["GATEWAY_PORT"] == "9443"
    assert Path(found["STACK_REPOSITORY"]) == tmp_path / "repository"
    assert not found["STACK_USER"].startswith("0:")


@pytest.mark.parametrize("provider", ["migraphx", "cann"])
def test_a_model_for_amd_or_ascend_takes_no_nvidia_image_and_the_stack_says_that_it_cannot_serve_it(
    tmp_path: Path, provider: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_add_one(tmp_path / "repository")
    config = tmp_path / "repository" / "add_one" / "config.pbtxt"
    own = f'parameters {{ key: "provider" value {{ string_value: "{provider}" }} }}'
    config.write_text(config.read_text() + own)
    places = ("--env-file", str(tmp_path / "env"), "--folder", str(tmp_path / "gateway"))
    stack.main(values_of("stack", "--repository", str(tmp_path / "repository"), *places))
    assert settings_of(tmp_path / "env")["COMPOSE_FILE"] == "compose.yaml"
    told = f"note: add_one: no image has the execution provider {provider!r}, so the stack cannot serve it; make serve"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed",
    ['backend: "tensorrt"', 'backend: "pytorch"', 'backend: "python"\nparameters { key: "provider" value { string_value: "cuda" } }'],
)  # fmt: skip
def test_one_engine_that_needs_a_gpu_takes_nvidias_triton_for_all(tmp_path: Path, changed: str) -> None:
    write_add_one(tmp_path / "repository")
    write_add_one(tmp_path / "repository", "big")
    config = tmp_path / "repository" / "big" / "config.pbtxt"
    config.write_text(config.read_text().replace('backend: "python"', changed))
    found = write(tmp_path / "repository", "--triton-tag", "26.08")
    assert found["COMPOSE_FILE"] == "compose.yaml:docker/compose.gpu.yaml"
    assert found["SERVER_TAG"] == image_tag("server") != image_tag("server-cpu")
    assert found["TRITON_TAG"] == "26.08"


def test_an_image_has_another_tag_after_each_change_of_what_it_copies(tmp_path: Path) -> None:
    shutil.copy(".dockerignore", tmp_path)
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "shop.Dockerfile").write_text("FROM base\nCOPY --from=base /x /x\nCOPY cli lock ./\n")
    tags = []
    for path in ("lock", "cli/main.py", "cli/room/other.py", "docker/shop.Dockerfile"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / path).open("a") as file:
            file.write("# changed\n")
        tags.append(image_tag("shop", tmp_path))
    (tmp_path / "cli" / "__pycache__").mkdir()
    (tmp_path / "cli" / "__pycache__" / "main.pyc").touch()
    (tmp_path / "README.md").touch()
    assert image_tag("shop", tmp_path) == tags[-1]
    assert len(set(tags)) == 4


def test_load_tests_ask_the_model_named_by_the_slo_of_what_it_was_built_for(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "repository", tmp_path / "repository")
    (manifest,) = (tmp_path / "repository" / "text").glob("*/manifest.json")
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "target": "tensorrt"}))
    found = write(tmp_path / "repository", "--models", "tests/models", "--model", "text")
    assert found["MODEL"] == "text"
    assert {"image=onnxruntime", "text=tensorrt"} <= set(found["STACK_TARGETS"].split())


def test_the_load_tests_container_finds_its_models_target_and_the_gateway(tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/bash\necho "$*"\n')  # tells what it is asked
    (tmp_path / "python").chmod(0o755)
    settings = {"URL": "shop.example.com:8443", "CA_CERT": "/tls.crt", "TARGETS": "text=tensorrt text.2=onnxruntime"}

    def told(*arguments: str, **changed: str) -> str:
        environment = {**settings, **changed, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        run = subprocess.run(["docker/loadtests.sh", *arguments], env=environment, capture_output=True, text=True)
        return run.stdout + run.stderr

    assert "--target tensorrt" in told(MODEL="text")
    assert "--url shop.example.com:8443 --ca-cert /tls.crt" in told(MODEL="text")
    assert "--target onnxruntime" in told(MODEL="text.2")
    assert "--target torchscript" in told(MODEL="text", TARGET="torchscript")  # of a Job on Kubernetes
    assert "shop.example.com" not in told("--url=triton:8001", MODEL="text")
    assert (
        told(MODEL="image")
        == "error: MODEL=image: the stack serves text=tensorrt text.2=onnxruntime; set MODEL to one of these\n"
    )


@pytest.mark.parametrize(
    ("names", "host"),
    [
        (["api.example.com", "gateway"], "gateway"),
        (["api.example.com", "example.com"], "api.example.com"),
        (["*.example.com"], "gateway.example.com"),
        ([], "gateway"),
    ],
)
def test_the_gateway_is_called_by_a_name_of_its_certificate(tmp_path: Path, names: list[str], host: str) -> None:
    write_add_one(tmp_path / "repository")
    folder = tmp_path / "build" / "gateway"
    folder.mkdir(parents=True)
    sign_itself(folder / "tls.key", folder / "tls.crt", names)
    assert write(tmp_path / "repository")["STACK_HOST"] == host


def test_limits_are_the_sums_of_the_models(built: Path) -> None:
    models = {model.name: model for model in served_models(built / "repository", Path("tests/models"))}
    image = models["image"]
    spec = DeploymentSpec.load("tests/models/image")
    assert image.input_numbers == sum(math.prod(spec.shape(name, "max")) for name in spec.inputs)
    assert image.input_bytes == 4 * image.input_numbers
    assert image.weights_bytes > 1000
    text = limits(list(models.values()))
    assert f"client_max_body_size {max(model.body_bytes for model in models.values())};" in text


def test_the_gateway_has_room_for_as_many_of_the_largest_bodies_as_it_takes_at_once(tmp_path: Path) -> None:
    image = replace(TEXT, input_numbers=32 * 3 * 224 * 224)
    size = gateway_sizes([TEXT, image])
    assert size.at_once == 4
    assert size.tmp_mib * MIB > 4 * image.body_bytes
    assert size.memory_mib * MIB > (size.tmp_mib + 512) * MIB + 4 * 4 * image.body_bytes
    assert "limit_conn large_json 4;" in limits([TEXT, image])
    assert gateway_sizes([TEXT]).at_once == 128 * MIB // TEXT.body_bytes
    write_add_one(tmp_path / "repository")
    found = write(tmp_path / "repository")
    size = gateway_sizes(served_models(tmp_path / "repository", tmp_path))
    assert (found["GATEWAY_TMP"], found["GATEWAY_MEMORY"]) == (f"{size.tmp_mib}m", f"{size.memory_mib}m")


def test_the_time_out_is_the_queues_and_ten_times_the_p99_which_is_a_bound_of_the_histogram() -> None:
    assert TEXT.timeout_s == 1
    assert replace(TEXT, p99_ms=1000, queue_timeout_ms=1500).timeout_s == 12
    text = limits([TEXT, replace(TEXT, name="slow", p99_ms=1000)])
    bounds = re.search(r'\$buckets_s "(.*)";', text)
    assert bounds is not None
    assert {"0.08", "1.0"} <= set(bounds[1].split())
    assert "proxy_read_timeout 11s;" in text
    assert "grpc_read_timeout 11s;" in text
    assert "$default_rate_rps 400;" in text
    assert f"$default_rate_rps {LEAST_RATE_RPS};" in limits([replace(TEXT, rate_rps=1)])


def test_a_slow_model_gets_longer_to_finish_when_the_server_stops(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    shutil.copytree("tests/models/text", tmp_path / "models" / "add_one")
    path = tmp_path / "models" / "add_one" / "deploy.toml"
    path.write_text(re.sub(r"p99_ms = \d+", "p99_ms = 6000", path.read_text()).replace('"text"', '"add_one"'))
    found = write(tmp_path / "repository", "--models", str(tmp_path / "models"))
    assert (found["EXIT_TIMEOUT_S"], found["STOP_GRACE"]) == ("65", "75s")  # 5 s in the queue and 10 x 6 s


def test_a_stop_waits_for_the_openai_routes_and_then_for_triton() -> None:
    size = server_sizes([replace(TEXT, text_bytes=1)])
    assert (size.stop_s, size.answer_s) == (65 + 30 + 10, 65)  # a list may take 60 s, and 5 s to be sent
    without = server_sizes([TEXT])
    assert (without.stop_s, without.answer_s) == (40, 30)


def test_a_release_makes_anew_what_a_running_stack_reads_and_only_of_its_own_repository(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    write(tmp_path / "repository", "--runbook", "https://wiki.example.com/runbook")
    gateway, rules = tmp_path / "build" / "gateway", tmp_path / "build" / "observe" / "rules" / "deepseek.yml"
    before = (gateway / "limits.conf").stat()
    (tmp_path / "repository" / "add_one" / "1").rename(tmp_path / "repository" / "add_one" / "2")
    assert not refresh(tmp_path / "other", gateway)
    assert not refresh(tmp_path / "repository", tmp_path / "no stack" / "gateway")
    assert 'version="1"' in rules.read_text()
    assert refresh(tmp_path / "repository", gateway)
    assert 'version="2"' in rules.read_text()
    assert "https://wiki.example.com/runbook#versionmismatch" in rules.read_text()
    assert (gateway / "limits.conf").stat().st_ino == before.st_ino  # a new file would have nginx start workers anew


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gateway-port", "0"), "GATEWAY_PORT: seen 0"),
        (("--local-ports", "8000"), "LOCAL_PORTS: seen '8000'; use two ports, HTTP,GRPC, such as 8000,8001, or 0"),
        (("--local-ports", "8000,8000"), "LOCAL_PORTS: seen '8000,8000'"),
        (("--local-ports", "8443,8001"), "GATEWAY_PORT=8443 is one of LOCAL_PORTS"),
        (("--repository", "nosuch"), "nosuch: no model in it"),
        (("--model", "x"), "--model 'x': not in "),
        (("--models", "o'brien"), ".*: Compose cannot read a path with an apostrophe"),
        (("--project", "My shop"), "PROJECT: seen 'My shop'; use lower-case letters and digits"),
        (("--triton-tag", "26.07"), "TRITON_TAG: seen 26.07; 26.08 or newer is needed"),
        (("--triton-tag", "x"), "TRITON_TAG: seen 'x'; allowed: a release of NVIDIA's containers, YY.MM"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    write_add_one(tmp_path / "repository")
    words = ("--repository", str(tmp_path / "repository"), "--folder", str(tmp_path / "g"), *arguments)
    with pytest.raises(InputError, match=said):
        stack.main(values_of("stack", "--env-file", str(tmp_path / "env"), *words))
    assert not (tmp_path / "env").exists()


def test_the_port_and_the_name_stay_as_the_env_file_has_them(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    write(tmp_path / "repository", "--gateway-port", "9443", "--project", "shop-2")
    found = write(tmp_path / "repository")
    assert (found["GATEWAY_PORT"], found["COMPOSE_PROJECT_NAME"]) == ("9443", "shop-2")
    assert write(tmp_path / "repository", "--gateway-port", "443")["GATEWAY_PORT"] == "443"


def test_the_local_ports_stay_as_the_env_file_has_them_and_0_closes_them(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    found = write(tmp_path / "repository")
    assert (found["LOCAL_PORTS"], found["LOCAL_HTTP_PORT"], found["LOCAL_GRPC_PORT"]) == ("8000,8001", "8000", "8001")
    write(tmp_path / "repository", "--local-ports", "8100,8101")
    assert write(tmp_path / "repository")["LOCAL_GRPC_PORT"] == "8101"
    found = write(tmp_path / "repository", "--local-ports", "0")
    assert (found["LOCAL_PORTS"], found["COMPOSE_FILE"]) == ("0", "compose.yaml:docker/compose.closed.yaml")
    assert write(tmp_path / "repository")["LOCAL_PORTS"] == "0"


def test_every_variable_of_the_compose_files_is_written_or_has_a_default(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    written = write(tmp_path / "repository")
    for file in ("compose.yaml", *map(str, Path("docker").glob("compose.*.yaml"))):
        for name, rest in re.findall(r"\$\{(\w+)([^}]*)\}", Path(file).read_text()):
            assert name in written or rest.startswith(":-"), f"{file}: {name}"


def test_what_the_observing_containers_mount_is_readable_whatever_the_umask(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    before = os.umask(0o077)
    try:
        observe = Path(write(tmp_path / "repository")["STACK_OBSERVE"])
    finally:
        os.umask(before)
    found = [path for path in observe.rglob("*") if not path.name.startswith(".")]
    names = {str(path.relative_to(observe)) for path in found}
    assert {"rules/deepseek.yml", "prometheus/prometheus.sh", "grafana/datasources/prometheus.yml"} <= names
    assert "alertmanager/alertmanager.yml" in names
    assert {path.stat().st_mode & 0o777 for path in found} == {0o755, 0o644}


def test_what_is_somebodys_own_in_the_env_file_stays_below_what_is_ours(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    env_file = tmp_path / ".env"
    places = ("--repository", str(tmp_path / "repository"), "--models", str(tmp_path), "--folder", str(tmp_path / "g"))
    env_file.write_text("HTTPS_PROXY=http://proxy.example\n")  # before the first make engine
    for added in ("TRITON_MEMORY=4000m\n", ""):
        assert run_module("cli", "stack", *places, "--env-file", str(env_file)).returncode == 0
        env_file.write_text(env_file.read_text() + added)
    assert env_file.read_text().endswith(f"{OWN}\nHTTPS_PROXY=http://proxy.example\nTRITON_MEMORY=4000m\n")
    env_file.chmod(0o600)
    assert run_module("cli", "stack", *places, "--env-file", str(env_file)).returncode == 0
    assert env_file.stat().st_mode & 0o777 == 0o600
    command = ["make", "clean", "MODEL=add_one", f"ENV_FILE={env_file}", f"BUILD={tmp_path / 'b'}"]
    for _ in range(2):
        subprocess.run([*command, f"REPOSITORY={tmp_path / 'repository'}"], check=True, capture_output=True)
        assert env_file.read_text() == f"{OWN}\nHTTPS_PROXY=http://proxy.example\nTRITON_MEMORY=4000m\n"
    for text, stays in ((f"{WRITTEN}\n{OWN}\n", False), ("A=1\n", True)):
        env_file.write_text(text)
        subprocess.run([*command, f"REPOSITORY={tmp_path / 'repository'}"], check=True, capture_output=True)
        assert env_file.exists() is stays


def test_models_of_several_folders_keep_their_objectives(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "repository", tmp_path / "repository")
    places = ("--repository", str(tmp_path / "repository"), "--folder", str(tmp_path / "g"))
    files = ("--env-file", str(tmp_path / ".env"))

    def watched(models: Path) -> set[str]:
        run = run_module("cli", "stack", *places, *files, "--models", str(models))
        assert run.returncode == 0, run.stderr
        told.append(run.stderr)
        rules = yaml.safe_load((tmp_path / "observe" / "rules" / "deepseek.yml").read_text())
        alerts = [rule for group in rules["groups"] for rule in group["rules"]]
        return {rule["labels"]["model"] for rule in alerts if rule.get("alert") == "LatencyBudgetBurn"}

    told: list[str] = []
    shutil.copytree("tests/models/text", tmp_path / "elsewhere" / "text")
    assert watched(tmp_path / "elsewhere") == {"text"}
    assert "note: image: no deploy.toml in " in told[-1]
    assert watched(Path("tests/models")) >= {"text", "image"}
    assert watched(tmp_path / "elsewhere") >= {"text", "image"}
    assert "no deploy.toml" not in told[-1]
