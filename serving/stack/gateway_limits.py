"""The gateway's limits and memory, computed from the models that it serves.

Contract: `limits` is the content of `limits.conf`, which the gateway reloads; `gateway_sizes` is what its container
needs for these limits. Comments in the files show the arithmetic.
"""

import math
from dataclasses import dataclass

from deepseek.spec import histogram_bounds_ms
from serving.repository.served_models import (
    HEADER_BYTES,
    JSON_BYTES,
    LATENESS,
    MIB,
    ServedModel,
    bound_s,
    has_openai_routes,
)

LEAST_RATE_RPS = 100
RATE_HEADROOM = 2  # a key may send this many times the SLOs' rates
GATEWAY_MIB = 512  # nginx, and requests under 1 MB, which stay in memory
GATEWAY_FILES_MIB = 16  # what gateway.sh writes
LEAST_LARGE, MOST_LARGE = 4, 512  # concurrent largest bodies: as many as fit into LARGE_BYTES
LARGE_BYTES = 128 * MIB
BODY_IN_MEMORY = 5  # times a JSON body: up to three copies, 35 bytes per number; measured with nginx 1.26, njs 0.8

OPENAI = """\
# a model takes texts, so the server has OpenAI's routes
js_var $openai 1;
"""


def limits(models: list[ServedModel]) -> str:
    """nginx's limits, for the model that needs most."""
    body = max(models, key=lambda model: model.body_bytes)
    late = max(models, key=lambda model: model.timeout_s)
    rate = max(LEAST_RATE_RPS, math.ceil(RATE_HEADROOM * sum(model.rate_rps for model in models)))
    headroom = f"{RATE_HEADROOM} x the sum of the SLOs' rates, at least {LEAST_RATE_RPS}"
    bounds_ms = [histogram_bounds_ms(model.p99_ms, model.latency_limits_ms.values()) for model in models]
    bounds = sorted({bound_s(bound) for each in bounds_ms for bound in each}, key=float)
    large = gateway_sizes(models).at_once
    return f"""\
# Written by deepseek stack for the models in the repository. The gateway reloads it when it changes.
# {body.name}: {_largest(body)} + {HEADER_BYTES} bytes
client_max_body_size {body.body_bytes};
client_body_buffer_size {min(body.body_bytes, MIB)};
# concurrent JSON bodies of 1 MB or more; GATEWAY_MEMORY is computed for this number
limit_conn large_json {large};
# {late.name}: {late.queue_timeout_ms:g} ms in the queue + {LATENESS} x the p99 of {late.p99_ms:g} ms
proxy_read_timeout {late.timeout_s}s;
grpc_read_timeout {late.timeout_s}s;
# requests/s of a key without its own rate: {headroom}
js_var $default_rate_rps {rate};
# histogram buckets: fractions of each p99, and every latency that an SLO names
js_var $buckets_s "{" ".join(bounds)}";
""" + (OPENAI if has_openai_routes(models) else "")


def _largest(model: ServedModel) -> str:
    if model.text_bytes > max(model.input_numbers * JSON_BYTES, model.input_bytes):
        return f"{model.text_bytes} bytes of texts"
    if model.input_bytes > model.input_numbers * JSON_BYTES:
        return f"{model.input_bytes} bytes of tensors"
    return f"{model.input_numbers} numbers of up to {JSON_BYTES} bytes each in JSON"


@dataclass(frozen=True, kw_only=True)
class GatewaySizes:
    """What the gateway needs for the promised number of largest bodies."""

    body_mib: float
    at_once: int

    @property
    def tmp_mib(self) -> int:
        """Size of `/tmp`, which is memory: each body of 1 MB or more is a file there. More bodies are refused."""
        return math.ceil(GATEWAY_FILES_MIB + self.at_once * self.body_mib)

    @property
    def memory_mib(self) -> int:
        """All memory, `/tmp` included."""
        return math.ceil(GATEWAY_MIB + self.tmp_mib + BODY_IN_MEMORY * self.at_once * self.body_mib)


def gateway_sizes(models: list[ServedModel]) -> GatewaySizes:
    """The gateway's sizes, under Compose and on Kubernetes."""
    body = max(model.body_bytes for model in models)
    at_once = min(MOST_LARGE, max(LEAST_LARGE, LARGE_BYTES // body))
    return GatewaySizes(body_mib=body / MIB, at_once=at_once)
