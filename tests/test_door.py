"""The short way in, of plain eager calls: what it refuses, and says so, when nobody has checked a call."""

from __future__ import annotations

import pytest
import torch
from agreement import agree
from calls import CALLS, took_the_node
from conftest import native_only
from torch import Tensor

import mmkernels as mmk
from mmkernels import _native
from mmkernels.ops.concat_linear.op import concat_linear_op
from mmkernels.ops.contrastive_loss.op import contrastive_loss_op
from mmkernels.ops.low_rank_fusion.op import low_rank_fusion_op
from mmkernels.ops.multimodal_cross_entropy.op import multimodal_cross_entropy_op
from mmkernels.ops.sigmoid_contrastive_loss.op import sigmoid_contrastive_loss_op

pytestmark = native_only


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
    function = CALLS["concat_linear, all options"]
    leaves = [x.requires_grad_() for x in function.leaves()]
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
            assert all(took_the_node(loss) and loss.dtype == dtype for loss in losses)
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
