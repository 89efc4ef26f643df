"""What all modules promise: children run as what they are, masks and constructors are checked, explanations."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import mmkernels as mmk

LINEAR = ("query_proj", "key_value_proj", "out_proj", "feedforward_in", "feedforward_out")


class LowRank(nn.Module):
    """A linear layer and a product of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 1)
        self.up = nn.Linear(1, base.out_features)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def block() -> mmk.nn.GatedCrossAttentionBlock:
    made = mmk.nn.GatedCrossAttentionBlock(8, 2, bias=True)
    for gate in (made.attention_gate, made.feedforward_gate):
        nn.init.ones_(gate)
    return made


def plainly(b: mmk.nn.GatedCrossAttentionBlock, x: Tensor, context: Tensor) -> Tensor:
    """The block, child by child."""
    q = b.query_proj(b.norm(x)).unflatten(-1, (2, 4)).transpose(1, 2)
    k, v = (t.transpose(1, 2) for t in b.key_value_proj(context).unflatten(-1, (2, 2, 4)).unbind(2))
    attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + torch.tanh(b.attention_gate) * b.out_proj(attended)
    hidden = nn.functional.gelu(b.feedforward_in(b.feedforward_norm(x)))
    return x + torch.tanh(b.feedforward_gate) * b.feedforward_out(hidden)


def _hooked(child: nn.Module) -> nn.Module:
    child.register_forward_hook(lambda _module, _inputs, out: 2 * out)
    return child


def _before(child: nn.Module) -> nn.Module:
    child.register_forward_pre_hook(lambda _module, inputs: (3 * inputs[0],))
    return child


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda child: child,
    "forward hook": _hooked,
    "forward pre-hook": _before,
    "low-rank wrapper": lambda child: LowRank(child) if isinstance(child, nn.Linear) else _hooked(child),
    "weight norm": lambda child: parametrizations.weight_norm(child) if isinstance(child, nn.Linear) else child,
    "spectral norm by a hook": lambda child: spectral_norm(child) if isinstance(child, nn.Linear) else child,
    "pruned": lambda child: prune.random_unstructured(child, "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [*LINEAR, "norm", "feedforward_norm"])
def test_a_changed_child_runs_as_a_module(name: str, change: str) -> None:
    b, x, context = block(), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    setattr(b, name, CHANGES[change](getattr(b, name)))
    b.eval()
    torch.testing.assert_close(b(x, context), plainly(b, x, context), rtol=1e-5, atol=1e-5)


def test_every_linear_child_may_be_quantised() -> None:
    b, x, context = block().eval(), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    quantised = torch.ao.quantization.quantize_dynamic(b, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.feedforward_out) is not nn.Linear
    torch.testing.assert_close(quantised(x, context), plainly(quantised, x, context), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("argument", ["key_padding_mask", "attn_mask"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integer_masks_are_refused(argument: str, dtype: torch.dtype, need_weights: bool) -> None:
    m, x = mmk.nn.MultiheadCrossAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    mask = torch.zeros((2, 3) if argument == "key_padding_mask" else (3, 3), dtype=dtype)
    with pytest.raises(TypeError, match=rf"MultiheadCrossAttention: {argument}: expected dtype bool or floating"):
        m(x, x, x, need_weights=need_weights, **{argument: mask})


def test_integer_presence_is_refused() -> None:
    fuse = mmk.nn.ConcatFusion([4, 4], 3, missing="learned")
    with pytest.raises(TypeError, match="presence"):
        fuse([torch.randn(2, 4)] * 2, torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize("need_weights", [False, True])
def test_batches_and_lengths_must_fit(need_weights: bool) -> None:
    m = mmk.nn.MultiheadCrossAttention(8, 2, batch_first=True)
    x, y, z = torch.randn(2, 3, 8), torch.randn(1, 3, 8), torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match="MultiheadCrossAttention: key: expected a batch of 2; got 1"):
        m(x, y, y, need_weights=need_weights)
    with pytest.raises(ValueError, match="MultiheadCrossAttention: value: expected 3 tokens"):
        m(x, x, z, need_weights=need_weights)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: mmk.nn.GatedFusion(409, 32), TypeError, "GatedFusion: in_features"),
        (lambda: mmk.nn.ConcatFusion([4, 2.0], 32), TypeError, r"ConcatFusion: in_features\[1\]"),
        (lambda: mmk.nn.ConcatFusion([4, 2], -1), ValueError, "ConcatFusion: out_features"),
        (lambda: mmk.nn.TensorFusion(4, 32), TypeError, "TensorFusion: in_features"),
        (lambda: mmk.nn.LowRankFusion([4], 3, 2.5), TypeError, "LowRankFusion: rank"),
        (lambda: mmk.nn.MultiheadCrossAttention(10, 3), ValueError, "MultiheadCrossAttention: embed_dim"),
        (lambda: mmk.nn.MultiheadCrossAttention(10, 0), ValueError, "MultiheadCrossAttention: num_heads"),
        (lambda: mmk.nn.JointAttention(8, 2), TypeError, "JointAttention: embed_dims"),
        (lambda: mmk.nn.JointAttention([8], 0), ValueError, "JointAttention: num_heads"),
        (lambda: mmk.nn.GatedCrossAttentionBlock(8, 0), ValueError, "GatedCrossAttentionBlock: num_heads"),
        (lambda: mmk.nn.BidirectionalCrossAttention(8, 8, 8, 2.0), TypeError, "num_heads"),
        (lambda: mmk.nn.TokenFusionEmbedding([2], 8), TypeError, "TokenFusionEmbedding: num_modalities"),
        (lambda: mmk.nn.AdditiveAttentionPool([4], 3), TypeError, "AdditiveAttentionPool: features"),
        (lambda: mmk.nn.MultiplicativeAttentionPool(-1), ValueError, "MultiplicativeAttentionPool: features"),
        (lambda: mmk.nn.SplitAttentionPool(4, 0, 3), ValueError, "SplitAttentionPool: modalities"),
    ],
)
def test_constructors_say_what_is_wrong(make: Callable[[], nn.Module], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_module_is_explained() -> None:
    m, x = mmk.nn.MultiheadCrossAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    with_weights = mmk.explain(m, x, x, x)
    assert with_weights.backend == "reference" and "need_weights=True" in with_weights.reasons["cpu"]
    assert "need_weights" not in str(mmk.explain(m, x, x, x, need_weights=False))
    assert pickle.loads(pickle.dumps(with_weights)) == with_weights


def test_a_mask_of_keys_per_batch_element_is_refused_with_a_hint() -> None:
    q, k = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8)
    with pytest.raises(ValueError, match=r"mask\[:, None, None\], or key_lengths"):
        mmk.cross_attention(q, k, k, attn_mask=torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"expected dtype bool or a floating one; got"):
        mmk.cross_attention(q, k, k, attn_mask=torch.ones(5, 7, dtype=torch.int64))


def test_dir_lists_the_public_names() -> None:
    assert set(dir(mmk)) == {*mmk.__all__, "__version__"}
