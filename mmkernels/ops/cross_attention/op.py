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
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? attn_bias, Tensor? sinks, "
    "Tensor? key_lengths, int window_left, int window_right, bool bottom_right, float softcap, float scale, "
    "float dropout_p, Tensor? rng_state, bool with_lse) -> (Tensor out, Tensor row_max, Tensor log_sum)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_log_sum, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
    "Tensor? attn_bias, Tensor? sinks, Tensor? key_lengths, Tensor out, Tensor row_max, Tensor log_sum, "
    "int window_left, int window_right, bool bottom_right, float softcap, float scale, float dropout_p, "
    "Tensor? rng_state, bool[6] grad_mask)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dbias, Tensor dsinks)"
)

Tensors = tuple[Tensor, ...]
_LEAVES = 6  # query, key, value, attn_mask, attn_bias, sinks: what has a gradient, first in the schema


# --- memory order -----------------------------------------------------------------------------------------------------


def empty_in_order_of(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A dense tensor whose leading dims lie in memory in the order of ``like``'s, the last dim innermost."""
    strides_of_like = like.stride()
    order = list(range(len(shape) - 1))
    if strides_of_like[-1] == 1 or like.shape[-1] <= 1:
        first = 1 if order and strides_of_like[0] == 0 else 0  # an expanded batch stays outermost
        order[first:] = sorted(order[first:], key=strides_of_like.__getitem__, reverse=True)
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


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    attn_bias: Tensor | None,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments: tuple[Any, ...] = (query, key, value, attn_mask, *options, attn_bias, sinks)
    return reference.cross_attention(*arguments)


def _reference_forward(query: Tensor, *rest: Any) -> Tensors:
    *arguments, with_lse = rest
    out, row_max, log_sum = _reference(query, *arguments)
    out = _in_order_of(query, out)
    return (out, row_max, log_sum) if with_lse else (out, row_max.new_empty(0), row_max.new_empty(0))


def _differentiable_forward(*args: Any) -> Tensors:
    *arguments, _ = args
    return _reference(*arguments)


def _last_dim_dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def unexpanded(mask: Tensor) -> Tensor:
    """The mask [B, Hq, Lq, Lk] with every repeated (stride 0) dim at length 1."""
    for dim in range(4):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def apart(dmask: Tensor, dbias: Tensor) -> Tensor:
    """The second of two gradients that may be one tensor, in memory of its own."""
    return dbias.clone() if dmask.shape == dbias.shape else dbias


def _kernel_mask(mask: Tensor | None, of_gradient: bool = False) -> Tensor | None:
    """As the kernels, which broadcast by themselves, read a mask. Its gradient is that of the shape that is given."""
    if mask is None:
        return None
    return _last_dim_dense(mask if of_gradient else unexpanded(mask))


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


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, attn_bias: Tensor | None, *rest: Any
) -> Tensors:
    return _native_forward(
        _last_dim_dense(query),
        _last_dim_dense(key),
        _last_dim_dense(value),
        _kernel_mask(attn_mask),
        _kernel_mask(attn_bias),
        *rest,
    )


def _cuda_supports(query: Tensor, key: Tensor, value: Tensor, *options: Any, backward: bool = False) -> str | None:
    attn_mask, attn_bias, sinks, _, window_left, window_right, _, softcap, _, dropout_p, *_ = options
    if sinks is not None:
        return "its kernel has no sinks"
    if attn_bias is not None:
        return "its kernel takes attn_mask or attn_bias, not both"
    if window_left >= 0 or window_right >= 0 or softcap or dropout_p > 0:
        return "its kernel has no window, causal mask, softcap or dropout"
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask is {attn_mask.dtype}"
    return short_keys.declines([query], [key], [value], backward)


def _cuda_loses(query: Tensor, key: Tensor, *_: Any) -> str | None:
    return short_keys.loses([key])


def _triton_supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    attn_bias: Tensor | None,
    sinks: Tensor | None,
    *_: Any,
) -> str | None:
    if sinks is not None:
        return "its kernels have no sinks"
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
    grad_mask = options[-1]
    dq, dk, dv = (
        empty_in_order_of(x, x.shape) if needed else x.new_empty(0)
        for x, needed in zip((query, key, value), grad_mask, strict=False)
    )
    rest = (
        x.new_empty(x.shape) if needed else query.new_empty(0)
        for x, needed in zip(options[:3], grad_mask[3:], strict=True)
    )
    return dq, dk, dv, *rest


def _pull_back(
    grad_out: Tensor,
    grad_log_sum: Tensor | None,
    inputs: Sequence[Tensor | None],
    options: Sequence[Any],
    grad_mask: Sequence[bool],
    pull: Callable[..., tuple[Tensor | None, ...]],
) -> tuple[Tensor | None, ...]:
    """Gradients of the reference for the inputs, query to sinks, that ``grad_mask`` asks for."""

    def forward(*needed: Tensor | None) -> Tensors:
        full: list[Any] = [given if new is None else new for new, given in zip(needed, inputs, strict=True)]
        out, _, log_sum = _reference(*full, *options)
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
    attn_bias: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    *rest: Any,
) -> Tensors:
    *options, grad_mask = rest
    inputs = (query, key, value, attn_mask, attn_bias, sinks)
    pulled = _pull_back(grad_out, grad_log_sum, inputs, (key_lengths, *options), grad_mask, kernel_vjp)
    dq, dk, dv = (
        x.new_empty(0) if g is None else _in_order_of(x, g)
        for x, g in zip((query, key, value), pulled[:3], strict=True)
    )
    dmask, dbias, dsinks = (query.new_empty(0) if g is None else g.contiguous() for g in pulled[3:])
    return dq, dk, dv, dmask, apart(dmask, dbias), dsinks


def _differentiable_backward(*args: Any) -> Tensors:
    grad_out, grad_log_sum, *inputs, key_lengths, _, _, _ = args[: 6 + _LEAVES]
    *options, grad_mask = args[6 + _LEAVES :]
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
    attn_bias: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    out: Tensor,
    *rest: Any,
) -> Tensors:
    *_, of_mask, of_bias, _ = rest[-1]
    return _native_backward(
        _last_dim_dense(grad_out),
        grad_log_sum,
        _last_dim_dense(query),
        _last_dim_dense(key),
        _last_dim_dense(value),
        _kernel_mask(attn_mask, of_mask),
        _kernel_mask(attn_bias, of_bias),
        sinks,
        key_lengths,
        _last_dim_dense(out),
        *rest,
    )


def _cuda_backward_supports(grad_out: Tensor, grad_log_sum: Tensor | None, *arguments: Any) -> str | None:
    *tensors, _, _, _ = arguments[:10]
    return _cuda_supports(*tensors, *arguments[10:], backward=True)


def _cuda_backward_loses(
    grad_out: Tensor, grad_log_sum: Tensor | None, query: Tensor, key: Tensor, *_: Any
) -> str | None:
    return short_keys.loses([key])


def _triton_backward_supports(
    grad_out: Tensor, grad_log_sum: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> str | None:
    *_, dropout_p, _, grad_mask = rest
    if rest[2] is not None:
        return "its kernels have no sinks"
    heavy = dropout_p > 0 or grad_mask[3] or grad_mask[4]
    return attention_checks.too_wide_for_triton(query, value, heavy=heavy)


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
    *options, rng_state, with_lse = inputs[7:]
    ctx.save_for_backward(*inputs[:7], rng_state, *outputs)
    _, row_max, _ = outputs
    ctx.options = options
    ctx.with_lse = with_lse
    ctx.backend = forced_backend()
    ctx.mark_non_differentiable(row_max)  # a constant shift of the scores
    ctx.set_materialize_grads(False)


def _cross_attention_grad(
    ctx: Any, grad_out: Tensor | None, _: Tensor | None, grad_log_sum: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, rng_state, out, row_max, log_sum = ctx.saved_tensors
    grad_mask = list(ctx.needs_input_grad[:_LEAVES])
    grads: Sequence[Tensor | None] = (None,) * _LEAVES
    if grad_out is not None or grad_log_sum is not None:
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
    *options, rng_state, grad_mask = inputs[12:]
    ctx.save_for_backward(*inputs[:9], rng_state)
    ctx.options = options
    ctx.grad_mask = grad_mask
    ctx.set_materialize_grads(False)


def _cross_attention_double_grad(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the backward through the reference's; out, row_max and log_sum count as functions of the inputs."""
    *given, key_lengths, rng_state = ctx.saved_tensors
    options = (key_lengths, *ctx.options, rng_state)
    wanted = [bool(w) and g is not None for w, g in zip(ctx.grad_mask, grads, strict=True)]

    def backward(*needed: Tensor | None) -> Tensors:
        grad_out, grad_log_sum, *inputs = (x if n is None else n for n, x in zip(needed, given, strict=True))
        pulled = _pull_back(grad_out, grad_log_sum, inputs, options, wanted, vjp)
        return tuple(g for g in pulled if g is not None)

    pulled: Sequence[Tensor | None] = (None,) * len(given)
    if any(wanted):
        needed = [x if n else None for x, n in zip(given, ctx.needs_input_grad, strict=False)]
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
    query, key, value, attn_mask, attn_bias, sinks, key_lengths, *options, rng_state, with_lse = args
    # The dropout mask depends on the batch index: each example draws its own, unfolded. Sinks have no batch.
    if rng_state is not None or in_dims[5] is not None:
        return loop_vmap(cross_attention_op, info, in_dims, args)
    size = info.batch_size
    folded = [_fold(t, d, size) for t, d in zip((query, key, value), in_dims, strict=False)]
    batch = folded[0].shape[0] // size
    masks = [
        _fold_mask(m, d, size, batch, for_grad=False) for m, d in zip((attn_mask, attn_bias), in_dims[3:5], strict=True)
    ]
    lengths = _fold(key_lengths, in_dims[6], size)
    outputs = cross_attention_op(*folded, *masks, sinks, lengths, *options, rng_state, with_lse)
    out, row_max, log_sum = (o.unflatten(0, (size, batch)) if o.dim() > 1 else o for o in outputs)
    return (out, row_max, log_sum), (0, 0, 0) if with_lse else (0, None, None)


def _cross_attention_backward_vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    tensors, (*options, rng_state, grad_mask) = args[:12], args[12:]
    if rng_state is not None or in_dims[7] is not None or grad_mask[5]:
        return loop_vmap(cross_attention_backward_op, info, in_dims, args)
    size = info.batch_size
    folded = [
        t if i in (5, 6, 7) else _fold(t, d, size) for i, (t, d) in enumerate(zip(tensors, in_dims, strict=False))
    ]
    batch = folded[2].shape[0] // size
    for i, wanted in ((5, grad_mask[3]), (6, grad_mask[4])):
        folded[i] = _fold_mask(tensors[i], in_dims[i], size, batch, for_grad=wanted)
    grads = cross_attention_backward_op(*folded, *options, rng_state, grad_mask)
    unfolded = [g.unflatten(0, (size, batch)) if wanted else g for g, wanted in zip(grads, grad_mask, strict=True)]
    for i, wanted in ((5, grad_mask[3]), (6, grad_mask[4])):
        if wanted and tensors[i].shape[1 if in_dims[i] == 0 else 0] == 1 and batch != 1:
            unfolded[i - 2] = unfolded[i - 2].sum(1, keepdim=True)
    return tuple(unfolded), tuple(0 if wanted else None for wanted in grad_mask)


cross_attention_op.register_gradient(_save_for_backward, _cross_attention_grad, _cross_attention_vmap)
cross_attention_backward_op.register_gradient(
    _save_for_double_backward, _cross_attention_double_grad, _cross_attention_backward_vmap
)
