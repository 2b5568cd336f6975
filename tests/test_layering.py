"""Who may import whom (DESIGN: two rooms on the ground, four above, no arrow between the four)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

GROUND = {"deepseek.spec"}
MAY_IMPORT: dict[str, set[str]] = {
    "deepseek": {"deepseek"},
    "client/deepseek_client": {"deepseek_client"},
    "models": {"deepseek", "models"},
    "export": {"deepseek", "export"},
    "serving": GROUND | {"serving"},
    "loadtests": GROUND | {"deepseek_client", "loadtests"},
}
# What one module alone may import besides: served outputs are compared over the client that applications use.
ALSO = {"export/parity.py": {"deepseek_client"}}
OURS = {"deepseek", "deepseek_client", "models", "export", "serving", "loadtests", "tests"}
LIGHT = {f"deepseek/{name}.py" for name in ("__init__", "config", "quantization")} | {
    str(path) for path in (*Path("deepseek/spec").glob("*.py"), *Path("deepseek/sizing").glob("*.py"))
} - {"deepseek/sizing/traced.py", "deepseek/sizing/live.py"}
TORCH_STAGES = {
    f"export/{name}.py"
    for name in ("prune", "to_onnx", "to_torchscript", "reference", "runners", "source", "to_tensorrt")
}
STAGES = {
    "train",
    "prune",
    "to_onnx",
    "to_torchscript",
    "quantize",
    "compare",
    "parity",
    "to_tensorrt",
    "check_engine",
    "to_triton",
}
FILES = [path for room in MAY_IMPORT for path in sorted(Path(room).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {base} if node.module else {f"{base}{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    room = next(room for room in MAY_IMPORT if path.is_relative_to(room))
    may = MAY_IMPORT[room] | ALSO.get(str(path), set())
    for name in imports(path):
        if name.split(".")[0] in OURS:
            assert any(name == allowed or name.startswith(f"{allowed}.") for allowed in may), name


@pytest.mark.parametrize("path", FILES, ids=str)
def test_heavy_imports_stand_where_they_are_needed(path: Path) -> None:
    heavy = {name.split(".")[0] for name in imports(path)}
    if "torch" in heavy:
        assert path.parts[0] in ("deepseek", "models") or str(path) in TORCH_STAGES
        assert str(path) not in LIGHT
    if "tensorrt" in heavy:
        assert str(path) in {"export/to_tensorrt.py", "export/runners.py"}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_never_import_one_another(stage: str) -> None:
    others = {f"export.{other}" for other in STAGES - {stage}}
    assert not imports(Path(f"export/{stage}.py")) & others


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] != "models"], ids=str)
def test_no_console_reads_brackets_as_markup(path: Path) -> None:
    """They stand in paths, names and other programs' errors; styles are given as `style=` or `Text`."""
    calls = re.findall(r"\bConsole\(.*", re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL))
    assert [call for call in calls if "markup=False" not in call] == []
