"""Modules of ``torch.nn``: attention, the layers of transformers, and linears where products are faster here."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.integrations import _few_queries, _key_lengths
from mmkernels.integrations._blocks import (
    SERVED,
    activated,
    dropout_p,
    is_large,
    linear,
    masking,
    multiplies,
    prefix_lengths,
    takes_products,
)
from mmkernels.integrations._swaps import Swap
from mmkernels.nn.multihead_cross_attention import MultiheadCrossAttention
from mmkernels.ops.concat_linear import concat_linear
from mmkernels.ops.cross_attention import cross_attention

__all__ = ["SWAPS"]


def _multihead_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    served = not need_weights and query.dim() == 3 and is_served(module, query)
    if key_padding_mask is not None and query.dim() == key.dim() == 3:  # of another shape it is torch's error
        batch_first = key if module.batch_first else key.transpose(0, 1)
        served = served and key_padding_mask.shape == batch_first.shape[:2]
    if not served or (is_causal and attn_mask is None) or _takes_short_way(module, query, key, value):
        return nn.MultiheadAttention.forward(
            module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    return attend(module, query, key, value, None if is_causal else attn_mask, key_padding_mask, is_causal), None


def _takes_short_way(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch has one call for all of this, and its time is that of the call."""
    of_self = query is key and key is value and module.batch_first and module._qkv_same_embed_dim
    if not of_self or module.training or torch.is_grad_enabled():
        return False
    return not is_large(query, module.in_proj_weight)


def is_served(module: nn.MultiheadAttention, query: Tensor) -> bool:
    plain = module.bias_k is None and not module.add_zero_attn
    return plain and query.dtype in SERVED and not query.is_nested


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """What nn.MultiheadAttention gives without weights; queries of batch 1 are those of every batch element."""
    dropout = module.dropout if module.training else 0.0
    plain = key is value and len(query) == len(key) and attn_mask is None and not is_causal and dropout == 0.0
    if plain and is_large(key, module.out_proj.weight):
        merged = _attended(module, query, key, key_padding_mask)
        if merged is not None:
            return _product(merged, module.out_proj.weight, module.out_proj.bias)
    q, k, v = _projected(module, query, key, value)
    q, k, v = (MultiheadCrossAttention._heads(module, x, True) for x in (q, k, v))  # type: ignore[arg-type]
    options = _masking(module, attn_mask, key_padding_mask, q, k)
    out = cross_attention(q, k, v, is_causal=is_causal, dropout_p=dropout, **options)
    out = out.transpose(1, 2) if module.batch_first else out.permute(2, 0, 1, 3)
    return _product(out.flatten(-2), module.out_proj.weight, module.out_proj.bias)


def _attended(module: nn.MultiheadAttention, query: Tensor, key: Tensor, padding: Tensor | None) -> Tensor | None:
    """Attention before its output projection where not all keys and values need to be computed, else None."""
    usual = module.batch_first and module._qkv_same_embed_dim
    if not usual or torch.compiler.is_compiling() or key.device.type != "cpu":
        return None
    lengths = None
    if padding is not None:
        lengths = prefix_lengths(~padding) if padding.dtype == torch.bool and padding.shape == key.shape[:2] else None
        if lengths is None:
            return None
    heads, width, weight, bias = module.num_heads, module.embed_dim, module.in_proj_weight, module.in_proj_bias
    keys, values = (
        _few_queries.Projection(weight[i * width :][:width], None if bias is None else bias[i * width :][:width])
        for i in (1, 2)
    )
    if _few_queries.pays(query.shape[1], key, keys, heads):
        q = _product(query, weight[:width], None if bias is None else bias[:width])
        keep = None if lengths is None else (torch.arange(key.shape[1]) < lengths[:, None])[:, None]
        return _few_queries.attend(q, key, keys, values, heads, module.head_dim**-0.5, keep)
    if lengths is None or query is key or not _key_lengths.pays(key, lengths, weight[width:]):
        return None
    q = _product(query, weight[:width], None if bias is None else bias[:width])
    return _key_lengths.attend_to_kept(q, key, lengths, weight[width:], None if bias is None else bias[width:], heads)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return concat_linear([x], weight, bias) if takes_products(x, weight) else F.linear(x, weight, bias)


def _projected(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The three input projections; tensors that are one and the same are projected by one product."""
    width, bias = module.embed_dim, module.in_proj_bias
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    if not module._qkv_same_embed_dim:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        return tuple(_product(*xwb) for xwb in zip((query, key, value), weights, biases, strict=True))
    weight = module.in_proj_weight
    if query is key and key is value:
        return _product(query, weight, bias).chunk(3, -1)
    if key is value:
        q = _product(query, weight[:width], biases[0])
        return q, *_product(key, weight[width:], None if bias is None else bias[width:]).chunk(2, -1)
    return tuple(_product(*xwb) for xwb in zip((query, key, value), weight.chunk(3), biases, strict=True))


def _masking(
    module: nn.MultiheadAttention, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor
) -> dict[str, Any]:
    """The masks of nn.MultiheadAttention, True = do not attend, as options of cross_attention."""
    if padding is None and attn_mask is None:
        return {}
    if padding is not None and padding.device.type == "cpu" and not torch.compiler.is_compiling():
        keep = ~padding if padding.dtype == torch.bool else padding == 0
        if padding.dtype == torch.bool or bool((keep | (padding == -torch.inf)).all()):
            lengths = prefix_lengths(keep)
            if lengths is not None:
                options = _masking(module, attn_mask, None, q, k)
                if "key_lengths" in options:  # of one query's mask
                    lengths = torch.minimum(lengths, options["key_lengths"])
                return {**options, "key_lengths": lengths}
    mask = MultiheadCrossAttention._merged_mask(module, attn_mask, padding, q, k, 0)  # type: ignore[arg-type]
    return masking(mask, q.shape[0])


def _encoder_layer(
    module: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    fuses = not src.is_nested and src.dim() == 3 and takes_products(src, module.linear1.weight)
    if not fuses or any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()):
        return nn.TransformerEncoderLayer.forward(module, src, src_mask, src_key_padding_mask, is_causal)
    attend = functools.partial(module._sa_block, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)
    x = src
    if module.norm_first:
        x = x + attend(module.norm1(x), is_causal=is_causal)
        return _feed_forward(module, module.norm2(x), x, module.dropout2)
    x = module.norm1(x + attend(x, is_causal=is_causal))
    return module.norm2(_feed_forward(module, x, x, module.dropout2))


def _decoder_layer(
    module: nn.TransformerDecoderLayer,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
) -> Tensor:
    own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
    other = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
    x = tgt
    if module.norm_first:
        x = x + module._sa_block(module.norm1(x), *own)
        x = x + module._mha_block(module.norm2(x), *other)
        return _feed_forward(module, module.norm3(x), x, module.dropout3)
    x = module.norm1(x + module._sa_block(x, *own))
    x = module.norm2(x + module._mha_block(x, *other))
    return module.norm3(_feed_forward(module, x, x, module.dropout3))


def _feed_forward(module: Any, x: Tensor, residual: Tensor, dropout: nn.Module) -> Tensor:
    """residual + dropout(linear2(dropout(activation(linear1(x)))))"""
    hidden = module.dropout(activated(module.linear1, module.activation, x))
    if dropout_p(dropout) == 0.0:
        return linear(module.linear2, hidden, residual=residual)
    return residual + dropout(linear(module.linear2, hidden))


def _linear(module: nn.Linear, input: Tensor) -> Tensor:
    weight = module.weight
    if type(weight) is nn.Parameter and takes_products(input, weight):
        return concat_linear([input], weight, module.bias)
    return F.linear(input, weight, module.bias)


def _patches(module: nn.Conv2d, input: Tensor) -> Tensor:
    """A convolution of patches side by side, as a product of the patches, (B, H'·W', C·h·w); channels are last then."""
    weight, bias = module.weight, module.bias
    height, width = weight.shape[2:]
    pays = input.dtype == torch.bfloat16 and width % 8 == 0  # else torch's are as fast, but for large ones
    pays = (pays or height * width >= _LARGE_PATCH) and takes_products(input, weight)
    fits = input.dim() == 4 and input.shape[1] == weight.shape[1] and type(weight) is nn.Parameter
    if not (fits and pays) or input.shape[2] < height or input.shape[3] < width:
        return nn.Conv2d.forward(module, input)
    down, across = input.shape[2] // height, input.shape[3] // width
    x = input[:, :, : down * height, : across * width].unflatten(3, (across, width)).unflatten(2, (down, height))
    x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return concat_linear([x], weight.flatten(1), bias).transpose(1, 2).unflatten(2, (down, across))


def _embeds_patches(module: Any) -> bool:
    side_by_side = module.stride == module.kernel_size and module.padding in ((0, 0), "valid")
    whole = module.dilation == (1, 1) and module.groups == 1 and min(module.kernel_size) >= 8
    return side_by_side and whole and multiplies(module)


_LARGE_PATCH = 1024


def no_projection(module: nn.Module) -> str | None:
    return None if type(module.out_proj).__name__ == "NonDynamicallyQuantizableLinear" else "its out_proj is wrapped"


SWAPS = {
    "torch.nn.modules.activation.MultiheadAttention": Swap(
        _multihead_attention, "cross_attention", ("7ab37236339a",), no_projection
    ),
    "torch.nn.modules.transformer.TransformerEncoderLayer": Swap(_encoder_layer, "concat_linear", ("e7c7d6541243",)),
    "torch.nn.modules.transformer.TransformerDecoderLayer": Swap(_decoder_layer, "concat_linear", ("006e14d4d728",)),
    "torch.nn.modules.linear.Linear": Swap(_linear, "concat_linear", ("7e11a09e2b61",), concerns=multiplies),
    "torch.nn.modules.conv.Conv2d": Swap(_patches, "concat_linear", ("096628d11471",), concerns=_embeds_patches),
}
