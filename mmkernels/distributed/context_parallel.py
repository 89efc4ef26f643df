"""Attention over keys that are spread over ranks.

Every rank has its tokens of queries and of keys and values. Keys and values travel, queries stay; attention over each
part gives an output and its LSE, and `merge_attention` joins them in float32 (Liu et al., "Ring Attention with
Blockwise Transformers for Near-Infinite Context", 2023, arXiv:2310.01889). The backward keeps this rank's tensors
alone: the parts travel once more, attention over each is computed again, and the sums of their gradients follow them
home.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.distributed.collectives import answers_of_ranks
from mmkernels.distributed.context_plan import OP, Call, Method, Options, Plan, Streams, agreed
from mmkernels.distributed.sequence_shards import Order, check_order, group_of
from mmkernels.ops import _attention_checks as attention
from mmkernels.ops import _checks as checks
from mmkernels.ops.cross_attention import check_inputs, check_mask
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.ops.joint_attention import checked_streams
from mmkernels.ops.merge_attention import merge_attention

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _StreamOptions(TypedDict, total=False):
    """What the overloads take as the signature says."""

    order: Order
    method: Method | None


class _Options(attention.MaskedOptions, _StreamOptions):
    pass


@overload
def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: Any,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, mesh: Any, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...


@overload
def context_parallel_attention(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    mesh: Any,
    *,
    key_lengths: Sequence[Tensor | None] | None = None,
    order: Order = "contiguous",
    softcap: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    method: Method | None = None,
    return_lse: bool = False,
) -> Any: ...


@torch.compiler.disable
def context_parallel_attention(
    query: Any,
    key: Any,
    value: Any,
    mesh: Any,
    *,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Any = None,
    is_causal: bool = False,
    causal_alignment: attention.CausalAlignment = "top_left",
    window: tuple[int, int] | None = None,
    order: Order = "contiguous",
    softcap: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    method: Method | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of this rank's queries over the keys and values of all ranks: `cross_attention` of the whole sequences,
    or, for lists of streams, `joint_attention`.

        out_r = softmax(scale · Q_r (K_0; K_1; …)ᵀ) · (V_0; V_1; …)

    Every rank of the mesh makes the call, and, where gradients are wanted, its backward; shapes agree but for the
    number of tokens. Memory per rank is O((Lq + Lk) / ranks) around the ring, O(Lq / ranks + Lk) where all is gathered.

    Args:
        query: (B, Hq, Lq_r, D), this rank's tokens, float32, bfloat16, float16 or float64; or a list of streams.
        key: (B, Hkv, Lk_r, D), or a list of streams. Any number of tokens on each rank, none included.
        value: (B, Hkv, Lk_r, Dv), or a list of streams.
        mesh: a DeviceMesh of one dim, or a process group.
        attn_mask: 2-D to 4-D, broadcastable to (B, Hq, Lq_r, Lk): of this rank's queries, over the keys of all ranks in
            the order of the whole sequence. bool: True = attend. Float: added to the scores. One stream alone.
        attn_bias: as attn_mask, float; added to the scores beside it.
        sinks: (Hq,), the same on every rank: a logit per query head that joins the softmax's denominator and attends to
            nothing. One stream alone.
        key_lengths: (B,) int32 or int64, the same on every rank: keys at and beyond that position of the whole sequence
            are padding. For streams a list of such and None.
        is_causal: a query attends to no key after its diagonal position. One stream alone.
        causal_alignment: "top_left": the query at position i of its sequence has the diagonal position i.
            "bottom_right": the last query of the sequence has that of the last key; without ``key_lengths``.
        window: (left, right): a query attends to keys from ``left`` before to ``right`` after its diagonal position;
            −1 = unbounded on that side. Parts out of its reach are neither computed with nor sent. One stream alone.
        order: which positions a rank holds. "contiguous": the ranks' tokens one after another. "zigzag": as
            `shard_positions` gives them, with which all ranks have the same work under a causal mask.
        softcap: bounds the scores to ±softcap; 0 = off.
        scale: factor of QKᵀ; None = 1/√D.
        enable_gqa: Hq may be a multiple of Hkv.
        method: "ring": keys and values go from rank to rank, each part on its way while the one before is computed
            with. "gather": all are gathered first. None: the latter up to 16 MiB of keys and values.
        return_lse: also return the log-sum-exp of each row.

    Returns:
        out (B, Hq, Lq_r, Dv), in query's dtype and memory order, and with ``return_lse`` also lse (B, Hq, Lq_r),
        natural log, float32 (float64 for float64). For streams, lists of these. Both are differentiable, once. The
        gradients of keys, values and sinks are the whole ones, of all ranks' queries; that of a mask is of this rank's.

    A row that may attend to nothing gives output 0, lse −inf and gradient 0. Under autocast the inputs are cast before
    they travel. ``torch.compile`` runs the call as it is, between the graphs before and after it.

    Raises:
        ValueError: shapes or values that do not fit, on this rank or to those of the others.
        TypeError: a wrong type or dtype.
        RuntimeError: tensors on different devices; a rank that does not take part within the group's timeout.

    Example:
        >>> mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))  # of one process; each has its share
        >>> query, key, value = (torch.randn(1, 8, 64, 32) for _ in range(3))
        >>> here = shard_positions(64, mesh, order="zigzag")
        >>> q, k, v = (x[:, :, here] for x in (query, key, value))
        >>> context_parallel_attention(q, k, v, mesh, is_causal=True, order="zigzag").shape
        torch.Size([1, 8, 64, 32])
    """
    group = group_of(OP, mesh)
    check_order(OP, order)
    if method not in (None, "ring", "gather"):
        raise checks.value_error(OP, "method", "'ring', 'gather' or None", repr(method))
    single = isinstance(query, Tensor)
    if single:
        queries, keys, values = ([x] for x in check_inputs(OP, query, key, value, enable_gqa))
        key_lengths = None if key_lengths is None else [key_lengths]
    else:
        queries, keys, values, *_ = checked_streams(OP, query, key, value, None, None, enable_gqa)
        if is_causal:
            raise checks.value_error(OP, "is_causal", "False for several streams", is_causal)
        alone = {"window": window, "attn_mask": attn_mask, "attn_bias": attn_bias, "sinks": sinks}
        for argument, given in alone.items():
            if given is not None:
                raise checks.value_error(OP, argument, "None for several streams", type(given).__name__)
    left, right = (-1, -1) if window is None else attention.check_window(OP, window)
    softcap = attention.check_softcap(OP, softcap)
    scale = attention.scale_of(None if scale is None else checks.check_number(OP, "scale", scale), queries[0].shape[3])
    bottom_right = attention.is_bottom_right(OP, causal_alignment)
    if bottom_right and not single:
        raise checks.value_error(OP, "causal_alignment", "'top_left' for several streams", repr(causal_alignment))
    if bottom_right and key_lengths is not None:
        raise checks.value_error(OP, "causal_alignment", "'top_left' with key_lengths", repr(causal_alignment))
    attn_mask = _one_mask(queries[0], attn_mask, attn_bias)
    if sinks is not None:
        sinks = attention.check_sinks(OP, sinks, queries[0], queries[0].shape[1])
    options = Options((left, 0 if is_causal else right), bottom_right, order, softcap, scale, method)
    plan = agreed(group, queries, keys, values, key_lengths, attn_mask, sinks, options)
    results = _ContextParallelAttention.apply(plan, attn_mask, sinks, *queries, *keys, *values)
    outs, lses = list(results[: len(queries)]), list(results[len(queries) :])
    if single:
        return (outs[0], lses[0]) if return_lse else outs[0]
    return (outs, lses) if return_lse else outs


def _one_mask(query: Tensor, attn_mask: Tensor | None, attn_bias: Tensor | None) -> Tensor | None:
    """What is added to the scores, or a bool mask alone."""
    masks = []
    for argument, mask in (("attn_mask", attn_mask), ("attn_bias", attn_bias)):
        if mask is not None:
            checks.check_tensor(OP, argument, mask)
            masks.append(check_mask(OP, argument, mask, query, mask.shape[-1] if mask.dim() else 1))
    if len(masks) < 2:
        return masks[0] if masks else None
    mask, bias = masks
    widths = mask.shape[-1], bias.shape[-1]
    if 1 not in widths and widths[0] != widths[1]:
        raise checks.value_error(OP, "attn_bias", f"{widths[0]} in its last dim, as in attn_mask, or 1", widths[1])
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


class _Joined:
    """Output and LSE of one query stream over the keys seen so far, in float32 (float64)."""

    def __init__(self, query: Tensor, width: int) -> None:
        empty = empty_in_order_of(query, (*query.shape[:3], width))
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.out = torch.zeros_like(empty, dtype=self.dtype)
        self.lse = self.out.new_full(query.shape[:3], -torch.inf)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        old_out, old_lse = self.out[:, :, rows], self.lse[:, :, rows]
        joined, joined_lse = merge_attention([old_out, out.to(self.dtype)], [old_lse, lse])
        old_out.copy_(joined)
        old_lse.copy_(joined_lse)

    def add_sinks(self, sinks: Tensor) -> None:
        """A logit for each head, of no value."""
        lse = torch.logaddexp(self.lse, sinks[:, None])
        self.out *= torch.exp(self.lse - lse).masked_fill(lse == -torch.inf, 0).unsqueeze(-1)
        self.lse = lse


class _ContextParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, mask: Tensor | None, sinks: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        queries, own = _divided(plan, inputs)
        joined = [_Joined(query, plan.heads[3]) for query in queries]
        for parts in plan.travel().parts(_packed(own)):
            keys, values = _streams(plan, parts)
            for call in plan.calls(list(parts)):
                outs, lses = plan.attend(call, _cut(call, queries, keys, values), _cut_mask(call, mask))
                for whole, out, lse in zip(joined, outs, lses, strict=True):
                    whole.add(call.rows, out, lse)
        if sinks is not None:
            joined[0].add_sinks(sinks)
        outs, lses = [x.out.to(queries[0].dtype) for x in joined], [x.lse for x in joined]
        ctx.plan = plan
        ctx.save_for_backward(mask, sinks, *inputs, *outs, *lses)
        return (*outs, *lses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        count = len(plan.query_segments)
        mask, sinks, *saved = ctx.saved_tensors  # asked for once: with activation checkpointing there is no second time
        inputs, results = saved[: -2 * count], saved[-2 * count :]
        queries, own = _divided(plan, inputs)
        of_mask, of_sinks, *wanted = ctx.needs_input_grad[1:]
        of_queries, of_parts = any(wanted[:count]), any(wanted[count:])
        upstream = [
            _Upstream.of(*x) for x in zip(results[:count], results[count:], grads[:count], grads[count:], strict=True)
        ]
        query_sums = [torch.zeros_like(q, dtype=x.lse.dtype) for q, x in zip(queries, upstream, strict=True)]
        mask_sum = torch.zeros_like(mask, dtype=upstream[0].lse.dtype) if of_mask else None
        travel = plan.travel()
        for parts in travel.parts(_packed(own)):
            sums = {source: part.new_zeros(part.shape, dtype=upstream[0].lse.dtype) for source, part in parts.items()}
            keys, values = _streams(plan, parts)
            key_sums, value_sums = _streams(plan, sums)
            for call in plan.calls(list(parts)):
                cut = _cut(call, queries, keys, values)
                pulled = _pulled(plan, call, cut, _cut_mask(call, mask), upstream, of_queries, of_parts, of_mask)
                totals = [x for group in _cut(call, query_sums, key_sums, value_sums) for x in group]
                for total, gradient in zip([*totals, _cut_mask(call, mask_sum)], pulled, strict=True):
                    if total is not None and gradient is not None:
                        total += gradient
            if of_parts:
                travel.add(sums)
        gradients: list[Tensor | None] = [None] * len(inputs)
        if of_queries:
            gradients[:count] = [total.to(q.dtype) for total, q in zip(query_sums, queries, strict=True)]
        if of_parts:
            own_sums = plan.unpacked(travel.own_sum(), plan.rank)
            gradients[count:] = [total.to(x.dtype) for total, x in zip(own_sums, own, strict=True)]
        sinks_sum = None
        if of_sinks:
            sinks_sum = upstream[0].of_sinks(sinks)
            with answers_of_ranks(OP):
                dist.all_reduce(sinks_sum, group=plan.group)
        return (
            None,
            None if mask_sum is None else mask_sum.to(mask.dtype),
            sinks_sum,
            *(g if w else None for g, w in zip(gradients, wanted, strict=True)),
        )


@dataclass
class _Upstream:
    """What the backward knows of one query stream's rows."""

    grad: Tensor  # of the output, [B, Hq, Lq, Dv]
    lse: Tensor  # over all keys, [B, Hq, Lq]
    mean: Tensor  # grad · out − the gradient of lse, which every part's LSE has to share

    @classmethod
    def of(cls, out: Tensor, lse: Tensor, grad: Tensor, lse_grad: Tensor) -> _Upstream:
        grad = grad.to(lse.dtype)
        return cls(grad, lse, (grad * out.to(lse.dtype)).sum(-1) - lse_grad)

    def of_part(self, rows: slice, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a part's output and LSE: of out = Σ w_i out_i, w_i = exp(lse_i − lse)."""
        whole, grad = self.lse[:, :, rows], self.grad[:, :, rows]
        weight = torch.exp(lse - whole).masked_fill_(whole == -torch.inf, 0)
        mean = (grad * out.to(grad.dtype)).sum(-1)
        return (weight.unsqueeze(-1) * grad).to(out.dtype), weight * (mean - self.mean[:, :, rows])

    def of_sinks(self, sinks: Tensor) -> Tensor:
        """The gradient of sinks [Hq], of these rows: a part without a value."""
        weight = torch.exp(sinks[:, None] - self.lse).masked_fill_(self.lse == -torch.inf, 0)
        return -(weight * self.mean).sum((0, 2))


def _divided(plan: Plan, inputs: Streams) -> tuple[Streams, Streams]:
    """The queries, and the keys and values."""
    count = len(plan.query_segments)
    return inputs[:count], inputs[count:]


def _packed(tensors: Streams) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def _streams(plan: Plan, parts: dict[int, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of the streams of all parts, part after part."""
    keys, values = [], []
    for source, part in parts.items():
        tensors = plan.unpacked(part, source)
        keys += tensors[: len(tensors) // 2]
        values += tensors[len(tensors) // 2 :]
    return keys, values


def _cut(call: Call, queries: Streams, keys: Streams, values: Streams) -> tuple[list[Tensor], ...]:
    groups = ((queries, call.rows), (keys, call.columns), (values, call.columns))
    return tuple([x[:, :, cut] for x in group] for group, cut in groups)


def _cut_mask(call: Call, mask: Tensor | None) -> Tensor | None:
    """The mask [B or 1, Hq or 1, Lq or 1, Lk or 1] of the call's rows and keys."""
    if mask is None:
        return None
    rows = call.rows if mask.shape[2] > 1 else slice(None)
    return mask[:, :, rows, call.positions if mask.shape[3] > 1 else slice(None)]


def _pulled(
    plan: Plan,
    call: Call,
    cut: Sequence[list[Tensor]],
    mask: Tensor | None,
    upstream: Sequence[_Upstream],
    of_queries: bool,
    of_parts: bool,
    of_mask: bool,
) -> list[Tensor | None]:
    """Gradients of the queries, keys, values and mask of one call; None where they are not wanted."""
    with torch.enable_grad():
        wants = (of_queries, of_parts, of_parts)
        leaves = [[x.detach().requires_grad_(want) for x in group] for group, want in zip(cut, wants, strict=True)]
        if mask is not None:
            mask = mask.detach().requires_grad_(of_mask)
        outs, lses = plan.attend(call, leaves, mask)
    flat = [*(x for group in leaves for x in group), mask]
    pairs = [x.of_part(call.rows, o.detach(), s.detach()) for x, o, s in zip(upstream, outs, lses, strict=True)]
    needed = [x for x in flat if x is not None and x.requires_grad]
    if not needed:
        return [None] * len(flat)
    pulled = iter(torch.autograd.grad([*outs, *lses], needed, [g for g, _ in pairs] + [g for _, g in pairs]))
    return [next(pulled) if x is not None and x.requires_grad else None for x in flat]
