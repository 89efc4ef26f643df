"""`mmkernels.testing` and the pytest plugin: they notice what is wrong, and the examples of docs/testing.md run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NATIVE_ABSENT, NATIVE_PARAMETERS
from environment import DEVICE
from torch import Tensor, nn

import mmkernels as mmk
from mmkernels import _triton
from mmkernels.ops.concat_linear.op import concat_linear_op
from mmkernels.testing import (
    Implementation,
    assert_matches_reference,
    check_backends,
    example_inputs,
    implementations,
    op_names,
    poisoned_memory,
    random_inputs,
)
from mmkernels.testing.inputs import function_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\S+) -->\n```python\n(.*?)```", PAGE, flags=re.DOTALL))

each_op = pytest.mark.parametrize("op", op_names())


def pytest_run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Tests of a folder, with the plugin and no other, in an environment that chooses no backend."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MMKERNELS_", "TRITON_", "PYTEST_"))}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "_mmkernels_pytest", "-p", "no:cacheprovider", *args, "."]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


# --- comparison -------------------------------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """x, whose gradient is ``factor`` times too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad, None


class Model(nn.Module):
    """A linear layer of two inputs by an op, whose gradients may be made wrong."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.factor = factor

    def forward(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = (
            self.weight if torch.is_grad_enabled() and self.factor == 1.0 else Scaled.apply(self.weight, self.factor)
        )
        return {"features": mmk.concat_linear([parts["text"], parts["image"]], weight)}


def parts() -> dict[str, Tensor]:
    return {"text": torch.randn(4, 6, requires_grad=True), "image": torch.randn(4, 10)}


def test_a_gradient_that_is_wrong_is_named() -> None:
    function = lambda x, y: Scaled.apply(x, 1.01) * y  # noqa: E731
    x, y = (torch.randn(5, requires_grad=True) for _ in range(2))
    with pytest.raises(AssertionError, match="gradient of input 0: error"):
        assert_matches_reference(function, x, y, reference=lambda x, y: x * y)
    assert_matches_reference(function, x, y, reference=lambda x, y: x * y, grad=False)


def test_parameters_of_a_module_are_differentiated_and_left_as_they_were() -> None:
    model = Model()
    (out,) = assert_matches_reference(model, parts())
    assert out.shape == (4, 8) and model.weight.grad is None and model.weight.dtype == torch.float32
    wrong = Model(1.01)
    right = Model()
    right.load_state_dict(wrong.state_dict())
    with pytest.raises(AssertionError, match="gradient of input weight: error"):
        assert_matches_reference(wrong, parts(), reference=right)


def test_integers_have_to_be_equal() -> None:
    x = torch.randn(9)
    assert_matches_reference(lambda x: (x, x.argmax()), x)
    with pytest.raises(AssertionError, match="output 1: integers"):
        assert_matches_reference(lambda x: (x, x.argmax()), x, reference=lambda x: (x, x.argmin()))


def test_memory_that_nobody_wrote_is_nan_inside_the_block_alone() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(100).isnan().all() and torch.empty(100, dtype=torch.bfloat16).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


# --- arguments --------------------------------------------------------------------------------------------------------


@each_op
def test_an_example_of_every_op_is_right(op: str) -> None:
    assert_matches_reference(function_of(op), **example_inputs(op, device=DEVICE))


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_random_arguments_are_valid_and_repeat(op: str, dtype: torch.dtype) -> None:
    for seed in range(6):
        layouts = seed % 2 == 0
        inputs, again = (random_inputs(op, seed, dtype=dtype, device=DEVICE, layouts=layouts) for _ in range(2))
        assert str(inputs) == str(again)
        assert_matches_reference(function_of(op), **inputs)


def test_random_arguments_are_of_many_kinds() -> None:
    calls = [random_inputs("concat_linear", seed) for seed in range(60)]
    assert {call.get("activation") for call in calls} == {
        *(None, "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "quick_gelu")
    }
    for name in ("bias", "presence", "residual", "gate"):
        assert {name in call for call in calls} == {True, False}
    assert len({call["weight"].shape for call in calls}) > 30
    with pytest.raises(ValueError, match=r"expected one of additive_attention_pool.*got 'softmax'"):
        random_inputs("softmax")


# --- backends ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cpu", reason="the model is on the CPU")
def test_every_implementation_of_this_machine_serves_the_model() -> None:
    reports = check_backends(Model(), parts())
    assert list(reports) == [str(each) for each in implementations()]
    for report in reports.values():
        assert report.served == {"concat_linear", "concat_linear_backward"} and not report.fell_back


@pytest.mark.skipif(_triton.status() is not None or DEVICE != "cpu", reason="Triton's interpreter is needed")
def test_a_report_says_which_ops_fell_back_and_why() -> None:
    model = Model().double()
    given = {name: x.detach().double() for name, x in parts().items()}
    report = check_backends(model, given, on=[Implementation("triton")])["triton"]
    assert report.served == frozenset()
    why = "on reference: torch.float64 is served by the reference alone"
    assert report.fell_back == {"concat_linear": why, "concat_linear_backward": why}
    assert str(report).startswith("triton: nothing\n  concat_linear on reference: torch.float64")


@pytest.mark.skipif(NATIVE_ABSENT is not None, reason=str(NATIVE_ABSENT))
@pytest.mark.parametrize("implementation", NATIVE_PARAMETERS)
def test_an_error_names_the_implementation(implementation: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = next(b for b in concat_linear_op.forward.backends if b.name == "cpu")
    right = backend.run
    monkeypatch.setitem(backend.__dict__, "run", lambda *args: tuple(1.01 * out for out in right(*args)))
    with pytest.raises(AssertionError, match=f"^on {implementation}: output 0: error"):
        check_backends(Model(), parts(), on=[Implementation("reference"), implementation])


def test_a_model_without_ops_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one that calls ops of mmkernels"):
        check_backends(nn.Linear(3, 2), torch.randn(4, 3))


# --- the plugin -------------------------------------------------------------------------------------------------------


def test_the_plugin_imports_nothing_before_a_test_asks_for_it(tmp_path: Path) -> None:
    code = "import sys\ndef test():\n    assert not {'mmkernels', 'torch', 'triton'} & set(sys.modules)\n"
    (tmp_path / "test_plain.py").write_text(code)
    run = pytest_run(tmp_path)
    assert run.returncode == 0, run.stdout


def test_options_choose_backend_and_instruction_set(tmp_path: Path) -> None:
    code = """
import torch, mmkernels as mmk
from mmkernels import _native
def test():
    x = torch.randn(2, 3)
    assert mmk.explain("concat_linear", [x], torch.randn(4, 3)).backend == "reference"
    assert _native.isa() in ("baseline", "none")
"""
    (tmp_path / "test_choice.py").write_text(code)
    run = pytest_run(
        tmp_path, "--mmkernels-backend=reference", *([] if NATIVE_ABSENT else ["--mmkernels-isa=baseline"])
    )
    assert run.returncode == 0, run.stdout
    assert pytest_run(tmp_path, "--mmkernels-backend=gpu").returncode == 4  # pytest's status of wrong usage


def test_an_option_that_comes_too_late_is_said_to(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("def test(): pass\n")
    run = pytest_run(tmp_path, "-p", "mmkernels.testing", "--mmkernels-backend=reference")
    assert run.returncode == 4 and "set MMKERNELS_BACKEND=reference instead" in run.stderr


@pytest.mark.skipif(_triton.absent() is not None, reason=str(_triton.absent()))
@pytest.mark.skipif(DEVICE != "cpu", reason="the page is about machines without a GPU")
def test_the_pages_examples_run(tmp_path: Path) -> None:
    assert set(EXAMPLES) == {"test_photo_text.py", "test_rule.py"}
    for name, code in EXAMPLES.items():
        (tmp_path / name).write_text(code)
    run = pytest_run(tmp_path, "-o", "mmkernels_interpret=true")
    assert run.returncode == 0, run.stdout
    assert "9 passed" in run.stdout
    assert "triton: concat_linear, concat_linear_backward, cross_attention, cross_attention_backward" in run.stdout
    for line in re.findall(r"^triton: .*?(?=```)", PAGE, flags=re.DOTALL | re.MULTILINE):
        assert line.strip() in run.stdout, "what the page says that pytest prints"
