"""The Triton kernels of bidirectional_cross_attention: one block of y and several, strips, waves of x."""

from __future__ import annotations

import pytest
import torch
from fusion_cases import each_dtype
from test_bidirectional_cross_attention import joined, joined_leaves, make, masks

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory, same_bits


@each_dtype
@pytest.mark.parametrize(("lengths", "clamp"), [((70, 13), None), ((40, 77), 1.5)])
def test_outputs_and_gradients_match_the_oracle(
    lengths: tuple[int, int], clamp: float | None, dtype: torch.dtype, triton_backend: str
) -> None:
    leaves = make(dtype, lengths, heads=1, dim=19, value_dim=33)
    with poisoned_memory():
        check_op(mmk.bidirectional_cross_attention, *leaves, backend=triton_backend, clamp=clamp, **masks(lengths))


def test_no_tokens_on_one_side(triton_backend: str) -> None:
    for lengths in ((0, 5), (5, 0)):
        with poisoned_memory():
            check_op(mmk.bidirectional_cross_attention, *make(lengths=lengths), backend=triton_backend)


def test_waves_of_x_go_on_where_the_last_one_ended(triton_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkernels.ops.bidirectional_cross_attention import forward_triton

    leaves = make(batch=1, heads=2, lengths=(150, 70), dim=16)
    monkeypatch.setattr(forward_triton, "_WORKSPACE", 1)
    plan = forward_triton.walk(150, 70, 2, 18, forward_triton._config(leaves[0], 16))
    assert len(list(plan.waves())) > 2 and plan.y_blocks > 1
    with poisoned_memory():
        check_op(mmk.bidirectional_cross_attention, *leaves, backend=triton_backend)


def test_two_runs_give_the_same_bits(triton_backend: str) -> None:
    leaves = joined_leaves(batch=1, lengths=(90, 40))

    def run() -> list[torch.Tensor]:
        out = joined(*leaves)
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    assert same_bits(run(), run())


def test_a_wide_head_falls_through_and_says_why(triton_backend: str) -> None:
    for dtype, dim in ((torch.float32, 80), (torch.bfloat16, 136)):
        with pytest.raises(mmk.UnsupportedError, match=f"a head dim of {dim} is more than"):
            mmk.bidirectional_cross_attention(*make(dtype, lengths=(3, 2), dim=dim))
