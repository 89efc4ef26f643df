"""What a forward saves means the same on every backend: the backward may run on another one, as that of compiled code
does whose forward alone was in a `use_backend` block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from conftest import native_only
from environment import DEVICE
from test_forward_mode import CASES as OF_EVERY_OP
from test_forward_mode import LABELS, LENGTHS, PRESENCE, STARTS, Case
from torch import Tensor

import mmkernels as mmk
from mmkernels import _triton
from mmkernels._differentiable import DifferentiableOp

NO_KEYS = torch.tensor([[True, True, False], [False, False, False]])
FLAGS = torch.tensor([[True, True, False, True, True], [True, False, True, True, True]])
IMPOSSIBLE = torch.tensor([[0.0, -torch.inf, 0, 0], [-torch.inf] * 4, [0] * 4])
Q, K = (2, 2, 3, 4), (2, 2, 5, 4)


def contrastive(scale: float, **options: Any) -> Case:
    return Case(lambda x, y: mmk.contrastive_loss(x, y, scale, **options), ((3, 4), (3, 4)))


def distillation(kind: Any, **options: Any) -> Case:
    def function(student: Tensor, teacher: Tensor) -> Tensor:
        return mmk.distillation_loss(student, teacher, kind=kind, temperature=2.0, **options)

    return Case(function, ((3, 4), (3, 4)))


def cross_entropy(**options: Any) -> Case:
    return Case(
        lambda a, b: mmk.multimodal_cross_entropy([a + IMPOSSIBLE.to(a.dtype), b], LABELS, **options),
        ((3, 4), (3, 5)),
    )


CASES = OF_EVERY_OP | {
    "contrastive_loss, a scale below 0": contrastive(-7.0),
    "contrastive_loss, large logits": contrastive(3e3),
    "contrastive_loss, labels, smoothed": contrastive(20.0, labels=torch.tensor([4, 1, 4]), label_smoothing=0.2),
    "distillation_loss, some ignored": distillation("forward_kl", labels=torch.tensor([0, -100, 1])),
    "distillation_loss, reverse": distillation("reverse_kl"),
    "distillation_loss, jsd of one": distillation("jsd", beta=1.0),
    "multimodal_cross_entropy, impossible classes": cross_entropy(presence=PRESENCE),
    "multimodal_cross_entropy, gce": cross_entropy(robust="gce", q=0.5, weights=torch.tensor([0.3, 2.0])),
    "multimodal_cross_entropy of heads": Case(
        lambda h, w, b: mmk.multimodal_cross_entropy(
            [h, h], LABELS, linear=[(w, b), (w, None)], presence=PRESENCE, modulation=torch.tensor([0.5, 2.0])
        )[0],
        ((3, 4), (5, 4), (5,)),
    ),
    "joint_attention, scaled": Case(
        lambda q, k, v: mmk.joint_attention([q, q], [k], [v], scale=9.0, key_lengths=[LENGTHS])[1], (Q, K, K)
    ),
    "varlen_cross_attention, causal": Case(
        lambda q, k, v: mmk.varlen_cross_attention(q, k, v, STARTS, STARTS, 4, 4, is_causal=True, scale=9.0),
        ((7, 4, 6), (7, 2, 6), (7, 2, 5)),
    ),
    "bidirectional_cross_attention, large scores, a side that is padding": Case(
        lambda x, y, v, w: mmk.bidirectional_cross_attention(x, y, v, w, x_mask=NO_KEYS, y_mask=FLAGS, scale=300.0),
        (Q, K, Q, K),
    ),
    "bidirectional_cross_attention, clamped": Case(
        lambda x, y, v, w: mmk.bidirectional_cross_attention(x, y, v, w, scale=5.0, clamp=1.5), (Q, K, Q, K)
    ),
    "additive_attention_pool, a query": Case(
        lambda x, w, v, q, u: mmk.additive_attention_pool(x, w, v, query=q, query_weight=u, presence=PRESENCE),
        ((3, 2, 5), (6, 5), (6,), (3, 4), (6, 4)),
    ),
    "split_attention_pool, silu": Case(
        lambda x, w, b, u, c: mmk.split_attention_pool(x, w, b, u, c, activation="silu", presence=PRESENCE),
        ((3, 2, 5), (4, 5), (4,), (10, 4), (10,)),
    ),
}
BACKENDS = ["reference"]
if DEVICE == "cpu":
    BACKENDS.append("cpu")
if _triton.status() is None:
    BACKENDS.append("triton")
KEPT = pytest.mark.skipif(DEVICE != "cpu", reason="its cases are on the CPU")
pytestmark = [native_only, KEPT]


def calls_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[tuple[DifferentiableOp, tuple[Any, ...]]]:
    """The ops that a call comes to, and their arguments."""
    calls = []
    run = DifferentiableOp.__call__

    def watched(op: DifferentiableOp, *args: Any) -> tuple[Tensor, ...]:
        calls.append((op, args))
        return run(op, *args)

    monkeypatch.setattr(DifferentiableOp, "__call__", watched)
    with mmk.use_backend("reference"):
        case(*(x.requires_grad_() for x in case.leaves(torch.float32)))
    return calls


def flat(values: Any) -> Iterator[Tensor]:
    for value in values if isinstance(values, (list, tuple)) else [values]:
        yield from flat(value) if isinstance(value, (list, tuple)) else (value,)


def widened(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(widened(x) for x in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.no_grad()
def pulled(op: DifferentiableOp, args: tuple[Any, ...], forward: str, backward: str) -> list[Tensor]:
    """The gradients of all floating arguments."""
    with mmk.use_backend(forward):
        outputs, saved = op._split(op.forward(*args, True))
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    needed = [x is not None and x.is_floating_point() for x in op._leaves(args)]
    with mmk.use_backend(backward):
        kept = [*outputs, *saved] if op._keeps_outputs(args) else saved
        return [g for g, n in zip(op.backward(grads, *args, kept, needed), needed, strict=True) if n]


@pytest.mark.parametrize("name", CASES)
def test_a_backward_may_run_on_another_backend_than_its_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(CASES[name], monkeypatch)
    assert calls
    for op, args in calls:
        oracle = pulled(op, widened(args), "reference", "reference")
        for forward in BACKENDS:
            for backward in BACKENDS:
                try:
                    results = pulled(op, args, forward, backward)
                except mmk.UnsupportedError as error:
                    assert "triton" in (forward, backward), error
                    continue
                for got, want in zip(results, oracle, strict=True):
                    what = f"forward on {forward}, backward on {backward}"
                    size = max(1.0, float(want.abs().max())) if want.numel() else 1.0
                    torch.testing.assert_close(
                        got.double(), want, rtol=2e-3, atol=2e-4 * size, msg=lambda m, w=what: f"{w}: {m}"
                    )


@pytest.mark.parametrize("name", [n for n in CASES if "," not in n and "merge_embeddings" not in n])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_block_around_the_forward_alone(name: str, compiled: bool) -> None:
    case = CASES[name]
    torch._dynamo.reset()
    function = torch.compile(case, fullgraph=True, backend="aot_eager") if compiled else case
    leaves = [x.requires_grad_() for x in case.leaves(torch.float32)]
    want = torch.autograd.grad(case(*leaves).square().sum(), leaves)
    for backend in BACKENDS:
        try:
            with mmk.use_backend(backend):
                out = function(*leaves)
        except mmk.UnsupportedError:
            assert backend == "triton"
            continue
        for got, expected in zip(torch.autograd.grad(out.square().sum(), leaves), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-4)


def test_an_op_that_saves_says_what_the_reference_saves() -> None:
    from mmkernels._kernels import NativeKernels

    with pytest.raises(TypeError, match="reference_saved: expected a function, as the op saves Tensor kept; got None"):
        DifferentiableOp(
            "saves_for_tests",
            NamedTuple("Arguments", [("x", Tensor)]),
            outputs="Tensor out",
            saved="Tensor kept",
            reference=torch.sin,
            fake=lambda a: (torch.empty_like(a.x), torch.empty_like(a.x)),
            cpu=NativeKernels("saves_for_tests"),
        )
