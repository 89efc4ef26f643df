"""Small models of other libraries with random weights: what `accelerate` is tested on."""

from __future__ import annotations

import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from environment import ALONE, DEVICE
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
WIDTH, HEADS = 64, 4
IMAGE_TOKEN = 90

Outputs = Callable[[Any], list[Tensor]]
Built = tuple[nn.Module, dict[str, Any], Outputs]
ARCHITECTURES: dict[str, Callable[[], Built]] = {}


def why_no_models() -> str | None:
    """Why tests of other libraries' models are to be skipped; None where they run, and where they must."""
    if ALONE is not None or DEVICE != "cpu":
        return f"other libraries' models are tested on the CPU, not on {ALONE or DEVICE} alone"
    if sys.version_info < (3, 11):
        return "transformers and diffusers need Python 3.11"
    if os.environ.get("MMKERNELS_REQUIRE_MODELS", "0") not in ("", "0"):
        return None
    try:
        import diffusers  # noqa: F401
        import open_clip  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        return f"{error}: pip install --no-deps -r requirements-models.txt"
    return None


def use_torchvision_of_another_torch() -> None:
    """PyPI's torchvision is CUDA's: beside a torch without CUDA it has no ops, and fails where it describes them."""
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))


use_torchvision_of_another_torch()


def architecture(build: Callable[[], Built]) -> Callable[[], Built]:
    ARCHITECTURES[build.__name__] = build
    return build


def build(name: str, dtype: torch.dtype = torch.float32) -> Built:
    """A model with weights at which differences show, its inputs, and what to take of its output."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs, outputs = ARCHITECTURES[name]()
    if dtype == torch.bfloat16 and "dino" in name:  # whose choice of pixels as queries hangs on the last bits
        outputs = named(*ENCODED)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                scale = (1.0 / max(1, parameter[0].numel())) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model = model.to(dtype).eval().requires_grad_(True)
    return model, cast(inputs, dtype), outputs


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(5, 80, (batch, length), generator=torch.Generator().manual_seed(seed))


def keep(batch: int, length: int) -> Tensor:
    """(batch, length) of ones and zeros: all of the first row, ever less of the beginning of the others."""
    lengths = torch.tensor([length - i * length // (2 * batch) for i in range(batch)])
    return (torch.arange(length) < lengths[:, None]).long()


def random(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def named(*names: str) -> Outputs:
    return lambda output: [getattr(output, name) for name in names]


def text(**more: Any) -> dict[str, Any]:
    """The configuration of a language model or of BERT."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    return {**sizes, "vocab_size": 100, "pad_token_id": 0, **more}


def vision(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    return {**sizes, "image_size": 32, "patch_size": 8, **more}


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@architecture
def clip() -> Built:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config=text(max_position_embeddings=16, eos_token_id=3), vision_config=vision(), projection_dim=32
    )
    x = tokens(3, 12)
    x[:, -1] = 3
    inputs = {"input_ids": x, "attention_mask": keep(3, 12), "pixel_values": random(3, 3, 32, 32), "return_loss": True}
    return CLIPModel(config), inputs, named("logits_per_image", "loss")


@architecture
def siglip() -> Built:
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig(text_config=text(max_position_embeddings=16, projection_size=64), vision_config=vision())
    inputs = {"input_ids": tokens(3, 12), "pixel_values": random(3, 3, 32, 32), "return_loss": True}
    return SiglipModel(config), inputs, named("logits_per_image", "loss")


@architecture
def blip() -> Built:
    from transformers import BlipConfig, BlipForImageTextRetrieval

    more = {"encoder_hidden_size": WIDTH, "projection_dim": 32, "max_position_embeddings": 32, **NO_DROPOUT}
    config = BlipConfig(text_config=text(**more), vision_config=vision())
    inputs = {"input_ids": tokens(2, 11), "attention_mask": keep(2, 11), "pixel_values": random(2, 3, 32, 32)}
    return BlipForImageTextRetrieval(config), inputs, named("itm_score")


@architecture
def blip_2() -> Built:
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    more = {"encoder_hidden_size": WIDTH, "cross_attention_frequency": 1, "use_qformer_text_input": True, **NO_DROPOUT}
    config = Blip2Config(
        vision_config=vision(),
        qformer_config=text(**more, max_position_embeddings=32),
        text_config={"model_type": "opt", **text(word_embed_proj_dim=WIDTH, ffn_dim=64)},
        num_query_tokens=6,
        image_text_hidden_size=32,
    )
    inputs = {"input_ids": tokens(2, 11), "attention_mask": keep(2, 11), "pixel_values": random(2, 3, 32, 32)}
    inputs["use_image_text_matching_head"] = True
    return Blip2ForImageTextRetrieval(config), inputs, named("logits_per_image")


@architecture
def flava() -> Built:
    from transformers import FlavaConfig, FlavaModel

    config = FlavaConfig(
        text_config=text(**NO_DROPOUT), image_config=vision(**NO_DROPOUT), multimodal_config=text(**NO_DROPOUT)
    )
    inputs = {"input_ids": tokens(3, 12), "attention_mask": keep(3, 12), "pixel_values": random(3, 3, 32, 32)}
    return FlavaModel(config), inputs, named("multimodal_embeddings")


@architecture
def lxmert() -> Built:
    from transformers import LxmertConfig, LxmertModel

    config = LxmertConfig(**text(l_layers=1, x_layers=2, r_layers=1, visual_feat_dim=24, **NO_DROPOUT))
    inputs = {"input_ids": tokens(3, 12), "attention_mask": keep(3, 12), "visual_feats": random(3, 10, 24)}
    inputs |= {"visual_pos": random(3, 10, 4), "visual_attention_mask": keep(3, 10)}
    return LxmertModel(config), inputs, named("language_output", "vision_output", "pooled_output")


@architecture
def vilt() -> Built:
    from transformers import ViltConfig, ViltModel

    config = ViltConfig(**text(**NO_DROPOUT), image_size=32, patch_size=8, max_image_length=-1)
    inputs = {"input_ids": tokens(2, 11), "attention_mask": keep(2, 11), "pixel_values": random(2, 3, 32, 32)}
    inputs["pixel_mask"] = torch.ones(2, 32, 32, dtype=torch.long)
    return ViltModel(config), inputs, named("last_hidden_state", "pooler_output")


@architecture
def visual_bert() -> Built:
    from transformers import VisualBertConfig, VisualBertModel

    config = VisualBertConfig(**text(visual_embedding_dim=24, **NO_DROPOUT))
    inputs = {"input_ids": tokens(3, 12), "attention_mask": keep(3, 12), "visual_embeds": random(3, 7, 24)}
    inputs["visual_attention_mask"] = torch.ones(3, 7, dtype=torch.long)
    return VisualBertModel(config), inputs, named("last_hidden_state", "pooler_output")


ENCODED = ("encoder_last_hidden_state_vision", "encoder_last_hidden_state_text")


def detector(prefix: str, **more: Any) -> Built:
    import transformers

    backbone = transformers.SwinConfig(
        image_size=128,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = getattr(transformers, f"{prefix}Config")(
        backbone_config=backbone,
        text_config={"model_type": "bert", **text(num_hidden_layers=1, vocab_size=1100)},
        **{"d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 12, "num_feature_levels": 4},
        **{"max_text_len": 16, "text_enhancer_dropout": 0.0, "fusion_droppath": 0.0, "fusion_dropout": 0.0},
        **{"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "disable_custom_kernels": True},
    )
    x = tokens(2, 12)
    x[:, 0], x[:, 5::6] = 101, 1012
    inputs = {"input_ids": x, "attention_mask": keep(2, 12), "token_type_ids": torch.zeros_like(x)}
    inputs |= {"pixel_values": random(2, 3, 128, 128), "pixel_mask": torch.ones(2, 128, 128, dtype=torch.long)}
    inputs["pixel_mask"][1, :, 96:] = 0
    picked = named(*ENCODED, "logits", "pred_boxes")
    return getattr(transformers, f"{prefix}ForObjectDetection")(config), inputs, picked


@architecture
def grounding_dino() -> Built:
    return detector("GroundingDino")


@architecture
def mm_grounding_dino() -> Built:
    return detector("MMGroundingDino")


@architecture
def whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **{"vocab_size": 100, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 2, "num_mel_bins": 16},
        **{"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 64},
        **{"decoder_ffn_dim": 64, "max_source_positions": 30, "max_target_positions": 32, "pad_token_id": 0},
        **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    )
    x = tokens(2, 9)
    inputs = {"input_features": random(2, 16, 60), "decoder_input_ids": x, "labels": x, "use_cache": False}
    return WhisperForConditionalGeneration(config), inputs, named("logits", "loss")


def language(config: str, model: str, **more: Any) -> Built:
    import transformers

    settings = text(num_key_value_heads=2, head_dim=16, max_position_embeddings=64, **more)
    inputs = {"input_ids": tokens(2, 18), "attention_mask": keep(2, 18), "use_cache": False}
    return getattr(transformers, model)(getattr(transformers, config)(**settings)), inputs, named("logits")


@architecture
def llama() -> Built:
    return language("LlamaConfig", "LlamaForCausalLM")


@architecture
def gemma_2_with_softcap_and_windows() -> Built:
    return language("Gemma2Config", "Gemma2ForCausalLM", sliding_window=6, query_pre_attn_scalar=16)


@architecture
def mistral_with_windows() -> Built:
    return language("MistralConfig", "MistralForCausalLM", sliding_window=6)


@architecture
def gpt_oss_with_sinks() -> Built:
    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6, "experts_implementation": "eager"}
    return language("GptOssConfig", "GptOssForCausalLM", **more)


@architecture
def t5_with_position_bias() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=100, d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=HEADS, dropout_rate=0.0)
    config.pad_token_id = config.decoder_start_token_id = 0
    inputs = {"input_ids": tokens(2, 18), "attention_mask": keep(2, 18), "labels": tokens(2, 9), "use_cache": False}
    return T5ForConditionalGeneration(config), inputs, named("logits", "loss")


@architecture
def llava() -> Built:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision(num_hidden_layers=2), "projection_dim": 32},
        text_config={"model_type": "llama", **text(num_key_value_heads=2, max_position_embeddings=64)},
        image_token_index=IMAGE_TOKEN,
    )
    x = tokens(2, 28)
    x[:, 4:20] = IMAGE_TOKEN
    inputs = {"input_ids": x, "attention_mask": keep(2, 28) | (x == IMAGE_TOKEN), "pixel_values": random(2, 3, 32, 32)}
    return LlavaForConditionalGeneration(config), {**inputs, "use_cache": False}, named("logits")


def qwen(prefix: str, **more: Any) -> Built:
    import transformers

    text_config = text(num_key_value_heads=2, max_position_embeddings=64)
    text_config["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    config = getattr(transformers, f"{prefix}Config")(
        vision_config={"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, **more},
        text_config=text_config,
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=91,
        vision_end_token_id=92,
        video_token_id=93,
    )
    x = tokens(2, 14)
    x[0, 2:6], x[1, 2:8] = IMAGE_TOKEN, IMAGE_TOKEN
    inputs = {"input_ids": x, "attention_mask": torch.ones_like(x), "use_cache": False}
    inputs |= {"pixel_values": random(40, 96), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 6]])}
    inputs["mm_token_type_ids"] = (x == IMAGE_TOKEN).int()
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config), inputs, named("logits")


@architecture
def qwen_2_vl() -> Built:
    return qwen("Qwen2VL", embed_dim=64, hidden_size=WIDTH)


@architecture
def qwen_2_5_vl_with_windows() -> Built:
    more = {"out_hidden_size": WIDTH, "window_size": 16, "fullatt_block_indexes": [1], "intermediate_size": 64}
    return qwen("Qwen2_5_VL", hidden_size=64, **more)


@architecture
def mllama() -> Built:
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text_config = text(num_key_value_heads=2, cross_attention_layers=[1], max_position_embeddings=64)
    config = MllamaConfig(
        vision_config={
            **{"hidden_size": 32, "attention_heads": 4, "num_hidden_layers": 2, "num_global_layers": 1},
            **{"intermediate_size": 64, "image_size": 16, "patch_size": 8, "max_num_tiles": 2},
            **{"intermediate_layers_indices": [0], "vision_output_dim": 64},
            "supported_aspect_ratios": [[1, 1], [1, 2]],
        },
        text_config={**text_config, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        image_token_index=IMAGE_TOKEN,
    )
    x = tokens(2, 12)
    x[:, 2] = IMAGE_TOKEN
    inputs = {"input_ids": x, "attention_mask": keep(2, 12), "pixel_values": random(2, 1, 2, 3, 16, 16)}
    inputs |= {"aspect_ratio_ids": torch.tensor([[2], [1]]), "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]])}
    inputs["cross_attention_mask"] = torch.ones(2, 12, 1, 2, dtype=torch.long)
    inputs["cross_attention_mask"][1, :, :, 1] = 0
    return MllamaForConditionalGeneration(config), {**inputs, "use_cache": False}, named("logits")


@architecture
def idefics() -> Built:
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    config = IdeficsConfig(
        **text(additional_vocab_size=0, cross_layer_interval=1, use_resampler=True, dropout=0.0),
        vision_config={"embed_dim": WIDTH, **vision()},
        perceiver_config={
            **{"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 16},
        },
        alpha_initializer="ones",
    )
    x = tokens(2, 12)
    inputs = {"input_ids": x, "attention_mask": keep(2, 12), "pixel_values": random(2, 2, 3, 32, 32)}
    inputs["image_attention_mask"] = torch.ones(2, 12, 2, dtype=torch.long)
    inputs["image_attention_mask"][1, :4, 1] = 0
    return IdeficsForVisionText2Text(config), {**inputs, "use_cache": False}, named("logits")


@architecture
def idefics_2() -> Built:
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    config = Idefics2Config(
        vision_config=vision(),
        perceiver_config={
            **{"hidden_size": WIDTH, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4},
            **{"resampler_head_dim": 16, "num_key_value_heads": 2},
        },
        text_config={"model_type": "mistral", **text(num_key_value_heads=2, max_position_embeddings=64)},
        image_token_id=IMAGE_TOKEN,
    )
    x = tokens(2, 12)
    x[:, 3:7] = IMAGE_TOKEN
    inputs = {"input_ids": x, "attention_mask": keep(2, 12), "pixel_values": random(2, 1, 3, 32, 32)}
    inputs["pixel_attention_mask"] = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    inputs["pixel_attention_mask"][1, :, :, 16:] = False
    return Idefics2ForConditionalGeneration(config), {**inputs, "use_cache": False}, named("logits")


@architecture
def pali_gemma() -> Built:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **vision(), "vision_use_head": False},
        text_config={"model_type": "gemma", **text(num_key_value_heads=2, head_dim=16, max_position_embeddings=64)},
        image_token_id=IMAGE_TOKEN,
        projection_dim=WIDTH,
    )
    x = tokens(2, 24)
    x[:, :16] = IMAGE_TOKEN
    inputs = {"input_ids": x, "attention_mask": keep(2, 24) | (x == IMAGE_TOKEN), "pixel_values": random(2, 3, 32, 32)}
    inputs["token_type_ids"] = (torch.arange(24) >= 20).long().expand(2, -1)
    return PaliGemmaForConditionalGeneration(config), {**inputs, "use_cache": False}, named("logits")


@architecture
def gemma_3_with_windows() -> Built:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    of_text = text(num_key_value_heads=2, head_dim=16, max_position_embeddings=64, sliding_window=6)
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **vision(), "vision_use_head": False},
        text_config={**of_text, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
        image_token_index=IMAGE_TOKEN,
        mm_tokens_per_image=4,
    )
    x = tokens(2, 18)
    x[:, 3:7] = IMAGE_TOKEN
    inputs = {"input_ids": x, "attention_mask": keep(2, 18), "pixel_values": random(2, 3, 32, 32)}
    inputs["token_type_ids"] = (x == IMAGE_TOKEN).long()
    return Gemma3ForConditionalGeneration(config), {**inputs, "use_cache": False}, named("logits")


@architecture
def udop_with_position_bias() -> Built:
    from transformers import UdopConfig, UdopForConditionalGeneration

    config = UdopConfig(
        **{"vocab_size": 100, "d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": HEADS},
        **{"dropout_rate": 0.0, "image_size": 32, "patch_size": 8, "max_2d_position_embeddings": 64},
        **{"pad_token_id": 0, "decoder_start_token_id": 0, "use_cache": False},
    )
    x = tokens(2, 12)
    boxes = torch.rand(2, 12, 4, generator=torch.Generator().manual_seed(7)).sort(-1)[0][..., [0, 1, 2, 3]]
    inputs = {"input_ids": x, "attention_mask": keep(2, 12), "bbox": boxes, "pixel_values": random(2, 3, 32, 32)}
    return UdopForConditionalGeneration(config), {**inputs, "labels": tokens(2, 5)}, named("logits", "loss")


import architectures_beyond_transformers  # noqa: E402, F401  (which adds to ARCHITECTURES)
