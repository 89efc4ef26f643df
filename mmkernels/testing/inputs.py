"""Arguments for any op: its example, calls of given sizes, random calls.

`CALLS` has a line for each way to call an op. Which of its tensors may be left out, and what its options may be, its
signature says.
"""

from __future__ import annotations

import importlib
import inspect
import math
import random
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Inputs = dict[str, Any]
Layout = Callable[[Tensor], Tensor]

r = torch.randn


def flags(*shape: int) -> Tensor:
    """Some True and some False, True in every row of a matrix."""
    drawn = torch.rand(shape) > 0.4
    if drawn.numel():
        drawn[..., 0] = True
    return drawn


def lengths(count: int, most: int) -> Tensor:
    return torch.randint(0, most + 1, (count,))


def offsets(length: int) -> Tensor:
    """Where three members of a packed batch begin and end."""
    return torch.tensor([0, length // 2, length // 2, length])


def places(length: int, batch: int) -> Tensor:
    """A mask with two True positions in every row, or all where there are fewer."""
    return (torch.arange(length) < 2).expand(batch, length).clone()


# What each op is called with, by sizes that may all be zero, every optional tensor among it. What follows an op's name
# says in which way it is called.
CALLS: dict[str, Callable[..., Inputs]] = {
    "concat_linear": lambda B=5, K=6, N=7: dict(
        xs=[r(B, K), r(B, 3)], weight=r(N, K + 3), bias=r(N), activation="gelu", presence=flags(B, 2),
        residual=r(B, N), gate=r(N)),
    "concat_linear of one absent": lambda B=5, L=2, K=6, N=7: dict(
        xs=[r(B, L, K), r(B, L, 3)], weight=r(N, K + 3), bias=r(N), presence=torch.tensor([True, False])),
    "concat_norm_linear": lambda B=5, K=6, N=7: dict(
        xs=[r(B, K), r(B, 4)], norm_weight=r(K + 4), norm_bias=r(K + 4), weight=r(N, K + 4), bias=r(N),
        activation="silu"),
    "gated_fusion": lambda B=5, K=6, N=7: dict(
        xs=[r(B, K), r(B, 3)], value_weights=[r(N, K), r(N, 3)], value_biases=[r(N), r(N)],
        gate_weight=r(2 * N, K + 3), gate_bias=r(2 * N), presence=flags(B, 2)),
    "gated_fusion with its gate": lambda B=5, K=6, N=7: dict(
        xs=[r(B, K), r(B, 3)], value_weights=[r(N, K), r(N, 3)], value_biases=[r(N), r(N)],
        gate_weight=r(N, K + 3), gate_bias=r(N), presence=flags(B, 2), return_gate=True),
    "gated_concat": lambda B=5, K=6, Ky=4: dict(x=r(B, K), y=r(B, Ky), weight=r(K, K + Ky), bias=r(K)),
    "low_rank_fusion": lambda B=5, K=6, N=7, R=3: dict(
        xs=[r(B, K), r(B, 3)], factors=[r(R, K + 1, N), r(R, 4, N)], rank_weights=r(R), bias=r(N),
        presence=flags(B, 2)),
    "tensor_fusion_linear": lambda B=5, K=6, N=7: dict(
        xs=[r(B, K), r(B, 3)], weight=r(N, 4 * K + 4), bias=r(N), presence=flags(B, 2)),
    "bilinear_fusion": lambda B=5, K=6, Ky=4, N=7, Nout=5: dict(
        x=r(B, K), y=r(B, Ky), x_weight=r(2 * N, K), y_weight=r(2 * N, Ky), out_weight=r(Nout, N), out_bias=r(Nout),
        rank=2, presence=flags(B, 2)),
    "modulated_norm": lambda B=3, L=4, C=6: dict(
        x=r(B, L, C), shift=r(B, C), scale=r(B, C), norm_weight=r(C), norm_bias=r(C)),
    "modulated_norm per token": lambda B=3, L=4, C=6: dict(
        x=r(B, L, C), shift=r(B, L, C), scale=r(B, L, C), norm="rms"),
    "concat_tokens": lambda B=3, L=4, C=6: dict(
        xs=[r(B, L, C), r(B, 2, C)], type_embedding=r(2, C), position_embeddings=[r(L, C), r(2, C)], norm="layer",
        norm_weight=r(C), norm_bias=r(C)),
    "merge_embeddings": lambda B=3, L=4, C=6: dict(
        text=r(B, L, C), modal=[r(B * min(L, 2) // 3, C), r(B * min(L, 2) - B * min(L, 2) // 3, C)],
        mask=places(L, B)),
    "additive_attention_pool": lambda B=5, M=3, D=6, A=4, Dq=5: dict(
        xs=r(B, M, D), weight=r(A, D), vector=r(A), bias=r(A), query=r(B, Dq), query_weight=r(A, Dq),
        presence=flags(B, M)),
    "additive_attention_pool of a list": lambda B=70, D=6, A=4: dict(
        xs=[r(B, D), r(B, D)], weight=r(A, D), vector=r(A), presence=flags(B, 2)),
    "multiplicative_attention_pool": lambda B=5, M=3, D=6, Dq=5: dict(
        xs=r(B, M, D), query=r(B, Dq), weight=r(Dq, D), presence=flags(B, M)),
    "multiplicative_attention_pool of a list": lambda B=5, D=6: dict(xs=[r(B, D), r(B, D)], query=r(B, D)),
    "split_attention_pool": lambda B=5, D=6, A=4: dict(
        xs=[r(B, D), r(B, D)], weight1=r(A, D), bias1=r(A), weight2=r(2 * D, A), bias2=r(2 * D), activation="gelu",
        presence=flags(B, 2)),
    "cross_attention": lambda B=2, H=2, Lq=20, Lk=5, D=8, Dv=4: dict(
        query=r(B, H, Lq, D), key=r(B, H, Lk, D), value=r(B, H, Lk, Dv), attn_mask=r(B, 1, Lq, Lk),
        key_lengths=lengths(B, Lk)),
    "cross_attention of few queries": lambda B=3, H=2, Lq=1, Lk=5, D=8, Dv=4: dict(
        query=r(B, H, Lq, D), key=r(B, H, Lk, D), value=r(B, H, Lk, Dv), attn_mask=flags(B, 1, Lq, Lk),
        key_lengths=lengths(B, Lk)),
    "scaled_dot_product_attention": lambda B=2, H=2, Lq=6, Lk=5, D=8, Dv=4: dict(
        query=r(B, H, Lq, D), key=r(B, H, Lk, D), value=r(B, H, Lk, Dv), attn_mask=flags(B, 1, Lq, Lk)),
    "varlen_cross_attention": lambda Tq=7, Tk=9, H=2, D=8, Dv=4: dict(
        query=r(Tq, H, D), key=r(Tk, H, D), value=r(Tk, H, Dv), cu_seqlens_q=offsets(Tq), cu_seqlens_k=offsets(Tk),
        max_seqlen_q=Tq, max_seqlen_k=Tk),
    "joint_attention": lambda B=3, H=2, L=4, D=8, Dv=4: dict(
        queries=[r(B, H, L, D), r(B, H, 3, D)], keys=[r(B, H, L, D), r(B, H, 3, D)],
        values=[r(B, H, L, Dv), r(B, H, 3, Dv)], key_lengths=[lengths(B, L), lengths(B, 3)], stream_bias=r(2, 2)),
    "bidirectional_cross_attention": lambda B=2, H=2, Lx=6, Ly=4, D=8, Dv=4: dict(
        x_query=r(B, H, Lx, D), y_key=r(B, H, Ly, D), x_value=r(B, H, Lx, Dv), y_value=r(B, H, Ly, Dv),
        x_mask=flags(B, Lx), y_mask=flags(B, Ly)),
    "merge_attention": lambda B=2, H=2, L=6, D=8: dict(
        outputs=[r(B, H, L, D), r(B, H, L, D)], lses=[r(B, H, L), r(B, H, L)]),
    "norm_rotary": lambda B=2, H=3, L=4, D=6: dict(
        query=r(B, H, L, D), key=r(B, 2, L, D), cos=r(L, D // 2), sin=r(L, D // 2), query_weight=r(D), key_weight=r(D)),
    "norm_rotary of neighbours, a table per element": lambda B=3, G=2, L=4, R=2: dict(
        query=r(B, 2, L, 7), key=r(B, G, L, 7), cos=r(B, L, R), sin=r(B, L, R), key_weight=r(7), interleaved=True),
    "norm_rotary of a packed batch": lambda H=3, L=4, D=6: dict(
        query=r(L, H, D), key=r(L, 2, D), cos=r(L, D // 2), sin=r(L, D // 2)),
    "deformable_attention": lambda B=2, H=2, L=3, D=4: dict(
        value=[r(B, 6, H, D), r(B, 4, H, D)], spatial_shapes=((2, 3), (2, 2)),
        sampling_locations=torch.rand(B, L, H, 2, 2, 2), attention_weights=r(B, L, H, 2, 2), presence=flags(B, 2)),
    "contrastive_loss": lambda D=4: dict(
        x=r(6, D), y=r(6, D), logit_scale=3.0, labels=torch.randint(0, 3, (6,))),
    "sigmoid_contrastive_loss": lambda B=5, D=4: dict(x=r(B, D), y=r(B, D), logit_scale=3.0, logit_bias=-2.0),
    "decision_fusion": lambda B=5, C=6: dict(
        logits=[r(B, C), r(B, C)], weights=torch.rand(2), method="log", presence=flags(B, 2)),
    "decision_fusion by the maximum": lambda B=5, C=6: dict(logits=[r(B, C), r(B, C)], method="max"),
    "distillation_loss": lambda B=5, V=6: dict(
        student=r(B, V), teacher=r(B, V), temperature=2.0, labels=torch.randint(0, 3, (B,)), ignore_index=0),
    "distillation_loss of sequences": lambda B=2, L=3, V=6: dict(
        student=r(B, L, V), teacher=r(B, L, V), kind="jsd", labels=torch.randint(0, 3, (B, L)), ignore_index=0),
    "multimodal_cross_entropy": lambda B=5, C=6: dict(
        logits=[r(B, C), r(B, 3)], labels=torch.randint(0, 3, (B,)), weights=r(2), presence=flags(B, 2),
        modulation=r(2)),
    "multimodal_cross_entropy of uncertainty": lambda B=5, C=6: dict(
        logits=[r(B, C), r(B, 3)], labels=[torch.randint(0, max(C, 1), (B,)), torch.randint(0, 3, (B,))],
        log_vars=r(2), label_smoothing=0.1),
}  # fmt: skip


def _with_gaps(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


def _transposed(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


# The same values, laid out otherwise in memory.
LAYOUTS: dict[str, Layout] = {
    "within wider rows": _with_gaps,
    "a column of a matrix": lambda x: torch.stack([x, torch.zeros_like(x)], -1)[..., 0],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": _transposed,
}

# Values of the options that are numbers, and of those whose type does not name them all.
_NUMBERS: dict[str, tuple[Any, ...]] = {
    "beta": (0.0, 0.3, 1.0),
    "clamp": (None, 2.0),
    "dropout_p": (0.0, 0.0, 0.3),
    "eps": (0.01, 1.0),  # a row of one or two features has a variance near 0, and gradients that are divided by it
    "label_smoothing": (0.0, 0.1),
    "q": (0.3, 0.7),
    "scale": (None, 0.3, -0.1),
    "softcap": (0.0, 2.0),
    "temperature": (0.5, 1.0, 4.0),
    "window": (None, (3, 5), (-1, 0)),
}
_MOST_WORK = 20_000_000  # of a random call: the product of its sizes, the largest twice, as scores have it
_LEFT_ALONE = frozenset({"check", "group", "is_log_scale", "linear", "out_dtype", "rank", "return_gate"})
_EXACT = frozenset({"lses"})  # float32 whatever the dtype of the call


def op_names() -> list[str]:
    """The public ops that arguments can be made for."""
    return sorted({name.split(" ")[0] for name in CALLS})


def function_of(name: str) -> Callable[..., Any]:
    """The public function of a line of `CALLS`."""
    import mmkernels

    function: Callable[..., Any] = getattr(mmkernels, name.split(" ")[0])
    return function


def converted(inputs: Inputs, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """The arguments with floating tensors of a dtype, on a device."""

    def to(exact: bool) -> Callable[[Any], Any]:
        kind = torch.float32 if exact else dtype
        return lambda x: (x.to(kind) if x.is_floating_point() else x).to(device) if isinstance(x, Tensor) else x

    return {name: pytree.tree_map(to(name in _EXACT), value) for name, value in inputs.items()}


def example_inputs(
    op: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> Inputs:
    """The arguments of one small and typical call of an op, by their names.

    Raises:
        ValueError: there is no such op.
    """
    _known(op)
    # What torch calls scaled_dot_product_attention is no op of its own.
    folder = "cross_attention" if op == "scaled_dot_product_attention" else op
    reference = importlib.import_module(f"mmkernels.ops.{folder}.reference")
    inputs: Inputs = reference.example_inputs(dtype, device, seed)
    return inputs


def random_inputs(
    op: str,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    most: int = 40,
    layouts: bool = False,
) -> Inputs:
    """The arguments of a random call of an op: sizes from 1 to about ``most``, any of its options, some of its optional
    tensors; with ``layouts`` half of the tensors are not contiguous. Floating tensors require grad, and the call is
    valid.

    Raises:
        ValueError: there is no such op.
    """
    from mmkernels._dispatch import explain

    _known(op)
    draw = random.Random(f"{op} {seed}")
    function = function_of(op)
    ways = [name for name in CALLS if name.split(" ")[0] == op]
    with torch.random.fork_rng(devices=[]):
        while True:
            torch.manual_seed(draw.getrandbits(32))
            way = draw.choice(ways)
            sizes = {size: _drawn_size(draw, size, most) for size in inspect.signature(CALLS[way]).parameters}
            if math.prod(sizes.values()) * max(sizes.values()) > _MOST_WORK:
                continue
            inputs = _with_options(draw, function, CALLS[way](**sizes))
            inputs = converted(inputs, dtype, device)
            try:
                explain(function, **inputs)
            except ValueError:  # options that exclude each other
                continue
            if layouts:
                inputs = pytree.tree_map_only(Tensor, lambda x: _rearranged(draw, x), inputs)
            return pytree.tree_map(_leaf, inputs)


def _known(op: str) -> None:
    if op not in op_names():
        raise ValueError(f"expected one of {', '.join(op_names())}; got {op!r}")


def _drawn_size(draw: random.Random, name: str, most: int) -> int:
    """Small ones and multiples of eight more often than others."""
    least = 3 if name == "C" else 1  # the norm of one feature is a constant, and its gradient rounding alone
    return draw.choice(
        (draw.randint(least, 4), draw.randint(least, max(least, most)), 8 * draw.randint(1, max(1, most // 8)))
    )


def _with_options(draw: random.Random, function: Callable[..., Any], inputs: Inputs) -> Inputs:
    """The arguments without some of those that may be left out, and with some of the options of the signature."""
    hints = typing.get_type_hints(function)
    chosen = dict(inputs)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in _LEFT_ALONE or parameter.default is parameter.empty:
            continue
        given = inputs.get(name)
        if isinstance(given, (Tensor, list)):
            if draw.random() < 0.4:
                del chosen[name]
        elif values := _values(name, hints[name]):
            chosen[name] = draw.choice(values)
    return chosen


def _values(name: str, hint: Any) -> tuple[Any, ...]:
    """What an option may be, nothing where neither a table nor its type says so."""
    if name in _NUMBERS:
        return _NUMBERS[name]
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    values = [value for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind)]
    if values and type(None) in kinds:
        values.append(None)
    return (False, True) if bool in kinds else tuple(values)


def _rearranged(draw: random.Random, x: Tensor) -> Tensor:
    return draw.choice(list(LAYOUTS.values()))(x) if x.dim() and x.numel() and draw.random() < 0.5 else x


def _leaf(x: Any) -> Any:
    return x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
