"""The Kubernetes manifests: they build, fit the schemas, are "restricted", and hold the sums of the rest of the project."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import numpy as np
import pytest
import yaml

from loadtests import autoscaler
from serving import flags, stack
from serving.alerts import rules
from serving.kubernetes import CONFIG_MAP_BYTES, _copy_inputs
from serving.machine import TRITON_TAG
from serving.manifests import DEFAULT_SCALE, IMAGE_TAG, METRICS, PRE_STOP_S, Scale
from serving.served import served_models
from tests import custom_resources
from tests.conftest import run_module, write_add_one

KUBERNETES = "1.37"  # whose schemas are asked
Object = dict[str, Any]
FOLDERS = ("base", "overlays/cpu", "overlays/gpu", "overlays/kserve", "loadtest")
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "keda": ("--autoscaler", "keda", "--registry", "registry.example.com/shop", "--image-tag", "1.4.0"),
    "fetched": ("--models-url", "https://models.example.com/shop/models.tar.gz", "--load-balancer"),
    "bare": ("--autoscaler", "none", "--no-monitoring"),
}


@functools.cache
def build(folder: Path) -> tuple[Object, ...]:
    """What `kubectl kustomize` makes of a folder."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here: apt-get install kubectl")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nothing deprecated
    return tuple(yaml.safe_load_all(done.stdout))


def committed(name: str) -> tuple[Object, ...]:
    return build(Path("kubernetes") / name)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Overlays over a repository with one model, by what was asked for."""
    folder = tmp_path_factory.mktemp("generated")
    write_add_one(folder / "repository", instances=3)
    for name, more in VARIANTS.items():
        places = ("--repository", str(folder / "repository"), "--models", str(folder), "--build", str(folder))
        run = run_module("serving.kubernetes", *places, "--output", str(folder / name), *more)
        assert run.returncode == 0, run.stderr
    return {name: folder / name for name in VARIANTS}


@pytest.fixture(params=[*FOLDERS, *VARIANTS])
def objects(request: pytest.FixtureRequest, generated: dict[str, Path]) -> tuple[Object, ...]:
    """All that each committed folder and each generated overlay comes to."""
    return build(generated[request.param]) if request.param in VARIANTS else committed(request.param)


def find(objects: tuple[Object, ...], kind: str, name: str = "triton") -> Object:
    (found,) = (each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def pods(objects: tuple[Object, ...]) -> Iterator[Object]:
    """The spec of every pod."""
    for each in objects:
        if each["kind"] in ("Deployment", "Job"):
            yield each["spec"]["template"]["spec"]
        elif each["kind"] == "InferenceService":
            yield each["spec"]["predictor"]


def pod_of(objects: tuple[Object, ...], name: str = "triton") -> Object:
    return find(objects, "Deployment", name)["spec"]["template"]["spec"]


def container_of(objects: tuple[Object, ...], name: str = "triton") -> Object:
    (found,) = pod_of(objects, name)["containers"]
    return found


# ---- schemas and policy --------------------------------------------------------------------------


def test_every_object_fits_the_schema_of_its_kind(objects: tuple[Object, ...]) -> None:
    for each in objects:
        if (each["apiVersion"], each["kind"]) in custom_resources.KINDS:
            custom_resources.check(each)
        else:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)


def test_a_field_that_no_schema_has_is_refused() -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"prots": []}}
    with pytest.raises(kubernetes_validate.ValidationError, match="prots"):
        kubernetes_validate.validate(service, KUBERNETES, strict=True)
    monitor = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": {"name": "x", "namespace": "y"},
        "spec": {"selector": {"matchLabels": {}}, "endpoints": [], "path": "/"},
    }
    with pytest.raises(ValueError, match="path"):
        custom_resources.check(monitor)


def test_every_pod_is_restricted(objects: tuple[Object, ...]) -> None:
    """The list of https://kubernetes.io/docs/concepts/security/pod-security-standards/, and a read-only file system."""
    for pod in pods(objects):
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & pod.keys()
        shared = pod.get("securityContext", {})
        assert all(
            volume.keys() - {"name"} <= {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}
            for volume in pod["volumes"]
        )
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            own = {**shared, **container["securityContext"]}
            assert own["runAsNonRoot"] is True
            assert own["runAsUser"] > 0
            assert own["seccompProfile"] == {"type": "RuntimeDefault"}
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert not {"privileged", "procMount"} & own.keys()
            assert all("hostPort" not in port for port in container.get("ports", ()))


def test_no_pod_has_a_token_and_each_is_bounded_and_of_a_named_version(objects: tuple[Object, ...]) -> None:
    for pod in pods(objects):
        assert pod["automountServiceAccountToken"] is False
        assert all("sizeLimit" in volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume)
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert re.fullmatch(r"\S+:[\d.]+", container["image"])
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"] or (
                container["name"] == "gateway"
            )


def test_the_namespace_refuses_pods_that_are_not_restricted() -> None:
    labels = find(committed("base"), "Namespace", "deepseek")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_nothing_has_two_autoscalers(objects: tuple[Object, ...]) -> None:
    kinds = [each["kind"] for each in objects]
    assert kinds.count("HorizontalPodAutoscaler") + kinds.count("ScaledObject") <= 1


def test_only_the_gateway_reaches_tritons_ports_and_all_that_is_not_named_is_refused() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in committed("base") if each["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    triton = policies["triton"]
    assert "egress" not in triton
    callers = {port["port"]: rule["from"] for rule in triton["ingress"] for port in rule["ports"]}
    gateway = [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "gateway"}}}]
    assert callers[8000] == callers[8001] == gateway
    assert callers[8002][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}


def test_names_are_looked_up_at_the_clusters_dns_and_at_a_nodes_cache_of_it(objects: tuple[Object, ...]) -> None:
    rules = (rule for each in objects if each["kind"] == "NetworkPolicy" for rule in each["spec"].get("egress", ()))
    for rule in rules:
        if {"port": 53, "protocol": "UDP"} in rule.get("ports", ()):
            cluster, node = rule["to"]
            assert cluster["podSelector"] == {"matchLabels": {"k8s-app": "kube-dns"}}
            assert node == {"ipBlock": {"cidr": "169.254.20.10/32"}}


# ---- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["overlays/cpu", "overlays/gpu"])
def test_triton_is_started_as_the_stack_starts_it(name: str) -> None:
    container = container_of(committed(name))
    assert container["args"] == ["--exit-timeout-s", str(flags.GATEWAY_EXIT_TIMEOUT_S)]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    listens = flags.Endpoints()
    assert ports == {"http": listens.http_port, "grpc": listens.grpc_port, "metrics": listens.metrics_port}
    image = f"deepseek-server:{TRITON_TAG}" if name.endswith("gpu") else f"deepseek-server-cpu:{IMAGE_TAG}"
    assert container["image"] == image
    assert tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"] == IMAGE_TAG


def test_a_start_may_take_as_long_as_in_the_stack_and_a_stop_has_its_time() -> None:
    pod, container = pod_of(committed("base")), container_of(committed("base"))
    (start_s,) = map(int, re.findall(r"--start-period=(\d+)s", Path("docker/server-cpu.Dockerfile").read_text()))
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == start_s
    assert find(committed("base"), "Deployment")["spec"]["progressDeadlineSeconds"] > start_s
    pre_stop_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pre_stop_s == PRE_STOP_S
    assert pod["terminationGracePeriodSeconds"] == pre_stop_s + flags.GATEWAY_EXIT_TIMEOUT_S + stack.REST_S
    watch_s = re.search(r"WATCH_S:-(\d+)", Path("docker/gateway/gateway.sh").read_text())
    assert watch_s is not None
    assert 30 + int(watch_s[1]) + 3 == PRE_STOP_S


def test_the_committed_memory_is_the_sum_in_its_comment() -> None:
    limits = container_of(committed("base"))["resources"]["limits"]
    assert limits["memory"] == f"{stack.CPU_MEMORY // 2**20 + 64 + stack.SHM_MIB}Mi"
    gpu = container_of(committed("overlays/gpu"))["resources"]["limits"]
    assert gpu == {**limits, "memory": f"{stack.GPU_MEMORY // 2**20 + 64 + stack.SHM_MIB}Mi", "nvidia.com/gpu": "1"}


def test_kserve_runs_the_container_of_the_deployment() -> None:
    ours, theirs = container_of(committed("overlays/cpu")), find(committed("overlays/kserve"), "InferenceService")
    predictor = theirs["spec"]["predictor"]
    (container,) = predictor["containers"]
    for key in ("image", "args", "volumeMounts"):
        assert container[key] == ours[key]
    assert container["resources"]["limits"]["memory"] == ours["resources"]["limits"]["memory"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):  # Knative wants the port's number
        path = ours[probe]["httpGet"]["path"]
        assert container[probe] == {**ours[probe], "httpGet": {"path": path, "port": flags.Endpoints().http_port}}
    assert predictor["volumes"] == pod_of(committed("overlays/cpu"))["volumes"]
    assert predictor["timeout"] == flags.GATEWAY_EXIT_TIMEOUT_S
    assert 0 < predictor["canaryTrafficPercent"] < 100


def rules_of(direction: Object) -> autoscaler.Rules:
    assert direction["selectPolicy"] == "Max"
    policies = [
        autoscaler.Policy(kind=each["type"], value=each["value"], period_s=each["periodSeconds"])
        for each in direction["policies"]
    ]
    return autoscaler.Rules(stabilization_s=direction["stabilizationWindowSeconds"], policies=tuple(policies))


def test_both_autoscalers_behave_as_the_simulated_one(generated: dict[str, Path]) -> None:
    hpa = find(committed("overlays/cpu"), "HorizontalPodAutoscaler")["spec"]
    keda = find(build(generated["keda"]), "ScaledObject")["spec"]
    behaviors = [hpa["behavior"], keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]]
    for behavior in behaviors:
        assert (rules_of(behavior["scaleUp"]), rules_of(behavior["scaleDown"])) == (autoscaler.UP, autoscaler.DOWN)
    assert hpa["scaleTargetRef"] == keda["scaleTargetRef"]
    (target,) = DEFAULT_SCALE.targets
    assert hpa["metrics"][0]["pods"]["target"]["averageValue"] == f"{target.value * 1000:.0f}m"
    assert keda["triggers"][0]["metadata"]["threshold"] == f"{target.value:.3f}"
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (DEFAULT_SCALE.min_replicas, DEFAULT_SCALE.max_replicas)
    assert keda["pollingInterval"] == autoscaler.SYNC_S


def test_the_autoscalers_metrics_are_recorded() -> None:
    (group,) = find(committed("overlays/cpu"), "PrometheusRule", "triton-autoscaling")["spec"]["groups"]
    assert {rule["record"] for rule in group["rules"]} == set(METRICS.values())
    assert "clamp_min(" in group["rules"][0]["expr"]


def test_the_recorded_ratio_is_queue_over_compute_and_nought_when_idle(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool here: apt-get install prometheus")
    spec = find(committed("overlays/cpu"), "PrometheusRule", "triton-autoscaling")["spec"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(spec))
    series = [
        {"series": f'nv_inference_{name}_duration_us{{namespace="n",pod="{pod}",model="m"}}', "values": f"0+{step}x40"}
        for pod, name, step in (
            ("a", "queue", 300),
            ("a", "compute_infer", 600),
            ("b", "queue", 0),
            ("b", "compute_infer", 0),
        )
    ]
    expected = [
        {"labels": f'triton_queue_compute_ratio{{namespace="n",pod="{pod}"}}', "value": value}
        for pod, value in (("a", 0.5), ("b", 0))
    ]
    asked = {"expr": "triton_queue_compute_ratio", "eval_time": "2m", "exp_samples": expected}
    tests = [{"interval": "5s", "input_series": series, "promql_expr_test": [asked]}]
    (tmp_path / "test.yml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "5s", "tests": tests})
    )
    done = subprocess.run(["promtool", "test", "rules", "test.yml"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- what is generated ---------------------------------------------------------------------------


def test_the_overlay_has_the_sums_of_the_compose_stack(generated: dict[str, Path]) -> None:
    folder = generated["plain"].parent
    models = served_models(folder / "repository", folder)
    size = stack.sizes(models)
    objects = build(generated["plain"])
    pod, container = pod_of(objects), container_of(objects)
    assert container["resources"]["limits"]["memory"] == f"{size.memory_mib}Mi"
    (shm,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm == {"medium": "Memory", "sizeLimit": f"{size.shm_mib}Mi"}
    assert container["args"][1] == str(size.exit_timeout_s)
    assert pod["terminationGracePeriodSeconds"] == PRE_STOP_S + size.exit_timeout_s + stack.REST_S
    assert pod_of(objects, "gateway")["terminationGracePeriodSeconds"] == 10 + size.exit_timeout_s + stack.REST_S
    assert find(objects, "ConfigMap", "gateway-limits")["data"]["limits.conf"] == stack.limits(models)


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
    assert given["MODELS_SHA256"] == checksum
    assert given["MODELS_URL"] == "https://models.example.com/shop/models.tar.gz"
    (models,) = (volume for volume in pod_of(objects)["volumes"] if volume["name"] == "models")
    assert models.keys() == {"name", "emptyDir"}
    assert not any(each["kind"] == "PersistentVolumeClaim" for each in objects)
    assert find(objects, "Service", "gateway")["spec"]["ports"] == [
        {"name": "https", "port": 443, "targetPort": "https", "appProtocol": "https"}
    ]


def test_images_come_from_the_registry_and_the_autoscaler_is_the_one_asked_for(generated: dict[str, Path]) -> None:
    objects = build(generated["keda"])
    assert container_of(objects)["image"] == "registry.example.com/shop/deepseek-server-cpu:1.4.0"
    assert container_of(objects, "gateway")["image"] == "registry.example.com/shop/deepseek-gateway:1.4.0"
    kinds = {name: {each["kind"] for each in build(folder)} for name, folder in generated.items()}
    assert "HorizontalPodAutoscaler" not in kinds["keda"] | kinds["bare"]
    assert "ServiceMonitor" not in kinds["bare"]


@pytest.fixture
def again(generated: dict[str, Path], tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A build folder of its own, and the arguments for an overlay from it."""
    repository = generated["plain"].parent / "repository"
    return tmp_path, ("--repository", str(repository), "--models", str(tmp_path), "--build", str(tmp_path))


def test_what_the_simulation_chose_becomes_the_autoscalers(again: tuple[Path, tuple[str, ...]]) -> None:
    folder, arguments = again
    (folder / "add_one").mkdir()
    chosen = '{"targets": [{"metric": "queue", "value": 0.283}], "min_replicas": 3, "max_replicas": 7, "cores": 4}'
    (folder / "add_one" / "scale.json").write_text(f'{{"chosen": {chosen}}}')
    assert run_module("serving.kubernetes", *arguments).returncode == 0
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


def test_the_alerts_are_those_of_the_stack(generated: dict[str, Path]) -> None:
    folder = generated["plain"].parent
    rule = find(build(generated["plain"]), "PrometheusRule", "deepseek")
    assert rule["spec"] == rules(served_models(folder / "repository", folder))
    monitors = {name: find(build(generated["plain"]), "ServiceMonitor", name)["spec"] for name in ("triton", "gateway")}
    assert monitors["triton"]["jobLabel"] == "app.kubernetes.io/name"  # the jobs that the alerts ask for
    assert monitors["gateway"]["endpoints"][0]["relabelings"][0]["replacement"] == "gateway"


def test_a_load_test_has_the_models_spec_its_rate_and_inputs_that_fit(
    built: Path, tmp_path: Path, generated: dict[str, Path]
) -> None:
    shutil.copytree(built / "build" / "text", tmp_path / "text")
    places = ("--repository", str(built / "repository"), "--models", "tests/models", "--build", str(tmp_path))
    assert run_module("serving.kubernetes", *places, "--gateway", str(tmp_path)).returncode == 0
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
    added = re.findall(r" --(model|models|target) ", script[script.index("python -m loadtests.run") :].splitlines()[0])
    extra = [flag.removeprefix("--").split("=")[0] for flag in worker["args"] if flag not in master["args"]]
    assert extra == [*added, "worker-of"]
    assert master["args"] == worker["args"][: len(master["args"])]


@pytest.mark.parametrize(
    ("flags_", "message"),
    [
        (("--repository", "nosuch"), "nosuch: no model in it"),
        (("--base", "docs"), "--base docs: no base/kustomization.yaml in it"),
        (("--models-url", "s3://bucket/models"), "it must begin with https:// or http://"),
        (("--registry", "a b"), "--registry 'a b': no name of an image has that"),
    ],
    ids=["repository", "base", "url", "registry"],
)
def test_what_is_wrong_is_one_line(again: tuple[Path, tuple[str, ...]], flags_: tuple[str, ...], message: str) -> None:
    run = run_module("serving.kubernetes", *again[1], *flags_)
    assert run.returncode == 2
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_scale_file_that_is_none_is_one_line_and_one_without_a_choice_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    path.write_text('{"chosen": null}')
    assert Scale.load(path) is None
    path.write_text('{"chosen": {"targets": []}}')
    with pytest.raises(ValueError, match="not what make simulate-scale writes"):
        Scale.load(path)
