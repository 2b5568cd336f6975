"""The overlay that `make kubernetes` writes: limits, models and autoscaler of a repository, and its load tests."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cli.main import values_of
from deepseek.spec import InputError
from deepseek.spec.files.read_env_file import GPU_FILES
from serving.kubernetes import overlay
from serving.kubernetes.autoscaling import METRICS, ScaleChoice, scale_of
from serving.kubernetes.loadtest_jobs import CONFIG_MAP_BYTES, _copy_inputs
from serving.kubernetes.manifests import GATEWAY_PRE_STOP_S, NAMESPACE, OUTSIDE_PRE_STOP_S, PRE_STOP_S
from serving.observe.alerts import rules
from serving.observe.recording_rules import Scope
from serving.repository.served_models import served_models
from serving.stack.api_keys import digest
from serving.stack.certificate import ensure_certificate
from serving.stack.gateway_limits import gateway_sizes, limits
from serving.stack.server_sizes import OPENAI_MIB, REST_S, server_sizes
from tests.add_one import write_add_one, write_for_gpu
from tests.manifests import build, check_schema, committed, container_of, find, pod_of
from tests.test_alerts import ALL_FAIL, HEALTHY, MODEL, Case, at_the_end, check, check_fired, need_promtool
from tests.test_stack import TEXT

Again = tuple[Path, tuple[str, ...]]


@pytest.fixture
def again(generated: dict[str, Path], tmp_path: Path) -> Again:
    """A separate build folder, and the arguments for an overlay from it."""
    repository = generated["plain"].parent / "repository"
    return tmp_path, ("--repository", str(repository), "--models", str(tmp_path), "--build", str(tmp_path))


def test_the_overlay_has_the_sums_of_the_compose_stack(generated: dict[str, Path]) -> None:
    folder = generated["plain"].parent
    models = served_models(folder / "repository", folder)
    size = server_sizes(models)
    objects = build(generated["plain"])
    pod, container = pod_of(objects), container_of(objects)
    assert container["resources"]["limits"]["memory"] == f"{size.memory_mib}Mi"
    (shm,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm == {"medium": "Memory", "sizeLimit": f"{size.shm_mib}Mi"}
    assert container["args"][1] == str(size.exit_timeout_s)
    assert pod["terminationGracePeriodSeconds"] == PRE_STOP_S + size.stop_s
    assert pod_of(objects, "gateway")["terminationGracePeriodSeconds"] == 10 + size.answer_s + REST_S
    assert find(objects, "ConfigMap", "gateway-limits")["data"]["limits.conf"] == limits(models)
    room = gateway_sizes(models)
    assert container_of(objects, "gateway")["resources"]["limits"]["memory"] == f"{room.memory_mib}Mi"
    (tmp,) = (volume for volume in pod_of(objects, "gateway")["volumes"] if volume["name"] == "tmp")
    assert tmp["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{room.tmp_mib}Mi"}


def test_on_a_gpu_the_openai_routes_run_beside_triton_if_a_model_takes_texts(again: Again, tmp_path: Path) -> None:
    write_for_gpu(tmp_path / "gpu")
    folder, arguments = again
    registry = ("--registry", "registry.example.com/shop", "--image-tag", "1.4.0", "--output", str(folder / "texts"))
    (tmp_path / "env").write_text(f"COMPOSE_FILE={GPU_FILES}\nTRITON_TAG=26.09\n")
    gpu = ("--repository", str(tmp_path / "gpu"), "--env-file", str(tmp_path / "env"))
    overlay.main(values_of("kubernetes", *arguments, *registry, *gpu))
    objects = build(folder / "texts")
    pod = pod_of(objects)
    check_schema(find(objects, "Deployment"))
    found = {each["name"]: each for each in pod["containers"]}
    assert (
        found["openai"]["image"] == found["triton"]["image"] == "registry.example.com/shop/deepseek-server:26.09-1.4.0"
    )
    assert found["openai"]["resources"]["limits"]["memory"] == f"{OPENAI_MIB}Mi"
    assert found["triton"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    stops = [int(found[name]["lifecycle"]["preStop"]["exec"]["command"][1]) for name in ("openai", "triton")]
    assert stops == [PRE_STOP_S, PRE_STOP_S + 10]
    given = dict(zip(found["openai"]["args"][::2], found["openai"]["args"][1::2], strict=True))
    assert PRE_STOP_S + float(given["--drain-s"]) < pod["terminationGracePeriodSeconds"]
    assert {each["name"] for each in found["openai"]["volumeMounts"]} <= {each["name"] for each in pod["volumes"]}


def test_on_cpus_tritons_pod_is_guaranteed_its_cores(generated: dict[str, Path]) -> None:
    for objects in map(build, (generated["plain"], generated["fetched"])):  # "Guaranteed" takes all of them
        for container in (*pod_of(objects).get("initContainers", ()), *pod_of(objects)["containers"]):
            resources = container["resources"]
            assert all(resources["requests"][name] == resources["limits"][name] for name in ("cpu", "memory"))


def test_fetched_models_come_by_their_checksum_into_a_folder_of_their_size(generated: dict[str, Path]) -> None:
    objects = build(generated["fetched"])
    (fetch,) = pod_of(objects)["initContainers"]
    given = {each["name"]: each.get("value") for each in fetch["env"]}
    archive = (generated["fetched"] / "models.tar.gz").read_bytes()
    assert given["DEEPSEEK_MODELS_SHA256"] == hashlib.sha256(archive).hexdigest()
    assert given["DEEPSEEK_MODELS_URL"] == "https://models.example.com/shop/models.tar.gz"
    (models,) = (volume for volume in pod_of(objects)["volumes"] if volume["name"] == "models")
    assert models.keys() == {"name", "emptyDir"}
    assert not any(each["kind"] == "PersistentVolumeClaim" for each in objects)


def test_a_gateway_stops_after_those_who_send_to_it_have_noticed(generated: dict[str, Path]) -> None:
    for name, stop_s in (("fetched", OUTSIDE_PRE_STOP_S), ("plain", GATEWAY_PRE_STOP_S)):
        objects = build(generated[name])
        container = container_of(objects, "gateway")
        assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(stop_s)]
        rest_s = int(container_of(objects)["args"][1]) + REST_S
        assert pod_of(objects, "gateway")["terminationGracePeriodSeconds"] == stop_s + rest_s
    # The load balancer's port, and the one that the load test calls.
    ports = find(build(generated["fetched"]), "Service", "gateway")["spec"]["ports"]
    assert {(port["port"], port["targetPort"]) for port in ports} == {(443, "https"), (8443, "https")}


def test_names_are_looked_up_at_the_clusters_dns_and_at_a_nodes_cache_of_it(generated: dict[str, Path]) -> None:
    policies = [each for each in build(generated["fetched"]) if each["kind"] == "NetworkPolicy"]
    rules = [rule for each in policies for rule in each["spec"].get("egress", ())]
    asked = [rule["to"] for rule in rules if {"port": 53, "protocol": "UDP"} in rule.get("ports", ())]
    assert asked
    for cluster, node in asked:
        assert cluster["podSelector"] == {"matchLabels": {"k8s-app": "kube-dns"}}
        assert node == {"ipBlock": {"cidr": "169.254.20.10/32"}}


def test_tritons_pods_may_call_the_port_that_the_models_are_at(again: Again) -> None:
    folder, arguments = again
    url = "http://minio.storage.svc:9000/shop/m.tar.gz?X-Signature=a:1/b"
    overlay.main(values_of("kubernetes", *arguments, "--models-url", url))
    first, dns = find(build(folder / "kubernetes"), "NetworkPolicy", "triton-fetches-models")["spec"]["egress"]
    assert first == {"ports": [{"port": 9000}]}
    assert {each["port"] for each in dns["ports"]} == {53}


def test_images_come_from_the_registry_and_the_autoscaler_is_the_one_asked_for(generated: dict[str, Path]) -> None:
    objects = {name: build(folder) for name, folder in generated.items()}
    assert container_of(objects["keda"])["image"] == "registry.example.com/shop/deepseek-server-cpu:1.4.0"
    assert container_of(objects["keda"], "gateway")["image"] == "registry.example.com/shop/deepseek-gateway:1.4.0"
    scalers = {"plain": {"triton", "gateway"}, "keda": {"gateway"}, "bare": set()}
    for name, expected in scalers.items():
        found = [each["metadata"]["name"] for each in objects[name] if each["kind"] == "HorizontalPodAutoscaler"]
        assert set(found) == expected
        gateway = find(objects[name], "Deployment", "gateway")["spec"]
        assert gateway.get("replicas") == (None if "gateway" in expected else 2)  # the autoscaler sets it
    assert not any(each["kind"] == "ServiceMonitor" for each in objects["bare"])
    spec = find(objects["keda"], "ScaledObject")["spec"]
    assert spec["fallback"]["behavior"] == "currentReplicasIfHigher"  # without the metric the pods stay
    assert spec["fallback"]["replicas"] == spec["minReplicaCount"]


def test_other_models_are_other_pods(again: Again, capsys: pytest.CaptureFixture[str]) -> None:
    folder, arguments = again
    write_add_one(folder / "repository")
    places = ("--repository", str(folder / "repository"), *arguments[2:], "--output", str(folder / "overlay"))

    def digest() -> str:
        overlay.main(values_of("kubernetes", *places, "--json"))
        return str(json.loads(capsys.readouterr().out)["models_digest"])

    first = digest()
    assert digest() == first
    with (folder / "repository" / "add_one" / "config.pbtxt").open("a") as config:
        config.write("# tuned\n")
    assert digest() != first
    template = find(build(folder / "overlay"), "Deployment")["spec"]["template"]
    assert template["metadata"]["annotations"]["deepseek/models"] == digest()


def write_scale(folder: Path, chosen: dict[str, Any] | None, **more: str) -> None:
    """Writes the scale.json of `make simulate-scale`."""
    folder.mkdir(exist_ok=True)
    (folder / "scale.json").write_text(json.dumps({**more, "chosen": chosen}))


CHOSEN = {"targets": [{"metric": "rate", "value": 875}], "min_replicas": 4, "max_replicas": 12}


@pytest.mark.parametrize(
    ("found", "metric", "bounds", "notes"),
    [
        ({"chosen": CHOSEN, "target": "onnxruntime", "precision": "fp32"}, "rate", (4, 12), []),
        (
            {"chosen": CHOSEN, "target": "onnxruntime", "precision": "fp8"},
            "queue",
            (4, 12),
            ["measured on onnxruntime fp8"],
        ),
        ({"chosen": None}, "queue", (2, 10), ["no setting met the SLO, so the autoscaler has no target for it"]),
        (
            None,
            "queue",
            (2, 10),
            ["the autoscaler has its default target; to choose one: make capacity simulate-scale"],
        ),
    ],
    ids=["measured", "another precision", "none met", "none"],
)
def test_the_autoscaler_has_a_target_of_the_precision_that_serves_or_the_default(
    tmp_path: Path, found: dict[str, Any] | None, metric: str, bounds: tuple[int, int], notes: list[str]
) -> None:
    if found:
        write_scale(tmp_path / "text", **found)
    scale, said = scale_of([replace(TEXT, precision="fp32")], tmp_path)
    assert [target.metric for target in scale.targets] == [metric]
    assert (scale.min_replicas, scale.max_replicas, scale.cores) == (*bounds, 2)
    assert len(said) == len(notes)
    assert all(note in line for note, line in zip(notes, said, strict=True))


def test_what_the_simulation_chose_becomes_the_autoscalers(again: Again) -> None:
    folder, arguments = again
    target = {"metric": "queue", "value": 0.283}
    write_scale(folder / "add_one", {"targets": [target], "min_replicas": 3, "max_replicas": 7, "cores": 4})
    overlay.main(values_of("kubernetes", *arguments))
    objects = build(folder / "kubernetes")
    spec = find(objects, "HorizontalPodAutoscaler")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (3, 7)
    (metric,) = (each["pods"] for each in spec["metrics"])
    assert metric["metric"] == {"name": "triton_queue_compute_ratio"}
    assert metric["target"] == {"type": "AverageValue", "averageValue": "283m"}
    resources = container_of(objects)["resources"]
    assert resources["limits"]["cpu"] == resources["requests"]["cpu"] == "4"


def test_several_models_in_a_pod_are_scaled_by_their_shares_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_promtool()
    for name, rate, least, most in (("one", 875, 4, 12), ("two", 250, 3, 10), ("other", 0, 0, 0)):
        write_add_one(tmp_path / "repository", name=name)
        if rate:
            target = {"metric": "rate", "value": rate}
            write_scale(tmp_path / name, {"targets": [target], "min_replicas": least, "max_replicas": most})
    places = ("--repository", str(tmp_path / "repository"), "--models", str(tmp_path), "--build", str(tmp_path))
    overlay.main(values_of("kubernetes", *places))
    first, *others = capsys.readouterr().err.splitlines()
    assert "the autoscaler ignores other;" in first
    assert [
        f"{name}: no {tmp_path / name / 'deploy.toml'}, so" in line
        for name, line in zip(("one", "other", "two"), others, strict=True)
    ] == [True] * 3
    objects = build(tmp_path / "kubernetes")
    spec = find(objects, "HorizontalPodAutoscaler")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (7, 22)
    (metric,) = (each["pods"] for each in spec["metrics"])
    assert metric == {"metric": {"name": METRICS["load"]}, "target": {"type": "AverageValue", "averageValue": "1000m"}}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(find(objects, "PrometheusRule", "deepseek")["spec"]))
    counter = f'nv_inference_request_success{{namespace="{NAMESPACE}",pod="p",model="%s"}}'
    series = {counter % "one": f"0+{437.5 * 60}", counter % "two": f"0+{125 * 60}", counter % "other": "0+6000"}
    expected = [{"labels": f'{METRICS["load"]}{{namespace="{NAMESPACE}",pod="p"}}', "value": 1}]
    check(tmp_path, at_the_end("", series, 5, {"expr": METRICS["load"], "exp_samples": expected}))


def test_the_alerts_are_those_of_the_stack(generated: dict[str, Path]) -> None:
    folder = generated["plain"].parent
    rule = find(build(generated["plain"]), "PrometheusRule", "deepseek")
    (most,) = (each["spec"]["maxReplicas"] for each in [find(build(generated["plain"]), "HorizontalPodAutoscaler")])
    ours = Scope(NAMESPACE)
    *alerts, _ = rule["spec"]["groups"]  # the last has the autoscaler's metrics
    assert {"groups": alerts} == rules(served_models(folder / "repository", folder), scope=ours, rollout_min=2 * most)
    monitors = {name: find(build(generated["gpu"]), "ServiceMonitor", name)["spec"] for name in ("triton", "gateway")}
    assert monitors["triton"]["jobLabel"] == "app.kubernetes.io/name"  # the jobs that the alerts ask for
    for name, endpoint, job in (("gateway", 0, "gateway"), ("triton", 1, "openai")):
        assert monitors[name]["endpoints"][endpoint]["relabelings"][0]["replacement"] == job
    assert len(find(build(generated["plain"]), "ServiceMonitor")["spec"]["endpoints"]) == 1  # no texts: 8003 is closed


def test_another_namespaces_servers_raise_no_alert_and_are_no_substitute(tmp_path: Path) -> None:
    content = rules([MODEL], scope=Scope("ours"))
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(content))
    assert all(rule["labels"]["namespace"] == "ours" for group in content["groups"] for rule in group["rules"])

    def of(namespace: str, series: dict[str, str]) -> dict[str, str]:
        return {name.replace("{", f'{{namespace="{namespace}",', 1): values for name, values in series.items()}

    theirs_fail = of("ours", HEALTHY) | of("theirs", HEALTHY | ALL_FAIL)
    down = {(f"{name}Down", "page") for name in ("Triton", "Gateway", "OpenAI")}
    cases: list[Case] = [("theirs fail", theirs_fail, 70, set()), ("ours are gone", of("theirs", HEALTHY), 70, down)]
    check_fired(tmp_path, *cases, every_min=5)


@pytest.fixture
def of_text(built: Path, tmp_path: Path) -> tuple[str, ...]:
    """Arguments for an overlay with a load test of the model `text`; the gateway's folder is $DEEPSEEK_BUILD's."""
    shutil.copytree(built / "build" / "text", tmp_path / "text")
    places = ("--repository", str(built / "repository"), "--models", "tests/models", "--build", str(tmp_path))
    return (*places, "--gateway", str(tmp_path))


@pytest.mark.parametrize(
    ("has_authority", "flags", "wanted"),
    [
        (True, (), ["--url=gateway:8443", "--ca-cert=/inputs/ca.crt"]),
        (False, (), ["--url=gateway:8443", "--tls"]),  # the certificate is one that every system trusts
        (True, ("--loadtest-url", "api.example.com:443", "--loadtest-tls"), ["--url=api.example.com:443", "--tls"]),
    ],
)
def test_a_load_test_has_the_models_spec_its_rate_inputs_that_fit_and_the_gateways_address(
    tmp_path: Path, of_text: tuple[str, ...], has_authority: bool, flags: tuple[str, ...], wanted: list[str]
) -> None:
    if has_authority:
        ensure_certificate(tmp_path, [])
    overlay.main(values_of("kubernetes", *of_text, *flags))
    folder = tmp_path / "kubernetes" / "loadtest" / "text"
    objects = build(folder)
    for each in objects:
        check_schema(each)
    data = find(objects, "ConfigMap", "loadtest")["data"]
    assert data["MODEL"] == "text"
    for name in ("loadtest-master", "loadtest-worker"):
        job = find(objects, "Job", name)["spec"]
        (container,) = job["template"]["spec"]["containers"]
        assert container["args"][:2] == wanted
        assert "/models/text" in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert job["parallelism"] == job["completions"] == int(data["WORKERS"])
    egress = find(objects, "NetworkPolicy", "loadtest")["spec"]["egress"]
    assert ({"ports": [{"port": 443}]} in egress) is bool(flags)
    inputs = find(objects, "ConfigMap", "loadtest-inputs")
    assert ("ca.crt" in inputs.get("data", {})) is ("--ca-cert" in wanted[1])
    assert (folder / "inputs.npz").stat().st_size <= CONFIG_MAP_BYTES


# `make` and `kubectl` of the page, here: what would be applied is kept.
HERE = """
make() { command make -C "$ROOT" "$@"; }
kubectl() { case " $* " in *" apply "*) echo "--- # $*"; cat;; *) command kubectl "$@";; esac; }
"""


def test_the_pages_commands_for_a_load_test_make_its_key_known_to_the_gateway_before_it_starts(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: apt-get install kubectl")
    page = Path("docs/kubernetes.md").read_text()
    block = page[page.index("\n## Load test") :].partition("```sh\n")[2].partition("```")[0]
    before, _, after = block.partition("sleep ")
    assert "kubectl apply --server-side -k" in after
    assert "--from-literal" not in before  # all users of the machine would see the key in the command line
    kept = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    places = {"DEEPSEEK_BUILD": str(tmp_path / "build"), "VENV": sys.prefix, "ROOT": str(Path.cwd())}
    script = ["bash", "-euo", "pipefail", "-c", HERE + before]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env={**kept, **places})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--- # apply --server-side -f -") == 2  # else a copy would have to fit an annotation
    given = {each["metadata"]["name"]: each["data"] for each in yaml.safe_load_all(done.stdout)}
    key = base64.b64decode(given["loadtest-key"]["api-key"]).decode()
    assert f"{digest(key)}.json" in given["gateway-keys"]


def test_inputs_too_large_for_a_config_map_are_thinned_by_rows(tmp_path: Path) -> None:
    rows = {f"{row:05d}/{name}": np.random.default_rng(row).bytes(50_000) for row in range(30) for name in ("a", "b")}
    np.savez(tmp_path / "all.npz", **{name: np.frombuffer(data, np.uint8) for name, data in rows.items()})  # type: ignore[arg-type]
    _copy_inputs(tmp_path / "all.npz", tmp_path / "some.npz")
    assert (tmp_path / "some.npz").stat().st_size <= CONFIG_MAP_BYTES
    with np.load(tmp_path / "some.npz") as kept:
        assert sorted(kept.files) == sorted(f"{row:05d}/{name}" for row in range(0, 30, 4) for name in ("a", "b"))
        assert kept["00004/a"].tobytes() == rows["00004/a"]


def test_the_workers_flags_are_the_masters_and_what_its_script_adds() -> None:
    jobs = {each["metadata"]["name"]: each for each in committed("loadtest") if each["kind"] == "Job"}
    (master,), (worker,) = (job["spec"]["template"]["spec"]["containers"] for job in jobs.values())
    script = Path("docker/loadtests.sh").read_text()
    added = re.findall(r" --(model|models|target) ", script[script.index("python -m cli loadtest") :].splitlines()[0])
    extra = [flag.removeprefix("--").split("=")[0] for flag in worker["args"] if flag not in master["args"]]
    assert extra == [*added, "worker-of"]
    assert master["args"] == worker["args"][: len(master["args"])]


@pytest.mark.parametrize(
    ("flags_", "message"),
    [
        (("--repository", "nosuch"), "nosuch: no model in it"),
        (("--base", "docs"), "--base docs: no base/kustomization.yaml in it"),
        (("--models-url", "https://me:secret@store/m.tar.gz"), "--models-url: seen a user name before @; put it into"),
        (("--models-url", "http://minio:90000/m.tar.gz"), "a port is a number from 1 to 65535"),
        (("--loadtest-url", "https://api.example.com"), "it must be host:port, such as api.example.com:443"),
        (("--loadtest-url", "api.example.com:0"), "it must be host:port, such as api.example.com:443"),
        (("--no-monitoring",), "--no-monitoring with --autoscaler hpa: the autoscaler needs monitoring's metrics"),
        (("--registry", "a b"), "--registry 'a b': not valid in an image name"),
        (("--registry", "https://a"), "--registry 'https://a': not valid in an image name"),
        (("--triton-tag", "26.07"), "TRITON_TAG: seen 26.07; 26.08 or newer is needed"),
    ],
)
def test_wrong_input_is_one_line(again: Again, flags_: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        overlay.main(values_of("kubernetes", *again[1], *flags_))


def test_a_scale_file_of_another_kind_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    path.write_text('{"chosen": {"targets": []}}')
    with pytest.raises(ValueError, match="not written by make simulate-scale"):
        ScaleChoice.load(path)
