"""Modules and operators that PyTorch's exporter lacks or translates wrongly match PyTorch after the export."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import onnx
import pytest
from torch.onnx._internal.exporter._capture_strategies import TorchExportStrictStrategy

from export.stages.to_onnx import export_model
from tests.tiny_model import tiny, with_outputs

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_build", "reasons")]


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prints why the exporter's second strategy, TorchDynamo, failed: the exporter only reports the first one's error."""

    def failed(strategy: TorchExportStrictStrategy, model: object, error: Exception) -> None:
        traceback.print_exception(error, file=sys.__stderr__)

    monkeypatch.setattr(TorchExportStrictStrategy, "_failure", failed)


ENCODER = """
def load():
    torch.manual_seed(0)
    model = Tiny()
    layer = torch.nn.TransformerEncoderLayer(2, 1, 8, batch_first=True)
    model.encoder = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    model.mask = torch.nn.Transformer.generate_square_subsequent_mask(4)
    return model
"""
BAGS = {
    "sum": "embedding_bag(ids, self.line.weight, mode='sum')",
    "mean": "embedding_bag(ids, self.line.weight)",
    "max": "embedding_bag(self.line.weight, ids, mode='max')",  # the order of old versions
    **{
        f"padded_{mode}": f"embedding_bag(ids, self.line.weight, mode='{mode}', padding_idx=0)"
        for mode in ("sum", "mean", "max")
    },
}
LOOKS = {
    "causal_mask": "self.encoder(x.view(-1, 4, 2), mask=self.mask).flatten(1)",
    "distribution": "torch.distributions.Normal(x, 1.0).log_prob(self.line(x))",
}
OPERATORS = {
    "angle": "torch.atan2(torch.zeros_like(x), x)",
    "distance": "torch.cdist(x, self.line.weight)",
    "distance_by_products": "torch.cdist(x.repeat(1, 4), self.line.weight.repeat(1, 4))",
    "manhattan": "torch.cdist(x, self.line.weight, p=1.0)",
    "both": "torch.logaddexp(x * 1000, self.line(x) * 1000)",
    "both_in_double": "torch.logaddexp(x.double() * 1000, self.line(x).double()).float()",
    "log_odds_in_double": "torch.nn.functional.logsigmoid(x.double() * 1000).float()",
    "log_odds": "torch.nn.functional.logsigmoid(x * 1000)",
    "rest": "(midnight - torch.div(midnight, 86400, rounding_mode='trunc') * 86400).float()",
    "weekday": "(midnight.div(86400, rounding_mode='floor') % 7).float()",
    "place": "torch.searchsorted(x.sort(stable=True).values, self.line(x)).float()",
    "spectrum": "torch.view_as_real(stft(x, 6, 2, 2, self.line.weight[0, :2], normalized=True)).flatten(1)[:, 10:18]",
    "spectrum_in_double": "stft(x.double(), 8, window=self.line.weight[0].double()).abs()[:, 0, :1].float() + x",
    "signal": "torch.istft(stft(x, 4, 2, window=self.line.weight[0, :4].abs() + 1), 4, 2, length=8)",
    "read": "x[torch.arange(x.shape[0]).int()[:, None], ids.int()]",
    "spectrum_of_all": "stft(x.flatten(), 8, 8, center=False, onesided=False).real.T",
}


@pytest.mark.filterwarnings("ignore:A window was not provided|Argument order of nn.functional.embedding_bag")
@pytest.mark.parametrize(
    ("ids", "more"),
    [("x.abs().long()", LOOKS | OPERATORS), ("torch.from_numpy(x.abs().long().numpy())", {})],
    ids=["traced", "which the exporter traces in another way"],
)
def test_modules_that_look_at_values_and_operators_of_our_own_are_exported_without_loops(
    tmp_path: Path, ids: str, more: dict[str, str]
) -> None:
    bags = {name: f"torch.nn.functional.{bag}" for name, bag in BAGS.items()}
    midnight = "((x * 999).long() + 20000) * 86400 - 1"  # seconds; float32 takes it for the next day
    setup = f"ids = {ids}.clamp(max=7); midnight = {midnight}"
    setup += "; stft = partial(torch.stft, return_complex=True)" if more else ""
    body = f"{setup}; return {', '.join((bags | more).values())}"
    source = tiny(
        tmp_path, toml=with_outputs(*bags, *more), body=body, code=f"from functools import partial\n{ENCODER}"
    )
    assert len(export_model(source)["checks"]) == 3
    graph = onnx.load(tmp_path / "build" / "tiny" / "fp32" / "model.onnx").graph
    operators = [node.op_type for node in graph.node]
    assert not {"Loop", "SequenceEmpty"} & {*operators}
    assert operators.count("STFT") == ("spectrum_in_double" in more)  # ONNX Runtime has no convolution in float64
