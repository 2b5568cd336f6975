"""A TorchScript module as a function from a dict of arrays to a dict of arrays."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from deepseek.spec import DeploymentSpec, InputError, one_line
from export.model_folder import Predict
from export.rows import Row


@contextmanager
def without_deprecations() -> Iterator[None]:
    """TorchScript itself is deprecated, which new versions of PyTorch say with another kind of warning."""
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", kind)
        yield


def torchscript_predictor(spec: DeploymentSpec, path: Path, device: str) -> Predict:
    """A predictor of a module on the device that it was made for; raises InputError if it cannot be loaded."""
    import torch

    with without_deprecations():
        try:
            module = torch.jit.load(path, map_location=device)
        except RuntimeError as error:
            raise InputError(f"{path}: TorchScript cannot load it: {one_line(error)}") from None

    def predict(inputs: Row) -> Row:
        with torch.inference_mode():
            values = module(*(torch.from_numpy(np.ascontiguousarray(inputs[name])).to(device) for name in spec.inputs))
        values = values if isinstance(values, tuple) else (values,)
        return {name: value.cpu().numpy() for name, value in zip(spec.outputs, values, strict=True)}

    return predict
