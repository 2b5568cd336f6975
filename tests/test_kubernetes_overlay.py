"""The overlay that `make kubernetes` writes: limits, models and autoscaler of a repository, and its load tests."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import numpy as np
import pytest
import yaml

from cli.main import values_of
from deepseek.spec import InputError
from serving.kubernetes import overlay
from serving.kubernetes.autoscaling import METRICS, ScaleChoice
from serving.kubernetes.loadtest_jobs import CONFIG_MAP_BYTES, GATEWAY_URL, _copy_inputs
from serving.kubernetes.manifests import GATEWAY_PRE_STOP_S, NAMESPACE, OUTSIDE_PRE_STOP_S, PRE_STOP_S
from serving.observe.alerts import rules
from serving.observe.recording_rules import Scope
from serving.repository.served_models import served_models
from serving.stack.api_keys import digest
from serving.stack.certificate import ensure_certificate
from serving.stack.gateway_limits import gateway_sizes, limits
from serving.stack.server_sizes import REST_S, server_sizes
from tests.conftest import run_module, write_add_one
from tests.manifests import KUBERNETES, build, committed, container_of, find, pod_of
from tests.test_alerts import ALL_FAIL, HEALTHY, MODEL, Fired, at_the_end, check, check_fired, need_promtool


@pytest.fixture
def again(generated: dict[str, Path], tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
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


def test_on_cpus_no_container_of_tritons_pod_keeps_it_from_cores_of_its_own(generated: dict[str, Path]) -> None:
    for objects in (committed("overlays/cpu"), build(generated["fetched"])):  # "Guaranteed" takes all of them
        for container in (*pod_of(objects).get("initContainers", ()), *pod_of(objects)["containers"]):
            resources = container["resources"]
            assert all(resources["requests"][name] == resources["limits"][name] for name in ("cpu", "memory"))


def test_fetched_models_come_by_their_checksum_into_a_folder_of_their_size(generated: dict[str, Path]) -> None:
    objects = build(generated["fetched"])
    (fetch,) = pod_of(objects)["initContainers"]
    given = {each["name"]: each.get("value") for each in fetch["env"]}
    archive = generated["fetched"] / "models.tar.gz"
    checksum = subprocess.run(["sha256sum", archive], capture_output=True, text=True, check=True).stdout.split()[0]
    assert given["DEEPSEEK_MODELS_SHA256"] == checksum
    assert given["DEEPSEEK_MODELS_URL"] == "https://models.example.com/shop/models.tar.gz"
    (models,) = (volume for volume in pod_of(objects)["volumes"] if volume["name"] == "models")
    assert models.keys() == {"name", "emptyDir"}
    assert not any(each["kind"] == "PersistentVolumeClaim" for each in objects)


def test_a_load_balancers_gateway_listens_on_443_and_still_where_the_load_test_calls_it(
    generated: dict[str, Path],
) -> None:
    ports = find(build(generated["fetched"]), "Service", "gateway")["spec"]["ports"]
    assert {port["port"] for port in ports} == {443, int(GATEWAY_URL.rpartition(":")[2])}
    assert {port["targetPort"] for port in ports} == {"https"}
    assert len({port["name"] for port in ports}) == 2


def test_a_gateway_that_a_load_balancer_still_sends_to_goes_on_for_so_long(generated: dict[str, Path]) -> None:
    for name, stop_s in (("fetched", OUTSIDE_PRE_STOP_S), ("plain", GATEWAY_PRE_STOP_S)):
        objects = build(generated[name])
        container = container_of(objects, "gateway")
        assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(stop_s)]
        rest_s = int(container_of(objects)["args"][1]) + REST_S
        assert pod_of(objects, "gateway")["terminationGracePeriodSeconds"] == stop_s + rest_s


def test_tritons_pods_may_call_the_port_that_the_models_are_at(again: tuple[Path, tuple[str, ...]]) -> None:
    folder, arguments = again
    url = "http://minio.storage.svc:9000/shop/m.tar.gz?X-Signature=a:1/b"
    assert run_module("cli", "kubernetes", *arguments, "--models-url", url).returncode == 0
    first, dns = find(build(folder / "kubernetes"), "NetworkPolicy", "triton-fetches-models")["spec"]["egress"]
    assert first == {"ports": [{"port": 9000}]}
    assert {each["port"] for each in dns["ports"]} == {53}
    schemes = {"https://models.example.com/m.tar.gz": 443, "http://models.storage.svc/m.tar.gz": 80}
    assert {url: overlay._port_of(url) for url in schemes} == schemes


def test_images_come_from_the_registry_and_the_autoscaler_is_the_one_asked_for(generated: dict[str, Path]) -> None:
    objects = build(generated["keda"])
    assert container_of(objects)["image"] == "registry.example.com/shop/deepseek-server-cpu:1.4.0"
    assert container_of(objects, "gateway")["image"] == "registry.example.com/shop/deepseek-gateway:1.4.0"
    found = {name: {(each["kind"], each["metadata"]["name"]) for each in build(generated[name])} for name in generated}
    scalers = {"plain": {"triton", "gateway"}, "keda": {"gateway"}, "bare": set()}
    for name, expected in scalers.items():
        assert {scaled for kind, scaled in found[name] if kind == "HorizontalPodAutoscaler"} == expected
    assert not any(kind == "ServiceMonitor" for kind, _ in found["bare"])
    spec = find(build(generated["keda"]), "ScaledObject")["spec"]  # without the metric it keeps the pods that there are
    assert spec["fallback"]["behavior"] == "currentReplicasIfHigher"
    assert spec["fallback"]["replicas"] == spec["minReplicaCount"]


def test_the_gateways_pods_are_the_autoscalers_or_two(generated: dict[str, Path]) -> None:
    specs = {name: find(build(generated[name]), "Deployment", "gateway")["spec"] for name in ("plain", "keda", "bare")}
    assert {name: spec.get("replicas") for name, spec in specs.items()} == {"plain": None, "keda": None, "bare": 2}
    scaler = find(build(generated["plain"]), "HorizontalPodAutoscaler", "gateway")["spec"]
    assert (scaler["scaleTargetRef"]["name"], scaler["minReplicas"]) == ("gateway", 2)


def test_other_models_are_other_pods(again: tuple[Path, tuple[str, ...]]) -> None:
    folder, arguments = again
    repository = folder / "repository"
    write_add_one(repository)

    def digest() -> str:
        places = ("--repository", str(repository), *arguments[2:], "--output", str(folder / "overlay"))
        assert run_module("cli", "kubernetes", *places).returncode == 0
        build.cache_clear()
        template = find(build(folder / "overlay"), "Deployment")["spec"]["template"]
        return str(template["metadata"]["annotations"]["deepseek/models"])

    first = digest()
    assert digest() == first
    config = repository / "add_one" / "config.pbtxt"
    config.write_text(f"{config.read_text()}# tuned\n")
    assert digest() != first


def test_what_was_measured_on_another_precision_is_no_target(tmp_path: Path, built: Path) -> None:
    (tmp_path / "text").mkdir()
    chosen = '{"targets": [{"metric": "rate", "value": 875}], "min_replicas": 4, "max_replicas": 12}'
    places = ("--repository", str(built / "repository"), "--models", "tests/models", "--build", str(tmp_path))
    served = next(each for each in served_models(built / "repository", Path("tests/models")) if each.name == "text")

    def notes(precision: str) -> str:
        found = f'{{"target": "onnxruntime", "precision": "{precision}", "chosen": {chosen}}}'
        (tmp_path / "text" / "scale.json").write_text(found)
        run = run_module("cli", "kubernetes", *places)
        assert run.returncode == 0, run.stderr
        return run.stderr

    assert "measured on" not in notes(str(served.precision))
    assert f"measured on onnxruntime fp8, but served is onnxruntime {served.precision}" in notes("fp8")
    spec = find(build(tmp_path / "kubernetes"), "HorizontalPodAutoscaler")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (4, 12)
    assert [each["pods"]["metric"]["name"] for each in spec["metrics"]] == [METRICS["queue"]]


def test_what_the_simulation_chose_becomes_the_autoscalers(again: tuple[Path, tuple[str, ...]]) -> None:
    folder, arguments = again
    (folder / "add_one").mkdir()
    chosen = '{"targets": [{"metric": "queue", "value": 0.283}], "min_replicas": 3, "max_replicas": 7, "cores": 4}'
    (folder / "add_one" / "scale.json").write_text(f'{{"chosen": {chosen}}}')
    assert run_module("cli", "kubernetes", *arguments).returncode == 0
    objects = build(folder / "kubernetes")
    spec = find(objects, "HorizontalPodAutoscaler")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (3, 7)
    assert spec["metrics"] == [
        {
            "type": "Pods",
            "pods": {
                "metric": {"name": "triton_queue_compute_ratio"},
                "target": {"type": "AverageValue", "averageValue": "283m"},
            },
        }
    ]
    resources = container_of(objects)["resources"]
    assert resources["limits"]["cpu"] == resources["requests"]["cpu"] == "4"


def test_several_models_in_a_pod_are_scaled_by_what_each_may_have_of_it(tmp_path: Path) -> None:
    need_promtool()
    for name, rate, least, most in (("one", 875, 4, 12), ("two", 250, 3, 10), ("other", 0, 0, 0)):
        write_add_one(tmp_path / "repository", name=name)
        if rate:
            chosen = f'{{"targets": [{{"metric": "rate", "value": {rate}}}], "min_replicas": {least}, "max_replicas": {most}}}'
            (tmp_path / name).mkdir()
            (tmp_path / name / "scale.json").write_text(f'{{"chosen": {chosen}}}')
    places = ("--repository", str(tmp_path / "repository"), "--models", str(tmp_path), "--build", str(tmp_path))
    run = run_module("cli", "kubernetes", *places)
    assert (run.returncode, run.stderr.count("\n")) == (0, 1)
    assert "the autoscaler ignores other;" in run.stderr
    objects = build(tmp_path / "kubernetes")
    spec = find(objects, "HorizontalPodAutoscaler")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (7, 22)
    (metric,) = (each["pods"] for each in spec["metrics"])
    assert metric == {"metric": {"name": METRICS["load"]}, "target": {"type": "AverageValue", "averageValue": "1000m"}}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(find(objects, "PrometheusRule", "deepseek")["spec"]))
    counter = 'nv_inference_request_success{namespace="n",pod="p",model="%s"}'
    series = {counter % "one": f"0+{437.5 * 60}", counter % "two": f"0+{125 * 60}", counter % "other": "0+6000"}
    expected = [{"labels": f'{METRICS["load"]}{{namespace="n",pod="p"}}', "value": 1}]
    check(tmp_path, at_the_end("", series, 5, {"expr": METRICS["load"], "exp_samples": expected}))


def test_a_day_that_no_setting_held_is_said_and_not_recommended_again(again: tuple[Path, tuple[str, ...]]) -> None:
    folder, arguments = again
    run = run_module("cli", "kubernetes", *arguments)
    assert run.stderr == "note: the autoscaler has its default target; to choose one: make capacity simulate-scale\n"
    (folder / "add_one").mkdir()
    (folder / "add_one" / "scale.json").write_text('{"chosen": null}')
    run = run_module("cli", "kubernetes", *arguments)
    assert run.returncode == 0
    assert f"note: {folder}/add_one/scale.json: no setting met the SLO" in run.stderr
    assert run.stderr.count("\n") == 1


def test_the_alerts_are_those_of_the_stack(generated: dict[str, Path]) -> None:
    folder = generated["plain"].parent
    rule = find(build(generated["plain"]), "PrometheusRule", "deepseek")
    (most,) = (each["spec"]["maxReplicas"] for each in [find(build(generated["plain"]), "HorizontalPodAutoscaler")])
    ours = Scope(NAMESPACE)
    assert rule["spec"] == rules(served_models(folder / "repository", folder), scope=ours, rollout_min=2 * most)
    monitors = {name: find(build(generated["plain"]), "ServiceMonitor", name)["spec"] for name in ("triton", "gateway")}
    assert monitors["triton"]["jobLabel"] == "app.kubernetes.io/name"  # the jobs that the alerts ask for
    for name, endpoint, job in (("gateway", 0, "gateway"), ("triton", 1, "openai")):
        assert monitors[name]["endpoints"][endpoint]["relabelings"][0]["replacement"] == job


def within(namespace: str, series: dict[str, str]) -> dict[str, str]:
    """The series in a cluster's Prometheus."""
    return {name.replace("{", f'{{namespace="{namespace}",', 1): values for name, values in series.items()}


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        (within("ours", HEALTHY) | within("theirs", HEALTHY | ALL_FAIL), set()),
        (within("theirs", HEALTHY), {(f"{name}Down", "page") for name in ("Triton", "Gateway", "OpenAI")}),
    ],
    ids=["theirs fails", "ours is away"],
)
def test_another_namespaces_servers_are_none_of_ours(tmp_path: Path, series: dict[str, str], expected: Fired) -> None:
    content = rules([MODEL], scope=Scope("ours"))
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(content))
    assert all(rule["labels"]["namespace"] == "ours" for group in content["groups"] for rule in group["rules"])
    check_fired(tmp_path, ("", series, 70, expected), every_min=5)


@pytest.fixture
def of_text(built: Path, tmp_path: Path) -> tuple[str, ...]:
    """Arguments for an overlay with a load test of the model `text`; the gateway's folder is $DEEPSEEK_BUILD's."""
    shutil.copytree(built / "build" / "text", tmp_path / "text")
    places = ("--repository", str(built / "repository"), "--models", "tests/models", "--build", str(tmp_path))
    return (*places, "--gateway", str(tmp_path))


def test_a_load_test_has_the_models_spec_its_rate_and_inputs_that_fit(tmp_path: Path, of_text: tuple[str, ...]) -> None:
    assert run_module("cli", "kubernetes", *of_text).returncode == 0
    objects = build(tmp_path / "kubernetes" / "loadtest" / "text")
    for each in objects:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    data = find(objects, "ConfigMap", "loadtest")["data"]
    assert data["MODEL"] == "text"
    worker = find(objects, "Job", "loadtest-worker")["spec"]
    assert worker["parallelism"] == worker["completions"] == int(data["WORKERS"])
    (container,) = worker["template"]["spec"]["containers"]
    assert "/models/text" in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert container["args"][1] == "--tls"  # no ca.crt: the certificate is one that every system trusts
    assert (tmp_path / "kubernetes" / "loadtest" / "text" / "inputs.npz").stat().st_size <= CONFIG_MAP_BYTES


@pytest.mark.parametrize(
    "flags", [(), ("--loadtest-url", "api.example.com:443", "--loadtest-tls")], ids=["own", "public"]
)
def test_both_jobs_call_the_gateway_by_its_name_and_trust_whom_they_are_told_to(
    tmp_path: Path, of_text: tuple[str, ...], flags: tuple[str, ...]
) -> None:
    ensure_certificate(tmp_path, [])
    assert run_module("cli", "kubernetes", *of_text, *flags).returncode == 0
    objects = build(tmp_path / "kubernetes" / "loadtest" / "text")
    wanted = ["--url=api.example.com:443", "--tls"] if flags else ["--url=gateway:8443", "--ca-cert=/inputs/ca.crt"]
    for name in ("loadtest-master", "loadtest-worker"):
        (container,) = find(objects, "Job", name)["spec"]["template"]["spec"]["containers"]
        assert container["args"][:2] == wanted
    egress = find(objects, "NetworkPolicy", "loadtest")["spec"]["egress"]
    assert ({"ports": [{"port": 443}]} in egress) == bool(flags)
    assert ("ca.crt" in find(objects, "ConfigMap", "loadtest-inputs").get("data", {})) != bool(flags)


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
        (("--models-url", "s3://bucket/models"), "it must begin with https:// or http://"),
        (("--models-url", "http://minio:90000/m.tar.gz"), "a port is a number from 1 to 65535"),
        (("--loadtest-url", "https://api.example.com"), "it must be host:port, such as api.example.com:443"),
        (("--loadtest-url", "api.example.com:0"), "it must be host:port, such as api.example.com:443"),
        (("--no-monitoring",), "--no-monitoring with --autoscaler hpa: the autoscaler needs monitoring's metrics"),
        (("--registry", "a b"), "--registry 'a b': not valid in an image name"),
        (("--triton-tag", "26.07"), "TRITON_TAG: seen 26.07; 26.08 or newer is needed"),
    ],
    ids=["repository", "base", "url", "port", "scheme", "port 0", "unmonitored", "registry", "tag"],
)
def test_what_is_wrong_is_one_line(again: tuple[Path, tuple[str, ...]], flags_: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        overlay.main(values_of("kubernetes", *again[1], *flags_))


def test_a_scale_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    path.write_text('{"chosen": {"targets": []}}')
    with pytest.raises(ValueError, match="not written by make simulate-scale"):
        ScaleChoice.load(path)
