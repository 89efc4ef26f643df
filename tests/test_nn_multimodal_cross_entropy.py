"""MultimodalCrossEntropy: each balance against its formula."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.nn import MultimodalCrossEntropy


def make(count: int = 2, batch: int = 12) -> tuple[list[Tensor], Tensor]:
    """Logits of which the first modality knows the labels best."""
    labels = torch.arange(batch) % 5
    hints = [F.one_hot(labels, 5) * (3.0 - 2 * i) for i in range(count)]
    logits = [(torch.randn(batch, 5) + hint).requires_grad_() for hint in hints]
    labels[3] = -100
    return logits, labels


def test_uncertainty_learns_the_weights(either_backend: str) -> None:
    logits, labels = make()
    loss = MultimodalCrossEntropy(2)
    assert [n for n, _ in loss.named_parameters()] == ["log_vars"] and loss.log_vars is not None
    torch.nn.init.normal_(loss.log_vars)
    total, each = loss(logits, labels)
    want = torch.stack([F.cross_entropy(z, labels) for z in logits])
    torch.testing.assert_close(each, want)
    torch.testing.assert_close(total, (torch.exp(-loss.log_vars) * want + loss.log_vars).sum())
    optimizer = torch.optim.SGD(loss.parameters(), 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss([z.detach() for z in logits], labels)[0].backward()
        optimizer.step()
    torch.testing.assert_close(loss.log_vars.detach(), want.log().detach(), atol=1e-2, rtol=1e-2)


def test_given_weights_are_kept_in_the_state(either_backend: str) -> None:
    logits, labels = make()
    loss = MultimodalCrossEntropy(2, "given", weights=[0.7, 0.3], robust="symmetric")
    want = mmk.multimodal_cross_entropy(logits, labels, weights=torch.tensor([0.7, 0.3]), robust="symmetric")
    assert torch.equal(loss(logits, labels)[0], want[0]) and not list(loss.parameters())
    other = MultimodalCrossEntropy(2, "given")
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.weights, torch.tensor([0.7, 0.3]))  # type: ignore[arg-type]


def by_paper(logits: list[Tensor], labels: Tensor, alpha: float) -> list[float]:
    """As OGM-GE's code has it, of two modalities."""
    valid = labels != -100
    score = [z.detach().softmax(1)[valid].gather(1, labels[valid, None]).sum() for z in logits]
    ratio = score[0] / score[1]
    slowed = 0 if ratio > 1 else 1
    coefficients = [1.0, 1.0]
    coefficients[slowed] = float(1 - torch.tanh(alpha * torch.relu(ratio if ratio > 1 else 1 / ratio)))
    return coefficients


@pytest.mark.parametrize("order", [1, -1])
def test_ogm_slows_the_modality_that_is_ahead(order: int, either_backend: str) -> None:
    logits, labels = make()
    logits = logits[::order]
    loss = MultimodalCrossEntropy(2, "ogm", alpha=0.3)
    k = torch.tensor(by_paper(logits, labels, 0.3))
    torch.testing.assert_close(loss.coefficients(logits, labels), k)
    assert (k < 1).sum() == 1
    total, each = loss(logits, labels)
    plain = [F.cross_entropy(z, labels) for z in logits]
    torch.testing.assert_close(each, torch.stack(plain))
    torch.testing.assert_close(total, sum(plain))
    for i, grad in enumerate(torch.autograd.grad(total, logits)):
        torch.testing.assert_close(grad, torch.autograd.grad(plain[i], logits[i], retain_graph=True)[0] * k[i])
    total, _ = loss.eval()(logits, labels)
    for z, grad, ce in zip(logits, torch.autograd.grad(total, logits), plain, strict=True):
        torch.testing.assert_close(grad, torch.autograd.grad(ce, z, retain_graph=True)[0])


def test_ogm_of_more_modalities_some_absent(either_backend: str) -> None:
    logits, labels = make(3)
    presence = torch.ones(12, 3, dtype=torch.bool)
    presence[:, 1] = False
    presence[::3, 0] = False
    loss = MultimodalCrossEntropy(3, "ogm", alpha=0.5)
    seen = presence & (labels != -100)[:, None]
    score = [
        float(z.detach().softmax(1)[seen[:, i]].gather(1, labels[seen[:, i], None]).mean())
        for i, z in enumerate(logits)
        if i != 1
    ]
    want = [1 - torch.tanh(torch.tensor(0.5 * score[0] / score[1])), torch.tensor(1.0), torch.tensor(1.0)]
    torch.testing.assert_close(loss.coefficients(logits, labels, presence=presence), torch.stack(want))
    assert loss(logits, labels, presence=presence)[0].isfinite()
    nothing = torch.zeros(3, dtype=torch.bool)
    assert loss.coefficients(logits, labels, presence=nothing).eq(1).all()
    alone = MultimodalCrossEntropy(1, "ogm")
    assert alone.coefficients(logits[:1], labels).eq(1).all()


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ogm_of_half_precision_sees_small_probabilities(dtype: torch.dtype, linear: bool, either_backend: str) -> None:
    """Of 2000 classes a label's probability is about what one minus it loses by rounding."""
    labels = torch.randint(0, 2000, (16,))
    logits = [(torch.randn(16, 2000) + hint * F.one_hot(labels, 2000)).to(dtype) for hint in (2, 0)]
    given: dict[str, Any] = {}
    if linear:
        weights = [z.t().contiguous() for z in logits]
        given["linear"] = [(w, None) for w in weights]
    loss = MultimodalCrossEntropy(2, "ogm", alpha=0.1)
    got = loss.coefficients([torch.eye(16, dtype=dtype)] * 2 if linear else logits, labels, **given)
    want = torch.tensor(by_paper([z.double() for z in logits], labels, 0.1))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert want[0] < 0.9


def test_ogm_stops_a_modality_whose_only_rival_is_always_wrong(either_backend: str) -> None:
    labels = torch.arange(6) % 3
    right, wrong = (1e4 * F.one_hot((labels + i) % 3, 4).float() for i in range(2))
    assert MultimodalCrossEntropy(2, "ogm").coefficients([right, wrong], labels).tolist() == [0, 1]
    assert MultimodalCrossEntropy(2, "ogm", alpha=0).coefficients([right, wrong], labels).tolist() == [1, 1]
    assert MultimodalCrossEntropy(2, "ogm").coefficients([wrong, wrong], labels).tolist() == [1, 1]


@pytest.mark.parametrize("balance", ["uncertainty", "given", "ogm"])
def test_heads_give_the_losses_of_their_logits(balance: Any, either_backend: str) -> None:
    _, labels = make()
    hidden = [torch.randn(12, 7) for _ in range(2)]
    heads = [(torch.randn(5, 7), torch.randn(5)) for _ in range(2)]
    loss = MultimodalCrossEntropy(2, balance, label_smoothing=0.1)
    logits = [F.linear(x, w, b) for x, (w, b) in zip(hidden, heads, strict=True)]
    torch.testing.assert_close(loss(hidden, labels, linear=heads), loss(logits, labels))


@pytest.mark.parametrize("balance", ["uncertainty", "given", "ogm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_logits_of_other_dtypes_than_the_module(balance: Any, dtype: torch.dtype) -> None:
    logits, labels = make()
    for module in (None, dtype):
        loss = MultimodalCrossEntropy(2, balance, dtype=module)
        for given in (dtype, torch.float32):
            assert loss([z.to(given) for z in logits], labels)[0].dtype == given


@pytest.mark.parametrize("balance", ["uncertainty", "given", "ogm"])
def test_it_compiles(balance: Any) -> None:
    logits, labels = make()
    loss = MultimodalCrossEntropy(2, balance)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))


BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "num_modalities: expected an int; got float", {"num_modalities": 2.0}),
    (ValueError, "num_modalities: expected a size ≥ 1; got 0", {"num_modalities": 0}),
    (ValueError, "balance: expected 'uncertainty', 'given' or 'ogm'; got 'gradnorm'", {"balance": "gradnorm"}),
    (TypeError, "balance: expected 'uncertainty', 'given' or 'ogm'; got bool", {"balance": True}),
    (ValueError, "weights: expected None with balance='uncertainty'", {"weights": [1.0, 1.0]}),
    (ValueError, "weights: expected 2 numbers, one for each modality; got", {"balance": "given", "weights": [1.0]}),
    (ValueError, "alpha: expected a number ≥ 0; got -1.0", {"balance": "ogm", "alpha": -1.0}),
    (TypeError, "weights: expected a list of numbers; got str", {"balance": "given", "weights": "ab"}),
    (ValueError, "label_smoothing: expected a number from 0 to 1; got 2.0", {"label_smoothing": 2.0}),
    (ValueError, "label_smoothing: expected 0.0 with robust='gce'", {"label_smoothing": 0.1, "robust": "gce"}),
    (ValueError, "robust: expected None, 'gce' or 'symmetric'; got 'mae'", {"robust": "mae"}),
    (ValueError, "q: expected a number above 0, at most 1; got 2.0", {"q": 2.0}),
    (TypeError, "ignore_index: expected an int; got str", {"ignore_index": "a"}),
]


@pytest.mark.parametrize(("error", "message", "options"), BAD, ids=[m[:50] for _, m, _ in BAD])
def test_bad_arguments(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=re.escape(f"MultimodalCrossEntropy: {message}")):
        MultimodalCrossEntropy(**({"num_modalities": 2} | options))


def test_another_number_of_modalities_raises() -> None:
    logits, labels = make(3)
    with pytest.raises(ValueError, match="MultimodalCrossEntropy: logits: expected 2 modalities; got 3"):
        MultimodalCrossEntropy(2)(logits, labels)
