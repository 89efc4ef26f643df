"""The mapped dim of a vmap, folded into the batch of attention instead of one call per example."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels._autograd import loop_vmap


def _fold(tensor: Any, dim: int | None, size: int) -> Any:
    """[B, ...] with a mapped dim, or none, as [size · B, ...]."""
    if tensor is None:
        return None
    moved = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return moved.flatten(0, 1)


def _fold_mask(mask: Tensor | None, dim: int | None, size: int, batch: int, for_grad: bool) -> Tensor | None:
    """As `_fold`; a mask that all examples and batch elements share stays as it is, unless its gradient is wanted."""
    if mask is None or (dim is None and mask.shape[0] == 1 and not for_grad):
        return mask
    moved = mask.expand(size, *mask.shape) if dim is None else mask.movedim(dim, 0)
    return moved.expand(size, batch, *moved.shape[2:]).flatten(0, 1)


def _fold_stats(stats: Tensor, dim: int | None, size: int) -> Tensor:
    """[2, B, Hq, Lq] with a mapped dim, or none, as [2, size · B, Hq, Lq]."""
    moved = stats.expand(size, *stats.shape) if dim is None else stats.movedim(dim, 0)
    return moved.movedim(0, 1).flatten(1, 2)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    return tensor.unflatten(0, (size, tensor.shape[0] // size))


def _dims(argument: Any, count: int) -> Any:
    """The mapped dim of each tensor of a list."""
    return argument if isinstance(argument, (list, tuple)) else (argument,) * count


def forward(op: Any, info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    query, key, value, attn_mask, attn_bias, sinks, key_lengths, *options = args
    rng_state, training = options[6], options[-1]
    # The dropout mask depends on the batch index: each example draws its own, unfolded. Sinks have no batch.
    if rng_state is not None or in_dims[5] is not None:
        return loop_vmap(op, info, in_dims, *args)
    size = info.batch_size
    folded = [_fold(t, d, size) for t, d in zip((query, key, value), in_dims, strict=False)]
    batch = folded[0].shape[0] // size
    masks = [
        _fold_mask(m, d, size, batch, for_grad=False) for m, d in zip((attn_mask, attn_bias), in_dims[3:5], strict=True)
    ]
    out, lse, stats = op(*folded, *masks, sinks, _fold(key_lengths, in_dims[6], size), *options)
    stats = stats.unflatten(1, (size, batch)) if training else stats
    return (_unfold(out, size), [_unfold(x, size) for x in lse], stats), (0, [0] * len(lse), 1 if training else None)


def backward(op: Any, info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    grads, query, key, value, attn_mask, attn_bias, sinks, key_lengths, *options, saved, needed = args
    rng_state = options[6]
    if rng_state is not None or in_dims[6] is not None or needed[5]:
        return loop_vmap(op, info, in_dims, *args)
    size = info.batch_size
    batch = query.shape[1 if in_dims[1] == 0 else 0]
    of_grads, of_saved = _dims(in_dims[0], len(grads)), _dims(in_dims[-2], len(saved))
    folded_grads = [_fold(g, d, size) for g, d in zip(grads, of_grads, strict=True)]
    *outputs, stats = saved
    folded_saved = [_fold(x, d, size) for x, d in zip(outputs, of_saved, strict=False)]
    folded_saved.append(_fold_stats(stats, of_saved[-1], size))
    inputs = [_fold(x, d, size) for x, d in zip((query, key, value), in_dims[1:4], strict=True)]
    masks = [
        _fold_mask(m, d, size, batch, for_grad=wanted)
        for m, d, wanted in zip((attn_mask, attn_bias), in_dims[4:6], needed[3:5], strict=True)
    ]
    lengths = _fold(key_lengths, in_dims[7], size)
    pulled = op(folded_grads, *inputs, *masks, sinks, lengths, *options, folded_saved, needed)
    unfolded = [_unfold(g, size) if wanted else g for g, wanted in zip(pulled, needed, strict=True)]
    for i, mask, dim in ((3, attn_mask, in_dims[4]), (4, attn_bias, in_dims[5])):
        if needed[i] and mask.shape[1 if dim == 0 else 0] == 1 and batch != 1:
            unfolded[i] = unfolded[i].sum(1, keepdim=True)
    return unfolded, [0 if wanted else None for wanted in needed]
