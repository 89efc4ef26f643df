"""Models of open_clip, diffusers and timm for the tests of integrations; `architectures` has those of transformers."""

from __future__ import annotations

import torch
from architectures import HEADS, WIDTH, Built, architecture, keep, named, random, tokens


@architecture
def coca() -> Built:
    from open_clip.coca_model import CoCa

    sizes = {"context_length": 12, "vocab_size": 100, "width": WIDTH, "heads": HEADS}
    model = CoCa(
        embed_dim=WIDTH,
        multimodal_cfg={**sizes, "layers": 2, "attn_pooler_heads": 4},
        text_cfg={**sizes, "layers": 1, "embed_cls": True, "output_tokens": True},
        vision_cfg={
            **{"image_size": 32, "layers": 1, "width": WIDTH, "patch_size": 8, "head_width": 16},
            **{"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        },
    )
    x = tokens(3, 12)
    x[1:, 7:] = 0
    picked = ("image_features", "text_features", "logits")
    return model, {"image": random(3, 3, 32, 32), "text": x}, lambda output: [output[name] for name in picked]


@architecture
def sd_3() -> Built:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2},
        **{"attention_head_dim": 16, "num_attention_heads": HEADS, "joint_attention_dim": 48, "pos_embed_max_size": 8},
        **{"caption_projection_dim": WIDTH, "pooled_projection_dim": 32, "qk_norm": "rms_norm"},
        dual_attention_layers=(0,),
    )
    inputs = {"hidden_states": random(2, 4, 8, 8), "encoder_hidden_states": random(2, 9, 48)}
    inputs |= {"pooled_projections": random(2, 32), "timestep": torch.tensor([500.0, 20.0])}
    return model, inputs, named("sample")


@architecture
def flux() -> Built:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        **{"patch_size": 1, "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16},
        **{"num_attention_heads": HEADS, "joint_attention_dim": 48, "pooled_projection_dim": 32},
        axes_dims_rope=(4, 6, 6),
    )
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    inputs = {"hidden_states": random(2, 16, 8), "encoder_hidden_states": random(2, 9, 48, seed=3)}
    inputs |= {"pooled_projections": random(2, 32), "timestep": torch.tensor([0.5, 0.02])}
    return model, {**inputs, "img_ids": places, "txt_ids": torch.zeros(9, 3)}, named("sample")


@architecture
def qwen_image() -> Built:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        **{"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16},
        **{"num_attention_heads": HEADS, "joint_attention_dim": 48},
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {"hidden_states": random(2, 16, 16), "encoder_hidden_states": random(2, 9, 48, seed=3)}
    inputs |= {"encoder_hidden_states_mask": keep(2, 9).bool(), "timestep": torch.tensor([0.5, 0.02])}
    return model, {**inputs, "img_shapes": [[(1, 4, 4)]] * 2}, named("sample")


@architecture
def timm_vit() -> Built:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS},
        qk_norm=True,
    )
    return model, {"x": random(2, 3, 32, 32)}, lambda output: [output]
