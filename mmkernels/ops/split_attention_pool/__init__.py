"""Split attention over modalities: a weight for each feature of each."""

from __future__ import annotations

from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops import _pool as pool
from mmkernels.ops.split_attention_pool.op import split_attention_pool_op

__all__ = ["split_attention_pool"]


def split_attention_pool(
    xs: pool.Modalities,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    activation: fusion.Activation | None = "relu",
    presence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A weighted mean of the modalities, feature by feature; their sum decides the weights, which are returned.

        g = Σ x_i over present i,  z = act(W₁ g + b₁),  e = W₂ z + b₂ as (B, M, D)
        a = softmax over present i of e, per feature,  pooled = Σ_i a_i ∘ x_i

    Li et al., "Selective Kernel Networks", 2019 (arXiv:1903.06586), and Zhang et al., "ResNeSt: Split-Attention
    Networks", 2020 (arXiv:2004.08955), with modalities as branches.

    Args:
        xs: (B, M, D), or a list of M ≥ 1 tensors (B, D), which are not stacked; float32, bfloat16, float16, or float64
            (reference backend alone). Any strides; a last dim that is not contiguous costs a copy of that tensor.
        weight1: W₁, (A, D).
        bias1: b₁, (A,).
        weight2: W₂, (M·D, A), the first modality's features first.
        bias2: b₂, (M·D,).
        activation: None, "relu", "gelu", "gelu_tanh" (the tanh approximation), "silu", "tanh", "sigmoid" or
            "quick_gelu" (z σ(1.702 z), CLIP's).
        presence: (B, M) or (M,) bool, True where a modality was observed. An absent one has weight 0 and gradient 0,
            whatever it holds.

    All floating tensors have one dtype and device. Under autocast they are cast to its dtype.

    Returns:
        pooled (B, D) and the weights a (B, M, D), both differentiable; zeros where every modality is absent.

    Example:
        >>> views = torch.randn(8, 2, 64)
        >>> layers = torch.randn(16, 64), torch.randn(16), torch.randn(128, 16), torch.randn(128)
        >>> pooled, a = split_attention_pool(views, *layers)
        >>> pooled.shape, a.shape
        (torch.Size([8, 64]), torch.Size([8, 2, 64]))
    """
    if may_use_door() and (sources := pool.as_sources(xs)) is not None:
        out = split_attention_pool_op.unchecked(sources, weight1, bias1, weight2, bias2, activation, presence)
        if out is not None:
            return out
    if is_overridden(xs, weight1, bias1, weight2, bias2, presence):
        return overridden_call(split_attention_pool, locals())
    name = "split_attention_pool"
    xs, (weight1, bias1, weight2, bias2) = pool.autocast(xs, weight1, bias1, weight2, bias2)
    sources, shape = pool.check_modalities(name, xs)
    first = sources[0]
    hidden = fusion.check_weight(name, "weight1", weight1, shape.width, first)
    fusion.check_shaped(name, "bias1", bias1, (hidden,), first)
    fusion.check_shaped(name, "weight2", weight2, (shape.modalities * shape.width, hidden), first)
    fusion.check_shaped(name, "bias2", bias2, (shape.modalities * shape.width,), first)
    fusion.check_activation(name, activation)
    pool.check_presence(name, presence, shape, first)
    pooled, weights = split_attention_pool_op(sources, weight1, bias1, weight2, bias2, activation, presence)
    return pooled, weights
