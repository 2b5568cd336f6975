"""A model folder, opened and checked: `deploy.toml` + `model.py`, inside the repository or anywhere.

Contract of `model.py` (plain functions): `load() -> nn.Module`, `samples(split)` with split
"calibration" or "evaluation", optionally `evaluate(predict)` and `train()`. Run as a command it makes
the weights, where the model knows how to.

Examples:
    python -m export.source --model recommender
    python -m export.source --models /some/dir --model other
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from deepseek.spec import DeploymentSpec, InputError, Parser, add_model_arguments, run_command
from export.artifact import Row

Split = Literal["calibration", "evaluation"]
Predict = Callable[[Row], Row]


class Source:
    """What a model folder offers, each call checked against the signature in `deploy.toml`."""

    def __init__(self, model: str, models: str | Path = "models") -> None:
        self.spec = DeploymentSpec.of_model(model, models)
        self.folder = Path(models) / model
        self._module = _import_model(self.folder)
        for name in ("load", "samples"):
            if not callable(getattr(self._module, name, None)):
                raise InputError(
                    f"{self.folder / 'model.py'}: no function {name}(); it needs load() and samples(split)"
                )
        self.evaluate: Callable[[Predict], dict[str, float]] | None = getattr(self._module, "evaluate", None)
        self.train: Callable[[], Any] | None = getattr(self._module, "train", None)
        metric = self.spec.precision.metric
        if metric is not None and self.evaluate is None:
            raise InputError(
                f"{self.folder / 'deploy.toml'}: precision.metric: seen {metric!r}, but model.py has no "
                "evaluate(predict); write one or remove the key (outputs are then compared)"
            )

    def load(self) -> Any:
        """The `torch.nn.Module`, in eval mode."""
        return self._module.load().eval()

    def rows(self, split: Split, limit: int) -> Iterator[Row]:
        """At most `limit` rows of real inputs, batches taken apart; raises InputError where one is off."""
        count = 0
        for index, sample in enumerate(self._module.samples(split)):
            where = f"{self.folder / 'model.py'}: samples({split!r})[{index}]"
            size = check_inputs(self.spec, sample, where)
            for row in range(size):
                if count == limit:
                    return
                yield {name: np.ascontiguousarray(sample[name][row : row + 1]) for name in self.spec.inputs}
                count += 1
        if count == 0:
            raise InputError(
                f"{self.folder / 'model.py'}: samples({split!r}) is empty; {split} needs real inputs, "
                "random ones would give a graph that nobody can trust"
            )


def check_inputs(spec: DeploymentSpec, sample: Any, where: str) -> int:
    """Batch size of a sample that fits the signature; raises InputError in one line otherwise."""
    if not isinstance(sample, dict) or sample.keys() != spec.inputs.keys():
        seen = sorted(sample) if isinstance(sample, dict) else type(sample).__name__
        raise InputError(f"{where}: seen {seen}; a dict of {sorted(spec.inputs)} is needed")
    sizes: dict[str, int] = {}
    for name, tensor in spec.inputs.items():
        array = sample[name]
        if not isinstance(array, np.ndarray) or array.dtype != tensor.dtype:
            seen = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise InputError(f"{where}[{name!r}]: seen {seen}; deploy.toml says a numpy array of {tensor.dtype}")
        if array.ndim != len(tensor.shape):
            raise InputError(
                f"{where}[{name!r}]: shape {array.shape}; deploy.toml says {list(tensor.shape)}, "
                "batch dimension included"
            )
        for dim, size in zip(tensor.shape, array.shape, strict=True):
            expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
            if size != expected:
                raise InputError(f"{where}[{name!r}]: shape {array.shape}; {dim!r} must be {expected}")
            if isinstance(dim, str) and dim != "batch" and not spec.axes[dim].min <= size <= spec.axes[dim].max:
                axis = spec.axes[dim]
                raise InputError(f"{where}[{name!r}]: shape {array.shape}; axis {dim!r} takes {axis.min} to {axis.max}")
    return sizes["batch"]


def _import_model(folder: Path) -> ModuleType:
    """Imports model.py as `models.<name>.model`, its neighbours importable as siblings."""
    path = folder / "model.py"
    if not path.is_file():
        raise InputError(f"{path}: no such file; a model folder holds deploy.toml and model.py")
    package = f"models.{folder.name}"
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]  # a folder of the same name elsewhere
    sys.modules[package] = ModuleType(package)
    sys.modules[package].__path__ = [str(folder)]
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: a model's types.py must not hide the standard library's
    spec = importlib.util.spec_from_file_location(f"{package}.model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Makes a model's weights by its own train(), if it has one."""
    parser = Parser(__doc__, prog="python -m export.source")
    add_model_arguments(parser)
    args = parser.parse_args()
    source = Source(args.model, args.models)
    if source.train is None:
        print(f"{args.model} brings its weights: no train() in {source.folder / 'model.py'}")
    else:
        source.train()


if __name__ == "__main__":
    run_command(main)
