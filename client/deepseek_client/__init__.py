"""Call a model on Triton, over HTTP or gRPC: numpy in, numpy out, deadlines, safe retries, one error tree.

Example:
    >>> from deepseek_client import InferenceClient
    >>> client = InferenceClient("127.0.0.1:8001")
    >>> client.infer("recommender", {"item_ids": item_ids})

`AsyncInferenceClient` is the same for asyncio.
"""

from deepseek_client.counters import ModelStatistics, Statistics
from deepseek_client.errors import (
    AccessDenied,
    ConnectionLost,
    DeadlineExceeded,
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    ModelUnavailable,
    ServerBusy,
    ServerError,
    Unreachable,
)
from deepseek_client.inference import AsyncInferenceClient, InferenceClient
from deepseek_client.signature import ModelMetadata, TensorSpec
from deepseek_client.transports import PreparedRequest

__all__ = [
    "AccessDenied",
    "AsyncInferenceClient",
    "ConnectionLost",
    "DeadlineExceeded",
    "InferenceClient",
    "InferenceError",
    "InvalidInput",
    "ModelMetadata",
    "ModelNotFound",
    "ModelNotReady",
    "ModelStatistics",
    "ModelUnavailable",
    "PreparedRequest",
    "ServerBusy",
    "ServerError",
    "Statistics",
    "TensorSpec",
    "Unreachable",
]
