"""What Triton kernels share: the interpreter's repair, launching, compiling without a GPU, budgets."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TRITON_PARAMETER
from environment import DEVICE

from mmkernels import _triton

pytestmark = pytest.mark.skipif(_triton.absent() is not None, reason=str(_triton.absent()))

if _triton.absent() is None:
    import triton
    import triton.language as tl

    from mmkernels.triton import launch as launching
    from mmkernels.triton import math as kernel_math
    from mmkernels.triton.launch import Config, launch, next_power_of_2
    from mmkernels.triton.resources import Resources
    from mmkernels.triton.table import DOCUMENT, Kernel, excesses, ops_with_kernels, recorded_sources, render

    @triton.jit
    def _product(a, b, out, N: tl.constexpr):
        rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
        at = rows * N + columns
        tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))

    @triton.jit
    def _rounded(x, out, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))

    @triton.jit
    def _activation(x, y, d, KIND: tl.constexpr, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(y + at, kernel_math.activation(tl.load(x + at), KIND))
        tl.store(d + at, kernel_math.activation_derivative(tl.load(x + at), KIND))


on_triton = pytest.mark.parametrize("_", [TRITON_PARAMETER])


def without_interpreter(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python in a process whose Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MMKERNELS_TEST_DEVICE")}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), environment.get("PYTHONPATH", "")])
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=1800)


@on_triton
def test_a_dot_of_bfloat16_multiplies_values(_: Any) -> None:
    a, b = (torch.randn(16, 16, device=DEVICE).bfloat16() for _ in range(2))
    out = torch.empty(16, 16, device=DEVICE)
    launch(_product, (1,), a, b, out, N=16)
    torch.testing.assert_close(out, a.float() @ b.float())


@on_triton
def test_a_cast_to_bfloat16_rounds_to_nearest_even(_: Any) -> None:
    x = torch.randn(1024, device=DEVICE)
    x[:8] = torch.tensor([math.nan, math.inf, -math.inf, 3.4e38, 0.0, -0.0, 1.00390625, 1.01171875])
    out = torch.empty(1024, device=DEVICE, dtype=torch.bfloat16)
    launch(_rounded, (1,), x, out, N=1024)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@on_triton
@pytest.mark.parametrize("other", [torch.int32, torch.bool, torch.float16, torch.float32], ids=str)
def test_casts_to_and_from_bfloat16_convert_values(other: torch.dtype, _: Any) -> None:
    x = torch.randint(0, 2, (64,), device=DEVICE).to(other)
    out = torch.empty(64, device=DEVICE, dtype=torch.bfloat16)
    launch(_rounded, (1,), x, out, N=64)
    assert torch.equal(out, x.bfloat16())
    back = torch.empty(64, device=DEVICE, dtype=other if other != torch.bool else torch.int8)
    launch(_rounded, (1,), out, back, N=64)
    assert torch.equal(back, out.to(back.dtype))


@on_triton
@pytest.mark.parametrize("kind", ["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "quick_gelu"])
def test_activations_and_derivatives_are_torchs(kind: str, _: Any) -> None:
    functions = torch.nn.functional
    plain = {
        "gelu_tanh": lambda x: functions.gelu(x, approximate="tanh"),
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }
    sizes = torch.logspace(-4, 3, 255, device=DEVICE)
    x = torch.cat([sizes, -sizes, torch.zeros(2, device=DEVICE)]).double().requires_grad_()
    expected = plain.get(kind, getattr(functions, kind, None))(x)
    (derivative,) = torch.autograd.grad(expected.sum(), x)
    y, d = torch.empty(512, device=DEVICE), torch.empty(512, device=DEVICE)
    launch(_activation, (1,), x.detach().float(), y, d, KIND=kind, N=512)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(d.double(), derivative, rtol=2e-6, atol=2e-7)


@on_triton
def test_the_table_of_configurations_has_its_first_choice_taken(_: Any) -> None:
    x, out = torch.randn(64, device=DEVICE), torch.full((64,), math.nan, device=DEVICE)
    launch(_rounded, (1,), x, out, config=[Config({"N": 32}), Config({"N": 64})])
    assert torch.equal(out[:32], x[:32])
    assert out[32:].isnan().all()
    launch(_rounded, (1, 0), x, out, config=Config({"N": 64}))
    assert out[32:].isnan().all(), "an empty grid runs nothing"


def test_autotuning_takes_the_fastest_that_fits_and_remembers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    milliseconds = {32: 3.0, 64: 1.0, 128: 2.0}
    ran: list[int] = []

    def do_bench(run: Any, **_: Any) -> float:
        run()
        if ran[-1] == 256:
            raise triton.runtime.errors.OutOfResources(1, 2, "shared memory")
        return milliseconds[ran[-1]]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(launching, "_winners", {})
    configs = [Config({"N": n}) for n in (256, 32, 64, 128)]
    for _ in range(2):
        chosen = launching._raced(_rounded, [torch.empty(3)], {}, configs, lambda c: ran.append(c.constants["N"]))
        assert chosen.constants["N"] == 64
    assert ran == [256, 32, 64, 128]
    warps = {c.num_warps for c in launching._candidates(configs[:1])}
    assert len(warps) > 1 and all(c.constants == {"N": 256} for c in launching._candidates(configs[:1]))


class _CompiledOnce:
    """A kernel ``k(x, n, scale, KIND, BLOCK)`` that notes who launches it, and how."""

    arg_names = ("x", "n", "scale", "KIND", "BLOCK")
    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(*args: Any, **options: Any) -> _CompiledOnce:
            self.launches.append(("triton", grid, args, options))
            return self

        return compile_and_launch

    def run(self, *args: Any) -> None:
        self.launches.append(("directly", *args))


def test_what_was_compiled_is_launched_directly_and_other_arguments_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = triton.compiler.make_backend(launching.GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(launching, "_backend", lambda device: backend)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=str)))
    monkeypatch.setattr(launching, "_launchers", {})
    kernel, x = _CompiledOnce(), torch.zeros(64)

    def launched(
        x: Any = x, n: int = 33, grid: tuple[int, ...] = (3,), kind: str | None = "gelu", block: int = 8
    ) -> tuple[Any, ...]:
        config = Config({"BLOCK": block}, num_warps=2, num_stages=1)
        launching._launch_again(5, kernel, grid, (x, (n, 1), 0.5), config, {"KIND": kind})
        return kernel.launches[-1]

    options = {"KIND": "gelu", "BLOCK": 8, "num_warps": 2, "num_stages": 1}
    assert launched() == ("triton", (3,), (x, (33, 1), 0.5), options)
    direct = ("directly", 3, 1, 1, "5", "function", "metadata", None, None, None, x, (33, 1), 0.5, "gelu", 8)
    assert launched() == direct
    assert launched(grid=(7, 2))[:4] == ("directly", 7, 2, 1)
    assert launched(n=35)[11] == (35, 1)
    assert launched(x[16:])[0] == "directly"
    for other in (
        {"x": x[1:]},  # not on 16 bytes
        {"x": x.half()},
        {"x": None},
        {"n": 48},
        {"n": 2**40 + 1},
        {"kind": None},
        {"block": 16},
    ):
        assert launched(**other)[0] == "triton", other
        assert launched(**other)[0] == "directly", other
    hook = lambda metadata: None  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert launched()[0] == "triton"
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert launched() == direct


def test_powers_of_two() -> None:
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]


def test_cpu_tensors_without_the_interpreter_are_refused_with_a_reason() -> None:
    script = """
import torch, mmkernels as mmk
x, c = torch.randn(2, 3, 8), torch.randn(2, 8)
print(mmk.explain(mmk.modulated_norm, x.double(), c.double(), c.double()))
try:
    with mmk.use_backend("triton"):
        mmk.modulated_norm(x, c, c)
except mmk.UnsupportedError as error:
    print(error)
"""
    printed = without_interpreter("-c", script).stdout
    assert "not on triton: the inputs are on cpu" in printed
    assert "backend 'triton' was forced and cannot serve this call: the inputs are on cpu" in printed


def test_import_mmkernels_does_not_import_triton() -> None:
    script = "import sys, mmkernels, mmkernels.testing; print('triton' in sys.modules)"
    assert without_interpreter("-c", script).stdout == "False\n"


# --- compiled kernels -------------------------------------------------------------------------------------------------


def _check(ops: Sequence[str], cwd: Path | None = None) -> str:
    """The last line of `python -m mmkernels kernels --check`, which found nothing over budget."""
    done = without_interpreter("-m", "mmkernels", "kernels", "--check", "--jobs", "1", "--ops", ",".join(ops), cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_kernels_compile_for_every_target_within_budget() -> None:
    """docs/generated/kernels.md has the budgets, and what it was made from: what is the same is not compiled again."""
    ops = ops_with_kernels()
    assert re.search(r"0 over budget; (\d+) ops as they were", _check(ops))
    assert list(recorded_sources(DOCUMENT.read_text())) == ops


def test_a_kernel_that_changed_is_compiled_and_held_to_its_budget(tmp_path: Path) -> None:
    document = DOCUMENT.read_text()
    there = tmp_path / DOCUMENT
    there.parent.mkdir(parents=True)
    there.write_text(document.replace(recorded_sources(document)["bilinear_fusion"], "0123456789abcdef"))
    summary = _check(["bilinear_fusion", "merge_attention"], cwd=tmp_path)
    assert re.match(r"[1-9]\d* kernels on 4 targets in \d+ s, 0 over budget; 1 ops as they were", summary), summary


@pytest.fixture(scope="session")
def compile_counts() -> dict[str, list[list[str]]]:
    """Op -> for each size of batch and length the kernels that a training step compiles."""
    done = without_interpreter(str(Path(__file__).with_name("compile_counts.py")))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("op", ops_with_kernels() if _triton.absent() is None else [])
def test_new_lengths_and_batches_compile_nothing(op: str, compile_counts: dict[str, list[list[str]]]) -> None:
    first, *others = compile_counts[op]
    assert first and all(kernels == first for kernels in others)


def test_budgets_notice_what_got_worse() -> None:
    kernel = Kernel("op", "1x2", "bfloat16", "forward", "block 64, 4 warps, 1 stages")
    good = Resources(registers=100, spills=0, shared=4096, dots=8, wide=2)
    document = render({kernel: {"sm_80": good}}, {"op": "0123456789abcdef"})
    assert recorded_sources(document) == {"op": "0123456789abcdef"}
    assert excesses({kernel: {"sm_80": good}}, document) == []
    worse = {
        "3 spills": dict(spills=3),
        "111 registers, budget 100": dict(registers=111),
        "8.0 KB of shared memory, budget 4.0": dict(shared=8192),
        "more than the target has": dict(shared=1 << 20),
        "no tensor-core instructions": dict(dots=0),
        "no accesses of 16 bytes": dict(wide=0),
    }
    for message, change in worse.items():
        figures = Resources(**{**good.__dict__, **change})
        assert message in "\n".join(excesses({kernel: {"sm_80": figures}}, document))
    assert "not in the table" in excesses({kernel: {"sm_90": good}}, document)[0]
    assert "in the table, not compiled" in excesses({kernel: {"sm_90": good}}, document)[-1]


def test_kernels_without_the_interpreter_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmkernels", "kernels"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr
    assert Path("docs/generated/kernels.md").exists()
