"""The texts of an overlay over `kubernetes/`: what differs by model, with its sums in comments.

Contract: `Overlay` decides all; each function gives the text of one file. `serving.kubernetes` writes them.

Example:
    print(kustomization(overlay), triton_patch(overlay), autoscaler_patch(overlay))
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepseek.spec import InputError
from serving.flags import GATEWAY_EXIT_TIMEOUT_S
from serving.stack import BODY_IN_MEMORY, GATEWAY_FILES_MIB, GATEWAY_MIB, REST_S, GatewaySizes, Sizes

NAMESPACE = "deepseek"
IMAGE_TAG = "0.1.0"  # of the manifests as they stand: the project's version
DNS_CACHE_S, WATCH_S, RELOAD_S = 30, 2, 3  # until a gateway has taken a pod off its list
PRE_STOP_S = DNS_CACHE_S + WATCH_S + RELOAD_S
GATEWAY_PRE_STOP_S = 10  # until no node sends it new connections
OUTSIDE_PRE_STOP_S = 40  # until a load balancer's health check, commonly 3 times in 10 s, has left its node out
DISK_MIB = 512  # of Triton without models, as kubernetes/base has it
METRICS = {"queue": "triton_queue_compute_ratio", "rate": "triton_requests_per_second", "load": "triton_load"}
DEFAULT_CORES = 2
WORKER_RPS = 500  # of a load generator's process
GATEWAY_URL = "gateway:8443"  # within the namespace
Autoscaler = Literal["hpa", "keda", "none"]


class Target(BaseModel):
    """One metric of the autoscaler, and what it is to be kept at, a pod."""

    model_config = ConfigDict(frozen=True)

    metric: Literal["queue", "rate", "load"]
    """load: of several models, each one's requests/s over its target, added up."""
    value: float = Field(gt=0)


class Scale(BaseModel):
    """What `make simulate-scale` chose, of `scale.json`; its other keys are the simulation's own."""

    model_config = ConfigDict(frozen=True)

    targets: tuple[Target, ...] = Field(min_length=1)
    min_replicas: int = Field(ge=1)
    max_replicas: int = Field(ge=1)
    cores: int | None = Field(None, ge=1)
    """Of the server that the service curve was measured on; None where they are not known."""
    rates: dict[str, float] = {}
    """Of several models, the requests/s that a pod may have of each where it has none of the others."""
    measured: tuple[str, str] | None = None
    """Target and precision of the server that the service curve was measured on; None where they are not known."""

    @classmethod
    def load(cls, path: Path) -> Scale | None:
        """Reads it; None where nothing held; InputError in one line where it is no such file."""
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            measured = (found["target"], found["precision"]) if found.get("precision") else None
            return None if found["chosen"] is None else cls.model_validate({**found["chosen"], "measured": measured})
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: not what make simulate-scale writes ({reason}); make it anew") from None


DEFAULT_SCALE = Scale(
    targets=(Target(metric="queue", value=0.25),), min_replicas=2, max_replicas=10, cores=DEFAULT_CORES
)  # as components/hpa has it


def together(found: Mapping[str, Scale]) -> Scale:
    """Of several models in one pod, by name: each was measured with the pod to itself, so the pods add up.

    Of targets for requests/s becomes one for the load that all models together are, of the others the lowest.
    """
    targets = [(name, target) for name, scale in found.items() for target in scale.targets]
    rates = {name: target.value for name, target in targets if target.metric == "rate"}
    queues = [target for _, target in targets if target.metric == "queue"]
    lowest = [min(queues, key=lambda target: target.value)] if queues else []
    return Scale(
        targets=(*([Target(metric="load", value=1)] if rates else []), *lowest),
        min_replicas=sum(scale.min_replicas for scale in found.values()),
        max_replicas=sum(scale.max_replicas for scale in found.values()),
        cores=max((scale.cores for scale in found.values() if scale.cores), default=DEFAULT_CORES),
        rates=rates,
    )


def load_group(scale: Scale) -> dict[str, Any]:
    """The recording rule of the load, for each pod, as components/monitoring has those of the other metrics."""
    shares = (
        f'rate(nv_inference_request_success{{model="{name}"}}[1m]) / {value:g}' for name, value in scale.rates.items()
    )
    expr = f"sum by (namespace, pod) ({' or '.join(shares)})"
    return {"name": "triton-load", "interval": "5s", "rules": [{"record": METRICS["load"], "expr": expr}]}


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """What decides how the manifests read."""

    base: str
    """The folder `kubernetes/`, from the overlay's."""
    on_gpu: bool
    sizes: Sizes
    gateway: GatewaySizes
    scale: Scale
    autoscaler: Autoscaler
    registry: str
    image_tag: str
    triton_tag: str
    models_url: str = ""
    models_port: int = 443
    models_sha256: str = ""
    models_mib: int = 0
    """Of the repository, unpacked, and of the archive."""
    models_digest: str = ""
    """Of what is served: other models are other pods."""
    load_balancer: bool = False
    monitoring: bool = True

    @property
    def grace_s(self) -> int:
        """Of Triton."""
        return PRE_STOP_S + self.sizes.exit_timeout_s + REST_S


def image(overlay: Overlay, name: str) -> str:
    """A line of `images`."""
    tag = overlay.triton_tag if name == "deepseek-server" else overlay.image_tag
    place = f"{overlay.registry.rstrip('/')}/{name}" if overlay.registry else name
    return f'  - {{name: {name}, newName: {place}, newTag: "{tag}"}}'


def kustomization(overlay: Overlay) -> str:
    """The overlay's own file."""
    names = [
        "models-object-store" if overlay.models_url else "models-pvc",
        *([overlay.autoscaler, "gateway-hpa"] if overlay.autoscaler != "none" else []),
        *(["monitoring"] if overlay.monitoring else []),
        *(["load-balancer"] if overlay.load_balancer else []),
        "gpu" if overlay.on_gpu else "cpu",  # last: it renames the image of init containers, too
    ]
    components = "\n".join(f"  - {overlay.base}/components/{name}" for name in names)
    images = "\n".join(image(overlay, name) for name in ("deepseek-server-cpu", "deepseek-server", "deepseek-gateway"))
    patches = ["triton.yaml", "gateway.yaml", *(["autoscaler.yaml"] if overlay.autoscaler != "none" else [])]
    egress = (
        f"""\
  - target: {{kind: NetworkPolicy, name: triton-fetches-models}}
    patch: "- {{op: replace, path: /spec/egress/0/ports/0/port, value: {overlay.models_port}}}"
"""
        if overlay.models_url
        else ""
    )
    return f"""\
# Written by python -m serving.kubernetes (make kubernetes) from the models in the repository. Apply it with
# kubectl apply -k; what is yours goes into a kustomization of your own over this one.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: {NAMESPACE}
resources:
  - {overlay.base}/base{chr(10) + "  - alerts.yaml" if overlay.monitoring else ""}
components:
{components}
configMapGenerator:
  - name: gateway-limits
    namespace: {NAMESPACE}
    behavior: replace
    files: [limits.conf]
generatorOptions: {{disableNameSuffixHash: true}}
images:
{images}
patches:
{chr(10).join(f"  - path: {patch}" for patch in patches)}
{egress}"""


def triton_patch(overlay: Overlay) -> str:
    """Memory, shared memory, cores, times, and where the models come from."""
    size, url = overlay.sizes, overlay.models_url
    cores = "" if overlay.on_gpu else f'cpu: "{overlay.scale.cores}", '
    disk = f", ephemeral-storage: {overlay.models_mib + DISK_MIB}Mi" if url else ""
    fetch = f"""
      initContainers:
        - name: fetch
          env:
            - {{name: MODELS_URL, value: "{url}"}}
            - {{name: MODELS_SHA256, value: "{overlay.models_sha256}"}}
          resources:
            # the archive, and what comes out of it
            limits: {{ephemeral-storage: {overlay.models_mib + 64}Mi}}"""
    volume = f"\n        - {{name: models, emptyDir: {{sizeLimit: {overlay.models_mib}Mi}}}}" if url else ""
    return f"""\
apiVersion: apps/v1
kind: Deployment
metadata: {{name: triton}}
spec:
  template:
    metadata:
      annotations: {{deepseek/models: "{overlay.models_digest}"}}   # other models: a rollout
    spec:
      # preStop {PRE_STOP_S} s, then requests in flight {size.exit_timeout_s} s, then {REST_S} s for what is left
      terminationGracePeriodSeconds: {overlay.grace_s}{fetch if url else ""}
      containers:
        - name: triton
          args: ["--exit-timeout-s", "{size.exit_timeout_s}"]
          resources:
            # {size.base_mib} MiB for the server, four times the weights of all instances ({size.weights_mib} MiB),
            # 32 times their largest batches for what is computed in between ({size.work_mib} MiB),
            # and the shared memory ({size.shm_mib} MiB)
            requests: {{{cores}memory: {size.memory_mib}Mi{disk}}}
            limits: {{{cores}memory: {size.memory_mib}Mi{disk}}}
      volumes:
        - {{name: shm, emptyDir: {{medium: Memory, sizeLimit: {size.shm_mib}Mi}}}}{volume}
"""


def gateway_patch(overlay: Overlay) -> str:
    """Time for the longest answer, room for the largest bodies."""
    size = overlay.gateway
    answer_s = max(GATEWAY_EXIT_TIMEOUT_S, overlay.sizes.exit_timeout_s)
    stop_s = OUTSIDE_PRE_STOP_S if overlay.load_balancer else GATEWAY_PRE_STOP_S
    return f"""\
apiVersion: apps/v1
kind: Deployment
metadata: {{name: gateway}}
spec:
  template:
    spec:
      # preStop {stop_s} s, then requests in flight {answer_s} s, then {REST_S} s for what is left
      terminationGracePeriodSeconds: {stop_s + answer_s + REST_S}
      containers:
        - name: gateway
          resources:
            # {GATEWAY_MIB} MiB for nginx and for requests under 1 MB, /tmp,
            # and {BODY_IN_MEMORY} times its bodies, while they are JSON
            limits: {{memory: {size.memory_mib}Mi}}
      volumes:
        # {GATEWAY_FILES_MIB} MiB, and {size.at_once} of the largest bodies ({size.body_mib:.2f} MiB) at a time;
        # what finds no room is refused
        - {{name: tmp, emptyDir: {{medium: Memory, sizeLimit: {size.tmp_mib}Mi}}}}
"""


def autoscaler_patch(overlay: Overlay) -> str:
    """Target and bounds, of one kind of autoscaler or the other."""
    scale = overlay.scale
    if overlay.autoscaler == "hpa":
        head = "apiVersion: autoscaling/v2\nkind: HorizontalPodAutoscaler\nmetadata: {name: triton}\nspec:\n"
        bounds = f"  minReplicas: {scale.min_replicas}\n  maxReplicas: {scale.max_replicas}\n  metrics:\n"
        return head + bounds + "".join(_hpa_metric(target) for target in scale.targets)
    head = "apiVersion: keda.sh/v1alpha1\nkind: ScaledObject\nmetadata: {name: triton}\nspec:\n"
    bounds = f"  minReplicaCount: {scale.min_replicas}\n  maxReplicaCount: {scale.max_replicas}\n"
    kept = f"replicas: {scale.min_replicas}, behavior: currentReplicasIfHigher"
    fallback = f"  fallback: {{failureThreshold: 4, {kept}}}\n  triggers:\n"
    return head + bounds + fallback + "".join(_keda_trigger(target) for target in scale.targets)


def _hpa_metric(target: Target) -> str:
    return f"""\
    - type: Pods
      pods:
        metric: {{name: {METRICS[target.metric]}}}
        target: {{type: AverageValue, averageValue: {quantity(target.value)}}}
"""


def _keda_trigger(target: Target) -> str:
    return f"""\
    - type: prometheus
      name: {target.metric}
      metricType: AverageValue
      metadata:
        serverAddress: http://prometheus-operated.monitoring.svc:9090
        query: sum({METRICS[target.metric]}{{namespace="{NAMESPACE}"}})
        threshold: "{target.value:.3f}"
        ignoreNullValues: "false"
"""


def quantity(value: float) -> str:
    """A number as Kubernetes writes it: in thousandths, the finest that the autoscaler counts in."""
    return f'"{round(value * 1000)}m"'


def alerts(rules: str) -> str:
    """Prometheus' rule file as a resource of its operator, whose `spec` reads as such a file does."""
    return f"""\
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata: {{name: deepseek, labels: {{app.kubernetes.io/name: triton}}}}
spec:
{textwrap.indent(rules.rstrip(), "  ")}
"""


@dataclass(frozen=True, kw_only=True)
class LoadTest:
    """What decides a model's load test."""

    model: str
    target: str
    rate_rps: float
    url: str
    own_authority: bool
    """The gateway's certificate is signed by `ca.crt`, not by an authority that every system trusts."""

    @property
    def workers(self) -> int:
        """One process sends some hundred requests/s without being late."""
        return max(2, math.ceil(self.rate_rps / WORKER_RPS))


def loadtest_kustomization(overlay: Overlay, test: LoadTest, base: str) -> str:
    """Of the Jobs: the model's name, rate, files."""
    trust = "--ca-cert=/inputs/ca.crt" if test.own_authority else "--tls"
    egress = (
        f"""\
  - target: {{kind: NetworkPolicy, name: loadtest}}
    patch: "- {{op: add, path: /spec/egress/-, value: {{ports: [{{port: {test.url.rpartition(":")[2]}}}]}}}}"
"""
        if test.url != GATEWAY_URL
        else ""
    )
    files = "inputs.npz, ca.crt" if test.own_authority else "inputs.npz"
    return f"""\
# Written by python -m serving.kubernetes (make kubernetes): the load test of {test.model}, through the gateway.
# kubectl apply --server-side -k: otherwise kubectl keeps the inputs in an annotation, too, which holds 256 KiB.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: {NAMESPACE}
resources: [{base}/loadtest]
configMapGenerator:
  - name: loadtest
    namespace: {NAMESPACE}
    behavior: merge
    literals: [MODEL={test.model}, TARGET={test.target}, RATE={test.rate_rps:g}, WORKERS={test.workers}]
  - {{name: loadtest-model, namespace: {NAMESPACE}, behavior: replace, files: [deploy.toml]}}
  - {{name: loadtest-inputs, namespace: {NAMESPACE}, behavior: replace, files: [{files}]}}
generatorOptions: {{disableNameSuffixHash: true}}
images:
{image(overlay, "deepseek-loadtests")}
patches:
  - target: {{kind: Job}}
    patch: |
      - {{op: replace, path: /spec/template/spec/containers/0/volumeMounts/2/mountPath, value: /models/{test.model}}}
      - {{op: replace, path: /spec/template/spec/containers/0/args/0, value: "--url={test.url}"}}
      - {{op: replace, path: /spec/template/spec/containers/0/args/1, value: {trust}}}
  # {test.rate_rps:g} requests/s, {WORKER_RPS} of a worker
  - target: {{kind: Job, name: loadtest-worker}}
    patch: |
      - {{op: replace, path: /spec/parallelism, value: {test.workers}}}
      - {{op: replace, path: /spec/completions, value: {test.workers}}}
{egress}"""
