"""`deepseek new`: writes a model folder to start from. It builds unchanged; comments explain its two files."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from deepseek.spec import DeploymentSpec, InputError

TEMPLATES = Path(__file__).parent / "templates"
FILES = ("deploy.toml", "model.py")


def main(options: argparse.Namespace) -> None:
    folder = options.models / options.name
    if folder.exists():
        raise InputError(f"{folder}: already exists; choose another name, or another folder with --models")
    kind = vars(options)["from"]
    options.models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=options.models) as draft:
        for name in FILES:
            text = (TEMPLATES / kind / name).read_text().replace(f'name = "{kind}"', f'name = "{options.name}"', 1)
            Path(draft, name).write_text(text)
        try:
            DeploymentSpec.load(draft)
        except InputError as error:
            raise InputError(str(error).replace(f"{Path(draft, 'deploy.toml')}: ", "")) from None
        Path(draft).chmod(0o755)
        shutil.copytree(draft, folder)
    where = "" if options.models == Path("models") else f" MODELS={options.models}"
    print(f"new       {folder}/deploy.toml: what is served, and how fast it must be")
    print(f"new       {folder}/model.py: the module, its weights and its samples")
    print(f"optional  {folder}/requirements.txt: packages that model.py imports; the build installs them")
    print(f"next      make engine serve MODEL={options.name}{where}")
