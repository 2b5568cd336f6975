"""fp32 PyTorch as a function from a dict of arrays to a dict of arrays: the reference."""

from __future__ import annotations

from typing import Any

import numpy as np

from deepseek.spec import DeploymentSpec
from export.model_folder import Predict, folder_of, user_code
from export.rows import Row


def module_predictor(spec: DeploymentSpec, model: Any) -> Predict:
    """A predictor of a `torch.nn.Module` in eval mode."""
    import torch  # heavy; needed only here

    def predict(inputs: Row) -> Row:
        with user_code(folder_of(spec), "forward(...) on samples"), torch.inference_mode():
            values = model(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in spec.inputs))
        values = values if isinstance(values, tuple | list) else [values]
        return {name: value.numpy(force=True) for name, value in zip(spec.outputs, values, strict=True)}

    return predict
