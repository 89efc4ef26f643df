"""Registration of an op with its backward: everything that follows from the reference, the fake and the kernels.

A `DifferentiableOp` is two operators. ``torch.ops.mmkernels.<name>`` has the schema

    (<arguments>, bool training) -> (<outputs>, <saved>)

where ``saved`` is what the backward wants to find, empty unless ``training``, and an output may be a list of tensors;
``<name>_backward`` has

    (Tensor[] grads, <arguments>, Tensor[] saved, bool[] needed) -> Tensor[]

with one flag and one gradient per tensor argument, lists element by element; a gradient that is not needed is empty.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels import _native
from mmkernels._arguments import schema_of
from mmkernels._autograd import fold_vmap, kernel_vjp, loop_vmap, vjp
from mmkernels._dispatch import (
    Operator,
    forced_backend,
    may_use_door,
    native_door,
    native_op,
    needs_grad,
    reference_backend,
    use_backend,
)
from mmkernels._kept import EVERYTHING, Kept, shape_of
from mmkernels._kernels import CudaKernels, NativeKernels, TritonKernels, cpu_backend, cuda_backends, triton_backends
from mmkernels.ops import _checks as checks

Tensors = tuple[Tensor, ...]
_NATIVE = NativeKernels()

_plain_call = native_door("differentiable_door")


def _contiguous_gradient(leaf: Tensor, argument: str) -> Tensor:
    return leaf.new_empty(leaf.shape)


def _has_dense_columns(matrix: Tensor) -> bool:
    """Of the last two dims, the first alone: as in the view of a transposed matrix, or of a part of one."""
    if matrix.dim() < 2 or matrix.numel() == 0 or matrix.shape[-1] == 1:
        return False
    return matrix.stride(-1) != 1 and matrix.stride(-2) == 1


def _gradients_of_weights(weights: tuple[str, ...]) -> Callable[[Tensor, str], Tensor]:
    """Dense columns for the CPU kernels' weights that have them, else contiguous."""

    def gradient(leaf: Tensor, argument: str) -> Tensor:
        by_columns = argument in weights and leaf.is_cpu and _has_dense_columns(leaf)
        return leaf.new_empty(leaf.mT.shape).mT if by_columns else leaf.new_empty(leaf.shape)

    return gradient


def _spliced(values: Any) -> list[Any]:
    """The values in a flat list, those of a list or tuple one by one."""
    if not isinstance(values, (list, tuple)):
        return [values]
    return [x for value in values for x in (_spliced(value) if isinstance(value, (list, tuple)) else (value,))]


def _in_order_of(promised: Any, value: Any) -> Any:
    """Tensors, in lists or not, with the strides of others."""
    if isinstance(value, (list, tuple)):
        return type(value)(_in_order_of(p, v) for p, v in zip(promised, value, strict=True))
    return value if value.stride() == promised.stride() else promised.copy_(value)


class DifferentiableOp:
    """One op and its backward.

    Args:
        name: of the op under ``torch.ops.mmkernels``.
        arguments: the ``NamedTuple`` of what it takes (`mmkernels._arguments`).
        outputs: schema of the differentiable outputs; ``Tensor[]`` for a list whose length the arguments give.
        saved: schema of what else the kernels leave for the backward; may be empty.
        reference: ``(*arguments)`` -> the outputs, one tensor or a tuple; tensors in any memory order.
        fake: ``(arguments)`` -> a tuple of fresh tensors with the shapes and strides of outputs and saved.
        cpu: what there is to say of the compiled kernels.
        cuda: the CUDA kernels.
        triton: the Triton kernels.
        reference_saved: ``(*arguments)`` -> the tuple of saved tensors when the reference runs, with the meaning that
            all backends give them: the backward may run on another one. To be given where there are any.
        keeps: what its backward finds again; where that depends on the options, all there is to choose from, and
            ``(arguments)`` -> the position of one.
        gradient: ``(leaf, argument's name)`` -> a fresh tensor with the shape and strides of the gradient of that
            argument; default: contiguous, and for the weights of ``cpu`` as those kernels write them.
        batching: the rules ``(operator, info, in_dims, *args)`` of vmap, of forward and backward; default: one call per
            example, but ``fold_vmap`` where ``cpu`` has weights.
    """

    def __init__(
        self,
        name: str,
        arguments: Any,
        *,
        outputs: str,
        saved: str = "",
        reference: Callable[..., Any],
        fake: Callable[..., Tensors],
        cpu: NativeKernels = _NATIVE,
        cuda: CudaKernels | None = None,
        triton: TritonKernels | None = None,
        reference_saved: Callable[..., Tensors] | None = None,
        keeps: Kept | tuple[tuple[Kept, ...], Callable[..., int]] = EVERYTHING,
        gradient: Callable[[Tensor, str], Tensor] | None = None,
        batching: tuple[Callable[..., tuple[Any, Any]], Callable[..., tuple[Any, Any]]] | None = None,
    ) -> None:
        if saved and reference_saved is None:
            raise TypeError(f"{name}: reference_saved: expected a function, as the op saves {saved}; got None")
        cpu = dataclasses.replace(cpu, name=cpu.name or name)
        self.name = name
        self.weights = cpu.weights
        self._reference = reference
        self._reference_saved = reference_saved
        schema = schema_of(arguments)
        self._as_tuple = arguments
        self._fake = fake
        self._gradient = gradient or (_gradients_of_weights(cpu.weights) if cpu.weights else _contiguous_gradient)
        self._outputs = outputs.count(",") + 1
        returns = f"{outputs}, {saved}" if saved else outputs
        self.forward = Operator(
            name,
            f"({schema}, bool training) -> ({returns})",
            fake=self._forward_fake,
            backends=[
                cpu_backend(cpu, "fwd", arguments, 0, 1),
                *cuda_backends(name, cuda, "forward", arguments, 0, 1),
                *triton_backends(name, triton, "forward", arguments, 0, 1),
                reference_backend(self._reference_forward),
            ],
            differentiable=self._differentiable_forward,
        )
        self.backward = Operator(
            f"{name}_backward",
            f"(Tensor[] grads, {schema}, Tensor[] saved, bool[] needed) -> Tensor[]",
            fake=self._backward_fake,
            backends=[
                cpu_backend(cpu, "bwd", arguments, 1, 2),
                *cuda_backends(name, cuda, "backward", arguments, 1, 2),
                *triton_backends(name, triton, "backward", arguments, 1, 2),
                reference_backend(self._reference_backward),
            ],
            differentiable=self._differentiable_backward,
        )
        types = [str(a.type) for a in self.forward.overload._schema.arguments[:-1]]
        self._is_list = tuple("List[Tensor]" in t for t in types)
        self._positions = tuple(i for i, t in enumerate(types) if "Tensor" in t)
        self._arguments = len(types)
        self._names = tuple(a.name for a in self.forward.overload._schema.arguments[:-1])
        kinds, choose = ((keeps,), None) if isinstance(keeps, Kept) else keeps
        self._choose_kept = choose
        self._kept = tuple((k.outputs, k.table(self._names), k.bits_of_added(self._names)) for k in kinds)
        plain = (self._differentiable_forward, self._differentiable_backward)
        default = (fold_vmap(plain[0]), fold_vmap(plain[1])) if cpu.weights else (loop_vmap, loop_vmap)
        of_forward, of_backward = batching or default
        self.forward.register_gradient(self._save, self._grad, functools.partial(of_forward, self.forward))
        self.backward.register_gradient(
            self._save_for_double, self._double_grad, functools.partial(of_backward, self.backward)
        )
        # torch's old vmap (is_grads_batched, jacobian(vectorize=True)) knows no lists: it takes the reference apart.
        self.backward.impl("Batched", self._reference_backward)
        self._supports = cpu.supports
        _, absent = native_op(f"_{cpu.name}_fwd")
        has_door = absent is None and cpu.composed is None
        weights = tuple(self._names.index(name) for name in self.weights)
        self._handle = _native.open_door(cpu.name, self._outputs, self._kept, weights) if has_door else None
        # The output, or the list of them where there are several, of a plain eager call that nobody has checked; None
        # where the call is not plain or does not fit. For ops whose kernels come with a check of their own
        # (``DoorCheck``); ask `may_use_door` first.
        self.unchecked: Callable[..., Any] = self._unchecked
        if self._handle is not None and choose is None:
            self.unchecked = functools.partial(_plain_call, self._handle, False, 0)  # a frame of Python less

    def __call__(self, *args: Any) -> Tensors:
        """The differentiable outputs, those in lists one by one."""
        if (
            self._handle is not None
            and may_use_door()
            and (self._supports is None or self._supports(self._as_tuple(*args)) is None)
            and (out := _plain_call(self._handle, True, self._kept_kind(args), *args)) is not None
        ):
            return (out,) if isinstance(out, Tensor) else tuple(out)
        checks.check_layouts(self.name, self._names, args)
        training = needs_grad(*self._leaves(args))
        return tuple(self._split(self.forward(*args, training))[0])

    def _unchecked(self, *args: Any) -> Any:
        if self._handle is None:
            return None
        return _plain_call(self._handle, False, self._kept_kind(args), *args)

    # --- tensors among the arguments ----------------------------------------------------------------------------------

    def _leaves(self, args: Sequence[Any]) -> list[Tensor | None]:
        """The tensor arguments, lists element by element, None where an optional one is absent."""
        leaves: list[Tensor | None] = []
        for i in self._positions:
            if self._is_list[i]:
                leaves.extend(args[i])
            else:
                leaves.append(args[i])
        return leaves

    def _leaf_names(self, args: Sequence[Any]) -> list[str]:
        """The name of the argument of each of the leaves."""
        return [self._names[i] for i in self._positions for _ in (args[i] if self._is_list[i] else (args[i],))]

    def _with_leaves(self, args: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
        """The arguments with other things in the places of the tensors."""
        result, at = list(args), 0
        for i in self._positions:
            if self._is_list[i]:
                count = len(args[i])
                result[i] = list(leaves[at : at + count])
                at += count
            else:
                result[i] = leaves[at]
                at += 1
        return result

    def _without_tensors(self, args: Sequence[Any]) -> list[Any]:
        return self._with_leaves(args, [None] * len(self._leaves(args)))

    def _reference_of(self, args: Sequence[Any], given: Sequence[Tensor | None]) -> Callable[..., Tensors]:
        """The reference as a function of the leaves; None takes the one among ``given``."""

        def function(*leaves: Tensor | None) -> Tensors:
            full = [g if new is None else new for new, g in zip(leaves, given, strict=True)]
            return tuple(_spliced(self._reference(*self._with_leaves(args, full))))

        return function

    def _split(self, result: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs and the saved tensors of the forward, lists element by element."""
        parts = result if isinstance(result, tuple) else (result,)
        return _spliced(parts[: self._outputs]), _spliced(parts[self._outputs :])

    # --- what is kept for the backward --------------------------------------------------------------------------------

    def _kept_kind(self, args: Sequence[Any]) -> int:
        return 0 if self._choose_kept is None else self._choose_kept(self._as_tuple(*args))

    def _keeps_outputs(self, args: Sequence[Any]) -> bool:
        return self._kept[self._kept_kind(args)][0]

    def _keeps(self, args: Sequence[Any]) -> list[bool]:
        """For each of the leaves whether a gradient that may be asked for depends on it."""
        _, table, _ = self._kept[self._kept_kind(args)]
        read = 0
        for i in self._positions:
            if any(x is not None and x.requires_grad for x in (args[i] if self._is_list[i] else (args[i],))):
                read |= table[i]
        return [bool(read >> i & 1) for i in self._positions for _ in (args[i] if self._is_list[i] else (0,))]

    # --- forward ------------------------------------------------------------------------------------------------------

    def _forward_fake(self, *args: Any) -> Any:
        *arguments, training = args
        result = list(self._fake(self._as_tuple(*arguments)))
        if not training:
            result[self._outputs :] = [t.new_empty(0) for t in result[self._outputs :]]
        return result[0] if len(result) == 1 else tuple(result)

    def _reference_forward(self, *args: Any) -> Any:
        *arguments, training = args
        outputs = self._reference(*arguments)
        promised = self._fake(self._as_tuple(*arguments))
        outputs = _in_order_of(promised[: self._outputs], outputs if isinstance(outputs, tuple) else (outputs,))
        result = (*outputs, *self._plain_saved(arguments, training))
        return result[0] if len(result) == 1 else result

    def _differentiable_forward(self, *args: Any) -> Any:
        *arguments, _ = args
        outputs = self._reference(*arguments)
        # What is differentiated then is plain torch, which keeps what it needs: no backward of the op reads anything.
        result = (*(outputs if isinstance(outputs, tuple) else (outputs,)), *self._plain_saved(arguments, False))
        return result[0] if len(result) == 1 else result

    def _plain_saved(self, arguments: Sequence[Any], training: bool) -> Tensors:
        promised = self._fake(self._as_tuple(*arguments))[self._outputs :]
        if not training:
            return tuple(t.new_empty(0) for t in promised)
        return () if self._reference_saved is None else self._reference_saved(*arguments)

    # --- backward -----------------------------------------------------------------------------------------------------

    def _backward_fake(self, grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        *args, _, needed = rest
        leaves = zip(self._leaves(args), self._leaf_names(args), needed, strict=True)
        return [self._gradient(x, name) if x is not None and n else grads[0].new_empty(0) for x, name, n in leaves]

    def _reference_backward(self, grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        *args, _, needed = rest
        given = self._leaves(args)
        wanted = [x if n else None for x, n in zip(given, needed, strict=True)]
        pulled: Sequence[Tensor | None] = kernel_vjp(self._reference_of(args, given), wanted, grads)
        empty = grads[0].new_empty
        return [
            empty(0) if x is None or g is None else self._in_order_of_leaf(x, name, g)
            for x, name, g in zip(given, self._leaf_names(args), pulled, strict=True)
        ]

    def _differentiable_backward(self, grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        *args, _, needed = rest
        given = self._leaves(args)
        wanted = [x if n else None for x, n in zip(given, needed, strict=True)]
        pulled = vjp(self._reference_of(args, given), wanted, grads)
        return [grads[0].new_empty(0) if g is None else g for g in pulled]

    def _in_order_of_leaf(self, leaf: Tensor, name: str, grad: Tensor) -> Tensor:
        if torch._C._functorch.is_legacy_batchedtensor(grad):
            return grad.clone(memory_format=torch.contiguous_format)
        return self._gradient(leaf, name).copy_(grad)

    # --- gradients ----------------------------------------------------------------------------------------------------

    def _save(self, ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        *args, training = inputs
        outputs, saved = self._split(outputs)
        kept = outputs if training and self._keeps_outputs(args) else []
        leaves = self._leaves(args)
        # Where the forward runs again, or a transform hides what will be needed, nothing is left out.
        hidden = not training or torch._C._are_functorch_transforms_active()
        needed = [True] * len(leaves) if hidden else self._keeps(args)
        ctx.save_for_backward(*(x if n else None for x, n in zip(leaves, needed, strict=True)), *kept, *saved)
        ctx.shapes = [None if n or x is None else shape_of(x) for x, n in zip(leaves, needed, strict=True)]
        ctx.arguments = self._without_tensors(args)
        ctx.outputs = [(o.shape, o.dtype) for o in outputs]
        ctx.training = training
        ctx.backend = forced_backend()
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)

    def _grad(self, ctx: Any, *results: Any) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # asked for once: torch.utils.checkpoint recomputes them but once
        count = len(ctx.shapes)
        leaves = [x if shape is None else shape() for x, shape in zip(kept[:count], ctx.shapes, strict=True)]
        args = self._with_leaves(ctx.arguments, leaves)
        flags = self._leaves(ctx.needs_input_grad)
        needed = [x is not None and bool(n) and x.is_floating_point() for x, n in zip(leaves, flags, strict=True)]
        pulled: Sequence[Tensor | None] = [None] * len(leaves)
        grads, _ = self._split(results)
        given = next((g for g in grads if g is not None), None)
        if given is not None and any(needed):
            saved = list(kept[count:])
            if not ctx.training:
                outputs, saved = self._split(self.forward(*args, True))
                saved = [*outputs, *saved] if self._keeps_outputs(args) else saved
            pairs = zip(grads, ctx.outputs, strict=True)
            dense = [given.new_zeros(shape, dtype=dtype) if g is None else g for g, (shape, dtype) in pairs]
            if torch._C._functorch.is_legacy_batchedtensor(given):
                pulled = self.backward.overload(dense, *args, saved, needed)
            elif ctx.backend is None:
                pulled = self.backward(dense, *args, saved, needed)
            else:  # autograd may run this in another thread, or after the `use_backend` block
                with use_backend(ctx.backend):
                    pulled = self.backward(dense, *args, saved, needed)
            pulled = [g if n else None for g, n in zip(pulled, needed, strict=True)]
        return (*self._in_places(ctx.arguments, pulled), None)

    def _in_places(self, args: Sequence[Any], pulled: Sequence[Tensor | None]) -> list[Any]:
        """Gradients where the arguments have tensors, None elsewhere; torch takes any empty list for one of tensors."""
        result = self._with_leaves(args, pulled)
        return [x if i in self._positions or (isinstance(x, list) and not x) else None for i, x in enumerate(result)]

    def _save_for_double(self, ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        grads, *args, saved, needed = inputs
        leaves = self._leaves(args)
        ctx.save_for_backward(*grads, *leaves)
        ctx.grad_count = len(grads)
        ctx.saved_count = len(saved)
        ctx.arguments = self._without_tensors(args)
        ctx.needed = needed
        ctx.set_materialize_grads(False)

    def _double_grad(self, ctx: Any, second: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Gradients of the backward through the reference's; what was saved counts as a function of the inputs."""
        count = ctx.grad_count
        given = ctx.saved_tensors
        wanted = [n and g is not None for n, g in zip(ctx.needed, second, strict=True)]
        flags = [*ctx.needs_input_grad[0], *self._leaves(ctx.needs_input_grad[1 : 1 + self._arguments])]
        inputs = [
            x if x is not None and n and x.is_floating_point() else None for x, n in zip(given, flags, strict=True)
        ]

        def backward(*needed: Tensor | None) -> Tensors:
            full = [x if n is None else n for n, x in zip(needed, given, strict=True)]
            grads, leaves = full[:count], full[count:]
            wrt = [x if w else None for x, w in zip(leaves, wanted, strict=True)]
            pulled = vjp(self._reference_of(ctx.arguments, leaves), wrt, grads)
            return tuple(g for g in pulled if g is not None)

        pulled: Sequence[Tensor | None] = [None] * len(given)
        if any(wanted) and any(x is not None for x in inputs):
            pulled = vjp(backward, inputs, [g for g, w in zip(second, wanted, strict=True) if w])
        of_arguments = self._in_places(ctx.arguments, pulled[count:])
        return (list(pulled[:count]), *of_arguments, [None] * ctx.saved_count, None)
