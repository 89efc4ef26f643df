"""Registration of cross_attention and its backward: schemas, fakes, backends, gradients, batching rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._autograd import kernel_vjp, loop_vmap, vjp
from mmkernels._cuda import cuda_backends
from mmkernels._dispatch import Backend, Operator, forced_backend, native_op, reference_backend, use_backend
from mmkernels._triton import inputs_are_on, triton_backend
from mmkernels.ops import _attention_checks as attention_checks
from mmkernels.ops import _short_key_attention as short_keys
from mmkernels.ops.cross_attention import reference

_FORWARD_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_lengths, int window_left, "
    "int window_right, bool bottom_right, float softcap, float scale, float dropout_p, Tensor? rng_state, "
    "bool with_lse) -> (Tensor out, Tensor row_max, Tensor log_sum)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_log_sum, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
    "Tensor? key_lengths, Tensor out, Tensor row_max, Tensor log_sum, int window_left, int window_right, "
    "bool bottom_right, float softcap, float scale, float dropout_p, Tensor? rng_state, bool[4] grad_mask)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask)"
)

Tensors = tuple[Tensor, ...]


# --- memory order -----------------------------------------------------------------------------------------------------


def empty_in_order_of(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A dense tensor whose leading dims lie in memory in the order of ``like``'s, the last dim innermost."""
    strides_of_like = like.stride()
    order = list(range(len(shape) - 1))
    if strides_of_like[-1] == 1 or like.shape[-1] <= 1:
        order.sort(key=strides_of_like.__getitem__, reverse=True)
    strides, step = [1] * len(shape), shape[-1]
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim]
    return like.new_empty_strided(tuple(shape), strides)


def _in_order_of(like: Tensor, tensor: Tensor) -> Tensor:
    return empty_in_order_of(like, tensor.shape).copy_(tensor)


# --- forward ----------------------------------------------------------------------------------------------------------


def _cross_attention_fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = empty_in_order_of(query, (*query.shape[:3], value.shape[3]))
    with_lse = options[-1]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    statistics = query.new_empty(query.shape[:3] if with_lse else (0,), dtype=wide)
    return out, statistics, torch.empty_like(statistics)


def _reference_forward(query: Tensor, *rest: Any) -> Tensors:
    *arguments, with_lse = rest
    out, row_max, log_sum = reference.cross_attention(query, *arguments)
    out = _in_order_of(query, out)
    return (out, row_max, log_sum) if with_lse else (out, row_max.new_empty(0), row_max.new_empty(0))


def _differentiable_forward(*args: Any) -> Tensors:
    *arguments, _ = args
    return reference.cross_attention(*arguments)


def _last_dim_dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _unexpanded(mask: Tensor | None) -> Tensor | None:
    """The mask with every repeated (stride 0) dim at length 1: the kernels broadcast by themselves."""
    if mask is not None:
        for dim in range(4):
            if mask.stride(dim) == 0 and mask.shape[dim] > 1:
                mask = mask.narrow(dim, 0, 1)
        mask = _last_dim_dense(mask)
    return mask


_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_native_forward, _cpu_absent = native_op("_cross_attention_fwd")
_native_backward, _ = native_op("_cross_attention_bwd")


def _cpu_supports(query: Tensor, *_: Any) -> str | None:
    if _cpu_absent is not None:
        return _cpu_absent
    if not query.is_cpu:
        return inputs_are_on(query.device)
    if query.dtype not in _CPU_DTYPES:
        return f"{query.dtype} is served by the reference alone"
    return None


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any) -> Tensors:
    return _native_forward(
        _last_dim_dense(query), _last_dim_dense(key), _last_dim_dense(value), _unexpanded(attn_mask), *rest
    )


def _cuda_supports(query: Tensor, key: Tensor, value: Tensor, *options: Any, backward: bool = False) -> str | None:
    attn_mask, _, window_left, window_right, _, softcap, _, dropout_p, *_ = options
    if window_left >= 0 or window_right >= 0 or softcap or dropout_p > 0:
        return "its kernel has no window, causal mask, softcap or dropout"
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask is {attn_mask.dtype}"
    return short_keys.declines([query], [key], [value], backward)


def _cuda_loses(query: Tensor, key: Tensor, *_: Any) -> str | None:
    return short_keys.loses([key])


def _triton_supports(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> str | None:
    return attention_checks.too_wide_for_triton(query, value)


cross_attention_op = Operator(
    "cross_attention",
    _FORWARD_SCHEMA,
    fake=_cross_attention_fake,
    backends=[
        Backend("cpu", _cpu_forward, _cpu_supports),
        *cuda_backends("cross_attention", "forward", 0, _cuda_supports, _cuda_loses),
        triton_backend("cross_attention", "forward", 0, _triton_supports, any_strides=True),
        reference_backend(_reference_forward),
    ],
    differentiable=_differentiable_forward,
)


# --- backward ---------------------------------------------------------------------------------------------------------


def _cross_attention_backward_fake(
    grad_out: Tensor, grad_log_sum: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> Tensors:
    attn_mask, grad_mask = options[0], options[-1]
    dq, dk, dv = (
        empty_in_order_of(x, x.shape) if needed else x.new_empty(0)
        for x, needed in zip((query, key, value), grad_mask, strict=False)
    )
    return dq, dk, dv, attn_mask.new_empty(attn_mask.shape) if grad_mask[3] else query.new_empty(0)


def _pull_back(
    grad_out: Tensor,
    grad_log_sum: Tensor | None,
    inputs: Sequence[Tensor | None],
    options: Sequence[Any],
    grad_mask: Sequence[bool],
    pull: Callable[..., tuple[Tensor | None, ...]],
) -> tuple[Tensor | None, ...]:
    """Gradients of the reference for the inputs (query, key, value, attn_mask) that ``grad_mask`` asks for."""

    def forward(*needed: Tensor | None) -> Tensors:
        full: list[Any] = [given if new is None else new for new, given in zip(needed, inputs, strict=True)]
        out, _, log_sum = reference.cross_attention(*full, *options)
        return out, log_sum

    needed = [x if wanted else None for x, wanted in zip(inputs, grad_mask, strict=True)]
    return pull(forward, needed, (grad_out, grad_log_sum))


def _reference_backward(
    grad_out: Tensor,
    grad_log_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    *rest: Any,
) -> Tensors:
    *options, grad_mask = rest
    inputs = (query, key, value, attn_mask)
    dq, dk, dv, dmask = _pull_back(grad_out, grad_log_sum, inputs, (key_lengths, *options), grad_mask, kernel_vjp)
    dq, dk, dv = (
        x.new_empty(0) if g is None else _in_order_of(x, g) for x, g in zip(inputs[:3], (dq, dk, dv), strict=True)
    )
    return dq, dk, dv, query.new_empty(0) if dmask is None else dmask.contiguous()


def _differentiable_backward(*args: Any) -> Tensors:
    grad_out, grad_log_sum, *inputs, key_lengths, _, _, _ = args[:10]
    *options, grad_mask = args[10:]
    grads = _pull_back(grad_out, grad_log_sum, inputs, (key_lengths, *options), grad_mask, vjp)
    return tuple(grad_out.new_empty(0) if g is None else g for g in grads)


def _cpu_backward_supports(grad_out: Tensor, grad_log_sum: Tensor | None, query: Tensor, *_: Any) -> str | None:
    return _cpu_supports(query)


def _cpu_backward(
    grad_out: Tensor,
    grad_log_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    out: Tensor,
    *rest: Any,
) -> Tensors:
    if not rest[-1][3]:
        attn_mask = _unexpanded(attn_mask)
    elif attn_mask is not None:
        attn_mask = _last_dim_dense(attn_mask)
    return _native_backward(
        _last_dim_dense(grad_out),
        grad_log_sum,
        _last_dim_dense(query),
        _last_dim_dense(key),
        _last_dim_dense(value),
        attn_mask,
        key_lengths,
        _last_dim_dense(out),
        *rest,
    )


def _cuda_backward_supports(grad_out: Tensor, grad_log_sum: Tensor | None, *arguments: Any) -> str | None:
    *tensors, _, _, _ = arguments[:8]
    return _cuda_supports(*tensors, *arguments[8:], backward=True)


def _cuda_backward_loses(
    grad_out: Tensor, grad_log_sum: Tensor | None, query: Tensor, key: Tensor, *_: Any
) -> str | None:
    return short_keys.loses([key])


def _triton_backward_supports(
    grad_out: Tensor, grad_log_sum: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> str | None:
    *_, dropout_p, _, grad_mask = rest
    return attention_checks.too_wide_for_triton(query, value, heavy=dropout_p > 0 or grad_mask[3])


cross_attention_backward_op = Operator(
    "cross_attention_backward",
    _BACKWARD_SCHEMA,
    fake=_cross_attention_backward_fake,
    backends=[
        Backend("cpu", _cpu_backward, _cpu_backward_supports),
        *cuda_backends("cross_attention", "backward", 2, _cuda_backward_supports, _cuda_backward_loses),
        triton_backend("cross_attention", "backward", 2, _triton_backward_supports, any_strides=True),
        reference_backend(_reference_backward),
    ],
    differentiable=_differentiable_backward,
)


# --- gradients --------------------------------------------------------------------------------------------------------


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, attn_mask, key_lengths, *options, rng_state, with_lse = inputs
    out, row_max, log_sum = outputs
    ctx.save_for_backward(query, key, value, attn_mask, key_lengths, rng_state, out, row_max, log_sum)
    ctx.options = options
    ctx.with_lse = with_lse
    ctx.backend = forced_backend()
    ctx.mark_non_differentiable(row_max)  # a constant shift of the scores
    ctx.set_materialize_grads(False)


def _cross_attention_grad(
    ctx: Any, grad_out: Tensor | None, _: Tensor | None, grad_log_sum: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, key, value, attn_mask, key_lengths, rng_state, out, row_max, log_sum = ctx.saved_tensors
    grad_mask = list(ctx.needs_input_grad[:4])
    grads: Sequence[Tensor | None] = (None,) * 4
    if grad_out is not None or grad_log_sum is not None:
        inputs = (query, key, value, attn_mask, key_lengths)
        if not ctx.with_lse:
            grad_log_sum = None
            _, row_max, log_sum = cross_attention_op(*inputs, *ctx.options, rng_state, True)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        args = (grad_out, grad_log_sum, *inputs, out, row_max, log_sum, *ctx.options, rng_state, grad_mask)
        if ctx.backend is None:
            grads = cross_attention_backward_op(*args)
        else:  # autograd may run this in another thread, or after the `use_backend` block
            with use_backend(ctx.backend):
                grads = cross_attention_backward_op(*args)
    return (*(g if wanted else None for g, wanted in zip(grads, grad_mask, strict=True)), *(None,) * 9)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], outputs: Tensors) -> None:
    grad_out, grad_log_sum, query, key, value, attn_mask, key_lengths, _, _, _, *options, rng_state, grad_mask = inputs
    ctx.save_for_backward(grad_out, grad_log_sum, query, key, value, attn_mask, key_lengths, rng_state)
    ctx.options = options
    ctx.grad_mask = grad_mask
    ctx.set_materialize_grads(False)


def _cross_attention_double_grad(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the backward through the reference's; out, row_max and log_sum count as functions of the inputs."""
    grad_out, grad_log_sum, query, key, value, attn_mask, key_lengths, rng_state = ctx.saved_tensors
    options = (key_lengths, *ctx.options, rng_state)
    wanted = [bool(w) and g is not None for w, g in zip(ctx.grad_mask, grads, strict=True)]
    given = (grad_out, grad_log_sum, query, key, value, attn_mask)

    def backward(*needed: Tensor | None) -> Tensors:
        grad_out, grad_log_sum, *inputs = (x if n is None else n for n, x in zip(needed, given, strict=True))
        pulled = _pull_back(grad_out, grad_log_sum, inputs, options, wanted, vjp)
        return tuple(g for g in pulled if g is not None)

    pulled: Sequence[Tensor | None] = (None,) * 6
    if any(wanted):
        needed = [x if n else None for x, n in zip(given, ctx.needs_input_grad[:6], strict=True)]
        pulled = vjp(backward, needed, [g for g, w in zip(grads, wanted, strict=True) if w])
    return (*pulled, *(None,) * 12)


# --- batching ---------------------------------------------------------------------------------------------------------


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


def _cross_attention_vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    query, key, value, attn_mask, key_lengths, *options, rng_state, with_lse = args
    if rng_state is not None:  # the dropout mask depends on the batch index: each example draws its own, unfolded
        return loop_vmap(cross_attention_op, info, in_dims, args)
    size = info.batch_size
    folded = [_fold(t, d, size) for t, d in zip((query, key, value), in_dims, strict=False)]
    batch = folded[0].shape[0] // size
    mask = _fold_mask(attn_mask, in_dims[3], size, batch, for_grad=False)
    lengths = _fold(key_lengths, in_dims[4], size)
    outputs = cross_attention_op(*folded, mask, lengths, *options, rng_state, with_lse)
    out, row_max, log_sum = (o.unflatten(0, (size, batch)) if o.dim() > 1 else o for o in outputs)
    return (out, row_max, log_sum), (0, 0, 0) if with_lse else (0, None, None)


def _cross_attention_backward_vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    (
        grad_out,
        grad_log_sum,
        query,
        key,
        value,
        attn_mask,
        key_lengths,
        out,
        row_max,
        log_sum,
        *options,
        rng_state,
        grad_mask,
    ) = args
    if rng_state is not None:
        return loop_vmap(cross_attention_backward_op, info, in_dims, args)
    size = info.batch_size
    fold = {i: _fold(args[i], in_dims[i], size) for i in (0, 1, 2, 3, 4, 6, 7, 8, 9)}
    batch = fold[2].shape[0] // size
    mask = _fold_mask(attn_mask, in_dims[5], size, batch, for_grad=grad_mask[3])
    arguments = [mask if i == 5 else fold[i] for i in range(10)]
    grads = cross_attention_backward_op(*arguments, *options, rng_state, grad_mask)
    unfolded = [g.unflatten(0, (size, batch)) if wanted else g for g, wanted in zip(grads, grad_mask, strict=True)]
    if grad_mask[3] and attn_mask.shape[1 if in_dims[5] == 0 else 0] == 1 and batch != 1:
        unfolded[3] = unfolded[3].sum(1, keepdim=True)
    return tuple(unfolded), tuple(0 if wanted else None for wanted in grad_mask)


cross_attention_op.register_gradient(_save_for_backward, _cross_attention_grad, _cross_attention_vmap)
cross_attention_backward_op.register_gradient(
    _save_for_double_backward, _cross_attention_double_grad, _cross_attention_backward_vmap
)
