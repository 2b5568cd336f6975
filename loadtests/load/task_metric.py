"""The task metric of the served model, as the build measured it.

Contract: reads the results of `make parity` (measured through the endpoint) and `make engine` under `build/<model>/`.
Only results of the served version or precision count. A run stores them, so that it can be judged later.
"""

import json
from pathlib import Path
from typing import Any

from deepseek_client import ModelMetadata

from deepseek.spec import Target, build_dir


def of_served(
    model: str, metric: str | None, served: ModelMetadata, protocol: str, target: Target
) -> dict[str, dict[str, Any]]:
    """Metric -> seen, baseline (fp32 PyTorch) and source; empty if it was not measured for the served model."""
    precision = served.parameters.get("precision")
    if metric is None or precision is None:
        return {}
    parity, choice = (_read(build_dir(model) / f"{name}.json") for name in ("parity", f"choice-{target}"))
    about, measured = parity.get("served", {}), parity.get("metric", {})
    seen, baseline, source = None, measured.get("pytorch"), f"make parity, over {protocol}"
    if measured.get("name") == metric and about["precision"] == precision and about["version"] in served.versions:
        seen = measured.get("served", {}).get(protocol, {}).get("value")
    if seen is None and precision in choice.get("variants", {}):
        both = choice["variants"][precision], choice["pytorch"]
        seen, baseline = (each.get("metrics", {}).get(metric) for each in both)
        source = f"make engine, {precision} on {target}"
    return {} if seen is None or baseline is None else {metric: {"seen": seen, "baseline": baseline, "source": source}}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not made yet
        return {}
