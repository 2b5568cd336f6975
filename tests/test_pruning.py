"""Structured pruning: what it removes, that it verifies this, and that the rest of the module is unchanged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek.config import TransformerConfig
from deepseek.pruning import PruneConfig, load_pruned, prune_model, save_pruned, weights_digest
from deepseek.pruning.attention import HeadAttention
from deepseek.pruning.distillation import distil
from deepseek.spec import InputError
from deepseek.transformer import Transformer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::deepseek.config.AdviceWarning"),  # small models, on purpose
]
IDS = torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def ours() -> nn.Module:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
    return Transformer(TransformerConfig(**sizes, causal=True))  # type: ignore[arg-type]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def theirs() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.Sequential(nn.Embedding(50, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


class SelfAttention(nn.Module):
    """Like Hugging Face's BERT: the output layer is in another module, and three numbers hold the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 4, 8, 32
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.num_attention_heads, self.attention_head_size)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        q, k = self.turned(q), self.turned(k)
        mixed = (q @ k.transpose(2, 3) / math.sqrt(self.attention_head_size)).softmax(-1) @ v
        return mixed.transpose(1, 2).reshape(*x.shape[:2], self.all_head_size)

    def turned(self, x: Tensor) -> Tensor:
        return x


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.dense = nn.Embedding(50, 32), SelfAttention(), nn.Linear(32, 32)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.norm(x + self.dense(self.attention(x)))
        return x + self.down(F.gelu(self.up(x)))


class Packed(nn.Module):
    """Like vision Transformers: one layer for query, key and value; and a gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.embed, self.qkv, self.out = nn.Embedding(50, 32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.gates, self.down = nn.Linear(32, 128), nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).reshape(*ids.shape, 3, self.num_heads, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(self.joined(F.scaled_dot_product_attention(q, k, v).transpose(1, 2), x))
        gate, up = self.gates(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def joined(self, heads: Tensor, x: Tensor) -> Tensor:
        return heads.flatten(2)


class Residual(nn.Module):
    """Batch norm, a residual, a depthwise and a flattened layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.inner, self.back = nn.Conv2d(16, 24, 3, 1, 1), nn.Conv2d(24, 16, 1)
        self.depthwise, self.wide = nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32 * 16, 10)
        self.norm.running_mean.normal_()  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)))
        x = F.relu(x + self.back(F.relu(self.inner(x))))
        return self.head(F.relu(self.wide(self.depthwise(x))).flatten(1))


@pytest.mark.parametrize(
    ("make", "inputs", "heads", "channels"),
    [
        (ours, IDS, (8, 6), (128, 96)),
        (theirs, IDS, (8, 6), (128, 96)),
        (Bert, IDS, (4, 3), (64, 48)),
        (Packed, IDS, (4, 3), (64, 48)),
        (Residual, IMAGES, (0, 0), (16 + 24 + 32, 56)),  # in blocks of 8
    ],
    ids=["ours", "torch", "bert", "packed", "convolutional"],
)
def test_a_quarter_of_heads_and_channels_is_removed_and_the_result_can_be_saved(
    make: Callable[[], nn.Module], inputs: Tensor, heads: tuple[int, int], channels: tuple[int, int], tmp_path: Path
) -> None:
    model, path = make().eval(), tmp_path / "pruned.safetensors"
    shape, fresh, of = model(inputs).shape, copy.deepcopy(model), weights_digest(model)
    report = prune_model(model, (inputs,))
    assert model(inputs).shape == shape
    assert (report.count("heads"), report.count("channels")) == (heads, channels)
    assert report.parameters == tuple(sum(each.numel() for each in part.parameters()) for part in (fresh, model))
    assert report.flops[1] < report.flops[0]
    save_pruned(model, report, path, of=of)
    assert torch.equal(load_pruned(fresh, path)(inputs), model(inputs))
    with pytest.raises(InputError, match="pruned from other weights"):
        load_pruned(make(), path)


def test_useless_channels_are_removed_first() -> None:
    model, x = mlp(), torch.randn(32, 8)
    with torch.no_grad():
        model[2].weight[:, [1, 4, 11, 14]] *= 1e-3  # type: ignore[index, operator]
    expected = model(x)
    prune_model(model, (x,), PruneConfig(multiple=4))
    assert model[0].out_features == 12
    torch.testing.assert_close(model(x), expected, atol=1e-2, rtol=0)


def test_a_useless_head_is_removed_and_the_others_are_unchanged() -> None:
    model = ours().eval()
    attention = model.blocks[1].attention  # type: ignore[union-attr, index]
    with torch.no_grad():
        for head in (0, 2):
            attention.out.weight[:, head * 8 : head * 8 + 8] = 0
    expected, kept = model(IDS), attention.query.weight[8:16].clone()
    prune_model(model, (IDS,), PruneConfig(multiple=64))  # no block of 64 channels can be removed: only heads
    assert torch.equal(attention.query.weight[:8], kept)
    torch.testing.assert_close(model(IDS), expected)


class Stubborn(Packed):
    def joined(self, heads: Tensor, x: Tensor) -> Tensor:
        return heads.reshape(x.shape)


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(F.relu(self.two(self.one(x).softmax(-1))))


class Rotary(SelfAttention):
    """Turns halves of a head and adds them to a cache, as Hugging Face's Llama does: torch-pruning 1.6 never ends."""

    def turned(self, x: Tensor) -> Tensor:
        return torch.cat((torch.tensor([]), x * 0.8 + torch.cat((-x[..., 4:], x[..., :4]), -1) * 0.6), -2)


class RotaryBert(Bert):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Rotary()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gru = nn.Linear(8, 16), nn.GRU(16, 16, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.gru(F.relu(self.first(x)))[0][:, -1])))


class Joined(nn.Module):
    """torch-pruning 1.6 loses the offset of a joined and flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.hidden, self.head = nn.Linear(16 * 4, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        joined = F.max_pool2d(torch.cat([self.left(x), self.right(x)], 1), 8)
        return self.head(F.relu(self.hidden(joined.flatten(1))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.embed(ids)).relu()).relu())


class Sliced(nn.Module):
    """Works without a unit of the second half, not without one of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.one, self.two, self.head = (
            nn.Linear(8, 32),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        both = F.relu(self.up(x))
        return self.head(F.relu(self.one(both[:, :16]) + self.two(both[:, 16:])))


@pytest.mark.parametrize(
    ("model", "inputs", "pruned", "left", "reason"),
    [
        (Stubborn(), IDS, "gates", "qkv", "forward does not work with fewer heads"),
        (Softmax(), torch.randn(4, 8), "two", "one", "its channels depend on each other"),
        (Joined(), IMAGES, "hidden", "left", "its channels depend on each other"),
        (RotaryBert(), IDS, "up", "attention.query", "its channels cannot be followed"),
        (Recurrent(), torch.randn(4, 6, 8), "up", "first", "its channels cannot be followed"),
        (Sliced(), torch.randn(4, 8), "one", "up", "its channels depend on each other"),
        (Tied(), IDS, "up", "down", "shares a weight with another layer, or is read by one that does"),
    ],
    ids=["attention", "softmax", "joined", "rotary", "recurrent", "sliced", "tied"],
)
def test_a_layer_whose_units_cannot_be_removed_is_left_alone_and_named(
    model: nn.Module, inputs: Tensor, pruned: str, left: str, reason: str
) -> None:
    report = prune_model(model.eval(), (inputs,))
    assert [layer.name for layer in report.layers] == [pruned]
    assert report.left_alone[left] == reason


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()).argmax(-1)


def test_inputs_that_are_no_tuple_of_arguments_are_refused() -> None:
    model, rows = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(1, 8)
    with pytest.raises(
        InputError, match=r"example_inputs: seen Tensor; give the arguments of forward as a tuple: \(x,\)"
    ):
        prune_model(model, rows)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"data\[1\]: seen dict"):
        prune_model(model, (rows,), data=[(rows,), {"x": rows}])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(8, 8), "nothing in Linear can be pruned"),
        (nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)), "the width between blocks is fixed"),
        (nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 4)), "less than one head or block of channels"),
        (Counting(), "no output of forward has a gradient"),
        (nn.Sequential(nn.Linear(9, 16), nn.Linear(16, 4)), "does not run on the example inputs: RuntimeError"),
    ],
    ids=["one layer", "width", "too little", "integers", "wrong input"],
)
def test_a_model_that_cannot_be_pruned_is_a_one_line_error_and_unchanged(model: nn.Module, message: str) -> None:
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=message):
        prune_model(model, (torch.randn(4, 8),), PruneConfig(ratio=0.1))
    assert weights_digest(model) == weights_digest(before)
    assert repr(model) == repr(before)
    assert model.training


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_head_attention_equals_multihead_attention(batch_first: bool, need_weights: bool) -> None:
    packed = nn.MultiheadAttention(32, 4, batch_first=batch_first).eval()
    query, memory = torch.randn(3, 3, 32), torch.randn(3, 5, 32)
    memory = memory if batch_first else memory.transpose(0, 1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    mask = torch.ones(3, 5, dtype=torch.bool).triu(3)
    settings = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": need_weights}
    expected, seen = (attention(query, memory, memory, **settings) for attention in (packed, HeadAttention(packed)))
    torch.testing.assert_close(seen[0], expected[0])
    assert (seen[1] is None) == (expected[1] is None) == (not need_weights)
    if need_weights:
        torch.testing.assert_close(seen[1], expected[1])


def test_a_pruned_model_learns_the_outputs_of_the_original() -> None:
    model = ours().eval()
    original = copy.deepcopy(model)
    prune_model(model, (IDS,), PruneConfig(ratio=0.4))
    batches = [(torch.randint(1, 50, (8, 9)),) for _ in range(10)]
    before, after = distil(model, original, batches)
    assert after < 0.7 * before


def test_tied_weights_stay_tied_when_a_pruned_model_is_loaded(tmp_path: Path) -> None:
    model = Tied().eval()
    before, original = weights_digest(model), copy.deepcopy(model)
    report = prune_model(model, (IDS,), PruneConfig(ratio=0.25))
    save_pruned(model, report, tmp_path / "pruned.safetensors", of=before)
    again = load_pruned(original, tmp_path / "pruned.safetensors")
    assert model.head.weight is model.embed.weight
    assert original.head.weight is original.embed.weight  # loaded in place
    torch.testing.assert_close(again(IDS), model(IDS))


def test_the_flops_of_an_lstm_count() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1, :8])

    report = prune_model(Last(), (torch.randn(4, 6, 8),))
    assert report.flops[0] == 2 * (6 * 4 * 16 * (8 + 16) + 16 * (8 + 4))


def test_a_frozen_model_is_pruned_and_tuned_and_stays_frozen(tmp_path: Path) -> None:
    teacher = mlp().requires_grad_(False)
    student = copy.deepcopy(teacher)
    prune_model(student, (torch.randn(4, 8),))
    batches = [(torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)),) for seed in range(10)]
    before, after = distil(student, teacher, batches, checkpoints=tmp_path)
    assert after < before
    assert not any(parameter.requires_grad for parameter in student.parameters())
