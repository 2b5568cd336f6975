"""Call a model on Triton, over HTTP or gRPC: numpy in, numpy out, deadlines, safe retries, one error tree.

Enter: `InferenceClient`, `AsyncInferenceClient`, or `python -m deepseek_client` (`cli/`). Imports: no other room. The
modules here never import `cli/`, and only `client.py` imports `http/` and `grpc/`.

Example:
    >>> from deepseek_client import InferenceClient
    >>> client = InferenceClient("127.0.0.1:8001")
    >>> client.infer("recommender", {"item_ids": item_ids})
"""

from deepseek_client.client import AsyncInferenceClient, InferenceClient
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
from deepseek_client.metadata import ModelMetadata, TensorMetadata
from deepseek_client.statistics import ModelStatistics, Statistics
from deepseek_client.transport import BULK, PreparedRequest

__all__ = [
    "BULK",
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
    "TensorMetadata",
    "Unreachable",
]
