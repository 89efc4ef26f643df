"""contrastive_loss and sigmoid_contrastive_loss on every backend and instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import native_only
from environment import DEVICE, HERE
from fusion_cases import allocations, each_dtype, few_dtypes
from torch import Tensor

import mmkernels as mmk
from mmkernels import _native
from mmkernels.ops.contrastive_loss.op import contrastive_loss_op
from mmkernels.ops.sigmoid_contrastive_loss.op import sigmoid_contrastive_loss_op
from mmkernels.testing import check_op, same_bits

SIZES = [(7, 5), (50, 32), (301, 17), (1, 3), (2, 64), (0, 4), (5, 0)]
SMALL = [(7, 5), (50, 32)]


def embeddings(count: int, features: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, y = (F.normalize(torch.randn(count, features), dim=-1).to(dtype).requires_grad_() for _ in range(2))
    return x, y


def scalar(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


OPTIONS: dict[str, Any] = {
    "pairs": lambda n: {},
    "smoothed": lambda n: dict(label_smoothing=0.1),
    "labels": lambda n: dict(labels=torch.randint(0, max(n // 3, 1), (n,))),
    "labels, smoothed": lambda n: dict(labels=torch.randint(0, max(n // 3, 1), (n,)), label_smoothing=0.3),
    "all alike": lambda n: dict(labels=torch.zeros(n, dtype=torch.int32)),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@few_dtypes
def test_loss_and_gradients(size: tuple[int, int], option: str, dtype: torch.dtype, backend: str) -> None:
    options = OPTIONS[option](size[0])
    if size[0] == 1:  # whose loss is 0 and flat, whatever the smoothing: of that only rounding would be seen
        options.pop("label_smoothing", None)
    check_op(mmk.contrastive_loss, *embeddings(*size, dtype), scalar(14.0), backend=backend, **options)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 100.0, -3.0])
@each_dtype
def test_any_scale(scale: float, dtype: torch.dtype, backend: str) -> None:
    for size in SMALL:
        # The gradient of a scale of 0 is the sum of a row's products for each row, and no other gradient is as large.
        terms = 1.0 / size[0] if scale == 0 else 0.0
        check_op(mmk.contrastive_loss, *embeddings(*size, dtype), scalar(scale), backend=backend, terms=terms)
        leaves = (*embeddings(*size, dtype), scalar(scale), scalar(-1.0))
        check_op(mmk.sigmoid_contrastive_loss, *leaves, backend=backend)


@pytest.mark.parametrize("size", SIZES, ids=str)
@each_dtype
def test_sigmoid_loss_and_gradients(size: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    leaves = (*embeddings(*size, dtype), scalar(10.0), scalar(-10.0))
    check_op(mmk.sigmoid_contrastive_loss, *leaves, backend=backend)


def test_several_tiles_of_rows_and_groups_of_tiles(native_isa: str) -> None:
    leaves = (*embeddings(1100, 12), scalar(30.0))
    check_op(mmk.contrastive_loss, *leaves, labels=torch.randint(0, 400, (1100,)))
    check_op(mmk.sigmoid_contrastive_loss, *leaves, scalar(-6.0))


def test_logits_of_ten_thousand_stay_finite_and_right(backend: str) -> None:
    x, y = (t.detach().mul(100).requires_grad_() for t in embeddings(40, 16))
    for function, rest in ((mmk.contrastive_loss, ()), (mmk.sigmoid_contrastive_loss, (torch.tensor(-10.0),))):
        loss = function(x, y, 1.0, *rest)
        with mmk.use_backend("reference"):
            wide = function(x.double(), y.double(), 1.0, *rest)
        torch.testing.assert_close(loss.double(), wide, rtol=1e-5, atol=0)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, y)))


@pytest.mark.parametrize("size", [2, 15, 17, 40])
@few_dtypes
def test_a_row_of_products_below_0_ends_where_it_ends(size: int, dtype: torch.dtype, backend: str) -> None:
    """The zeros behind it are above its maximum, by more than an exponential can tell."""
    sides = (F.normalize(3 + torch.randn(size, 8), dim=-1) * sign for sign in (1, -1))
    leaves = (*(x.to(dtype).requires_grad_() for x in sides), scalar(200.0))
    check_op(mmk.contrastive_loss, *leaves, backend=backend)
    check_op(mmk.sigmoid_contrastive_loss, *leaves, scalar(10.0), backend=backend)


def test_the_reference_is_the_written_out_formula() -> None:
    x, y = (t.detach().double() for t in embeddings(6, 5))
    z = 7.0 * x @ y.T
    own = torch.arange(6)
    expected = (F.cross_entropy(z, own, label_smoothing=0.2) + F.cross_entropy(z.T, own, label_smoothing=0.2)) / 2
    torch.testing.assert_close(mmk.contrastive_loss(x, y, 7.0, label_smoothing=0.2), expected)
    labels = torch.tensor([4, 1, 4, 9, 1, 4])
    positive = (labels[:, None] == labels).double()
    targets = positive / positive.sum(1, keepdim=True)
    expected = (F.cross_entropy(z, targets) + F.cross_entropy(z.T, targets)) / 2
    torch.testing.assert_close(mmk.contrastive_loss(x, y, 7.0, labels=labels), expected)
    expected = -F.logsigmoid((z - 3) * (2 * torch.eye(6) - 1)).sum() / 6
    torch.testing.assert_close(mmk.sigmoid_contrastive_loss(x, y, 7.0, -3.0), expected)


def open_clip_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """ClipLoss.forward of open_clip/loss.py, in one process."""
    own = torch.arange(len(x))
    of_x, of_y = scale * x @ y.T, scale * y @ x.T
    return (F.cross_entropy(of_x, own) + F.cross_entropy(of_y, own)) / 2


def open_clip_siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLipLoss of open_clip/loss.py, in one process."""
    logits = scale * x @ y.T + bias
    signs = 2 * torch.eye(len(x), dtype=x.dtype) - torch.ones_like(logits)
    return -F.logsigmoid(signs * logits).sum() / len(x)


def sup_con(x: Tensor, y: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    """L_out of Khosla et al., 2020 (arXiv:2004.11362), eq. 2, its anchors x and its contrasts y, and the other way: the
    bidirectional loss of UniCL, arXiv:2204.03610, eq. 3 to 5."""
    positive = labels[:, None] == labels
    losses = []
    for z in (scale * x @ y.T, scale * y @ x.T):
        log_p = z - z.exp().sum(1, keepdim=True).log()
        losses.append(-torch.stack([row[own].mean() for row, own in zip(log_p, positive, strict=True)]).mean())
    return (losses[0] + losses[1]) / 2


@pytest.mark.parametrize("size", [(7, 5), (64, 32), (300, 64)], ids=str)
def test_values_and_gradients_are_the_peers(size: tuple[int, int], backend: str) -> None:
    x, y = embeddings(*size)
    s, b, labels = scalar(14.0), scalar(-10.0), torch.arange(size[0]) % 5
    for ours, peer, leaves, options in (
        (mmk.contrastive_loss, open_clip_clip, (x, y, s), {}),
        (mmk.sigmoid_contrastive_loss, open_clip_siglip, (x, y, s, b), {}),
        (mmk.contrastive_loss, sup_con, (x, y, s), dict(labels=labels)),
    ):
        results = []
        for function, dtype in ((ours, torch.float32), (peer, torch.float64)):
            given = [t.detach().to(dtype).requires_grad_() for t in leaves]
            loss = function(*given, **options)
            results.append([loss, *torch.autograd.grad(loss, given)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_a_scale_may_be_given_as_its_logarithm(backend: str) -> None:
    x, y = embeddings(20, 8)
    log = torch.tensor(2.0, requires_grad=True)
    losses = [mmk.contrastive_loss(x, y, log, is_log_scale=True), mmk.contrastive_loss(x, y, log.exp())]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, log)[0] for loss in losses))
    loss = mmk.sigmoid_contrastive_loss(x, y, 2.0, -1.0, is_log_scale=True)
    torch.testing.assert_close(loss, mmk.sigmoid_contrastive_loss(x, y, log.exp().detach(), -1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_the_same_for_any_number_of_threads(dtype: torch.dtype, native_isa: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.manual_seed(1)
            torch.set_num_threads(threads)
            x, y = embeddings(1300, 40, dtype)
            s, b = scalar(20.0), scalar(-5.0)
            losses = (mmk.contrastive_loss(x, y, s), mmk.sigmoid_contrastive_loss(x, y, s, b))
            grads = [torch.autograd.grad(losses[0], (x, y, s)), torch.autograd.grad(losses[1], (x, y, s, b))]
            results.append([*losses, *grads[0], *grads[1]])
    finally:
        torch.set_num_threads(before)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@native_only
def test_the_logits_are_never_held() -> None:
    count, features = 3000, 16
    x, y = embeddings(count, features)
    for function, rest in ((mmk.contrastive_loss, ()), (mmk.sigmoid_contrastive_loss, (-10.0,))):
        sizes = allocations(lambda f=function, r=rest: torch.autograd.grad(f(x, y, 20.0, *r), (x, y)))
        assert max(sizes) < count * count * 4 / 2


def test_only_gradients_that_are_needed(backend: str) -> None:
    x, y = embeddings(20, 8)
    full = torch.autograd.grad(mmk.contrastive_loss(x, y, 5.0), (x, y))
    for i, leaf in enumerate((x, y)):
        frozen = [t if t is leaf else t.detach() for t in (x, y)]
        (alone,) = torch.autograd.grad(mmk.contrastive_loss(*frozen, 5.0), leaf)
        torch.testing.assert_close(alone, full[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_that_were_kept_are_those_made_again(dtype: torch.dtype, backend: str) -> None:
    for rows, columns, symmetric in ((300, 300, True), (7, 10, False)):
        x, y = embeddings(rows, 40, dtype)[0], embeddings(columns, 40, dtype)[0]
        for scale in (scalar(20.0), scalar(-3.0), scalar(0.0)):
            results = []
            for kept in (False, dtype == torch.float32 or rows % 2 == 0):
                loss = contrastive_loss_op(x, y, scale, None, None, 0.1, symmetric, 0, columns, kept)[0]
                results.append([loss, *torch.autograd.grad(loss, (x, y, scale))])
            assert same_bits(*results)


@native_only
@pytest.mark.parametrize("core_multiplies", [False, True])
def test_products_are_kept_only_in_a_dtype_that_the_core_multiplies(
    core_multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "has_bf16_products", lambda: core_multiplies)
    for dtype, keeps in ((torch.float32, True), (torch.bfloat16, core_multiplies), (torch.float16, False)):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t.numel()) or t, lambda t: t):
            mmk.contrastive_loss(*embeddings(128, 96, dtype), 10.0)
        assert (128 * 128 in kept) == keeps


@native_only
def test_a_frozen_side_has_no_gradient_made() -> None:
    for frozen in range(2):
        x, y = (t.detach().requires_grad_(i != frozen) for i, t in enumerate(embeddings(30, 100)))
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t.numel()) or t, lambda t: t):
            mmk.sigmoid_contrastive_loss(x, y, 10.0, -10.0)
        assert kept.count(3000) <= 3  # x, y and one gradient


def test_a_gradient_that_the_forward_did_not_know_of(backend: str) -> None:
    x, y = embeddings(20, 8)
    leaves = (x, y, scalar(5.0), scalar(-3.0))
    results = []
    for wanted in ((True, True), (False, True), (False, False)):
        loss = sigmoid_contrastive_loss_op(*leaves, 0, 20, *wanted)[0]
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_a_rectangle_is_a_part_of_the_whole(backend: str) -> None:
    x, y = (t.detach() for t in embeddings(20, 8))
    s = torch.tensor(9.0)
    op = torch.ops.mmkernels.contrastive_loss
    parts = []
    for own, other in ((x, y), (y, x)):
        for first, rows in ((0, own[:7]), (7, own[7:])):
            parts.append(op(rows, other, s, None, None, 0.2, False, first, 20, False, False)[0])
    torch.testing.assert_close(sum(parts), mmk.contrastive_loss(x, y, s, label_smoothing=0.2))
    labels, parts = torch.arange(20) % 6, []
    for own, other in ((x, y), (y, x)):
        for rows in (slice(0, 7), slice(7, 20)):
            parts.append(op(own[rows], other, s, labels[rows], labels, 0.0, False, 0, 20, False, False)[0])
    torch.testing.assert_close(sum(parts), mmk.contrastive_loss(x, y, s, labels=labels))


x = torch.zeros(4, 3)
BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "x: expected a torch.Tensor; got list", ([], x, 1.0), {}),
    (TypeError, "x: expected dtype float32.*; got torch.int64", (x.long(), x.long(), 1.0), {}),
    (ValueError, r"x: expected 2 dims \(N, D\); got shape \(4,\)", (x[:, 0], x[:, 0], 1.0), {}),
    (TypeError, "y: expected the dtype of x, torch.float32; got torch.float16", (x, x.half(), 1.0), {}),
    (ValueError, r"y: expected shape \(4, 3\), that of x; got \(3, 3\)", (x, x[1:], 1.0), {}),
    (RuntimeError, rf"y: expected the device of x, {HERE}; got meta", (x, x.to("meta"), 1.0), {}),
    (TypeError, "logit_scale: expected a number", (x, x, "1"), {}),
    (ValueError, r"logit_scale: expected a number, or a tensor of shape \(\) or \(1,\)", (x, x, torch.ones(2)), {}),
    (ValueError, r"logit_scale: expected a number in the range of torch.float32; got -1e\+39", (x, x, -1e39), {}),
    (ValueError, r"logit_scale: expected a number in the range of torch.float32; got 1e\+39", (x, x, 10**39), {}),
    (
        ValueError,
        "logit_scale: expected a logarithm whose .* torch.float32; got 100.0",
        (x, x, 100),
        dict(is_log_scale=True),
    ),
    (
        ValueError,
        "logit_scale: expected a logarithm whose .* torch.float64; got 1000.0",
        (x.double(), x.double(), 1e3),
        dict(is_log_scale=True),
    ),
    (TypeError, "is_log_scale: expected a bool; got int", (x, x, 1.0), dict(is_log_scale=1)),
    (TypeError, "labels: expected an integer dtype; got torch.float32", (x, x, 1.0), dict(labels=torch.ones(4))),
    (ValueError, r"labels: expected shape \(4,\); got \(3,\)", (x, x, 1.0), dict(labels=torch.ones(3).long())),
    (ValueError, "label_smoothing: expected a number in 0 … 1; got 1.5", (x, x, 1.0), dict(label_smoothing=1.5)),
]


@pytest.mark.parametrize(("error", "message", "args", "options"), BAD, ids=[message for _, message, _, _ in BAD])
def test_bad_input(error: type[Exception], message: str, args: Any, options: dict[str, Any]) -> None:
    args = [a.to(DEVICE) if isinstance(a, Tensor) and not a.is_meta else a for a in args]
    with pytest.raises(error, match=f"contrastive_loss: {message}"):
        mmk.contrastive_loss(*args, **options)
    if options.keys() <= {"is_log_scale"}:
        with pytest.raises(error, match=f"sigmoid_contrastive_loss: {message}"):
            mmk.sigmoid_contrastive_loss(*args, -10.0, **options)
