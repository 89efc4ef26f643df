"""Modules of Hugging Face's diffusers: joint attention of SD3, norms modulated by a condition, gated residuals.

`register` adds an attention backend for the models whose processors ask for one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations import diffusers_rotary
from mmkernels.integrations._blocks import SERVED, activated, is_plain_linear, linear, prefix_lengths, takes_products
from mmkernels.integrations._diffusers_attention import register
from mmkernels.integrations._swaps import Swap, SwappedProcessor, calls_otherwise
from mmkernels.nn._children import is_plain
from mmkernels.ops.concat_linear import concat_linear
from mmkernels.ops.joint_attention import joint_attention
from mmkernels.ops.modulated_norm import modulated_norm

__all__ = ["SWAPS", "mask_text_padding_of", "register"]


def _modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift, with a scale and a shift for each batch element."""
    plain = is_plain(norm, nn.LayerNorm) and x.dim() == 3 and x.dtype in SERVED
    if not plain or len(norm.normalized_shape) != 1 or {shift.dtype, scale.dtype} != {x.dtype}:
        return norm(x) * (1 + scale[:, None]) + shift[:, None]
    return modulated_norm(x, shift, scale, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps)


def _norm_zero(
    module: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if module.emb is not None:
        emb = module.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *rest = module.linear(module.silu(emb)).chunk(6, dim=1)  # then the gate, and the next norm's
    return _modulated(module.norm, x, shift, scale), *rest


def _norm_zero_single(module: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shift, scale, gate = module.linear(module.silu(emb)).chunk(3, dim=1)
    return _modulated(module.norm, x, shift, scale), gate


def _norm_zero_of_two(module: Any, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
    shift, scale, *rest, shift_2, scale_2, gate_2 = module.linear(module.silu(emb)).chunk(9, dim=1)
    x, x_2 = (_modulated(module.norm, hidden_states, *by) for by in ((shift, scale), (shift_2, scale_2)))
    return x, *rest, x_2, gate_2


def _norm_continuous(module: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    scale, shift = module.linear(module.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return _modulated(module.norm, x, shift, scale)


def _gelu(module: Any, hidden_states: Tensor) -> Tensor:
    return linear(module.proj, hidden_states, activation="gelu_tanh" if module.approximate == "tanh" else "gelu")


def _gelu_is_unknown(module: Any) -> str | None:
    return None if module.approximate in ("none", "tanh") else f"approximate={module.approximate!r}"


def _joint_block(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    if module._chunk_size is not None:
        return type(module).forward(module, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    options = joint_attention_kwargs or {}
    image, text = hidden_states, encoder_hidden_states
    image_norm, gate, shift_mlp, scale_mlp, gate_mlp, *second = module.norm1(image, emb=temb)
    if module.context_pre_only:
        text_norm = module.norm1_context(text, temb)
    else:
        text_norm, text_gate, *text_mlp = module.norm1_context(text, emb=temb)
    image_out, text_out = module.attn(hidden_states=image_norm, encoder_hidden_states=text_norm, **options)
    image = _gated(image, gate, image_out)
    if module.use_dual_attention:
        image_norm, gate = second
        image = _gated(image, gate, module.attn2(hidden_states=image_norm, **options))
    image = _gated(image, gate_mlp, module.ff(_modulated(module.norm2, image, shift_mlp, scale_mlp)))
    if module.context_pre_only:
        return None, image
    text = _gated(text, text_gate, text_out)
    shift_mlp, scale_mlp, gate_mlp = text_mlp
    text = _gated(text, gate_mlp, module.ff_context(_modulated(module.norm2_context, text, shift_mlp, scale_mlp)))
    return text, image


def _flux_block(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    image, text = hidden_states, encoder_hidden_states
    image_norm, *of_image = module.norm1(image, emb=temb)
    text_norm, *of_text = module.norm1_context(text, emb=temb)
    options = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
    image_out, text_out, *more = module.attn(hidden_states=image_norm, encoder_hidden_states=text_norm, **options)
    image = _ended(image, image_out, of_image, module.norm2, module.ff)
    if more:  # what an IP adapter adds
        image = image + more[0]
    text = _ended(text, text_out, of_text, module.norm2_context, module.ff_context)
    return _in_range(text), image


def _ended(x: Tensor, attended: Tensor, conditions: Any, norm: Any, network: Any) -> Tensor:
    """The end of a block: attention's gated residual, then that of the feed-forward network."""
    gate, shift, scale, gate_of_network = conditions
    x = _gated(x, gate, attended)
    return _gated(x, gate_of_network, network(_modulated(norm, x, shift, scale)))


def _in_range(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _flux_single_block(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, gate = module.norm(x, emb=temb)
    hidden = activated(module.proj_mlp, module.act_mlp, normed)
    options = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
    attended, last = module.attn(hidden_states=normed, **options), module.proj_out
    if is_plain_linear(last) and takes_products(attended, last.weight):
        out = concat_linear([attended, hidden], last.weight, last.bias)
    else:
        out = last(torch.cat([attended, hidden], dim=2))
    x = _in_range(_gated(x, gate, out))
    length = encoder_hidden_states.shape[1]
    return x[:, :length], x[:, length:]


def _qwen_block(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    if modulate_index is not None or module.zero_cond_t:  # two conditions, chosen for each token
        return type(module).forward(  # type: ignore[no-any-return]
            module,
            hidden_states,
            encoder_hidden_states,
            encoder_hidden_states_mask,
            temb,
            image_rotary_emb,
            joint_attention_kwargs,
            modulate_index,
        )
    image, text = hidden_states, encoder_hidden_states
    shift, scale, *of_image = module.img_mod(temb).chunk(6, dim=-1)
    image_norm = _modulated(module.img_norm1, image, shift, scale)
    shift, scale, *of_text = module.txt_mod(temb).chunk(6, dim=-1)
    text_norm = _modulated(module.txt_norm1, text, shift, scale)
    image_out, text_out = module.attn(
        hidden_states=image_norm,
        encoder_hidden_states=text_norm,
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    image = _ended(image, image_out, of_image, module.img_norm2, module.img_mlp)
    text = _ended(text, text_out, of_text, module.txt_norm2, module.txt_mlp)
    return _in_range(text), _in_range(image)


def _gated(residual: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """residual + gate * x, rounded once."""
    return torch.addcmul(residual, gate.unsqueeze(1), x)


def _joint_attention(
    original: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The original looks at no mask either."""
    return _joint(original, attn, hidden_states, encoder_hidden_states, attention_mask, None, *args, **kwargs)


def _masked_joint_attention(
    original: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """As `_joint_attention`, and nobody attends to what the mask (B, L) says is the text's padding."""
    lengths = None
    if attention_mask is not None and encoder_hidden_states is not None:
        keep = attention_mask != 0
        lengths = keep.sum(-1) if torch.compiler.is_compiling() else prefix_lengths(keep)
        if lengths is None or keep.shape != encoder_hidden_states.shape[:2]:
            expected = f"(B, L) = {tuple(encoder_hidden_states.shape[:2])} with padding at the end"
            raise ValueError(f"attention_mask: expected {expected}; got {tuple(keep.shape)}")
    return _joint(original, attn, hidden_states, encoder_hidden_states, attention_mask, lengths, *args, **kwargs)


def mask_text_padding_of(model: nn.Module) -> None:
    """Let the swapped joint attentions of a model look at a mask of the text."""
    for module in model.modules():
        processor = module.__dict__.get("processor")
        if isinstance(processor, SwappedProcessor) and processor.function is _joint_attention:
            processor.function = _masked_joint_attention


def _joint(
    original: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    text_lengths: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if hidden_states.dtype not in SERVED and text_lengths is None:
        return original(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
    streams = [(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
    if encoder_hidden_states is not None:
        norms = (attn.norm_added_q, attn.norm_added_k)
        streams.append((encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, *norms))
    q, k, v = [], [], []
    for x, to_q, to_k, to_v, norm_q, norm_k in streams:
        q.append(_normed_heads(norm_q, linear(to_q, x), attn.heads))
        k.append(_normed_heads(norm_k, linear(to_k, x), attn.heads))
        v.append(linear(to_v, x).unflatten(-1, (attn.heads, -1)).transpose(1, 2))
    lengths = None if text_lengths is None else [None, text_lengths]
    out, *text_out = (x.transpose(1, 2).flatten(2) for x in joint_attention(q, k, v, key_lengths=lengths))
    out = attn.to_out[1](linear(attn.to_out[0], out))
    if not text_out:
        return out
    return out, text_out[0] if attn.context_pre_only else linear(attn.to_add_out, text_out[0])


def _normed_heads(norm: Any, x: Tensor, heads: int) -> Tensor:
    """(B, L, H·D) as heads (B, H, L, D), each normalised; an RMSNorm in one pass, before the view is taken."""
    x = x.unflatten(-1, (heads, -1))
    if norm is None:
        return x.transpose(1, 2)
    if not _is_plain_rms_norm(norm) or {x.dtype, norm.weight.dtype} & {torch.float64} or norm.weight.dtype != x.dtype:
        return norm(x.transpose(1, 2))
    zero = x.new_zeros(1, x.shape[-1])
    y = modulated_norm(x.flatten(1, 2), zero, zero, norm="rms", norm_weight=norm.weight, eps=norm.eps)
    return y.view_as(x).transpose(1, 2)


def _is_plain_rms_norm(norm: Any) -> bool:
    from diffusers.models.normalization import RMSNorm

    return is_plain(norm, RMSNorm) and norm.weight is not None and norm.bias is None and len(norm.dim) == 1


_NORM, _MODELS = "modulated_norm", "diffusers.models."
_FLUX, _QWEN = "transformers.transformer_flux.", "transformers.transformer_qwenimage."
SWAPS: dict[str, Swap] = {
    _MODELS + name: swap
    for name, swap in {
        "normalization.AdaLayerNormZero": Swap(_norm_zero, _NORM, ("0451374e9f0f",)),
        "normalization.AdaLayerNormZeroSingle": Swap(_norm_zero_single, _NORM, ("0c25c24b27d0",)),
        "normalization.SD35AdaLayerNormZeroX": Swap(_norm_zero_of_two, _NORM, ("cbb7f0eb076a",)),
        "normalization.AdaLayerNormContinuous": Swap(_norm_continuous, _NORM, ("2d9383c73b77",)),
        "activations.GELU": Swap(_gelu, "concat_linear", ("4a4013c47ba8",), _gelu_is_unknown),
        "attention.JointTransformerBlock": Swap(_joint_block, _NORM, ("e1fece510a37",)),
        _FLUX + "FluxTransformerBlock": Swap(_flux_block, _NORM, ("fbc8a6dbd9d9",)),
        _FLUX + "FluxSingleTransformerBlock": Swap(_flux_single_block, "concat_linear", ("839e080d4c11",)),
        _QWEN + "QwenImageTransformerBlock": Swap(
            _qwen_block, _NORM, ("7369f4430af2",), calls_otherwise(_modulate="f3729fdbdea3")
        ),
        "attention_processor.JointAttnProcessor2_0": Swap(_joint_attention, "joint_attention", ("da700cb97c56",)),
    }.items()
}
SWAPS.update(diffusers_rotary.SWAPS)
