"""``torch.compile`` with this library's ops: a pass over the graph before gradients are taken of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from mmkernels import _native
from mmkernels.integrations._report import Entry, Report
from mmkernels.integrations.torch import graph_attention, graph_products
from mmkernels.integrations.torch.graph_nodes import Match, reason_of_span

__all__ = ["GraphPass", "graph_pass"]

_PATTERNS: tuple[Callable[[fx.Node], Match | None], ...] = (
    graph_attention.sdpa,
    graph_attention.by_hand,
    graph_products.modulated,
    graph_products.product,
    graph_products.merged,
)


class GraphPass(CustomGraphPass):
    """What `graph_pass` returns.

    Attributes:
        report: one entry for each part of a graph that is a pattern, ``path`` being the name of its last node.
        options: for ``torch.compile(…, options=…)``: the pass runs before the compiler looks into its cache, so that
            the report is whole and what was compiled in another process is found.
    """

    def __init__(self, everywhere: bool) -> None:
        self.report = Report([], _nothing)
        self._everywhere = everywhere
        self._mark = secrets.token_hex()

    @property
    def options(self) -> dict[str, Any]:
        timing = {"pre_grad_pass_timing": "early"} if hasattr(config, "pre_grad_pass_timing") else {}
        return {"pre_grad_custom_pass": self, **timing}

    def __call__(self, graph: fx.Graph) -> None:
        for node in reversed(list(graph.nodes)):
            if node._erased:
                continue
            match = next((m for pattern in _PATTERNS if (m := pattern(node)) is not None), None)
            if match is None:
                continue
            reason = match.reason or reason_of_span(graph, match)
            if reason is None and not self._everywhere:
                reason = _slower(match)
            status = "replaced" if reason is None else "left"
            self.report.entries.append(Entry(node.name, match.what, match.with_, status, reason))  # type: ignore[arg-type]
            if reason is None:
                _replace(graph, match)

    def uuid(self) -> str:
        """One of this pass alone: a graph that another one's compilation had left in the cache would not be in the
        report."""
        return self._mark


def graph_pass(*, everywhere: bool = False) -> GraphPass:
    """A pass for ``torch.compile`` that puts this library's ops in the place of what they fuse.

    ::

        fusing = graph_pass()
        model = torch.compile(model, options=fusing.options)
        model(**inputs)
        print(fusing.report)

    or for a block, ``with torch._inductor.config.patch(fusing.options): ...``. Recognised are

    - ``F.scaled_dot_product_attention``, and softmax(scale · QKᵀ + masks) V written by hand,
    - cat → linear (→ activation), cat → norm → linear (→ activation), norm → linear (→ activation),
    - norm(x) · (1 + scale) + shift, residual + tanh(gate) · linear(x),
    - ``text.masked_scatter(mask[..., None].expand_as(text), features)``,

    of layer and RMS norms, in float32, bfloat16 and float16 on the CPU. What does not mean the same is left, and so is
    what would not be faster on the core at hand: dropout, a node between that is used elsewhere, several dtypes, sizes
    that broadcast otherwise, a change in place in between. Rows where -inf hides every key give 0, as
    ``scaled_dot_product_attention`` does, where a softmax by hand gives NaN.

    Args:
        everywhere: replace also where it is not known to be faster on this core.

    Returns:
        A ``CustomGraphPass`` with a ``report`` of what was replaced and left, and why.
    """
    return GraphPass(everywhere)


def _slower(match: Match) -> str | None:
    """Why the part of a graph is better left to the compiler, on the core at hand."""
    isa = _native.isa()
    return f"slower here: instruction set {isa}" if isa in ("none", "baseline") else match.slower


def _replace(graph: fx.Graph, match: Match) -> None:
    assert match.call is not None
    with graph.inserting_before(match.root):
        new = match.call(graph)
    new.meta.update(match.root.meta)
    match.root.replace_all_uses_with(new)
    for node in (match.root, *_last_first(graph, match.inner)):
        if not node.users:
            graph.erase_node(node)


def _last_first(graph: fx.Graph, nodes: list[fx.Node]) -> list[fx.Node]:
    return [node for node in reversed(list(graph.nodes)) if node in nodes]


def _nothing() -> None:
    """There is nothing to restore: the pass belongs to the graphs it was compiled into."""
