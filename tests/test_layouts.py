"""Any memory layout of any tensor argument, and arguments without elements, in every op.

`OPS` has one line per op: its public function, and inputs of given sizes, every optional tensor among them. What holds
for all of them is tested from that line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import EITHER, Implementation, use_implementation
from environment import DEVICE
from torch import Tensor

import mmkernels as mmk

Inputs = dict[str, Any]
Layout = Callable[[Tensor], Tensor]

r = torch.randn


def flags(*shape: int) -> Tensor:
    """Some True and some False, True in every row of a matrix."""
    drawn = torch.rand(shape) > 0.4
    if drawn.numel():
        drawn[..., 0] = True
    return drawn


def lengths(count: int, most: int) -> Tensor:
    return torch.randint(0, most + 1, (count,))


def offsets(length: int) -> Tensor:
    """Where three members of a packed batch begin and end."""
    return torch.tensor([0, length // 2, length // 2, length])


def places(length: int, batch: int) -> Tensor:
    """A mask with two True positions in every row, or all where there are fewer."""
    return (torch.arange(length) < 2).expand(batch, length).clone()


def embeddings(*sizes: int) -> Tensor:
    return r(*sizes) / 2


# What each op is called with, by sizes that may all be zero.
OPS: dict[str, Callable[..., Inputs]] = {
    "concat_linear": lambda B=5, K=6, N=7: dict(
        xs=[r(B, K), r(B, 3)], weight=r(N, K + 3), bias=r(N), activation="gelu", presence=flags(B, 2),
        residual=r(B, N), gate=r(N)),
    "concat_linear of one absent": lambda B=5, L=2, K=6, N=7: dict(
        xs=[r(B, L, K), r(B, L, 3)], weight=r(N, K + 3), bias=r(N), presence=torch.tensor([True, False])),
    "concat_norm_linear": lambda B=5, K=6, N=7: dict(
        xs=[r(B, K), r(B, 4)], norm_weight=r(K + 4), norm_bias=r(K + 4), weight=r(N, K + 4), bias=r(N),
        activation="silu"),
    "gated_fusion": lambda B=5, K=6, N=7: dict(
        xs=[r(B, K), r(B, 3)], value_weights=[r(N, K), r(N, 3)], value_biases=[r(N), r(N)],
        gate_weight=r(2 * N, K + 3), gate_bias=r(2 * N), presence=flags(B, 2)),
    "gated_fusion with its gate": lambda B=5, K=6, N=7: dict(
        xs=[r(B, K), r(B, 3)], value_weights=[r(N, K), r(N, 3)], value_biases=[r(N), r(N)],
        gate_weight=r(N, K + 3), gate_bias=r(N), presence=flags(B, 2), return_gate=True),
    "gated_concat": lambda B=5, K=6, Ky=4: dict(x=r(B, K), y=r(B, Ky), weight=r(K, K + Ky), bias=r(K)),
    "low_rank_fusion": lambda B=5, K=6, N=7, R=3: dict(
        xs=[r(B, K), r(B, 3)], factors=[r(R, K + 1, N), r(R, 4, N)], rank_weights=r(R), bias=r(N),
        presence=flags(B, 2)),
    "tensor_fusion_linear": lambda B=5, K=6, N=7: dict(
        xs=[r(B, K), r(B, 3)], weight=r(N, 4 * K + 4), bias=r(N), presence=flags(B, 2)),
    "bilinear_fusion": lambda B=5, K=6, Ky=4, N=7, Nout=5: dict(
        x=r(B, K), y=r(B, Ky), x_weight=r(2 * N, K), y_weight=r(2 * N, Ky), out_weight=r(Nout, N), out_bias=r(Nout),
        rank=2, presence=flags(B, 2)),
    "modulated_norm": lambda B=3, L=4, C=6: dict(
        x=r(B, L, C), shift=r(B, C), scale=r(B, C), norm_weight=r(C), norm_bias=r(C)),
    "modulated_norm per token": lambda B=3, L=4, C=6: dict(
        x=r(B, L, C), shift=r(B, L, C), scale=r(B, L, C), norm="rms"),
    "concat_tokens": lambda B=3, L=4, C=6: dict(
        xs=[r(B, L, C), r(B, 2, C)], type_embedding=r(2, C), position_embeddings=[r(L, C), r(2, C)], norm="layer",
        norm_weight=r(C), norm_bias=r(C)),
    "merge_embeddings": lambda B=3, L=4, C=6: dict(
        text=r(B, L, C), modal=[r(B * min(L, 2) // 3, C), r(B * min(L, 2) - B * min(L, 2) // 3, C)],
        mask=places(L, B)),
    "additive_attention_pool": lambda B=5, M=3, D=6, A=4, Dq=5: dict(
        xs=r(B, M, D), weight=r(A, D), vector=r(A), bias=r(A), query=r(B, Dq), query_weight=r(A, Dq),
        presence=flags(B, M)),
    "additive_attention_pool of a list": lambda B=70, D=6, A=4: dict(
        xs=[r(B, D), r(B, D)], weight=r(A, D), vector=r(A), presence=flags(B, 2)),
    "multiplicative_attention_pool": lambda B=5, M=3, D=6, Dq=5: dict(
        xs=r(B, M, D), query=r(B, Dq), weight=r(Dq, D), presence=flags(B, M)),
    "multiplicative_attention_pool of a list": lambda B=5, D=6: dict(xs=[r(B, D), r(B, D)], query=r(B, D)),
    "split_attention_pool": lambda B=5, D=6, A=4: dict(
        xs=[r(B, D), r(B, D)], weight1=r(A, D), bias1=r(A), weight2=r(2 * D, A), bias2=r(2 * D), activation="gelu",
        presence=flags(B, 2)),
    "cross_attention": lambda B=2, H=2, Lq=20, Lk=5, D=8, Dv=4: dict(
        query=r(B, H, Lq, D), key=r(B, H, Lk, D), value=r(B, H, Lk, Dv), attn_mask=r(B, 1, Lq, Lk),
        key_lengths=lengths(B, Lk)),
    "cross_attention of few queries": lambda B=3, H=2, Lq=1, Lk=5, D=8, Dv=4: dict(
        query=r(B, H, Lq, D), key=r(B, H, Lk, D), value=r(B, H, Lk, Dv), attn_mask=flags(B, 1, Lq, Lk),
        key_lengths=lengths(B, Lk)),
    "scaled_dot_product_attention": lambda B=2, H=2, Lq=6, Lk=5, D=8, Dv=4: dict(
        query=r(B, H, Lq, D), key=r(B, H, Lk, D), value=r(B, H, Lk, Dv), attn_mask=flags(B, 1, Lq, Lk)),
    "varlen_cross_attention": lambda Tq=7, Tk=9, H=2, D=8, Dv=4: dict(
        query=r(Tq, H, D), key=r(Tk, H, D), value=r(Tk, H, Dv), cu_seqlens_q=offsets(Tq), cu_seqlens_k=offsets(Tk),
        max_seqlen_q=Tq, max_seqlen_k=Tk),
    "joint_attention": lambda B=3, H=2, L=4, D=8, Dv=4: dict(
        queries=[r(B, H, L, D), r(B, H, 3, D)], keys=[r(B, H, L, D), r(B, H, 3, D)],
        values=[r(B, H, L, Dv), r(B, H, 3, Dv)], key_lengths=[lengths(B, L), lengths(B, 3)], stream_bias=r(2, 2)),
    "bidirectional_cross_attention": lambda B=2, H=2, Lx=6, Ly=4, D=8, Dv=4: dict(
        x_query=r(B, H, Lx, D), y_key=r(B, H, Ly, D), x_value=r(B, H, Lx, Dv), y_value=r(B, H, Ly, Dv),
        x_mask=flags(B, Lx), y_mask=flags(B, Ly)),
    "merge_attention": lambda B=2, H=2, L=6, D=8: dict(
        outputs=[r(B, H, L, D), r(B, H, L, D)], lses=[r(B, H, L), r(B, H, L)]),
    "norm_rotary": lambda B=2, H=3, L=4, D=6: dict(
        query=r(B, H, L, D), key=r(B, 2, L, D), cos=r(L, D // 2), sin=r(L, D // 2), query_weight=r(D), key_weight=r(D)),
    "norm_rotary of neighbours, a table per element": lambda B=3, G=2, L=4, R=2: dict(
        query=r(B, 2, L, 7), key=r(B, G, L, 7), cos=r(B, L, R), sin=r(B, L, R), key_weight=r(7), interleaved=True),
    "norm_rotary of a packed batch": lambda H=3, L=4, D=6: dict(
        query=r(L, H, D), key=r(L, 2, D), cos=r(L, D // 2), sin=r(L, D // 2)),
    "deformable_attention": lambda B=2, H=2, L=3, D=4: dict(
        value=[r(B, 6, H, D), r(B, 4, H, D)], spatial_shapes=((2, 3), (2, 2)),
        sampling_locations=torch.rand(B, L, H, 2, 2, 2), attention_weights=r(B, L, H, 2, 2), presence=flags(B, 2)),
    "contrastive_loss": lambda D=4: dict(
        x=r(6, D), y=r(6, D), logit_scale=3.0, labels=torch.randint(0, 3, (6,))),
    "sigmoid_contrastive_loss": lambda B=5, D=4: dict(x=r(B, D), y=r(B, D), logit_scale=3.0, logit_bias=-2.0),
    "decision_fusion": lambda B=5, C=6: dict(
        logits=[r(B, C), r(B, C)], weights=torch.rand(2), method="log", presence=flags(B, 2)),
    "decision_fusion by the maximum": lambda B=5, C=6: dict(logits=[r(B, C), r(B, C)], method="max"),
    "distillation_loss": lambda B=5, V=6: dict(
        student=r(B, V), teacher=r(B, V), temperature=2.0, labels=torch.randint(0, 3, (B,)), ignore_index=0),
    "distillation_loss of sequences": lambda B=2, L=3, V=6: dict(
        student=r(B, L, V), teacher=r(B, L, V), kind="jsd", labels=torch.randint(0, 3, (B, L)), ignore_index=0),
    "multimodal_cross_entropy": lambda B=5, C=6: dict(
        logits=[r(B, C), r(B, 3)], labels=torch.randint(0, 3, (B,)), weights=r(2), presence=flags(B, 2),
        modulation=r(2)),
    "multimodal_cross_entropy of uncertainty": lambda B=5, C=6: dict(
        logits=[r(B, C), r(B, 3)], labels=[torch.randint(0, max(C, 1), (B,)), torch.randint(0, 3, (B,))],
        log_vars=r(2), label_smoothing=0.1),
}  # fmt: skip

# Arguments whose values say which calls are valid, so that only layouts that keep the values are tried.
FIXED = {"cu_seqlens_q", "cu_seqlens_k", "mask"}


def function_of(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(mmk, name.split(" ")[0])
    return function


# --- layouts ----------------------------------------------------------------------------------------------------------


def _with_gaps(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


def _transposed(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


KEEPING: dict[str, Layout] = {
    "within wider rows": _with_gaps,
    "a column of a matrix": lambda x: torch.stack([x, torch.zeros_like(x)], -1)[..., 0],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": _transposed,
}
EXPANDING: dict[str, Layout] = {
    "one row expanded": lambda x: x[:1].expand_as(x),
    "one column expanded": lambda x: x[..., :1].expand_as(x),
    "one element expanded": lambda x: x.flatten()[:1].view([1] * x.dim()).expand_as(x),
}
EMPTY: dict[str, Layout] = {
    "contiguous": lambda x: x,
    "transposed": _transposed,
    "a column of a matrix": KEEPING["a column of a matrix"],
    "expanded": lambda x: x.new_zeros([1] * x.dim()).expand(x.shape),
    "odd strides": lambda x: x.new_zeros(0).as_strided(x.shape, [7] * x.dim()),
}


def at(inputs: Inputs) -> Iterator[tuple[str, int | None]]:
    """Where the tensors are among the arguments."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            yield name, None
        elif isinstance(value, list):
            yield from ((name, i) for i in range(len(value)))


def replaced(inputs: Inputs, place: tuple[str, int | None], layout: Layout) -> Inputs:
    name, i = place
    value = inputs[name]
    return {**inputs, name: layout(value) if i is None else [*value[:i], layout(value[i]), *value[i + 1 :]]}


def prepared(name: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Inputs:
    torch.manual_seed(1)
    inputs = OPS[name](**sizes)
    for place in list(at(inputs)):
        to = dtype if place[0] != "lses" else torch.float32
        inputs = replaced(inputs, place, lambda x, to=to: (x.to(to) if x.is_floating_point() else x).to(DEVICE))
    return inputs


def outputs_of(name: str, inputs: Inputs) -> list[Tensor]:
    out = function_of(name)(**inputs)
    return list(out) if isinstance(out, (list, tuple)) else [out]


def results(name: str, inputs: Inputs, gradient: Layout = lambda g: g) -> list[Tensor]:
    """Outputs and the gradients of every floating argument, as it lies in memory."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    for place in list(at(inputs)):
        inputs = replaced(inputs, place, leaf)
    outs = outputs_of(name, inputs)
    torch.manual_seed(2)
    grads = [torch.randn(o.shape).to(o.device, o.dtype) for o in outs]
    grads = [gradient(g) if g.dim() else g for g in grads]
    pulled = torch.autograd.grad(outs, leaves, grads, allow_unused=True)
    pairs = zip(leaves, pulled, strict=True)
    return [*(o.detach() for o in outs), *(torch.zeros_like(x) if g is None else g for x, g in pairs)]


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, what
        tolerance = 1e-4 if b.dtype == torch.float32 else 3e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


# --- what holds for all ----------------------------------------------------------------------------------------------

DOOR = Implementation("the choice")  # none is forced: plain calls take the short way in
WAYS = [pytest.param(DOOR, id="unforced"), *EITHER]
each_op = pytest.mark.parametrize("name", OPS)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """No backend forced, then one after the other."""
    if request.param is DOOR:
        yield "any"
    else:
        yield from use_implementation(request.param)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_argument_in_every_layout(name: str, dtype: torch.dtype, way: str) -> None:
    inputs = prepared(name, dtype)
    expected = results(name, inputs)
    for place in at(inputs):
        for text, layout in KEEPING.items():
            assert_same(results(name, replaced(inputs, place, layout)), expected, f"{place} {text}")
        for text, layout in EXPANDING.items() if place[0] not in FIXED else ():
            arranged = replaced(inputs, place, layout)
            dense = replaced(arranged, place, Tensor.contiguous)
            assert_same(results(name, arranged), results(name, dense), f"{place} {text}")


@each_op
def test_all_arguments_and_gradients_in_a_layout(name: str, way: str) -> None:
    inputs = prepared(name)
    for text, layout in {**KEEPING, **EXPANDING}.items():
        arranged = inputs
        if text in KEEPING:
            for place in at(inputs):
                arranged = replaced(arranged, place, layout)
        dense = results(name, inputs, lambda g, f=layout: f(g).contiguous())
        assert_same(results(name, arranged, layout), dense, text)


def _without(name: str) -> list[str]:
    return list(inspect.signature(OPS[name]).parameters)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in OPS for size in _without(name)])
def test_arguments_without_elements(name: str, size: str, way: str) -> None:
    """The reference's result in any strides, or its complaint, and that is about a value."""
    inputs = prepared(name, **{size: 0})
    with mmk.use_backend("reference"):
        try:
            expected = results(name, inputs)
        except ValueError as error:
            expected = []
            assert str(error).startswith(name.split(" ")[0])
    for text, layout in EMPTY.items():
        arranged = inputs
        for place in at(inputs):
            arranged = replaced(arranged, place, lambda x, f=layout: x if x.numel() else f(x))
        with nullcontext() if expected else pytest.raises(ValueError, match=f"^{name.split(' ')[0]}: "):
            # The incoming gradient too: that of a sum is expanded, also where it has no elements.
            for arrange in (layout, EMPTY["expanded"]):
                got = results(name, arranged, lambda g, f=arrange: g if g.numel() else f(g))
                assert_same(got, expected, text)


@each_op
def test_layouts_under_compile(name: str) -> None:
    tensors = {place: None for place in at(prepared(name))}
    compiled = torch.compile(lambda inputs: outputs_of(name, inputs), fullgraph=True, backend="aot_eager")
    for layout in (KEEPING["a column of a matrix"], KEEPING["transposed"]):
        inputs = prepared(name)
        expected = [o.detach() for o in outputs_of(name, inputs)]
        for place in tensors:
            inputs = replaced(inputs, place, layout)
        torch._dynamo.reset()
        assert_same([o.detach() for o in compiled(inputs)], expected, "compiled")


# --- presence with dynamic rows ---------------------------------------------------------------------------------------

ROWS = {"xs", "x", "y", "query", "residual", "presence", "value", "sampling_locations", "attention_weights", "logits"}
ROWS |= {"labels"}
WITH_PRESENCE = [name for name in OPS if "presence" in OPS[name]() and OPS[name]()["presence"].dim() == 2]


@pytest.mark.parametrize("name", WITH_PRESENCE)
def test_export_with_dynamic_rows_and_a_presence_per_row(name: str) -> None:
    """For any number of rows, that of the modalities among them."""

    class Model(torch.nn.Module):
        def __init__(self, constant: Inputs) -> None:
            super().__init__()
            self.constant = constant

        def forward(self, rows: Inputs) -> list[Tensor]:
            return outputs_of(name, {**self.constant, **rows})

    def split(count: int) -> tuple[Inputs, Inputs]:
        inputs = prepared(name, B=count)
        by_row = set(inputs) & ROWS
        return {k: v for k, v in inputs.items() if k not in by_row}, {k: inputs[k] for k in by_row}

    constant, rows = split(9)
    batch = torch.export.Dim("batch")
    shapes = {k: [{0: batch} for _ in v] if isinstance(v, list) else {0: batch} for k, v in rows.items()}
    exported = torch.export.export(Model(constant), (rows,), dynamic_shapes=(shapes,)).module()
    for count in (2, 3, 9, 17):
        _, rows = split(count)
        assert_same(exported(rows), outputs_of(name, {**constant, **rows}), f"{count} rows")


def test_export_with_dynamic_rows_of_modulated_norm() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return mmk.modulated_norm(x, shift, scale)

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    for per_token in (False, True):
        made = [(r(n, m, 6), *(r(n, m, 6) if per_token else r(n, 6) for _ in range(2))) for n, m in ((6, 4), (4, 6))]
        shape = {0: batch, 1: length} if per_token else {0: batch}
        exported = torch.export.export(Model(), made[0], dynamic_shapes=({0: batch, 1: length}, shape, shape)).module()
        torch.testing.assert_close(exported(*made[1]), mmk.modulated_norm(*made[1]))
