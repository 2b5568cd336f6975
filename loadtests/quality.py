"""The task metric of the model that is served, as the export chain measured it.

Contract: reads what `make compare` (through the endpoint) and `make engine` left under `build/<model>/`. Only what
belongs to the version or precision that the server names counts; a run keeps it, so that it can be judged later.

Example:
    of_served("recommender", "ndcg@10", served, "grpc", "onnxruntime")  # {"ndcg@10": {"seen": .103, "baseline": ...}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepseek_client import ModelMetadata

from deepseek.spec import Target, build_dir


def of_served(
    model: str, metric: str | None, served: ModelMetadata, protocol: str, target: Target
) -> dict[str, dict[str, Any]]:
    """Metric -> seen, baseline (fp32 PyTorch) and source; empty where it was not measured for what is served."""
    precision = served.parameters.get("precision")
    if metric is None or precision is None:
        return {}
    found = _through_endpoint(model, metric, served, precision, protocol) or _of_engine(
        model, metric, precision, target
    )
    return {metric: found} if found else {}


def _through_endpoint(
    model: str, metric: str, served: ModelMetadata, precision: str, protocol: str
) -> dict[str, Any] | None:
    data = _read(build_dir(model) / "parity.json")
    about, measured = data.get("served", {}), data.get("metric", {})
    value = measured.get("served", {}).get(protocol, {}).get("value")
    if about.get("precision") != precision or about.get("version") not in served.versions or value is None:
        return None
    if measured.get("name") != metric:
        return None
    return {"seen": value, "baseline": measured["pytorch"], "source": f"make compare, over {protocol}"}


def _of_engine(model: str, metric: str, precision: str, target: Target) -> dict[str, Any] | None:
    data = _read(build_dir(model) / f"choice-{target}.json")
    seen = data.get("variants", {}).get(precision, {}).get("metrics", {}).get(metric)
    baseline = data.get("pytorch", {}).get("metrics", {}).get(metric)
    if seen is None or baseline is None:
        return None
    return {"seen": seen, "baseline": baseline, "source": f"make engine, {precision} on {target}"}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not made yet
        return {}
