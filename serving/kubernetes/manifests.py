"""The texts of an overlay over `kubernetes/`: what depends on the models, with the arithmetic in comments.

Contract: each function gives the text of one file for an `Overlay`; `serving.kubernetes.overlay` writes them.
"""

import textwrap
from dataclasses import dataclass

from serving.kubernetes.autoscaling import Autoscaler, ScaleChoice
from serving.stack.gateway_limits import BODY_IN_MEMORY, GATEWAY_FILES_MIB, GATEWAY_MIB, GatewaySizes
from serving.stack.server_sizes import REST_S, ServerSizes

NAMESPACE = "deepseek"
IMAGE_TAG = "0.1.0"  # the project's version, as in kubernetes/
DNS_CACHE_S, WATCH_S, RELOAD_S = 30, 2, 3  # until a gateway no longer sends to a pod
PRE_STOP_S = DNS_CACHE_S + WATCH_S + RELOAD_S
GATEWAY_PRE_STOP_S = 10  # until no node sends it new connections
OUTSIDE_PRE_STOP_S = 40  # until a load balancer ejects the node: commonly 3 health checks, 10 s apart
DISK_MIB = 512  # for Triton without models, as in kubernetes/base


@dataclass(frozen=True, kw_only=True)
class Overlay:
    base: str
    """Path of `kubernetes/`, relative to the overlay."""
    on_gpu: bool
    sizes: ServerSizes
    gateway: GatewaySizes
    scale: ScaleChoice
    autoscaler: Autoscaler
    registry: str
    image_tag: str
    triton_tag: str
    models_url: str = ""
    models_port: int = 443
    models_sha256: str = ""
    models_mib: int = 0
    """Size of the unpacked repository and the archive together."""
    models_digest: str = ""
    """Digest of the served models: a change starts a rollout."""
    load_balancer: bool = False
    monitoring: bool = True

    @property
    def grace_s(self) -> int:
        return PRE_STOP_S + self.sizes.stop_s


def image(overlay: Overlay, name: str) -> str:
    tag = f"{overlay.triton_tag}-{overlay.image_tag}" if name == "deepseek-server" else overlay.image_tag
    place = f"{overlay.registry.rstrip('/')}/{name}" if overlay.registry else name
    return f'  - {{name: {name}, newName: {place}, newTag: "{tag}"}}'


def kustomization(overlay: Overlay) -> str:
    names = [
        "models-object-store" if overlay.models_url else "models-pvc",
        *([overlay.autoscaler, "gateway-hpa"] if overlay.autoscaler != "none" else []),
        *(["monitoring"] if overlay.monitoring else []),
        *(["load-balancer"] if overlay.load_balancer else []),
        *(["gpu"] if overlay.on_gpu else []),  # after the others: it renames the image of init containers too
        *(["openai"] if overlay.on_gpu and overlay.sizes.openai_mib else []),
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
    unused = (
        """\
  - target: {kind: ServiceMonitor, name: triton}
    patch: "- {op: remove, path: /spec/endpoints/1}"   # no model takes texts, so port 8003 does not listen
"""
        if overlay.monitoring and not overlay.sizes.openai_mib
        else ""
    )
    return f"""\
# Written by deepseek kubernetes from the models in the repository. Apply it with kubectl apply -k.
# Put your own changes into a kustomization on top of this one.
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
{unused}{egress}"""


def triton_patch(overlay: Overlay) -> str:
    """Triton's memory, shared memory, cores, grace period, and the source of the models."""
    size, url = overlay.sizes, overlay.models_url
    # On CPUs request = limit in whole cores, for all containers: the pod is "Guaranteed", and a kubelet with
    # cpuManagerPolicy: static gives it cores of its own. Without it the server still counts only the limit's cores.
    cores = "" if overlay.on_gpu else f'cpu: "{overlay.scale.cores}", '
    disk = f", ephemeral-storage: {overlay.models_mib + DISK_MIB}Mi" if url else ""
    beside = "" if overlay.on_gpu else f"{size.openai_mib} MiB for the /v1 routes, "
    fetch = f"""
      initContainers:
        - name: fetch
          env:
            - {{name: DEEPSEEK_MODELS_URL, value: "{url}"}}
            - {{name: DEEPSEEK_MODELS_SHA256, value: "{overlay.models_sha256}"}}
          resources:
            # the archive, and the unpacked models
            limits: {{ephemeral-storage: {overlay.models_mib + 64}Mi}}"""
    volume = f"\n        - {{name: models, emptyDir: {{sizeLimit: {overlay.models_mib}Mi}}}}" if url else ""
    return f"""\
apiVersion: apps/v1
kind: Deployment
metadata: {{name: triton}}
spec:
  template:
    metadata:
      annotations: {{deepseek/models: "{overlay.models_digest}"}}   # a change starts a rollout
    spec:
      # preStop {PRE_STOP_S} s, requests in flight on the /v1 routes {size.openai_drain_s} s,
      # requests in flight on Triton {size.exit_timeout_s} s, and {REST_S} s for the rest
      terminationGracePeriodSeconds: {overlay.grace_s}{fetch if url else ""}
      containers:
        - name: triton
          args: ["--exit-timeout-s", "{size.exit_timeout_s}"]
          resources:
            # {size.base_mib} MiB for the server, four times the weights of all instances ({size.weights_mib} MiB),
            # 32 times their largest batches for intermediate tensors ({size.work_mib} MiB),
            # {beside}and the shared memory ({size.shm_mib} MiB)
            requests: {{{cores}memory: {size.memory_mib}Mi{disk}}}
            limits: {{{cores}memory: {size.memory_mib}Mi{disk}}}
      volumes:
        - {{name: shm, emptyDir: {{medium: Memory, sizeLimit: {size.shm_mib}Mi}}}}{volume}
"""


def gateway_patch(overlay: Overlay) -> str:
    size = overlay.gateway
    answer_s = overlay.sizes.answer_s
    stop_s = OUTSIDE_PRE_STOP_S if overlay.load_balancer else GATEWAY_PRE_STOP_S
    return f"""\
apiVersion: apps/v1
kind: Deployment
metadata: {{name: gateway}}
spec:
  template:
    spec:
      # preStop {stop_s} s, then requests in flight {answer_s} s, then {REST_S} s for the rest
      terminationGracePeriodSeconds: {stop_s + answer_s + REST_S}
      containers:
        - name: gateway
          resources:
            # {GATEWAY_MIB} MiB for nginx and requests under 1 MB, /tmp,
            # and {BODY_IN_MEMORY} times its bodies, in case they are JSON
            limits: {{memory: {size.memory_mib}Mi}}
      volumes:
        # {GATEWAY_FILES_MIB} MiB, and {size.at_once} of the largest bodies ({size.body_mib:.2f} MiB) at a time;
        # requests that do not fit are refused
        - {{name: tmp, emptyDir: {{medium: Memory, sizeLimit: {size.tmp_mib}Mi}}}}
"""


def alerts(rules: str) -> str:
    """A Prometheus rule file as a PrometheusRule, which has the same content under `spec`."""
    return f"""\
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata: {{name: deepseek, labels: {{app.kubernetes.io/name: triton}}}}
spec:
{textwrap.indent(rules.rstrip(), "  ")}
"""
