"""Which rooms may import which others."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

GROUND = {"deepseek.spec", "deepseek.precisions", "deepseek.targets", "deepseek.svg_chart"}
MAY_IMPORT: dict[str, set[str]] = {
    "cli": {"cli", "deepseek", "deepseek_client", "export", "serving", "loadtests"},
    "deepseek": {"deepseek"},
    "client/deepseek_client": {"deepseek_client"},
    "models": {"deepseek", "models"},
    "export": {"deepseek", "export"},
    "serving": GROUND | {"serving"},
    "loadtests": GROUND | {"deepseek_client", "loadtests"},
}
# Exceptions: parity and the OpenAI routes call the server through the client that applications use.
ROUTES = ["__main__", "embeddings", "errors", "inference", "recommenders", "rerank", "text_models", "triton_http"]
CALLERS = {"export/checks/parity.py", *(f"serving/openai/{name}.py" for name in ROUTES)}
OURS = {"cli", "deepseek", "deepseek_client", "models", "export", "serving", "loadtests", "tests"}
LIGHT = {f"deepseek/{name}.py" for name in ("__init__", "config", "quantization")} | {
    str(path) for path in (*Path("deepseek/spec").rglob("*.py"), *Path("deepseek/sizing").rglob("*.py"))
} - {"deepseek/sizing/model/traced.py", "deepseek/sizing/model/live_memory.py"}
TORCH_FILES = {f"export/stages/{name}.py" for name in ("prune", "to_onnx", "to_torchscript", "to_tensorrt")} | {
    "export/runtimes/pytorch_reference.py",
    "export/runtimes/tensorrt_predictor.py",
    "export/runtimes/torchscript_predictor.py",
    "export/checks/gpu_baselines.py",
    "export/graphs/branches.py",
    "export/model_folder.py",
    "export/graphs/traceable.py",
    "export/graphs/translations.py",
}
FILES = [path for room in MAY_IMPORT for path in sorted(Path(room).rglob("*.py"))]


@cache
def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {base} if node.module else {f"{base}{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_allowed_rooms(room: str) -> None:
    for path in Path(room).rglob("*.py"):
        may = MAY_IMPORT[room] | ({"deepseek_client"} if str(path) in CALLERS else set())
        ours = {name for name in imports(path) if name.split(".")[0] in OURS}
        assert not {name for name in ours if not f"{name}.".startswith(tuple(f"{each}." for each in may))}, path


def test_the_client_imports_one_way() -> None:
    """The command line imports `client.py`, which imports the protocols, which import what they share; no cycles."""
    root = Path("client")
    names = {
        path: ".".join(path.relative_to(root).with_suffix("").parts)
        for path in (root / "deepseek_client").rglob("*.py")
    }
    graph = {name: imports(path) & set(names.values()) for path, name in names.items() if not name.endswith("__init__")}
    TopologicalSorter(graph).prepare()  # raises CycleError
    for name, used in graph.items():
        rooms = {each.split(".")[1] for each in used} & {"cli", "client", "grpc", "http"}
        room = name.split(".")[1]
        may = {"cli": {"cli", "client"}, "__main__": {"cli"}, "client": {"grpc", "http"}}.get(room, {room})
        assert rooms <= may, name


ROOMS: dict[str, dict[str, set[str]]] = {
    "serving": {
        "backend": set(),
        "repository": set(),
        "openai": set(),
        "embedded": {"repository"},
        "observe": {"repository"},
        "stack": {"repository", "embedded", "observe"},
        "doctor": {"repository", "embedded", "stack"},
        "release": {"repository", "embedded", "doctor", "stack"},
        "kubernetes": {"repository", "embedded", "observe", "stack"},
    },
    "loadtests": {
        "results": set(),
        "slo": {"results"},
        "load": {"results", "slo"},
        "profile": {"results", "load"},
        "release": {"results", "slo", "load"},
        "search": {"results", "slo", "load"},
        "tune": {"results", "slo", "load", "search"},
        "regression": {"results", "slo", "load", "search"},
        "scale": {"results", "slo", "search"},
        "report": {"results", "slo", "search", "tune"},
    },
}
"""For each sub-room the lower ones that it may import."""
DRAWING_COMMANDS = {"capacity.py", "tune.py"}  # these end with a page of `report`


@pytest.mark.parametrize("room", ROOMS)
def test_a_sub_room_imports_only_lower_ones(room: str) -> None:
    assert ROOMS[room].keys() == {path.parent.name for path in Path(room).glob("*/__init__.py")}
    for sub_room, lower in ROOMS[room].items():
        for path in Path(room, sub_room).rglob("*.py"):
            used = {name.split(".")[1] for name in imports(path) if name.startswith(f"{room}.")}
            drawn = {"report"} if path.name in DRAWING_COMMANDS else set()
            assert used <= {sub_room, "percentiles"} | lower | drawn, path


def test_heavy_imports_are_local() -> None:
    for path in FILES:
        heavy = {name.split(".")[0] for name in imports(path)}
        if "torch" in heavy:
            may = path.parts[0] in ("deepseek", "models") or "templates" in path.parts or str(path) in TORCH_FILES
            assert may, path
            assert str(path) not in LIGHT
        if "tensorrt" in heavy:
            assert str(path) in {"export/stages/to_tensorrt.py", "export/runtimes/tensorrt_predictor.py"}


def test_stages_never_import_one_another() -> None:
    for path in Path("export/stages").glob("*.py"):
        assert not {name for name in imports(path) if name.startswith(("export.stages", "export.checks"))}, path


def test_consoles_do_not_interpret_brackets_as_markup() -> None:
    """Paths, names and other programs' errors contain brackets; styles are given as `style=` or `Text`."""
    for path in FILES:
        text = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL) if path.parts[0] != "models" else ""
        assert [call for call in re.findall(r"\bConsole\(.*", text) if "markup=False" not in call] == [], path


def test_no_two_public_classes_have_one_name() -> None:
    found: dict[str, list[Path]] = {}
    for path in FILES:
        if "templates" not in path.parts and "models" not in path.parts:  # a user's own classes
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, []).append(path)
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}
