"""Modules of open_clip: the feed-forward networks of its residual blocks, CLIP's and CoCa's alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmkernels.integrations._blocks import activated, linear, takes_products
from mmkernels.integrations._swaps import Swap
from mmkernels.nn._children import is_plain

__all__ = ["SWAPS"]


def _block(
    module: Any, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
) -> Tensor:
    mlp = module.mlp
    if not is_plain(mlp, nn.Sequential) or not takes_products(q_x, mlp.c_fc.weight):
        return type(module).forward(module, q_x, k_x, v_x, attn_mask)
    if hasattr(module, "ln_1_kv"):
        k_x, v_x = (x if x is None else module.ln_1_kv(x) for x in (k_x, v_x))
    else:
        k_x = v_x = None
    attended = module.attention(q_x=module.ln_1(q_x), k_x=k_x, v_x=v_x, attn_mask=attn_mask)
    return _with_feed_forward(module, q_x + module.ls_1(attended), mlp)


def _custom_block(module: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    mlp = module.mlp
    if not is_plain(mlp, nn.Sequential) or not takes_products(x, mlp.c_fc.weight):
        return type(module).forward(module, x, attn_mask)
    x = x + module.ls_1(module.ln_attn(module.attn(module.ln_1(x), attn_mask=attn_mask)))
    return _with_feed_forward(module, x, mlp)


def _with_feed_forward(module: Any, x: Tensor, mlp: Any) -> Tensor:
    """x + ls_2(mlp(ln_2(x)))"""
    hidden = activated(mlp.c_fc, mlp.gelu, module.ln_2(x))
    if hasattr(mlp, "ln"):
        hidden = mlp.ln(hidden)
    if isinstance(module.ls_2, nn.Identity):
        return linear(mlp.c_proj, hidden, residual=x)
    return x + module.ls_2(linear(mlp.c_proj, hidden))


def _is_not_linear(module: Any) -> str | None:
    named = dict(module.mlp.named_children())
    expected = {"c_fc", "gelu", "c_proj"}
    if named.keys() - {"ln"} != expected or list(named)[-1] != "c_proj" or not hasattr(named["c_fc"], "weight"):
        return f"its mlp has {', '.join(named)}"
    return None


SWAPS = {
    f"open_clip.transformer.{name}": Swap(function, "concat_linear", (source,), _is_not_linear)
    for name, function, source in (
        ("ResidualAttentionBlock", _block, "cf10860e5ad9"),
        ("CustomResidualAttentionBlock", _custom_block, "ba492b6c1a1b"),
    )
}
