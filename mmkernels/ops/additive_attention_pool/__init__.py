"""Additive attention over modalities."""

from __future__ import annotations

from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops import _pool as pool
from mmkernels.ops.additive_attention_pool.op import additive_attention_pool_op

__all__ = ["additive_attention_pool"]


def additive_attention_pool(
    xs: pool.Modalities,
    weight: Tensor,
    vector: Tensor,
    *,
    bias: Tensor | None = None,
    query: Tensor | None = None,
    query_weight: Tensor | None = None,
    presence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A weighted mean of the modalities; a small network gives the weights, which are returned for inspection.

        e_i = v · tanh(W x_i + W_q q + b),  a = softmax over present i of e,  pooled = Σ_i a_i x_i

    Bahdanau et al., "Neural Machine Translation by Jointly Learning to Align and Translate", 2014 (arXiv:1409.0473);
    over modalities: Hori et al., "Attention-Based Multimodal Fusion for Video Description", 2017 (arXiv:1701.03126).

    Args:
        xs: (B, M, D), or a list of M ≥ 1 tensors (B, D), which are not stacked; float32, bfloat16, float16, or float64
            (reference backend alone). Any strides; a last dim that is not contiguous costs a copy of that tensor.
        weight: W, (A, D).
        vector: v, (A,).
        bias: b, (A,).
        query: q, (B, Dq), what the attention depends on beside the modalities; comes with ``query_weight``.
        query_weight: W_q, (A, Dq).
        presence: (B, M) or (M,) bool, True where a modality was observed. An absent one has weight 0 and gradient 0,
            whatever it holds.

    All floating tensors have one dtype and device. Under autocast they are cast to its dtype.

    Returns:
        pooled (B, D) and the weights a (B, M), both differentiable; zeros where every modality is absent.

    Example:
        >>> text, audio, video = (torch.randn(8, 64) for _ in range(3))
        >>> pooled, a = additive_attention_pool([text, audio, video], torch.randn(32, 64), torch.randn(32))
        >>> pooled.shape, a.shape
        (torch.Size([8, 64]), torch.Size([8, 3]))
    """
    if may_use_door() and (sources := pool.as_sources(xs)) is not None:
        out = additive_attention_pool_op.unchecked(sources, weight, vector, bias, query, query_weight, presence)
        if out is not None:
            return out
    if is_overridden(xs, weight, vector, bias, query, query_weight, presence):
        return overridden_call(additive_attention_pool, locals())
    name = "additive_attention_pool"
    xs, (weight, vector, bias, query, query_weight) = pool.autocast(xs, weight, vector, bias, query, query_weight)
    sources, shape = pool.check_modalities(name, xs)
    first = sources[0]
    hidden = fusion.check_weight(name, "weight", weight, shape.width, first)
    fusion.check_shaped(name, "vector", vector, (hidden,), first)
    if bias is not None:
        fusion.check_shaped(name, "bias", bias, (hidden,), first)
    if (query is None) != (query_weight is None):
        given, absent = ("query", "query_weight") if query_weight is None else ("query_weight", "query")
        raise checks.value_error(name, absent, f"a tensor, as {given} is given", None)
    if query is not None and query_weight is not None:
        width = pool.check_query(name, query, shape, first)
        fusion.check_shaped(name, "query_weight", query_weight, (hidden, width), first)
    pool.check_presence(name, presence, shape, first)
    pooled, weights = additive_attention_pool_op(sources, weight, vector, bias, query, query_weight, presence)
    return pooled, weights
