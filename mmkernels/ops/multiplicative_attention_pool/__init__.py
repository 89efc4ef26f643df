"""Multiplicative (dot-product, bilinear) attention over modalities."""

from __future__ import annotations

from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops import _pool as pool
from mmkernels.ops.multiplicative_attention_pool.op import multiplicative_attention_pool_op

__all__ = ["multiplicative_attention_pool"]


def multiplicative_attention_pool(
    xs: pool.Modalities,
    query: Tensor,
    *,
    weight: Tensor | None = None,
    scale: float | None = None,
    presence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A weighted mean of the modalities, by their products with a query; the weights are returned for inspection.

        e_i = scale · qᵀ W x_i,  a = softmax over present i of e,  pooled = Σ_i a_i x_i

    W is applied to the query, once per row. Luong et al., "Effective Approaches to Attention-based Neural Machine
    Translation", 2015 (arXiv:1508.04025), its "dot" and "general" scores.

    Args:
        xs: (B, M, D), or a list of M ≥ 1 tensors (B, D), which are not stacked; float32, bfloat16, float16, or float64
            (reference backend alone). Any strides; a last dim that is not contiguous costs a copy of that tensor.
        query: q, (B, Dq); without ``weight`` Dq = D.
        weight: W, (Dq, D).
        scale: a number; None = 1/√D.
        presence: (B, M) or (M,) bool, True where a modality was observed. An absent one has weight 0 and gradient 0,
            whatever it holds.

    All floating tensors have one dtype and device. Under autocast they are cast to its dtype.

    Returns:
        pooled (B, D) and the weights a (B, M), both differentiable; zeros where every modality is absent.

    Example:
        >>> xs, question = [torch.randn(8, 64) for _ in range(3)], torch.randn(8, 48)
        >>> pooled, a = multiplicative_attention_pool(xs, question, weight=torch.randn(48, 64))
        >>> pooled.shape, a.shape
        (torch.Size([8, 64]), torch.Size([8, 3]))
    """
    if may_use_door() and (sources := pool.as_sources(xs)) is not None:
        factor = scale if scale is not None else pool.default_scale(sources)
        out = multiplicative_attention_pool_op.unchecked(sources, query, weight, factor, presence)
        if out is not None:
            return out
    if is_overridden(xs, query, weight, presence):
        return overridden_call(multiplicative_attention_pool, locals())
    name = "multiplicative_attention_pool"
    xs, (query, weight) = pool.autocast(xs, query, weight)
    sources, shape = pool.check_modalities(name, xs)
    first = sources[0]
    width = pool.check_query(name, query, shape, first)
    if weight is not None:
        fusion.check_shaped(name, "weight", weight, (width, shape.width), first)
    elif width != shape.width:
        expected = f"shape {(shape.batch, shape.width)}, as there is no weight"
        raise checks.value_error(name, "query", expected, tuple(query.shape))
    if scale is None:
        scale = pool.default_scale(sources)
    scale = checks.check_number(name, "scale", scale)
    pool.check_presence(name, presence, shape, first)
    pooled, weights = multiplicative_attention_pool_op(sources, query, weight, float(scale), presence)
    return pooled, weights
