"""The modules that sentence-transformers adds to a checkpoint: how an embedding is made of the tokens' vectors.

Contract: reads JSON only, and raises InputError, one line.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from cli.model_folder.checkpoint_files import check_fetched, read_object, whole_number
from deepseek.spec import InputError

POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max", "weightedmean_tokens": "weightedmean"}
"""Names that old versions write in another way."""
ALLOWED_POOLINGS = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
ACTIVATIONS = ("GELU", "Identity", "ReLU", "Sigmoid", "SiLU", "Tanh")
"""Modules of torch.nn that a Dense module may apply."""
DENSE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, kw_only=True)
class Module:
    kind: str
    """Its name in sentence-transformers; the whole name of one that the checkpoint brings, such as custom.Pooling."""
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """How an embedding is made of the tokens' vectors."""

    name: str
    named_in: str
    """The file that names the pooling; "" if none does."""
    layers: dict[str, tuple[Path, ...]]
    """The modules after the pooling, in order: a name such as 2_Dense, and the module's files."""
    width: int
    """Entries of an embedding."""


def read_modules(folder: Path) -> list[Module]:
    """The modules in their order: the transformer first, then its pooling; none for a plain checkpoint."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        found = [Module(kind=_kind(row["type"]), folder=folder / str(row.get("path", ""))) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error!r}); copy the checkpoint again") from None
    kinds = [module.kind for module in found]
    if kinds[:2] not in ([], ["Transformer"], ["Transformer", "Pooling"]) or {*kinds[2:]} - {"Dense", "Normalize"}:
        raise InputError(
            f"{path}: seen the modules {', '.join(kinds)}; allowed: Transformer, Pooling, then Dense and Normalize; "
            "write others in forward() of a folder that `deepseek new --from text` writes"
        )
    return found


def _kind(name: str) -> str:
    return name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name


def read_pooling(folder: Path, modules: list[Module], width: int, with_prompts: bool) -> Pooling:
    """The pooling and what follows it. `width`: entries of a token's vector."""
    name, named_in = _pooling(folder, modules[1].folder / "config.json", with_prompts) if modules[1:] else ("mean", "")
    layers: dict[str, tuple[Path, ...]] = {}
    for place, module in enumerate(modules[2:], 2):
        files: tuple[Path, ...] = ()
        if module.kind == "Dense":
            width, files = _dense(module.folder, width)
        layers[f"{place}_{module.kind}"] = files
    return Pooling(name=name, named_in=named_in, layers=layers, width=width)


def _pooling(folder: Path, path: Path, with_prompts: bool) -> tuple[str, str]:
    settings = read_object(path, "modules.json names it")
    mode = settings.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else mode if isinstance(mode, list) else None
    if modes is None:
        modes = [
            key.removeprefix("pooling_mode_") for key, on in settings.items() if key.startswith("pooling_mode_") and on
        ]
    names = [POOLINGS.get(each, each) for each in modes]
    if len(names) != 1 or names[0] not in ALLOWED_POOLINGS:
        seen = ", ".join(map(str, names)) or "none"
        raise InputError(
            f"{path}: seen the pooling {seen}; allowed: one of {', '.join(ALLOWED_POOLINGS)}; write it in forward() of "
            "a folder that `deepseek new --from text` writes"
        )
    if with_prompts and settings.get("include_prompt") is False and names[0] != "lasttoken":
        raise InputError(
            f"{path}: include_prompt: seen false; the import pools over the tokens of prompts too; remove the "
            "prompts from config_sentence_transformers.json to import it without them"
        )
    return names[0], path.name if path.parent == folder else f"{path.parent.name}/{path.name}"


def _dense(folder: Path, width: int) -> tuple[int, tuple[Path, ...]]:
    """The width of what a Dense module gives, and its files."""
    path = folder / "config.json"
    settings = read_object(path, "modules.json names it")
    activation = settings.get("activation_function", "torch.nn.Tanh")
    package, _, name = str(activation).rpartition(".")
    if not f"{package}.".startswith("torch.nn.") or name not in ACTIVATIONS:
        raise InputError(f"{path}: activation_function: seen {activation!r:.80}; allowed: {', '.join(ACTIVATIONS)}")
    own = {key: settings.get(key) for key in ("module_input_name", "module_output_name", "use_residual")}
    if unknown := [key for key, value in own.items() if value not in (None, False, "sentence_embedding")]:
        raise InputError(
            f"{path}: {unknown[0]}: seen {own[unknown[0]]!r:.80}; write such a module in forward() of a folder that "
            "`deepseek new --from text` writes"
        )
    if (seen := whole_number(path, settings, "in_features")) != width:
        raise InputError(f"{path}: in_features: seen {seen}, but the module before it gives {width}")
    weights = next((folder / name for name in DENSE_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise InputError(f"{folder}: no weights; allowed: {', '.join(DENSE_WEIGHTS)}")
    check_fetched(weights)
    return whole_number(path, settings, "out_features"), (path, weights)
