"""Argument checks that the attention ops share: lengths, windows, softcap, alignment."""

from __future__ import annotations

import math
from typing import Literal, TypedDict

import torch
from torch import Tensor

from mmkernels.ops import _checks as checks

LONGEST = 2**62  # no sequence is longer, and twice that is within int64

CausalAlignment = Literal["top_left", "bottom_right"]


class PackedOptions(TypedDict, total=False):
    """What the overloads of an attention take as its own signature says, which has the defaults."""

    is_causal: bool
    causal_alignment: CausalAlignment
    window: tuple[int, int] | None
    softcap: float
    sinks: Tensor | None
    scale: float | None


class MaskedOptions(PackedOptions, total=False):
    attn_mask: Tensor | None
    attn_bias: Tensor | None
    key_lengths: Tensor | None
    enable_gqa: bool


class CrossOptions(MaskedOptions, total=False):
    dropout_p: float


def scale_of(scale: float | None, head_dim: int) -> float:
    """The factor of QKᵀ; where none is given, 1/√D."""
    if scale is not None:
        return scale
    return 1.0 / math.sqrt(head_dim) if head_dim else 1.0


def is_bottom_right(op: str, alignment: CausalAlignment) -> bool:
    if alignment not in ("top_left", "bottom_right"):
        raise checks.value_error(op, "causal_alignment", "'top_left' or 'bottom_right'", repr(alignment))
    return alignment == "bottom_right"


def check_key_lengths(op: str, argument: str, lengths: Tensor, query: Tensor, keys: int) -> Tensor:
    """The lengths as int64, none beyond the number of ``keys``."""
    checks.check_tensor(op, argument, lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise checks.type_error(op, argument, "dtype int32 or int64", lengths.dtype)
    if lengths.dim() != 1 or lengths.shape[0] != query.shape[0]:
        raise checks.value_error(op, argument, f"shape ({query.shape[0]},)", tuple(lengths.shape))
    checks.check_same_device(op, argument, lengths, "query", query.device)
    if checks.eager_values_readable(lengths) and lengths.numel() > 0:
        low, high = (int(x) for x in torch.aminmax(lengths))
        if low < 0 or high > keys:
            raise checks.value_error(op, argument, f"values in [0, {keys}]", f"[{low}, {high}]")
    return lengths.to(torch.int64)


def check_window(op: str, window: tuple[int, int]) -> tuple[int, int]:
    """Both sides as ints; one that no sequence is long enough for is −1, unbounded."""
    expected = "a pair (left, right) of ints"
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise checks.type_error(op, "window", expected, repr(window))
    left, right = (checks.check_index(op, "window", side, expected) for side in window)
    if left < -1 or right < -1:
        raise checks.value_error(op, "window", "sizes ≥ 0, or -1 for unbounded", repr(window))
    return (-1 if left >= LONGEST else left), (-1 if right >= LONGEST else right)


def check_sinks(op: str, sinks: Tensor, query: Tensor, heads: int) -> Tensor:
    """The sinks in the dtype of the scores."""
    checks.check_tensor(op, "sinks", sinks)
    if not sinks.is_floating_point():
        raise checks.type_error(op, "sinks", "a floating dtype", sinks.dtype)
    if sinks.dim() != 1 or sinks.shape[0] != heads:
        raise checks.value_error(op, "sinks", f"shape ({heads},), one for each head of query", tuple(sinks.shape))
    checks.check_same_device(op, "sinks", sinks, "query", query.device)
    return sinks.to(torch.float64 if query.dtype == torch.float64 else torch.float32)


def check_softcap(op: str, softcap: float) -> float:
    softcap = checks.check_number(op, "softcap", softcap)
    if not 0.0 <= softcap < math.inf:
        raise checks.value_error(op, "softcap", "a finite number ≥ 0", softcap)
    return softcap


def check_dropout(op: str, dropout_p: float, argument: str = "dropout_p") -> float:
    dropout_p = checks.check_number(op, argument, dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise checks.value_error(op, argument, "a probability in [0, 1]", dropout_p)
    return dropout_p


def random_state() -> Tensor:
    """Seed and offset of one call's dropout, [2] int64 on the CPU, from torch's generator."""
    return torch.randint(0, 2**62, (2,), device="cpu")


def too_wide_for_triton(query: Tensor, value: Tensor, *, heavy: bool = False) -> str | None:
    """Why the registers of a Triton program cannot hold heads so wide; ``heavy``: dropout's or a mask's gradient."""
    widest, limit = max(query.shape[-1], value.shape[-1]), 256
    if query.dtype == torch.float32:
        limit = 64 if heavy else 128
    if widest <= limit:
        return None
    of = "the gradient of dropout or of a mask" if heavy else "attention"
    return f"a head dim of {widest} is more than the {limit} that a program holds for {of} in {query.dtype}"
