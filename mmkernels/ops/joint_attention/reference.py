"""joint_attention in plain PyTorch: the specification every kernel is tested against.

    S = scale · Q_i K_jᵀ,  S ← softcap · tanh(S / softcap),  S ← S + stream_bias[i, j],
    O_i = dropout(softmax over the keys of all streams j (S)) · V

It concatenates the streams and is `cross_attention` of them, with the bias as a mask; dropout counts queries and keys
along the concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops.cross_attention import reference


def joint_attention(
    queries: Sequence[Tensor],  # Sq of [B, H, L_i, D]
    keys: Sequence[Tensor],  # Sk of [B, Hkv, L_j, D]
    values: Sequence[Tensor],  # Sk of [B, Hkv, L_j, Dv]
    key_lengths: Sequence[Tensor],  # [B] int64 each
    padded_streams: Sequence[int],  # which key streams those are of
    stream_bias: Tensor | None,  # [Sq, Sk] or [H, Sq, Sk]
    scale: float | None,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,  # [2] int64: seed, offset
    return_lse: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs [B, H, L_i, Dv] and, with ``return_lse``, the LSE of each [B, H, L_i]."""
    options = (scale, softcap, dropout_p, rng_state)
    out, row_max, log_sum = _attend(queries, keys, values, key_lengths, padded_streams, stream_bias, *options)
    sizes = [q.shape[2] for q in queries]
    outs = [o.clone() for o in out.split(sizes, 2)]
    lses = [x.clone() for x in (row_max + log_sum).split(sizes, 2)] if return_lse else []
    return outs, lses


def softmax_stats(queries: Sequence[Tensor], *arguments: Any) -> tuple[Tensor]:
    """row_max of all query streams, [B, H, L_i] one after the other, then log_sum."""
    *of_attention, _ = arguments
    _, *stats = _attend(queries, *of_attention)
    sizes = [q.shape[2] for q in queries]
    return (torch.cat([part.flatten() for half in stats for part in half.split(sizes, 2)]),)


def _attend(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_lengths: Sequence[Tensor],
    padded_streams: Sequence[int],
    stream_bias: Tensor | None,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, row_max and log_sum of the concatenated streams."""
    query, key, value = (torch.cat(list(streams), 2) for streams in (queries, keys, values))
    mask = None
    if stream_bias is not None or key_lengths:
        mask = _mask(queries, keys, key_lengths, padded_streams, stream_bias)
    return reference.cross_attention(
        query, key, value, mask, None, None, None, -1, -1, False, softcap, scale, dropout_p, rng_state
    )


def _mask(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    key_lengths: Sequence[Tensor],
    padded_streams: Sequence[int],
    stream_bias: Tensor | None,
) -> Tensor:
    """What is added to the scores, [1 or B, 1 or H, ΣL_i, ΣL_j]; −inf where a stream is padded or a pair forbidden."""
    wide = torch.float64 if queries[0].dtype == torch.float64 else torch.float32
    if stream_bias is None:
        stream_bias = queries[0].new_zeros(len(queries), len(keys), dtype=wide)
    bias = stream_bias.to(wide) if stream_bias.dim() == 3 else stream_bias.to(wide)[None]  # [1 or H, Sq, Sk]
    rows = torch.cat(
        [bias[:, i : i + 1].expand(-1, q.shape[2], -1) for i, q in enumerate(queries)], 1
    )  # [1 or H, ΣL_i, Sk]
    mask = torch.cat([rows[:, :, j : j + 1].expand(-1, -1, k.shape[2]) for j, k in enumerate(keys)], 2)[None]
    if not key_lengths:
        return mask
    lengths = dict(zip(padded_streams, key_lengths, strict=True))
    valid = []
    for j, k in enumerate(keys):
        position = torch.arange(k.shape[2], device=k.device)  # [L_j]
        valid.append(position < lengths[j][:, None] if j in lengths else (position >= 0).expand(k.shape[0], -1))
    return mask.masked_fill(~torch.cat(valid, 1)[:, None, None], -torch.inf)


def example_inputs(draw: Draw, B: int = 3, H: int = 2, L: int = 4, D: int = 8, Dv: int = 4) -> Examples:
    return {
        option: {
            "queries": [draw(B, H, L, D), draw(B, H, 3, D)],
            "keys": [draw(B, H, L, D), draw(B, H, 3, D)],
            "values": [draw(B, H, L, Dv), draw(B, H, 3, Dv)],
            **options,
        }
        for option, options in {
            "plain": {},
            "lengths": {"key_lengths": [draw.whole(L + 1, B), draw.whole(4, B)], "stream_bias": draw(2, 2)},
            "LSE": {"key_lengths": [None, draw.whole(4, B)], "return_lse": True},
        }.items()
    }
