"""TokenFusionEmbedding against the same layer in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from environment import DEVICE
from torch import Tensor

import mmkernels as mmk
from mmkernels.nn import TokenFusionEmbedding


def plain(module: TokenFusionEmbedding, xs: list[Tensor]) -> Tensor:
    """The forward in plain torch, from the module's own parameters."""
    tokens = []
    for i, x in enumerate(xs):
        projection, table = module.projections[i], getattr(module, f"position_embedding_{i}")
        x = F.linear(x, projection.weight, projection.bias) if isinstance(projection, torch.nn.Linear) else x
        x = x if module.type_embedding is None else x + module.type_embedding[i]
        tokens.append(x if table is None else x + table[: x.shape[1]])
    out = torch.cat(tokens, 1)
    if module.norm == "layer":
        return F.layer_norm(out, out.shape[-1:], module.norm_weight, module.norm_bias, module.eps)
    return out if module.norm is None else F.rms_norm(out, out.shape[-1:], module.norm_weight, module.eps)


OPTIONS: dict[str, dict[str, Any]] = {
    "projected, all embeddings": dict(in_dims=(7, None, 5), max_lengths=(9, None, 4)),
    "plain": {},
    "rms, no types": dict(norm="rms", type_embedding=False, max_lengths=(8, 8, 8)),
    "no norm, no bias": dict(in_dims=(3, 4, 5), norm=None, bias=False),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_output_and_gradients_equal_plain_torch(options: str, backend: str) -> None:
    module = TokenFusionEmbedding(3, 12, **OPTIONS[options])
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    widths = OPTIONS[options].get("in_dims", (None,) * 3)
    xs = [torch.randn(2, n, w or 12, requires_grad=True) for n, w in zip((8, 1, 4), widths, strict=True)]
    leaves = [*xs, *module.parameters()]
    ours, want = module(xs), plain(module, xs)
    torch.testing.assert_close(ours, want)
    grads = (torch.autograd.grad(y.sin().sum(), leaves) for y in (ours, want))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_new_parameters_are_those_of_the_usual_initialisation() -> None:
    torch.manual_seed(0)
    module = TokenFusionEmbedding(2, 64, max_lengths=(50, None), in_dims=(None, 8), dtype=torch.float64)
    names = {name: p for name, p in module.named_parameters()}
    assert set(names) == {
        "type_embedding",
        "position_embedding_0",
        "norm_weight",
        "norm_bias",
        "projections.1.weight",
        "projections.1.bias",
    }
    assert all(p.dtype == torch.float64 for p in names.values())
    assert 0.015 < float(names["position_embedding_0"].detach().std()) < 0.025
    assert torch.equal(module.norm_weight, torch.ones(64).double())
    copy = TokenFusionEmbedding(2, 64, max_lengths=(50, None), in_dims=(None, 8), dtype=torch.float64)
    copy.load_state_dict(module.state_dict())
    xs = [torch.randn(2, 50, 64).double(), torch.randn(2, 3, 8).double()]
    assert torch.equal(copy(xs), module(xs))


def test_autocast_promotes_projections_to_the_embeddings() -> None:
    module = TokenFusionEmbedding(2, 16, in_dims=(4, 4))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = module([torch.randn(1, 3, 4), torch.randn(1, 2, 4)])
    assert out.dtype == torch.float32


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match="num_modalities: expected at least 1; got 0"):
        TokenFusionEmbedding(0, 8)
    with pytest.raises(ValueError, match="in_dims: expected 2 entries; got 1"):
        TokenFusionEmbedding(2, 8, in_dims=(3,))
    with pytest.raises(ValueError, match="norm: expected None, 'layer' or 'rms'; got 'batch'"):
        TokenFusionEmbedding(2, 8, norm="batch")  # type: ignore[arg-type]
    module = mmk.nn.TokenFusionEmbedding(2, 8, max_lengths=(3, 3))
    with pytest.raises(ValueError, match="xs: expected 2 tensors; got 1"):
        module([torch.randn(1, 2, 8)])
    with pytest.raises(ValueError, match=r"xs\[1\]: expected at most 3 tokens; got 4"):
        module([torch.randn(1, 2, 8), torch.randn(1, 4, 8)])
