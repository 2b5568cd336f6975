"""`deepseek import`: writes a model folder from a checkpoint of Hugging Face transformers.

Contract: the folder is complete, with a copy of the weights and the tokenizer, and appears at once or not at all.
Nothing is downloaded and no code of the checkpoint runs. The build loads the weights and finds out whether they fit.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from string import Template

from cli.model_folder.checkpoint import HEADS, Checkpoint
from cli.model_folder.new import TEMPLATES, drafted
from deepseek.spec import InputError, variables_for

TITLES = {
    "encoder": "A text encoder",
    "classifier": "A text classifier",
    "token-classifier": "A token classifier",
    "cross-encoder": "A cross-encoder, which scores pairs of texts",
}
TYPES = """\
[inputs.token_type_ids]     # 0 for the first text of a pair, 1 for the second; 0 for a single text
dtype = "int64"
shape = ["batch", "sequence"]
"""
TEXT = """
[text]                      # callers may send texts; longer ones than the largest sequence are truncated
tokenizer = "checkpoint/tokenizer.json"
"""
TEXTS = {
    "encoder": TEXT,
    "token-classifier": TEXT,
    "classifier": TEXT + "# pairs = true              # if trained on pairs: also set PAIRS = True in texts.py\n",
    "cross-encoder": TEXT + "pairs = true                # a row of texts is a pair, such as a query and a document\n",
}
BATCH_TOKENS = 8192  # most tokens of one batch: 32 texts of 256 tokens, 16 of 512
SHOWN_LABELS = 20


def main(options: argparse.Namespace) -> None:
    """Writes `<models>/<name>/` with deploy.toml, model.py, texts.py, texts.tsv, requirements.txt and checkpoint/."""
    checkpoint = Checkpoint.read(options.folder, options.task)
    name = options.name or re.sub(r"[^A-Za-z0-9_-]+", "-", options.folder.resolve().name).strip("-_")
    if not name:
        raise InputError(f"{options.folder}: its name has no letter or digit of ASCII; name the model with --name")
    folder = options.models / name
    with drafted(folder) as draft:
        _write_code(draft, name, checkpoint)
        size = _copy(checkpoint, draft / "checkpoint")
    _report(options, folder, checkpoint, size)


def _write_code(folder: Path, name: str, checkpoint: Checkpoint) -> None:
    source = TEMPLATES / "checkpoint"
    settings = {
        "encoder.py": {
            "AutoModel": checkpoint.model,
            'POOLING = "mean"': f'POOLING = "{checkpoint.pooling.name}"',
            "LAYERS: list[str] = []": f"LAYERS: list[str] = {json.dumps(list(checkpoint.pooling.layers))}",
            "SIZE = None": f"SIZE = {checkpoint.kept or None}",
        },
        "classifier.py": {"ForSequenceClassification": HEADS[checkpoint.task] or "ForSequenceClassification"},
        "texts.py": {
            "PADDING = 0": f"PADDING = {checkpoint.padding}",
            "PAIRS = False": f"PAIRS = {checkpoint.task == 'cross-encoder'}",
        },
    }
    module = "encoder.py" if checkpoint.task == "encoder" else "classifier.py"
    for template, target in ((module, "model.py"), ("texts.py", "texts.py")):
        text = (source / template).read_text(encoding="utf-8")
        for default, value in settings[template].items():
            assert default in text
            text = text.replace(default, value)
        (folder / target).write_text(text, encoding="utf-8")
    shutil.copyfile(source / "texts.tsv", folder / "texts.tsv")
    (folder / "requirements.txt").write_text("transformers>=5,<6\n")
    (folder / "deploy.toml").write_text(_deploy_toml(name, checkpoint), encoding="utf-8")


def _deploy_toml(name: str, checkpoint: Checkpoint) -> str:
    largest = max(1, min(32, BATCH_TOKENS // checkpoint.longest))
    files = " and ".join(file for file, limit in checkpoint.limits.items() if limit == checkpoint.longest)
    enough = f"the checkpoint takes {min(checkpoint.limits.values())}; longer texts cost more memory and time"
    template = Template((TEMPLATES / "checkpoint" / "deploy.toml").read_text(encoding="utf-8"))
    return template.substitute(
        title=TITLES[checkpoint.task],
        name=name,
        types=TYPES if checkpoint.token_types else "",
        output=_output(checkpoint),
        text=_text(checkpoint),
        usual_batch=min(8, largest),
        largest_batch=largest,
        usual=min(32, checkpoint.longest),
        longest=checkpoint.longest,
        why_longest=f"from {files}; longer texts are truncated" if files else enough,
        # Without real texts, int8 would be calibrated with ids that no caller sends.
        candidates='["fp16", "int8"]' if checkpoint.has_tokenizer else '["fp16"]',
    )


def _text(checkpoint: Checkpoint) -> str:
    """The table `[text]`, with the prompts of an encoder."""
    text = TEXTS.get(checkpoint.task, "") if checkpoint.has_tokenizer else ""
    if not text or checkpoint.task != "encoder" or not checkpoint.prompts:
        return text
    pairs = (f"{_toml(name)} = {_toml(prompt)}" for name, prompt in checkpoint.prompts.items())
    text += f"prompts = {{ {', '.join(pairs)} }}\n"
    if checkpoint.default_prompt is not None:
        text += f"default_prompt = {_toml(checkpoint.default_prompt)}\n"
    return text


def _toml(text: str) -> str:
    """A string of TOML: JSON's, but DEL must be escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _output(checkpoint: Checkpoint) -> str:
    if checkpoint.task == "encoder":
        layers = [name.partition("_")[2] for name in checkpoint.pooling.layers]
        comment = ", ".join([f"{checkpoint.pooling.name} of the vectors of the tokens", *layers])
        comment += ", cut to truncate_dim" if checkpoint.kept else ""
        return f'[outputs.embedding]         # {comment}\ndtype = "float32"\nshape = ["batch", {checkpoint.width}]'
    count = len(checkpoint.labels)
    axes = '"batch", "sequence"' if checkpoint.task == "token-classifier" else '"batch"'
    names = [f"{place} {label}" for place, label in enumerate(checkpoint.labels[:SHOWN_LABELS])]
    more = [f"and {count - SHOWN_LABELS} more in checkpoint/config.json"] if count > SHOWN_LABELS else []
    raw = "without sigmoid, one for each label" if checkpoint.multi_label else "without softmax"
    comment = f"{raw}; {', '.join([*names, *more])}" if count > 1 else "the score, without sigmoid"
    return f'[outputs.logits]            # {comment}\ndtype = "float32"\nshape = [{axes}, {count}]'


def _copy(checkpoint: Checkpoint, folder: Path) -> int:
    """Copies the checkpoint's files; returns their bytes. Links, as in a cache of Hugging Face, become files."""
    folder.mkdir()
    for name in checkpoint.files:
        shutil.copyfile(checkpoint.folder / name, folder / name)
    if checkpoint.task == "encoder":
        for name, paths in checkpoint.pooling.layers.items():
            for path in paths:
                (folder / name).mkdir(exist_ok=True)
                shutil.copyfile(path, folder / name / path.name)
    if checkpoint.has_tokenizer:
        _adjust(folder / "tokenizer.json", checkpoint)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _adjust(path: Path, checkpoint: Checkpoint) -> None:
    """Lower-cases as sentence-transformers does; normalizes and cuts long texts as transformers does.

    Pads on the right: positions then do not depend on the batch. Leaves out tokens that the model has no embedding for.
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    before = json.dumps(settings)
    added = settings.get("added_tokens") or []
    settings["added_tokens"] = [token for token in added if token["content"] not in checkpoint.tokens_without_vector]
    for step in filter(None, (settings.get("normalizer"), settings.get("pre_tokenizer"))):
        step |= checkpoint.class_settings.get(step["type"], {})
    if checkpoint.lower_case:
        steps = filter(None, ({"type": "Lowercase"}, settings.get("normalizer")))
        settings["normalizer"] = {"type": "Sequence", "normalizers": list(steps)}
    if settings.get("padding"):
        settings["padding"]["direction"] = "Right"
    if checkpoint.truncation_side:
        usual = {"max_length": checkpoint.longest, "strategy": "LongestFirst", "stride": 0}
        own = settings.get("truncation") or {}
        settings["truncation"] = usual | own | {"direction": checkpoint.truncation_side.capitalize()}
    if json.dumps(settings) != before:
        path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


def _report(options: argparse.Namespace, folder: Path, checkpoint: Checkpoint, size: int) -> None:
    print(f"task      {checkpoint.task}; texts of up to {checkpoint.longest} tokens")
    if checkpoint.task == "encoder" and not checkpoint.pooling.named_in:
        used = checkpoint.pooling.name
        print(f"note      no file names the pooling: {used} is used; set POOLING in model.py to change it")
    if tokens := checkpoint.tokens_without_vector:
        print(f"note      tokens that the model has no embedding for are text here: {', '.join(tokens)}")
    if checkpoint.assumes_pairs:
        print(
            "note      one label: taken for a cross-encoder, whose texts are pairs; if this model scores single texts, "
            f"delete {folder} and import it with --task classifier"
        )
    if checkpoint.task == "cross-encoder" and checkpoint.prompts:
        names = ", ".join(checkpoint.prompts)
        print(f"note      pairs of texts have no prompts here: {names}; callers begin their texts with them")
    if not checkpoint.has_tokenizer:
        print(
            "note      no tokenizer.json: callers send token ids, the samples are random ids, and int8 is left out; "
            "docs/model-folder.md#write-tokenizerjson has the command that writes it"
        )
    print(f"import    {folder}/checkpoint/: {size / 1e6:.1f} MB, copied")
    print(f"import    {folder}/deploy.toml: what is served, and how fast it must be")
    print(f"import    {folder}/model.py and requirements.txt: the module and the packages that it imports")
    print(f"import    {folder}/texts.py and texts.tsv: the samples; replace the texts with those of your users")
    print(f"next      make engine serve {variables_for(folder.name, options.models)}")
