"""A NaN in one row of an operand stays in that row: in torch's products as the references form them, and in kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from calls import FIRST, Call, flat
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels as mmk
from mmkernels import _native
from mmkernels._dispatch import Operator
from mmkernels.ops import _products

HALVES = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)


def behind_rows(a: Tensor) -> Tensor:
    """What lies behind every row of a matrix but the last in memory, up to the next."""
    rows, depth = a.shape[-2:]
    if a.dim() == 2 and a.stride(1) == 1 and a.stride(0) > depth:
        return a.as_strided((rows - 1, a.stride(0) - depth), a.stride(), a.storage_offset() + depth)
    return a[..., 1:, :1]


class ReadsPairs(TorchDispatchMode):
    """torch's products of half precision as on AMX: what is behind a row is read where the blocks of the depth, all of
    one length up to 32, have no even one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.bmm):
            a = args[0]
        elif packet is torch.ops.aten.addmm:
            a = args[1]
        else:
            return out
        depth = a.shape[-1]
        if a.dtype not in HALVES or depth % (2 * max(1, math.ceil(depth / 32))) == 0:
            return out
        bad = torch.zeros(out.shape, dtype=torch.bool)
        bad[..., :-1, :] |= ~behind_rows(a).isfinite().all(-1, keepdim=True)
        return out.masked_fill(bad, torch.nan)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that reckon with AMX, whatever the core."""
    monkeypatch.setattr(_products, "_multiplies_on_tiles", lambda: True)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m, k, n", [(5, 7, 3), (4, 7, 6), (5, 6, 6), (4, 6, 3), (1, 1, 1), (38, 50, 33)])
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


def product_of_leading_dims(x: Tensor, weight: Tensor) -> Tensor:
    return _products.matmul(x, weight.mT.expand(*x.shape[:-2], *weight.mT.shape))


@pytest.mark.parametrize("product", [_products.linear, product_of_leading_dims])
@pytest.mark.parametrize("depth", [0, 1, 7, 30, 33, 38, 50, 96, 100, 257, 762])
@each_dtype
def test_nor_does_it_in_torchs_own_of_any_depth(
    dtype: torch.dtype, depth: int, product: Callable[[Tensor, Tensor], Tensor]
) -> None:
    for lead in ((), (2, 3)):
        for rows, columns in ((4, 24), (33, 38)):
            x, weight = torch.randn(*lead, rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)
            grad = torch.randn(*lead, rows, columns).to(dtype)
            results = []
            for bad in (False, True):
                if bad:
                    x[..., rows // 2 :, :], grad[..., rows // 2 :, :] = torch.nan, torch.nan
                leaf = x.clone().requires_grad_()
                out = product(leaf, weight)
                pulled = torch.autograd.grad(out, leaf, grad)[0]
                results.append([t[..., : rows // 2, :] for t in (product(x, weight), out, pulled)])
            assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
            wide = x.float() @ weight.float().mT
            torch.testing.assert_close(product(x, weight).float(), wide, atol=0.02, rtol=0.02, equal_nan=True)


@pytest.mark.usefixtures("tiles")
def test_the_mode_that_reads_pairs_lets_a_row_with_nan_into_the_one_before() -> None:
    a, b = torch.rand(27, 29).bfloat16(), torch.randn(29, 16).bfloat16()
    a[7:] = torch.nan
    with ReadsPairs():
        assert (a @ b)[6].isnan().all() and (a @ b)[:6].isfinite().all()
        assert (a[:, :28] @ b[:28])[:7].isfinite().all()
        assert _products.matmul(a, b)[:7].isfinite().all()
        assert _products.matmul(a.requires_grad_(), b)[:7].isfinite().all()


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


def odd(call: Call) -> Call:
    """Every width and count odd."""
    return call.at(**{name: size | 1 for name, size in call.default_sizes().items()})


ODD = [odd(call) for call in FIRST.values()]


@functools.cache
def rows_of(call: Call) -> list[tuple[int, int, int, int]]:
    """Where the reference keeps rows apart: leaf, its dim, output, and the dim of the output whose slice i depends on
    the slice i of the leaf alone."""
    leaves = call.leaves(torch.float64)
    with mmk.use_backend("reference"):
        return _rows_kept_apart(call, leaves)


def _rows_kept_apart(call: Call, leaves: list[Tensor]) -> list[tuple[int, int, int, int]]:
    clean = list(flat(call.raw(*leaves)))
    found = []
    for which, leaf in enumerate(leaves):
        for dim, size in enumerate(leaf.shape):
            changed = []
            for row in range(size):
                others = [x.clone() for x in leaves]
                others[which].select(dim, row).mul_(1.5).add_(0.25)
                changed.append([a != b for a, b in zip(flat(call.raw(*others)), clean, strict=True)])
            for output, result in enumerate(clean):
                for result_dim in (d for d, n in enumerate(result.shape) if n == size and size > 1):
                    slices = [c[output].transpose(0, result_dim).reshape(size, -1).any(1) for c in changed]
                    moved = torch.stack(slices)
                    if moved.any() and not (moved & ~torch.eye(size, dtype=torch.bool)).any():
                        found.append((which, dim, output, result_dim))
    return found


def check_no_row_reaches_another(call: Call, dtype: torch.dtype) -> None:
    """A NaN in one row of an argument neither in other rows of the outputs nor in those of its gradient."""

    def run(nan_in: tuple[int, int, int] | None = None) -> tuple[list[Tensor], list[Tensor | None]]:
        leaves = call.leaves(dtype)
        if nan_in is not None:
            which, dim, row = nan_in
            leaves[which].select(dim, row).fill_(torch.nan)
        leaves = [x.requires_grad_() for x in leaves]
        outputs = list(flat(call.raw(*leaves)))
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs], allow_unused=True)
        return [x.detach() for x in outputs], list(grads)

    close = torch.testing.assert_close
    clean, clean_grads = run()
    for which, dim, output, result_dim in rows_of(call):
        size = clean[output].shape[result_dim]
        for row in {0, size // 2, size - 1}:
            outputs, grads = run((which, dim, row))
            others = torch.tensor([i for i in range(size) if i != row])
            got, expected = (x[output].index_select(result_dim, others) for x in (outputs, clean))
            close(got, expected, msg=lambda m, w=which, r=row, d=dim: f"leaf {w}, row {r} of dim {d}: {m}")
            if len(outputs) == 1:  # of several, another may depend on all rows
                close(grads[which].index_select(dim, others), clean_grads[which].index_select(dim, others))


@each_dtype
@pytest.mark.parametrize("call", ODD, ids=str)
def test_a_row_with_nan_reaches_no_neighbour_in_any_argument(call: Call, dtype: torch.dtype, backend: str) -> None:
    check_no_row_reaches_another(call, dtype)


def of_tiles(call: Call) -> Call:
    """Its counts of tokens and its widths leave neither rows nor depths of whole tiles; those of examples, too, where
    there are no tokens."""
    sizes = call.default_sizes()
    tokens = any(name[0] in "LT" for name in sizes)
    kept = "HMRG" + ("B" if tokens else "")
    return call.at(**{name: 35 + 10 * i for i, name in enumerate(sizes) if name[0] not in kept})


ON_TILES = [of_tiles(call) for call in FIRST.values() if call.weights() or "attention" in call.op]


@pytest.mark.parametrize("call", ON_TILES, ids=str)
def test_nor_does_it_on_tiles(call: Call, native_isa: str) -> None:
    if _native.isa() in ("amx", "amx_portable"):
        check_no_row_reaches_another(call, torch.bfloat16)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("call", ODD, ids=str)
def test_nor_does_it_where_torchs_product_reads_pairs_beyond_a_row(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    # As plain torch under the mode, which a custom op would hide its inside from.
    monkeypatch.setattr(Operator, "__call__", Operator.run)
    with mmk.use_backend("reference"), ReadsPairs():
        check_no_row_reaches_another(call, torch.bfloat16)
