"""Attention in a graph: ``F.scaled_dot_product_attention``, and a softmax between two products written by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from mmkernels.integrations.torch.graph_nodes import (
    Match,
    argument,
    is_scaled,
    number,
    op_of,
    reason_of_tensors,
    rows_of,
    same_sizes,
    size,
    too_small,
    trains,
    value,
)
from mmkernels.ops.cross_attention import cross_attention, scaled_dot_product_attention

_FEWEST_PRODUCTS = 1 << 23
_FEW_QUERIES = 12  # of which a tile has too little to do, in float32


def sdpa(node: fx.Node) -> Match | None:
    if op_of(node) != "scaled_dot_product_attention":
        return None
    match = Match("scaled_dot_product_attention", "cross_attention", node)
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {name: node.args[i] for i, name in enumerate(names[: len(node.args)])} | dict(node.kwargs)
    if given.get("dropout_p", 0.0) != 0.0:
        return match.left("dropout")
    query, key, value_, mask = (given.get(name) for name in names[:4])
    if (reason := reason_of_tensors((query, key, value_), () if mask is None else (mask,))) is not None:
        return match.left(reason)
    q, k = value(query), value(key)
    assert q is not None and k is not None
    match.slower = _slower(match, q, k)
    match.call = lambda graph: graph.call_function(scaled_dot_product_attention, (), given)
    return match


def _slower(match: Match, query: Tensor, key: Tensor) -> str | None:
    """Measured compiled on one AMD Zen 4 core, (2, 8, 256, 64): 1.2 … 1.6 times torch's speed in float32, 1.2 … 2.8 in
    bfloat16, forward and training; a call costs 15 µs more than one in the compiler's own code."""
    lengths = size(query.shape[-2]), size(key.shape[-2])
    few = trains(match.root) and query.dtype == torch.float32 and lengths[0] <= _FEW_QUERIES
    if few and lengths[1] > 4 * lengths[0]:
        return "slower here: few queries in float32"
    return too_small(rows_of(query) * lengths[1] * size(query.shape[-1]), _FEWEST_PRODUCTS)


def by_hand(node: fx.Node) -> Match | None:
    """softmax(scale · QKᵀ + masks) V, of (B, H, L, D) or (B, L, D), the scale on the product and before the masks."""
    if op_of(node) != "matmul" or len(node.args) != 2:
        return None
    weights, values = node.args
    inner: list[fx.Node] = []
    while isinstance(weights, fx.Node) and op_of(weights) in ("dropout", "to"):
        inner.append(weights)
        weights = weights.args[0]
    if op_of(weights) != "softmax" or not isinstance(weights, fx.Node):
        return None
    match = Match("softmax attention", "cross_attention", node, inner=[*inner, weights])
    for between in inner:
        if op_of(between) == "dropout" and argument(between, 1, "p", 0.5) and argument(between, 2, "training", True):
            return match.left("dropout")
    steps = _scores(match, argument(weights, 0, "input"))
    if steps is None:
        return None if match.reason is None else match
    query, keys, scale, hides, bias = steps
    out, scores = value(node), value(match.inner[-1])
    masks = [m for m in (hides, bias) if m is not None]
    reason = reason_of_tensors((query, keys, values, node, *([] if bias is None else [bias])), [*masks, weights])
    if reason is not None or out is None or scores is None:
        return match.left(reason or "the sizes of an argument are not known")
    if argument(weights, 1, "dim") not in (-1, scores.dim() - 1):
        return match.left("the softmax is not over the keys")
    q, k, v = value(query), value(keys), value(values)
    assert q is not None and k is not None and v is not None
    alike = q.dim() == k.dim() == v.dim() and q.dim() in (3, 4)
    if not alike or not (same_sizes(q.shape[:-2], k.shape[:-2]) and same_sizes(q.shape[:-2], v.shape[:-2])):
        return match.left("not (B, H, L, D) or (B, L, D) of one batch and as many heads")
    if k.stride(-2) != 1 and size(k.shape[-2]) > 1:
        return match.left("the keys are not a transposed view")
    if any(m is not None and not _broadcasts(m, scores) for m in map(value, masks)):
        return match.left("a mask is larger than the scores")

    def call(graph: fx.Graph) -> fx.Node:
        k_rows = graph.call_method("transpose", (keys, -2, -1))
        given = [query, k_rows, values]
        options: dict[str, Any] = {"scale": scale}
        if hides is not None:
            options["attn_mask"] = graph.call_method("logical_not", (hides,))
        if bias is not None:
            options["attn_bias"] = bias
        if q.dim() == 3:
            given = [graph.call_method("unsqueeze", (x, 1)) for x in given]
            for name, mask in (("attn_mask", hides), ("attn_bias", bias)):
                if mask is not None and (m := value(mask)) is not None and m.dim() == 3:
                    options[name] = graph.call_method("unsqueeze", (options[name], 1))
        attended = graph.call_function(cross_attention, tuple(given), options)
        return attended if q.dim() == 4 else graph.call_method("squeeze", (attended, 1))

    match.call = call
    match.slower = _slower(match, q, k.transpose(-2, -1))
    return match


def _broadcasts(mask: Tensor, scores: Tensor) -> bool:
    if not 2 <= mask.dim() <= scores.dim():
        return False
    pairs = zip(mask.shape[::-1], scores.shape[::-1], strict=False)
    return all(m == 1 or same_sizes((m,), (s,)) for m, s in pairs)


def _scores(match: Match, node: Any) -> tuple[Any, Any, float, Any, Any] | None:
    """What the scores before a softmax are made of: Q, Kᵀ, the scale, a mask of what is hidden, one that is added.

    None where it is no attention, or where the match says why not. The last of the inner nodes is the product.
    """
    hides = bias = None
    scale = 1.0
    while True:
        name = op_of(node)
        if name not in ("matmul", "mul", "div", "add", "masked_fill", "to"):
            return None
        match.inner.append(node)
        if name == "to":
            node = node.args[0]
            continue
        if name == "matmul":
            return node.args[0], node.args[1], scale, hides, bias
        if scale != 1.0 and name in ("add", "masked_fill"):
            match.left("the scale comes after a mask")
            return None
        if name == "masked_fill":
            filled = number(argument(node, 2, "value"))
            if filled != -math.inf:
                match.left("masked_fill with a finite value: a row where all is hidden attends to all")
                return None
            if hides is not None or value(argument(node, 1, "mask")) is None:
                match.left("several masks of one kind")
                return None
            hides = argument(node, 1, "mask")
            node = argument(node, 0, "input")
            continue
        if is_scaled(node):
            return None
        a, b = node.args
        if name == "add":
            if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
                return None
            if op_of(b) in ("matmul", "mul", "div") and op_of(a) not in ("matmul", "mul", "div", "masked_fill", "add"):
                a, b = b, a
            if bias is not None:
                match.left("several masks of one kind")
                return None
            node, bias = a, b
            continue
        if name == "mul" and number(a) is not None:
            a, b = b, a
        factor = number(b)
        if factor is None or factor == 0.0 or not math.isfinite(factor):
            return None
        scale = scale * factor if name == "mul" else scale / factor
        node = a
