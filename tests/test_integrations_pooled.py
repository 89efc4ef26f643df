"""Encoders of which one token is read, and attention of few queries: what is not needed is not computed."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from architectures import HEADS, WIDTH, build, keep, random, tokens, why_no_models
from torch import nn

from mmkernels.integrations import _blocks, _few_queries, accelerate, restore
from mmkernels.testing import same_bits

NO_MODELS = why_no_models()
pytestmark = pytest.mark.skipif(NO_MODELS is not None, reason=str(NO_MODELS))
LAYERS = 2
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def encoder(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    of_text = {**sizes, "vocab_size": 100, "max_position_embeddings": 16}
    x = tokens(3, 12)
    for row, end in enumerate((11, 7, 5)):
        x[row, end] = 99
    torch.manual_seed(0)
    if kind == "images of CLIP":
        config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
        return prepared(transformers.CLIPVisionModel(config), dtype), {"pixel_values": random(3, 3, 32, 32).to(dtype)}
    if kind == "text of SigLIP":
        config = transformers.SiglipTextConfig(**of_text, projection_size=32)
        return prepared(transformers.SiglipTextModel(config), dtype), {"input_ids": x, "attention_mask": keep(3, 12)}
    config = transformers.CLIPTextConfig(**of_text, eos_token_id=2 if "highest" in kind else 99)
    inputs = {"input_ids": x, "attention_mask": keep(3, 12)}
    if "left" in kind:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
        inputs["attention_mask"][2, :9] = 0
    if "without a mask" in kind:
        del inputs["attention_mask"]
    return prepared(transformers.CLIPTextModel(config), dtype), inputs


def prepared(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(random(*p.shape, seed=i) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.3))
    return model.to(dtype).eval()


KINDS = [
    "images of CLIP",
    "text of CLIP",
    "text of CLIP, whose end is the highest token",
    "text of CLIP, without a mask",
    "text of SigLIP",
]


NOT_WAITING = ["a hook", "another forward", "another forward of attention", "a wrapper", "hidden states"]
NOT_WAITING += ["attentions", "dropout", "a tuple", "autocast"]


@pytest.fixture(autouse=True)
def _calls_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "_FEWEST_PRODUCTS", 0)


def test_short_calls_are_left_as_they_are(monkeypatch):
    keys = _few_queries.Projection(random(WIDTH, WIDTH), None)
    assert _few_queries.pays(1, random(2, 50, WIDTH), keys, HEADS)
    monkeypatch.undo()
    assert not _few_queries.pays(1, random(2, 50, WIDTH), keys, HEADS)


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each whole layer that runs."""
    from mmkernels.integrations.transformers import interface

    ran: list[int] = []
    attend = interface.cross_attention
    monkeypatch.setattr(interface, "cross_attention", lambda *a, **k: ran.append(1) or attend(*a, **k))
    return ran


def results(model: nn.Module, inputs: dict[str, Any], *names: str) -> list[torch.Tensor]:
    model.zero_grad()
    output = model(**inputs)
    picked = [getattr(output, name) for name in names]
    sum((x * random(*x.shape, seed=i).to(x)).sum() for i, x in enumerate(picked)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return [x.detach().double() for x in (*picked, gradient)]


def assert_as_exact(got, plain, exact, dtype):
    for ours, same, oracle in zip(got, plain, exact, strict=True):
        errors = [float(torch.linalg.vector_norm(x - oracle)) for x in (ours, same)]
        assert errors[0] <= 2 * errors[1] + 2 * torch.finfo(dtype).eps * float(torch.linalg.vector_norm(oracle))


@DTYPES
@pytest.mark.parametrize("order", [("pooler_output",), ("pooler_output", "last_hidden_state"), ("last_hidden_state",)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pooled_token_alone_goes_through_the_last_layer(kind, order, dtype, layers):
    model, inputs = encoder(kind, dtype)
    plain = results(model, inputs, *order)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = results(copy.deepcopy(model).double(), wide, *order)
    accelerate(model)
    assert_as_exact(results(model, inputs, *order), plain, exact, dtype)
    assert len(layers) == LAYERS - (order == ("pooler_output",))
    restore(model)
    assert same_bits(results(model, inputs, *order), plain)


def test_the_end_of_a_text_may_be_padding_but_a_text_of_nothing_else_is_left_to_the_layer(layers):
    model, inputs = encoder("text of CLIP, padded on the left")
    plain = model(**inputs).pooler_output
    accelerate(model)
    got = model(**inputs).pooler_output
    assert len(layers) == LAYERS  # the end of the last text sees no token
    torch.testing.assert_close(got[:2], plain[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", NOT_WAITING)
@pytest.mark.parametrize("kind", ["images of CLIP", "text of CLIP", "text of SigLIP"])
def test_the_last_layer_does_not_wait(kind, what, layers):
    model, inputs = encoder(kind)
    last = model.encoder.layers[-1]
    if what == "a hook":
        last.mlp.fc2.register_forward_hook(lambda module, args, out: out * 1.5)
    if what.startswith("another forward"):
        child = last.self_attn if what.endswith("attention") else last
        child.forward = functools.partial(type(child).forward, child)
    if what == "a wrapper":
        last.self_attn.v_proj = nn.Sequential(last.self_attn.v_proj)
    if what == "dropout":
        model.config.attention_dropout = last.self_attn.dropout = 0.1
        model.train()
    inputs |= {"hidden states": {"output_hidden_states": True}, "a tuple": {"return_dict": False}}.get(what, {})
    if what == "attentions":
        inputs["output_attentions"] = True
    plain = copy.deepcopy(model)
    accelerate(model)
    with torch.autocast("cpu", enabled=what == "autocast"):
        got, same = (x if what == "a tuple" else x.to_tuple() for x in (model(**inputs), plain(**inputs)))
    assert len(layers) == (0 if what == "attentions" else LAYERS)
    if what not in ("dropout", "autocast"):
        torch.testing.assert_close(got[:2], same[:2], rtol=1e-4, atol=1e-4)


def test_both_encoders_of_a_contrastive_model_compute_one_token(layers):
    model, inputs, outputs = build("clip")
    plain = model(**inputs)
    accelerate(model)
    out = model(**inputs)
    torch.testing.assert_close(outputs(out), outputs(plain), rtol=1e-4, atol=1e-4)
    whole = len(layers)
    assert whole == 1  # two layers of text, one of the image
    torch.testing.assert_close(out.to_tuple(), plain.to_tuple(), rtol=1e-4, atol=1e-4)
    assert len(layers) == whole + 2


def test_tokens_are_not_computed_by_the_weights_of_another_call():
    model, inputs = encoder("images of CLIP")
    accelerate(model)
    others = {name: nn.Parameter(p * 2.0) for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, others, (), inputs)
    with pytest.raises(RuntimeError, match="expected its weights to be those of the call"):
        out.last_hidden_state  # noqa: B018


@pytest.mark.parametrize("part", ["Text", "Vision"])
def test_models_that_return_all_tokens_compute_them_once(part, layers):
    import transformers

    model, inputs = encoder("text of CLIP" if part == "Text" else "images of CLIP")
    config = model.config
    config.projection_dim = 32
    model = getattr(transformers, f"CLIP{part}ModelWithProjection")(config).eval()
    plain = model(**inputs).to_tuple()
    accelerate(model)
    torch.testing.assert_close(model(**inputs).to_tuple(), plain, rtol=1e-4, atol=1e-4)
    assert len(layers) == LAYERS


def plain_attention(q, x, keys, values, scale, keep):
    """Of the projections of all tokens, head by head."""
    q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, x @ keys.weight.t(), x @ values.weight.t()))
    k, v = (y if b is None else y + b.view(HEADS, 1, -1) for y, b in ((k, keys.bias), (v, values.bias)))
    scores = q @ k.mT * scale
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [None, "of all", "of each"])
def test_queries_that_take_the_projections_give_what_keys_and_values_give(dtype, bias, masked):
    batch, count, length = 2, 3, 37
    keep = None if masked is None else random(batch, 1 if masked == "of all" else count, length) > 0
    leaves = [random(batch, count, 32, seed=1), random(batch, length, WIDTH, seed=2)]
    leaves += [random(32, WIDTH, seed=s) * WIDTH**-0.5 for s in (3, 4)]
    leaves += [random(32, seed=s) for s in (5, 6)] if bias else []

    def run(function, kind):
        q, x, k, v, *b = (t.to(dtype).to(kind, copy=True).requires_grad_() for t in leaves)
        keys, values = (_few_queries.Projection(w, b[i] if b else None) for i, w in enumerate((k, v)))
        out = function(q, x, keys, values, keep)
        (out * random(*out.shape, seed=7).to(dtype).to(kind)).sum().backward()
        return [t.double() for t in (out.detach(), *(t.grad for t in (q, x, k, v, *b[1:])))]

    def ours(q, x, keys, values, keep):
        return _few_queries.attend(q, x, keys, values, HEADS, 0.3, keep)

    def plain(q, x, keys, values, keep):
        return plain_attention(q, x, keys, values, 0.3, keep)

    assert_as_exact(run(ours, dtype), run(plain, dtype), run(plain, torch.float64), dtype)


@pytest.mark.parametrize("mask", [None, "right", "holes", "nothing"])
@pytest.mark.parametrize("words", [2, 30])
def test_attention_to_a_context_folds_where_words_are_few(mask, words, monkeypatch):
    model, _, _ = build("lxmert")
    attention = next(m for m in model.modules() if type(m).__name__ == "LxmertAttention")
    x, context = random(2, words, WIDTH), random(2, 50, WIDTH, seed=3)
    hidden, lowest = None, torch.finfo(torch.float32).min
    if mask is not None:
        hidden = torch.zeros(2, 1, 1, 50)
        hidden[1, ..., {"right": slice(20, None), "holes": slice(0, None, 3), "nothing": slice(None)}[mask]] = lowest
    plain = attention(x, context, hidden)[0]
    folded: list[int] = []
    attend = _few_queries.attend
    monkeypatch.setattr(_few_queries, "attend", lambda *args: folded.append(1) or attend(*args))
    accelerate(model)
    got = attention(x, context, hidden)[0]
    assert len(folded) == (words == 2 and mask in (None, "right"))
    rows = slice(0, 1) if mask == "nothing" else slice(None)  # of which eager attends to all that is hidden
    torch.testing.assert_close(got[rows], plain[rows], rtol=1e-4, atol=1e-4)
