"""What docker compose reads: the server that fits what was built, and limits from deploy.toml."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cli.main import values_of
from deepseek.spec import DeploymentSpec, InputError
from deepseek.spec.files.folders import alone_in
from deepseek.spec.files.image_tag import image_tag
from deepseek.spec.files.read_env_file import setting_before
from deepseek.spec.machine.triton_release import TRITON_TAG
from serving.repository.served_models import MIB, ServedModel, served_models
from serving.stack import stack
from serving.stack.gateway_limits import LEAST_RATE_RPS, gateway_sizes, limits
from serving.stack.refresh import refresh
from serving.stack.server_sizes import SHM_MIB, server_sizes
from serving.stack.write_env_file import OWN
from tests.add_one import TAKES_TEXTS, replace_in, write_add_one, write_for_gpu
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


def write(folder: Path, *arguments: str) -> dict[str, str]:
    """Runs `deepseek stack` for `folder/repository`, by default one with a model; returns the env file's variables."""
    if not (folder / "repository").exists():
        write_add_one(folder / "repository")
    places = ("--repository", str(folder / "repository"), "--env-file", str(folder / "env"))
    stack.main(values_of("stack", *places, "--folder", str(folder / "build" / "gateway"), *arguments))
    return settings_of(folder / "env")


PROVIDER = 'backend: "python"\nparameters {{ key: "provider" value {{ string_value: "{}" }} }}'


@pytest.mark.parametrize(
    ("changed", "files"),
    [
        ('backend: "python"', "compose.yaml"),
        (PROVIDER.format("migraphx"), "compose.yaml"),
        (PROVIDER.format("cuda"), "compose.yaml:docker/compose.gpu.yaml"),
        ('backend: "tensorrt"', "compose.yaml:docker/compose.gpu.yaml"),
        ('backend: "pytorch"', "compose.yaml:docker/compose.gpu.yaml"),
        ('platform: "tensorrt_plan"', "compose.yaml:docker/compose.gpu.yaml"),
    ],
)
def test_one_engine_that_needs_a_gpu_takes_nvidias_triton_for_all(
    tmp_path: Path, changed: str, files: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("add_one", "big"):
        write_add_one(tmp_path / "repository", name)
    replace_in(tmp_path / "repository" / "big" / "config.pbtxt", 'backend: "python"', changed)
    found = write(tmp_path, "--triton-tag", "26.08")
    assert (found["COMPOSE_FILE"], found["TRITON_TAG"]) == (files, "26.08")
    assert write(tmp_path)["TRITON_TAG"] == ("26.08" if "gpu" in files else TRITON_TAG)  # an engine needs its release
    assert found["SERVER_TAG"] == image_tag("server" if "gpu" in files else "server-cpu")
    assert Path(found["STACK_REPOSITORY"]) == tmp_path / "repository"
    assert not found["STACK_USER"].startswith("0:")
    told = "note: big: no image has the execution provider 'migraphx', so the stack cannot serve it; make serve does"
    assert (told in capsys.readouterr().err) is ("migraphx" in changed)


def test_on_a_gpu_the_openai_routes_get_a_container_if_a_model_takes_texts(tmp_path: Path) -> None:
    write_for_gpu(tmp_path / "repository")
    found = write(tmp_path, "--local-ports", "0")
    files = ("gpu", "openai", "closed")
    assert found["COMPOSE_FILE"] == ":".join(("compose.yaml", *(f"docker/compose.{name}.yaml" for name in files)))
    replace_in(tmp_path / "repository" / "add_one" / "config.pbtxt", TAKES_TEXTS, "")
    assert "openai" not in write(tmp_path)["COMPOSE_FILE"]


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


def test_load_tests_know_the_model_and_its_target(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "repository", tmp_path / "repository")
    (manifest,) = (tmp_path / "repository" / "text").glob("*/manifest.json")
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "target": "tensorrt"}))
    found = write(tmp_path, "--models", "tests/models", "--model", "text")
    assert found["MODEL"] == "text"
    assert {"image=onnxruntime", "text=tensorrt"} <= set(found["STACK_TARGETS"].split())


@pytest.mark.parametrize(
    ("variables", "flags", "said"),
    [
        ({"MODEL": "text"}, [], "--target tensorrt --inputs /inputs.npz --url shop:8443 --ca-cert /tls.crt\n"),
        ({"MODEL": "text.2"}, [], "--target onnxruntime "),
        ({"MODEL": "text", "TARGET": "torchscript"}, [], "--target torchscript "),  # of a Job on Kubernetes
        ({"MODEL": "text"}, ["--url=triton:8001"], "--inputs /inputs.npz --url=triton:8001\n"),
        ({"MODEL": "image"}, [], "error: MODEL=image: the stack serves text=tensorrt text.2=onnxruntime; set MODEL to"),
    ],
)
def test_the_load_tests_container_finds_its_models_target_and_the_gateway(
    tmp_path: Path, variables: dict[str, str], flags: list[str], said: str
) -> None:
    (tmp_path / "python").write_text('#!/bin/bash\necho "$*"\n')
    (tmp_path / "python").chmod(0o755)
    settings = {"URL": "shop:8443", "CA_CERT": "/tls.crt", "TARGETS": "text=tensorrt text.2=onnxruntime"}
    environment = {**settings, **variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run(["docker/loadtests.sh", *flags], env=environment, capture_output=True, text=True)
    assert said in run.stdout + run.stderr


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
    folder = tmp_path / "build" / "gateway"
    folder.mkdir(parents=True)
    sign_itself(folder / "tls.key", folder / "tls.crt", names)
    assert write(tmp_path)["STACK_HOST"] == host


def test_limits_are_the_sums_of_the_models(built: Path) -> None:
    models = {model.name: model for model in served_models(built / "repository", Path("tests/models"))}
    image = models["image"]
    spec = DeploymentSpec.load("tests/models/image")
    assert image.input_numbers == sum(math.prod(spec.shape(name, "max")) for name in spec.inputs)
    assert image.input_bytes == 4 * image.input_numbers
    assert image.weights_bytes > 1000
    text = limits(list(models.values()))
    assert f"client_max_body_size {max(model.body_bytes for model in models.values())};" in text


def test_the_gateway_has_room_for_as_many_of_the_largest_bodies_as_it_takes_at_once() -> None:
    image = replace(TEXT, input_numbers=32 * 3 * 224 * 224)
    size = gateway_sizes([TEXT, image])
    assert size.at_once == 4
    assert size.tmp_mib * MIB > 4 * image.body_bytes
    assert size.memory_mib * MIB > (size.tmp_mib + 512) * MIB + 4 * 4 * image.body_bytes
    assert "limit_conn large_json 4;" in limits([TEXT, image])
    assert gateway_sizes([TEXT]).at_once == 128 * MIB // TEXT.body_bytes


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


def test_a_stop_waits_for_the_openai_routes_and_then_for_the_slowest_model_of_triton() -> None:
    size = server_sizes([replace(TEXT, text_bytes=1)])
    assert (size.stop_s, size.answer_s) == (65 + 30 + 10, 65)  # a list may take 60 s, and 5 s to be sent
    slow = server_sizes([TEXT, replace(TEXT, p99_ms=6000, queue_timeout_ms=5000)])
    assert (slow.exit_timeout_s, slow.stop_s, slow.answer_s) == (65, 75, 65)


def test_each_gpu_has_all_instances_of_a_model_that_needs_one() -> None:
    one, two = (server_sizes([replace(TEXT, needs_gpu=True)], gpus) for gpus in (1, 2))
    assert two.shm_mib - SHM_MIB == pytest.approx(2 * (one.shm_mib - SHM_MIB), abs=1)
    assert (two.base_mib, two.weights_mib) == (one.base_mib, pytest.approx(2 * one.weights_mib, abs=1))
    assert server_sizes([TEXT], 2) == server_sizes([TEXT])


def test_a_release_rewrites_the_files_of_a_running_stack_for_its_own_repository_only(tmp_path: Path) -> None:
    write(tmp_path, "--runbook", "https://wiki.example.com/runbook")
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
        (("--local-ports", "8000"), "LOCAL_PORTS: seen '8000'; use two ports, HTTP,GRPC, such as 8000,8001, or 0"),
        (("--local-ports", "8443,8001"), "GATEWAY_PORT=8443 is one of LOCAL_PORTS"),
        (("--repository", "nosuch"), "nosuch: no model in it"),
        (("--model", "x"), "--model 'x': not in "),
        (("--models", "o'brien"), "/o'brien: Compose cannot read '"),
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


def test_a_folder_whose_path_is_not_utf_8_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here := tmp_path / "caf\udce9").mkdir()
    monkeypatch.chdir(here)
    write_add_one(tmp_path / "repository")
    with pytest.raises(InputError, match=r"/caf\ufffd/models: Compose cannot read .* not UTF-8"):
        stack.main(values_of("stack", "--repository", str(tmp_path / "repository"), "--folder", str(tmp_path / "g")))


def test_ports_and_name_stay_as_the_env_file_has_them(tmp_path: Path) -> None:
    found = write(tmp_path, "--gateway-port", "9443", "--project", "shop-2")
    assert (found["LOCAL_PORTS"], found["LOCAL_HTTP_PORT"], found["LOCAL_GRPC_PORT"]) == ("8000,8001", "8000", "8001")
    write(tmp_path, "--local-ports", "8100,8101")
    found = write(tmp_path)
    kept = (found["GATEWAY_PORT"], found["COMPOSE_PROJECT_NAME"], found["LOCAL_GRPC_PORT"])
    assert kept == ("9443", "shop-2", "8101")
    for more in (("--local-ports", "0", "--gateway-port", "443"), ()):
        found = write(tmp_path, *more)
        assert (found["LOCAL_PORTS"], found["COMPOSE_FILE"]) == ("0", "compose.yaml:docker/compose.closed.yaml")
    assert found["GATEWAY_PORT"] == "443"


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("GATEWAY_PORT=9443", "9443"),
        ("GATEWAY_PORT='9443'", "9443"),
        ('export GATEWAY_PORT = "9443"  # public', "9443"),
        ("GATEWAY_PORT=94#43 # public", "94#43"),
        ("GATEWAY_PORT=9443\nGATEWAY_PORT=", ""),
        ("# GATEWAY_PORT=9443\nMY_GATEWAY_PORT=9443\nGATEWAY_PORTS=9443", ""),
    ],
)
def test_a_setting_of_the_env_file_is_read_as_compose_reads_it(tmp_path: Path, line: str, value: str) -> None:
    (tmp_path / "env").write_text(f"GATEWAY_HOST=x\n{line}\nLOCAL_PORTS=0\n")
    assert setting_before(tmp_path / "env", "GATEWAY_PORT") == value


def test_every_variable_of_the_compose_files_is_written_or_has_a_default(tmp_path: Path) -> None:
    written = write(tmp_path)
    for file in ("compose.yaml", *map(str, Path("docker").glob("compose.*.yaml"))):
        for name, rest in re.findall(r"\$\{(\w+)([^}]*)\}", Path(file).read_text()):
            assert name in written or rest.startswith(":-"), f"{file}: {name}"


def test_prometheus_and_grafana_can_read_their_files_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        observe = Path(write(tmp_path)["STACK_OBSERVE"])
    finally:
        os.umask(before)
    found = [path for path in observe.rglob("*") if not path.name.startswith(".")]
    names = {str(path.relative_to(observe)) for path in found}
    assert {"rules/deepseek.yml", "prometheus/prometheus.sh", "grafana/datasources/prometheus.yml"} <= names
    assert "alertmanager/alertmanager.yml" in names
    assert {path.stat().st_mode & 0o777 for path in found} == {0o755, 0o644}


def test_the_users_own_lines_of_the_env_file_stay_below_ours(tmp_path: Path) -> None:
    env_file = tmp_path / "env"
    env_file.write_text("HTTPS_PROXY=http://proxy.example\n")  # before the first make engine
    env_file.chmod(0o600)
    for added in ("TRITON_MEMORY=4000m\n", ""):
        write(tmp_path)
        env_file.write_text(env_file.read_text() + added)
    own = f"{OWN}\nHTTPS_PROXY=http://proxy.example\nTRITON_MEMORY=4000m\n"
    assert env_file.read_text().endswith(own)
    assert env_file.stat().st_mode & 0o777 == 0o600


def test_a_stack_that_another_process_writes_is_read_and_written_after_it(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    folder, env_file = tmp_path / "build" / "gateway", tmp_path / "env"
    words = ("--repository", str(tmp_path / "repository"), "--folder", str(folder), "--env-file", str(env_file))
    with alone_in(folder):
        command = [sys.executable, "-m", "cli", "stack", *words]
        waiting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        assert waiting.stderr.readline() == f"waiting for another process in {folder}\n"
        write_add_one(tmp_path / "repository", "added_meanwhile")
    waiting.communicate()
    assert "added_meanwhile=onnxruntime" in settings_of(env_file)["STACK_TARGETS"]


def test_models_of_several_folders_keep_their_objectives(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("tests/models/text", tmp_path / "elsewhere" / "text")
    shutil.copytree(built / "repository", tmp_path / "repository")

    def watched(models: str) -> set[str]:
        write(tmp_path, "--models", models)
        rules = yaml.safe_load((tmp_path / "build" / "observe" / "rules" / "deepseek.yml").read_text())
        alerts = [rule for group in rules["groups"] for rule in group["rules"]]
        return {rule["labels"]["model"] for rule in alerts if rule.get("alert") == "LatencyBudgetBurn"}

    elsewhere = str(tmp_path / "elsewhere")
    assert watched(elsewhere) == {"text"}
    assert "note: image: no deploy.toml in " in capsys.readouterr().err
    assert watched("tests/models") >= {"text", "image"}
    assert watched(elsewhere) >= {"text", "image"}
    assert "no deploy.toml" not in capsys.readouterr().err
