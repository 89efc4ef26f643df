"""Grounding DINO and MM Grounding DINO: fusion of image and text, deformable attention.

Their layers ask their attentions for weights always, and the encoder and decoder drop them unless
``output_attentions``: only these know, so they say it (`weights`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations._blocks import SERVED
from mmkernels.integrations._swaps import Swap
from mmkernels.integrations.transformers.feed_forward import feed_forward
from mmkernels.integrations.transformers.fusion import fusion
from mmkernels.integrations.transformers.weights import weights
from mmkernels.ops.deformable_attention import deformable_attention

__all__ = ["SWAPS"]


def _encoder(module: Any, *args: Any, output_attentions: bool | None = None, **kwargs: Any) -> Any:
    wanted = module.config.output_attentions if output_attentions is None else output_attentions
    with weights.said_to_be("kept" if wanted else "dropped"):
        return type(module).forward(module, *args, output_attentions=output_attentions, **kwargs)


def _text_enhancer(module: Any, *args: Any, **kwargs: Any) -> Any:
    if weights.are("kept"):
        return type(module).forward(module, *args, **kwargs)
    with weights.said_to_be("dropped"):
        return type(module).forward(module, *args, **kwargs)


def _decoder_layer(module: Any, *args: Any, output_attentions: bool | None = False, **kwargs: Any) -> Any:
    with weights.said_to_be("kept" if output_attentions else "dropped"):
        return type(module).forward(module, *args, output_attentions=output_attentions, **kwargs)


def _deformable_layer(
    module: Any, hidden_states: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if args or module.training:  # where it looks for infinities in the end
        return type(module).forward(module, hidden_states, attention_mask, *args, **kwargs)
    attended, of_attention = module.self_attn(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        encoder_hidden_states=hidden_states,
        encoder_attention_mask=attention_mask,
        **kwargs,
    )
    x = module.self_attn_layer_norm(hidden_states + attended)
    return module.final_layer_norm(feed_forward(module, x, x)), of_attention


def _deformable(
    module: Any,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    kinds = {value.dtype, sampling_locations.dtype, attention_weights.dtype}
    if len(kinds) > 1 or value.dtype not in SERVED or torch.compiler.is_compiling():
        return type(module).forward(
            module,
            value,
            value_spatial_shapes,
            value_spatial_shapes_list,
            level_start_index,
            sampling_locations,
            attention_weights,
            im2col_step,
        )
    shapes = [(int(height), int(width)) for height, width in value_spatial_shapes_list]
    return deformable_attention(value, shapes, sampling_locations, attention_weights)


_FUSED, _SAMPLED, _WITHOUT = "bidirectional_cross_attention", "deformable_attention", "attention without weights"

SWAPS: dict[str, Swap] = {}
for _file, _prefix, _of_encoder, _of_enhancer in (
    ("grounding_dino.modeling_grounding_dino.", "GroundingDino", "4c9fcb5c18eb", "c19a513a0db1"),
    ("mm_grounding_dino.modeling_mm_grounding_dino.", "MMGroundingDino", "6e77a2fc1c86", "53958cf43938"),
):
    SWAPS |= {
        f"{_file}{_prefix}Encoder": Swap(_encoder, _WITHOUT, (_of_encoder,)),
        f"{_file}{_prefix}TextEnhancerLayer": Swap(_text_enhancer, _WITHOUT, (_of_enhancer,)),
        f"{_file}{_prefix}DecoderLayer": Swap(_decoder_layer, _WITHOUT, ("185ff025433f",)),
        f"{_file}{_prefix}DeformableLayer": Swap(_deformable_layer, "concat_linear", ("ec4ccb8867d0",)),
        f"{_file}{_prefix}BiMultiHeadAttention": Swap(fusion, _FUSED, ("f63ab9945e07",)),
    }
for _file in ("grounding_dino", "mm_grounding_dino", "omdet_turbo", "deformable_detr"):
    SWAPS[f"{_file}.modeling_{_file}.MultiScaleDeformableAttention"] = Swap(_deformable, _SAMPLED, ("a3da3bed8dd3",))
