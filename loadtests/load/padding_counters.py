"""Tokens of texts that a server ran during a run, without and with padding, from the server's metrics.

Contract: a server without such metrics, or one that does not answer, gives {}. Example:
`difference(before, fetch("127.0.0.1:8002", "minilm"))` is `{"text_tokens": 4000, "text_padded_tokens": 4200}`.
"""

import re
import urllib.request
from collections import Counter
from http.client import HTTPException

COUNTER = re.compile(r'^onnxruntime_(text_(?:padded_)?tokens){.*\bmodel="([^"]*)".*} (\S+)$', re.MULTILINE)
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not reach the server's host


def fetch(place: str | None, model: str) -> Counter[str]:
    """The model's counters since the server started, over all versions; `place` is host:port of the metrics."""
    found = Counter[str]()
    try:
        if place:
            with _OPENER.open(f"http://{place}/metrics", timeout=1) as answer:
                for name, its_model, value in COUNTER.findall(answer.read().decode()):
                    found[name] += int(float(value)) if its_model == model else 0
    except (OSError, ValueError, HTTPException):
        return Counter()
    return found


def difference(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """The tokens between the two; {} if either is unknown, if no text ran, or if the server was restarted."""
    added = {name: after[name] - before[name] for name in after}
    return added if before and min(added.values(), default=0) > 0 else {}
