"""What a forward saves means the same on every backend: the backward may run on another one, as that of compiled code
does whose forward alone was in a `use_backend` block."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from calls import CALLS, FIRST, SMALL, Call, op_calls
from conftest import native_only
from environment import DEVICE
from torch import Tensor

import mmkernels as mmk
from mmkernels import _triton
from mmkernels._differentiable import DifferentiableOp


def calls_with(name: str, **options: dict[str, Any]) -> dict[str, Call]:
    """A call with other values of some arguments."""
    varied = [CALLS[name].varied(option.replace("_", " "), **arguments) for option, arguments in options.items()]
    return {str(call): call for call in varied}


IMPOSSIBLE = torch.tensor([[0.0, -torch.inf, 0, 0], [-torch.inf] * 4, [0] * 4])
VALUES = (
    calls_with(
        "contrastive_loss, plain",
        a_scale_below_0={"logit_scale": -7.0},
        large_logits={"logit_scale": 3e3},
        smoothed={"logit_scale": 20.0, "labels": torch.tensor([4, 1, 4, 0, 0, 2]), "label_smoothing": 0.2},
    )
    | calls_with(
        "distillation_loss, plain",
        some_ignored={"kind": "forward_kl", "temperature": 2.0, "labels": torch.tensor([0, -100, 1, 1, -100])},
        jsd_of_one={"kind": "jsd", "beta": 1.0, "temperature": 2.0},
    )
    | calls_with(
        "multimodal_cross_entropy, weights",
        gce={"robust": "gce", "q": 0.5, "weights": torch.tensor([0.3, 2.0])},
        modulated={"modulation": torch.tensor([0.5, 2.0])},
    )
    | calls_with("multimodal_cross_entropy, hidden states", modulated_heads={"modulation": torch.tensor([0.5, 2.0])})
    | calls_with("joint_attention, lengths", scaled={"scale": 9.0})
    | calls_with("varlen_cross_attention, causal, LSE", scaled={"scale": 9.0})
    | calls_with(
        "bidirectional_cross_attention, masks",
        large_scores_and_a_side_that_is_padding={"x_mask": torch.arange(12).view(2, 6) < 5, "scale": 300.0},
        clamped_far={"scale": 5.0, "clamp": 1.5},
    )
    | calls_with("split_attention_pool, a list, gelu", silu={"activation": "silu"})
    | calls_with(
        "multimodal_cross_entropy, symmetric",
        impossible_classes={
            "logits": [torch.randn(3, 4) + IMPOSSIBLE, torch.randn(3, 5)],
            "labels": torch.tensor([3, 0, -100]),
            "presence": torch.tensor([[True, False], [True, True], [False, False]]),
            "robust": None,
        },
    )
)
BACKENDS = ["reference"]
if DEVICE == "cpu":
    BACKENDS.append("cpu")
if _triton.status() is None:
    BACKENDS.append("triton")
KEPT = pytest.mark.skipif(DEVICE != "cpu", reason="its cases are on the CPU")
pytestmark = [native_only, KEPT]


def widened(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(widened(x) for x in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


Forward = tuple[list[Tensor], list[Tensor]]  # outputs, and what is saved


@torch.no_grad()
def run(op: DifferentiableOp, args: tuple[Any, ...], backend: str) -> Forward:
    with mmk.use_backend(backend):
        return op._split(op.forward(*args, True))


@torch.no_grad()
def pulled(op: DifferentiableOp, args: tuple[Any, ...], forward: Forward, backward: str) -> list[Tensor]:
    """The gradients of all floating arguments."""
    outputs, saved = forward
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    needed = [x is not None and x.is_floating_point() for x in op._leaves(args)]
    with mmk.use_backend(backward):
        kept = [*outputs, *saved] if op._keeps_outputs(args) else saved
        return [g for g, n in zip(op.backward(grads, *args, kept, needed), needed, strict=True) if n]


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in (SMALL | VALUES).items()])
def test_a_backward_may_run_on_another_backend_than_its_forward(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = op_calls(call, monkeypatch)
    assert calls
    for op, args in calls:
        exact = widened(args)
        oracle = pulled(op, exact, run(op, exact, "reference"), "reference")
        for forward in BACKENDS:
            try:
                done = run(op, args, forward)
            except mmk.UnsupportedError as error:
                assert forward == "triton", error
                continue
            for backward in BACKENDS:
                try:
                    results = pulled(op, args, done, backward)
                except mmk.UnsupportedError as error:
                    assert backward == "triton", error
                    continue
                for got, want in zip(results, oracle, strict=True):
                    what = f"forward on {forward}, backward on {backward}"
                    size = max(1.0, float(want.abs().max())) if want.numel() else 1.0
                    torch.testing.assert_close(
                        got.double(), want, rtol=2e-3, atol=2e-4 * size, msg=lambda m, w=what: f"{w}: {m}"
                    )


@pytest.mark.parametrize("call", [call.small() for call in FIRST.values()], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_block_around_the_forward_alone(call: Call, compiled: bool) -> None:
    torch._dynamo.reset()
    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    leaves = [x.requires_grad_() for x in call.leaves(torch.float32)]
    want = torch.autograd.grad(call(*leaves).square().sum(), leaves)
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

    with pytest.raises(TypeError, match="reference_saved: expected a function, as the op saves Tensor kept; got None"):
        DifferentiableOp(
            "saves_for_tests",
            NamedTuple("Arguments", [("x", Tensor)]),
            outputs="Tensor out",
            saved="Tensor kept",
            reference=torch.sin,
            fake=lambda a: (torch.empty_like(a.x), torch.empty_like(a.x)),
        )
