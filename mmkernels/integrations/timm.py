"""Modules of timm: the attention, feed-forward network and block of its vision transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmkernels.integrations._blocks import SERVED, activated, dropout_p, is_hooked, linear, masking, takes_products
from mmkernels.integrations._swaps import Swap, SwappedForward
from mmkernels.ops.cross_attention import cross_attention

__all__ = ["SWAPS"]


_FEWEST_SCORES = 1 << 20  # times features; below, a call is too short for what attention gains


def _attention(module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    masked = attn_mask is not None
    pays = x.dim() == 3 and x.numel() * x.shape[1] >= _FEWEST_SCORES
    served = pays and module.fused_attn and x.dtype in SERVED and not (masked and is_causal)
    if not served or (masked and not 2 <= attn_mask.dim() <= 4):  # type: ignore[union-attr]
        return type(module).forward(module, x, attn_mask, is_causal)  # type: ignore[no-any-return]
    gate = None if module.gate is None else linear(module.gate, x, activation="sigmoid")
    heads = linear(module.qkv, x).unflatten(-1, (3, module.num_heads, module.head_dim))
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    dropout = module.attn_drop.p if module.training else 0.0
    q, k = module.q_norm(q), module.k_norm(k)
    out = cross_attention(q, k, v, is_causal=is_causal, dropout_p=dropout, **masking(attn_mask, q.shape[0]))
    out = module.norm(out.transpose(1, 2).flatten(2))
    out = out if gate is None else out * gate
    return module.proj_drop(linear(module.proj, out))  # type: ignore[no-any-return]


def _mlp(module: Any, x: Tensor) -> Tensor:
    if not _takes_products(module, x):
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return module.drop2(linear(module.fc2, _hidden(module, x)))  # type: ignore[no-any-return]


def _takes_products(mlp: Any, x: Tensor) -> bool:
    return isinstance(mlp.fc1, nn.Linear) and takes_products(x, mlp.fc1.weight)


def _hidden(mlp: Any, x: Tensor) -> Tensor:
    return mlp.norm(mlp.drop1(activated(mlp.fc1, mlp.act, x)))  # type: ignore[no-any-return]


def _block(module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    swapped = module.mlp.__dict__.get("forward")
    if not isinstance(swapped, SwappedForward) or swapped.func is not _mlp or not _takes_products(module.mlp, x):
        return type(module).forward(module, x, attn_mask, is_causal)  # type: ignore[no-any-return]
    attended = module.attn(module.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
    x = x + module.drop_path1(module.ls1(attended))
    mlp, normed = module.mlp, module.norm2(x)
    adds = isinstance(module.ls2, nn.Identity) and isinstance(module.drop_path2, nn.Identity)
    hooked = any(is_hooked(m) for m in (mlp, module.ls2, module.drop_path2))
    if adds and not hooked and dropout_p(mlp.drop2) == 0.0:
        return linear(mlp.fc2, _hidden(mlp, normed), residual=x)
    return x + module.drop_path2(module.ls2(mlp(normed)))  # type: ignore[no-any-return]


SWAPS = {
    "timm.layers.attention.Attention": Swap(_attention, "cross_attention", ("7d6496e58f35",)),
    "timm.layers.mlp.Mlp": Swap(_mlp, "concat_linear", ("f2fe57510e1e",)),
    "timm.models.vision_transformer.Block": Swap(_block, "concat_linear", ("b0251e6642e6",)),
}
