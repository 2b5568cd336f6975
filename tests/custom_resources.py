"""The fields of custom resources that the manifests use, as their definitions have them; an unknown one is refused.

Written after the definitions of the Prometheus operator (monitoring.coreos.com/v1), KEDA (keda.sh/v1alpha1) and KServe
(serving.kserve.io/v1beta1); not the whole of them. What the kinds share with Kubernetes (containers, volumes, the
autoscaler's behavior) is left to Kubernetes' own schemas.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Strict(BaseModel):
    """Every field is known."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Strict):
    name: str
    namespace: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Selector(Strict):
    match_labels: dict[str, str]


class Relabeling(Strict):
    action: Literal["replace"]
    replacement: str
    target_label: str


class Endpoint(Strict):
    port: str
    interval: str = Field(pattern=r"^\d+s$")
    scrape_timeout: str = Field(pattern=r"^\d+s$")
    relabelings: list[Relabeling] = []


class ServiceMonitorSpec(Strict):
    selector: Selector
    endpoints: list[Endpoint]
    job_label: str | None = None


class Rule(Strict):
    expr: str
    record: str | None = None
    alert: str | None = None
    for_: str | None = Field(None, alias="for")
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    keep_firing_for: str | None = Field(None, alias="keep_firing_for")


class Group(Strict):
    name: str
    rules: list[Rule]
    interval: str | None = None


class PrometheusRuleSpec(Strict):
    groups: list[Group]


class ScaleTarget(Strict):
    api_version: Literal["apps/v1"]
    kind: Literal["Deployment"]
    name: str


class Fallback(Strict):
    failure_threshold: int
    replicas: int
    behavior: Literal["currentReplicasIfHigher"]  # of KEDA 2.17


class HpaConfig(Strict):
    behavior: dict[str, Any]


class Advanced(Strict):
    horizontal_pod_autoscaler_config: HpaConfig


class PrometheusTrigger(Strict):
    server_address: str
    query: str
    threshold: str
    ignore_null_values: Literal["true", "false"]


class Trigger(Strict):
    type: Literal["prometheus"]
    name: str
    metric_type: Literal["AverageValue", "Value"]
    metadata: PrometheusTrigger


class ScaledObjectSpec(Strict):
    scale_target_ref: ScaleTarget
    min_replica_count: int = Field(ge=1)
    max_replica_count: int
    polling_interval: int
    fallback: Fallback
    advanced: Advanced
    triggers: list[Trigger] = Field(min_length=1)


class Predictor(Strict):
    canary_traffic_percent: int = Field(ge=0, le=100)
    min_replicas: int
    max_replicas: int
    scale_metric: Literal["concurrency", "rps"]
    scale_target: int
    timeout: int
    service_account_name: str
    automount_service_account_token: bool
    containers: list[dict[str, Any]]
    volumes: list[dict[str, Any]]


class InferenceServiceSpec(Strict):
    predictor: Predictor


KINDS: dict[tuple[str, str], type[Strict]] = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): ServiceMonitorSpec,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PrometheusRuleSpec,
    ("keda.sh/v1alpha1", "ScaledObject"): ScaledObjectSpec,
    ("serving.kserve.io/v1beta1", "InferenceService"): InferenceServiceSpec,
}


def check(resource: dict[str, Any]) -> None:
    """Raises where a custom resource has a field that its definition, as far as it is written here, does not have."""
    assert set(resource) == {"apiVersion", "kind", "metadata", "spec"}
    Metadata.model_validate(resource["metadata"])
    KINDS[resource["apiVersion"], resource["kind"]].model_validate(resource["spec"])
