"""Products on tiles: the portable ones that stand in for AMX's, when they are used, and beside whom."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import native_only
from torch import Tensor

import mmkernels as mmk
from mmkernels import _info, _native
from mmkernels.testing import assert_close_to_oracle, same_bits

ON_TILES = [name for name in _native.supported_isas() if name.startswith("amx")]
needs_tiles = pytest.mark.skipif(not ON_TILES, reason="no AMX here, and no test build")
PORTABLE = "amx_portable" in ON_TILES
needs_portable = pytest.mark.skipif(not PORTABLE, reason="portable tiles are in test builds alone")
INTEL, AMD = "GenuineIntel", "AuthenticAMD"


@pytest.fixture(params=ON_TILES or ["absent"])
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.isa()
    _native.set_isa(request.param)
    with mmk.use_backend("cpu"):
        yield request.param
    _native.set_isa(before)


# --- which instruction set runs ---


@native_only
@pytest.mark.parametrize(
    ("vendor", "runnable", "best"),
    [
        (AMD, ["baseline", "avx2", "avx512", "avx512_bf16"], "avx512_bf16"),
        (AMD, ["baseline", "avx2"], "avx2"),
        (INTEL, ["baseline", "avx2", "avx512", "avx512_bf16"], "avx512"),
        (INTEL, ["baseline", "avx512_bf16"], "baseline"),
        (INTEL, ["baseline", "avx2", "avx512", "avx512_bf16", "amx"], "amx"),
        ("", ["baseline", "avx512_bf16"], "avx512_bf16"),
        (AMD, ["baseline", "avx2", "emulated", "amx_portable"], "avx2"),
        (INTEL, [], "baseline"),
    ],
)
def test_pair_products_in_lanes_run_where_they_win(vendor: str, runnable: list[str], best: str) -> None:
    assert _native._library.best_isa(runnable, vendor) == best


@native_only
@pytest.mark.parametrize(
    ("compiled", "cpu", "refused", "reason"),
    [
        (True, True, 0, ""),
        (True, False, 0, "this CPU has none"),
        (False, True, 0, "the library was built without them"),
        (True, True, 1, f"the system refuses them: {os.strerror(1)}"),
    ],
)
def test_why_there_are_no_tiles_is_said(compiled: bool, cpu: bool, refused: int, reason: str) -> None:
    assert _native._library.why_no_amx(compiled, cpu, refused) == reason


@native_only
def test_info_names_the_reason_and_amx_is_offered_only_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("amx" in _native.supported_isas()) == (_native.why_no_amx() is None)
    monkeypatch.setattr(_native, "why_no_amx", lambda: "the system refuses them")
    (line,) = [x for x in _info.render(_info.collect()).splitlines() if x.startswith("AMX tiles")]
    assert line.endswith("the system refuses them")


# --- the portable tiles ---


def bits(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).view(np.uint32)


def bfloat16(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def portable_product(a: Tensor, b: Tensor, c: np.ndarray) -> np.ndarray:
    """``c + a @ b`` of [rows, depth] and [depth, 16] on portable tiles."""
    rows, depth = a.shape
    pairs = b.reshape(depth // 2, 2, 16).transpose(1, 2).contiguous()
    raw = [x.contiguous().view(torch.int16).numpy().tobytes() for x in (a, pairs)]
    # A tile of rows takes its sums from 16 whole rows of memory.
    memory = np.zeros((16, 16), np.float32)
    memory[:rows] = c
    got = _native._library.portable_tile_product(*raw, memory.tobytes(), rows, depth // 2)
    return np.frombuffer(got, np.float32).reshape(16, 16)


@needs_portable
@pytest.mark.parametrize(("rows", "depth"), [(16, 32), (1, 2), (5, 14)])
def test_a_portable_tile_sums_even_and_odd_elements_apart_and_rounds_each_step(rows: int, depth: int) -> None:
    a, b = bfloat16(rows, depth, seed=1), bfloat16(depth, 16, seed=2)
    c = np.random.default_rng(3).standard_normal((rows, 16)).astype(np.float32)
    even, odd = np.zeros((2, rows, 16), np.float32)
    x, y = a.float().numpy(), b.float().numpy()
    for k in range(0, depth, 2):
        even = even + x[:, k, None] * y[k]
        odd = odd + x[:, k + 1, None] * y[k + 1]
    got = portable_product(a, b, c)
    assert np.array_equal(bits(got[:rows]), bits(c + (even + odd)))
    assert not got[rows:].any()  # rows beyond the configured are neither read nor written


@needs_portable
def test_a_portable_tile_takes_subnormals_for_zero() -> None:
    tiny = torch.full((16, 2), 1e-39).bfloat16()
    assert tiny.any()
    assert not portable_product(tiny, torch.full((2, 16), 2.0**100).bfloat16(), np.zeros((16, 16))).any()
    small = torch.full((16, 2), 2.0**-70).bfloat16()
    assert not portable_product(small, small.T.repeat(1, 1), np.zeros((16, 16))).any()


# --- when tiles are used ---


def attention(query_len: int = 40, key_len: int = 50, dim: int = 40, seed: int = 0, **options: Any) -> Tensor:
    q, k, v = (bfloat16(1, 2, n, dim, seed=seed + i) for i, n in enumerate((query_len, key_len, key_len)))
    return mmk.cross_attention(q, k, v, **options)


def linear(rows: int, seed: int = 0) -> Tensor:
    return mmk.concat_linear(
        [bfloat16(rows, 24, seed=seed), bfloat16(rows, 15, seed=seed + 1)], bfloat16(33, 39, seed=seed + 2)
    )


LARGE: dict[str, Callable[[], Tensor]] = {
    "attention": attention,
    "joint_attention": lambda: mmk.joint_attention(*[[bfloat16(1, 2, n, 32, seed=n)] for n in (40, 50, 50)])[0],
    "bidirectional": lambda: mmk.bidirectional_cross_attention(*[bfloat16(1, 2, 40, 32, seed=i) for i in range(4)])[0],
    "concat_linear": lambda: linear(40),
    "bilinear_fusion": lambda: mmk.bilinear_fusion(
        *[bfloat16(40, 40, seed=i) for i in range(2)], *[bfloat16(33, 40, seed=i) for i in range(2)]
    ),
}
SMALL: dict[str, Callable[[], Tensor]] = {
    "few queries": lambda: attention(query_len=2),
    "few keys": lambda: attention(key_len=8),
    "few features": lambda: attention(dim=8),
    "few rows": lambda: linear(3),
    "float32": lambda: mmk.concat_linear([torch.randn(40, 40)], torch.randn(33, 40)),
}


@needs_portable
@pytest.mark.parametrize("name", LARGE)
def test_tiles_are_configured_by_a_call_and_released_by_it(name: str) -> None:
    before = _native.isa()
    _native.set_isa("amx_portable")
    try:
        count, configured = _native._library.portable_tiles()
        assert not configured
        with mmk.use_backend("cpu"):
            LARGE[name]()
        after, configured = _native._library.portable_tiles()
        assert after > count
        assert not configured
    finally:
        _native.set_isa(before)


@needs_portable
@pytest.mark.parametrize("name", SMALL)
def test_a_call_too_small_for_tiles_leaves_them_alone(name: str) -> None:
    before = _native.isa()
    _native.set_isa("amx_portable")
    try:
        count, _ = _native._library.portable_tiles()
        with mmk.use_backend("cpu"):
            SMALL[name]()
        assert _native._library.portable_tiles() == (count, False)
    finally:
        _native.set_isa(before)


# --- numbers ---


@needs_tiles
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (20, 9)}], ids=str)
@pytest.mark.parametrize(
    ("query_len", "key_len", "dim"),
    [
        (16, 32, 32),
        (77, 45, 40),
        (33, 130, 33),
        (100, 65, 17),
        (49, 97, 130),
        # around 128 keys, up to which groups are of 32 queries
        (70, 128, 48),
        (70, 129, 80),
        # around blocks of 1024 keys, and around groups of 64 queries and tasks of 128
        (64, 1025, 32),
        (65, 1039, 64),
        (150, 1057, 17),
        (9, 2070, 48),
    ],
)
def test_attention_on_tiles_is_as_close_as_the_reference(
    query_len: int, key_len: int, dim: int, options: dict[str, Any], tiles: str
) -> None:
    q, k, v = (bfloat16(2, 3, n, dim, seed=n + i).requires_grad_() for i, n in enumerate((query_len, key_len, key_len)))
    grad = bfloat16(2, 3, query_len, dim, seed=7)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        with mmk.use_backend(backend):
            out = mmk.cross_attention(*leaves, **options)
            return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    results = run("cpu", torch.bfloat16), run("reference", torch.bfloat16), run("reference", torch.float64)
    for name, *values in zip(("out", "query", "key", "value"), *results, strict=True):
        assert_close_to_oracle(*values, name=name)


@needs_tiles
@pytest.mark.parametrize("windowed", [False, True])
# Of 200 queries, groups lie otherwise for one thread than for two; 1100 keys are two blocks.
@pytest.mark.parametrize(("query_len", "key_len"), [(40, 150), (200, 150), (200, 1100)])
def test_attention_on_tiles_has_the_same_bits_for_any_number_of_threads(
    query_len: int, key_len: int, windowed: bool, tiles: str
) -> None:
    q, k, v = (bfloat16(2, 4, n, 40, seed=i).requires_grad_() for i, n in enumerate((query_len, key_len, key_len)))
    options = {"window": (45, 17)} if windowed else {}
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = mmk.cross_attention(q, k, v, **options)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))])
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@needs_tiles
@pytest.mark.parametrize("rows", [40, 530])
@pytest.mark.parametrize("features", [52, 100, 800])
def test_products_on_tiles_have_the_same_bits_for_any_number_of_threads(rows: int, features: int, tiles: str) -> None:
    xs = [bfloat16(rows, n, seed=n).requires_grad_() for n in (24, 75)]
    weight = bfloat16(features, 99, seed=1).requires_grad_()
    factors = [bfloat16(3, n + 1, features, seed=n).requires_grad_() for n in (24, 75)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outs = [
            mmk.concat_linear(xs, weight),
            mmk.low_rank_fusion(xs, factors, torch.ones(3).bfloat16()),
            mmk.bilinear_fusion(*xs, weight[:, :24], weight[:, 24:]),
        ]
        total = sum(x.float().sum() for x in outs)
        results.append([*(x.detach() for x in outs), *torch.autograd.grad(total, [*xs, weight, *factors])])
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


# Blocks of W: one, several, of sources that make several chunks; rows that are copied first, and of several chunks of
# dz; a source that is absent in some rows; a width without elements.
@needs_tiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rows", "widths", "features", "absent"),
    [
        (150, (40, 9), 100, False),
        (650, (600, 0, 131), 300, False),
        (530, (1100, 300), 200, False),
        (1100, (70,), 2051, False),
        (700, (1024,), 640, False),
        (600, (130, 70), 90, True),
    ],
    ids=str,
)
def test_concatenation_fusion_by_blocks_of_weights_is_as_close_as_the_reference(
    rows: int, widths: tuple[int, ...], features: int, absent: bool, dtype: torch.dtype, tiles: str
) -> None:
    xs = [bfloat16(rows, n, seed=n).to(dtype).requires_grad_() for n in widths]
    weight = (bfloat16(features, sum(widths), seed=1) / sum(widths) ** 0.5).to(dtype).requires_grad_()
    norms = [bfloat16(sum(widths), seed=n).to(dtype).requires_grad_() for n in (2, 3)]
    present = torch.rand(rows, len(xs), generator=torch.Generator().manual_seed(0)) < 0.7 if absent else None
    grad = bfloat16(rows, features, seed=4).to(dtype)

    def results(convert: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        x, w, (gain, shift) = [convert(x) for x in xs], convert(weight), (convert(n) for n in norms)
        made = []
        for out, leaves in [
            (mmk.concat_linear(x, w, activation="gelu", presence=present), [*x, w]),
            *([] if absent else [(mmk.concat_norm_linear(x, gain, shift, w), [*x, w, gain, shift])]),
        ]:
            made += [out.detach(), *torch.autograd.grad(out, leaves, convert(grad).detach())]
        return made

    ours = results(lambda t: t)
    with mmk.use_backend("reference"):
        baseline, oracle = results(lambda t: t), results(lambda t: t.detach().double().requires_grad_())
    for got, same_dtype, exact in zip(ours, baseline, oracle, strict=True):
        assert_close_to_oracle(got, same_dtype, exact)


# --- beside torch, threads and processes ---


@needs_tiles
def test_alternating_with_torchs_own_products_changes_neither(tiles: str) -> None:
    x, weight = bfloat16(64, 64, seed=1), bfloat16(64, 64, seed=2)
    torchs, ours = F.linear(x, weight), {n: (attention(n), linear(n)) for n in (20, 41)}
    for i in range(1000):
        n = (20, 41)[i % 2]
        got = (attention(n), linear(n))[i // 2 % 2]
        assert torch.equal(got, ours[n][i // 2 % 2])
        assert torch.equal(F.linear(x, weight), torchs)


@needs_tiles
def test_threads_that_never_called_torch_and_many_at_once(tiles: str) -> None:
    expected = {name: call() for name, call in LARGE.items()}
    weight = bfloat16(64, 64, seed=3)
    torchs = F.linear(weight, weight)
    wrong: list[str] = []

    def work() -> None:
        with mmk.use_backend("cpu"):
            for _ in range(10):
                for name, call in LARGE.items():
                    if not torch.equal(call(), expected[name]):
                        wrong.append(name)
                    if not torch.equal(F.linear(weight, weight), torchs):
                        wrong.append("torch")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_tiles
def test_a_forked_process_multiplies_on_tiles_too(tiles: str) -> None:
    expected = {name: call() for name, call in LARGE.items()}
    child = os.fork()
    if child == 0:
        right = all(torch.equal(call(), expected[name]) for name, call in LARGE.items())
        os._exit(0 if right else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@needs_tiles
def test_changing_the_instruction_set_between_forward_and_backward_is_no_error(tiles: str) -> None:
    q, k, v = (bfloat16(1, 2, 40, 40, seed=i).requires_grad_() for i in range(3))
    out = mmk.cross_attention(q, k, v)
    here = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    _native.set_isa(_native.supported_isas()[0])
    for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), here, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
