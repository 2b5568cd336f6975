"""The Kubernetes manifests: they build, fit the schemas, are "restricted", and agree with the limits of the project."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from cli.main import values_of
from deepseek.spec.triton_release import TRITON_TAG
from loadtests.scale import autoscaler
from serving.embedded import flags
from serving.kubernetes.autoscaling import DEFAULT_SCALE, METRICS
from serving.kubernetes.manifests import IMAGE_TAG, PRE_STOP_S
from serving.observe.alerts import START_MIN
from serving.stack.gateway_limits import GatewaySizes
from serving.stack.server_sizes import CPU_MEMORY, GPU_MEMORY, REST_S, SHM_MIB
from tests.manifests import FOLDERS, KUBERNETES, VARIANTS, Object, build, committed, container_of, find, pod_of, pods

# What checkov finds and is left as it is, by check and resource, with the reason; anything else fails.
DEPLOYMENTS = ("Deployment.deepseek.triton", "Deployment.deepseek.gateway")
JOBS = ("Job.deepseek.loadtest-master", "Job.deepseek.loadtest-worker")
LOADER = "Pod.deepseek.models-loader"
LEFT: dict[tuple[str, str], str] = {
    **{
        ("CKV_K8S_43", each): "digests are your registry's: `images:` of your own"
        for each in (*DEPLOYMENTS, *JOBS, LOADER)
    },
    **{("CKV_K8S_15", each): "a tag is not moved: a node's image is it" for each in (*DEPLOYMENTS, *JOBS, LOADER)},
    **{
        (check, LOADER): "it only waits to be copied to, and is nobody's service"
        for check in ("CKV_K8S_8", "CKV_K8S_9")
    },
    ("CKV_K8S_11", DEPLOYMENTS[0]): "without components/cpu, which sets it: beside a GPU a limit of CPU only throttles",
    ("CKV_K8S_35", DEPLOYMENTS[0]): "the store's authorization is the init container's alone, which has ended by then",
    **{("CKV_K8S_35", each): "the key is one for the load test, which reads it from its environment" for each in JOBS},
}


@pytest.fixture(params=[*FOLDERS, *VARIANTS])
def objects(request: pytest.FixtureRequest, generated: dict[str, Path]) -> tuple[Object, ...]:
    """All objects of each committed folder and each generated overlay."""
    return build(generated[request.param]) if request.param in VARIANTS else committed(request.param)


# ---- schemas and policy --------------------------------------------------------------------------


def test_every_object_fits_the_schema_of_its_kind(objects: tuple[Object, ...]) -> None:
    for each in objects:
        if each["kind"] not in ("ServiceMonitor", "PrometheusRule", "ScaledObject", "InferenceService"):  # of operators
            kubernetes_validate.validate(each, KUBERNETES, strict=True)


def test_every_pod_is_restricted(objects: tuple[Object, ...]) -> None:
    """The rules of https://kubernetes.io/docs/concepts/security/pod-security-standards/, and a read-only file system."""
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


def test_every_object_keeps_checkovs_policies_but_those_that_are_named(
    generated: dict[str, Path], tmp_path: Path
) -> None:
    checkov = shutil.which("checkov", path=f"{sys.prefix}/checkov/bin:{os.environ['PATH']}")
    if checkov is None:
        pytest.skip(f"no checkov here: make {sys.prefix}/checkov/.ready")
    for name in FOLDERS:
        (tmp_path / f"{name.replace('/', '-')}.yaml").write_text(yaml.safe_dump_all(committed(name)))
    for name, folder in generated.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(build(folder)))
    flags = ("--framework", "kubernetes", "--skip-download", "--soft-fail", "--compact", "--quiet", "--output", "json")
    done = subprocess.run([checkov, "--directory", str(tmp_path), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["summary"]["parsing_errors"] == found["summary"]["skipped"] == 0
    assert found["summary"]["passed"] > 1000
    assert {(each["check_id"], each["resource"]) for each in found["results"]["failed_checks"]} == LEFT.keys()


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
    scaled = [
        each["spec"]["scaleTargetRef"]["name"]
        for each in objects
        if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")
    ]
    assert len(scaled) == len(set(scaled))


def test_only_the_gateway_reaches_tritons_ports_and_all_that_is_not_named_is_refused() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in committed("base") if each["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    triton = policies["triton"]
    assert "egress" not in triton
    callers = {port["port"]: rule["from"] for rule in triton["ingress"] for port in rule["ports"]}
    gateway = [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "gateway"}}}]
    assert callers[8000] == callers[8001] == gateway
    assert policies["gateway"]["egress"][0]["ports"] == triton["ingress"][0]["ports"]
    assert triton["ingress"][1]["ports"] == [{"port": 8002}, {"port": 8003}]
    assert triton["ingress"][0]["ports"][2:] == [{"port": 8003}]
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
    triton = {"http": listens.http_port, "grpc": listens.grpc_port, "metrics": listens.metrics_port}
    assert ports == {**triton, "openai": values_of("serve").openai_port}
    service = find(committed(name), "Service", "triton")["spec"]["ports"]
    assert {port["name"]: port["port"] for port in service} == ports
    image = f"deepseek-server:{TRITON_TAG}" if name.endswith("gpu") else f"deepseek-server-cpu:{IMAGE_TAG}"
    assert container["image"] == image
    assert tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"] == IMAGE_TAG


def test_a_start_and_a_stop_have_their_time() -> None:
    pod, container = pod_of(committed("base")), container_of(committed("base"))
    assert find(committed("base"), "Deployment")["spec"]["progressDeadlineSeconds"] == 60 * START_MIN
    pre_stop_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pre_stop_s == PRE_STOP_S
    assert pod["terminationGracePeriodSeconds"] == pre_stop_s + flags.GATEWAY_EXIT_TIMEOUT_S + REST_S
    watch_s = re.search(r"WATCH_S:-(\d+)", Path("docker/gateway/gateway.sh").read_text())
    assert watch_s is not None
    assert 30 + int(watch_s[1]) + 3 == PRE_STOP_S


def test_the_committed_memory_is_the_sum_in_its_comment() -> None:
    limits = container_of(committed("base"))["resources"]["limits"]
    assert limits["memory"] == f"{CPU_MEMORY // 2**20 + 64 + SHM_MIB}Mi"
    gpu = container_of(committed("overlays/gpu"))["resources"]["limits"]
    assert gpu == {**limits, "memory": f"{GPU_MEMORY // 2**20 + 64 + SHM_MIB}Mi", "nvidia.com/gpu": "1"}


def test_the_gateways_committed_memory_is_that_of_its_limits() -> None:
    body = re.search(r"client_max_body_size (\d+)m;", Path("kubernetes/base/limits.conf").read_text())
    at_once = re.search(r"limit_conn large_json (\d+);", Path("kubernetes/base/limits.conf").read_text())
    assert body is not None
    assert at_once is not None
    size = GatewaySizes(body_mib=int(body[1]), at_once=int(at_once[1]))
    assert container_of(committed("base"), "gateway")["resources"]["limits"]["memory"] == f"{size.memory_mib}Mi"
    (tmp,) = (volume for volume in pod_of(committed("base"), "gateway")["volumes"] if volume["name"] == "tmp")
    assert tmp["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{size.tmp_mib}Mi"}


def test_the_logs_that_a_kubelet_keeps_have_room_on_the_disk(generated: dict[str, Path]) -> None:
    log_mib = 5 * (50 + math.ceil(3000 * 500 * 10 / 2**20))  # files, of which one grows for 10 s before it is looked at
    for objects in (*map(committed, ("overlays/cpu", "overlays/gpu")), build(generated["fetched"])):
        for name in ("triton", "gateway"):
            volumes = (volume.get("emptyDir", {}) for volume in pod_of(objects, name)["volumes"])
            on_disk = [mib(each["sizeLimit"]) for each in volumes if each and each.get("medium") != "Memory"]
            assert mib(container_of(objects, name)["resources"]["limits"]["ephemeral-storage"]) >= log_mib + sum(
                on_disk
            )


def mib(size: str) -> int:
    """MiB of a quantity in Mi or Gi."""
    return int(size[:-2]) * {"Mi": 1, "Gi": 1024}[size[-2:]]


def test_kserve_runs_the_container_of_the_deployment() -> None:
    ours, theirs = container_of(committed("overlays/cpu")), find(committed("overlays/kserve"), "InferenceService")
    predictor = theirs["spec"]["predictor"]
    (container,) = predictor["containers"]
    for key in ("image", "args", "volumeMounts"):
        assert container[key] == ours[key]
    assert container["resources"]["limits"]["memory"] == ours["resources"]["limits"]["memory"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):  # Knative wants the port's number
        path = ours[probe]["httpGet"]["path"]
        kept = {name: value for name, value in ours[probe].items() if name != "terminationGracePeriodSeconds"}
        assert container[probe] == {**kept, "httpGet": {"path": path, "port": flags.Endpoints().http_port}}
    assert predictor["volumes"] == pod_of(committed("overlays/cpu"))["volumes"]
    assert predictor["timeout"] == flags.GATEWAY_EXIT_TIMEOUT_S
    assert 0 < predictor["canaryTrafficPercent"] < 100


def rules_of(direction: Object) -> autoscaler.ScalingRules:
    assert direction["selectPolicy"] == "Max"
    policies = [
        autoscaler.ScalingPolicy(kind=each["type"], value=each["value"], period_s=each["periodSeconds"])
        for each in direction["policies"]
    ]
    return autoscaler.ScalingRules(stabilization_s=direction["stabilizationWindowSeconds"], policies=tuple(policies))


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
    assert {rule["record"] for rule in group["rules"]} == set(METRICS.values()) - {METRICS["load"]}  # make kubernetes'
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
