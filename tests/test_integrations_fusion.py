"""Grounding DINO's fusion of image and text, whichever side takes the projections."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import build, random, why_no_models
from torch import nn

from mmkernels.integrations import accelerate
from mmkernels.integrations.transformers import fusion

NO_MODELS = why_no_models()
pytestmark = pytest.mark.skipif(NO_MODELS is not None, reason=str(NO_MODELS))
BATCH, PIXELS, TOKENS = 2, 75, 6


def attention(name: str, dtype: torch.dtype) -> Any:
    model, _, _ = build(name, dtype)
    kind = {"grounding_dino": "GroundingDino", "mm_grounding_dino": "MMGroundingDino"}[name] + "BiMultiHeadAttention"
    return next(m for m in model.modules() if type(m).__name__ == kind)


def features(width: int, tokens: int = TOKENS) -> list[torch.Tensor]:
    return [random(BATCH, PIXELS, width), random(BATCH, tokens, width, seed=3)]


def padding(length: int, kind: str | None) -> torch.Tensor | None:
    if kind is None:
        return None
    hidden = torch.zeros(BATCH, length, dtype=torch.bool)
    hidden[1, length // 2 :] = True
    if kind == "holes":
        hidden[0, 1::3] = True
    return hidden


def results(module: Any, inputs: list[torch.Tensor], masks: list[torch.Tensor | None]) -> list[torch.Tensor]:
    dtype = next(module.parameters()).dtype
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    module.zero_grad()
    out = [pair[0] for pair in module(*inputs, *masks)]
    sum((x * random(*x.shape, seed=i).to(dtype)).sum() for i, x in enumerate(out)).backward()
    found = [*out, *(x.grad for x in inputs), *(p.grad for p in module.parameters())]
    return [x.detach().double() for x in found]


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ways that calls took."""
    taken: list[str] = []
    for name in ("_on_the_text_s_side", "_fused"):
        plain = getattr(fusion, name)
        monkeypatch.setattr(fusion, name, lambda *args, name=name, plain=plain: taken.append(name) or plain(*args))
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_text", [None, "right", "holes"])
@pytest.mark.parametrize("of_vision", [None, "right", "holes"])
@pytest.mark.parametrize("name", ["grounding_dino", "mm_grounding_dino"])
def test_the_text_takes_the_projections(name, of_vision, of_text, dtype, ways):
    module = attention(name, dtype)
    plain, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    inputs = [x.to(dtype) for x in features(module.vision_dim)]
    masks = [padding(PIXELS, of_vision), padding(TOKENS, of_text)]
    accelerate(module)
    both = [results(m, inputs, [x if x is None else x.clone() for x in masks]) for m in (module, plain, exact)]
    assert ways == ["_on_the_text_s_side"]
    unit = torch.finfo(dtype).eps
    for got, same, oracle in zip(*both, strict=True):
        distance = [float(torch.linalg.vector_norm(x - oracle)) for x in (got, same)]
        size = float(torch.linalg.vector_norm(oracle))
        if size > 1e-6:  # a shift of all scores of a softmax has no gradient but its rounding
            assert distance[0] <= 2 * distance[1] + 2 * unit * size


@pytest.mark.parametrize("why", ["much text", "a hook", "a wrapper", "all hidden", "no bias", "autocast"])
def test_the_op_fuses_where_the_text_had_better_not(why, ways):
    module = attention("grounding_dino", torch.float32)
    inputs = features(module.vision_dim, 40 if why == "much text" else TOKENS)
    masks: list[torch.Tensor | None] = [None, None]
    if why == "a hook":
        module.vision_proj.register_forward_hook(lambda module, args, out: out * 1.5)
    if why == "a wrapper":
        module.out_vision_proj = nn.Sequential(module.out_vision_proj)
    if why == "all hidden":
        masks[1] = torch.tensor([[False] * TOKENS, [True] * TOKENS])
    if why == "no bias":
        module.values_vision_proj = nn.Linear(module.vision_dim, module.embed_dim, bias=False)
    plain = copy.deepcopy(module)
    accelerate(module)
    with torch.autocast("cpu", enabled=why == "autocast"):
        got, same = ([out for out, _ in m(*inputs, *masks)] for m in (module, plain))
    assert ways == ["_fused"]
    rows = slice(0, 1) if why == "all hidden" else slice(None)  # of a row that sees nothing eager makes NaN
    close = 2e-2 if why == "autocast" else 1e-4
    for x, y in zip(got, same, strict=True):
        torch.testing.assert_close(x[rows], y[rows], rtol=close, atol=close)
        assert x.isfinite().all()
