"""Forward-mode AD of every op: tangents are right, whichever way they come, and none is dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import native_only
from torch import Tensor
from torch.autograd import forward_ad

import mmkernels as mmk

LENGTHS = torch.tensor([3, 0])
LABELS = torch.tensor([3, 0, -100])
STARTS = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
PRESENCE = torch.tensor([[True, False], [True, True], [False, False]])
POSITIONS = torch.tensor([[True, False, True, False], [False, False, False, True]])
REAL = torch.tensor([[True, True, True, False, False], [True, True, False, True, True]])
VISIBLE = torch.tensor([[True, False, True, True, False]] * 3)


@dataclass(frozen=True)
class Case:
    """An op as a function of floating tensors alone, and their shapes."""

    function: Callable[..., Tensor | tuple[Tensor, ...] | list[Tensor]]
    shapes: tuple[tuple[int, ...], ...]

    def __call__(self, *leaves: Tensor) -> Tensor:
        """All outputs in one vector."""
        outputs = self.function(*leaves)
        return torch.cat([o.flatten() for o in ((outputs,) if isinstance(outputs, Tensor) else outputs)])

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [(torch.randn(s, generator=generator, dtype=torch.float64) * 0.5).to(dtype) for s in self.shapes]


def _joint(a: Tensor, b: Tensor, bias: Tensor) -> list[Tensor]:
    streams = [a, b]
    outs, lses = mmk.joint_attention(
        streams, streams, streams, stream_bias=bias, key_lengths=[None, LENGTHS], return_lse=True
    )
    return [*outs, *lses]


Q, K = (2, 2, 3, 4), (2, 2, 5, 4)
MAPS = [(2, 3), (2, 2)]
CASES = {
    "cross_attention": Case(mmk.cross_attention, (Q, K, K)),
    "cross_attention, all options": Case(
        lambda q, k, v, m: mmk.cross_attention(
            q, k, v, attn_mask=m, key_lengths=LENGTHS, window=(2, 1), softcap=3.0, return_lse=False
        ),
        (Q, K, K, (2, 1, 3, 5)),
    ),
    "cross_attention, LSE": Case(
        lambda q, k, v: mmk.cross_attention(q, k, v, is_causal=True, return_lse=True), (Q, K, K)
    ),
    "scaled_dot_product_attention": Case(mmk.scaled_dot_product_attention, (Q, K, K)),
    "scaled_dot_product_attention, masked": Case(
        lambda q, k, v: mmk.scaled_dot_product_attention(q, k, v, VISIBLE), ((3, 4), (5, 4), (5, 4))
    ),
    "varlen_cross_attention": Case(
        lambda q, k, v: mmk.varlen_cross_attention(q, k, v, STARTS, STARTS, 4, 4, return_lse=True),
        ((7, 4, 4), (7, 2, 4), (7, 2, 4)),
    ),
    "joint_attention": Case(_joint, (Q, Q, (2, 2))),
    "bidirectional_cross_attention": Case(
        lambda q, k, x, y: mmk.bidirectional_cross_attention(q, k, x, y, y_mask=REAL, clamp=2.0), (Q, K, Q, K)
    ),
    "deformable_attention": Case(
        lambda v, x, a: mmk.deformable_attention(v, MAPS, x.sigmoid(), a),
        ((2, 10, 2, 3), (2, 3, 2, 2, 2, 2), (2, 3, 2, 2, 2)),
    ),
    "decision_fusion": Case(
        lambda a, b, w: mmk.decision_fusion([a, b], w, method="log", presence=PRESENCE), ((3, 4), (3, 4), (2,))
    ),
    "decision_fusion, the mean": Case(lambda a, b, w: mmk.decision_fusion([a, b], w), ((3, 4), (3, 4), (3, 2))),
    "contrastive_loss": Case(
        lambda x, y, s: mmk.contrastive_loss(x, y, s, labels=LABELS, label_smoothing=0.1), ((3, 4), (3, 4), ())
    ),
    "sigmoid_contrastive_loss": Case(
        lambda x, y, s, b: mmk.sigmoid_contrastive_loss(x, y, s, b), ((3, 4), (3, 4), (), ())
    ),
    "distillation_loss": Case(
        lambda s, t: mmk.distillation_loss(s, t, temperature=2.0, labels=LABELS, ignore_index=1), ((3, 4), (3, 4))
    ),
    "distillation_loss, jsd": Case(lambda s, t: mmk.distillation_loss(s, t, kind="jsd", beta=0.3), ((2, 3, 4),) * 2),
    "distillation_loss, from hidden states": Case(
        lambda s, w, b, t, u: mmk.distillation_loss(
            s, t, kind="jsd", beta=0.3, labels=LABELS, linear=[(w, b), (u, None)]
        ),
        ((3, 4), (5, 4), (5,), (3, 2), (5, 2)),
    ),
    "merge_attention": Case(
        lambda a, b, s, t: mmk.merge_attention([a, b], [s, t]), ((2, 3, 4), (2, 3, 4), (2, 3), (2, 3))
    ),
    "additive_attention_pool": Case(
        lambda xs, w, v, q, u: mmk.additive_attention_pool(xs, w, v, query=q, query_weight=u, presence=PRESENCE),
        ((3, 2, 4), (5, 4), (5,), (3, 6), (5, 6)),
    ),
    "multiplicative_attention_pool": Case(
        lambda a, b, q, w: mmk.multiplicative_attention_pool([a, b], q, weight=w), ((3, 4), (3, 4), (3, 5), (5, 4))
    ),
    "split_attention_pool": Case(
        lambda a, b, *w: mmk.split_attention_pool([a, b], *w, activation="gelu"),
        ((3, 4), (3, 4), (5, 4), (5,), (8, 5), (8,)),
    ),
    "concat_linear": Case(lambda a, b, w: mmk.concat_linear([a, b], w), ((3, 4), (3, 2), (5, 6))),
    "concat_linear, all options": Case(
        lambda a, b, w, c, r, g: mmk.concat_linear(
            [a, b], w, c, activation="gelu", presence=PRESENCE, residual=r, gate=g
        ),
        ((3, 4), (3, 2), (5, 6), (5,), (3, 5), (5,)),
    ),
    "concat_linear, without activation": Case(
        lambda a, b, w, c, r: mmk.concat_linear([a, b], w, c, presence=PRESENCE, residual=r),
        ((3, 4), (3, 2), (5, 6), (5,), (3, 5)),
    ),
    "concat_linear, from its output": Case(
        lambda a, b, w, c: mmk.concat_linear([a, b], w, c, activation="tanh"), ((3, 4), (3, 2), (5, 6), (5,))
    ),
    "concat_norm_linear": Case(
        lambda a, b, n, m, w, c: mmk.concat_norm_linear([a, b], n, m, w, c, activation="silu"),
        ((3, 4), (3, 2), (6,), (6,), (5, 6), (5,)),
    ),
    "gated_fusion": Case(
        lambda a, b, u, v, w: mmk.gated_fusion([a, b], [u, v], None, w, presence=PRESENCE),
        ((3, 4), (3, 2), (5, 4), (5, 2), (5, 6)),
    ),
    "gated_concat": Case(mmk.gated_concat, ((3, 4), (3, 2), (4, 6), (4,))),
    "modulated_norm": Case(mmk.modulated_norm, ((2, 3, 4), (2, 4), (2, 3, 4))),
    "modulated_norm, all options": Case(
        lambda x, a, b, w, c: mmk.modulated_norm(x, a, b, norm="rms", norm_weight=w, norm_bias=c),
        ((2, 3, 4), (2, 4), (2, 4), (4,), (4,)),
    ),
    "modulated_norm, no norm": Case(
        lambda x, a, b: mmk.modulated_norm(x, a, b, norm=None), ((2, 3, 4), (2, 4), (2, 3, 4))
    ),
    "norm_rotary": Case(
        lambda q, k, c, s, w: torch.cat(mmk.norm_rotary(q, k, c, s, query_weight=w), 1),
        ((2, 3, 4, 6), (2, 1, 4, 6), (4, 3), (4, 3), (6,)),
    ),
    "norm_rotary, neighbours without a norm": Case(
        lambda q, k, c, s: torch.cat(mmk.norm_rotary(q, k, c, s, interleaved=True), 1),
        ((2, 3, 4, 6), (2, 1, 4, 6), (2, 4, 2), (2, 4, 2)),
    ),
    "low_rank_fusion": Case(
        lambda a, b, f, g, w: mmk.low_rank_fusion([a, b], [f, g], w), ((3, 4), (3, 2), (2, 5, 6), (2, 3, 6), (2,))
    ),
    "low_rank_fusion, all options": Case(
        lambda a, b, f, g, w, c: mmk.low_rank_fusion([a, b], [f, g], w, c, presence=PRESENCE),
        ((3, 4), (3, 2), (2, 5, 6), (2, 3, 6), (2,), (6,)),
    ),
    "tensor_fusion_linear": Case(
        lambda a, b, w, c: mmk.tensor_fusion_linear([a, b], w, c), ((3, 4), (3, 2), (5, 15), (5,))
    ),
    "bilinear_fusion": Case(
        lambda x, y, u, v, w: mmk.bilinear_fusion(x, y, u, v, out_weight=w, rank=2),
        ((3, 4), (3, 2), (10, 4), (10, 2), (6, 5)),
    ),
    "concat_tokens": Case(
        lambda a, b, e, p: mmk.concat_tokens([a, b], type_embedding=e, position_embeddings=[p, None], norm="layer"),
        ((2, 3, 4), (2, 2, 4), (2, 4), (3, 4)),
    ),
    "concat_tokens, no norm": Case(
        lambda a, b, e, p: mmk.concat_tokens([a, b], type_embedding=e, position_embeddings=[p, None]),
        ((2, 3, 4), (2, 2, 4), (2, 4), (3, 4)),
    ),
    "concat_tokens, all options": Case(
        lambda a, b, e, w, c: mmk.concat_tokens([a, b], type_embedding=e, norm="layer", norm_weight=w, norm_bias=c),
        ((2, 3, 4), (2, 2, 4), (2, 4), (4,), (4,)),
    ),
    "merge_embeddings": Case(lambda t, m: mmk.merge_embeddings(t, m, POSITIONS), ((2, 4, 3), (3, 3))),
    "multimodal_cross_entropy": Case(
        lambda a, b, w: mmk.multimodal_cross_entropy([a, b], LABELS, weights=w, presence=PRESENCE),
        ((3, 4), (3, 5), (2,)),
    ),
    "multimodal_cross_entropy, uncertainty": Case(
        lambda a, b, s: mmk.multimodal_cross_entropy([a, b], LABELS, log_vars=s, robust="symmetric"),
        ((3, 4), (3, 5), (2,)),
    ),
    "multimodal_cross_entropy, from hidden states": Case(
        lambda x, w, b: mmk.multimodal_cross_entropy([x], LABELS, robust="gce", linear=[(w, b)]),
        ((3, 4), (5, 4), (5,)),
    ),
}
NO_OPS = {"explain", "nn", "use_backend", "Explanation", "UnsupportedError"}

each_case = pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in CASES.items()])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def test_every_op_has_a_case() -> None:
    assert {name.partition(",")[0] for name in CASES} == set(mmk.__all__) - NO_OPS


def tangents_of(leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in leaves]


def by_differences(case: Case, leaves: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """The derivative along the tangents, in float64."""
    step = 1e-6
    there, back = ([x.double() + s * t.double() for x, t in zip(leaves, tangents, strict=True)] for s in (step, -step))
    ahead, behind = case(*there), case(*back)
    return torch.where(ahead == behind, 0.0, (ahead - behind) / (2 * step))  # −inf of an idle row's LSE is constant


def assert_near(got: Tensor, expected: Tensor) -> None:
    tolerance = 1e-4 if got.dtype == torch.float32 else 1e-6
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def dual_tangent(case: Case, leaves: list[Tensor], tangents: list[Tensor]) -> Tensor:
    with forward_ad.dual_level():
        out = case(*(forward_ad.make_dual(x, t) for x, t in zip(leaves, tangents, strict=True)))
        tangent = forward_ad.unpack_dual(out).tangent
        assert tangent is not None, "the tangent is dropped"
        return tangent.detach()


@each_dtype
@each_case
def test_jvp_is_the_derivative(case: Case, dtype: torch.dtype) -> None:
    leaves = case.leaves(dtype)
    tangents = tangents_of(leaves)
    expected = by_differences(case, leaves, tangents)
    out, got = torch.func.jvp(case, tuple(leaves), tuple(tangents))
    torch.testing.assert_close(out, case(*leaves))
    assert_near(got, expected)


@each_case
def test_dual_numbers_carry_tangents_whatever_requires_grad(case: Case) -> None:
    leaves = case.leaves(torch.float32)
    tangents = tangents_of(leaves)
    expected = by_differences(case, leaves, tangents)
    assert_near(dual_tangent(case, leaves, tangents), expected)
    assert_near(dual_tangent(case, [x.clone().requires_grad_() for x in leaves], tangents), expected)
    with torch.no_grad():
        assert_near(dual_tangent(case, [x.clone().requires_grad_() for x in leaves], tangents), expected)
    with torch.device("cpu"):  # a mode, under which calls go through torch's dispatcher
        assert_near(dual_tangent(case, leaves, tangents), expected)


@each_case
def test_each_argument_alone_carries_its_tangent(case: Case) -> None:
    leaves = case.leaves(torch.float64)
    for i, tangent in enumerate(tangents_of(leaves)):

        def function(x: Tensor, i: int = i) -> Tensor:
            return case(*leaves[:i], x, *leaves[i + 1 :])

        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(function(forward_ad.make_dual(leaves[i], tangent))).tangent
        assert got is not None, f"the tangent of leaf {i} is dropped"
        zeros = [torch.zeros_like(x) if j != i else tangent for j, x in enumerate(leaves)]
        assert_near(got, by_differences(case, leaves, zeros))


@each_dtype
@each_case
def test_forward_and_reverse_mode_agree(case: Case, dtype: torch.dtype) -> None:
    """u · (J v) = (Jᵀ u) · v, the right side by the kernels."""
    leaves = [x.requires_grad_() for x in case.leaves(dtype)]
    tangents = tangents_of(leaves)
    out = case(*leaves)
    cotangent = tangents_of([out])[0].masked_fill(~out.detach().isfinite(), 0)
    pulled = torch.autograd.grad(out, leaves, cotangent)
    expected = sum((g * t).sum() for g, t in zip(pulled, tangents, strict=True))
    assert isinstance(expected, Tensor)
    assert_near((cotangent * dual_tangent(case, leaves, tangents)).sum(), expected)


@each_case
def test_jacobians_of_both_modes_agree(case: Case) -> None:
    leaves = case.leaves(torch.float64)

    def function(x: Tensor) -> Tensor:
        return torch.where(case(x, *leaves[1:]).isfinite(), case(x, *leaves[1:]), 0)

    expected = torch.autograd.functional.jacobian(function, leaves[0])
    assert expected.abs().max() > 0
    assert_near(torch.func.jacfwd(function)(leaves[0]), expected)
    for vectorize in (False, True):
        strategy = "forward-mode" if vectorize else "reverse-mode"
        got = torch.autograd.functional.jacobian(function, leaves[0], strategy=strategy, vectorize=vectorize)
        assert_near(got, expected)


@each_case
def test_second_derivatives_agree(case: Case) -> None:
    leaves = case.leaves(torch.float64)

    def loss(x: Tensor) -> Tensor:
        out = case(x, *leaves[1:])
        return torch.where(out.isfinite(), out, 0).sin().sum()

    expected = torch.autograd.functional.hessian(loss, leaves[0])
    assert_near(torch.func.hessian(loss)(leaves[0]), expected)  # forward over reverse
    assert_near(torch.func.jacrev(torch.func.jacfwd(loss))(leaves[0]), expected)  # reverse over forward


@each_dtype
@each_case
def test_tangents_of_a_backward_pass(case: Case, dtype: torch.dtype) -> None:
    """The gradients are linear in the output's gradient: its tangent passes through the backward as the gradient would,
    where the forward ran before anything had a tangent."""
    leaves = [x.requires_grad_() for x in case.leaves(dtype)]
    out = case(*leaves)
    grad, tangent = (x.masked_fill(~out.detach().isfinite(), 0) for x in tangents_of([out, out]))
    expected = torch.autograd.grad(out, leaves, tangent, retain_graph=True)
    with forward_ad.dual_level():
        pulled = torch.autograd.grad(out, leaves, forward_ad.make_dual(grad, tangent), retain_graph=True)
        for i, (got, want) in enumerate(zip(pulled, expected, strict=True)):
            unpacked = forward_ad.unpack_dual(got).tangent
            assert unpacked is not None, f"the tangent of the gradient of leaf {i} is dropped"
            assert_near(unpacked, want)
    _, pull = torch.func.vjp(case, *(x.detach() for x in leaves))
    _, mapped = torch.func.jvp(pull, (grad,), (tangent,))
    for got, want in zip(mapped, expected, strict=True):
        assert_near(got, want)


def test_vmap_of_a_jvp_is_a_loop_of_it() -> None:
    case = CASES["concat_linear"]
    leaves = case.leaves(torch.float64)
    tangents = tangents_of(leaves)
    batched = torch.stack([leaves[0], 2 * leaves[0]])

    def derivative(x: Tensor) -> Tensor:
        return torch.func.jvp(case, (x, *leaves[1:]), tuple(tangents))[1]

    assert_near(torch.vmap(derivative)(batched), torch.stack([derivative(x) for x in batched]))


@native_only
def test_the_reference_is_named_with_the_reason() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    q = torch.randn(1, 1, 3, 4)
    with forward_ad.dual_level():
        for call in (
            lambda: mmk.explain("concat_linear", [forward_ad.make_dual(x, x)], w),
            lambda: mmk.explain(mmk.cross_attention, forward_ad.make_dual(q, q), q, q),
        ):
            explanation = call()
            assert explanation.backend == "reference"
            assert "forward-mode" in explanation.reasons["cpu"]
        assert "cpu" not in mmk.explain("concat_linear", [x], w).reasons, "nothing has a tangent"
        with mmk.use_backend("cpu"), pytest.raises(mmk.UnsupportedError, match=r"concat_linear.*'cpu'.*forward-mode"):
            mmk.concat_linear([forward_ad.make_dual(x, x)], w)
        with mmk.use_backend("reference"):
            out = mmk.concat_linear([forward_ad.make_dual(x, x)], w)
            assert_near(forward_ad.unpack_dual(out).tangent, x @ w.T)


def test_autocast_and_tangents() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out, tangent = torch.func.jvp(lambda x: mmk.concat_linear([x], w), (x,), (x,))
    assert out.dtype == tangent.dtype == torch.bfloat16
    torch.testing.assert_close(tangent.float(), x @ w.T, rtol=2e-2, atol=2e-2)
