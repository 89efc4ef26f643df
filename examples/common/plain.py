"""The ops of the examples as one would write them in torch, with mmkernels' names and arguments."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def activated(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else getattr(F, activation)(y)


def concat_linear(xs, weight, bias=None, *, activation=None, presence=None):
    if presence is not None:
        xs = [x.masked_fill(~presence[..., i, None], 0) for i, x in enumerate(xs)]
    return activated(F.linear(torch.cat(xs, -1), weight, bias), activation)


def concat_norm_linear(xs, norm_weight, norm_bias, weight, bias=None, *, activation=None):
    x = torch.cat(xs, -1)
    return activated(F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), weight, bias), activation)


def gated_fusion(xs, value_weights, value_biases, gate_weight, gate_bias=None, *, presence=None):
    """Gated multimodal unit of more than two modalities: a softmax over them, feature by feature."""
    if presence is not None:
        xs = [x.masked_fill(~presence[..., i, None], 0) for i, x in enumerate(xs)]
    values = torch.stack(
        [torch.tanh(F.linear(*args)) for args in zip(xs, value_weights, value_biases, strict=True)], -2
    )
    gates = F.linear(torch.cat(xs, -1), gate_weight, gate_bias)
    if len(xs) == 2:
        z = gates.sigmoid()
        return z * values[..., 0, :] + (1 - z) * values[..., 1, :]
    gates = gates.unflatten(-1, (len(xs), -1))
    if presence is not None:
        gates = gates.masked_fill(~presence[..., None], -torch.inf)
    return (gates.softmax(-2) * values).sum(-2)


def gated_concat(x, y, weight, bias=None):
    gated = torch.cat([x, y], -1).matmul(weight.T).add(0 if bias is None else bias).sigmoid() * x
    return torch.cat([gated, y, gated.sum(-1, keepdim=True)], -1)


def with_one(x: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(x[..., :1]), x], -1)


def low_rank_fusion(xs, factors, rank_weights, bias=None):
    products = [torch.einsum("bd,rdn->brn", with_one(x), factor) for x, factor in zip(xs, factors, strict=True)]
    y = torch.einsum("r,brn->bn", rank_weights, reduce(torch.mul, products))
    return y if bias is None else y + bias


def tensor_fusion_linear(xs, weight, bias=None):
    outer = reduce(lambda a, b: (a[:, :, None] * b[:, None, :]).flatten(1), [with_one(x) for x in xs])
    return F.linear(outer, weight, bias)


def bilinear_fusion(x, y, x_weight, y_weight, *, out_weight=None, out_bias=None, rank=1):
    z = (F.linear(x, x_weight) * F.linear(y, y_weight)).unflatten(-1, (-1, rank)).sum(-1)
    return z if out_weight is None else F.linear(z, out_weight, out_bias)


def valid(lengths: Tensor, size: int) -> Tensor:
    """(B,) -> (B, 1, 1, size), True before each length."""
    return (torch.arange(size) < lengths[:, None])[:, None, None]


def cross_attention(query, key, value, *, attn_mask=None, key_lengths=None, is_causal=False):
    if key_lengths is not None:
        attn_mask = valid(key_lengths, key.shape[-2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal)


def joint_attention(queries, keys, values, *, key_lengths=None):
    key, value, mask = torch.cat(keys, -2), torch.cat(values, -2), None
    if key_lengths is not None:
        parts = zip(keys, key_lengths, strict=True)
        full = [torch.full((len(k),), k.shape[-2]) if n is None else n for k, n in parts]
        mask = torch.cat([valid(n, k.shape[-2]) for k, n in zip(keys, full, strict=True)], -1)
    joined = F.scaled_dot_product_attention(torch.cat(queries, -2), key, value, mask)
    return joined.split([q.shape[-2] for q in queries], -2)


def bidirectional_cross_attention(x_query, y_key, x_value, y_value):
    scores = x_query @ y_key.mT / x_query.shape[-1] ** 0.5
    return scores.softmax(-1) @ y_value, scores.mT.softmax(-1) @ x_value


def pooled(xs: Tensor, scores: Tensor, presence: Tensor | None) -> tuple[Tensor, Tensor]:
    if presence is not None:
        scores = scores.masked_fill(~presence, -torch.inf)
    weights = scores.softmax(1)
    return (weights[..., None] * xs).sum(1), weights


def additive_attention_pool(xs, weight, vector, *, bias=None, presence=None):
    return pooled(xs, torch.tanh(F.linear(xs, weight, bias)) @ vector, presence)


def multiplicative_attention_pool(xs, query, *, weight=None, scale=None, presence=None):
    keys = xs if weight is None else F.linear(xs, weight)
    return pooled(xs, (keys @ query[..., None]).squeeze(-1) * (scale or xs.shape[-1] ** -0.5), presence)


def split_attention_pool(xs, weight1, bias1, weight2, bias2):
    logits = F.linear(F.relu(F.linear(xs.sum(1), weight1, bias1)), weight2, bias2)
    weights = logits.view(xs.shape).softmax(1)
    return (weights * xs).sum(1), weights


def decision_fusion(logits, weights=None, *, method="mean"):
    logits = torch.stack(logits, 1)  # [B, M, C]
    count = logits.shape[1]
    weights = torch.full((count,), 1 / count) if weights is None else weights
    log_p = logits.log_softmax(-1)
    if method == "mean":
        return torch.einsum("m,bmc->bc", weights, log_p.exp())
    if method == "log":
        return torch.einsum("m,bmc->bc", weights, log_p).softmax(-1)
    if method == "product":
        return log_p.sum(1).softmax(-1)
    if method == "max":
        return F.normalize(log_p.exp().amax(1), p=1, dim=-1)
    votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return torch.einsum("m,bmc->bc", weights, votes)


def multimodal_cross_entropy(logits, labels, *, weights=None, log_vars=None, robust=None, q=0.7, modulation=None):
    if modulation is not None:  # the value of the logits, a share of their gradient
        logits = [m * z + (1 - m) * z.detach() for m, z in zip(modulation, logits, strict=True)]
    if robust == "gce":
        picked = [z.softmax(-1).gather(-1, labels[:, None]).squeeze(-1) for z in logits]
        each = torch.stack([((1 - p**q) / q).mean() for p in picked])
    else:
        each = torch.stack([F.cross_entropy(z, labels) for z in logits])
    if log_vars is not None:
        return ((-log_vars).exp() * each + log_vars).sum(), each
    return (each if weights is None else weights * each).sum(), each


def contrastive_loss(x, y, logit_scale, *, labels=None):
    logits = logit_scale * x @ y.mT
    same = torch.eye(len(x)) if labels is None else (labels[:, None] == labels).to(x.dtype)
    same = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.mT, same)) / 2


def distillation_loss(student, teacher, *, temperature=1.0):
    student, teacher = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(student, teacher.detach(), reduction="batchmean", log_target=True)
