"""cross_attention in plain PyTorch: the specification every kernel is tested against.

    S = scale · Q Kᵀ,  S ← softcap · tanh(S / softcap),  S ← S + mask + bias,  P = exp(S) / (Σ exp(S) + exp(sink)),
    O = dropout(P) · V

Runs on every device and dtype. Products are formed in the inputs' dtype, as plain torch code would; everything between
them (softcap, masks, softmax, dropout) in float32, or float64 for float64 inputs. Every step is differentiable any
number of times. It holds the Lq×Lk scores, so it is for reading and checking, not for long sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._attention_checks import scale_of
from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._products import matmul

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10
_WORD = 0xFFFFFFFF


def cross_attention(
    query: Tensor,  # [B, Hq, Lq, D]
    key: Tensor,  # [B, Hkv, Lk, D]
    value: Tensor,  # [B, Hkv, Lk, Dv]
    attn_mask: Tensor | None,  # broadcastable to [B, Hq, Lq, Lk], bool (True = attend) or float (added)
    attn_bias: Tensor | None,  # as attn_mask, in a shape of its own
    sinks: Tensor | None,  # [Hq] float32, or float64 as the inputs
    key_lengths: Tensor | None,  # [B] int64
    window_left: int,  # -1 = unbounded
    window_right: int,  # -1 = unbounded, 0 = causal
    bottom_right: bool,
    softcap: float,
    scale: float | None,  # None = 1/√D
    dropout_p: float,
    rng_state: Tensor | None,  # [2] int64: seed, offset
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, Hq, Lq, Dv] and the two parts of the LSE: row_max, a constant shift, and log_sum, each [B, Hq, Lq].

    With any mask, a key whose K or V row holds a non-finite value turns every query row that may attend to it into NaN
    and touches no other row. A row with nothing to attend to gives output 0 and gradient 0; its row_max and log_sum are
    −inf or, with a sink, add up to that. A sink of −inf is none; one of NaN makes NaN of its head.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if key.shape[1] != query.shape[1]:
        group = query.shape[1] // max(key.shape[1], 1)
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    masks = [mask for mask in (attn_mask, attn_bias) if mask is not None]
    allowed = allowed_keys(query, key, masks, key_lengths, window_left, window_right, bottom_right)
    if allowed is not None:
        bad_key = ~(key.isfinite().all(-1) & value.isfinite().all(-1))  # [B, Hq, Lk]
        idle_row = ~allowed.any(-1, keepdim=True)  # [1|B, 1|Hq, 1|Lq, 1]
        key, value = key.masked_fill(bad_key[..., None], 0), value.masked_fill(bad_key[..., None], 0)
        query = query.masked_fill(idle_row, 0)

    scores = (matmul(query, key.mT) * scale_of(scale, query.shape[3])).to(wide)  # [B, Hq, Lq, Lk]
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    for mask in masks:
        if mask.dtype != torch.bool:
            scores = scores + mask.to(wide)
    if allowed is not None:
        scores = scores.masked_fill(bad_key[:, :, None], torch.nan).masked_fill(~allowed, -torch.inf)

    if scores.shape[-1] > 0:
        row_max = scores.detach().amax(-1)  # [B, Hq, Lq]
    else:
        row_max = torch.full(scores.shape[:-1], -torch.inf, dtype=wide, device=scores.device)
    if sinks is not None:
        row_max = torch.maximum(row_max, sinks.detach()[:, None])
    empty = row_max == -torch.inf
    shifted = scores - row_max.masked_fill(empty, 0)[..., None]
    if allowed is not None:
        shifted = shifted.masked_fill(~allowed, -torch.inf)  # again: a NaN row made all of it NaN
    weights = torch.exp(shifted)
    total = weights.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None] - row_max.masked_fill(empty, 0))
    total = total.masked_fill(empty, 1)
    log_sum = total.log().masked_fill(empty, -torch.inf)
    probabilities = weights / total[..., None]
    if allowed is not None:
        probabilities = probabilities.masked_fill(~allowed, 0)

    if dropout_p > 0:
        assert rng_state is not None
        kept = dropout_keep(scores.shape, dropout_p, rng_state, scores.device)
        probabilities = probabilities.masked_fill(~kept, 0) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    out = matmul(probabilities.to(value.dtype), value)
    if allowed is not None:
        out = out.masked_fill(idle_row, 0)
    if sinks is not None:
        out = out.masked_fill(sinks.isnan()[:, None, None], torch.nan)
    return out, row_max, log_sum


def allowed_keys(
    query: Tensor,
    key: Tensor,
    masks: Sequence[Tensor],
    key_lengths: Tensor | None,
    window_left: int,
    window_right: int,
    bottom_right: bool,
) -> Tensor | None:
    """True where a query may attend to a key, broadcastable to [B, Hq, Lq, Lk]; None when nothing is masked.

    Query i has diagonal position i (top-left) or i + (valid keys − Lq) (bottom-right); the window counts from there.
    """
    query_len, key_len = query.shape[-2], key.shape[-2]
    position = torch.arange(key_len, device=query.device)  # [Lk]
    length: Tensor | int = key_len
    rules: list[Tensor] = []
    if key_lengths is not None:
        length = key_lengths.clamp(0, key_len)[:, None, None, None]  # [B, 1, 1, 1]
        rules.append(position < length)
    if window_left >= 0 or window_right >= 0:
        diagonal = torch.arange(query_len, device=query.device)[:, None]  # [Lq, 1]
        if bottom_right:
            diagonal = diagonal + (length - query_len)
        if window_left >= 0:
            rules.append(position >= diagonal - window_left)
        if window_right >= 0:
            rules.append(position <= diagonal + window_right)
    rules.extend(mask if mask.dtype == torch.bool else mask != -torch.inf for mask in masks)
    if not rules:
        return None
    allowed = rules[0]
    for rule in rules[1:]:
        allowed = allowed & rule
    return allowed.expand(*allowed.shape[:-1], key_len)  # so that "any key" means a key that exists


def dropout_keep(shape: torch.Size, dropout_p: float, rng_state: Tensor, device: torch.device) -> Tensor:
    """Which probabilities survive dropout, bool of ``shape`` [B, Hq, Lq, Lk].

    Word k % 4 of philox4x32-10 with key = seed and counter = (k // 4, q, b·Hq + h, offset mod 2³²) decides entry
    (b, h, q, k): it is kept iff the word ≥ ⌊dropout_p · 2³²⌋. Philox: Salmon et al., "Parallel random numbers: as easy
    as 1, 2, 3", SC 2011.
    """
    batch, heads, query_len, key_len = shape
    seed, offset = rng_state.to(device).unbind()
    blocks = torch.arange((key_len + 3) // 4, device=device)[None, None, :]  # [1, 1, Lk/4]
    rows = torch.arange(query_len, device=device)[None, :, None]  # [1, Lq, 1]
    slices = torch.arange(batch * heads, device=device)[:, None, None]  # [B·Hq, 1, 1]
    counter = tuple(torch.broadcast_tensors(blocks, rows, slices, offset & _WORD))
    words = torch.stack(philox4x32((seed & _WORD, (seed >> 32) & _WORD), counter), -1)  # [B·Hq, Lq, Lk/4, 4]
    kept = words.flatten(-2)[..., :key_len] >= int(dropout_p * 2**32)
    return kept.view(batch, heads, query_len, key_len)


def philox4x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """philox4x32-10 on int64 tensors that hold unsigned 32-bit words; four words per counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = _multiply_words(_PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_words(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _WORD, (k1 + _PHILOX_WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply_words(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32×32-bit product, in halves since int64 cannot hold all 64 bits unsigned."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def example_inputs(draw: Draw, B: int = 2, H: int = 2, Lq: int = 20, Lk: int = 5, D: int = 8, Dv: int = 4) -> Examples:
    lengths = (Lk - 2 * torch.arange(B)).clamp_min(0)
    return {
        option: {
            "query": draw(B, H, queries, D),
            "key": draw(B, heads, Lk, D),
            "value": draw(B, heads, Lk, Dv),
            **options,
        }
        for option, queries, heads, options in (
            ("plain", Lq, H, {}),
            ("a bias, lengths", Lq, H, {"attn_mask": draw(B, 1, Lq, Lk), "key_lengths": lengths}),
            ("one query", 1, H, {"attn_mask": draw.flags(B, 1, 1, Lk), "key_lengths": lengths}),
            ("causal, LSE", Lq, 1, {"is_causal": True, "enable_gqa": True, "return_lse": True}),
            ("a window, softcap", Lq, H, {"window": (2, 1), "softcap": 3.0}),
            ("sinks", Lq, H, {"sinks": draw(H)}),
        )
    }
