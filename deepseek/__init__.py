"""Take a PyTorch model to a Triton endpoint that proves its SLO.

Light to import: each name is loaded on first use, and torch only with a name that needs it.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek.config import TrainingConfig as TrainingConfig
    from deepseek.config import TransformerConfig as TransformerConfig
    from deepseek.pruning import PruneConfig as PruneConfig
    from deepseek.pruning import prune_model as prune_model
    from deepseek.quantization import QuantConfig as QuantConfig
    from deepseek.spec import DeploymentSpec as DeploymentSpec
    from deepseek.transformer import Transformer as Transformer
    from deepseek.transformer import init_weights as init_weights

# ONNX Runtime 1.29 and later send usage data to Microsoft unless this is set before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
MODULE_OF = {
    "DeploymentSpec": "spec",
    "PruneConfig": "pruning",
    "QuantConfig": "quantization",
    "TrainingConfig": "config",
    "Transformer": "transformer",
    "TransformerConfig": "config",
    "init_weights": "transformer",
    "prune_model": "pruning",
}
__all__ = list(MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULE_OF})
