"""The gradient and the batching rule of an op, in the forms that autograd and functorch ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from mmkernels._dispatch import Operator

_FOLDED_EXAMPLES = 64  # from so many on, of at most so many mapped elements each, plain torch beats a call per example
_FOLDED_ELEMENTS = 4096


def by_keyword(setup_context: Callable[[Any, tuple[Any, ...], Any], None]) -> Callable[..., None]:
    """torch passes ``inputs`` and ``output`` by name."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs, output)

    return setup


def autograd_functions(
    operator: Operator, setup: Callable[..., None], pull: Callable[..., Any], rule: Callable[..., tuple[Any, Any]]
) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """Two forms of one gradient: the quick one for plain tensors, and the one that functorch asks for."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = operator.run(*args)
            setup(ctx, args, outputs)
            return outputs

        backward = staticmethod(pull)

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return operator(*args)

        setup_context = staticmethod(setup)
        backward = staticmethod(pull)
        vmap = staticmethod(rule)

    for function in (Eager, Transformed):
        function.__name__ = function.__qualname__ = f"mmkernels_{operator.name}"
    return Eager, Transformed


# --- lists of tensors -------------------------------------------------------------------------------------------------
# An autograd.Function knows tensors as arguments and results of their own, not inside a list.


class _Layout:
    """Which arguments were lists, and how long: enough to splice them into a flat tuple and back."""

    def __init__(self, args: Sequence[Any]) -> None:
        self.lengths = tuple(len(a) if _is_tensor_list(a) else None for a in args)
        self.result: _Layout | None = None  # that of what the op returned; None for a single tensor

    def flatten(self, nested: Sequence[Any]) -> list[Any]:
        flat: list[Any] = []
        for item, length in zip(nested, self.lengths, strict=True):
            if length is None:
                flat.append(item)
            else:
                flat.extend(item if item is not None else (None,) * length)
        return flat

    def nest(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        nested, at = [], 0
        for length in self.lengths:
            if length is None:
                nested.append(flat[at])
                at += 1
            else:
                nested.append(list(flat[at : at + length]))
                at += length
        return tuple(nested)

    def flatten_result(self, result: Any) -> Any:
        if isinstance(result, Tensor):
            return result
        nested = (result,) if isinstance(result, list) else result
        self.result = _Layout(nested)
        return tuple(self.result.flatten(nested))

    def nest_result(self, flat: Any) -> Any:
        if self.result is None:
            return flat
        nested = self.result.nest(flat)
        return nested[0] if len(nested) == 1 else nested


def _is_tensor_list(argument: Any) -> bool:
    return isinstance(argument, (list, tuple)) and all(isinstance(x, Tensor) for x in argument)


def flattening(apply: Callable[..., Any]) -> Callable[..., Any]:
    def of_nested(*args: Any) -> Any:
        layout = _Layout(args)
        return layout.nest_result(apply(layout, *layout.flatten(args)))

    return of_nested


class _NestedContext:
    """An autograd context whose flags of needed gradients come in lists where the arguments did."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.needs_input_grad = ctx.layout.nest(ctx.needs_input_grad[1:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def autograd_functions_of_lists(
    operator: Operator, setup: Callable[..., None], pull: Callable[..., Any], rule: Callable[..., tuple[Any, Any]]
) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """As `autograd_functions`, for the arguments that `flattening` gives: the layout, then every tensor by itself."""

    def setup_nested(ctx: Any, layout: _Layout, flat: Sequence[Any], result: Any) -> None:
        ctx.layout = layout
        setup(ctx, layout.nest(flat), layout.nest_result(result))

    def pull_nested(ctx: Any, *grads: Any) -> Any:
        if ctx.layout.result is not None:
            grads = ctx.layout.result.nest(grads)
        return (None, *ctx.layout.flatten(pull(_NestedContext(ctx), *grads)))

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, layout: _Layout, *flat: Any) -> Any:
            result = layout.flatten_result(operator.run(*layout.nest(flat)))
            setup_nested(ctx, layout, flat, result)
            return result

        backward = staticmethod(pull_nested)

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(layout: _Layout, *flat: Any) -> Any:
            return layout.flatten_result(operator(*layout.nest(flat)))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_nested(ctx, inputs[0], inputs[1:], output)

        backward = staticmethod(pull_nested)

        @staticmethod
        def vmap(info: Any, in_dims: Sequence[Any], layout: _Layout, *flat: Any) -> Any:
            result, dims = rule(info, layout.nest(in_dims[1:]), *layout.nest(flat))
            result = layout.flatten_result(result)
            if layout.result is None:
                return result, dims
            return result, tuple(layout.result.flatten((dims,) if isinstance(dims, list) else dims))

    for function in (Eager, Transformed):
        function.__name__ = function.__qualname__ = f"mmkernels_{operator.name}"
    return Eager, Transformed


def kernel_vjp(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """As `vjp`, inside an op's kernel, where autograd is switched off and every transform has been peeled away."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        pulled = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                [x for x in leaves if x is not None],
                [g for _, g in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
        )
        return tuple(None if x is None else next(pulled) for x in inputs)


def vjp(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Pull ``grads`` back through ``function(*inputs)``; None stands for an absent input or a zero gradient.

    It works under every functorch transform and is itself differentiable, which is what lets a reference serve as the
    double backward of its op.
    """
    present = [i for i, x in enumerate(inputs) if x is not None]

    def of_present(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(inputs)
        for i, tensor in zip(present, tensors, strict=True):
            full[i] = tensor
        return function(*full)

    outputs, pullback = torch.func.vjp(  # type: ignore[misc]  # not of the has_aux form
        of_present, *(inputs[i] for i in present)
    )
    pulled = pullback(tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grads, strict=True)))
    result: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(present, pulled, strict=True):
        result[i] = grad
    return tuple(result)


def loop_vmap(operator: Operator, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """The batching rule of an op that cannot fold the mapped dim into another: one call per example."""

    def example(x: Any, dim: Any, i: int) -> Any:
        if _is_tensor_list(x):
            return [example(t, d, i) for t, d in zip(x, dim or (None,) * len(x), strict=True)]
        return x.select(dim, i) if isinstance(dim, int) else x

    results = [
        operator(*(example(x, d, i) for x, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)
    ]
    return _stacked(results)


def fold_vmap(function: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """The batching rule of an op whose plain ``function`` torch batches, products with a weight into one product,
    gradients of a weight for each example into a batched one.

    Few or large examples are looped over: their kernels gain more than the calls cost.
    """

    def fresh(*args: Any) -> Any:
        # An input that is a result as it stands (the gradient of a residual, say) is one that autograd cannot save.
        given = {id(x) for x in tree_leaves(args)}
        return tree_map(lambda x: x.clone() if id(x) in given else x, function(*args))

    def rule(operator: Operator, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        mapped = sum(_mapped_elements(x, dim) for x, dim in zip(args, in_dims, strict=True))
        if info.batch_size < _FOLDED_EXAMPLES or mapped > info.batch_size * _FOLDED_ELEMENTS:
            return loop_vmap(operator, info, in_dims, *args)
        result = torch.func.vmap(fresh, tuple(in_dims), randomness=info.randomness)(*args)
        return result, tree_map(lambda _: 0, result)

    return rule


def _mapped_elements(x: Any, dim: Any) -> int:
    if _is_tensor_list(x):
        return sum(_mapped_elements(t, d) for t, d in zip(x, dim or (None,) * len(x), strict=True))
    return x.numel() if isinstance(dim, int) else 0


def _stacked(results: Sequence[Any]) -> tuple[Any, Any]:
    """The examples' results in one, lists of tensors too, and the dims they are mapped in, in the same structure."""
    if isinstance(results[0], Tensor):
        return torch.stack(list(results)), 0
    kind = type(results[0])
    pairs = [_stacked(values) for values in zip(*results, strict=True)]
    return kind(outputs for outputs, _ in pairs), kind(dims for _, dims in pairs)
