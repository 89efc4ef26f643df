"""The short way into the fusion ops: plain eager calls take it, with the results of the long way; others are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from agreement import agree
from conftest import native_only
from environment import DEVICE
from op_contract import check_checkpoint, gradients
from torch import Tensor

import mmkernels as mmk
from mmkernels import _native
from mmkernels.ops.concat_linear.op import concat_linear_op
from mmkernels.ops.contrastive_loss.op import contrastive_loss_op
from mmkernels.ops.low_rank_fusion.op import low_rank_fusion_op
from mmkernels.ops.multimodal_cross_entropy.op import multimodal_cross_entropy_op
from mmkernels.ops.sigmoid_contrastive_loss.op import sigmoid_contrastive_loss_op

pytestmark = native_only

Function = Callable[..., Tensor]

_FLAGS = torch.tensor([[True, True], [False, True], [True, False]])
_SLOTS = torch.tensor([[False, True, True, False], [True, False, False, True], [True, True, False, False]])

_STARTS = torch.tensor([0, 1, 1, 3])
_LABELS = torch.tensor([4, -100, 0])


def _in_one(outputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in outputs])


def _both(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([x.flatten(1) for x in outputs], 1)


# Each op as a function of leaves, and their shapes.
CALLS: dict[str, tuple[Function, Sequence[tuple[int, ...]]]] = {
    "concat_linear": (
        lambda x, y, w, b, g: mmk.concat_linear([x, y], w, b, activation="gelu", presence=_FLAGS, gate=g),
        [(3, 5), (3, 4), (6, 9), (6,), (6,)],
    ),
    "concat_linear from its output": (
        lambda x, y, w: mmk.concat_linear([x, y], w, activation="relu"),
        [(3, 5), (3, 4), (6, 9)],
    ),
    "concat_norm_linear": (
        lambda x, y, g, w: mmk.concat_norm_linear([x, y], g, None, w),
        [(3, 5), (3, 4), (9,), (6, 9)],
    ),
    "gated_fusion": (
        lambda x, y, v, u, g: mmk.gated_fusion([x, y], [v, u], None, g, presence=_FLAGS),
        [(3, 5), (3, 4), (6, 5), (6, 4), (12, 9)],
    ),
    "gated_concat": (
        lambda x, y, w, b: mmk.gated_concat(x, y, w, b),
        [(3, 5), (3, 4), (5, 9), (5,)],
    ),
    "modulated_norm": (
        lambda x, shift, scale: mmk.modulated_norm(x, shift, scale),
        [(3, 4, 6), (3, 6), (3, 6)],
    ),
    "norm_rotary": (
        lambda q, k, c, s, u, w: torch.cat(mmk.norm_rotary(q, k, c, s, query_weight=u, key_weight=w), 1),
        [(3, 2, 4, 6), (3, 1, 4, 6), (4, 2), (4, 2), (6,), (6,)],
    ),
    "concat_tokens": (
        lambda x, y, t, p: mmk.concat_tokens([x, y], type_embedding=t, position_embeddings=[None, p]),
        [(3, 2, 6), (3, 4, 6), (2, 6), (4, 6)],
    ),
    "merge_embeddings": (
        lambda text, image: mmk.merge_embeddings(text, image, _SLOTS),
        [(3, 4, 6), (6, 6)],
    ),
    "low_rank_fusion": (
        lambda x, y, f, h, w: mmk.low_rank_fusion([x, y], [f, h], w),
        [(3, 5), (3, 4), (2, 6, 6), (2, 5, 6), (2,)],
    ),
    "tensor_fusion_linear": (
        lambda x, y, w, b: mmk.tensor_fusion_linear([x, y], w, b),
        [(3, 5), (3, 4), (6, 30), (6,)],
    ),
    "joint_attention, one stream of outputs": (
        lambda p, q, x, y, u, v, b: mmk.joint_attention([p, q], [x, y], [u, v], stream_bias=b)[1],
        [(3, 2, 4, 6), (3, 2, 5, 6), (3, 2, 4, 6), (3, 2, 7, 6), (3, 2, 4, 6), (3, 2, 7, 6), (2, 2, 2)],
    ),
    "deformable_attention": (
        lambda v, x, w: mmk.deformable_attention(v, [(2, 3), (1, 2)], x, w),
        [(3, 8, 2, 6), (3, 4, 2, 2, 2, 2), (3, 4, 2, 2, 2)],
    ),
    "varlen_cross_attention": (
        lambda q, k, v: mmk.varlen_cross_attention(q, k, v, _STARTS, _STARTS, 3, 3),
        [(3, 4, 6), (3, 2, 6), (3, 2, 5)],
    ),
    "additive_attention_pool": (
        lambda x, y, w, v, b: mmk.additive_attention_pool([x, y], w, v, bias=b, presence=_FLAGS)[0],
        [(3, 5), (3, 5), (6, 5), (6,), (6,)],
    ),
    "multiplicative_attention_pool, its weights": (
        lambda x, q, w: mmk.multiplicative_attention_pool(x, q, weight=w)[1],
        [(3, 2, 5), (3, 4), (4, 5)],
    ),
    "split_attention_pool, both outputs": (
        lambda x, w, b, u, c: _both(mmk.split_attention_pool(x, w, b, u, c, activation="silu")),
        [(3, 2, 5), (4, 5), (4,), (10, 4), (10,)],
    ),
    "decision_fusion": (
        lambda x, y, w: mmk.decision_fusion([x, y], w, method="log", presence=_FLAGS),
        [(3, 5), (3, 5), (2,)],
    ),
    "contrastive_loss": (lambda x, y, s: mmk.contrastive_loss(x, y, s), [(3, 5), (3, 5), ()]),
    "sigmoid_contrastive_loss": (
        lambda x, y, s, b: mmk.sigmoid_contrastive_loss(x, y, s, b),
        [(3, 5), (3, 5), (), ()],
    ),
    "distillation_loss": (
        lambda s, t: mmk.distillation_loss(s, t, temperature=2.0, kind="jsd"),
        [(3, 5), (3, 5)],
    ),
    "multimodal_cross_entropy": (
        lambda a, b, s: _in_one(mmk.multimodal_cross_entropy([a, b], _LABELS, log_vars=s, presence=_FLAGS)),
        [(3, 5), (3, 6), (2,)],
    ),
    "bilinear_fusion": (
        lambda x, y, u, v: mmk.bilinear_fusion(x, y, u, v, rank=2),
        [(3, 5), (3, 4), (6, 5), (6, 4)],
    ),
}
calls = pytest.mark.parametrize("name", CALLS)


def call(name: str, dtype: torch.dtype = torch.float32) -> tuple[Function, list[Tensor]]:
    function, shapes = CALLS[name]
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    return function, [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def took_the_door(out: Tensor) -> bool:
    nodes = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node.name().startswith("mmkernels::"):
            return True
        nodes += [] if node is None else [n for n, _ in node.next_functions]
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@calls
def test_has_the_bits_of_the_long_way(name: str, dtype: torch.dtype) -> None:
    function, leaves = call(name, dtype)
    assert took_the_door(function(*leaves))
    short = gradients(function, leaves)
    with torch.no_grad():
        assert agree([function(*leaves)], short[:1])
    with mmk.use_backend("cpu"):
        assert not took_the_door(function(*leaves))
        assert agree(gradients(function, leaves), short)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@calls
def test_the_gradient_of_a_sum_is_that_of_a_number_for_every_element(name: str, dtype: torch.dtype) -> None:
    function, leaves = call(name, dtype)
    out = function(*leaves)
    number = torch.tensor(-2.5, dtype=out.dtype)
    of_one = torch.autograd.grad(out, leaves, number.expand_as(out), retain_graph=True, allow_unused=True)
    of_all = torch.autograd.grad(out, leaves, number.repeat(out.shape), allow_unused=True)
    assert agree([x for x in of_one if x is not None], [x for x in of_all if x is not None])


@calls
def test_only_the_gradients_that_are_asked_for(name: str) -> None:
    function, leaves = call(name)
    _, *together = gradients(function, leaves)
    grad = torch.randn(function(*leaves).shape, generator=torch.Generator(torch.get_default_device()).manual_seed(1))
    for leaf, expected in zip(leaves, together, strict=True):
        assert agree(torch.autograd.grad(function(*leaves), [leaf], grad), [expected])


@calls
def test_differentiates_twice(name: str) -> None:
    def second(dtype: torch.dtype) -> tuple[Tensor, ...]:
        function, leaves = call(name)
        leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for got, oracle in zip(second(torch.float32), second(torch.float64), strict=True):
        torch.testing.assert_close(got.double(), oracle, rtol=1e-3, atol=1e-4)


@calls
def test_batches_of_gradients(name: str) -> None:
    function, leaves = call(name)
    out = function(*leaves)
    grads = torch.randn(2, *out.shape)
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in grads]
    for got, expected in zip(batched, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(expected))


@calls
def test_checkpoints(name: str) -> None:
    function, leaves = call(name)
    check_checkpoint(function, leaves)


@calls
def test_what_is_not_plain_goes_the_long_way(name: str) -> None:
    function, leaves = call(name)
    expected = function(*leaves)
    assert not took_the_door(function(*(x.double() for x in leaves)))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert not took_the_door(function(*leaves))
    with torch.overrides.BaseTorchFunctionMode():  # it sees the call, and then makes it
        assert agree([function(*leaves)], [expected])
    strided = [x.detach().unsqueeze(-1).expand(*x.shape, 2).contiguous()[..., 0].requires_grad_() for x in leaves]
    assert not took_the_door(out := function(*strided))
    assert agree([out], [expected])
    transformed, _ = torch.func.vjp(function, *(x.detach() for x in leaves))
    assert agree([transformed], [expected])


def test_losses_of_half_precision_take_float32_weights() -> None:
    z, labels = torch.randn(3, 5), torch.tensor([4, -100, 0])

    def call(first: torch.dtype, second: torch.dtype, vector: torch.dtype) -> object:
        w, rest = torch.ones(2, dtype=vector), (0.0, -100, None, 0.7, False)
        logits = [z.to(first), z.to(second)]
        return multimodal_cross_entropy_op.unchecked(logits, [labels], w, None, None, w, *rest)

    single, half, wide = torch.float32, torch.bfloat16, torch.float64
    assert call(half, half, single) is not None and call(half, half, half) is not None
    for unfit in ((single, single, half), (half, half, wide), (half, single, single), (half, half, torch.float16)):
        assert call(*unfit) is None


def test_a_freed_graph_says_so_and_inplace_changes_are_noticed() -> None:
    function, leaves = call("concat_linear")
    out = function(*leaves)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    out = function(*leaves)
    with torch.no_grad():
        leaves[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_door_itself_refuses_what_the_kernels_do_not_serve() -> None:
    door, handle = _native.door("differentiable_door"), concat_linear_op._handle
    assert door is not None
    x, w = torch.randn(3, 4), torch.randn(6, 4)
    none = (None, None, None, None, None)
    for checked in (True, False):
        assert door(handle, checked, 0, [x], w, *none) is not None
        assert door(handle, checked, 0, (x,), w, *none) is not None
        for xs in ([x.double()], [x.to("meta")], [x.t()], [None], x, None):
            assert door(handle, checked, 0, xs, w, *none) is None
        for other in (w.to_sparse(), w.to("meta"), w.double(), None, 3):
            assert door(handle, checked, 0, [x], other, *none) is None
        assert door(handle, checked, 0, [x], w, None, 3, None, None, None) is None
    assert door(low_rank_fusion_op._handle, False, 0, [x], [w], w, None, None) is None  # has no check


def test_contrastive_calls_that_were_not_checked_have_to_fit() -> None:
    door = _native.door("differentiable_door")
    assert door is not None
    clip, sigmoid = contrastive_loss_op._handle, sigmoid_contrastive_loss_op._handle
    x, s, labels = torch.randn(4, 3), torch.tensor(2.0), torch.tensor([1, 0, 1, 2])

    def call(x: object, y: object, s: object, labels: object = None, smoothing: float = 0.0) -> list[Tensor | None]:
        of_clip = door(clip, False, 0, x, y, s, labels, labels, smoothing, True, 0, 4, False)
        return [of_clip, door(sigmoid, False, 0, x, y, s, s, 0, 4, True, True)]

    for fitting in ((x, x, s), (x.half(), x.half(), s), (x, x, s, labels), (x, x, s, labels.int(), 0.5)):
        assert all(out is not None for out in call(*fitting))
    for unfit in (
        *((x, x[1:], s), (x, x.half(), s), (x[0], x[0], s), (x.long(), x.long(), s), (x, x.t(), s)),
        *((x, x, s.double()), (x, x, s.half()), (x, x, s.reshape(1)), (x, x, s.long())),
    ):
        assert call(*unfit) == [None, None]
    for options in ((labels[1:],), (labels.bool(),), (labels.float(),), (labels[None],), (labels, 1.5), (None, -0.1)):
        assert call(x, x, s, *options)[0] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contrastive_scales_of_any_kind_take_the_door(dtype: torch.dtype) -> None:
    x = torch.randn(4, 3).to(dtype).requires_grad_()
    for scale in (2.0, torch.tensor(2.0), torch.tensor([2.0]).bfloat16(), torch.nn.Parameter(torch.tensor(2.0))):
        for is_log in (False, True):
            losses = [
                mmk.contrastive_loss(x, x, scale, is_log_scale=is_log),
                mmk.sigmoid_contrastive_loss(x, x, scale, scale, is_log_scale=is_log),
            ]
            assert all(took_the_door(loss) and loss.dtype == dtype for loss in losses)
            with mmk.use_backend("cpu"):
                assert agree([mmk.contrastive_loss(x, x, scale, is_log_scale=is_log)], losses[:1])


def test_a_call_that_was_not_checked_has_to_fit() -> None:
    door, handle = _native.door("differentiable_door"), concat_linear_op._handle
    assert door is not None
    x, y, w = torch.randn(2, 3, 4), torch.randn(2, 3, 1), torch.randn(6, 5)
    fitting = {
        "bias": [None, torch.randn(6)],
        "activation": [None, "relu", "gelu_tanh"],
        "presence": [None, torch.ones(2, dtype=torch.bool), torch.ones(2, 3, 2, dtype=torch.bool)],
        "residual": [None, torch.randn(2, 3, 6)],
        "gate": [None, torch.randn(()), torch.randn(6)],
    }
    unfit = {
        "bias": [torch.randn(5), torch.randn(6, 1), torch.randn(()), torch.ones(6) > 0],
        "activation": ["softmax", ""],
        "presence": [
            torch.ones(3, dtype=torch.bool),
            torch.ones(3, 2, dtype=torch.bool),
            torch.ones(2),
            torch.ones(2).int(),
        ],
        "residual": [torch.randn(3, 6), torch.randn(2, 3, 5), torch.randn(2, 3, 6).bfloat16()],
        "gate": [torch.randn(1), torch.randn(5), torch.tensor(True)],
    }

    def call(xs: object = (x, y), weight: object = w, **given: object) -> Tensor | None:
        arguments = dict.fromkeys(fitting) | given
        return door(handle, False, 0, xs, weight, *arguments.values())

    for name, values in fitting.items():
        for value in values:
            out = call(**{name: value})
            assert out is not None
            with mmk.use_backend("cpu"):
                assert agree([out], [mmk.concat_linear([x, y], w, **{name: value})])
    for name, values in unfit.items():
        for value in values:
            assert call(**{name: value}) is None, (name, value)
    for xs in ([], [x], [x, y, y], [x, y[0]], [x, y[:1]], [torch.tensor(1.0)], [x, y > 0]):
        assert call(xs) is None
    for weight in (w[:, :4], w.t().contiguous(), w[0], w[None], w > 0):
        assert call(weight=weight) is None
