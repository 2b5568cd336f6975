"""Model folders: errors in user code are one line with the place, and forward's results become outputs."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek.spec import DeploymentSpec, InputError
from export.artifact import LAST, record_path
from export.dependencies.sources import files_in
from export.model_folder import ModelFolder, in_order
from export.precision.accuracy import evaluated
from export.runtimes.pytorch_reference import run_torch
from tests.add_one import replace_in
from tests.conftest import RunHere
from tests.tiny_model import TOML, tiny

TEXT = DeploymentSpec.load("tests/models/text")
IMAGE = DeploymentSpec.load("tests/models/image")
SCORES, FEATURES = torch.ones(2, 10), torch.zeros(2, 32)


@pytest.mark.parametrize("given", [None, "other"])
def test_a_model_loads_the_data_of_its_last_build_unless_it_is_given(
    own_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    """As in `deepseek parity` after `deepseek retrain --data clicks`."""
    path = record_path("tiny")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({LAST: {"options": {"data": "clicks", "prune": ""}}}))
    code = "\nimport os\n\ndef fingerprint():\n    return os.environ['DEEPSEEK_DATA']\n"
    monkeypatch.setenv("DEEPSEEK_DATA", given or "")  # also restores it
    if not given:
        monkeypatch.delenv("DEEPSEEK_DATA")
    assert tiny(tmp_path, code=code).fingerprint() == (given or "clicks")


def loading(returned: str) -> str:
    return f"\ndef load():\n    return {returned}\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("\ndef f(:\n", r"model.py:22: importing it: SyntaxError: invalid syntax"),
        (
            "\nimport no_such_module\n",
            "model.py:22: importing it: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("\nload = None\n", r"model.py: no function load\(\)"),
        (loading("open('/no/weights')"), r"model.py:23: load\(\): FileNotFoundError: .*/no/weights"),
        (loading("{}"), r"load\(\) returned dict; a torch.nn.Module is needed"),
        (loading("None"), r"load\(\) returned NoneType"),
        (loading("Tiny"), r"load\(\) returned the class Tiny; a torch.nn.Module is needed"),
        (
            "\ndef load():\n    model = Tiny()\n    model.near = torch.nn.Buffer(torch.eye(8).to_sparse())\n    return model\n",
            r"load\(\): 'near' is sparse, and ONNX has no sparse products",
        ),
        ("\ndef load():\n    raise SystemExit('no weights')\n", r"model.py:23: load\(\): SystemExit: no weights"),
        (
            "\ndef load():\n    raise ValueError('\\x1b[1m' + 'bold ' * 90 + '\\x1b[0m' + 'long ' * 90 + 'end')\n",
            r"model.py:23: load\(\): ValueError: bold .*bold  ?\.\.\. g long .*long end$",
        ),
        (
            loading("torch.jit.script(Tiny().line)"),
            r"load\(\) returned TorchScript .* return the torch.nn.Module that it was made",
        ),
        (
            loading("torch.nn.Sequential(torch.jit.script(Tiny().line))"),
            r"load\(\): '0' is TorchScript .* return the torch.nn.Mod",
        ),
        (
            loading("torch.ao.quantization.quantize_dynamic(Tiny())"),
            r"'line' is quantized by PyTorch .* the build quantizes it",
        ),
        (
            loading("torch.nn.Sequential(torch.nn.LSTM(8, 8, proj_size=4))"),
            r"'0' is an LSTM with proj_size, .* weight_hh @ weight_hr",
        ),
    ],
    ids=[
        *("syntax", "import", "no function", "raises", "no module", "return forgotten", "a class", "a sparse buffer"),
        *("exits", "a long message", "TorchScript", "a part of TorchScript", "quantized", "a projection"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of TorchScript, and of quantization by PyTorch
def test_a_model_that_cannot_be_loaded_is_one_error_line(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(tmp_path, code=code).load()


def test_a_changed_working_directory_is_restored(tmp_path: Path) -> None:
    change = f"    import os; os.chdir({str(tmp_path)!r})\n"
    code = f"if True:\n{change}_load = load\ndef load():\n{change}    return _load()\n"
    before = os.getcwd()
    tiny(tmp_path, code=code).load()
    assert os.getcwd() == before


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("\ndef samples(split):\n    yield {'x': [[0.5] * 8]}\n", "seen list; deploy.toml says a numpy array of float32"),
        ("\ndef samples(split):\n    yield {'x': torch.zeros(1, 8)}\n", "seen Tensor; deploy.toml says a numpy array"),
        ("\ndef samples(split):\n    return {'x': np.zeros((1, 8))}\n", "returned one dict of x; a list of dicts is needed, each with"),
        ("\ndef samples(split):\n    return []\n", "is empty; evaluation needs real inputs"),
        ("\ndef samples(split):\n    yield {'x': np.zeros(8, np.float32)}\n", r"shape \(8,\); deploy.toml says"),
        ("\ndef samples(split):\n    yield {'x': np.zeros((1, 7), np.float32)}\n", r"shape \(1, 7\); deploy.toml says \['batch', 8\]"),
        ("\ndef samples(split):\n    pass\n", "TypeError: 'NoneType' object is not iterable"),
        ("\ndef samples():\n    return []\n", "TypeError: samples.. takes 0 positional arguments"),
        ("\ndef samples(split):\n    raise OSError('disk full')\n    yield\n", r"model.py:23: samples\('evaluation'\): OSError: disk full"),
    ],
    ids=["list", "tensor", "dict", "no rows", "no batch dimension", "size", "None", "no split", "raises"],
)  # fmt: skip
def test_samples_of_the_wrong_type_are_one_error_line(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(tiny(tmp_path, code=code).rows("evaluation", 4))


def test_samples_may_reuse_one_array(tmp_path: Path) -> None:
    code = """
def samples(split):
    x = np.zeros((1, 8), np.float32)
    for each in range(4):
        x[:] = each
        yield {'x': x}
"""
    assert [row["x"][0, 0] for row in list(tiny(tmp_path, code=code).rows("evaluation", 9))] == [0, 1, 2, 3]


def test_an_error_in_evaluate_is_one_line_but_our_own_errors_keep_their_traceback(tmp_path: Path) -> None:
    code = "\ndef evaluate(predict):\n    return {'score': predict({})['wrong name']}\n"
    source = tiny(tmp_path, code=code)
    assert source.evaluate is not None
    with pytest.raises(InputError, match=r"model.py:23: evaluate\(\): KeyError: 'wrong name'"):
        source.evaluate(lambda inputs: inputs)
    with pytest.raises(
        KeyError, match="'x'"
    ):  # raised in export/runtimes/pytorch_reference.py, which evaluate() called
        source.evaluate(lambda inputs: run_torch(source.spec, torch.nn.Identity(), inputs))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 0.9", r"evaluate\(\) returned 0.9; a dict of names and numbers is needed, such as {'score': 0.9}"),
        ("return {'score': 'good'}", r"evaluate\(\) returned {'score': 'good'}; a dict of names and numbers is needed"),
        (
            "return {'score': np.ones((2, 2))}",
            r"evaluate\(\): 'score': shape \[2, 2\]; a number is needed, or an array",
        ),
        ("return {'score': [np.nan] * 3}", r"evaluate\(\): 'score': none of 3 rows has a value; a number is needed"),
        ("return {'score': 0.5, 'other': []}", r"evaluate\(\): 'other': none of 0 rows has a value"),
        (
            "return {'score': torch.ones(3, requires_grad=True)}",
            r"returned .*requires_grad=True.*; a dict of names and",
        ),
        ("return {'acc': 1}", "precision.metric: seen 'score'; evaluate.. returns acc"),
        ("predict(np.ones((1, 8)))", r"argument of predict: seen ndarray; a dict of \['x'\] is needed"),
        ("predict({'x': np.ones((1, 8))})", r"argument of predict\['x'\]: seen float64; deploy.toml says .* float32"),
        ("predict({'x': np.ones((0, 8), np.float32)})", "calls predict with an empty batch"),
    ],
    ids=["no dict", "no number", "2-D", "only NaN", "no rows", "with gradient", "other name", "array", "type", "empty"],
)
def test_a_mistake_in_evaluate_is_one_line(tmp_path: Path, body: str, message: str) -> None:
    toml = TOML + '[precision]\nmetric = "score"\n'
    source = tiny(tmp_path, toml=toml, code=f"\ndef evaluate(predict):\n    {body}\n")
    with pytest.raises(InputError, match=message):
        evaluated(source, lambda inputs: inputs)


@pytest.mark.server
def test_what_a_model_prints_is_not_in_the_json(
    tmp_path: Path, own_build: Path, no_children: None, run_here: RunHere
) -> None:
    code = (
        "\nprint('importing')\n_load, _samples = load, samples\ndef load():\n    print('loading')\n    return _load()\n"
    )
    code += "def samples(split):\n    print('reading')\n    return _samples(split)\n"
    code += "def evaluate(predict):\n    predict(next(iter(_samples('evaluation'))))\n    print('evaluating')\n    return {'score': 1.0}\n"
    toml = TOML + '[precision]\nmetric = "score"\n'
    tiny(tmp_path, toml=toml, body="print('running'); return self.line(x)", code=code)
    for stage in ("train", "to-onnx", "to-torchscript", "select-precision --precision fp32"):
        run = run_here(*stage.split(), "--models", str(tmp_path), "--model", "tiny", "--json")
        assert isinstance(json.loads(run.stdout), dict), run.stderr
        assert "importing" in run.stderr


def test_a_mapping_is_read_by_name_and_may_have_more_entries() -> None:
    ModelFolder("image", "tests/models")
    named = namedtuple("named", ["features", "scores", "loss"])
    assert in_order(IMAGE, named(FEATURES, SCORES, None)) == (SCORES, FEATURES)
    values = in_order(IMAGE, {"attentions": None, "features": FEATURES, "scores": SCORES})
    assert [tuple(value.shape) for value in values] == [(2, 10), (2, 32)]
    with pytest.raises(
        InputError,
        match=r"tests/models/image/model.py: forward returned dict of logits; no scores, features, which deploy.toml names",
    ):
        in_order(IMAGE, {"logits": SCORES})


def test_weights_that_differ_from_load_to_load_are_refused(tmp_path: Path) -> None:
    source = tiny(tmp_path, code="\ndef load():\n    return torch.nn.Linear(8, 8)\n")
    source.load()
    with pytest.raises(InputError, match=r"tiny/model.py: load\(\) gives other weights than the last time"):
        source.load()


def test_a_module_in_training_mode_is_put_into_eval_mode(tmp_path: Path) -> None:
    source = tiny(tmp_path, code="\ndef load():\n    return torch.nn.Sequential(torch.nn.Dropout(0.5)).train()\n")
    inputs = {"x": np.ones((4, 8), np.float32)}
    assert np.array_equal(run_torch(source.spec, source.load(), inputs)["y"], inputs["x"])


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ("**named", "too many positional arguments"),
        ("*, x", "too many positional arguments"),
        ("x, y", "missing a required argument: 'y'"),
        ("batch: dict[str, torch.Tensor]", "it takes a dict"),
        ("mask=None, x=None", "x would be its mask"),
    ],
)
def test_a_forward_that_takes_keywords_or_a_dict_is_refused_with_the_way_round(
    tmp_path: Path, parameters: str, why: str
) -> None:
    source = tiny(tmp_path)
    replace_in(tmp_path / "tiny" / "model.py", "forward(self, x)", f"forward(self, {parameters})")
    with pytest.raises(InputError) as caught:
        ModelFolder("tiny", tmp_path).load()
    assert f"cannot take the inputs {', '.join(source.spec.inputs)} as tensors in this order: {why}" in str(
        caught.value
    )
    assert "let load() return a module whose forward(self, x)" in str(caught.value)


def test_files_of_a_model_folder_are_found_through_links_and_hidden_ones_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    hidden = ("model/.git/index", "model/.venv/lib/x.py", "model/__pycache__/x.pyc")
    for name in ("model/model.py", "words/a b.txt", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (folder / "words").symlink_to(tmp_path / "words")
    (folder / "back").symlink_to(tmp_path)
    assert sorted(files_in(folder)) == ["model.py", "words/a b.txt"]
