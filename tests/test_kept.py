"""What a backward keeps alive: the tensors that a needed gradient depends on, and no others."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch
from calls import Call, each_small_call
from conftest import TRITON_PARAMETER, native_only
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import mmkernels as mmk
from mmkernels.testing import poisoned_memory, same_bits

WAYS = [
    pytest.param(None, marks=native_only, id="short way"),
    pytest.param("cpu", marks=native_only, id="cpu"),
    pytest.param("triton", marks=TRITON_PARAMETER.marks, id="triton"),
    pytest.param("reference", id="reference"),
]


def _gradients(call: Call, leaves: Sequence[Tensor], needed: Sequence[bool], spoil: bool) -> list[Tensor]:
    """Gradients of the needed leaves; ``spoil`` writes NaN into every leaf that was not kept before the backward."""
    leaves = [x.clone().requires_grad_(n) for x, n in zip(leaves, needed, strict=True)]
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.untyped_storage().data_ptr())
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        out = call(*leaves)
    if spoil:
        for x in leaves:
            if x.untyped_storage().data_ptr() not in kept:
                x.detach().fill_(torch.nan)
    wanted = [x for x in leaves if x.requires_grad]
    return list(torch.autograd.grad(out, wanted, torch.ones_like(out).cumsum(0)))


@pytest.mark.parametrize("way", WAYS)
@each_small_call
def test_no_gradient_depends_on_what_is_not_kept(call: Call, way: str | None) -> None:
    leaves = call.leaves()
    count = len(leaves)
    cases = [[i == j for j in range(count)] for i in range(count)]
    brief = way == "triton"  # whose interpreter is slow: NaN in what is not kept is looked for in each gradient alone
    if count > 2 and not brief:
        cases += [[not n for n in flags] for flags in cases]
    for needed in cases:
        try:
            with mmk.use_backend(way) if way else contextlib.nullcontext(), poisoned_memory():
                got = _gradients(call, leaves, needed, spoil=True)
                expected = got if brief else _gradients(call, leaves, needed, spoil=False)
        except mmk.UnsupportedError as declined:
            pytest.skip(str(declined))
        assert same_bits(got, expected), f"gradients of {needed}"
        assert all(g.isfinite().all() for g in got), f"gradients of {needed}"


def test_what_no_gradient_needs_may_change_before_the_backward() -> None:
    """As in torch, where the addend of a sum may be changed in place."""
    x, y, weight, residual = (torch.randn(s, requires_grad=True) for s in ((4, 3), (4, 2), (6, 5), (4, 6)))
    out = mmk.concat_linear([x, y], weight.detach(), residual=residual, gate=torch.ones(()))
    with torch.no_grad():
        residual.zero_()
    assert torch.autograd.grad(out.sum(), [x, residual])[1].equal(torch.ones_like(residual))


@native_only
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"gate": torch.full((), 0.3)}])
def test_gradient_of_an_addend_is_the_sums_own(options: dict) -> None:
    """As in torch: nothing is copied, and a leaf's ``grad`` shares no memory with what the caller gave."""
    x, weight, residual = (torch.randn(s, requires_grad=True) for s in ((4, 3), (6, 3), (4, 6)))
    given = torch.randn(4, 6)
    out = mmk.concat_linear([x], weight, residual=residual, **options)
    of_x, of_residual = torch.autograd.grad(out, [x, residual], given, retain_graph=True)
    assert of_residual.data_ptr() == given.data_ptr()
    out.backward(given)
    assert residual.grad is not None and residual.grad.equal(given) and residual.grad.data_ptr() != given.data_ptr()
    assert x.grad is not None and x.grad.equal(of_x)
    twice = mmk.concat_linear([x], weight, residual=residual * residual, **options)
    (first,) = torch.autograd.grad(twice.sum(), residual, create_graph=True)
    assert torch.autograd.grad(first.sum(), residual)[0].equal(torch.full((4, 6), 2.0))


def test_embeddings_are_merged_without_being_kept() -> None:
    text, image = torch.randn(2, 64, 256, requires_grad=True), torch.randn(32, 256, requires_grad=True)
    mask = torch.arange(128).view(2, 64) % 4 == 0
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
        mmk.merge_embeddings(text, image, mask)
    assert sum(kept) <= mask.nbytes
