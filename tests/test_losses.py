"""What decision fusion and the losses have in common: labels of any integer dtype, and float64 from end to end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import native_only
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmkernels as mmk
from mmkernels.ops.decision_fusion import METHODS
from mmkernels.ops.distillation_loss import KINDS
from mmkernels.testing import same_bits

INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
ROWS, CLASSES, FEATURES = 5, 200, 4
Losses = dict[str, Callable[[Tensor, int], Any]]


def losses_of_labels(dtype: torch.dtype = torch.float32) -> Losses:
    """Losses and their gradients, as functions of labels and ignore_index."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    z, other, hidden, head = randn(ROWS, CLASSES), randn(ROWS, CLASSES), randn(ROWS, FEATURES), randn(CLASSES, FEATURES)
    heads = [(head, None)]
    module = mmk.nn.MultimodalCrossEntropy

    def pulled(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
        return [loss, *torch.autograd.grad(loss, leaves)]

    def ogm(y: Tensor, ignored: int) -> Tensor:
        return module(2, "ogm", alpha=1.0, ignore_index=ignored).coefficients([z, other], y)

    def with_ignored(ignored: int) -> dict[str, Any]:
        return dict(ignore_index=ignored)

    return {
        "cross-entropy": lambda y, i: pulled(mmk.multimodal_cross_entropy([z], y, **with_ignored(i))[0], z),
        "cross-entropy of heads": lambda y, i: pulled(
            mmk.multimodal_cross_entropy([hidden], y, linear=heads, **with_ignored(i))[0], hidden, head
        ),
        "modulation": ogm,
        "distillation": lambda y, i: pulled(mmk.distillation_loss(z, other, labels=y, **with_ignored(i)), z, other),
        "distillation of heads": lambda y, i: pulled(
            mmk.distillation_loss(hidden, hidden, labels=y, linear=heads * 2, kind="jsd", **with_ignored(i)), hidden
        ),
        "contrastive": lambda y, _: pulled(mmk.contrastive_loss(hidden, hidden, 3.0, labels=y), hidden),
    }


@pytest.mark.parametrize("loss", losses_of_labels())
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_have_any_integer_dtype_and_never_wrap(dtype: torch.dtype, loss: str, backend: str) -> None:
    """156 is −100 in a signed byte, and 257 is 1."""
    labels = torch.tensor([1, 2, 3, 1, 100 if dtype == torch.int8 else 156])
    call = losses_of_labels()[loss]
    for ignored in (-100, 1, 156, 257):
        got, want = call(labels.to(dtype), ignored), call(labels, ignored)
        assert same_bits(tree_leaves(got), tree_leaves(want)), ignored


@pytest.mark.parametrize("loss", [name for name in losses_of_labels() if name not in ("contrastive", "modulation")])
@pytest.mark.parametrize("ignored", [-100, -1])
def test_labels_beyond_int64_are_none(ignored: int, loss: str, backend: str) -> None:
    labels = torch.tensor([1, 2, 3, 1, 2**64 + ignored], dtype=torch.uint64)
    call = losses_of_labels()[loss]
    if loss.startswith("cross-entropy"):
        with pytest.raises(ValueError, match="labels: expected labels from 0 to 199, or ignore_index"):
            call(labels, ignored)
    else:
        assert same_bits(tree_leaves(call(labels, ignored)), tree_leaves(call(torch.tensor([1, 2, 3, 1, 4]), ignored)))


@pytest.mark.parametrize("ignored", [2**63, -(2**63) - 1])
@pytest.mark.parametrize("loss", [name for name in losses_of_labels() if name != "contrastive"])
def test_an_ignored_label_beyond_int64_raises(loss: str, ignored: int, backend: str) -> None:
    with pytest.raises(ValueError, match=f": ignore_index: expected an int in the range of int64; got {ignored}"):
        losses_of_labels()[loss](torch.arange(ROWS), ignored)


@native_only
@pytest.mark.parametrize("absent", [False, True], ids=["all present", "some absent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_logits_of_heads_are_made_at_once_and_give_the_same(dtype: torch.dtype, absent: bool) -> None:
    """What is not valid is not read there either."""
    hidden, other = (torch.randn(6, 4).to(dtype).requires_grad_() for _ in range(2))
    head, bias = torch.randn(8, 4).to(dtype).requires_grad_(), torch.randn(8).to(dtype).requires_grad_()
    labels, presence = torch.tensor([1, 2, -100, 0, 7, 3]), torch.ones(6, 2, dtype=torch.bool)
    with torch.no_grad():
        hidden[2], other[2] = torch.nan, torch.inf
        if absent:
            presence[0, 0], hidden[0] = False, torch.nan
    heads, leaves = [(head, bias), (head, None)], [hidden, other, head, bias]
    weights = torch.tensor([0.3, 0.7])
    cross_entropy: dict[str, Any] = dict(weights=weights, presence=presence, linear=heads)

    def losses() -> list[Tensor]:
        made = [mmk.multimodal_cross_entropy([hidden, other], labels, **cross_entropy)[0]]
        if not absent:
            made += [mmk.distillation_loss(hidden, other, kind=k, labels=labels, linear=heads) for k in KINDS]
            three_dims = [x.view(2, 3, 4) for x in (hidden, other)]
            made.append(mmk.distillation_loss(*three_dims, labels=labels.view(2, 3), linear=heads))
        return made

    at_once = losses()
    with mmk.use_backend("cpu"):
        by_chunks = losses()
    for got, want in zip(at_once, by_chunks, strict=True):
        assert type(got.grad_fn).__name__ != type(want.grad_fn).__name__
        torch.testing.assert_close(got, want)
        pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
        for a, b in pairs:
            assert a.isfinite().all()
            torch.testing.assert_close(
                a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2 if dtype == torch.bfloat16 else 1e-6
            )


class Narrowed(TorchDispatchMode):
    """Which operations make floating tensors that are narrower than float64."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64:
                self.found.append(str(function))
        return out


Call = tuple[Callable[..., Tensor], list[Tensor]]


def calls_of_float64() -> dict[str, Call]:
    """Every op by every method and option that adds arithmetic, and its leaves."""
    labels, presence = torch.tensor([1, 2, 1, -100, 0]), torch.rand(ROWS, 3) < 0.7

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    zs, weights, scale = [leaf(ROWS, 6) for _ in range(3)], leaf(3), leaf()
    x, y, head, bias = leaf(ROWS, FEATURES), leaf(ROWS, FEATURES), leaf(6, FEATURES), leaf(6)
    heads = [(head, bias)] * 3
    calls: dict[str, Call] = {}

    def add(name: str, leaves: list[Tensor], function: Any, *args: Any, **options: Any) -> None:
        def call() -> Tensor:
            out = function(*args, **options)
            return out[0] if isinstance(out, tuple) else out

        calls[name] = call, leaves

    for method in METHODS[:-1]:
        options: Any = dict(method=method, presence=presence)
        add(f"decision {method}", zs, mmk.decision_fusion, zs, **options)
        if method in ("mean", "log"):
            add(f"decision {method}, weights", [*zs, weights], mmk.decision_fusion, zs, weights, **options)
    for kind in KINDS:
        options = dict(kind=kind, temperature=3.0, beta=0.3, labels=labels)
        add(f"distillation {kind}", zs[:2], mmk.distillation_loss, *zs[:2], **options)
        linear = [x, y, head, bias]
        add(f"distillation {kind} of heads", linear, mmk.distillation_loss, x, y, linear=heads[:2], **options)
    losses: dict[str, Any] = {
        "smoothed": dict(label_smoothing=0.1, weights=weights),
        "gce": dict(robust="gce", log_vars=weights),
        "symmetric": dict(robust="symmetric", weights=weights, modulation=weights.detach()),
    }
    for name, options in losses.items():
        options["presence"] = presence
        add(f"cross-entropy {name}", [*zs, weights], mmk.multimodal_cross_entropy, zs, labels, **options)
        hidden = [x, y, x], labels
        leaves = [x, y, head, bias, weights]
        add(f"cross-entropy {name} of heads", leaves, mmk.multimodal_cross_entropy, *hidden, linear=heads, **options)
    for log in (False, True):
        options = dict(labels=labels, label_smoothing=0.1, is_log_scale=log)
        add(f"contrastive {log}", [x, y, scale], mmk.contrastive_loss, x, y, scale, **options)
        options = dict(is_log_scale=log)
        add(f"sigmoid {log}", [x, y, scale], mmk.sigmoid_contrastive_loss, x, y, scale, -1.0, **options)
    return calls


@pytest.mark.parametrize("call", calls_of_float64())
def test_float64_is_never_narrowed(call: str) -> None:
    """The second derivatives go through all of the formula, in sight of the mode."""
    function, leaves = calls_of_float64()[call]
    with Narrowed() as narrowed:
        pulled = torch.autograd.grad(function().sin().sum(), leaves, create_graph=True)
        torch.stack([g.square().sum() for g in pulled]).sum().backward()
    assert not narrowed.found
