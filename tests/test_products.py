"""A NaN in one row of an operand stays in that row: in torch's products as the references form them, and in kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels as mmk
from mmkernels._dispatch import Operator
from mmkernels.ops import _products

HALVES = (torch.bfloat16, torch.float16)


class ReadsPairs(TorchDispatchMode):
    """torch's products of half precision as on AMX: an odd depth's last pair ends with the next row's first element."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.bmm):
            a, b = args[:2]
        elif packet is torch.ops.aten.addmm:
            a, b = args[1:3]
        else:
            return out
        if a.dtype not in HALVES:
            return out
        bad = torch.zeros(out.shape, dtype=torch.bool)
        if a.shape[-1] % 2:
            bad[..., :-1, :] |= ~a[..., 1:, :1].isfinite()
            bad[..., :, :-1] |= ~b[..., :1, 1:].isfinite()  # columns of B are rows of its transpose
        return out.masked_fill(bad, torch.nan)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that reckon with AMX, whatever the core."""
    monkeypatch.setattr(_products, "_multiplies_on_tiles", lambda: True)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m, k, n", [(5, 7, 3), (4, 7, 6), (5, 6, 6), (4, 6, 3), (1, 1, 1)])
def test_a_row_with_nan_leaves_the_others_alone_in_products_and_their_gradients(
    dtype: torch.dtype, m: int, k: int, n: int
) -> None:
    def run(product: Callable[[Tensor, Tensor], Tensor], nan_in: str) -> list[Tensor]:
        a, b = torch.randn(2, m, k).to(dtype), torch.randn(2, k, n).to(dtype)
        grad = torch.randn(2, m, n).to(dtype)
        {"a": a, "b": b.mT, "grad": grad, "grad columns": grad.mT}[nan_in][:, -1] = torch.nan
        a.requires_grad_()
        b.requires_grad_()
        out = product(a, b)
        return [out.detach(), *torch.autograd.grad(out, [a, b], grad)]

    for nan_in in ("a", "b", "grad", "grad columns"):
        torch.manual_seed(0)
        expected = run(torch.matmul, nan_in)
        with ReadsPairs():
            torch.manual_seed(0)
            got = run(_products.matmul, nan_in)
        for e, g in zip(expected, got, strict=True):
            assert torch.equal(e.isnan(), g.isnan()), nan_in
            torch.testing.assert_close(g, e, equal_nan=True)


@pytest.mark.usefixtures("tiles")
def test_the_mode_that_reads_pairs_lets_a_row_with_nan_into_the_one_before() -> None:
    a, b = torch.rand(27, 29).bfloat16(), torch.randn(29, 16).bfloat16()
    a[7:] = torch.nan
    with ReadsPairs():
        assert (a @ b)[6].isnan().all() and (a @ b)[:6].isfinite().all()
        assert (a[:, :28] @ b[:28])[:7].isfinite().all()
        assert _products.matmul(a, b)[:7].isfinite().all()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("k, n", [(7, 3), (6, 4), (0, 3), (7, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_layer_is_torchs(lead: tuple[int, ...], k: int, n: int, bias: bool) -> None:
    for dtype in (torch.float32, *HALVES):
        leaves = [torch.randn(*lead, k), torch.randn(n, k), torch.randn(n)][: 3 if bias else 2]
        leaves = [x.to(dtype).requires_grad_() for x in leaves]
        out, expected = _products.linear(*leaves), F.linear(*leaves)
        grad = torch.randn(expected.shape).to(dtype)
        torch.testing.assert_close(out, expected)
        for g, e in zip(
            torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
        ):
            torch.testing.assert_close(g, e)


B, H = 3, 3  # odd, as all sizes are
Call = tuple[Callable[..., Tensor], list[Tensor], dict[int, tuple[int, int]]]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calls(L: int, D: int, C: int) -> dict[str, Call]:
    """An op as a function of its operands; and by operand the dim of its rows and that of the results' rows."""
    return {
        "cross_attention": (
            mmk.cross_attention,
            [random(B, H, L, D), random(B, H, C, D), random(B, H, C, D)],
            {0: (2, 2), 2: (3, 3)},
        ),
        "cross_attention of one query": (
            mmk.cross_attention,
            [random(B, H, 1, D), *[random(B, H, L, D)] * 2],
            {2: (3, 3)},
        ),
        "joint_attention": (
            lambda q, r, k, v: torch.cat(mmk.joint_attention([q, r], [k], [v]), 2),
            [random(B, H, L, D), random(B, H, C, D), random(B, H, C, D), random(B, H, C, D)],
            {0: (2, 2)},
        ),
        "varlen_cross_attention": (
            lambda q, k, v: mmk.varlen_cross_attention(
                q, k, v, torch.tensor([0, L - 3, L]), torch.tensor([0, 2, C]), L - 3, C - 2
            ),
            [random(L, H, D), random(C, H, D), random(C, H, D)],
            {0: (0, 0), 2: (2, 2)},
        ),
        "bidirectional_cross_attention": (
            lambda q, k, v: mmk.bidirectional_cross_attention(q, k, random(B, H, L, D).to(q.dtype), v)[0],
            [random(B, H, L, D), random(B, H, C, D), random(B, H, C, D)],
            {2: (3, 3)},
        ),
        "concat_linear": (
            lambda x, y, w: mmk.concat_linear([x, y], w),
            [random(L, D), random(L, C), random(C, D + C)],
            {0: (0, 0), 1: (0, 0), 2: (0, 1)},
        ),
        "concat_norm_linear": (
            lambda x, y, w: mmk.concat_norm_linear([x, y], torch.ones_like(w[0]), torch.zeros_like(w[0]), w),
            [random(L, D), random(L, 2), random(C, D + 2)],
            {0: (0, 0), 1: (0, 0), 2: (0, 1)},
        ),
        "gated_fusion": (
            lambda x, y, v, w, g: mmk.gated_fusion([x, y], [v, w], None, g),
            [random(L, D), random(L, C), random(C, D), random(C, C), random(C, D + C)],
            {0: (0, 0), 1: (0, 0), 2: (0, 1), 4: (0, 1)},
        ),
        "gated_concat": (
            mmk.gated_concat,
            [random(L, D), random(L, C), random(D, D + C)],
            {0: (0, 0), 1: (0, 0)},
        ),
        "bilinear_fusion": (
            mmk.bilinear_fusion,
            [random(L, D), random(L, C), random(C, D), random(C, C)],
            {0: (0, 0), 1: (0, 0), 2: (0, 1), 3: (0, 1)},
        ),
        "low_rank_fusion": (
            lambda x, y, f, g: mmk.low_rank_fusion([x, y], [f, g], torch.ones_like(f[:, 0, 0])),
            [random(L, D - 1), random(L, C - 1), random(3, D, C), random(3, C, C)],
            {0: (0, 0), 1: (0, 0), 2: (2, 1), 3: (2, 1)},
        ),
        "tensor_fusion_linear": (
            lambda x, y, w: mmk.tensor_fusion_linear([x, y], w),
            [random(L, 4), random(L, 2), random(C, 15)],
            {0: (0, 0), 1: (0, 0), 2: (0, 1)},
        ),
        "additive_attention_pool": (
            lambda x, w, v: mmk.additive_attention_pool(x, w, v)[0],
            [random(L, 3, D), random(C, D), random(C)],
            {0: (0, 0)},
        ),
        "multiplicative_attention_pool": (
            lambda x, q, w: mmk.multiplicative_attention_pool(x, q, weight=w)[0],
            [random(L, 3, D), random(L, C), random(C, D)],
            {0: (0, 0), 1: (0, 0)},
        ),
        "split_attention_pool": (
            lambda x, v, a, w, b: mmk.split_attention_pool(x, v, a, w, b)[0],
            [random(L, 3, D), random(C, D), random(C), random(3 * D, C), random(3 * D)],
            {0: (0, 0)},
        ),
    }


CALLS = calls(7, 9, 5)
CALLS_ON_TILES = calls(39, 53, 45)  # products that leave neither rows nor depths of whole tiles


def check_no_row_reaches_another(
    call: Callable[..., Tensor], operands: list[Tensor], rows: dict[int, tuple[int, int]], dtype: torch.dtype
) -> None:

    def run(operand: int | None, row: int) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.to(dtype, copy=True) for x in operands]
        if operand is not None:
            leaves[operand].select(rows[operand][0], row).fill_(torch.nan)
        leaves = [x.requires_grad_() for x in leaves]
        out = call(*leaves)
        return out.detach(), list(torch.autograd.grad(out, leaves, torch.ones_like(out)))

    clean, clean_grads = run(None, 0)
    assert clean.isfinite().all()
    for operand, (dim, result_dim) in rows.items():
        size = operands[operand].shape[dim]
        for row in {0, size // 2, size - 1}:
            out, grads = run(operand, row)
            here = torch.tensor([i for i in range(size) if i != row])
            there = torch.tensor([i for i in range(clean.shape[result_dim]) if i != row])
            where = f"operand {operand}, row {row}"
            assert out.select(result_dim, row).isnan().any(), where
            assert torch.equal(out.index_select(result_dim, there), clean.index_select(result_dim, there)), where
            close = torch.testing.assert_close
            close(grads[operand].index_select(dim, here), clean_grads[operand].index_select(dim, here))


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_row_with_nan_reaches_no_neighbour_in_any_operand(name: str, dtype: torch.dtype, backend: str) -> None:
    check_no_row_reaches_another(*CALLS[name], dtype)


@pytest.mark.parametrize("name", CALLS)
def test_nor_does_it_on_tiles(name: str, native_isa: str) -> None:
    check_no_row_reaches_another(*CALLS_ON_TILES[name], torch.bfloat16)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", CALLS)
def test_nor_does_it_where_torchs_product_reads_pairs_beyond_a_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As plain torch under the mode, which a custom op would hide its inside from.
    monkeypatch.setattr(Operator, "__call__", Operator.run)
    with mmk.use_backend("reference"), ReadsPairs():
        check_no_row_reaches_another(*CALLS[name], torch.bfloat16)
