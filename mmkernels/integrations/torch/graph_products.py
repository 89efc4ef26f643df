"""Linears in a graph with what comes before and after them: cat, norm, activation, gate and residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mmkernels.integrations._blocks import products_pay
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
from mmkernels.ops.concat_linear import concat_linear
from mmkernels.ops.concat_norm_linear import concat_norm_linear
from mmkernels.ops.merge_embeddings import merge_embeddings
from mmkernels.ops.modulated_norm import modulated_norm

# Elements, or multiplications, below which calling a kernel (15 µs more than one in the compiler's own code) costs more
# than it gains.
_FEWEST_MULTIPLICATIONS = 1 << 26
_FEWEST_MODULATED = 1 << 18
_FEWEST_MERGED = 1 << 15

_ACTIVATIONS = ("gelu", "relu", "silu", "sigmoid", "tanh")


def _activation(node: Any) -> str | None:
    name = op_of(node)
    if name not in _ACTIVATIONS or argument(node, 1, "inplace", False) is True:
        return None
    if name != "gelu":
        return name
    approximate = node.kwargs.get("approximate", "none")
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)


def _norm(node: Any) -> tuple[str, fx.Node, Any, Any, float] | None:
    """Of a norm over the last dim: its kind, input, weight, bias and eps."""
    name = op_of(node)
    if name not in ("layer_norm", "rms_norm"):
        return None
    x, shape = argument(node, 0, "input"), argument(node, 1, "normalized_shape")
    x_value = value(x)
    if x_value is None or len(shape) != 1 or not same_sizes(shape, x_value.shape[-1:]):
        return None
    weight = argument(node, 2, "weight")
    if name == "layer_norm":
        return "layer", x, weight, argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)
    eps = argument(node, 3, "eps")
    return "rms", x, weight, None, torch.finfo(x_value.dtype).eps if eps is None else eps


def product(node: fx.Node) -> Match | None:
    """residual + tanh(gate) · act(linear(norm(cat(xs)))), all but the linear absent or there, and not it alone."""
    inner: list[fx.Node] = []
    residual = gate = activation = None
    x: Any = node
    if op_of(node) == "add" and not is_scaled(node):
        found = _gated(node)
        if found is None:
            return None
        residual, gate, x, inner = found
    if (activation := _activation(x)) is not None:
        inner.append(x)
        x = argument(x, 0, "input")
    if op_of(x) != "linear" or not isinstance(x, fx.Node):
        return None
    if x is not node:
        inner.append(x)
    linear_out = x
    rows, weight, bias = (argument(x, i, name) for i, name in enumerate(("input", "weight", "bias")))
    norm = _norm(rows)
    if norm is not None and residual is None:
        inner.append(rows)
        rows = norm[1]
    else:
        norm = None
    sources = [rows]
    rows_value = value(rows)
    last = () if rows_value is None else (-1, rows_value.dim() - 1)
    if op_of(rows) == "cat" and argument(rows, 1, "dim", 0) in last:
        inner.append(rows)
        sources = list(argument(rows, 0, "tensors"))
    if norm is None and len(sources) == 1 and residual is None:
        return None
    inner = [n for n in inner if n is not node]
    words = [*(["cat"] if len(sources) > 1 else []), *([f"{norm[0]}_norm"] if norm else []), "linear"]
    words += [activation] if activation else []
    words += [*(["gate"] if gate is not None else []), *(["residual"] if residual is not None else [])]
    match = Match(" -> ".join(words), "concat_norm_linear" if norm else "concat_linear", node, inner=inner)
    norm_tensors = () if norm is None else tuple(t for t in norm[2:4] if t is not None)
    optional = [t for t in (bias, residual, gate) if t is not None]
    if (reason := reason_of_tensors([*sources, weight, *norm_tensors, *optional, linear_out, node])) is not None:
        return match.left(reason)
    leading = [v.shape[:-1] for s in sources if (v := value(s)) is not None]
    if any(not same_sizes(leading[0], other) for other in leading):
        return match.left("what is concatenated differs in shape")
    options: dict[str, Any] = {"activation": activation}
    if norm is not None:
        kind, _, norm_weight, norm_bias, eps = norm
        options |= {"norm": kind, "eps": eps}

        def call(graph: fx.Graph) -> fx.Node:
            g = norm_weight
            if g is None:
                w = value(weight)
                assert w is not None
                g = graph.call_method("new_ones", (weight, (w.shape[1],)))
            return graph.call_function(concat_norm_linear, (sources, g, norm_bias, weight, bias), options)

    else:
        options |= {"residual": residual}
        gate_value = value(gate)

        def call(graph: fx.Graph) -> fx.Node:
            options["gate"] = gate
            if gate_value is not None and gate_value.numel() == 1:
                options["gate"] = graph.call_method("reshape", (gate, ()))
            return graph.call_function(concat_linear, (sources, weight, bias), options)

    match.call = call
    match.slower = _slower(match, sources, weight, norm is not None, activation, gate is not None)
    return match


def _slower(
    match: Match, sources: list[Any], weight: Any, normed: bool, activation: str | None, gated: bool
) -> str | None:
    """Measured compiled on one AMD Zen 4 core, (576, 1152) x (1152, 768): cat -> norm -> linear 1.04 … 1.10 times
    torch's speed, cat -> linear 1.02 … 1.10, but not training in bfloat16, gate and residual 1.03 and not in training;
    norm -> linear 0.95 … 1.03."""
    x, w = value(sources[0]), value(weight)
    assert x is not None and w is not None
    if not products_pay() or x.dtype == torch.float16:
        return "slower here: its products"
    if normed and len(sources) == 1:
        if activation is None or trains(match.root) or x.dtype != torch.bfloat16:
            return "no faster here"
    elif not normed and trains(match.root) and (gated or x.dtype == torch.bfloat16):
        return "no faster here"
    return too_small(rows_of(x) * size(w.shape[0]) * size(w.shape[1]), _FEWEST_MULTIPLICATIONS)


def _gated(node: fx.Node) -> tuple[Any, Any, Any, list[fx.Node]] | None:
    """Of x + tanh(g) · y: x, g, y and the nodes between."""
    out = value(node)
    for x, y in (tuple(node.args), tuple(node.args)[::-1]):
        x_value = value(x)
        if out is None or x_value is None or not same_sizes(x_value.shape, out.shape):
            continue
        if op_of(y) == "mul" and not is_scaled(y):  # type: ignore[arg-type]
            for gate, branch in (tuple(y.args), tuple(y.args)[::-1]):  # type: ignore[union-attr]
                g = value(argument(gate, 0, "input")) if op_of(gate) == "tanh" else None  # type: ignore[arg-type]
                if g is not None and ((g.numel() == 1 and g.dim() <= 1) or same_sizes(g.shape, out.shape[-1:])):
                    return x, argument(gate, 0, "input"), branch, [y, gate]  # type: ignore[arg-type, list-item]
    return None


def modulated(node: fx.Node) -> Match | None:
    """norm(x) · (1 + scale) + shift"""
    if op_of(node) != "add" or is_scaled(node):
        return None
    for product_, shift in (tuple(node.args), tuple(node.args)[::-1]):
        if op_of(product_) != "mul" or is_scaled(product_):  # type: ignore[arg-type]
            continue
        for normed, factor in (tuple(product_.args), tuple(product_.args)[::-1]):  # type: ignore[union-attr]
            norm = _norm(normed)
            scale = _one_plus(factor)
            if norm is None or scale is None:
                continue
            return _modulated(node, norm, shift, scale, [product_, normed, factor])  # type: ignore[list-item]
    return None


def _one_plus(node: Any) -> Any:
    if op_of(node) != "add" or is_scaled(node):
        return None
    for one, scale in (tuple(node.args), tuple(node.args)[::-1]):
        if number(one) == 1.0:
            return scale
    return None


def _modulated(node: fx.Node, norm: Any, shift: Any, scale: Any, inner: list[fx.Node]) -> Match:
    kind, x, weight, bias, eps = norm
    match = Match(f"{kind}_norm -> scale -> shift", "modulated_norm", node, inner=inner)
    tensors = [t for t in (x, shift, scale, weight, bias, node) if t is not None]
    if (reason := reason_of_tensors(tensors)) is not None:
        return match.left(reason)
    x_value = value(x)
    assert x_value is not None
    if x_value.dim() != 3 or not all(_conditions(value(t), x_value) for t in (shift, scale)):
        return match.left("not (B, L, C) with a shift and a scale (B, 1 or L, C)")
    options = {"norm": kind, "norm_weight": weight, "norm_bias": bias, "eps": eps}
    match.call = lambda graph: graph.call_function(modulated_norm, (x, shift, scale), options)
    if trains(node) and x_value.dtype == torch.float32:
        match.slower = "slower here: training in float32"
    else:
        match.slower = too_small(rows_of(x_value) * size(x_value.shape[-1]), _FEWEST_MODULATED)
    return match


def _conditions(t: Tensor | None, x: Tensor) -> bool:
    if t is None or t.dim() != 3 or not same_sizes(t.shape[-1:], x.shape[-1:]):
        return False
    return all(n == 1 or same_sizes((n,), (m,)) for n, m in zip(t.shape[:2], x.shape[:2], strict=True))


def merged(node: fx.Node) -> Match | None:
    """text.masked_scatter(mask[..., None].expand_as(text), features)"""
    if op_of(node) != "masked_scatter":
        return None
    match = Match("masked_scatter", "merge_embeddings", node)
    text, mask, features = (argument(node, i, n) for i, n in enumerate(("input", "mask", "source")))
    if (reason := reason_of_tensors((text, features), (mask,))) is not None:
        return match.left(reason)
    while op_of(mask) in ("expand", "to"):
        mask = mask.args[0]
    x, m, rows = value(text), value(mask), value(features)
    is_row_mask = op_of(mask) == "unsqueeze" and argument(mask, 1, "dim") in (-1, 2) and m is not None and m.dim() == 3
    if x is None or rows is None or x.dim() != 3 or not is_row_mask:
        return match.left("the mask is not one of whole rows (B, L)")
    mask = mask.args[0]
    of_rows, width = value(mask), x.shape[-1:]
    if of_rows is None or of_rows.dtype != torch.bool or not same_sizes(of_rows.shape, x.shape[:2]):
        return match.left("the mask is not one of whole rows (B, L)")
    if rows.dim() < 2 or not same_sizes(rows.shape[-1:], width):
        return match.left("the features are not rows (T, C)")

    def call(graph: fx.Graph) -> fx.Node:
        flat = features if rows.dim() == 2 else graph.call_method("flatten", (features, 0, -2))
        return graph.call_function(merge_embeddings, (text, flat, mask), {"check": False})

    match.call = call
    match.slower = too_small(rows_of(x) * size(x.shape[-1]), _FEWEST_MERGED)
    return match
