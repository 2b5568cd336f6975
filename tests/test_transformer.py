"""The Transformer's attention, padding and export; init_weights on any module."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from deepseek.config import Initialization, TransformerConfig
from deepseek.spec import InputError
from deepseek.transformer import Transformer, init_weights


def tiny(**changes: Any) -> Transformer:
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = TransformerConfig.of_any_size(**({"vocab_size": 20, "max_length": 12} | sizes | changes))
    torch.manual_seed(0)
    return Transformer(config).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 20, (3, 8), generator=torch.Generator().manual_seed(0))


def test_a_causal_token_does_not_attend_to_later_tokens(ids: Tensor) -> None:
    model, other = tiny(causal=True), ids.clone()
    other[:, 5:] = 7
    torch.testing.assert_close(model(ids)[:, :5], model(other)[:, :5])
    assert not torch.allclose(model(ids)[:, 5:], model(other)[:, 5:])


def test_padding_does_not_change_the_tokens_before_it(ids: Tensor) -> None:
    model, padded = tiny(), nn.functional.pad(ids, (0, 4))
    torch.testing.assert_close(model(padded)[:, :8], model(ids))
    torch.testing.assert_close(model(padded, (padded != 0).long()), model(padded))
    fused = tiny(causal=True, padding_id=None)  # passes no mask to attention
    torch.testing.assert_close(fused(ids), fused(ids, torch.ones_like(ids)))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "encoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_row_of_padding_only_gives_finite_outputs_and_gradients(causal: bool, dtype: torch.dtype) -> None:
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
        torch.manual_seed(1)  # for dropout
        model(ids).square().sum().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_sequence_longer_than_max_length_is_a_one_line_error(ids: Tensor) -> None:
    with pytest.raises(InputError, match="16 tokens; the model's max_length is 12"):
        tiny()(ids.repeat(1, 2))


@pytest.mark.server
@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg")  # torch.export pickles its own tree specs
@pytest.mark.parametrize(
    ("causal", "dtype", "tolerance"),
    [(False, torch.float32, 1e-5), (True, torch.float16, 2e-2)],
    ids=["encoder", "causal in fp16"],
)
def test_the_exported_graph_equals_the_model_at_any_batch_and_length(
    causal: bool, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    path, example = tmp_path / "model.onnx", (torch.randint(0, 20, (2, 5)),)
    model, exported = tiny(causal=causal, num_layers=1), tiny(causal=causal, num_layers=1).to(dtype)
    axes = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("sequence", min=1, max=12)}
    torch.onnx.export(exported, example, path, dynamo=True, opset_version=20, dynamic_shapes=(axes,), verbose=False)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path)
    for shape in ((1, 1), (8, 12), (3, 7)):
        x = torch.randint(0, 20, shape)
        x[0] = 0
        (hidden,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(hidden.astype(np.float32), model(x).detach(), atol=tolerance)


def bound(weight: Tensor) -> float:
    """Largest absolute value; for a uniform distribution, it is just below the bound."""
    return float(weight.detach().abs().max())


@pytest.mark.parametrize("scheme", ["auto", "kaiming_uniform", "xavier_uniform"])
def test_a_layer_that_feeds_a_relu_is_kaiming_all_others_xavier(scheme: Initialization) -> None:
    first, last = nn.Conv2d(30, 10, 3), nn.Linear(300, 100)
    layers = nn.Sequential(first, nn.BatchNorm2d(10), nn.ReLU(), nn.Flatten(), last, nn.GELU(), nn.ReLU())
    init_weights(layers, scheme)
    kaiming, xavier = scheme != "xavier_uniform", scheme != "kaiming_uniform"
    assert bound(first.weight) == pytest.approx((6 / (270 if kaiming else 270 + 90)) ** 0.5, rel=0.01)
    assert bound(last.weight) == pytest.approx((6 / (400 if xavier else 300)) ** 0.5, rel=0.01)
    assert not last.bias.any()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell], ids=lambda kind: kind.__name__)
def test_the_forget_biases_of_a_recurrent_layer_add_up_to_one_and_all_others_are_zero(kind: type[nn.Module]) -> None:
    deep: dict[str, Any] = {} if kind.__name__.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    layer = init_weights(kind(4, 5, **deep))
    weights = dict(layer.named_parameters())
    summed = [bias + weights[name.replace("ih", "hh")] for name, bias in weights.items() if name.startswith("bias_ih")]
    assert len(summed) == (4 if deep else 1)
    for total in summed:
        assert total[5:10].tolist() == [1] * 5  # forget gate of an LSTM, update gate of a GRU
        assert float(total.detach().sum()) == 5


def test_init_weights_supports_every_kind_of_layer() -> None:
    embedding, head, norm = nn.Embedding(5, 4, padding_idx=2), nn.Linear(4, 5), nn.LayerNorm(4)
    head.weight = embedding.weight
    attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3), nn.MultiheadAttention(4, 2, bias=False)
    recurrent = nn.LSTM(3, 4, proj_size=2, bias=False), nn.RNN(3, 4)
    layers = nn.ModuleList(
        [nn.Linear(3, 4, bias=False), embedding, head, *attention, *recurrent, nn.Bilinear(2, 3, 4), norm]
    )
    assert init_weights(layers) is layers
    assert bool((norm.weight == 1).all())
    assert embedding.weight.detach().any(dim=1).tolist() == [True, True, False, True, True]


def test_init_weights_refuses_unknown_schemes_lazy_layers_and_computed_weights() -> None:
    with pytest.raises(InputError, match="seen 'orthogonal'; allowed: auto, xavier_uniform, kaiming_uniform"):
        init_weights(nn.Linear(1, 1), "orthogonal")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="LazyLinear has no shape yet"):
        init_weights(nn.LazyLinear(3))
    for layer in (parametrizations.weight_norm(nn.Linear(2, 2)), prune.identity(nn.Linear(2, 2), "weight")):
        with pytest.raises(InputError, match=r"weight of .*Linear is computed from other tensors"):
            init_weights(layer)
    with pytest.raises(InputError, match=r"weight_hh_l0 of .*LSTM is computed from other tensors"):
        init_weights(parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0"))
