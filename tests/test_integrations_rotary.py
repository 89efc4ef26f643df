"""`accelerate` on attentions that rotate queries and keys: LLaMA and its kin, Qwen3, image encoders, diffusion."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import HEADS, WIDTH, Built, cast, keep, language, named, qwen, random, tokens, why_no_models
from architectures_beyond_transformers import flux, qwen_image
from test_integrations_transformers import distance, joined, run
from torch import Tensor

from mmkernels.integrations import accelerate, restore
from mmkernels.testing import same_bits

NO_MODELS = why_no_models()
pytestmark = pytest.mark.skipif(NO_MODELS is not None, reason=str(NO_MODELS))


def qwen_image_without_mask() -> Built:
    model, inputs, outputs = qwen_image()
    return model, {**inputs, "encoder_hidden_states_mask": None}, outputs


def modern_bert() -> Built:
    from transformers import ModernBertConfig, ModernBertModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    model = ModernBertModel(ModernBertConfig(**sizes, vocab_size=100, pad_token_id=0, local_attention=8))
    return model, {"input_ids": tokens(2, 18), "attention_mask": keep(2, 18)}, named("last_hidden_state")


# Each model, and how often a forward calls norm_rotary.
MODELS: dict[str, tuple[Callable[[], Built], int]] = {
    "llama": (lambda: language("LlamaConfig", "LlamaForCausalLM"), 2),
    "gemma 2": (lambda: language("Gemma2Config", "Gemma2ForCausalLM", query_pre_attn_scalar=16), 2),
    "qwen3, norms": (lambda: language("Qwen3Config", "Qwen3ForCausalLM"), 2),
    "gpt-neox, a part of the features": (lambda: language("GPTNeoXConfig", "GPTNeoXForCausalLM", rotary_pct=0.5), 2),
    "olmo, which casts": (lambda: language("OlmoConfig", "OlmoForCausalLM"), 2),
    "modern bert": (modern_bert, 2),
    "qwen2-vl": (lambda: qwen("Qwen2VL", embed_dim=64, hidden_size=WIDTH), 1),
    "flux": (flux, 6),
    "qwen-image": (qwen_image_without_mask, 4),
    "qwen-image, a mask": (qwen_image, 4),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> Built:
    torch.manual_seed(0)
    model, inputs, outputs = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval(), cast(inputs, dtype), outputs


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengthened by every call of norm_rotary by a swapped forward."""
    from mmkernels.integrations import diffusers_rotary
    from mmkernels.integrations.transformers import rotary

    made: list[int] = []
    for module in (rotary, diffusers_rotary):
        original = module.norm_rotary

        def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            made.append(1)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "norm_rotary", counted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_as_exact_as_the_model_s_own(name: str, dtype: torch.dtype, calls: list[int]) -> None:
    model, inputs, outputs = made(name, dtype)
    plain, plain_gradient = run(model, inputs, outputs)
    keys = list(model.state_dict())
    assert not calls
    report = accelerate(model)
    assert any(entry.with_.startswith("norm_rotary") for entry in report.replaced)
    ours, our_gradient = run(model, inputs, outputs)
    assert len(calls) >= MODELS[name][1]
    assert list(model.state_dict()) == keys and list(accelerate(model)) == list(report)
    restore(model)
    assert same_bits(run(model, inputs, outputs)[0], plain)
    exact, exact_gradient = run(copy.deepcopy(model).double(), cast(inputs, torch.float64), outputs)
    assert plain_gradient.keys() == our_gradient.keys()
    gradients = [joined(g, sorted(plain_gradient)) for g in (our_gradient, plain_gradient, exact_gradient)]
    for got, same, oracle in [*zip(ours, plain, exact, strict=True), gradients]:
        norm = float(torch.linalg.vector_norm(oracle[oracle.isfinite()]))
        assert distance(got, oracle) <= 2 * distance(same, oracle) + 2 * torch.finfo(dtype).eps * norm


@pytest.mark.parametrize("name", ["llama", "qwen3, norms"])
def test_generated_tokens_and_pickled_models_are_the_same(name: str, calls: list[int]) -> None:
    model, inputs, _ = made(name)
    prompt = inputs["input_ids"][:, :7]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, **options)
    accelerate(model)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = len(calls)
        assert torch.equal(twin.generate(prompt, **options), expected)
        assert len(calls) == before + 6 * MODELS[name][1]
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(prompt, **options, **static), expected)


def test_a_compiled_model_is_the_model_s_own(calls: list[int]) -> None:
    model, inputs, outputs = made("llama")
    expected = outputs(model(**inputs))
    accelerate(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(outputs(compiled(**inputs)), expected, rtol=1e-4, atol=1e-4)
    assert not calls


def rotated(angles: Tensor, **changes: Any) -> tuple[Any, Any]:
    """What LLaMA's own function gives for a table (B, L, D), and what the swapped forward calls."""
    from transformers.models.llama import modeling_llama

    from mmkernels.integrations.transformers.rotary import _heads

    plain = modeling_llama.apply_rotary_pos_emb
    heads = {"q": random(2, HEADS, 5, 8), "k": random(2, 2, 5, 8), "cos": angles.cos(), "sin": angles.sin(), **changes}
    return plain(**heads), _heads(plain, **heads)


def test_tables_that_are_no_two_equal_halves_are_left_to_the_model(calls: list[int]) -> None:
    half = random(2, 5, 4)
    twice = torch.cat([half, half], -1)
    expected, got = rotated(twice)
    torch.testing.assert_close(got, expected)
    assert len(calls) == 1
    others: list[tuple[Tensor, dict[str, Any]]] = [
        (random(2, 5, 8), {}),
        (twice, {"sin": random(2, 5, 8)}),
        (twice.bfloat16(), {}),
        (twice, {"q": random(2, 5, 3, 8), "k": random(2, 5, 1, 8), "unsqueeze_dim": 2}),
    ]
    for angles, changes in others:
        expected, got = rotated(angles, **changes)
        assert same_bits(got, expected)
    assert len(calls) == 1


def test_a_table_that_is_changed_is_looked_at_again() -> None:
    from transformers.models.llama import modeling_llama

    from mmkernels.integrations.transformers.rotary import _heads

    plain, half = modeling_llama.apply_rotary_pos_emb, random(1, 5, 4)
    q, k, table = random(2, HEADS, 5, 8), random(2, 2, 5, 8), torch.cat([half, half], -1)
    _heads(plain, q, k, table, table)
    table[..., 0] += 1
    torch.testing.assert_close(_heads(plain, q, k, table, table), plain(q, k, table, table))


def test_a_function_that_is_put_into_the_module_later_is_called(
    monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    model, inputs, outputs = made("llama")
    module = sys.modules["transformers.models.llama.modeling_llama"]
    accelerate(model)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    ours = outputs(model(**inputs))
    assert not calls
    restore(model)
    torch.testing.assert_close(outputs(model(**inputs)), ours, rtol=1e-4, atol=1e-4)


def test_other_rotations_under_the_same_name_are_not_taken() -> None:
    from transformers.models.cohere import modeling_cohere
    from transformers.models.llama import modeling_llama

    from mmkernels.integrations.transformers import rotary

    assert rotary.find_rotary(modeling_cohere.CohereAttention) is None
    assert rotary.find_rotary(modeling_llama.LlamaMLP) is None
    swap = rotary.find_rotary(modeling_llama.LlamaAttention)
    assert swap is not None and swap.with_ == "norm_rotary"


@pytest.mark.parametrize("only", ["*self_attn", "*"])
def test_what_is_skipped_keeps_its_attention_too(only: str, calls: list[int]) -> None:
    model, inputs, outputs = made("llama")
    expected = outputs(model(**inputs))
    report = accelerate(model, skip=only)
    assert not any(entry.path.endswith("self_attn") for entry in report.replaced)
    torch.testing.assert_close(outputs(model(**inputs)), expected, rtol=1e-4, atol=1e-4)
    assert not calls


def test_hooked_norms_of_heads_are_called(calls: list[int]) -> None:
    model, inputs, outputs = made("qwen3, norms")
    accelerate(model)
    seen: list[int] = []
    attention = next(m for m in model.modules() if hasattr(m, "q_norm"))
    attention.q_norm.register_forward_hook(lambda *_: seen.append(1))
    outputs(model(**inputs))
    assert len(seen) == 1 and len(calls) == 2


def test_flux_asks_a_processor_for_the_names_of_its_arguments() -> None:
    import inspect

    model, *_ = made("qwen-image")
    attention = next(m for m in model.modules() if "processor" in m.__dict__)
    expected = inspect.signature(attention.processor.__call__)
    accelerate(model)
    assert inspect.signature(attention.processor.__call__) == expected
    twin = pickle.loads(pickle.dumps(model))
    found = next(m for m in twin.modules() if "processor" in m.__dict__)
    assert inspect.signature(found.processor.__call__) == expected
