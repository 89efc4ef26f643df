"""Attention over packed images, windows and clips of sound: one call for all of them."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from architectures import HEADS, WIDTH, build, random, why_no_models
from torch import nn

from mmkernels.integrations import accelerate
from mmkernels.testing import same_bits

NO_MODELS = why_no_models()
pytestmark = pytest.mark.skipif(NO_MODELS is not None, reason=str(NO_MODELS))
STARTS = torch.tensor([0, 7, 20, 31], dtype=torch.int32)
SIZE = WIDTH // HEADS


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of members of each call."""
    from mmkernels.integrations.transformers import packed

    found: list[int] = []
    attend = packed.varlen_cross_attention
    monkeypatch.setattr(
        packed, "varlen_cross_attention", lambda *args, **k: found.append(len(args[3]) - 1) or attend(*args, **k)
    )
    return found


CLASSES = {
    "qwen2_vl": ("VisionAttention", "Qwen2VLVisionConfig", {"embed_dim": WIDTH, "num_heads": HEADS}),
    "qwen2_5_vl": ("Qwen2_5_VLVisionAttention", "Qwen2_5_VLVisionConfig", {"hidden_size": WIDTH, "num_heads": HEADS}),
    "qwen3_vl": ("Qwen3VLVisionAttention", "Qwen3VLVisionConfig", {"hidden_size": WIDTH, "num_heads": HEADS}),
    "glm4v": ("Glm4vVisionAttention", "Glm4vVisionConfig", {"hidden_size": WIDTH, "num_heads": HEADS}),
    "video_llama_3": (
        "VideoLlama3VisionAttention",
        "VideoLlama3VisionConfig",
        {"hidden_size": WIDTH, "num_attention_heads": HEADS},
    ),
    "qwen2_5_omni": (
        "Qwen2_5OmniAudioAttention",
        "Qwen2_5OmniAudioEncoderConfig",
        {"d_model": WIDTH, "encoder_attention_heads": HEADS},
    ),
}


class Model(nn.Module):
    """An attention in a model of transformers, whose attention can be set."""

    def __new__(cls, library: str, dtype: torch.dtype) -> Any:
        import transformers

        name, of_config, sizes = CLASSES[library]
        config = getattr(transformers, of_config)(**sizes)
        kind = getattr(importlib.import_module(f"transformers.models.{library}.modeling_{library}"), name)

        class Around(transformers.PreTrainedModel):
            config_class = type(config)
            _supports_sdpa = True

            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.attention = kind(config)

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return self.attention(*args, **kwargs)

        torch.manual_seed(0)
        return Around(config).to(dtype).eval()


def arguments(library: str, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, Any]]:
    options: dict[str, Any] = {"cu_seqlens": STARTS}
    if library != "qwen2_5_omni":
        angles = random(31, SIZE // 2, seed=4).repeat(1, 2)
        options["position_embeddings"] = (angles.cos().to(dtype), angles.sin().to(dtype))
    return random(31, WIDTH).to(dtype), options


def first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("library", CLASSES)
def test_members_are_attended_to_by_one_call(library, dtype, calls):
    model = Model(library, dtype)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    report = accelerate(model, skip="Linear")
    assert [(e.path, e.with_, e.status) for e in report if e.what.endswith("Attention")] == [
        ("attention", "varlen_cross_attention", "replaced")
    ]
    found = []
    for m, kind in ((model, dtype), (plain, dtype), (exact, torch.float64)):
        x, options = arguments(library, dtype)
        if "position_embeddings" in options:
            options["position_embeddings"] = tuple(t.to(kind) for t in options["position_embeddings"])
        x = x.to(kind, copy=True).requires_grad_()
        out = first(m(x, **options))
        (out * random(*out.shape, seed=5).to(dtype).to(kind)).sum().backward()
        found.append([t.detach().double() for t in (out, x.grad, *(p.grad for p in m.parameters()))])
    assert calls == [len(STARTS) - 1]
    largest = max(float(torch.linalg.vector_norm(x)) for x in found[2])
    for ours, same, right in zip(*found, strict=True):
        errors = [float(torch.linalg.vector_norm(x - right)) for x in (ours, same)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("what", ["attention weights", "dropout", "another attention", "float64"])
def test_other_calls_are_the_original_s(what, calls):
    model = Model("qwen2_vl", torch.float64 if what == "float64" else torch.float32)
    x, options = arguments("qwen2_vl", next(model.parameters()).dtype)
    if what == "dropout":
        model.attention.attention_dropout = 0.5
        model.train()
    if what == "attention weights":
        options["output_attentions"] = True
    plain = copy.deepcopy(model)
    accelerate(model, skip="Linear")
    if what == "another attention":
        model.config._attn_implementation_internal = "sdpa"
    got, same = model(x, **options), plain(x, **options)
    assert calls == []
    if what == "another attention":
        assert same_bits([got], [same])
    if what != "dropout":
        torch.testing.assert_close(got, same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, members", [("qwen_2_vl", [2, 2]), ("qwen_2_5_vl_with_windows", [3, 2])])
def test_images_and_windows_of_a_model_are_one_call_of_each_layer(name, members, calls):
    model, inputs, _ = build(name)
    accelerate(model)
    model(**inputs)
    assert calls == members
