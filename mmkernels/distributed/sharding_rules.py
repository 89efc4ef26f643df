"""Along which dims the arguments of each op may be sharded: one table, by the names of dims.

``RULES[op].inputs`` says the dims of each tensor argument, those of a list's tensors alike, as words; where an argument
comes with several numbers of dims, by that number. A word that stands for the same dim stands in all of them, ``*`` for
any number of dims that all tensors share. A dim of size 1 broadcasts and is not sharded. The dims in ``free`` are
independent of one another: their shards are computed apart, and every output has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Dims = str | dict[int, str]

FEATURES = ("k", "w")  # what a product sums over, where a rule says so: those of each source, the weight's columns


def _none(given: Mapping[str, Any]) -> str:
    return ""


@dataclass(frozen=True)
class Rule:
    """One op.

    Args:
        inputs: dims of the arguments.
        outputs: dims of the results, one after another, by their number too; those of a list alike.
        free: dims that may be sharded.
        even: those of them that all ranks must have equal parts of.
        summed: dims over shards of which the result is a sum, as `partial_sums` says.
        group: a dim that the op itself spreads over a process group, its ``group=``.
        bound: ``(arguments)`` -> dims that are not free under these options.
    """

    inputs: dict[str, Dims]
    outputs: tuple[Dims, ...]
    free: str = ""
    even: str = ""
    summed: str = ""
    group: str = ""
    bound: Callable[[Mapping[str, Any]], str] = _none

    def for_call(self, given: Mapping[str, Any]) -> Rule:
        """The rule for these arguments: the features of a single source lie as the columns of the weight."""
        if "w" not in self.summed or not isinstance(given["xs"], (list, tuple)) or len(given["xs"]) != 1:
            return self
        return replace(self, inputs={**self.inputs, "xs": "* w"}, summed="w")


def _bound_by_order(given: Mapping[str, Any]) -> str:
    """Queries have no positions of their own once they are sharded."""
    return "q" if given.get("is_causal") or given.get("window") is not None else ""


def _bound_by_folding(given: Mapping[str, Any]) -> str:
    """Leading dims that broadcast are folded as a whole."""
    inputs = [given[name] for name in ("query", "key", "value")]
    same = all(x.dim() == 4 and x.shape[0] == inputs[0].shape[0] for x in inputs)
    return _bound_by_order(given) if same else "b h g q"


_PRESENCE: Dims = {1: "m", 2: "b m"}
_ATTENTION: dict[str, Dims] = {
    "query": "b h q d",
    "key": "b g k d",
    "value": "b g k e",
    "attn_mask": {2: "q k", 3: "h q k", 4: "b h q k"},
}
_POOL: dict[str, Dims] = {"xs": {2: "b d", 3: "b m d"}, "presence": _PRESENCE}

RULES: dict[str, Rule] = {
    "cross_attention": Rule(
        {
            **_ATTENTION,
            "attn_bias": {2: "q k", 3: "h q k", 4: "b h q k"},
            "sinks": "h",
            "key_lengths": "b",
        },
        ("b h q e", "b h q"),
        free="b h q",
        even="h",
        bound=_bound_by_order,
    ),
    "scaled_dot_product_attention": Rule(_ATTENTION, ("b h q e",), free="b h q", even="h", bound=_bound_by_folding),
    "varlen_cross_attention": Rule(
        {"query": "t h d", "key": "s g d", "value": "s g e", "sinks": "h"},
        ("t h e", "t h"),
        free="h",
        even="h",
    ),
    "joint_attention": Rule(
        {
            "queries": "b h q d",
            "keys": "b g k d",
            "values": "b g k e",
            "key_lengths": "b",
            "stream_bias": {2: "x y", 3: "h x y"},
        },
        ("b h q e", "b h q"),
        free="b h",
        even="h",
    ),
    "bidirectional_cross_attention": Rule(
        {
            "x_query": "b h x d",
            "y_key": "b h y d",
            "x_value": "b h x e",
            "y_value": "b h y e",
            "x_mask": "b x",
            "y_mask": "b y",
        },
        ("b h x e", "b h y e"),
        free="b h",
    ),
    "deformable_attention": Rule(
        {
            "value": "b s h d",
            "sampling_locations": {5: "b q h p 2", 6: "b q h l p 2"},
            "attention_weights": {4: "b q h p", 5: "b q h l p"},
            "presence": _PRESENCE,
        },
        ("b q h",),  # the last dim is h·d
        free="b q h",
        even="h",
    ),
    "merge_attention": Rule({"outputs": "* d", "lses": "*"}, ("* d", "*"), free="*"),
    "additive_attention_pool": Rule(
        {**_POOL, "weight": "a d", "vector": "a", "bias": "a", "query": "b c", "query_weight": "a c"},
        ("b d", "b m"),
        free="b",
    ),
    "multiplicative_attention_pool": Rule({**_POOL, "query": "b c", "weight": "c d"}, ("b d", "b m"), free="b"),
    "split_attention_pool": Rule(
        {**_POOL, "weight1": "a d", "bias1": "a", "weight2": "f a", "bias2": "f"}, ("b d", "b m d"), free="b"
    ),
    "concat_linear": Rule(
        {
            "xs": "* k",
            "weight": "n w",
            "bias": "n",
            "presence": "* m",
            "residual": "* n",
            "gate": {0: "", 1: "n"},
        },
        ("* n",),
        free="* n",
        summed="k w",
    ),
    "concat_norm_linear": Rule(
        {"xs": "* k", "norm_weight": "w", "norm_bias": "w", "weight": "n w", "bias": "n"},
        ("* n",),
        free="* n",
        summed="k",
    ),
    "gated_fusion": Rule(
        {
            "xs": "* k",
            "value_weights": "n k",
            "value_biases": "n",
            "gate_weight": "f w",
            "gate_bias": "f",
            "presence": "* m",
        },
        ("* n", "* g"),
        free="*",
    ),
    "gated_concat": Rule({"x": "* k", "y": "* l", "weight": "o w", "bias": "o"}, ("* c",), free="*"),
    "modulated_norm": Rule(
        {
            "x": "b t c",
            "shift": {2: "b c", 3: "b t c"},
            "scale": {2: "b c", 3: "b t c"},
            "norm_weight": "c",
            "norm_bias": "c",
        },
        ("b t c",),
        free="b t",
    ),
    "norm_rotary": Rule(
        {
            "query": {3: "t h d", 4: "b h t d"},
            "key": {3: "t g d", 4: "b g t d"},
            "cos": {2: "t r", 3: "b t r"},
            "sin": {2: "t r", 3: "b t r"},
            "query_weight": "d",
            "key_weight": "d",
        },
        ({3: "t h d", 4: "b h t d"}, {3: "t g d", 4: "b g t d"}),
        free="b h t",
        even="h",
    ),
    "low_rank_fusion": Rule(
        {"xs": "b k", "factors": "r f n", "rank_weights": "r", "bias": "n", "presence": _PRESENCE},
        ("b n",),
        free="b n",
    ),
    "tensor_fusion_linear": Rule(
        {"xs": "b k", "weight": "n w", "bias": "n", "presence": _PRESENCE}, ("b n",), free="b n"
    ),
    "bilinear_fusion": Rule(
        {
            "x": "* k",
            "y": "* l",
            "x_weight": "r k",
            "y_weight": "r l",
            "out_weight": "o n",
            "out_bias": "o",
            "presence": "* m",
        },
        ("* o",),
        free="*",
    ),
    "concat_tokens": Rule(
        {
            "xs": "b t c",
            "type_embedding": "m c",
            "position_embeddings": "t c",
            "norm_weight": "c",
            "norm_bias": "c",
        },
        ("b t c",),
        free="b",
    ),
    "merge_embeddings": Rule({"text": "b t c", "modal": "r c", "mask": "b t"}, ("b t c",), free="c"),
    "decision_fusion": Rule(
        {"logits": "b c", "weights": {1: "m", 2: "b m"}, "presence": _PRESENCE}, ("b c",), free="b"
    ),
    "multimodal_cross_entropy": Rule({"logits": "b c", "labels": "b", "presence": _PRESENCE}, ("", "m"), summed="b"),
    "distillation_loss": Rule({"student": "* c", "teacher": "* c", "labels": "*"}, ("",), summed="*"),
    "contrastive_loss": Rule({"x": "n d", "y": "n d", "labels": "n"}, ("",), group="n"),
    "sigmoid_contrastive_loss": Rule({"x": "n d", "y": "n d"}, ("",), group="n"),
}
