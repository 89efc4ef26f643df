"""Attention over keys that are spread over ranks.

Every rank has its tokens of queries and of keys and values. Keys and values travel, queries stay; attention over each
part gives an output and its LSE, and `merge_attention` joins them in float32 (Liu et al., "Ring Attention with
Blockwise Transformers for Near-Infinite Context", 2023, arXiv:2310.01889). The backward keeps this rank's tensors
alone: the parts travel once more, attention over each is computed again, and the sums of their gradients follow them
home.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.distributed.collectives import DTYPES, told_by_ranks
from mmkernels.distributed.parts import AllAtOnce, Ring
from mmkernels.distributed.sequence_shards import (
    Order,
    Segment,
    check_order,
    contiguous_segments,
    group_of,
    zigzag_segments,
)
from mmkernels.ops import _attention_checks as attention
from mmkernels.ops import _checks as checks
from mmkernels.ops.cross_attention import check_inputs, cross_attention
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.ops.joint_attention import checked_streams, joint_attention
from mmkernels.ops.merge_attention import merge_attention

_OP = "context_parallel_attention"
_GATHERED_BYTES = 16 << 20  # up to here the latency of R − 1 messages costs more than the memory of all parts
_STREAMS_TOGETHER = 8  # more in one call of joint_attention have no kernel

Method = Literal["ring", "gather"]
Streams = Sequence[Tensor]


@overload
def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: Any,
    *,
    key_lengths: Tensor | None = None,
    is_causal: bool = False,
    order: Order = "contiguous",
    softcap: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    method: Method | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: Any,
    *,
    key_lengths: Tensor | None = None,
    is_causal: bool = False,
    order: Order = "contiguous",
    softcap: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    method: Method | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def context_parallel_attention(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    mesh: Any,
    *,
    key_lengths: Sequence[Tensor | None] | None = None,
    is_causal: bool = False,
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
    key_lengths: Any = None,
    is_causal: bool = False,
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
        key_lengths: (B,) int32 or int64, the same on every rank: keys at and beyond that position of the whole sequence
            are padding. For streams a list of such and None.
        is_causal: the query at position i of its sequence attends to the keys at positions 0 … i. One stream alone.
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
        gradients of keys and values are the whole ones, of all ranks' queries.

    A row that may attend to nothing gives output 0, lse −inf and gradient 0. Under autocast the inputs are cast before
    they travel. ``torch.compile`` runs the call as it is, between the graphs before and after it.

    Raises:
        ValueError: shapes or values that do not fit, on this rank or to those of the others.
        TypeError: a wrong type or dtype.
        RuntimeError: tensors on different devices; a rank that does not take part within the group's timeout.

    Example:
        >>> mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (8,))
        >>> here = shard_positions(32768, mesh, order="zigzag").cuda()
        >>> q, k, v = (x[:, :, here] for x in (query, key, value))
        >>> context_parallel_attention(q, k, v, mesh, is_causal=True, order="zigzag").shape
        torch.Size([1, 16, 4096, 128])
    """
    group = group_of(_OP, mesh)
    check_order(_OP, order)
    if method not in (None, "ring", "gather"):
        raise checks.value_error(_OP, "method", "'ring', 'gather' or None", repr(method))
    single = isinstance(query, Tensor)
    if single:
        queries, keys, values = ([x] for x in check_inputs(_OP, query, key, value, enable_gqa))
        key_lengths = None if key_lengths is None else [key_lengths]
    else:
        queries, keys, values, *_ = checked_streams(_OP, query, key, value, None, None, enable_gqa)
        if is_causal:
            raise checks.value_error(_OP, "is_causal", "False for several streams", is_causal)
    softcap = attention.check_softcap(_OP, softcap)
    scale = attention.scale_of(None if scale is None else checks.check_number(_OP, "scale", scale), queries[0].shape[3])
    inputs = [*queries, *keys, *values]
    plan = _agreed(group, queries, keys, values, key_lengths, bool(is_causal), order, softcap, scale, method)
    results = _ContextParallelAttention.apply(plan, *inputs)
    outs, lses = list(results[: len(queries)]), list(results[len(queries) :])
    if single:
        return (outs[0], lses[0]) if return_lse else outs[0]
    return (outs, lses) if return_lse else outs


@dataclass
class _Plan:
    """One call, as all ranks see it."""

    group: Any
    is_causal: bool
    softcap: float
    scale: float
    by_ring: bool
    heads: tuple[int, int, int, int]  # B, Hkv, D, Dv
    query_segments: list[list[list[Segment]]]  # of each query stream, of each rank
    key_segments: list[list[list[Segment]]]
    key_lengths: list[Tensor | None] = field(default_factory=list)  # of each key stream, in the whole sequence

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def key_counts(self, source: int) -> list[int]:
        """Of each stream, on a rank."""
        return [sum(count for _, count in of_ranks[source]) for of_ranks in self.key_segments]

    def travel(self) -> Ring | AllAtOnce:
        batch, heads, features, width = self.heads
        ranks = range(dist.get_world_size(self.group))
        sizes = [batch * heads * (features + width) * sum(self.key_counts(source)) for source in ranks]
        if self.by_ring and len(sizes) > 1:
            return Ring(_OP, self.group, sizes)
        together = 1 if self.is_causal else max(_STREAMS_TOGETHER // len(self.key_segments), 1)
        return AllAtOnce(_OP, self.group, sizes, together)

    def unpacked(self, part: Tensor, source: int) -> list[Tensor]:
        """Keys [B, Hkv, n, D] of each stream, and values [B, Hkv, n, Dv], that lie one after another in a part."""
        batch, heads, *widths = self.heads
        shapes = [(batch, heads, count, width) for width in widths for count in self.key_counts(source)]
        pieces = part.split([torch.Size(shape).numel() for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def calls(self, sources: Sequence[int]) -> Iterator[_Call]:
        """The calls of attention over the parts of some ranks."""
        if not self.is_causal:
            yield _Call(slice(None), slice(None), -1, self._lengths_in(sources))
            return
        ((source,), (of_queries,), (of_keys,)) = sources, self.query_segments, self.key_segments
        row = 0
        for query_first, rows in of_queries[self.rank]:
            column = 0
            for key_first, columns in of_keys[source]:
                ahead = query_first - key_first  # the last key that the segment's first query sees
                skipped = max(-ahead, 0)  # queries before all of these keys
                seen = min(rows + ahead, columns)
                if skipped < rows and seen > 0:
                    lengths = self._lengths_of([(key_first, seen)], self.key_lengths[0])
                    last = -1 if ahead >= columns - 1 else max(ahead, 0)
                    here = slice(row + skipped, row + rows)
                    yield _Call(here, slice(column, column + seen), last, [lengths])
                column += columns
            row += rows

    def _lengths_in(self, sources: Sequence[int]) -> list[Tensor | None]:
        streams = list(zip(self.key_segments, self.key_lengths, strict=True))
        return [self._lengths_of(segments[source], given) for source in sources for segments, given in streams]

    def _lengths_of(self, segments: Sequence[Segment], lengths: Tensor | None) -> Tensor | None:
        """How many keys of segments are valid; as these ascend, they are the first ones."""
        if lengths is None:
            return None
        return torch.stack([(lengths - first).clamp(0, count) for first, count in segments]).sum(0)

    def attend(
        self, call: _Call, queries: Streams, keys: Streams, values: Streams
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and LSEs of the call's rows over its keys."""
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "enable_gqa": True, "return_lse": True}
        if self.is_causal:
            lengths, window = call.key_lengths[0], (-1, call.last)
            out, lse = cross_attention(queries[0], keys[0], values[0], key_lengths=lengths, window=window, **options)
            return [out], [lse]
        given = call.key_lengths if any(x is not None for x in call.key_lengths) else None
        return joint_attention(queries, keys, values, key_lengths=given, **options)


@dataclass
class _Call:
    """Attention of some rows of the queries over some keys of a part."""

    rows: slice
    columns: slice
    last: int  # row 0 sees keys up to this one, row 1 to the next, …; −1: all see all
    key_lengths: list[Tensor | None]  # of each stream of each source


def _agreed(
    group: Any,
    queries: Streams,
    keys: Streams,
    values: Streams,
    key_lengths: Any,
    is_causal: bool,
    order: Order,
    softcap: float,
    scale: float,
    method: Method | None,
) -> _Plan:
    """The plan that follows from what the ranks tell one another."""
    first = queries[0]
    batch, heads, _, features = first.shape
    key_heads, width = keys[0].shape[1], values[0].shape[3]
    wants = torch.is_grad_enabled()
    softcap_bits, scale_bits = (struct.unpack("q", struct.pack("d", x))[0] for x in (softcap, scale))
    facts = [
        ("batch", batch),
        ("query's heads", heads),
        ("key's heads", key_heads),
        ("features", features),
        ("value's features", width),
        ("dtype", DTYPES.index(first.dtype)),
        ("number of query streams", len(queries)),
        ("number of key streams", len(keys)),
        ("streams that key_lengths are given for", -1 if key_lengths is None else _given(key_lengths, keys)),
        ("is_causal", is_causal),
        ("order", order == "zigzag"),
        ("softcap, by its bits", softcap_bits),
        ("scale, by its bits", scale_bits),
        ("method", (None, "ring", "gather").index(method)),
        ("query's need of a gradient", wants and any(x.requires_grad for x in queries)),
        ("key's and value's need of a gradient", wants and any(x.requires_grad for x in (*keys, *values))),
    ]
    told_by_ranks(_OP, group, first.device, [], facts)
    table = told_by_ranks(_OP, group, first.device, [x.shape[2] for x in (*queries, *keys)], [])
    ranks = len(table)
    segments = []
    for i in range(len(queries) + len(keys)):
        counts = [row[i] for row in table]
        if order == "zigzag":
            of_ranks = zigzag_segments(sum(counts), ranks)
            if [sum(count for _, count in held) for held in of_ranks] != counts:
                name = f"query stream {i}" if i < len(queries) else f"key stream {i - len(queries)}"
                expected = f"the shards that shard_positions(…, order='zigzag') gives of {name}"
                raise checks.value_error(_OP, "order", expected, f"{counts} tokens")
        else:
            of_ranks = contiguous_segments(counts)
        segments.append(of_ranks)
    of_keys = segments[len(queries) :]
    lengths: list[Tensor | None] = [None] * len(keys)
    for i, given in enumerate(key_lengths or ()):
        if given is not None:
            total = sum(count for held in of_keys[i] for _, count in held)
            lengths[i] = attention.check_key_lengths(_OP, f"key_lengths[{i}]", given, first, total)
    total = sum(count for of_ranks in of_keys for held in of_ranks for _, count in held)
    size = batch * key_heads * (features + width) * total * first.element_size()
    by_ring = method == "ring" or (method is None and size > _GATHERED_BYTES)
    shape = (batch, key_heads, features, width)
    return _Plan(group, is_causal, softcap, scale, by_ring, shape, segments[: len(queries)], of_keys, lengths)


def _given(key_lengths: Any, keys: Streams) -> int:
    """Which entries of the list are no None, as bits."""
    if not isinstance(key_lengths, (list, tuple)):
        raise checks.type_error(_OP, "key_lengths", "a list of tensors or None", type(key_lengths).__name__)
    if len(key_lengths) != len(keys):
        raise checks.value_error(_OP, "key_lengths", f"{len(keys)} entries, one per key stream", len(key_lengths))
    return sum(1 << i for i, given in enumerate(key_lengths) if given is not None)


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


class _ContextParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *inputs: Tensor) -> tuple[Tensor, ...]:
        queries, own = _divided(plan, inputs)
        joined = [_Joined(query, plan.heads[3]) for query in queries]
        for parts in plan.travel().parts(_packed(own)):
            keys, values = _streams(plan, parts)
            for call in plan.calls(list(parts)):
                outs, lses = plan.attend(call, *_cut(call, queries, keys, values))
                for whole, out, lse in zip(joined, outs, lses, strict=True):
                    whole.add(call.rows, out, lse)
        outs, lses = [x.out.to(queries[0].dtype) for x in joined], [x.lse for x in joined]
        ctx.plan = plan
        ctx.save_for_backward(*inputs, *outs, *lses)
        return (*outs, *lses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        count = len(plan.query_segments)
        inputs, results = ctx.saved_tensors[: -2 * count], ctx.saved_tensors[-2 * count :]
        queries, own = _divided(plan, inputs)
        wanted = ctx.needs_input_grad[1:]
        of_queries, of_parts = any(wanted[:count]), any(wanted[count:])
        upstream = [
            _Upstream.of(*x) for x in zip(results[:count], results[count:], grads[:count], grads[count:], strict=True)
        ]
        query_sums = [torch.zeros_like(q, dtype=x.lse.dtype) for q, x in zip(queries, upstream, strict=True)]
        travel = plan.travel()
        for parts in travel.parts(_packed(own)):
            sums = {source: part.new_zeros(part.shape, dtype=upstream[0].lse.dtype) for source, part in parts.items()}
            keys, values = _streams(plan, parts)
            key_sums, value_sums = _streams(plan, sums)
            for call in plan.calls(list(parts)):
                cut = _cut(call, queries, keys, values)
                pulled = _pulled(plan, call, cut, upstream, of_queries, of_parts)
                totals = [x for group in _cut(call, query_sums, key_sums, value_sums) for x in group]
                for total, gradient in zip(totals, pulled, strict=True):
                    if gradient is not None:
                        total += gradient
            if of_parts:
                travel.add(sums)
        gradients: list[Tensor | None] = [None] * len(inputs)
        if of_queries:
            gradients[:count] = [total.to(q.dtype) for total, q in zip(query_sums, queries, strict=True)]
        if of_parts:
            own_sums = plan.unpacked(travel.own_sum(), plan.rank)
            gradients[count:] = [total.to(x.dtype) for total, x in zip(own_sums, own, strict=True)]
        return (None, *(g if w else None for g, w in zip(gradients, wanted, strict=True)))


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


def _divided(plan: _Plan, inputs: Streams) -> tuple[Streams, Streams]:
    """The queries, and the keys and values."""
    count = len(plan.query_segments)
    return inputs[:count], inputs[count:]


def _packed(tensors: Streams) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def _streams(plan: _Plan, parts: dict[int, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of the streams of all parts, part after part."""
    keys, values = [], []
    for source, part in parts.items():
        tensors = plan.unpacked(part, source)
        keys += tensors[: len(tensors) // 2]
        values += tensors[len(tensors) // 2 :]
    return keys, values


def _cut(call: _Call, queries: Streams, keys: Streams, values: Streams) -> tuple[list[Tensor], ...]:
    groups = ((queries, call.rows), (keys, call.columns), (values, call.columns))
    return tuple([x[:, :, cut] for x in group] for group, cut in groups)


def _pulled(
    plan: _Plan,
    call: _Call,
    cut: tuple[list[Tensor], ...],
    upstream: Sequence[_Upstream],
    of_queries: bool,
    of_parts: bool,
) -> list[Tensor | None]:
    """Gradients of the queries, keys and values of one call; None where they are not wanted."""
    with torch.enable_grad():
        wants = (of_queries, of_parts, of_parts)
        leaves = [[x.detach().requires_grad_(want) for x in group] for group, want in zip(cut, wants, strict=True)]
        outs, lses = plan.attend(call, *leaves)
    flat = [x for group in leaves for x in group]
    pairs = [x.of_part(call.rows, o.detach(), s.detach()) for x, o, s in zip(upstream, outs, lses, strict=True)]
    needed = [x for x in flat if x.requires_grad]
    pulled = iter(torch.autograd.grad([*outs, *lses], needed, [g for g, _ in pairs] + [g for _, g in pairs]))
    return [next(pulled) if x.requires_grad else None for x in flat]
