"""PyTorch to ONNX: the graph has the signature, and values that forward bakes in are found."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from deepseek.spec import DeploymentSpec, GateFailed, InputError, ParitySpec
from export import cache
from export.rows import load_rows
from export.runtimes.pytorch_reference import (
    check_corners,
    checked_sizes,
    error_of,
    inputs_at,
    run_torch,
    traced_sizes,
)
from export.stages import to_onnx
from export.stages.to_onnx import export_model
from tests.conftest import RunHere
from tests.tiny_model import FIXED, TOML, tiny, with_outputs

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_build")]


def test_the_graph_has_the_signatures_names_types_and_axes(built: Path) -> None:
    graph = onnx.load(built / "build" / "text" / "fp32" / "model.onnx").graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    assert shapes["input_ids"] == shapes["attention_mask"] == ["batch", "length"]
    assert shapes["embedding"] == ["batch", 32]


def test_axes_with_equal_ends_get_different_sizes_between() -> None:
    data = DeploymentSpec.load("tests/models/text").model_dump(mode="json")
    data["axes"]["length"] = data["axes"]["batch"]
    between = checked_sizes(DeploymentSpec.model_validate_json(json.dumps(data)))[2]
    assert between["batch"] != between["length"]


@pytest.mark.parametrize(
    ("ends", "traced", "checked"),
    [((1, 8, 8), 7, [1, 8, 4]), ((4, 4, 9), 5, [4, 9, 6]), ((1, 2, 3), 2, [1, 3]), ((1, 1, 2), 2, [1]), ((3, 3, 3), 3, [3]), ((2, 8, 22), 8, [2, 22, 13])],
    ids=["opt is the largest", "opt is the smallest", "three sizes", "two sizes", "one size", "even ends: an odd one"],
)  # fmt: skip
def test_it_is_traced_between_the_ends_if_there_are_sizes(
    ends: tuple[int, int, int], traced: int, checked: list[int]
) -> None:
    data = DeploymentSpec.load("tests/models/image").model_dump(mode="json")
    data["axes"]["batch"] = dict(zip(("min", "opt", "max"), ends, strict=True))
    spec = DeploymentSpec.model_validate_json(json.dumps(data))
    assert traced_sizes(spec)["batch"] == traced
    assert [sizes["batch"] for sizes in checked_sizes(spec)] == checked


def test_json_has_shapes_errors_and_rows(tmp_path: Path, run_here: RunHere) -> None:
    tiny(tmp_path)
    result = json.loads(run_here("to-onnx", "--models", str(tmp_path), "--model", "tiny", "--json").stdout)
    assert [check["sizes"]["batch"] for check in result["checks"]] == [1, 9, 5]
    assert result["rows"] == {"calibration": 12, "evaluation": 12}
    assert len(load_rows(tmp_path / "build" / "tiny" / "evaluation.npz")) == 12


def test_the_graph_is_compared_where_forward_takes_another_path(tmp_path: Path) -> None:
    branch = "y = self.line(x); return {} if x.shape[0] == 7 else y"
    result = export_model(tiny(tmp_path / "same", body=branch.format("y + 0")))
    assert [check["sizes"]["batch"] for check in result["checks"]] == [1, 9, 5, 7]
    message = r"output 'y' at batch 7 is off by .* looks at a size, the graph has only the path of batch 4: "
    with pytest.raises(GateFailed, match=message):
        export_model(tiny(tmp_path / "other", body=branch.format("2 * y")))
    body = "y = self.line(x); return y if 8 % (x.shape[0] - 7) == 1 else y + 0"
    with pytest.raises(InputError, match=r"forward\(x: float32 \[7, 8\]\).*ZeroDivisionError"):
        export_model(tiny(tmp_path / "zero", body=body))


def test_the_error_for_a_row_without_a_key_says_that_it_is_nan(tmp_path: Path) -> None:
    attention = "torch.nn.functional.scaled_dot_product_attention(y, y, y, torch.full((4, 4), -torch.inf))"
    with pytest.raises(
        GateFailed, match=r"off by inf .* NaN or Inf where the other is not: .* let each row keep one key"
    ):
        export_model(tiny(tmp_path, body=f"y = x.view(-1, 4, 2); return {attention}.flatten(1)"))


def test_a_value_baked_in_at_the_only_shape_is_found_on_other_inputs(tmp_path: Path) -> None:
    source = tiny(tmp_path, toml=FIXED)
    model, rows = source.load(), list(source.rows("evaluation", 12))
    baked = run_torch(source.spec, model, inputs_at(source.spec, rows, traced_sizes(source.spec)))
    with pytest.raises(GateFailed, match=r"output 'y' at batch 4 is off by .* relative to PyTorch"):
        check_corners(source.spec, model, lambda inputs: baked, "model.onnx", rows)


def test_the_error_for_a_ranking_says_what_to_do_about_equal_scores(tmp_path: Path) -> None:
    head, tail = TOML.split("[outputs.y]")
    toml = f"{head}[outputs.y]{tail.replace('float32', 'int64', 1)}"
    source = tiny(tmp_path, toml=toml, body="return self.line(x).argsort(-1)")
    model, rows = source.load(), list(source.rows("evaluation", 12))
    with pytest.raises(
        GateFailed, match=r"if equal values are ranked, .* stable=True; .* set common in \[parity.fp32\]"
    ):
        check_corners(source.spec, model, lambda inputs: {"y": np.zeros(inputs["x"].shape, np.int64)}, "graph", rows)


def test_attention_with_a_bias_for_each_row_without_heads_in_windows_or_without_a_key_is_exported(
    tmp_path: Path,
) -> None:
    body = """x = torch.nn.functional.scaled_dot_product_attention(*3 * [x.view(-1, 4, 2)]).flatten(1)
        heads = self.line(x).view(x.shape[0], 4, 2, 1).transpose(1, 2)
        bias = self.line.weight.reshape(1, 4, 4, 4)[:, :2].expand(x.shape[0], -1, -1, -1)
        found = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias)
        keyless = heads > heads.mean(-2, keepdim=True)
        found = found + torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=keyless)
        padding = torch.where(x[:, None, None, :4] > 9, 0.0, -torch.inf)
        found = found + torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=padding)
        windows, seen = heads.unflatten(2, (2, 2)).transpose(1, 2), keyless[:, :, None, :2]
        found[:, :, :2] += torch.nn.functional.scaled_dot_product_attention(windows, windows, windows, seen)[:, 0]
        return found.transpose(1, 2).contiguous().view(x.shape[0], 8)"""
    assert len(export_model(tiny(tmp_path, body=body))["checks"]) == 3


def test_rows_of_a_batch_may_influence_one_another_if_it_is_one_request(tmp_path: Path) -> None:
    body = "return self.line(x) - self.line(x).mean(0)"
    export_model(tiny(tmp_path / "fixed", toml=FIXED, body=body))
    joined = FIXED.replace("min = 4\nopt = 4\nmax = 4", "min = 2\nopt = 4\nmax = 8")
    with pytest.raises(InputError, match=r"'y' of 2 row\(s\) alone is off by .* in a batch of 4"):
        export_model(tiny(tmp_path / "joined", toml=joined, body=body))
    ranks = TOML.replace('[outputs.y]\ndtype = "float32"', '[outputs.y]\ndtype = "int64"')
    export_model(tiny(tmp_path / "ranks", toml=ranks, body="return self.line(x).argsort(1)"))
    with pytest.raises(InputError, match=r"'y' of 1 row\(s\) alone is off by .* nearly equal scores are ranked"):
        export_model(tiny(tmp_path / "joined ranks", toml=ranks, body="return (x - x.mean(0)).argsort(1)"))


def test_a_constant_output_is_made_by_a_node_since_autocast_would_lose_it(tmp_path: Path) -> None:
    export_model(tiny(tmp_path, toml=FIXED, body="return self.line.weight[:4]"))
    graph = onnx.load(tmp_path / "build" / "tiny" / "fp32" / "model.onnx").graph
    assert [node.op_type for node in graph.node] == ["Identity"]


@pytest.mark.parametrize(
    "body",
    [
        "return self.line(x.reshape(4, 8))",
        "return self.line(x[:4].repeat(x.shape[0] // 4, 1)) * torch.tensor(x.shape[0])",
    ],
    ids=["reshape to the traced batch", "values that depend on the traced batch"],
)
def test_a_size_baked_into_forward_is_refused(tmp_path: Path, body: str, capfd: pytest.CaptureFixture[str]) -> None:
    source = tiny(tmp_path, body=body)
    with pytest.raises((InputError, GateFailed)):
        export_model(source)
    assert "onnxruntime" not in capfd.readouterr().err  # no log beside the error
    assert not (tmp_path / "build" / "tiny" / "fp32" / "model.onnx").exists()


@pytest.mark.parametrize(
    "body",
    [
        "y = self.recurrent(x)[0]; return self.attention(y, y, y, need_weights=False)[0].mean(1)",
        "return x.mean(1) * -(-x.shape[1] // 4)",
        "return x.mean(1) + torch.linspace(1, 3, x.shape[1]).square().sum()",
        "return x.mean(1) / math.sqrt(x.shape[1])",
        "return x.mean(1).index_put((torch.arange(len(x)), x[:, 0, 0].long() % 8), torch.ones(()), accumulate=True)",
        "return x.mean(1) + (x * 9 % x.shape[1] + (x * 9).long() % x.shape[1]).mean(1)",
        "pool = torch.nn.MaxPool1d(3, 2, 1, ceil_mode=True); return pool(x.mT).mean(2) + x.mean(1)",
        "return torch.nn.AdaptiveMaxPool2d((None, 1))(x.mT[:, None]).flatten(1)",
        "return torch.nn.AdaptiveAvgPool2d((1, None))(x[:, None]).flatten(1)",
        "return self.longer(x[:, ::2].mT, output_size=x.shape[1:2]).mean(2)",
    ],
    ids=[
        *(
            "after a recurrent layer",
            "rounded up",
            "as a number of steps",
            "under a root",
            "as the len",
            "as a divisor",
        ),
        *("in windows", "in a row of maxima", "in a row of means", "as a size of a convolution"),
    ],
)
def test_the_length_of_a_sequence_stays_dynamic(tmp_path: Path, body: str) -> None:
    shape = 'shape = ["batch", "length", 8]'
    toml = TOML.replace('shape = ["batch", 8]', shape, 1) + "[axes.length]\nmin = 1\nopt = 5\nmax = 12\n"
    code = """
import math

def load():
    torch.manual_seed(0)
    model = Tiny()
    model.recurrent = torch.nn.LSTM(8, 8, batch_first=True)
    model.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    model.longer = torch.nn.ConvTranspose1d(8, 8, 3, 2, 1)
    return model

def samples(split):
    yield {"x": np.random.default_rng(len(split)).random((1, 7, 8), np.float32)}
"""
    assert len(export_model(tiny(tmp_path, toml=toml, body=body, code=code))["checks"]) == 3


def test_names_of_the_signature_never_clash_with_those_inside(tmp_path: Path) -> None:
    """Inner values and a weight have such names. One tensor is returned twice; so is an input, which forward changes."""
    inputs, outputs = ["add", "line.weight"], ["relu", "linear", "again", "add_too"]
    toml = with_outputs(*outputs).replace("[inputs.x]", "[inputs.add]")
    toml = toml.replace("[outputs", '[inputs."line.weight"]\ndtype = "float32"\nshape = ["batch", 8]\n[outputs', 1)
    code = """
def forward(self, x, *more):
    x += 1
    line = self.line(x)
    return line.relu() + more[0], line, line, x
Tiny.forward = forward
_own = samples
def samples(split):
    for row in _own(split):
        yield {"add": row["x"], "line.weight": row["x"] + 1}
"""
    result = export_model(tiny(tmp_path, toml=toml, code=code))
    assert len(result["checks"]) == 3
    assert str(tmp_path).encode() not in Path(result["path"]).read_bytes()  # no lines of model.py, which is not served
    graph = onnx.load(result["path"]).graph
    assert [[value.name for value in side] for side in (graph.input, graph.output)] == [inputs, outputs]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return self.line(x) if x.sum() > 0 else x", r"model\.py:11: cannot be exported: .* use torch.where .* torch.cond"),
        ("return torch.nn.functional.dropout(self.line(x))", "called twice .* draws at random or keeps state"),
        ("self.calls = getattr(self, 'calls', 0) + 1; return self.line(x) * self.calls", "draws at random or keeps state"),
        ("return self.line(x).view(1, 8)", r"model.py:11: forward\(x: float32 \[4, 8\]\).*RuntimeError: shape"),
        ("return self.line(x).squeeze()", r"forward returned float32 \[8\]; .* here \[1, 8\]"),
        ("return self.line(x).sum()", r"forward returned float32 \[\]; deploy.toml says"),
        ("return x.scatter_reduce(1, x.long() % 8, self.line(x), 'mean')", "model.py: ONNX has no scatter_reduce with 'mean', .* divide the one with 'sum'"),
        ("return self.line(x) + torch.linalg.svd(x.unsqueeze(1))[1]", r"model.py:11: cannot be exported: .* no ONNX operator for aten._linalg_svd: compute it in"),
        ("return torch.nn.functional.linear(x.bfloat16(), self.line.weight.bfloat16()).float()", r"model.py: ONNX Runtime cannot load it: .* let it use float32"),
        ("return self.line(x) + (x > 0).sort(1).values", r"model.py: the graph is not valid ONNX: .*TopK.* int32 in place of bool; see .*model.py:11$"),
        ("return self.line(torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 9))", r"model.py:11: cannot be exported: aten.fake_quantize_per_tensor_affine_cachemask.default$"),
        ("return self.line(x) - self.line(x).mean(0)", r"'y' of 1 row\(s\) alone is off by .* set \[axes.batch\] to min = opt"),
        ("return self.lime(x)", "model.py:11: .*AttributeError: 'Tiny' object has no attribute 'lime'"),
        ("return x, x", r"forward returned 2 value\(s\) .* names the outputs y"),
        ("return x.double()", r"output 'y': forward returned float64"),
        ("return x.bfloat16()", r"output 'y': forward returned bfloat16 \[4, 8\]; deploy.toml says float32"),
        ("return 3", r"forward returned 1 value\(s\) \(int\)"),
    ],
    ids=["branch", "random", "state", "batch of 1", "batch of 1 squeezed", "no batch", "mean", "operator", "no kernel", "no such type", "an operator without a cause", "rows that mix", "bug", "too many", "dtype", "no type of numpy", "no tensor"],
)  # fmt: skip
def test_a_forward_that_cannot_be_traced_is_one_error_line(
    tmp_path: Path, body: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=message):
        export_model(tiny(tmp_path, body=body))
    assert "def forward" not in capfd.readouterr().err


def test_long_inputs_are_extended_with_other_samples_so_that_no_score_repeats() -> None:
    spec = DeploymentSpec.load("tests/models/text")
    rows = [{name: np.arange(start, start + 5)[None] for name in spec.inputs} for start in (0, 10, 20, 30)]
    inputs = inputs_at(spec, rows, {"batch": 2, "length": 12})
    assert inputs["input_ids"].tolist() == [
        [*range(5), *range(10, 15), 20, 21],
        [*range(10, 15), *range(20, 25), 30, 31],
    ]
    assert np.array_equal(inputs["input_ids"], inputs["attention_mask"])


def test_both_axes_of_an_image_are_extended_with_other_samples(tmp_path: Path) -> None:
    image = '["batch", "height", "width"]'
    axes = "".join(f"[axes.{name}]\nmin = 2\nopt = 3\nmax = 8\n" for name in ("height", "width"))
    spec = tiny(tmp_path, toml=TOML.replace('["batch", 8]', image) + axes).spec
    rows = [{"x": 100 * each + np.arange(2 * (2 + each)).reshape(1, 2 + each, 2)} for each in range(6)]
    larger = inputs_at(spec, rows, {"batch": 1, "height": 5, "width": 4})["x"][0]
    assert larger.tolist()[:2] == [[0, 1, 100, 101], [2, 3, 102, 103]]
    assert len(np.unique(larger)) == 20
    smaller = inputs_at(spec, rows[3:], {"batch": 2, "height": 2, "width": 1})["x"]
    assert smaller.tolist() == [[[300], [302]], [[400], [402]]]


LENGTHS = (
    TOML.replace('float32"\nshape = ["batch", 8]', 'int64"\nshape = ["batch", "length"]', 1).replace(
        "[outputs", '[inputs.lengths]\ndtype = "int64"\nshape = ["batch", 1]\n[outputs'
    )
    + "[axes.length]\nmin = 2\nopt = 8\nmax = 20\n"
)
LAST_OF = """
def forward(self, x, lengths):
    return self.line(x.unsqueeze(-1).expand(-1, -1, 8).float().gather(1, (lengths - 1)[..., None].expand(-1, 1, 8))[:, 0])
Tiny.forward = forward

def samples(split):
    for length in {lengths}:
        yield {{"x": np.full((1, length), length + len(split)), "lengths": np.array([[length]])}}
"""


def test_a_sample_is_not_cut_below_the_positions_that_its_values_point_to(tmp_path: Path) -> None:
    source = tiny(tmp_path, toml=LENGTHS, code=LAST_OF.format(lengths="(20, 2, 7, 15, 3)"))
    rows = list(source.rows("evaluation", 5))
    assert inputs_at(source.spec, rows, {"batch": 3, "length": 8})["lengths"].ravel().tolist() == [2, 7, 3]
    model = source.load()
    checks = check_corners(source.spec, model, partial(run_torch, source.spec, model), "model.onnx", rows)
    assert [check["sizes"]["length"] for check in checks] == [2, 20, 11]


def test_a_sample_that_forward_does_not_take_is_found_before_a_later_stage_runs_it(tmp_path: Path) -> None:
    code = """
class Picky(Tiny):
    def forward(self, x):
        if not torch.compiler.is_exporting() and bool((x > 90).any()):
            raise IndexError("index out of range")
        return self.line(x)

def load():
    return Picky()

def samples(split):
    for each in range(40):
        yield {"x": np.full((1, 8), 99 if each == 17 and split == "calibration" else each % 7, np.float32) + len(split) / 64}
"""
    with pytest.raises(InputError, match=r"model.py:25: forward\(.*IndexError"):
        export_model(tiny(tmp_path, code=code))


def test_if_every_sample_would_be_cut_the_error_says_what_to_do(tmp_path: Path) -> None:
    source = tiny(tmp_path, toml=LENGTHS, code=LAST_OF.format(lengths="(20, 9, 15)"))
    with pytest.raises(InputError, match=r"\[4, 8\].*index 19 is out of bounds .* or clamp it in forward"):
        export_model(source)


def test_the_graph_has_the_current_weights_of_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """load() reads a file that no key of the cache contains."""
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(cache.STAGE_KEYS, '{"": "k"}')
    file = tmp_path / "scale"
    code = f"\n_own = load\ndef load():\n    model = _own()\n    model.scale = float(np.loadtxt({str(file)!r}))\n"
    source = tiny(tmp_path, body="return self.line(x) * self.scale", code=code + "    return model\n")
    for scale in ("1", "3"):
        file.write_text(scale)
        graph = onnx.load(export_model(source)["path"])
        x = np.ones((2, 8), np.float32)
        served: Any = ReferenceEvaluator(graph).run(["y"], {"x": x})
        np.testing.assert_allclose(served[0], run_torch(source.spec, source.load(), {"x": x})["y"], rtol=1e-5)
    assert len(list((tmp_path / "cache").glob("*/model.onnx"))) == 1


def test_the_error_for_a_model_that_loses_digits_names_the_key_that_allows_it(tmp_path: Path) -> None:
    body = "there = (x + 3e3).repeat(1, 32) @ self.mix; return self.line(x) + (there @ self.mix.T)[:, :8] - 3e3 - x"
    code = "\n_load = load\ndef load():\n    model = _load()\n"
    code += "    model.mix = torch.nn.Buffer(torch.linalg.qr(torch.randn(256, 256))[0])\n    return model\n"
    source = tiny(tmp_path, toml=TOML + "[parity.fp32]\nworst_error = 0.1\n", body=body, code=code)
    graph = Path(export_model(source)["path"])
    strict = source.spec.model_copy(update={"parity": ParitySpec()})
    with pytest.raises(GateFailed, match=r"set \[parity.fp32\] in deploy.toml"):
        to_onnx._check(strict, source.load(), list(source.rows("evaluation", 12)), graph)


def test_nan_counts_as_an_infinite_error_unless_pytorch_gives_it_too() -> None:
    clean, broken = np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32)
    assert error_of(broken, clean) == float("inf")
    assert error_of(clean, broken) == float("inf")
    assert error_of(broken, broken) == 0
