"""diffusers' models: the attention backend, and blocks that modulate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from architectures import build, random, why_no_models

from mmkernels.integrations import _diffusers_attention, accelerate, restore
from mmkernels.testing import assert_close_to_oracle, same_bits

NO_MODELS = why_no_models()
pytestmark = pytest.mark.skipif(NO_MODELS is not None, reason=str(NO_MODELS))


@pytest.fixture
def dispatch():
    from diffusers.models import attention_dispatch

    from mmkernels.integrations.diffusers import register

    register()
    register()
    yield attention_dispatch
    attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_a_model_s_backend_is_set_by_name_and_computes_the_same(name, dtype, dispatch, monkeypatch):
    calls = []
    attend = _diffusers_attention.cross_attention
    monkeypatch.setattr(_diffusers_attention, "cross_attention", lambda *a, **k: calls.append(k) or attend(*a, **k))
    model, inputs, outputs = build(name, dtype)
    plain = outputs(model(**inputs))[0]
    assert not calls
    model.set_attention_backend("mmkernels")
    ours = outputs(model(**inputs))[0]
    assert len(calls) == (4 if name == "flux" else 2)
    model.set_attention_backend("native")
    assert same_bits([outputs(model(**inputs))[0]], [plain])
    model = model.double()
    exact = outputs(model(**{k: v.double() if _floats(v) else v for k, v in inputs.items()}))[0]
    assert_close_to_oracle(ours, plain, exact)


def _floats(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def call(dispatch, q, k, v, **options):
    return dispatch.dispatch_attention_fn(q, k, v, backend=dispatch.AttentionBackendName("mmkernels"), **options)


def test_the_name_is_a_member_of_diffusers_enumeration(dispatch):
    names = dispatch.AttentionBackendName
    member = names("mmkernels")
    assert member is names["MMKERNELS"] and member is names.MMKERNELS and member == "mmkernels"
    assert member.value == "mmkernels" and member.name == "MMKERNELS" and member in list(names)
    assert len({n.value for n in names}) == len(list(names))


@pytest.mark.parametrize(
    "kind", ["padding of two dims", "padding at the end", "padding between", "added", "causal", "gqa"]
)
def test_masks_and_options_mean_what_they_mean_in_the_native_backend(kind, dispatch, monkeypatch):
    seen = {}
    attend = _diffusers_attention.cross_attention
    monkeypatch.setattr(_diffusers_attention, "cross_attention", lambda *a, **k: seen.update(k) or attend(*a, **k))
    q, k, v = random(2, 9, 4, 16), *(random(2, 13, 2 if kind == "gqa" else 4, 16, seed=s) for s in (3, 4))
    keep = torch.arange(13) < torch.tensor([[13], [7]])
    options = {
        "padding of two dims": {"attn_mask": keep},
        "padding at the end": {"attn_mask": keep[:, None, None]},
        "padding between": {"attn_mask": (keep | (torch.arange(13) > 10))[:, None, None], "scale": 0.1},
        "added": {"attn_mask": random(2, 1, 9, 13)},
        "causal": {"is_causal": True},
        "gqa": {"enable_gqa": True},
    }[kind]
    out = call(dispatch, q, k, v, **options)
    native = dispatch._native_attention(q, k, v, **options)
    torch.testing.assert_close(out, native, atol=2e-6, rtol=1e-5)
    assert ("key_lengths" in seen) == (kind in ("padding of two dims", "padding at the end"))


def test_what_it_does_not_serve_runs_the_native_backend(dispatch, monkeypatch):
    monkeypatch.setattr(_diffusers_attention, "cross_attention", None)
    q = random(1, 9, 4, 16).double()
    assert torch.equal(
        call(dispatch, q, q, q), F.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3).transpose(1, 2)
    )


def test_blocks_with_two_conditions_and_of_an_unknown_modulation_are_left(monkeypatch):
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    model, inputs, outputs = build("qwen_image")
    block = model.transformer_blocks[0]
    arguments = (random(2, 16, 64), random(2, 9, 64), None, random(4, 64))
    index = torch.arange(16).remainder(2).expand(2, 16)
    block.zero_cond_t = True
    plain = block(*arguments, modulate_index=index)
    accelerate(model, only="QwenImageTransformerBlock")
    assert same_bits(block(*arguments, modulate_index=index), plain)

    def _modulate(self, x, mod_params, index=None):
        return x, mod_params

    monkeypatch.setattr(QwenImageTransformerBlock, "_modulate", _modulate)
    left = [e for e in accelerate(build("qwen_image")[0]).left if e.what == "QwenImageTransformerBlock"]
    assert len(left) == 2 and "unknown version of its _modulate" in left[0].reason


def test_a_release_of_diffusers_without_the_registry_is_said_so(monkeypatch, dispatch):
    from mmkernels.integrations.diffusers import register

    monkeypatch.delattr(dispatch, "_AttentionBackendRegistry")
    with pytest.raises(RuntimeError, match="got one without"):
        register()
    monkeypatch.undo()


def test_text_padding_is_masked_where_that_is_asked_for_and_nowhere_else():
    model, inputs, outputs = build("sd_3")
    real = torch.arange(9) < torch.tensor([[9], [4]])
    masked = {**inputs, "joint_attention_kwargs": {"attention_mask": real}}
    plain = outputs(model(**inputs))[0]
    accelerate(model)
    torch.testing.assert_close(outputs(model(**masked))[0], plain, atol=1e-5, rtol=1e-5)
    accelerate(model, mask_text_padding=True)
    ours = outputs(model(**masked))[0]
    one = {k: v[1:] for k, v in inputs.items()}
    one["encoder_hidden_states"] = one["encoder_hidden_states"][:, :4]
    torch.testing.assert_close(ours[1:], outputs(model(**one))[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[:1], plain[:1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours[1:], plain[1:], atol=1e-3)
    torch.testing.assert_close(outputs(model(**inputs))[0], plain, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="padding at the end"):
        model(**{**inputs, "joint_attention_kwargs": {"attention_mask": real.flip(1)}})
    restore(model)
    assert same_bits([outputs(model(**masked))[0]], [plain])


def test_without_a_joint_attention_masking_of_text_padding_is_refused():
    with pytest.raises(ValueError, match="mask_text_padding"):
        accelerate(torch.nn.Linear(4, 4), mask_text_padding=True)
