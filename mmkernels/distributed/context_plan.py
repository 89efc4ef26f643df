"""One call of attention over keys that are spread over ranks, as all of them see it: who computes what with what."""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.distributed.collectives import DTYPES, told_by_ranks
from mmkernels.distributed.parts import GATHERED_BYTES, AllAtOnce, Ring
from mmkernels.distributed.sequence_shards import Order, Segment, contiguous_segments, zigzag_segments
from mmkernels.ops import _attention_checks as attention
from mmkernels.ops import _checks as checks
from mmkernels.ops.cross_attention import cross_attention
from mmkernels.ops.joint_attention import joint_attention

OP = "context_parallel_attention"
_STREAMS_TOGETHER = 8  # more in one call of joint_attention have no kernel

Method = Literal["ring", "gather"]
Streams = Sequence[Tensor]


@dataclass(frozen=True)
class Options:
    """What a call asks for beside its tensors; the same on every rank."""

    window: tuple[int, int]  # −1 = unbounded; causal is right = 0
    bottom_right: bool
    order: Order
    softcap: float
    scale: float
    method: Method | None

    def facts(self) -> list[tuple[str, int]]:
        softcap, scale = (struct.unpack("q", struct.pack("d", x))[0] for x in (self.softcap, self.scale))
        return [
            ("window's left side", self.window[0]),
            ("window's right side, 0 where is_causal", self.window[1]),
            ("causal_alignment", self.bottom_right),
            ("order", self.order == "zigzag"),
            ("softcap, by its bits", softcap),
            ("scale, by its bits", scale),
            ("method", (None, "ring", "gather").index(self.method)),
        ]


@dataclass
class Call:
    """Attention of some rows of the queries over some keys of a part."""

    rows: slice
    columns: slice
    window: tuple[int, int]  # of these rows and columns
    key_lengths: list[Tensor | None]  # of each stream of each source
    positions: slice  # of the columns, in the whole sequence


@dataclass
class Plan:
    """One call, as all ranks see it."""

    group: Any
    options: Options
    is_masked: bool
    by_ring: bool
    heads: tuple[int, int, int, int]  # B, Hkv, D, Dv
    query_segments: list[list[list[Segment]]]  # of each query stream, of each rank
    key_segments: list[list[list[Segment]]]
    key_lengths: list[Tensor | None]  # of each key stream, in the whole sequence

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def by_position(self) -> bool:
        """Whether it matters which query is where, so that one segment at a time is computed with."""
        return self.is_masked or self.options.window != (-1, -1)

    @functools.cached_property
    def shift(self) -> int:
        """From a query's position to its diagonal position."""
        if not self.options.bottom_right:
            return 0
        queries, keys = (
            sum(count for held in segments[0] for _, count in held)
            for segments in (self.query_segments, self.key_segments)
        )
        return keys - queries

    def key_counts(self, source: int) -> list[int]:
        """Of each stream, on a rank."""
        return [sum(count for _, count in of_ranks[source]) for of_ranks in self.key_segments]

    def travel(self) -> Ring | AllAtOnce:
        batch, heads, features, width = self.heads
        ranks = range(dist.get_world_size(self.group))
        sizes = [batch * heads * (features + width) * sum(self.key_counts(source)) for source in ranks]
        if self.by_ring and len(sizes) > 1:
            return Ring(OP, self.group, sizes, self.reaches)
        together = 1 if self.by_position else max(_STREAMS_TOGETHER // len(self.key_segments), 1)
        return AllAtOnce(OP, self.group, sizes, together)

    def unpacked(self, part: Tensor, source: int) -> list[Tensor]:
        """Keys [B, Hkv, n, D] of each stream, and values [B, Hkv, n, Dv], that lie one after another in a part."""
        batch, heads, *widths = self.heads
        shapes = [(batch, heads, count, width) for width in widths for count in self.key_counts(source)]
        pieces = part.split([torch.Size(shape).numel() for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def calls(self, sources: Sequence[int]) -> Iterator[Call]:
        """The calls of attention over the parts of some ranks."""
        if not sources:
            return
        everything = slice(None)
        if not self.by_position:
            yield Call(everything, everything, (-1, -1), self._lengths_in(sources), everything)
            return
        ((source,), (of_queries,), (of_keys,)) = sources, self.query_segments, self.key_segments
        row = 0
        for query_first, rows in of_queries[self.rank]:
            column = 0
            for key_first, columns in of_keys[source]:
                call = self._call(query_first, rows, key_first, columns)
                if call is not None:
                    call.rows = slice(row + call.rows.start, row + call.rows.stop)
                    call.columns = slice(column + call.columns.start, column + call.columns.stop)
                    yield call
                column += columns
            row += rows

    @functools.cached_property
    def reaches(self) -> list[int] | None:
        """For each part how many ranks on the last one is that computes with it; None where all do."""
        if self.options.window == (-1, -1):
            return None
        (of_queries,), (of_keys,) = self.query_segments, self.key_segments
        ranks = len(of_keys)

        def meet(rank: int, source: int) -> bool:
            pairs = itertools.product(of_queries[rank], of_keys[source])
            return any(self._within(*queries, *keys) is not None for queries, keys in pairs)

        return [
            next((step for step in range(ranks - 1, 0, -1) if meet((source + step) % ranks, source)), 0)
            for source in range(ranks)
        ]

    def _within(
        self, query_first: int, rows: int, key_first: int, columns: int
    ) -> tuple[slice, slice, tuple[int, int]] | None:
        """Of a segment of queries and one of keys those that are not beyond the window, by indices in them, and the
        window of these."""
        left, right = self.options.window
        ahead = query_first + self.shift - key_first  # the diagonal key of row 0
        first, last = 0, rows
        if right >= 0:
            first = max(-ahead - right, 0)
        if left >= 0:
            last = min(rows, columns - ahead + left)
        begin = max(first + ahead - left, 0) if left >= 0 else 0
        end = min(last + ahead + right, columns) if right >= 0 else columns
        if first >= last or begin >= end:
            return None
        ahead += first - begin  # of the first row and column that are left
        before, after = left - ahead, right + ahead
        window = (
            -1 if left < 0 or before >= last - first - 1 else before,
            -1 if right < 0 or after >= end - begin - 1 else after,
        )
        return slice(first, last), slice(begin, end), window

    def _call(self, query_first: int, rows: int, key_first: int, columns: int) -> Call | None:
        """The call of a segment of queries and one of keys, by indices in them."""
        within = self._within(query_first, rows, key_first, columns)
        if within is None:
            return None
        of_rows, of_columns, window = within
        positions = slice(key_first + of_columns.start, key_first + of_columns.stop)
        lengths = self._lengths_of([(positions.start, positions.stop - positions.start)], self.key_lengths[0])
        return Call(of_rows, of_columns, window, [lengths], positions)

    def _lengths_in(self, sources: Sequence[int]) -> list[Tensor | None]:
        streams = list(zip(self.key_segments, self.key_lengths, strict=True))
        return [self._lengths_of(segments[source], given) for source in sources for segments, given in streams]

    def _lengths_of(self, segments: Sequence[Segment], lengths: Tensor | None) -> Tensor | None:
        """How many keys of segments are valid; as these ascend, they are the first ones."""
        if lengths is None:
            return None
        return torch.stack([(lengths - first).clamp(0, count) for first, count in segments]).sum(0)

    def attend(self, call: Call, cut: Sequence[Streams], mask: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and LSEs of the call's rows over its keys; queries, keys, values and mask are of these alone."""
        queries, keys, values = cut
        asked = self.options
        options: dict[str, Any] = {
            "scale": asked.scale,
            "softcap": asked.softcap,
            "enable_gqa": True,
            "return_lse": True,
        }
        if self.by_position:
            lengths = call.key_lengths[0]
            options |= {"attn_mask": mask, "key_lengths": lengths, "window": call.window}
            out, lse = cross_attention(queries[0], keys[0], values[0], **options)
            return [out], [lse]
        given = call.key_lengths if any(x is not None for x in call.key_lengths) else None
        return joint_attention(queries, keys, values, key_lengths=given, **options)


def agreed(
    group: Any,
    queries: Streams,
    keys: Streams,
    values: Streams,
    key_lengths: Any,
    mask: Tensor | None,
    sinks: Tensor | None,
    options: Options,
) -> Plan:
    """The plan that follows from what the ranks tell one another."""
    first = queries[0]
    batch, heads, _, features = first.shape
    key_heads, width = keys[0].shape[1], values[0].shape[3]

    def wants(*tensors: Tensor | None) -> bool:
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

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
        ("sinks, given or not", sinks is not None),
        *options.facts(),
        ("query's need of a gradient", wants(*queries)),
        ("key's and value's need of a gradient", wants(*keys, *values)),
        ("attn_mask's need of a gradient", wants(mask)),
        ("sinks' need of a gradient", wants(sinks)),
    ]
    told_by_ranks(OP, group, first.device, [], facts)
    masked = -1 if mask is None else mask.shape[-1]
    table = told_by_ranks(OP, group, first.device, [*(x.shape[2] for x in (*queries, *keys)), masked], [])
    ranks = len(table)
    segments = []
    for i in range(len(queries) + len(keys)):
        counts = [row[i] for row in table]
        if options.order == "zigzag":
            of_ranks = zigzag_segments(sum(counts), ranks)
            if [sum(count for _, count in held) for held in of_ranks] != counts:
                name = f"query stream {i}" if i < len(queries) else f"key stream {i - len(queries)}"
                expected = f"the shards that shard_positions(…, order='zigzag') gives of {name}"
                raise checks.value_error(OP, "order", expected, f"{counts} tokens")
        else:
            of_ranks = contiguous_segments(counts)
        segments.append(of_ranks)
    of_keys = segments[len(queries) :]
    totals = [sum(count for held in of_ranks for _, count in held) for of_ranks in of_keys]
    columns = [row[-1] for row in table]
    if not {-1, 1, totals[0]}.issuperset(columns):
        expected = f"{totals[0]} in its last dim, the keys of all ranks, or 1"
        raise checks.value_error(OP, "attn_mask", expected, [n for n in columns if n >= 0])
    lengths: list[Tensor | None] = [None] * len(keys)
    for i, given in enumerate(key_lengths or ()):
        if given is not None:
            lengths[i] = attention.check_key_lengths(OP, f"key_lengths[{i}]", given, first, totals[i])
    size = batch * key_heads * (features + width) * sum(totals) * first.element_size()
    by_ring = options.method == "ring" or (options.method is None and size > GATHERED_BYTES)
    shape = (batch, key_heads, features, width)
    return Plan(group, options, mask is not None, by_ring, shape, segments[: len(queries)], of_keys, lengths)


def _given(key_lengths: Any, keys: Streams) -> int:
    """Which entries of the list are no None, as bits."""
    if not isinstance(key_lengths, (list, tuple)):
        raise checks.type_error(OP, "key_lengths", "a list of tensors or None", type(key_lengths).__name__)
    if len(key_lengths) != len(keys):
        raise checks.value_error(OP, "key_lengths", f"{len(keys)} entries, one per key stream", len(key_lengths))
    return sum(1 << i for i, given in enumerate(key_lengths) if given is not None)
