"""Call a model on Triton, over HTTP or gRPC: numpy in, numpy out, deadlines, safe retries, one error tree.

Example:
    >>> from deepseek_client import InferenceClient
    >>> client = InferenceClient("127.0.0.1:8001")
    >>> client.infer("recommender", {"item_ids": item_ids})
"""

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
from deepseek_client.inference import InferenceClient
from deepseek_client.signature import ModelMetadata, TensorSpec
from deepseek_client.transports import PreparedRequest

__all__ = [
    "AccessDenied",
    "ConnectionLost",
    "DeadlineExceeded",
    "InferenceClient",
    "InferenceError",
    "InvalidInput",
    "ModelMetadata",
    "ModelNotFound",
    "ModelNotReady",
    "ModelUnavailable",
    "PreparedRequest",
    "ServerBusy",
    "ServerError",
    "TensorSpec",
    "Unreachable",
]
