"""Opens and checks a model folder: `deploy.toml` and `model.py`, inside the repository or anywhere.

Contract of `model.py` (plain functions): `load() -> nn.Module`, `samples(split)` with split "calibration" or
"evaluation", optionally `evaluate(predict)` (metrics by name, each a number or one value a row), `train()`,
`finetune(module)` (in place, for a pruned module) and `fingerprint()` (a text that changes with what the last three
read outside the folder). Exceptions in them become one line with the place in the user's file.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from deepseek.spec import (
    DeploymentSpec,
    GateFailed,
    InputError,
    InvalidMeasurement,
    one_line,
)
from export.artifact import last_options, pruned_path
from export.dependencies.requirements import FILE
from export.rows import Row

_OURS = tuple(Path(__file__).resolve().parent.parent / room for room in ("export", "deepseek"))
Split = Literal["calibration", "evaluation"]
Predict = Callable[[Row], Row]


class ModelFolder:
    """The functions of a model.py, each call checked against the signature in `deploy.toml`."""

    def __init__(self, model: str, models: str | Path = "models") -> None:
        self.spec = DeploymentSpec.to_build(model, models)
        self.folder = Path(models) / model
        if data := last_options(model).get("data"):
            os.environ.setdefault("DEEPSEEK_DATA", data)  # else `deepseek parity` would load() with other data
        with user_code(self.folder, "importing it"):
            self._module = _import_model(self.folder)
        for name in ("load", "samples"):
            if not callable(getattr(self._module, name, None)):
                raise InputError(
                    f"{self.folder / 'model.py'}: no function {name}(); it needs load() and samples(split)"
                )
        self.evaluate: Callable[[Predict], Mapping[str, Any]] | None = self._function("evaluate")
        self.train: Callable[[], Any] | None = self._function("train")
        self.finetune: Callable[[Any], Any] | None = self._function("finetune")
        self._first_numbers = ""  # of each weight of the last load()

    def _function(self, name: str) -> Callable[..., Any] | None:
        """An optional function of model.py; its exceptions become one line."""
        function = getattr(self._module, name, None)
        if function is None:
            return None

        def guarded(*args: Any) -> Any:
            with user_code(self.folder, f"{name}()"):
                return function(*args)

        return guarded

    def fingerprint(self) -> str | None:
        """The text of model.py's fingerprint(), None if it has none; raises InputError if it is not a text."""
        function = self._function("fingerprint")
        if function is None:
            return None
        told = function()
        if not isinstance(told, str) or not told:
            raise InputError(
                f"{self.folder / 'model.py'}: fingerprint() returned {told!r}; a text is needed that changes with what "
                "train(), finetune() and evaluate() read, such as a sha256 of the data"
            )
        return told

    def data_digest(self, *, finetunes: bool = False) -> str | None:
        """`fingerprint()` if evaluate(), or with `finetunes` also finetune(), reads data; "" if none does.

        None: they read data that no fingerprint() covers.
        """
        reads = self.spec.precision.metric is not None or (finetunes and self.finetune is not None)
        return self.fingerprint() if reads else ""

    def load(self) -> Any:
        """The module to deploy: the pruned one if `export.stages.prune` wrote it, else the unpruned one."""
        module, pruned = self.unpruned(), pruned_path(self.spec.name)
        if pruned.is_file():
            from deepseek.pruning import load_pruned  # needs torch-pruning, which nothing else here does

            load_pruned(module, pruned)
        return module

    def unpruned(self) -> Any:
        """The `torch.nn.Module` on the CPU, in eval mode, returning a tuple in the order of deploy.toml's outputs.

        16-bit weights are widened to float32, from which every later stage starts; inputs and outputs keep
        the signature's types. Turns off PyTorch's fast path of attention for the whole process.
        """
        import torch  # heavy; needed only to load the module

        # The fast path has no ONNX operator, and gives other results with padding: zeros at padded places.
        torch.backends.mha.set_fastpath_enabled(False)
        with user_code(self.folder, "load()"):
            model = self._module.load()
        if isinstance(model, type) or not callable(getattr(model, "named_parameters", None)):
            seen = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
            raise InputError(
                f"{self.folder / 'model.py'}: load() returned {seen}; a torch.nn.Module is needed, "
                "whose forward computes the outputs"
            )
        _check_parts(model, self.folder / "model.py")
        _check_forward(model, self.spec, self.folder / "model.py")
        with user_code(self.folder, "load()"):
            model.cpu().eval()
            first = str([weights.flatten()[:1].tolist() for weights in model.parameters()])
        if self._first_numbers not in ("", first):
            raise InputError(
                f"{self.folder / 'model.py'}: load() gives other weights than the last time; load them from a file, or "
                "call torch.manual_seed in load()"
            )
        self._first_numbers = first
        if any(_is_half(parameter) for _, parameter in model.named_parameters()):
            model.float()
            model.widened = True
            model.register_forward_pre_hook(lambda _, inputs: tuple(_widened(value) for value in inputs))
            model.register_forward_hook(lambda _, inputs, returned: _narrowed(self.spec, in_order(self.spec, returned)))
        else:
            model.register_forward_hook(lambda _, inputs, returned: in_order(self.spec, returned))
        return model

    def rows(self, split: Split, limit: int) -> Iterator[Row]:
        """At most `limit` rows of real inputs, batches split; raises InputError if one does not fit or none exist."""
        count = 0
        for index, sample in enumerate(self._samples(split)):
            where = f"{self.folder / 'model.py'}: samples({split!r})[{index}]"
            size = check_inputs(self.spec, sample, where)
            for row in range(size):
                if count == limit:
                    return
                # Copies: a generator may reuse the array for its next sample.
                yield {name: np.array(sample[name][row : row + 1], order="C") for name in self.spec.inputs}
                count += 1
        if count == 0:
            raise InputError(
                f"{self.folder / 'model.py'}: samples({split!r}) is empty; {split} needs real inputs, "
                "since random ones would give an unreliable graph"
            )

    def _samples(self, split: Split) -> Iterator[Any]:
        with user_code(self.folder, f"samples({split!r})"):
            found, path = self._module.samples(split), self.folder / "model.py"
            if isinstance(found, Mapping):
                raise InputError(
                    f"{path}: samples({split!r}) returned one dict of {', '.join(map(str, found))}; "
                    "a list of dicts is needed, each with arrays of one row or more"
                )
            yield from found


@contextlib.contextmanager
def as_written(model: Any) -> Iterator[None]:
    """Lets a module of `ModelFolder.load` return what its forward returns, as training code expects."""
    ordering = {key: hook for key, hook in model._forward_hooks.items() if hook.__module__ == __name__}
    for key in ordering:
        del model._forward_hooks[key]
    try:
        yield
    finally:
        model._forward_hooks.update(ordering)


def _check_parts(model: Any, path: Path) -> None:
    """Raises InputError for what the exporter cannot trace: TorchScript, quantized modules, sparse tensors ..."""
    for name, part in model.named_modules():
        kind, what = type(part).__module__, f"load(): {name!r} is" if name else "load() returned"
        if kind.startswith("torch.jit") and (not name or kind == "torch.jit._script"):
            raise InputError(
                f"{path}: {what} TorchScript ({type(part).__name__}); the exporter traces Python: return the "
                "torch.nn.Module that it was made from"
            )
        if kind.startswith("torch.ao.nn.quantized"):
            raise InputError(
                f"{path}: {what} quantized by PyTorch ({type(part).__name__}); return the module before that: the "
                "build quantizes it"
            )
        if kind == "torch.nn.modules.rnn" and getattr(part, "proj_size", None):
            raise InputError(
                f"{path}: {what} an LSTM with proj_size, for which ONNX has no operator; take one without it and "
                "multiply its outputs by weight_hr (they are the same if its weight_hh is weight_hh @ weight_hr)"
            )
    for name, tensor in model.state_dict().items():
        if getattr(tensor, "is_sparse", False) or getattr(tensor, "is_sparse_csr", False):
            raise InputError(
                f"{path}: load(): {name!r} is sparse, and ONNX has no sparse products; keep it dense, or keep its "
                "indices and values, for index_select and index_add"
            )


def _check_forward(model: Any, spec: DeploymentSpec, path: Path) -> None:
    """Raises InputError if forward wants keywords, a dict, or the inputs in another order than that of deploy.toml."""
    signature = inspect.signature(model.forward)
    try:
        taken = signature.bind(*spec.inputs)
        kinds = [str(signature.parameters[name].annotation) for name in taken.arguments]
        why = "it takes a dict" if any(re.search(r"\b(dict|Dict|Mapping)\b", kind) for kind in kinds) else ""
        for parameter, name in taken.arguments.items():
            if parameter != name and name in signature.parameters:
                why = f"{name} would be its {parameter}"
    except TypeError as error:
        why = str(error)
    if why:
        names = ", ".join(spec.inputs)
        raise InputError(
            f"{path}: forward{signature} cannot take the inputs {names} as tensors in this order: {why}; let load() "
            f"return a module whose forward(self, {names}) calls it with keywords or a dict"
        )


def folder_of(spec: DeploymentSpec) -> Path:
    """The model folder that was opened last under this model's name."""
    return Path(sys.modules[f"models.{spec.name}"].__path__[0])


def model_py(spec: DeploymentSpec) -> Path:
    return folder_of(spec) / "model.py"


@contextlib.contextmanager
def user_code(folder: Path, what: str) -> Iterator[None]:
    """Turns exceptions of a model folder's code into an InputError with file and line.

    Exceptions of our own code called from there (as `evaluate` calls `predict`) keep their traceback. The working
    directory is restored: paths of the build are relative to it.
    """
    here = os.getcwd()
    try:
        yield
    except (InputError, GateFailed, InvalidMeasurement):
        raise
    except (Exception, SystemExit) as error:
        place, ours = place_of(error, folder)
        if ours:
            raise
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = f"; name its package in {folder / FILE}, which `make engine` installs"
        raise InputError(f"{place}: {what}: {type(error).__name__}: {one_line(error)}{hint}") from error
    finally:
        os.chdir(here)


def place_of(error: BaseException, folder: Path) -> tuple[str, bool]:
    """`file:line` of the model folder's code that raised an exception, and whether that line called our code."""
    frames = [(Path(frame.filename).resolve(), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename is not None:
        frames.append((Path(error.filename).resolve(), error.lineno))
    places = [index for index, (path, _) in enumerate(frames) if path.is_relative_to(folder.resolve())]
    if not places:
        return str(folder / "model.py"), False
    path, line = frames[places[-1]]
    ours = any(called.is_relative_to(room) for called, _ in frames[places[-1] + 1 :] for room in _OURS)
    return f"{folder / path.relative_to(folder.resolve())}:{line}", ours


def in_order(spec: DeploymentSpec, returned: Any) -> tuple[Any, ...]:
    """The result of forward as a tuple in the order of deploy.toml's outputs.

    Mappings, dataclasses (such as the outputs of `transformers`) and named tuples with these names are read by name
    and may hold more; other tuples and lists keep their order. Raises InputError if an output is missing or no tensor.
    """
    fields: Any = None
    if isinstance(returned, Mapping):
        fields = dict(returned)
    elif dataclasses.is_dataclass(returned):
        fields = {field.name: getattr(returned, field.name) for field in dataclasses.fields(returned)}
    elif isinstance(returned, tuple) and {*spec.outputs} <= {*getattr(returned, "_fields", ())}:
        fields = returned._asdict()  # type: ignore[attr-defined]
    if fields is None:
        values = tuple(returned) if isinstance(returned, tuple | list) else (returned,)
    elif missing := [name for name in spec.outputs if name not in fields]:
        raise InputError(
            f"{model_py(spec)}: forward returned {type(returned).__name__} of {', '.join(map(str, fields))}; "
            f"no {', '.join(missing)}, which deploy.toml names as output: return one dict with a tensor for each"
        )
    else:
        values = tuple(fields[name] for name in spec.outputs)
    if len(values) != len(spec.outputs) or not all(hasattr(value, "element_size") for value in values):
        seen = ", ".join(type(value).__name__ for value in values)
        raise InputError(
            f"{model_py(spec)}: forward returned {len(values)} value(s) ({seen}); deploy.toml names the outputs "
            f"{', '.join(spec.outputs)}: one tensor each, in that order"
        )
    return values


def _is_half(tensor: Any) -> bool:
    """Whether a torch tensor is float16 or bfloat16."""
    return bool(tensor.is_floating_point() and tensor.element_size() == 2)


def _widened(tensor: Any) -> Any:
    return tensor.float() if _is_half(tensor) else tensor


def _narrowed(spec: DeploymentSpec, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Outputs with deploy.toml's types: float16 where declared, otherwise widened to float32."""
    dtypes = [tensor.dtype for tensor in spec.outputs.values()]
    return tuple(
        value.half() if dtype == "float16" else _widened(value) for value, dtype in zip(values, dtypes, strict=True)
    )


def check_inputs(spec: DeploymentSpec, sample: Any, where: str) -> int:
    """The batch size of a sample; raises InputError if the sample does not fit the signature."""
    if not isinstance(sample, dict) or sample.keys() != spec.inputs.keys():
        seen = sorted(map(str, sample)) if isinstance(sample, dict) else type(sample).__name__
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
                what = f"deploy.toml says {list(tensor.shape)}" if dim == expected else f"{dim!r} must be {expected}"
                raise InputError(f"{where}[{name!r}]: shape {array.shape}; {what}")
            if isinstance(dim, str) and dim != "batch" and not spec.axes[dim].min <= size <= spec.axes[dim].max:
                axis = spec.axes[dim]
                raise InputError(f"{where}[{name!r}]: shape {array.shape}; axis {dim!r} takes {axis.min} to {axis.max}")
    return sizes["batch"]


def _import_model(folder: Path) -> ModuleType:
    """Imports model.py as `models.<name>.model`; it can import files beside it as siblings."""
    path = folder / "model.py"
    if not path.is_file():
        raise InputError(f"{path}: no such file; a model folder holds deploy.toml and model.py")
    package = f"models.{folder.name}"
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]  # left by a folder of the same name elsewhere
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
