"""nn.MultiheadAttention and pooling heads made of it: padding and what few queries do without are not projected."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import HEADS, WIDTH, random, why_no_models
from torch import nn

from mmkernels.integrations import _blocks, _few_queries, _key_lengths, accelerate
from mmkernels.testing import same_bits

BATCH, WORDS, PIXELS = 3, 30, 50
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Products of every size on every machine; the names of the ways that calls take."""
    monkeypatch.setattr(_blocks, "_FEWEST_PRODUCTS", 0)
    monkeypatch.setattr(_blocks, "products_pay", lambda: True)
    monkeypatch.setattr(_blocks, "torch_lacks_kernel", lambda dtype: False)
    taken: list[str] = []
    for module, name in ((_few_queries, "attend"), (_key_lengths, "attend_to_kept")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, plain=plain: taken.append(name) or plain(*args))
    return taken


def attention(dtype: torch.dtype, **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(random(*p.shape, seed=i) * (WIDTH**-0.5 if p.dim() > 1 else 0.5))
    return module.to(dtype).eval()


def padding(kind: str | None) -> torch.Tensor | None:
    if kind is None:
        return None
    hidden = torch.arange(PIXELS) >= torch.tensor([PIXELS, 31, 4])[:, None]
    if kind == "left":
        hidden = hidden.flip(1)
    if kind == "all of one":
        hidden[2] = True
    return hidden


def results(module: nn.Module, words: int, hidden: torch.Tensor | None, kind: torch.dtype) -> list[torch.Tensor]:
    dtype = torch.bfloat16 if any(p.dtype == torch.bfloat16 for p in module.parameters()) else torch.float32
    x, y = (
        t.to(dtype).to(kind, copy=True) for t in (random(BATCH, words, WIDTH), random(BATCH, PIXELS, WIDTH, seed=3))
    )
    x.requires_grad_(), y.requires_grad_()
    module.zero_grad()
    out, _ = module(x, y, y, key_padding_mask=hidden, need_weights=False)
    (out * random(*out.shape, seed=5).to(dtype).to(kind)).sum().backward()
    return [t.detach().double() for t in (out, x.grad, y.grad, *(p.grad for p in module.parameters()))]


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("words, way", [(1, "attend"), (WORDS, "attend_to_kept")])
def test_padding_is_not_projected_and_one_query_takes_the_projections(words, way, bias, dtype, ways):
    module = attention(dtype, bias=bias)
    plain, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    accelerate(module)
    hidden = padding("right")
    found = [results(module, words, hidden, dtype), results(plain, words, hidden, dtype)]
    oracle = results(exact, words, hidden, torch.float64)
    assert ways == [way]
    largest = max(float(torch.linalg.vector_norm(x)) for x in oracle)
    for ours, same, right in zip(*found, oracle, strict=True):
        errors = [float(torch.linalg.vector_norm(x - right)) for x in (ours, same)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * largest
    assert not found[0][2][2, 4:].any()  # of padding


@pytest.mark.parametrize("words", [1, WORDS])
def test_padding_reaches_nothing_even_if_it_is_nan(words):
    module = attention(torch.float32)
    accelerate(module)
    x, y, hidden = random(BATCH, words, WIDTH), random(BATCH, PIXELS, WIDTH, seed=3), padding("right")
    if words == 1:
        y[hidden] = 1e30  # which it is multiplied with
    else:
        y[hidden] = torch.nan
    assert module(x, y, y, key_padding_mask=hidden, need_weights=False)[0].isfinite().all()


OTHERWISE = {
    "padding on the left": {},
    "all of one": {},
    "no batch first": {"batch_first": False},
    "keys of another width": {"kdim": 32, "vdim": 32},
    "dropout": {"dropout": 0.5},
    "a mask": {},
    "autocast": {},
}


@pytest.mark.parametrize("words", [1, WORDS])
@pytest.mark.parametrize("what", OTHERWISE)
def test_other_calls_go_the_way_of_all(what, words, ways):
    module = attention(torch.float32, **OTHERWISE[what])
    plain = copy.deepcopy(module)
    accelerate(module)
    if what == "dropout":
        module.train()
    width = 32 if what == "keys of another width" else WIDTH
    x, y = random(BATCH, words, WIDTH), random(BATCH, PIXELS, width, seed=3)
    if what == "no batch first":
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    kind = {"padding on the left": "left", "all of one": what}.get(what, "right")
    options: dict[str, Any] = {"key_padding_mask": padding(kind), "need_weights": False}
    if what == "a mask":
        options["attn_mask"] = torch.ones(words, PIXELS, dtype=torch.bool).triu(3)
    with torch.autocast("cpu", enabled=what == "autocast"):
        got, same = (m(x, y, y, **options)[0] for m in (module, plain))
    assert ways == []
    rows = slice(0, 2) if what == "all of one" else slice(None)
    if what not in ("dropout", "autocast"):
        torch.testing.assert_close(got[rows], same[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("same", [True, False])
def test_padding_of_a_wrong_shape_is_torch_s_error(same):
    module = attention(torch.float32)
    accelerate(module)
    x, y = random(BATCH, WORDS, WIDTH), random(BATCH, PIXELS, WIDTH)
    other = y if same else y.clone()
    for shape in ((BATCH, PIXELS - 1), (BATCH - 1, PIXELS)):
        with pytest.raises((AssertionError, RuntimeError), match=r"[Ss]hape|size|Expecting"):
            module(x, y, other, key_padding_mask=torch.zeros(shape, dtype=torch.bool), need_weights=False)


@pytest.mark.parametrize("padded", [True, False])
def test_a_mask_of_one_query_joins_padding(padded):
    module = attention(torch.float32)
    plain = copy.deepcopy(module)
    accelerate(module)
    x, y = random(BATCH, 1, WIDTH), random(BATCH, PIXELS, WIDTH, seed=3)
    options = {"attn_mask": torch.arange(PIXELS)[None] >= 3, "key_padding_mask": padding("right") if padded else None}
    got, same = (m(x, y, y.clone(), need_weights=False, **options)[0] for m in (module, plain))
    torch.testing.assert_close(got, same, rtol=1e-4, atol=1e-4)


NO_MODELS = why_no_models()


def head(library: str) -> tuple[nn.Module, list[Any]]:
    import importlib

    import transformers

    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": HEADS}
    name, config, masked = {
        "siglip": ("SiglipMultiheadAttentionPoolingHead", "SiglipVisionConfig", False),
        "siglip2": ("Siglip2MultiheadAttentionPoolingHead", "Siglip2VisionConfig", True),
        "idefics2": ("Idefics2MultiheadAttentionPoolingHead", "Idefics2VisionConfig", False),
        "phi4_multimodal": (
            "Phi4MultimodalVisionMultiheadAttentionPoolingHead",
            "Phi4MultimodalVisionConfig",
            True,
        ),
        "aimv2": ("Aimv2AttentionPoolingHead", "Aimv2VisionConfig", False),
    }[library]
    config = getattr(transformers, config)(**sizes)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    file = importlib.import_module(f"transformers.models.{library}.modeling_{library}")
    module = getattr(file, name)(config).eval()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(random(*p.shape, seed=i) * WIDTH**-0.5)
    return module, [~padding("right")] if masked else []


@pytest.mark.skipif(NO_MODELS is not None, reason=str(NO_MODELS))
@DTYPES
@pytest.mark.parametrize("library", ["siglip", "siglip2", "idefics2", "phi4_multimodal", "aimv2"])
def test_the_probe_of_a_pooling_head_takes_the_projections(library, dtype, ways):
    module, masks = head(library)
    module = module.to(dtype)
    plain, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    accelerate(module)
    found = []
    for m, kind in ((module, dtype), (plain, dtype), (exact, torch.float64)):
        x = random(BATCH, PIXELS, WIDTH).to(dtype).to(kind, copy=True).requires_grad_()
        out = m(x, *masks)
        (out * random(*out.shape, seed=5).to(dtype).to(kind)).sum().backward()
        found.append([t.detach().double() for t in (out, x.grad, *(p.grad for p in m.parameters()))])
    assert ways == ["attend"]
    largest = max(float(torch.linalg.vector_norm(x)) for x in found[2])
    for ours, same, right in zip(*found, strict=True):
        errors = [float(torch.linalg.vector_norm(x - right)) for x in (ours, same)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * largest


@pytest.mark.skipif(NO_MODELS is not None, reason=str(NO_MODELS))
@pytest.mark.parametrize("what", ["a hook", "skipped"])
def test_a_head_whose_attention_is_watched_or_skipped_is_the_original(what, ways):
    module, _ = head("siglip")
    if what == "a hook":
        module.attention.register_forward_hook(lambda module, args, out: (out[0] * out[1].shape[-1], out[1]))
    x = random(BATCH, PIXELS, WIDTH)
    plain = module(x)
    accelerate(module, skip=["MultiheadAttention", "*Linear", "SiglipMLP"] if what == "skipped" else "SiglipMLP")
    got = module(x)
    assert ways == []
    assert what == "a hook" or same_bits([got], [plain])
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
