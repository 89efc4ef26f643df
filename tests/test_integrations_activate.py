"""torch's own attention on this library's kernels: activate() and deactivate()."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import native_only
from torch.nn import attention

from mmkernels import _native
from mmkernels.integrations.torch import activate, deactivate
from mmkernels.testing import assert_close_to_oracle, same_bits

pytestmark = native_only

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
UNMEASURED = "the baseline instruction set is left to torch"


@pytest.fixture(autouse=True)
def best_instruction_set():
    before = _native.isa()
    best = _native.default_isa()
    if best == "baseline":
        pytest.skip(UNMEASURED)
    _native.set_isa(best)
    yield
    deactivate()
    _native.set_isa(before)


def heads(batch, count, length, width, dtype=torch.float32, layout="heads first", seed=0):
    generator = torch.Generator().manual_seed(seed)
    if layout == "heads first":
        x = torch.randn(batch, count, length, width, generator=generator)
    elif layout == "tokens first":
        x = torch.randn(batch, length, count, width, generator=generator).transpose(1, 2)
    elif layout == "a slice":
        x = torch.randn(batch, length, count, 3, width, generator=generator)[..., 1, :].transpose(1, 2)
    elif layout == "heads outermost":
        x = torch.randn(count, batch, length, width, generator=generator).transpose(0, 1)
    else:
        x = torch.randn(1, count, length, width, generator=generator).expand(batch, -1, -1, -1)
    return x.to(dtype) if dtype != torch.float32 else x


def run(q, k, v, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def hidden(batch, queries, keys):
    mask = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[:, :, 2] = False
    return mask


OPTIONS = {
    "plain": lambda q, k: {},
    "causal": lambda q, k: {"is_causal": True},
    "a scale": lambda q, k: {"scale": 0.3},
    "a bool mask": lambda q, k: {"attn_mask": hidden(q.shape[0], q.shape[2], k.shape[2])},
    "a mask of all heads": lambda q, k: {"attn_mask": torch.rand(q.shape[2], k.shape[2]).to(q.dtype)},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["as many key heads", "grouped"])
def test_output_and_gradients_are_as_exact_as_torch_s(dtype, case, kv_heads):
    torch.manual_seed(0)
    q = heads(2, 4, 33, 16, dtype, "tokens first")
    k, v = (heads(2, kv_heads, 57, 16, dtype, "tokens first", seed) for seed in (1, 2))
    options = {**OPTIONS[case](q, k), "enable_gqa": kv_heads != 4}
    plain = run(q, k, v, **options)
    with activate() as calls:
        ours = run(q, k, v, **options)
    assert calls.served == {"forward": 1, "backward": 1} and not calls.left
    if options.get("attn_mask") is not None and options["attn_mask"].dtype != torch.bool:
        options["attn_mask"] = options["attn_mask"].double()
    exact = run(*(x.double() for x in (q, k, v)), **options)
    for got, same, oracle in zip(ours, plain, exact, strict=True):
        assert got.stride() == same.stride()
        assert_close_to_oracle(got, same, oracle)
    assert not same_bits(ours, plain)
    assert same_bits(run(q, k, v, **{**options, "attn_mask": None}), run(q, k, v, **{**options, "attn_mask": None}))


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "a slice", "heads outermost", "an expanded batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_lse_and_gradients_lie_as_torch_s(layout, dtype):
    q, k, v = (heads(3, 2, 20, 8, dtype, layout, seed) for seed in range(3))
    mask = torch.zeros(20, 20, dtype=dtype)
    mask[4], mask[:, 3] = -torch.inf, -torch.inf
    plain = FORWARD(q, k, v, attn_mask=mask)
    gradients = BACKWARD(q, q, k, v, *plain, 0.0, False, attn_mask=mask)
    with activate() as calls:
        ours = FORWARD(q, k, v, attn_mask=mask)
        mixed = BACKWARD(q, q, k, v, *plain, 0.0, False, attn_mask=mask)
    assert calls.served == {"forward": 1, "backward": 1}
    left_by_ours = BACKWARD(q, q, k, v, *ours, 0.0, False, attn_mask=mask)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for got, same in zip((*ours, *mixed, *left_by_ours), (*plain, *gradients, *gradients), strict=True):
        assert got.stride() == same.stride() and got.dtype == same.dtype
        torch.testing.assert_close(got, same, atol=tolerance, rtol=tolerance)
    assert (ours[0][:, :, 4] == 0).all() and (ours[1][:, :, 4] == 0).all()


@pytest.mark.parametrize("size", [3, 30, 9000])
@pytest.mark.parametrize("is_causal", [False, True], ids=["all keys", "causal"])
def test_large_scores_keep_their_gradients(size, is_causal):
    q, k, v = (heads(1, 2, 24, 16, seed=seed) for seed in range(3))
    plain = run(q * size, k, v, is_causal=is_causal)
    exact = run(*(x.double() for x in (q * size, k, v)), is_causal=is_causal)
    with activate() as calls:
        ours = run(q * size, k, v, is_causal=is_causal)
    assert calls.served == {"forward": 1, "backward": 1}
    for name, got, same, oracle in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert_close_to_oracle(got, same, oracle, name=name)


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (lambda: [heads(1, 2, 8, 16).double()] * 3, {}, "no kernel of this dtype"),
        (lambda: [heads(1, 2, 16, 8).transpose(2, 3)] * 3, {}, "no kernel of these arguments"),
        (lambda: [heads(1, 2, 1, 16)] + [heads(1, 2, 64, 16)] * 2, {}, "slower here: few queries in float32"),
    ],
    ids=["float64", "features apart", "decoding"],
)
def test_what_is_left_to_torch_has_its_bits_and_a_reason(make, options, reason):
    plain = FORWARD(*make(), **options)
    gradients = BACKWARD(plain[0], *make(), *plain, 0.0, False)
    with activate() as calls:
        same = FORWARD(*make(), **options)
        same_gradients = BACKWARD(plain[0], *make(), *plain, 0.0, False)
    assert same_bits([*plain, *gradients], [*same, *same_gradients])
    assert calls.served == {"forward": 0, "backward": 0}
    assert calls.left == {("forward", reason): 1, ("backward", reason): 1}
    assert f"left    forward: 1 calls: {reason}" in str(calls)


def test_the_baseline_instruction_set_is_left_to_torch():
    x = heads(1, 2, 16, 16)
    plain = FORWARD(x, x, x)
    _native.set_isa("baseline")
    with activate() as calls:
        assert same_bits(plain, FORWARD(x, x, x))
    assert calls.left == {("forward", "slower here: the baseline instruction set"): 1}


def test_errors_are_torch_s():
    x = heads(1, 2, 16, 16)
    wrong = [
        lambda: FORWARD(x, x, x, 0.5),
        lambda: FORWARD(x[0], x, x),
        lambda: FORWARD(x, x, x[..., :8]),
        lambda: FORWARD(x, x, x, attn_mask=torch.ones(16, 16, dtype=torch.bool)),
        lambda: FORWARD(x, x, x, attn_mask=torch.zeros(15, 16)),
        lambda: FORWARD(x, x, x.bfloat16()),
    ]

    def messages():
        result = []
        for call in wrong:
            with pytest.raises(RuntimeError) as error:
                call()
            result.append(str(error.value).splitlines()[0])
        return result

    plain = messages()
    with activate():
        assert messages() == plain


def test_a_gradient_of_a_gradient_raises_as_it_does_in_torch():
    x = heads(1, 2, 16, 16).requires_grad_()
    with activate() as calls:
        (grad,) = torch.autograd.grad(F.scaled_dot_product_attention(x, x, x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="_for_cpu_backward is not implemented"):
            grad.sum().backward()
    assert calls.served == {"forward": 1, "backward": 1}


def test_dropout_and_trained_masks_stay_with_torch_s_other_means():
    x = heads(1, 2, 16, 16).requires_grad_()
    mask = torch.zeros(16, 16, requires_grad=True)
    with activate() as calls:
        F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        F.scaled_dot_product_attention(x, x, x, mask).sum().backward()
    assert mask.grad is not None
    assert calls.served == {"forward": 0, "backward": 0} and not calls.left


def test_deactivating_gives_torch_s_bits_back_and_doing_either_twice_changes_nothing():
    q, k, v = (heads(1, 2, 40, 16, seed=seed) for seed in range(3))
    plain = run(q, k, v)
    activate()
    ours = run(q, k, v)
    again = activate()
    assert same_bits(run(q, k, v), ours)
    assert again.served == {"forward": 1, "backward": 1}
    deactivate()
    deactivate()
    assert same_bits(run(q, k, v), plain) and not same_bits(ours, plain)
    assert again.served == {"forward": 1, "backward": 1}


def test_a_block_ends_what_it_began_and_nothing_else():
    with activate():
        with activate():
            assert attention.current_flash_attention_impl() == "mmkernels"
        assert attention.current_flash_attention_impl() == "mmkernels"
    assert attention.current_flash_attention_impl() is None


def test_torch_s_registry_knows_it_and_another_implementation_comes_back_after_the_block():
    class Handle:
        def remove(self):
            events.append("removed")

    def register():
        events.append("registered")
        return Handle()

    events: list[str] = []
    assert "mmkernels" in attention.list_flash_attention_impls()
    attention.register_flash_attention_impl("of this test", register_fn=register)
    try:
        attention.activate_flash_attention_impl("of this test")
        with activate():
            assert events == ["registered", "removed"]
        assert events == ["registered", "removed", "registered"]
        attention.activate_flash_attention_impl("mmkernels")
        x, calls = heads(1, 2, 16, 16), activate()
        F.scaled_dot_product_attention(x, x, x)
        assert calls.served["forward"] == 1
        attention.restore_flash_attention_impl()
        F.scaled_dot_product_attention(x, x, x)
        assert calls.served["forward"] == 1
    finally:
        attention._registry._FLASH_ATTENTION_IMPLS.pop("of this test")


def test_without_the_compiled_library_it_says_so_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(_native, "_library", None)
    with pytest.raises(RuntimeError, match="compiled library"):
        activate()
    assert attention.current_flash_attention_impl() is None


def test_a_torch_without_the_registry_is_said_so(monkeypatch):
    from mmkernels.integrations.torch.activate import activate as function

    monkeypatch.setitem(function.__globals__, "_HAS_REGISTRY", False)
    deactivate()
    with pytest.raises(RuntimeError, match="got an older one"):
        activate()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_the_same_for_any_number_of_threads(dtype):
    q, k, v = (heads(2, 4, 130, 32, dtype, seed=seed) for seed in range(3))
    threads = torch.get_num_threads()
    results = []
    with activate():
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(q, k, v, is_causal=True))
    torch.set_num_threads(threads)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_switching_under_calls_of_other_threads_gives_each_of_them_one_of_the_two_results():
    q, k, v = (heads(1, 2, 24, 16, seed=seed) for seed in range(3))
    plain = F.scaled_dot_product_attention(q, k, v)
    with activate():
        ours = F.scaled_dot_product_attention(q, k, v)
    other = []

    def call():
        for _ in range(200):
            out = F.scaled_dot_product_attention(q, k, v)
            if not (torch.equal(out, plain) or torch.equal(out, ours)):
                other.append(out)

    workers = [threading.Thread(target=call) for _ in range(2)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        with activate():
            pass
    for worker in workers:
        worker.join()
    assert not other


def test_autocast_and_modules_reach_the_kernels():
    x = heads(1, 2, 16, 16).requires_grad_()
    layer = torch.nn.MultiheadAttention(32, 2, batch_first=True)
    tokens = torch.randn(2, 16, 32)
    with activate() as calls:
        with torch.autocast("cpu", torch.bfloat16):
            out = F.scaled_dot_product_attention(x, x, x)
        out.sum().backward()
        layer(tokens, tokens, tokens, need_weights=False)
    assert out.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert calls.served == {"forward": 2, "backward": 1}


def test_compiled_code_calls_the_kernels():
    def function(x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).flatten(2)

    x = heads(2, 2, 16, 16, layout="tokens first").requires_grad_()
    plain = function(x)
    plain.sum().backward()
    grad, x.grad = x.grad, None
    with activate() as calls:
        out = torch.compile(function, fullgraph=True)(x)
        out.sum().backward()
    assert calls.served == {"forward": 1, "backward": 1}
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(x.grad, grad)
