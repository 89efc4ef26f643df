"""Joint attention of diffusers' models that rotate queries and keys: FLUX and its kin, Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations._blocks import SERVED, linear, masking
from mmkernels.integrations._rotary_tables import every_other, kept, real_and_imaginary
from mmkernels.integrations._swaps import Swap
from mmkernels.nn._children import is_plain
from mmkernels.ops._checks import autocast_is_on
from mmkernels.ops.joint_attention import joint_attention
from mmkernels.ops.norm_rotary import norm_rotary

__all__ = ["SWAPS"]

Table = tuple[Tensor, Tensor]


def _flux_attention(
    original: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> Any:
    image, text = hidden_states, encoder_hidden_states
    both = (attn.added_kv_proj_dim is not None) == (text is not None)
    table = _halved_tables(image_rotary_emb) if both and attention_mask is None and not attn.fused_projections else None
    streams = _streams(original, attn, image, text, attn.head_dim) if table is not None else None
    if streams is None or table is None or table[0].shape[0] != sum(x.shape[1] for x, *_ in streams):
        return original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
    tables: list[Table] = [table]
    if text is not None:
        length = text.shape[1]
        tables = [(table[0][:length], table[1][:length]), (table[0][length:], table[1][length:])]
    *text_out, out = _attended(streams, tables, attn.head_dim, {})
    if text is None:
        return out
    out = attn.to_out[1](linear(attn.to_out[0], out))
    return out, linear(attn.to_add_out, text_out[0])


def _qwen_image_attention(
    original: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_hidden_states_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> Any:
    image, text, mask = hidden_states, encoder_hidden_states, encoder_hidden_states_mask
    head_dim = attn.inner_dim // attn.heads
    tables = _complex_tables(image_rotary_emb) if text is not None and attention_mask is None else None
    options: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
    if mask is not None and mask.dtype == torch.bool:
        options = masking(mask[:, None, None], len(mask))
    streams = None
    if tables is not None and "attn_mask" not in options:
        streams = _streams(original, attn, image, text, head_dim)
    if (
        streams is None
        or tables is None
        or any(table[0].shape[0] != x.shape[1] for table, (x, *_) in zip(tables, streams, strict=True))
    ):
        return original(
            attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
        )
    text_lengths = options.get("key_lengths")
    lengths = {} if text_lengths is None else {"key_lengths": [text_lengths, None]}
    text_out, out = _attended(streams, tables, head_dim, lengths)
    out = linear(attn.to_out[0], out)
    for layer in attn.to_out[1:]:
        out = layer(out)
    return out, linear(attn.to_add_out, text_out)


def _streams(original: Any, attn: Any, image: Tensor, text: Tensor | None, head_dim: int) -> list[Any] | None:
    """Of text and image tokens, projections and norms; None where the ops do not do what is asked for."""
    streams = [(image, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
    if text is not None:
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        streams.insert(0, (text, *added))
    if original._attention_backend is not None or original._parallel_config is not None:
        return None
    if torch.compiler.is_compiling() or autocast_is_on(image.device) or image.device.type != "cpu":
        return None
    for x, *_, norm_q, norm_k in streams:
        if x.dtype not in SERVED or x.dtype != image.dtype:
            return None
        kinds = [_rms_norm(norm, x.dtype, head_dim) for norm in (norm_q, norm_k)]
        if None in kinds or kinds[0] != kinds[1]:
            return None
    return streams


def _rms_norm(norm: Any, dtype: torch.dtype, head_dim: int) -> float | None:
    """The eps of a plain RMSNorm with a weight of this dtype over a head; None of anything else."""
    from diffusers.models.normalization import RMSNorm

    if is_plain(norm, nn.RMSNorm):
        shape = norm.normalized_shape
    elif is_plain(norm, RMSNorm) and norm.bias is None:
        shape = norm.dim
    else:
        return None
    if tuple(shape) != (head_dim,) or norm.weight is None or norm.weight.dtype != dtype:
        return None
    return float(torch.finfo(dtype).eps if norm.eps is None else norm.eps)


def _attended(streams: list[Any], tables: list[Table], head_dim: int, options: dict[str, Any]) -> list[Tensor]:
    """The attention of all streams to all, (B, L, H·D) each."""
    queries, keys, values = [], [], []
    for (x, to_q, to_k, to_v, norm_q, norm_k), (cos, sin) in zip(streams, tables, strict=True):
        q, k, v = (linear(to, x).unflatten(-1, (-1, head_dim)).transpose(1, 2) for to in (to_q, to_k, to_v))
        weights = {"query_weight": norm_q.weight, "key_weight": norm_k.weight}
        eps = _rms_norm(norm_q, x.dtype, head_dim)
        q, k = norm_rotary(q, k, cos, sin, eps=eps or 0.0, interleaved=True, **weights)
        queries.append(q)
        keys.append(k)
        values.append(v)
    return [out.transpose(1, 2).flatten(2) for out in joint_attention(queries, keys, values, **options)]


def _halved_tables(given: Any) -> Table | None:
    """cos and sin (L, R/2) float32 of tables (L, R) that have every entry twice; None of others."""
    if not isinstance(given, (tuple, list)) or len(given) != 2 or torch.compiler.is_compiling():
        return None
    if any(type(t) is not Tensor or t.dim() != 2 or t.dtype not in SERVED or t.requires_grad for t in given):
        return None
    if any(t.device.type != "cpu" for t in given):
        return None
    cos, sin = (kept(t, every_other) for t in given)
    return None if cos is None or sin is None or cos.shape != sin.shape else (cos, sin)


def _complex_tables(given: Any) -> list[Table] | None:
    """(cos, sin) of text and of image, from the complex numbers (L, D/2) of image and text."""
    if not isinstance(given, (tuple, list)) or len(given) != 2 or torch.compiler.is_compiling():
        return None
    if any(type(t) is not Tensor or t.dim() != 2 or t.dtype != torch.complex64 or t.requires_grad for t in given):
        return None
    image, text = (kept(t, real_and_imaginary) for t in given)
    return [text, image]


_WITH = "norm_rotary, joint_attention"
_TRANSFORMERS = "models.transformers.transformer_"
SWAPS: dict[str, Swap] = {
    f"diffusers.{_TRANSFORMERS}{name}": swap
    for name, swap in {
        "flux.FluxAttnProcessor": Swap(_flux_attention, _WITH, ("445cf7d84b29",)),
        "qwenimage.QwenDoubleStreamAttnProcessor2_0": Swap(_qwen_image_attention, _WITH, ("3399ac5996e4",)),
    }.items()
}
