"""The autoscaler of Triton's pods: targets and bounds as chosen by `make simulate-scale`.

Contract: `scale_of` reads `build/<model>/scale.json` of each model; `autoscaler_patch` gives the text of one file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepseek.spec import InputError
from deepseek.spec.metric_windows import SCALING
from serving.observe.recording_rules import Scope
from serving.repository.served_models import ServedModel

METRICS = {"queue": "triton_queue_compute_ratio", "rate": "triton_requests_per_second", "load": "triton_load"}
DEFAULT_CORES = 2
Autoscaler = Literal["hpa", "keda", "none"]


class ScaleTarget(BaseModel):
    """One metric of the autoscaler, and its target value per pod."""

    model_config = ConfigDict(frozen=True)

    metric: Literal["queue", "rate", "load"]
    """load: for several models, the sum of each one's requests/s divided by its target."""
    value: float = Field(gt=0)


class ScaleChoice(BaseModel):
    """The choice of `make simulate-scale` in `scale.json`; other keys of the file are ignored."""

    model_config = ConfigDict(frozen=True)

    targets: tuple[ScaleTarget, ...] = Field(min_length=1)
    min_replicas: int = Field(ge=1)
    max_replicas: int = Field(ge=1)
    cores: int | None = Field(None, ge=1)
    """Cores of the server that the service curve was measured on; None if unknown."""
    rates: dict[str, float] = {}
    """For several models: the target requests/s of a pod that serves only this model."""
    measured: tuple[str, str] | None = None
    """Target and precision of the server that the service curve was measured on; None if unknown."""

    @classmethod
    def load(cls, path: Path) -> "ScaleChoice | None":
        """Reads the file; None if no setting met the SLO. Raises InputError for another kind of file."""
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            measured = (found["target"], found["precision"]) if found.get("precision") else None
            return None if found["chosen"] is None else cls.model_validate({**found["chosen"], "measured": measured})
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: not written by make simulate-scale ({reason}); run that again") from None


# Not the customary target 1: batches grow with the load, and the recommender missed its SLO at 0.31. Two pods, since
# one may fail or be drained.
DEFAULT_SCALE = ScaleChoice(
    targets=(ScaleTarget(metric="queue", value=0.25),), min_replicas=2, max_replicas=10, cores=DEFAULT_CORES
)


def together(found: Mapping[str, ScaleChoice]) -> ScaleChoice:
    """Combines several models in one pod. Each was measured alone in a pod, so replicas add up.

    Targets in requests/s become one target for the total load; of the queue targets the lowest counts.
    """
    targets = [(name, target) for name, scale in found.items() for target in scale.targets]
    rates = {name: target.value for name, target in targets if target.metric == "rate"}
    queues = [target for _, target in targets if target.metric == "queue"]
    lowest = [min(queues, key=lambda target: target.value)] if queues else []
    return ScaleChoice(
        targets=(*([ScaleTarget(metric="load", value=1)] if rates else []), *lowest),
        min_replicas=sum(scale.min_replicas for scale in found.values()),
        max_replicas=sum(scale.max_replicas for scale in found.values()),
        cores=max((scale.cores for scale in found.values() if scale.cores), default=DEFAULT_CORES),
        rates=rates,
    )


def metric_group(scale: ScaleChoice, models: Sequence[ServedModel], scope: Scope) -> dict[str, Any]:
    """The recording rules of the metrics, one series per pod.

    Only these models count, as in the measurements: an engine behind one of them answers its requests once more.
    """

    def rate(counter: str, chosen: str) -> str:
        return f"rate(nv_inference_{counter}{chosen}[{SCALING}])"

    served = scope(f'model=~"{"|".join(model.name for model in models)}"')
    queue, compute, requests = (
        f"sum by (namespace, pod) ({rate(counter, served)})"
        for counter in ("queue_duration_us", "compute_infer_duration_us", "request_success")
    )
    # At least 1 us/s, so that an idle pod has the ratio 0: without a value the autoscaler would not scale down.
    rules = {METRICS["queue"]: f"{queue} / clamp_min({compute}, 1)", METRICS["rate"]: requests}
    if scale.rates:
        loads = (f"{rate('request_success', scope(model=name))} / {value:g}" for name, value in scale.rates.items())
        rules[METRICS["load"]] = f"sum by (namespace, pod) ({' or '.join(loads)})"
    recorded = [{"record": name, "expr": expr} for name, expr in rules.items()]
    return {"name": "triton-autoscaling", "interval": "5s", "rules": recorded}


def scale_of(models: Sequence[ServedModel], build: Path) -> tuple[ScaleChoice, list[str]]:
    """The autoscaler's settings for all models together, and notes for the user."""
    notes: list[str] = []
    chosen: dict[str, ScaleChoice] = {}
    missing: list[str] = []
    for model in models:
        path = build / model.name / "scale.json"
        if not path.is_file():
            missing.append(model.name)
        elif (scale := ScaleChoice.load(path)) is None:
            notes.append(
                f"{path}: no setting met the SLO, so the autoscaler has no target for it; `best` in it is the nearest"
            )
        elif scale.measured and scale.measured != (model.target, model.precision):
            notes.append(
                f"{path}: measured on {' '.join(scale.measured)}, but served is {model.target} {model.precision}, so "
                f"the autoscaler has its default target, with {scale.min_replicas} to {scale.max_replicas} pods as "
                "before; measure this one: make capacity simulate-scale"
            )
            chosen[model.name] = scale.model_copy(update={"targets": DEFAULT_SCALE.targets, "rates": {}})
        else:
            chosen[model.name] = scale
    if len(missing) == len(models):
        notes.append("the autoscaler has its default target; to choose one: make capacity simulate-scale")
    elif missing:
        names = ", ".join(missing)
        notes.append(f"the autoscaler ignores {names}; run make capacity simulate-scale for each of them too")
    if not chosen:
        return DEFAULT_SCALE, notes
    if len(models) == 1:
        (scale,) = chosen.values()
        return scale.model_copy(update={"cores": scale.cores or DEFAULT_CORES}), notes
    return together(chosen), notes


def autoscaler_patch(kind: Autoscaler, scale: ScaleChoice, namespace: str) -> str:
    """The patch with targets and bounds for an HPA or a KEDA ScaledObject."""
    if kind == "hpa":
        head = "apiVersion: autoscaling/v2\nkind: HorizontalPodAutoscaler\nmetadata: {name: triton}\nspec:\n"
        bounds = f"  minReplicas: {scale.min_replicas}\n  maxReplicas: {scale.max_replicas}\n  metrics:\n"
        return head + bounds + "".join(_hpa_metric(target) for target in scale.targets)
    head = "apiVersion: keda.sh/v1alpha1\nkind: ScaledObject\nmetadata: {name: triton}\nspec:\n"
    bounds = f"  minReplicaCount: {scale.min_replicas}\n  maxReplicaCount: {scale.max_replicas}\n"
    # After a minute without the metric, keep the current pods. Needs KEDA 2.18: 2.17 rounds a target below 1 down to 0,
    # and earlier versions lack `behavior`.
    kept = f"replicas: {scale.min_replicas}, behavior: currentReplicasIfHigher"
    fallback = f"  fallback: {{failureThreshold: 4, {kept}}}\n  triggers:\n"
    return head + bounds + fallback + "".join(_keda_trigger(target, namespace) for target in scale.targets)


def _hpa_metric(target: ScaleTarget) -> str:
    return f"""\
    - type: Pods
      pods:
        metric: {{name: {METRICS[target.metric]}}}
        target: {{type: AverageValue, averageValue: "{round(target.value * 1000)}m"}}
"""


def _keda_trigger(target: ScaleTarget, namespace: str) -> str:
    """The query sums over all pods, and AverageValue divides by their number."""
    return f"""\
    - type: prometheus
      name: {target.metric}
      metricType: AverageValue
      metadata:
        serverAddress: http://prometheus-operated.monitoring.svc:9090
        query: sum({METRICS[target.metric]}{{namespace="{namespace}"}})
        threshold: "{target.value:.3f}"
        ignoreNullValues: "false"   # no data is an error (fallback), not "no load"
"""
