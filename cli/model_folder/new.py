"""`deepseek new`: writes a model folder to start from. It builds unchanged; comments explain its two files."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepseek.spec import DeploymentSpec, InputError, variables_for
from deepseek.spec.files.folders import onto_disk, scratch_in

TEMPLATES = Path(__file__).parent / "templates"
FILES = ("deploy.toml", "model.py")


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """A draft of a model folder, which appears at once if its deploy.toml is right. Raises InputError."""
    if folder.exists():
        raise InputError(f"{folder}: already exists; choose another name, or another folder with --models")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_in(folder.parent) as scratch:
        draft = scratch / folder.name
        draft.mkdir()
        yield draft
        try:
            DeploymentSpec.load(draft)
        except InputError as error:
            raise InputError(str(error).replace(f"{draft / 'deploy.toml'}: ", "", 1)) from None
        onto_disk(draft)
        draft.rename(folder)


def main(options: argparse.Namespace) -> None:
    folder, kind = options.models / options.name, vars(options)["from"]
    with drafted(folder) as draft:
        for name in FILES:
            text = (TEMPLATES / kind / name).read_text().replace(f'name = "{kind}"', f'name = "{options.name}"', 1)
            (draft / name).write_text(text)
    print(f"new       {folder}/deploy.toml: what is served, and how fast it must be")
    print(f"new       {folder}/model.py: the module, its weights and its samples")
    print(f"optional  {folder}/requirements.txt: packages that model.py imports; the build installs them")
    print(f"next      make engine serve {variables_for(options.name, options.models)}")
