"""timm's vision transformers and what open_clip has besides its blocks: swapped modules compute what theirs do."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import random, why_no_models
from torch import nn

from mmkernels.integrations import _blocks, accelerate, open_clip, restore, timm
from mmkernels.testing import assert_close_to_oracle, same_bits

NO_MODELS = why_no_models()
pytestmark = pytest.mark.skipif(NO_MODELS is not None, reason=str(NO_MODELS))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _products_of_every_size_on_every_machine(monkeypatch):
    monkeypatch.setattr(_blocks, "_FEWEST_PRODUCTS", 0)
    monkeypatch.setattr(_blocks, "products_pay", lambda: True)
    monkeypatch.setattr(_blocks, "torch_lacks_kernel", lambda dtype: False)
    monkeypatch.setattr(timm, "_FEWEST_SCORES", 0)


def run(module, *args, **options):
    module.zero_grad(set_to_none=True)
    leaves = [a.detach().requires_grad_() if torch.is_floating_point(a) else a for a in args]
    out = module(*leaves, **options)
    weight = random(*out.shape, seed=7).to(out.dtype)
    inputs = [leaf for leaf in leaves if leaf.requires_grad] + list(module.parameters())
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def check(module, dtype, *args, **options):
    """Ours is as exact as the module's own, and its bits are back afterwards; returns the report."""
    module = module.to(dtype)
    args = [a.to(dtype) if a.is_floating_point() else a for a in args]
    plain = run(module, *args, **options)
    report = accelerate(module)
    ours = run(module, *args, **options)
    restore(module)
    assert same_bits(run(module, *args, **options), plain)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    exact = run(copy.deepcopy(module).double(), *(a.double() if a.is_floating_point() else a for a in args), **wide)
    largest = max(float(x.abs().max()) for x in exact)
    for i, (got, same, oracle) in enumerate(zip(ours, plain, exact, strict=True)):
        assert_close_to_oracle(got, same, oracle, name=str(i), scale=largest)
    return report


def block(**options):
    from timm.models.vision_transformer import Block

    torch.manual_seed(0)
    return Block(64, 4, qkv_bias=True, **options)


BLOCKS = {
    "plain": {},
    "with scales, norms of heads and of the network": {"init_values": 0.5, "qk_norm": True, "scale_mlp_norm": True},
    "with norms of attention": {"scale_attn_norm": True},
    "with relu": {"act_layer": nn.ReLU},
}


@DTYPES
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", ["all", "causal", "bool mask", "added mask"])
def test_blocks_of_timm(name, kind, dtype):
    mask = {"bool mask": random(1, 1, 17, 17) > -1, "added mask": random(4, 17, 17).to(dtype)}.get(kind)
    report = check(block(**BLOCKS[name]), dtype, random(2, 17, 64), attn_mask=mask, is_causal=kind == "causal")
    assert {"Attention", "Mlp", "Block"} <= {entry.what for entry in report.replaced}


def test_a_gated_attention_of_timm():
    from timm.layers.attention import Attention

    torch.manual_seed(0)
    report = check(Attention(64, 4, gated=True, dim_out=32), torch.float32, random(2, 17, 64))
    assert report.replaced[0].what == "Attention"


@pytest.mark.parametrize("skip", [(), ("Mlp",)], ids=["all", "but the network"])
def test_the_residual_joins_the_network_s_product_where_that_is_swapped(skip, monkeypatch):
    joined = []
    plain = timm.linear

    def linear(child, x, **options):
        joined.append("residual" in options)
        return plain(child, x, **options)

    monkeypatch.setattr(timm, "linear", linear)
    module = block()
    accelerate(module, skip=skip)
    module(random(2, 17, 64))
    assert any(joined) == (not skip)


@pytest.mark.parametrize("kind", ["drop_path", "proj_drop", "attn_drop"])
def test_dropout_in_training_drops_and_none_in_evaluation(kind):
    module = block(**{kind: 0.5})
    x = random(2, 17, 64)
    evaluated = module.eval()(x)
    accelerate(module)
    torch.testing.assert_close(module(x), evaluated, atol=1e-5, rtol=1e-5)
    module.train()
    assert not torch.allclose(module(x), module(x), atol=1e-3)


def test_hooks_on_the_network_of_a_block_are_called():
    seen = []
    module = block()
    module.mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    module.mlp.fc2.register_forward_hook(lambda *_: seen.append("fc2"))
    accelerate(module)
    module(random(2, 17, 64))
    assert seen == ["fc2", "mlp"]


def test_an_attention_of_timm_that_does_not_ask_for_a_fused_one_is_its_own():
    module = block()
    module.attn.fused_attn = False
    x = random(2, 17, 64)
    plain = module.attn(x)
    accelerate(module, only="Attention")
    assert same_bits([module.attn(x)], [plain])


@DTYPES
@pytest.mark.parametrize("width", [64, 48], ids=["of one width", "of another width"])
def test_an_attentional_pooler_projects_its_queries_once(width, dtype, monkeypatch):
    from open_clip.transformer import AttentionalPooler

    torch.manual_seed(0)
    seen = []
    attend = open_clip.attend
    monkeypatch.setattr(open_clip, "attend", lambda *a: seen.append(a[1].shape[0]) or attend(*a))
    report = check(AttentionalPooler(64, width, 4, n_queries=5), dtype, random(3, 17, width))
    assert "AttentionalPooler" in {entry.what for entry in report.replaced} and seen == [1]


def features(dtype=torch.float32, seed=0):
    x, y = (nn.functional.normalize(random(12, 32, seed=s), dim=-1) for s in (seed, seed + 1))
    return x.to(dtype), y.to(dtype)


@DTYPES
@pytest.mark.parametrize("kind", ["ClipLoss", "SigLipLoss"])
def test_losses_of_open_clip(kind, dtype):
    import open_clip.loss

    loss = getattr(open_clip.loss, kind)()
    numbers = (torch.tensor(9.0), torch.tensor(-3.0))[: 1 if kind == "ClipLoss" else 2]
    report = check(loss, dtype, *features(dtype), *numbers)
    assert [entry.what for entry in report.replaced] == [kind]
    accelerate(loss)
    x, y = features(dtype)
    numbers = [n.to(dtype) for n in numbers]
    assert torch.equal(loss(x, y, *numbers, output_dict=True)["contrastive_loss"], loss(x, y, *numbers))


def test_losses_that_are_not_the_plain_ones_are_open_clip_s():
    from open_clip.loss import ClipLoss, SigLipLoss

    x, y = features()
    wide = (x.double(), y.double())
    scale, bias = torch.tensor(9.0), torch.tensor(-3.0)
    for loss, calls in (
        (ClipLoss(), [(x, y, scale, bias), (*wide, scale), (x, y, scale[None])]),
        (SigLipLoss(), [(*wide, scale, bias), (x, y, scale[None], bias), (x, y, scale, random(12, 12))]),
    ):
        plain = [loss(*call) for call in calls]
        assert accelerate(loss).replaced
        assert same_bits([loss(*call) for call in calls], plain)


def test_losses_whose_methods_are_of_an_unknown_version_are_left(monkeypatch):
    from open_clip.loss import ClipLoss, SigLipLoss

    for kind in (ClipLoss, SigLipLoss):
        monkeypatch.setattr(kind, "get_logits", lambda self, *args: args)
        (entry,) = accelerate(kind()).left
        assert "unknown version of its get_logits" in entry.reason
