"""The Kubernetes manifests: they build, fit the schemas, are "restricted", and agree with the limits of the project."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from cli.main import values_of
from loadtests.scale import autoscaler
from serving.embedded import flags
from serving.kubernetes.autoscaling import DEFAULT_SCALE, METRICS
from serving.kubernetes.manifests import IMAGE_TAG, PRE_STOP_S
from serving.observe.alerts import START_MIN
from serving.stack.gateway_limits import GatewaySizes
from serving.stack.server_sizes import CPU_MEMORY, REST_S, SHM_MIB
from tests.manifests import (
    FOLDERS,
    VARIANTS,
    Object,
    build,
    check_schema,
    committed,
    container_of,
    find,
    pod_of,
    pods,
)
from tests.test_alerts import at_the_end, check

# What checkov finds and is left as it is, by check and resource, with the reason; anything else fails.
DEPLOYMENTS = ("Deployment.deepseek.triton", "Deployment.deepseek.gateway")
JOBS = ("Job.deepseek.loadtest-master", "Job.deepseek.loadtest-worker")
LOADER = "Pod.deepseek.models-loader"
LEFT: dict[str, tuple[tuple[str, ...], str]] = {
    "CKV_K8S_43": ((*DEPLOYMENTS, *JOBS, LOADER), "digests are your registry's: `images:` of your own"),
    "CKV_K8S_15": ((*DEPLOYMENTS, *JOBS, LOADER), "tags are not moved, so a node's image is the right one"),
    "CKV_K8S_8": ((LOADER,), "it only waits to be copied to, and no service sends to it"),
    "CKV_K8S_9": ((LOADER,), "it only waits to be copied to, and no service sends to it"),
    "CKV_K8S_11": (DEPLOYMENTS[:1], "beside a GPU a CPU limit only throttles; CPU overlays set one"),
    "CKV_K8S_35": (
        (DEPLOYMENTS[0], *JOBS),
        "only the init container has the store's authorization; load tests read their key from the environment",
    ),
}


@pytest.fixture(params=[*FOLDERS, *VARIANTS])
def objects(request: pytest.FixtureRequest, generated: dict[str, Path]) -> tuple[Object, ...]:
    """All objects of each committed folder and each generated overlay."""
    return build(generated[request.param]) if request.param in VARIANTS else committed(request.param)


# ---- schemas and policy --------------------------------------------------------------------------


def test_every_object_fits_the_schema_of_its_kind(objects: tuple[Object, ...]) -> None:
    for each in objects:
        if each["kind"] not in ("ServiceMonitor", "PrometheusRule", "ScaledObject", "InferenceService"):  # of operators
            check_schema(each)


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


@pytest.mark.slow
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
    left = {(check, resource) for check, (resources, _) in LEFT.items() for resource in resources}
    assert {(each["check_id"], each["resource"]) for each in found["results"]["failed_checks"]} == left


def test_every_pod_is_bounded_and_of_a_named_version(objects: tuple[Object, ...]) -> None:
    for pod in pods(objects):
        assert all("sizeLimit" in volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume)
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert re.fullmatch(r"\S+:[\d.]+(-[\d.]+)?", container["image"])
            limits, requests = (container["resources"][kind] for kind in ("limits", "requests"))
            assert limits["memory"] == requests["memory"] or container["name"] == "gateway"


def test_nothing_has_two_autoscalers(objects: tuple[Object, ...]) -> None:
    scalers = [each["spec"] for each in objects if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    assert len({scaler["scaleTargetRef"]["name"] for scaler in scalers}) == len(scalers)


def test_the_namespace_refuses_other_pods_and_only_the_gateway_reaches_tritons_ports() -> None:
    namespace = find(committed("base"), "Namespace", "deepseek")["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"
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


# ---- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image"), [("plain", f"deepseek-server-cpu:{IMAGE_TAG}"), ("gpu", f"deepseek-server:26.09-{IMAGE_TAG}")]
)
def test_triton_is_started_as_the_stack_starts_it(generated: dict[str, Path], name: str, image: str) -> None:
    objects = build(generated[name])
    container = container_of(objects)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    listens = values_of("serve")
    triton = {"http": listens.http_port, "grpc": listens.grpc_port, "metrics": listens.metrics_port}
    assert ports == {**triton, "openai": listens.openai_port}
    service = find(objects, "Service")["spec"]["ports"]
    assert {port["name"]: port["port"] for port in service} == ports
    assert container["image"] == image
    assert tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"] == IMAGE_TAG


def test_a_start_and_a_stop_have_their_time() -> None:
    pod, container = pod_of(committed("base")), container_of(committed("base"))
    assert find(committed("base"), "Deployment")["spec"]["progressDeadlineSeconds"] == 60 * START_MIN
    assert container["args"] == ["--exit-timeout-s", str(flags.GATEWAY_EXIT_TIMEOUT_S)]
    pre_stop_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pre_stop_s == PRE_STOP_S
    assert pod["terminationGracePeriodSeconds"] == pre_stop_s + flags.GATEWAY_EXIT_TIMEOUT_S + REST_S
    (watch_s,) = re.findall(r"WATCH_S:-(\d+)", Path("docker/gateway/gateway.sh").read_text())
    assert 30 + int(watch_s) + 3 == PRE_STOP_S


def test_the_committed_memory_is_the_sum_in_its_comment() -> None:
    limits = container_of(committed("base"))["resources"]["limits"]
    assert limits["memory"] == f"{CPU_MEMORY // 2**20 + 64 + SHM_MIB}Mi"


def test_the_gateways_committed_memory_is_that_of_its_limits() -> None:
    text = Path("kubernetes/base/limits.conf").read_text()
    (body,), (at_once,) = (
        re.findall(line, text) for line in (r"client_max_body_size (\d+)m;", r"limit_conn large_json (\d+);")
    )
    size = GatewaySizes(body_mib=int(body), at_once=int(at_once))
    assert container_of(committed("base"), "gateway")["resources"]["limits"]["memory"] == f"{size.memory_mib}Mi"
    (tmp,) = (volume for volume in pod_of(committed("base"), "gateway")["volumes"] if volume["name"] == "tmp")
    assert tmp["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{size.tmp_mib}Mi"}


def test_kserve_runs_the_container_of_the_deployment() -> None:
    ours, theirs = container_of(committed("base")), find(committed("overlays/kserve"), "InferenceService")
    predictor = theirs["spec"]["predictor"]
    (container,) = predictor["containers"]
    for key in ("image", "args", "volumeMounts"):
        assert container[key] == ours[key]
    assert container["resources"]["limits"]["memory"] == ours["resources"]["limits"]["memory"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):  # Knative wants the port's number
        path = ours[probe]["httpGet"]["path"]
        kept = {name: value for name, value in ours[probe].items() if name != "terminationGracePeriodSeconds"}
        assert container[probe] == {**kept, "httpGet": {"path": path, "port": values_of("serve").http_port}}
    assert predictor["volumes"] == pod_of(committed("base"))["volumes"]
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
    hpa = find(build(generated["plain"]), "HorizontalPodAutoscaler")["spec"]
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


def test_the_autoscalers_metrics_are_recorded_and_the_ratio_is_0_when_idle(
    generated: dict[str, Path], tmp_path: Path
) -> None:
    spec = find(build(generated["plain"]), "PrometheusRule", "deepseek")["spec"]
    (group,) = (group for group in spec["groups"] if group["name"] == "triton-autoscaling")
    assert {rule["record"] for rule in group["rules"]} == set(METRICS.values()) - {METRICS["load"]}  # of several models
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [group]}))
    labels = 'namespace="deepseek",pod="%s",model="%s"'
    steps = {("a", "add_one"): (3600, 7200, 600), ("b", "add_one"): (0, 0, 0), ("a", "add_one_engine"): (7200, 1, 600)}
    names = ("queue_duration_us", "compute_infer_duration_us", "request_success")
    series = {
        f"nv_inference_{name}{{{labels % place}}}": f"0+{step}"
        for place, each in steps.items()
        for name, step in zip(names, each, strict=True)
    }
    for metric, values in ((METRICS["queue"], (0.5, 0)), (METRICS["rate"], (10, 0))):  # the engine behind it: not twice
        expected = [
            {"labels": f'{metric}{{namespace="deepseek",pod="{pod}"}}', "value": value}
            for pod, value in zip("ab", values, strict=True)
        ]
        check(tmp_path, at_the_end("", series, 5, {"expr": metric, "exp_samples": expected}))
