"""Image encoders of which an inner layer is read: the layers after it run when their outcome is read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import HEADS, IMAGE_TOKEN, WIDTH, build, random, text, tokens, vision, why_no_models
from torch import nn

from mmkernels.integrations import accelerate, restore
from mmkernels.testing import same_bits

NO_MODELS = why_no_models()
pytestmark = pytest.mark.skipif(NO_MODELS is not None, reason=str(NO_MODELS))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers ran late, for each time that this was needed."""
    from mmkernels.integrations.transformers import vision

    late: list[int] = []
    finish = vision._finish
    monkeypatch.setattr(
        vision, "_finish", lambda module, ends, layers, *args: late.append(1) or finish(module, ends, layers, *args)
    )
    return late


def encoder(kind: str) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": HEADS}
    sizes |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
    return SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=kind == "siglip with a head")).eval()


READINGS: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda out: out.last_hidden_state,
    "a name": lambda out: out["last_hidden_state"],
    "a position": lambda out: out[0],
    "a tuple": lambda out: out.to_tuple()[0],
    "get": lambda out: out.get("last_hidden_state"),
    "values": lambda out: next(iter(out.values())),
    "items": lambda out: next(iter(out.items()))[1],
    "keywords": lambda out: dict(**out)["last_hidden_state"],
    "a dict": lambda out: dict(out)["last_hidden_state"],
    "a copy": lambda out: copy.copy(out).last_hidden_state,
    "a pickle": lambda out: pickle.loads(pickle.dumps(out)).last_hidden_state,
    "a tree": lambda out: torch.utils._pytree.tree_leaves(out)[0],
}


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip with a head"])
def test_every_reading_finds_what_the_layers_after_the_chosen_one_give(kind, reading, runs):
    model = encoder(kind)
    x = random(2, 3, 16, 16)
    with torch.no_grad():
        plain = model(x, output_hidden_states=-3)
        accelerate(model)
        out = model(pixel_values=x, output_hidden_states=-3)
        assert isinstance(out, type(plain))
    assert [h is None for h in out.hidden_states] == [h is None for h in plain.hidden_states]
    torch.testing.assert_close(out.hidden_states[1], plain.hidden_states[1], rtol=1e-4, atol=1e-4)
    assert runs == []
    last = READINGS[reading](out)
    assert runs == [1] and not last.requires_grad
    torch.testing.assert_close(last, plain.last_hidden_state, rtol=1e-4, atol=1e-4)
    assert list(out.keys()) == list(plain.keys()) and len(out) == len(plain) and len(runs) == 1
    if plain.pooler_output is not None:
        torch.testing.assert_close(out.pooler_output, plain.pooler_output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", [-1, 3, [0, -1], True])
def test_the_last_layer_does_not_wait_where_it_is_asked_for(asked, runs):
    model = encoder("clip")
    x = random(2, 3, 16, 16)
    plain = model(x, output_hidden_states=asked)
    accelerate(model)
    out = model(x, output_hidden_states=asked)
    assert type(out) is type(plain) and list(out.keys()) == list(plain.keys())
    torch.testing.assert_close(out.last_hidden_state, plain.last_hidden_state, rtol=1e-4, atol=1e-4)
    assert runs == []


TILED = {"image_sizes": torch.tensor([[32, 32]]), "pixel_values": random(1, 2, 3, 32, 32)}  # an image and its one tile
PINPOINTS = {"image_grid_pinpoints": [[32, 32]]}
WHOLE = {"pixel_values": random(1, 3, 32, 32)}
KIN: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # tokens of an image, inputs, configuration
    "VipLlava": (16, WHOLE, {}),
    "LlavaNext": (16 + 4 * (4 + 1), TILED, PINPOINTS),
    "LlavaNextVideo": (16 + 4 * (4 + 1), TILED, {**PINPOINTS, "video_token_index": 91}),
    "LlavaOnevision": (16 + 4 * (4 + 1), TILED, {**PINPOINTS, "video_token_index": 91}),
    "VideoLlava": (16, {"pixel_values_images": WHOLE["pixel_values"]}, {"video_token_index": 91}),
    "AyaVision": (4, WHOLE, {}),
}


@pytest.mark.parametrize("prefix", KIN)
def test_llava_s_kin_never_run_the_last_layer(prefix, runs):
    import transformers

    count, images, more = KIN[prefix]
    has_siglip = prefix in ("LlavaOnevision", "AyaVision")
    of_images = {"model_type": "siglip_vision_model" if has_siglip else "clip_vision_model", **vision()}
    of_images |= {"num_hidden_layers": 3} | ({"vision_use_head": False} if has_siglip else {})
    config = getattr(transformers, f"{prefix}Config")(
        vision_config=of_images,
        text_config={"model_type": "llama", **text(num_key_value_heads=2, max_position_embeddings=256)},
        **{"image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN, "vision_feature_layer": -2, **more},
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    x = tokens(1, count + 6)
    x[:, 3 : 3 + count] = IMAGE_TOKEN
    inputs = {"input_ids": x, "attention_mask": torch.ones_like(x), "use_cache": False, **images}
    plain = model(**inputs)
    accelerate(model)
    out = model(**inputs)
    assert runs == []
    torch.testing.assert_close(out.logits, plain.logits, rtol=1e-4, atol=1e-4)
    last = out.image_outputs.last_hidden_state
    assert runs == [1]
    torch.testing.assert_close(last, plain.image_outputs.last_hidden_state, rtol=1e-4, atol=1e-4)


def test_a_model_that_reads_an_inner_layer_never_runs_the_last(runs):
    model, inputs, outputs = build("llava")
    plain = model(**inputs)
    expected = plain.image_outputs.last_hidden_state
    as_tuple = model(**inputs, return_dict=False)
    accelerate(model)
    out = model(**inputs)
    outputs(out)[0].sum().backward()
    model.generate(**{k: v for k, v in inputs.items() if k != "use_cache"}, max_new_tokens=2, do_sample=False)
    assert runs == []
    torch.testing.assert_close(out.image_outputs.last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.image_outputs.pooler_output, plain.image_outputs.pooler_output, rtol=1e-4, atol=1e-4)
    assert runs == [1] and expected.grad_fn is not None and out.image_outputs.last_hidden_state.grad_fn is not None
    ours = model(**inputs, return_dict=False)
    flat = torch.utils._pytree.tree_leaves
    torch.testing.assert_close(flat(ours), flat(as_tuple), rtol=1e-4, atol=1e-4)
    restore(model)
    assert same_bits(model(**inputs).logits, plain.logits)


@pytest.mark.parametrize("where", ["encoder", "encoder.layers.2", "encoder.layers.2.mlp.fc1", "post_layernorm", ""])
def test_what_is_hooked_does_not_wait(where, runs):
    model = encoder("clip")
    seen: list[int] = []
    model.get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    accelerate(model)
    model(random(2, 3, 16, 16), output_hidden_states=1)
    assert seen == [1] and runs == []


def test_weights_that_change_before_the_reading_are_an_error():
    model = encoder("clip")
    accelerate(model)
    out = model(random(2, 3, 16, 16), output_hidden_states=1)
    with torch.no_grad():
        model.encoder.layers[2].mlp.fc1.bias.add_(1.0)
    with pytest.raises(RuntimeError, match="expected its weights to be those of the call"):
        out.last_hidden_state  # noqa: B018
    with pytest.raises(RuntimeError, match="expected its weights to be those of the call"):
        out.to_tuple()
