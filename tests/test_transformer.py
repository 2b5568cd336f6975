"""The Transformer's attention, padding and export; init_weights on any module."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from deepseek.config import AdviceWarning, TransformerConfig
from deepseek.spec import InputError
from deepseek.transformer import Scheme, Transformer, init_weights


def tiny(**changes: Any) -> Transformer:
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdviceWarning)
        config = TransformerConfig(**({"vocab_size": 20, "max_length": 12} | sizes | changes))
    torch.manual_seed(0)
    return Transformer(config).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 20, (3, 8), generator=torch.Generator().manual_seed(0))


def test_a_causal_token_does_not_see_what_comes_after_it(ids: Tensor) -> None:
    model, other = tiny(causal=True), ids.clone()
    other[:, 5:] = 7
    torch.testing.assert_close(model(ids)[:, :5], model(other)[:, :5])
    assert not torch.allclose(model(ids)[:, 5:], model(other)[:, 5:])


def test_without_causal_every_token_sees_every_other(ids: Tensor) -> None:
    model, other = tiny(), ids.clone()
    other[:, -1] = 7
    assert (model(ids) - model(other)).abs().amax(dim=(0, 2)).min() > 0


def test_padding_changes_nothing_for_the_tokens_before_it(ids: Tensor) -> None:
    model = tiny()
    padded = nn.functional.pad(ids, (0, 4))
    torch.testing.assert_close(model(padded)[:, :8], model(ids))


def test_an_explicit_mask_does_what_the_padding_id_does(ids: Tensor) -> None:
    model, padded = tiny(), ids.clone()
    padded[:, 6:] = 0
    torch.testing.assert_close(model(padded, (padded != 0).long()), model(padded))


def test_no_padding_id_takes_the_maskless_path_and_agrees_with_the_mask(ids: Tensor) -> None:
    model = tiny(causal=True, padding_id=None)
    torch.testing.assert_close(model(ids), model(ids, torch.ones_like(ids)))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "encoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_row_of_nothing_but_padding_gives_finite_numbers_and_gradients(causal: bool, dtype: torch.dtype) -> None:
    model = tiny(causal=causal).to(dtype)
    hidden = model(torch.zeros(2, 6, dtype=torch.long))
    hidden.float().sum().backward()
    assert hidden.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_gradient_checkpointing_gives_the_same_gradients(ids: Tensor) -> None:
    gradients = []
    for switch in (False, True):
        model = tiny(causal=True).train()
        model.gradient_checkpointing = switch
        torch.manual_seed(1)  # of dropout
        model(ids).square().sum().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_sequence_longer_than_the_model_is_one_line(ids: Tensor) -> None:
    with pytest.raises(InputError, match="16 tokens; the model's max_length is 12"):
        tiny()(ids.repeat(1, 2))


@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg")  # torch.export pickles its own tree specs
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "encoder"])
def test_the_exported_graph_agrees_at_any_batch_and_length_also_in_fp16(causal: bool, tmp_path: Path) -> None:
    model, path = tiny(causal=causal), tmp_path / "model.onnx"
    axes = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("sequence", min=1, max=12)}
    example = (torch.randint(0, 20, (2, 5)),)
    torch.onnx.export(model, example, path, dynamo=True, opset_version=20, dynamic_shapes=(axes,), verbose=False)
    half = tiny(causal=causal).half()
    torch.onnx.export(half, example, tmp_path / "half.onnx", dynamo=True, opset_version=20, dynamic_shapes=(axes,))
    onnx.checker.check_model(path)
    for file, tolerance in ((path, 1e-5), (tmp_path / "half.onnx", 2e-2)):
        session = onnxruntime.InferenceSession(file)
        for shape in ((1, 1), (8, 12), (3, 7)):
            x = torch.randint(0, 20, shape)
            x[0] = 0
            (hidden,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            np.testing.assert_allclose(hidden.astype(np.float32), model(x).detach(), atol=tolerance)


def bound(weight: Tensor) -> float:
    """Largest absolute value; of a uniform distribution it lies just under the bound."""
    return float(weight.detach().abs().max())


def test_linear_layers_are_xavier_uniform_with_zero_biases() -> None:
    layer = nn.Linear(300, 100)
    init_weights(nn.Sequential(layer, nn.GELU(), nn.ReLU()))
    assert bound(layer.weight) == pytest.approx((6 / 400) ** 0.5, rel=0.01)
    assert not layer.bias.any()


@pytest.mark.parametrize("scheme", ["auto", "kaiming_uniform"])
def test_a_layer_that_feeds_a_relu_is_kaiming(scheme: Scheme) -> None:
    first, last = nn.Conv2d(30, 10, 3), nn.Linear(300, 100)
    init_weights(nn.Sequential(first, nn.BatchNorm2d(10), nn.ReLU(), nn.Flatten(), last), scheme)
    assert bound(first.weight) == pytest.approx((6 / 270) ** 0.5, rel=0.01)
    expected = (6 / 400) if scheme == "auto" else (6 / 300)
    assert bound(last.weight) == pytest.approx(expected**0.5, rel=0.01)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell], ids=lambda kind: kind.__name__)
def test_the_forget_bias_of_a_recurrent_layer_is_one_in_sum_and_all_others_zero(kind: type[nn.Module]) -> None:
    deep: dict[str, Any] = {} if kind.__name__.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    layer = init_weights(kind(4, 5, **deep))
    weights = dict(layer.named_parameters())
    summed = [bias + weights[name.replace("ih", "hh")] for name, bias in weights.items() if name.startswith("bias_ih")]
    assert len(summed) == (4 if deep else 1)
    for total in summed:
        assert total[5:10].tolist() == [1] * 5  # forget gate of an LSTM, update gate of a GRU
        assert float(total.detach().sum()) == 5


def test_an_lstm_that_starts_so_keeps_three_quarters_of_its_cell() -> None:
    cell = init_weights(nn.LSTMCell(3, 4))
    for name, weight in cell.named_parameters():
        if name.startswith("weight"):
            nn.init.zeros_(weight)
    _, kept = cell(torch.zeros(1, 3), (torch.zeros(1, 4), torch.ones(1, 4)))
    torch.testing.assert_close(kept, torch.full((1, 4), 1.0).mul(torch.tensor(1.0).sigmoid()))


def test_init_weights_takes_modules_with_every_kind_of_odd_layer() -> None:
    embedding, norm = nn.Embedding(5, 4, padding_idx=2), nn.LayerNorm(4)
    odd = nn.ModuleList(
        [
            nn.Linear(3, 4, bias=False),
            embedding,
            nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
            nn.MultiheadAttention(4, 2, bias=False),
            nn.LSTM(3, 4, proj_size=2, bias=False),
            nn.RNN(3, 4),
            nn.Bilinear(2, 3, 4),
            norm,
        ]
    )
    assert init_weights(odd) is odd
    assert not embedding.weight[2].any()
    assert bool((norm.weight == 1).all())
    assert init_weights(nn.Identity())


def test_the_padding_row_of_an_embedding_that_shares_its_weights_is_zero() -> None:
    embedding, head = nn.Embedding(5, 4, padding_idx=2), nn.Linear(4, 5)
    head.weight = embedding.weight
    init_weights(nn.ModuleList([embedding, head]))
    assert embedding.weight.detach().any(dim=1).tolist() == [True, True, False, True, True]


def test_a_weight_that_is_parametrized_is_set_through_it() -> None:
    torch.manual_seed(0)
    bag, normed = nn.EmbeddingBag(50, 50, padding_idx=2), parametrizations.weight_norm(nn.Linear(50, 50))
    recurrent = parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
    positive: Any = nn.Linear(50, 50)
    parametrize.register_parametrization(positive, "weight", nn.Softplus())  # has no inverse
    spectral: Any = parametrizations.spectral_norm(nn.Linear(50, 50)).eval()
    layers = nn.ModuleList([bag, normed, recurrent, positive, spectral])
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.fill_(3)
    init_weights(layers)
    for weight in (bag.weight, normed.weight, positive.parametrizations.weight.original):
        assert bound(weight) == pytest.approx((6 / 100) ** 0.5, rel=0.01)
    assert not bag.weight[2].any()
    assert bound(recurrent.weight_hh_l0) <= (6 / 8) ** 0.5
    assert torch.linalg.matrix_norm(spectral.weight, 2).item() == pytest.approx(1, rel=0.1)
    assert not spectral.parametrizations.training


def test_init_weights_says_what_it_does_not_know() -> None:
    with pytest.raises(InputError, match="seen 'orthogonal'; allowed: auto, xavier_uniform, kaiming_uniform"):
        init_weights(nn.Linear(1, 1), "orthogonal")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="LazyLinear has no shape yet"):
        init_weights(nn.LazyLinear(3))
    with pytest.raises(InputError, match="weight of Linear is computed by a hook"):
        init_weights(prune.identity(nn.Linear(2, 2), "weight"))


def test_a_relu_transformer_is_kaiming_where_the_relu_is_fed_and_xavier_elsewhere() -> None:
    weights = dict(tiny(activation="relu", hidden_size=64, intermediate_size=256).named_parameters())
    assert bound(weights["blocks.0.ffn.0.weight"]) == pytest.approx((6 / 64) ** 0.5, rel=0.01)
    assert bound(weights["blocks.0.ffn.3.weight"]) == pytest.approx((6 / 320) ** 0.5, rel=0.01)


def test_a_changed_copy_of_a_config_is_checked_again() -> None:
    with pytest.raises(InputError, match="hidden_size 16 is not divisible by num_attention_heads 5"):
        dataclasses.replace(tiny().config, num_attention_heads=5)
