"""Modules of open_clip: the feed-forward networks of its residual blocks, CLIP's and CoCa's alike; poolers, losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmkernels.integrations._blocks import SERVED, activated, is_hooked, linear, takes_products
from mmkernels.integrations._swaps import Swap, SwappedForward, calls_otherwise
from mmkernels.integrations.torch.modules import attend, is_served, no_projection
from mmkernels.nn._children import is_plain
from mmkernels.ops.contrastive_loss import contrastive_loss
from mmkernels.ops.sigmoid_contrastive_loss import sigmoid_contrastive_loss

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


def _pooler(module: Any, x: Tensor) -> Tensor:
    """The queries, which are the same for all of the batch, are projected once."""
    attention = module.attn
    other = attention.__dict__.get("forward")
    plain = type(attention) is nn.MultiheadAttention and not is_hooked(attention)
    if (
        not plain
        or not (other is None or isinstance(other, SwappedForward))
        or x.dim() != 3
        or not is_served(attention, x)
    ):
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    x = module.ln_k(x)
    return attend(attention, module.ln_q(module.query).unsqueeze(0), x, x)


def _has_other_attention(module: Any) -> str | None:
    known = type(module.attn) is nn.MultiheadAttention
    return no_projection(module.attn) if known else f"its attention is a {type(module.attn).__name__}"


def _clip_loss(
    module: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Any,
    logit_bias: Any = None,
    output_dict: bool = False,
) -> Any:
    if logit_bias is not None or not _is_plain_loss(module, image_features, text_features, logit_scale):
        return type(module).forward(module, image_features, text_features, logit_scale, logit_bias, output_dict)
    loss = contrastive_loss(image_features, text_features, logit_scale)
    return {"contrastive_loss": loss} if output_dict else loss


def _sigmoid_loss(
    module: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Any,
    logit_bias: Any,
    output_dict: bool = False,
) -> Any:
    plain = _is_plain_loss(module, image_features, text_features, logit_scale)
    if not plain or not (logit_bias is None or _is_number(logit_bias)):
        return type(module).forward(module, image_features, text_features, logit_scale, logit_bias, output_dict)
    bias = 0.0 if logit_bias is None else logit_bias
    loss = sigmoid_contrastive_loss(image_features, text_features, logit_scale, bias)
    return {"contrastive_loss": loss} if output_dict else loss


def _is_plain_loss(module: Any, x: Tensor, y: Tensor, scale: Any) -> bool:
    """Whether a loss is one of a single process, of pairs, and of a number as the scale."""
    pairs = x.dim() == 2 and x.shape == y.shape and x.shape[0] > 0 and x.dtype == y.dtype and x.dtype in SERVED
    return module.world_size == 1 and pairs and _is_number(scale)


def _is_number(x: Any) -> bool:
    return isinstance(x, float) or (isinstance(x, Tensor) and x.dim() == 0)


SWAPS = {
    f"open_clip.transformer.{name}": Swap(function, "concat_linear", (source,), _is_not_linear)
    for name, function, source in (
        ("ResidualAttentionBlock", _block, "cf10860e5ad9"),
        ("CustomResidualAttentionBlock", _custom_block, "ba492b6c1a1b"),
    )
} | {
    "open_clip.transformer.AttentionalPooler": Swap(
        _pooler, "cross_attention", ("f932a319e7b8",), _has_other_attention
    ),
    "open_clip.loss.ClipLoss": Swap(
        *(_clip_loss, "contrastive_loss", ("35364a4976fb",)),
        calls_otherwise(get_logits="cabbbb0e30f1", get_ground_truth="5f0c91eb3c52"),
    ),
    "open_clip.loss.SigLipLoss": Swap(
        *(_sigmoid_loss, "sigmoid_contrastive_loss", ("566ccff55880",)),
        calls_otherwise(_loss="1f93a2f9f281", get_logits="1996549cf24e", get_ground_truth="9b0cf7a16d64"),
    ),
}
