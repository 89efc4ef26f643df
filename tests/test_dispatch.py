"""Choice of a backend: forcing, falling through, explaining, failing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import native_only

import mmkernels as mmk
from mmkernels import _dispatch
from mmkernels._dispatch import BACKENDS, Backend, Operator, backend_status, forced_backend

q = torch.randn(1, 2, 3, 8)
chosen = pytest.mark.skipif(bool(os.environ.get("MMKERNELS_BACKEND")), reason="MMKERNELS_BACKEND forces a backend")


def test_blocks_nest_and_one_object_may_be_entered_again() -> None:
    before = forced_backend()
    block = mmk.use_backend("reference")
    with block, mmk.use_backend("cpu"), block:
        assert forced_backend() == "reference"
    assert forced_backend() == before


def test_a_block_ends_when_an_exception_leaves_it() -> None:
    before = forced_backend()
    with pytest.raises(KeyError), mmk.use_backend("cpu"):
        raise KeyError
    assert forced_backend() == before


def test_a_block_is_private_to_its_thread() -> None:
    seen: list[str | None] = []
    before = forced_backend()
    with mmk.use_backend("cpu"):
        thread = threading.Thread(target=lambda: seen.append(forced_backend()))
        thread.start()
        thread.join()
    assert seen == [before]


def test_an_unknown_backend_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"use_backend: expected one of reference, simt, cpu, triton, cuda; got 'gpu'"):
        mmk.use_backend("gpu")


def test_forcing_a_backend_the_op_lacks_names_op_and_backend() -> None:
    with mmk.use_backend("cuda"), pytest.raises(mmk.UnsupportedError, match=r"cross_attention: backend 'cuda'"):
        mmk.cross_attention(q, q, q)


@native_only
def test_forcing_cpu_on_float64_says_why_it_cannot() -> None:
    with mmk.use_backend("cpu"), pytest.raises(mmk.UnsupportedError, match=r"cross_attention: .*'cpu'.*float64"):
        mmk.cross_attention(q.double(), q.double(), q.double())


@chosen
def test_without_forcing_float64_falls_through_to_the_reference() -> None:
    explanation = mmk.explain(mmk.cross_attention, q.double(), q.double(), q.double())
    assert explanation.backend == "reference"
    assert set(explanation.reasons) == {"cpu", "cuda", "triton"}
    assert "not on cpu" in str(explanation)
    assert mmk.cross_attention(q.double(), q.double(), q.double()).dtype == torch.float64


@chosen
@native_only
def test_explain_names_the_best_backend_by_function_or_name_and_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    for op in (mmk.cross_attention, "cross_attention", mmk.scaled_dot_product_attention):
        explanation = mmk.explain(op, q, q, q, dropout_p=0.5)
        assert (explanation.backend, dict(explanation.reasons)) == ("cpu", {})
    assert torch.equal(state, torch.get_rng_state())


def test_explain_obeys_the_forced_backend() -> None:
    with mmk.use_backend("reference"):
        assert mmk.explain(mmk.cross_attention, q, q, q).backend == "reference"
    with mmk.use_backend("cuda"), pytest.raises(mmk.UnsupportedError):
        mmk.explain(mmk.cross_attention, q, q, q)


def test_explain_refuses_what_is_no_op() -> None:
    with pytest.raises(ValueError, match="explain: op"):
        mmk.explain("no_such_op")
    with pytest.raises(ValueError, match="calls none"):
        mmk.explain(lambda: None)


def test_every_backend_has_a_status() -> None:
    status = backend_status()
    assert tuple(status) == BACKENDS
    assert status["reference"] is None
    assert all(reason is None or reason for reason in status.values())


def test_the_environment_forces_a_backend_and_a_wrong_name_fails_at_import() -> None:
    code = """
import mmkernels, torch
q = torch.zeros(1, 1, 1, 1)
print(mmkernels.explain("cross_attention", q, q, q).backend)
"""

    def run(name: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "MMKERNELS_BACKEND": name, "MMKERNELS_REQUIRE_NATIVE": "0"}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run("reference").stdout.strip() == "reference"
    assert "MMKERNELS_BACKEND: expected one of" in run("gpu").stderr


def test_the_backward_runs_on_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkernels.ops.cross_attention.op import cross_attention_op

    ran: list[str | None] = []

    def spy(*args: object) -> list[torch.Tensor]:
        ran.append(forced_backend())
        return [torch.zeros_like(q)] * 3 + [torch.zeros(0)] * 5

    monkeypatch.setattr(cross_attention_op.backward, "backends", (Backend("reference", spy, lambda *_: None),))
    leaf = q.clone().requires_grad_()
    with mmk.use_backend("reference"):
        out = mmk.cross_attention(leaf, leaf, leaf)
    out.sum().backward()
    assert ran == ["reference"]


def test_an_operator_takes_the_first_backend_that_supports_the_call() -> None:
    operator = Operator(
        "test_first_supported",
        "(Tensor x) -> Tensor",
        fake=torch.empty_like,
        differentiable=lambda x: x + 2,
        backends=[
            Backend("triton", lambda x: x + 1, lambda x: None if x.dtype == torch.float16 else "float16 alone"),
            _dispatch.reference_backend(lambda x: x + 2),
        ],
    )
    if forced_backend() is None:
        assert operator(torch.zeros(1, dtype=torch.float16)) == 1
    assert operator(torch.zeros(1)) == 2
    with mmk.use_backend("reference"):
        assert operator(torch.zeros(1, dtype=torch.float16)) == 2
