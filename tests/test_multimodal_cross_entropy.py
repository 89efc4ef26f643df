"""multimodal_cross_entropy on every backend and instruction set: losses and gradients against the float64 reference,
torch's cross_entropy and the published formulas."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from environment import DEVICE, HERE
from fusion_cases import allocations, each_dtype, few_dtypes
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory, same_bits

CLASSES = (5, 33, 1, 200)
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": dict(label_smoothing=0.1),
    "smoothed alone": dict(label_smoothing=1.0),
    "gce": dict(robust="gce"),
    "gce, q = 1": dict(robust="gce", q=1.0),
    "gce, q near 0": dict(robust="gce", q=1e-4),
    "symmetric": dict(robust="symmetric"),
}
each_loss = pytest.mark.parametrize("loss", LOSSES)


def make(
    dtype: torch.dtype = torch.float32, batch: int = 9, classes: Sequence[int] = CLASSES, gain: float = 3.0
) -> tuple[list[Tensor], Tensor]:
    """Logits that require grad, and labels, some of them ignored."""
    logits = [(torch.randn(batch, c) * gain).to(dtype).requires_grad_() for c in classes]
    labels = torch.randint(0, max(min(classes), 1), (batch,))
    labels[1::4] = -100
    return logits, labels


def numbers(dtype: torch.dtype = torch.float32, count: int = len(CLASSES)) -> Tensor:
    return (torch.rand(count) + 0.5).to(dtype).requires_grad_()


def flags(batch: int = 9, count: int = len(CLASSES)) -> Tensor:
    drawn = torch.rand(batch, count) < 0.6
    drawn[:, 0] = False
    return drawn


def published(z: Tensor, y: Tensor, loss: str) -> Tensor:
    """The mean loss of rows that are all valid, by torch's cross_entropy or a paper's formula on probabilities."""
    p = z.softmax(1)
    p_y = p[torch.arange(len(y)), y]
    options = LOSSES[loss]
    if options.get("robust") == "gce":
        q = options.get("q", 0.7)
        return ((1 - p_y**q) / q).mean()
    if options.get("robust") == "symmetric":  # RCE = −Σ_c p_c log q_c with the one-hot q, log 0 := −4
        log_target = torch.where(F.one_hot(y, z.shape[1]).bool(), 0.0, -4.0)
        return F.cross_entropy(z, y) - (p * log_target).sum(1).mean()
    return F.cross_entropy(z, y, label_smoothing=options.get("label_smoothing", 0.0))


@each_loss
@pytest.mark.parametrize("combined", ["weights", "log_vars", "neither"])
@each_dtype
def test_losses_and_gradients(combined: str, loss: str, dtype: torch.dtype, backend: str) -> None:
    logits, labels = make(dtype)
    options = {} if combined == "neither" else {combined: numbers(dtype)}
    options |= dict(modulation=numbers(dtype), presence=flags())
    with poisoned_memory():
        out = check_op(mmk.multimodal_cross_entropy, logits, labels, backend=backend, **options, **LOSSES[loss])
    assert [x.shape for x in out] == [(), (4,)] and all(x.dtype == dtype for x in out)


SIZES: dict[str, dict[str, Any]] = {
    "one row": dict(batch=1),
    "whole vectors": dict(classes=(64, 128)),
    "one modality, many classes": dict(classes=(8003,), batch=3),
    "two classes, many rows": dict(classes=(2, 2), batch=700),
    "no rows": dict(batch=0),
    "gradients past the caches": dict(classes=(8000,), batch=70),
}


@pytest.mark.parametrize("size", SIZES)
@few_dtypes
def test_sizes(size: str, dtype: torch.dtype, backend: str) -> None:
    logits, labels = make(dtype, **SIZES[size])
    check_op(mmk.multimodal_cross_entropy, logits, labels, backend=backend)
    check_op(mmk.multimodal_cross_entropy, logits, labels, backend=backend, label_smoothing=0.2)


@each_loss
def test_values_and_gradients_are_the_published_ones(loss: str, backend: str) -> None:
    dtype = torch.float64 if backend == "reference" else torch.float32
    logits, labels = make(dtype, gain=1.0)
    valid = labels != -100
    weights = numbers(dtype)
    total, each = mmk.multimodal_cross_entropy(logits, labels, weights=weights, **LOSSES[loss])
    want = torch.stack([published(z[valid].double(), labels[valid], loss) for z in logits]).to(dtype)
    torch.testing.assert_close(each, want)
    torch.testing.assert_close(total, (weights * want).sum())
    leaves = [*logits, weights]
    for got, expected in zip(
        torch.autograd.grad(total + each.square().sum(), leaves),
        torch.autograd.grad((weights * want).sum() + want.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("q", [1e-20, 1e-40, 1e-300])
def test_the_generalised_loss_of_a_tiny_q_is_the_cross_entropy(q: float, backend: str) -> None:
    z, labels = torch.randn(9, 7, requires_grad=True), torch.randint(0, 7, (9,))
    total, _ = mmk.multimodal_cross_entropy([z], labels, robust="gce", q=q)
    want = F.cross_entropy(z, labels)
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(torch.autograd.grad(total, z), torch.autograd.grad(want, z))


def test_uncertainty_weighs_each_loss(backend: str) -> None:
    logits, labels = make()
    s = numbers()
    total, each = mmk.multimodal_cross_entropy(logits, labels, log_vars=s)
    torch.testing.assert_close(total, (torch.exp(-s) * each + s).sum())
    (got,) = torch.autograd.grad(total, s)
    torch.testing.assert_close(got, 1 - torch.exp(-s) * each)


def test_labels_of_each_modality(backend: str) -> None:
    logits, labels = make(classes=(5, 33))
    own = [labels, torch.randint(0, 33, labels.shape)]
    _, each = mmk.multimodal_cross_entropy(logits, own)
    for i, y in enumerate(own):
        torch.testing.assert_close(each[i], F.cross_entropy(logits[i], y))


@pytest.mark.parametrize("ignored", [-1, 0, 10**12])
def test_any_label_may_be_the_ignored_one(ignored: int, backend: str) -> None:
    logits, labels = make(classes=(5, 33))
    labels[labels == -100] = ignored
    _, each = mmk.multimodal_cross_entropy(logits, labels, ignore_index=ignored)
    for i, z in enumerate(logits):
        torch.testing.assert_close(each[i], F.cross_entropy(z, labels, ignore_index=ignored))


@each_loss
@pytest.mark.parametrize("filler", [math.nan, math.inf])
@few_dtypes
def test_rows_that_are_not_valid_are_not_read(loss: str, filler: float, dtype: torch.dtype, backend: str) -> None:
    logits, labels = make(dtype)
    presence = flags()
    valid = presence & (labels != -100)[:, None]
    labels = labels.masked_fill(~presence.any(1), 10**9)  # an absent row's label counts for nothing
    spoiled = [torch.where(valid[:, i : i + 1], z.detach(), filler).requires_grad_() for i, z in enumerate(logits)]
    options: dict[str, Any] = dict(presence=presence, **LOSSES[loss])
    check_op(mmk.multimodal_cross_entropy, spoiled, labels, backend=backend, **options)
    outs = [mmk.multimodal_cross_entropy(z, labels, **options) for z in (logits, spoiled)]
    assert same_bits(outs[0], outs[1])
    for i, grad in enumerate(torch.autograd.grad(outs[1][0], spoiled)):
        assert grad[~valid[:, i]].eq(0).all() and grad.isfinite().all()


@pytest.mark.parametrize("combined", ["weights", "log_vars"])
@each_loss
def test_without_valid_rows_loss_and_gradients_are_zero(loss: str, combined: str, backend: str) -> None:
    logits, labels = make()
    vector = numbers()
    options: dict[str, Any] = {combined: vector, **LOSSES[loss]}
    for labels_, presence in ((torch.full_like(labels, -100), None), (labels, torch.zeros(4, dtype=torch.bool))):
        total, each = mmk.multimodal_cross_entropy(logits, labels_, presence=presence, **options)
        assert total == 0 and each.eq(0).all()
        for grad in torch.autograd.grad(total + each.sum(), [*logits, vector]):
            assert grad.eq(0).all()


def test_an_absent_modality_adds_no_uncertainty(backend: str) -> None:
    logits, labels = make()
    s = numbers()
    presence = torch.tensor([True, False, True, True])
    total, each = mmk.multimodal_cross_entropy(logits, labels, log_vars=s, presence=presence)
    torch.testing.assert_close(total, (torch.exp(-s) * each + s)[presence].sum())
    assert torch.autograd.grad(total, s)[0][1] == 0


@each_loss
@few_dtypes
def test_large_logits_stay_finite_and_right(loss: str, dtype: torch.dtype, backend: str) -> None:
    logits, labels = make(dtype, gain=1e4)
    out = check_op(mmk.multimodal_cross_entropy, logits, labels, backend=backend, **LOSSES[loss])
    assert all(x.isfinite().all() for x in out)


@each_loss
@few_dtypes
def test_an_impossible_class_has_no_probability_and_no_gradient(loss: str, dtype: torch.dtype, backend: str) -> None:
    smoothed = "label_smoothing" in LOSSES[loss]
    logits, labels = make(dtype, classes=(40,))
    labels = torch.where(labels == -100, labels, labels % 3)
    with torch.no_grad():
        logits[0][:, 3:20] = -math.inf
    z = logits[0]
    total, _ = check_op(mmk.multimodal_cross_entropy, logits, labels, backend=backend, **LOSSES[loss])
    assert total == math.inf if smoothed else total.isfinite()
    (grad,) = torch.autograd.grad(mmk.multimodal_cross_entropy(logits, labels, **LOSSES[loss])[0], z)
    assert grad[:, 3:20].eq(0).all() and grad.isfinite().all()
    if not smoothed:
        without = torch.cat([z[:, :3], z[:, 20:]], 1)
        torch.testing.assert_close(total, mmk.multimodal_cross_entropy([without], labels, **LOSSES[loss])[0])


@pytest.mark.parametrize("loss", ["plain", "gce", "symmetric"])
def test_a_label_that_is_impossible_costs_all_there_is(loss: str, backend: str) -> None:
    for z in (torch.tensor([[-math.inf, 1.0, 2.0]]), torch.full((1, 3), -math.inf)):
        z.requires_grad_()
        total, _ = mmk.multimodal_cross_entropy([z], torch.tensor([0]), **LOSSES[loss])
        assert total == (1 / 0.7 if loss == "gce" else math.inf) or torch.isclose(total, torch.tensor(1 / 0.7))
        (grad,) = torch.autograd.grad(total, z)
        assert grad[0, 0] == 0 and grad.isfinite().all()


def test_modulation_scales_the_gradient_of_the_logits_alone(backend: str) -> None:
    logits, labels = make()
    weights = numbers()
    k = torch.tensor([0.25, 0.0, 1.0, 2.0], requires_grad=True)
    leaves = [*logits, weights]
    plain = mmk.multimodal_cross_entropy(logits, labels, weights=weights)
    ours = mmk.multimodal_cross_entropy(logits, labels, weights=weights, modulation=k)
    assert same_bits(ours, plain)
    *got, of_k = torch.autograd.grad(ours[0] + ours[1].sum(), [*leaves, k])
    want = torch.autograd.grad(plain[0] + plain[1].sum(), leaves)
    assert of_k.eq(0).all()
    for i in range(4):
        torch.testing.assert_close(got[i], want[i] * k[i].detach())
    assert torch.equal(got[4], want[4])


@few_dtypes
def test_weights_may_be_float32_beside_other_dtypes(dtype: torch.dtype, backend: str) -> None:
    logits, labels = make(dtype)
    for name in ("weights", "log_vars"):
        vector = numbers()
        check_op(mmk.multimodal_cross_entropy, logits, labels, backend=backend, **{name: vector})
        (grad,) = torch.autograd.grad(mmk.multimodal_cross_entropy(logits, labels, **{name: vector})[0], vector)
        assert grad.dtype == torch.float32


def test_the_loss_is_float32_under_autocast(either_backend: str) -> None:
    logits, labels = make(torch.bfloat16)
    mixed = [logits[0].detach().float().requires_grad_(), *logits[1:]]
    want = mmk.multimodal_cross_entropy([z.float() for z in logits], labels)
    for given in (logits, mixed):
        with torch.autocast(DEVICE, torch.bfloat16):
            total, each = mmk.multimodal_cross_entropy(given, labels)
        assert total.dtype == each.dtype == torch.float32
        torch.testing.assert_close(total, want[0])
        grads = torch.autograd.grad(total, given)
        assert [g.dtype for g in grads] == [z.dtype for z in given]


@few_dtypes
def test_nothing_as_large_as_the_logits_is_made_beside_the_gradient(dtype: torch.dtype, native_isa: str) -> None:
    logits = [torch.randn(256, 2000).to(dtype).requires_grad_() for _ in range(2)]
    labels = torch.randint(0, 2000, (256,))
    made: list[Tensor] = []

    def forward() -> None:
        made.append(mmk.multimodal_cross_entropy(logits, labels)[0])

    size = logits[0].nbytes
    assert sum(allocations(forward)) < size // 8
    backward = allocations(lambda: made.extend(torch.autograd.grad(made[0], logits)))
    assert sum(n >= size // 8 for n in backward) == 2 and sum(backward) < 2 * size + size // 8


def losses(*leaves: Tensor) -> Tensor:
    labels = torch.tensor([0, 1, -100, 2, 3, 0, 1, 2, 3])[: leaves[0].shape[0]].to(leaves[0].device)
    *logits, s = leaves
    presence = torch.tensor([[True, False], [True, True], [True, True]]).repeat(3, 1)[: labels.shape[0]]
    total, each = mmk.multimodal_cross_entropy(logits, labels, log_vars=s, label_smoothing=0.1, presence=presence)
    return torch.cat([total.unsqueeze(0), each])


def leaves_of(batch: int = 9) -> list[Tensor]:
    torch.manual_seed(3)
    return [*(torch.randn(batch, c).requires_grad_() for c in (7, 37)), torch.randn(2).requires_grad_()]


@few_dtypes
def test_results_have_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, native_isa: str) -> None:
    logits, labels = make(dtype, batch=211, classes=(900, 3000))

    def run() -> list[Tensor]:
        total, each = mmk.multimodal_cross_entropy(logits, labels, label_smoothing=0.1)
        return [total, each, *torch.autograd.grad(total, logits)]

    first = run()
    for threads in (2, 3, 5, 1):
        torch.set_num_threads(threads)
        assert same_bits(run(), first), threads


z, y, w = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), torch.ones(2)
BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "logits: expected a list of tensors; got Tensor", (z, y), {}),
    (ValueError, "logits: expected at least one tensor; got an empty list", ([], y), {}),
    (TypeError, "logits[1]: expected a torch.Tensor; got NoneType", ([z, None], y), {}),
    (TypeError, "logits[0]: expected dtype float32, bfloat16, float16 or float64; got torch.int64", ([y], y), {}),
    (ValueError, "logits[1]: expected shape (B, C); got (4, 3, 1)", ([z, z[..., None]], y), {}),
    (ValueError, "logits[1]: expected 4 rows, as many as logits[0]; got shape (3, 3)", ([z, z[:3]], y), {}),
    (TypeError, "logits[1]: expected the dtype of logits[0], torch.float32; got", ([z, z.half()], y), {}),
    (RuntimeError, f"logits[1]: expected the device of logits[0], {HERE}; got meta", ([z, z.to("meta")], y), {}),
    (TypeError, "labels: expected a torch.Tensor; got int", ([z], 1), {}),
    (TypeError, "labels: expected an integer dtype; got torch.float32", ([z], z[:, 0]), {}),
    (TypeError, "labels: expected an integer dtype; got torch.bool", ([z], y.bool()), {}),
    (ValueError, "labels: expected shape (4,); got (4, 1)", ([z], y[:, None]), {}),
    (ValueError, "labels: expected a tensor, or a list of 2, one for each modality; got 1", ([z, z], [y]), {}),
    (ValueError, "labels[1]: expected shape (4,); got (3,)", ([z, z], [y, y[:3]]), {}),
    (ValueError, "labels: expected labels from 0 to 2, or ignore_index -100; got 3 in row 0", ([z], y + 3), {}),
    (ValueError, "labels: expected labels from 0 to 2, or ignore_index 5; got -100 in row 0",
     ([z], y - 100), {"ignore_index": 5}),
    (TypeError, "weights: expected a torch.Tensor; got list", ([z, z], y), {"weights": [1.0, 1.0]}),
    (ValueError, "weights: expected shape (2,), a number for each modality; got (3,)",
     ([z, z], y), {"weights": torch.ones(3)}),
    (TypeError, "log_vars: expected the dtype of logits[0], torch.float32, or torch.float32; got torch.float64",
     ([z, z], y), {"log_vars": w.double()}),
    (ValueError, "log_vars: expected None where weights are given; got both",
     ([z, z], y), {"log_vars": w, "weights": w}),
    (ValueError, "modulation: expected shape (2,), a number for each modality; got ()",
     ([z, z], y), {"modulation": w[0]}),
    (TypeError, "presence: expected dtype torch.bool; got torch.float32", ([z, z], y), {"presence": w}),
    (ValueError, "presence: expected shape (4, 2) or (2,); got (4,)", ([z, z], y), {"presence": y == 0}),
    (ValueError, "label_smoothing: expected a number from 0 to 1; got 1.5", ([z], y), {"label_smoothing": 1.5}),
    (ValueError, "label_smoothing: expected a number from 0 to 1; got nan", ([z], y), {"label_smoothing": math.nan}),
    (ValueError, "label_smoothing: expected 0.0 with robust='gce'; got 0.1",
     ([z], y), {"label_smoothing": 0.1, "robust": "gce"}),
    (TypeError, "ignore_index: expected an int; got float", ([z], y), {"ignore_index": 1.5}),
    (ValueError, "robust: expected None, 'gce' or 'symmetric'; got 'mae'", ([z], y), {"robust": "mae"}),
    (TypeError, "robust: expected None, 'gce' or 'symmetric'; got bool", ([z], y), {"robust": True}),
    (ValueError, "q: expected a number above 0, at most 1; got 0.0", ([z], y), {"robust": "gce", "q": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "args", "options"), BAD, ids=[m[:70] for _, m, _, _ in BAD])
def test_bad_input(error: type[Exception], message: str, args: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=re.escape(f"multimodal_cross_entropy: {message}")):
        mmk.multimodal_cross_entropy(*args, **options)
    with pytest.raises(error, match=re.escape(f"multimodal_cross_entropy: {message}")), mmk.use_backend("reference"):
        mmk.multimodal_cross_entropy(*args, **options)
