"""graph_pass(): what it replaces computes the same, and what means something else is left."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from environment import ALONE, DEVICE
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from mmkernels.integrations.torch import graph_pass
from mmkernels.testing import assert_close_to_oracle

pytestmark = pytest.mark.skipif(ALONE is not None or DEVICE != "cpu", reason="the pass replaces on the CPU")
INF = float("inf")


def passed(fusing, function):
    """The function with the pass over its graph, and nothing compiled of it."""
    torch._dynamo.reset()

    def backend(module, inputs):
        fusing(module.graph)
        module.graph.lint()
        module.recompile()
        return module

    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


def by_hand(q, k, v, mask=None, bias=None):
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else scores.masked_fill(mask, -INF)
    return torch.matmul(F.softmax(scores, dim=-1), v)


def scaled_queries(q, k, v):
    weights = ((0.3 * q) @ k.mT).softmax(-1)
    return F.dropout(weights, p=0.1, training=False) @ v


def folded_heads(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.3, 2), v)


def upcast(q, k, v):
    return F.softmax(0.3 * (q @ k.transpose(2, 3)), dim=-1, dtype=torch.float32).to(q.dtype) @ v


def normed(x, g, h, norm="layer"):
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], g, h, 1e-6)
    return F.rms_norm(x, x.shape[-1:], g, 1e-6)


def image_merged(text, features, mask):
    return text.masked_scatter(mask.unsqueeze(-1).expand_as(text), features)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Q, K, V = (random(2, 3, n, 8, seed=n) for n in (9, 13, 14))
V = random(2, 3, 13, 8, seed=3)
HIDE = torch.rand(2, 1, 9, 13, generator=torch.Generator().manual_seed(1)) > 0.7
BIAS = random(1, 3, 9, 13, seed=5)
X, Y = random(2, 7, 16), random(2, 7, 8, seed=1)
G, H, W, B = random(24, seed=2), random(24, seed=3), random(10, 24, seed=4), random(10, seed=5)
W1, R = random(10, 16, seed=6), random(2, 7, 10, seed=7)
MASK = torch.arange(7).remainder(3).eq(1).expand(2, 7)
FEATURES = random(4, 16, seed=8)


PATTERNS = {
    "sdpa": (F.scaled_dot_product_attention, (Q, K, V), "cross_attention"),
    "sdpa, causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        (Q, K, V),
        "cross_attention",
    ),
    "by hand": (by_hand, (Q, K, V), "cross_attention"),
    "by hand, hidden keys": (by_hand, (Q, K, V, HIDE), "cross_attention"),
    "by hand, both masks": (by_hand, (Q, K, V, HIDE, BIAS), "cross_attention"),
    "by hand, scaled queries": (scaled_queries, (Q, K, V), "cross_attention"),
    "by hand, heads in the batch": (folded_heads, (Q, K, V), "cross_attention"),
    "by hand, softmax in float32": (upcast, (Q, K, V), "cross_attention"),
    "cat -> linear": (lambda x, y, w: F.linear(torch.cat([x, y], -1), w), (X, Y, W), "concat_linear"),
    "cat -> linear -> gelu": (
        lambda x, y, w, b: F.gelu(F.linear(torch.cat((x, y), dim=2), w, b), approximate="tanh"),
        (X, Y, W, B),
        "concat_linear",
    ),
    "cat -> layer_norm -> linear -> relu": (
        lambda x, y, g, h, w, b: F.linear(normed(torch.cat([x, y], -1), g, h), w, b).relu(),
        (X, Y, G, H, W, B),
        "concat_norm_linear",
    ),
    "cat -> rms_norm -> linear": (
        lambda x, y, g, w: F.linear(normed(torch.cat([x, y], -1), g, None, "rms"), w),
        (X, Y, G, W),
        "concat_norm_linear",
    ),
    "norm without weights -> linear -> silu": (
        lambda x, w, b: F.silu(F.linear(normed(x, None, None), w, b)),
        (X, W1, B),
        "concat_norm_linear",
    ),
    "norm -> scale -> shift": (
        lambda x, s, b: (1 + s) * normed(x, None, None) + b,
        (X, random(2, 1, 16, seed=1), random(2, 7, 16, seed=2)),
        "modulated_norm",
    ),
    "rms_norm -> scale -> shift": (
        lambda x, g, s, b: b + normed(x, g, None, "rms") * (s + 1.0),
        (X, random(16, seed=3), random(2, 1, 16, seed=1), random(1, 1, 16, seed=2)),
        "modulated_norm",
    ),
    "gate and residual": (
        lambda r, x, w, b, g: r + torch.tanh(g) * F.linear(x, w, b),
        (R, X, W1, B, random(1, seed=9)),
        "concat_linear",
    ),
    "gate of each feature, activation and residual": (
        lambda r, x, w, b, g: F.gelu(F.linear(x, w, b)) * g.tanh() + r,
        (R, X, W1, B, random(10, seed=9)),
        "concat_linear",
    ),
    "masked_scatter": (image_merged, (X, FEATURES, MASK), "merge_embeddings"),
    "masked_scatter of surplus images": (
        lambda x, f, m: image_merged(x, f.unflatten(0, (2, -1)), m),
        (X, torch.cat([FEATURES, FEATURES]), MASK),
        "merge_embeddings",
    ),
}


def run(function, args, dtype):
    leaves = [a.to(dtype).requires_grad_() if a.is_floating_point() else a for a in args]
    out = function(*leaves)
    weight = random(*out.shape, seed=11).to(out.dtype)
    inputs = [leaf for leaf in leaves if leaf.is_floating_point()]
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_replaced_and_computes_the_same(name, dtype):
    function, args, with_ = PATTERNS[name]
    fusing = graph_pass(everywhere=True)
    ours = run(passed(fusing, function), args, dtype)
    assert [entry.with_ for entry in fusing.report.replaced] == [with_] and not fusing.report.left
    rounded = [a.to(dtype) if a.is_floating_point() else a for a in args]
    plain = run(function, rounded, dtype)
    exact = run(lambda *leaves: function(*leaves).double(), rounded, torch.float64)
    for got, same, oracle in zip(ours, plain, exact, strict=True):
        assert_close_to_oracle(got, same, oracle, scale=float(oracle.abs().max()))


def twice(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v + weights.sum()


def in_place(x, y, w):
    both = torch.cat([x, y], -1)
    x.add_(1)
    return F.linear(both, w)


def without_gradients_between(x, y, w):
    both = torch.cat([x, y], -1)
    with torch.no_grad():
        return F.linear(both, w)


def two_biases(q, k, v, bias):
    return torch.softmax(q @ k.mT + bias + bias, -1) @ v


LEFT = {
    "sdpa with dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), (Q, K, V), "dropout"),
    "dropout by hand": (lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.5) @ v, (Q, K, V), "dropout"),
    "weights used elsewhere": (twice, (Q, K, V), "is used elsewhere"),
    "a softmax over queries": (lambda q, k, v: torch.softmax(q @ k.mT, 2) @ v, (Q, K, V), "not over the keys"),
    "a scale after the mask": (lambda q, k, v, m: torch.softmax((q @ k.mT + m) * 2, -1) @ v, (Q, K, V, BIAS), "after"),
    "a finite fill": (
        lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(m, -1e9), -1) @ v,
        (Q, K, V, HIDE),
        "finite value",
    ),
    "two masks": (two_biases, (Q, K, V, BIAS), "several masks"),
    "float64": (by_hand, (Q.double(), K.double(), V.double()), "no kernel of torch.float64"),
    "one batch of keys": (by_hand, (Q, K[:1], V[:1]), "of one batch"),
    "five dims": (by_hand, (Q[None], K[None], V[None]), "of one batch"),
    "a cat of several dtypes": (
        lambda x, y, w: F.linear(torch.cat([x, y.bfloat16()], -1), w),
        (X, Y, W),
        "several dtypes",
    ),
    "a cat that something else reads": (
        lambda x, y, w: F.linear(z := torch.cat([x, y], -1), w) + z.sum(),
        (X, Y, W),
        "is used elsewhere",
    ),
    "a cat that was changed": (in_place, (X, Y, W), "changed in place"),
    "a mode that changes": (without_gradients_between, (X, Y, W), "the mode changes"),
    "a scale of two dims": (
        lambda x, s, b: normed(x, None, None) * (1 + s) + b,
        (X, random(16), random(16)),
        "not (B, L, C)",
    ),
    "a mask of features": (lambda x, f, m: x.masked_scatter(m, f), (X, X, X > 0), "not one of whole rows"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_means_something_else_is_left(name):
    function, args, reason = LEFT[name]
    fusing = graph_pass(everywhere=True)
    torch.manual_seed(0)
    plain = function(*(a.clone() for a in args))
    torch.manual_seed(0)
    out = passed(fusing, function)(*(a.clone() for a in args))
    assert torch.equal(out, plain)
    assert not fusing.report.replaced
    assert any(reason in entry.reason for entry in fusing.report.left), fusing.report


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: F.linear(q, v[0, 0, :8]),
        lambda q, k, v: F.linear(torch.cat([q, q], 1), v[0, 0, :8]),
        lambda q, k, v: torch.softmax(q, -1) @ v[:, :, :8],
        lambda q, k, v: F.layer_norm(q, q.shape[-2:]) * (1 + q) + q,
        lambda q, k, v: q + 2 * F.linear(q, v[0, 0, :8]),
    ],
    ids=["a linear alone", "a cat of tokens", "a softmax of no product", "a norm over two dims", "a gate by number"],
)
def test_what_is_no_pattern_is_not_reported(function):
    fusing = graph_pass(everywhere=True)
    assert torch.equal(passed(fusing, function)(Q, K, V), function(Q, K, V))
    assert len(fusing.report) == 0


def test_what_would_be_slower_here_is_left_and_says_so():
    fusing = graph_pass()
    function, args, _ = PATTERNS["by hand"]
    assert torch.equal(passed(fusing, function)(*args), function(*args))
    assert [entry.reason.partition(":")[0] for entry in fusing.report] == ["slower here"]
    assert "0 replaced, 1 left" in str(fusing.report)


def block(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(torch.cat([x, y], -1), w, b))
    heads = hidden.unflatten(-1, (2, 5)).transpose(1, 2)
    return by_hand(heads, heads, heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_compiler_takes_the_pass_and_gradients_flow(dynamic):
    torch._dynamo.reset()
    fusing = graph_pass(everywhere=True)
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, options={"pre_grad_custom_pass": fusing})
    plain = run(block, (X, Y, W, B), torch.float32)
    with fresh_cache():
        ours = run(compiled, (X, Y, W, B), torch.float32)
    assert [entry.with_ for entry in fusing.report.replaced] == ["cross_attention", "concat_linear"]
    exact = run(block, (X, Y, W, B), torch.float64)
    for got, same, oracle in zip(ours, plain, exact, strict=True):
        assert_close_to_oracle(got, same, oracle, scale=float(oracle.abs().max()))


def test_the_report_is_whole_when_the_compiler_finds_the_graph_in_its_cache():
    def function(q):
        return torch.softmax(0.3 * (q @ q.mT), -1) @ q

    with fresh_cache():
        for misses in (1, 0):
            torch._dynamo.reset()
            counters.clear()
            fusing = graph_pass(everywhere=True)
            torch.compile(function, options=fusing.options)(Q)
            assert len(fusing.report.replaced) == 1
            assert counters["inductor"]["fxgraph_cache_miss"] == misses


def test_each_pass_has_a_mark_of_its_own_in_the_compiler_s_cache():
    fusing = graph_pass()
    assert fusing.uuid() == fusing.uuid() != graph_pass().uuid()
