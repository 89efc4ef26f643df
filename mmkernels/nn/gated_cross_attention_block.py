"""A cross-attention block whose branches open from zero, over `cross_attention` and the concatenation ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels._overrides import leaf_of_traces
from mmkernels.nn._arguments import check_sizes
from mmkernels.nn._children import is_plain
from mmkernels.ops._checks import autocast_is_on
from mmkernels.ops._fusion_checks import Activation, check_activation
from mmkernels.ops.concat_linear import concat_linear
from mmkernels.ops.concat_linear.reference import activate
from mmkernels.ops.concat_norm_linear import concat_norm_linear
from mmkernels.ops.cross_attention import cross_attention

__all__ = ["GatedCrossAttentionBlock"]


class GatedCrossAttentionBlock(nn.Module):
    """Tokens look at another modality and go through a feed-forward layer, both behind a gate that starts closed.

        x ← x + tanh(attention_gate) · W_o · attention(norm(x), context)
        x ← x + tanh(feedforward_gate) · W_2 · act(W_1 · norm(x))

    The block that Flamingo puts between the layers of a frozen language model (Alayrac et al., "Flamingo: a Visual
    Language Model for Few-Shot Learning", 2022, arXiv:2204.14198): new, it returns its input bit for bit. Norm, linear
    layer and activation are one op, and so are the last linear layer of a branch, its gate and the residual.

    Args:
        embed_dim: E, features of the tokens.
        num_heads: H.
        context_dim: C, features of the context; None = E.
        head_dim: D; None = E / H.
        feedforward_dim: features of the hidden layer; None = 4 E; 0 = no feed-forward branch.
        bias: whether linear layers have biases. Without them a token that may attend to nothing keeps its value.
        activation: of the hidden layer, as in `concat_linear`.
        eps: of the layer norms.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> block = GatedCrossAttentionBlock(512, 8, context_dim=1024)
        >>> text, image = torch.randn(2, 77, 512), torch.randn(2, 576, 1024)
        >>> block(text, image).shape
        torch.Size([2, 77, 512])
    """

    feedforward_gate: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        head_dim: int | None = None,
        feedforward_dim: int | None = None,
        bias: bool = False,
        activation: Activation | None = "gelu",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"context_dim": context_dim, "head_dim": head_dim, "feedforward_dim": feedforward_dim}
        check_sizes("GatedCrossAttentionBlock", **{name: size for name, size in sizes.items() if size is not None})
        check_sizes("GatedCrossAttentionBlock", 1, embed_dim=embed_dim, num_heads=num_heads)
        check_activation("GatedCrossAttentionBlock", activation)
        if head_dim is None:
            if embed_dim % num_heads != 0:
                expected = f"a multiple of num_heads, {num_heads} (or head_dim)"
                raise ValueError(f"GatedCrossAttentionBlock: embed_dim: expected {expected}; got {embed_dim}")
            head_dim = embed_dim // num_heads
        context_dim = embed_dim if context_dim is None else context_dim
        hidden = 4 * embed_dim if feedforward_dim is None else feedforward_dim
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.activation = activation
        width = num_heads * head_dim

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(embed_dim, eps, device=device, dtype=dtype)

        def gate() -> nn.Parameter:
            return nn.Parameter(torch.zeros((), device=device, dtype=dtype))

        self.norm = norm()
        self.query_proj = linear(embed_dim, width)
        self.key_value_proj = linear(context_dim, 2 * width)
        self.out_proj = linear(width, embed_dim)
        self.attention_gate = gate()
        self.feedforward_norm = norm() if hidden else None
        self.feedforward_in = linear(embed_dim, hidden) if hidden else None
        self.feedforward_out = linear(hidden, embed_dim) if hidden else None
        self.register_parameter("feedforward_gate", gate() if hidden else None)

    def reset_parameters(self) -> None:
        """Linear layers and norms as torch's own, gates closed."""
        for module in self.children():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
        for gate in (self.attention_gate, self.feedforward_gate):
            if gate is not None:
                nn.init.zeros_(gate)

    @leaf_of_traces
    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        key_lengths: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """The tokens after both branches.

        Args:
            x: (B, L, E).
            context: (B, Lc, C).
            key_lengths: (B,) int, as in `cross_attention`: context at and beyond the length is padding.
            attn_mask: as in `cross_attention`, broadcastable to (B, H, L, Lc): which tokens see which context.

        Returns:
            (B, L, E).

        Raises:
            ValueError, TypeError, RuntimeError: as `cross_attention` and `concat_linear`.
        """
        heads = (self.num_heads, self.head_dim)
        query = self._normed_linear(x, self.norm, self.query_proj, None).unflatten(-1, heads)
        key, value = self.key_value_proj(context).unflatten(-1, (2, *heads)).unbind(2)  # [B, Lc, H, D]
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        attended = cross_attention(q, k, v, key_lengths=key_lengths, attn_mask=attn_mask).transpose(1, 2).flatten(2)
        x = self._add_gated(x, attended, self.out_proj, self.attention_gate)
        if self.feedforward_norm is None or self.feedforward_in is None or self.feedforward_out is None:
            return x
        hidden = self._normed_linear(x, self.feedforward_norm, self.feedforward_in, self.activation)
        assert self.feedforward_gate is not None
        return self._add_gated(x, hidden, self.feedforward_out, self.feedforward_gate)

    @staticmethod
    def _normed_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear, activation: Activation | None) -> Tensor:
        if not is_plain(linear, nn.Linear):
            return activate(linear(norm(x)), activation)
        weight, bias = linear.weight, linear.bias
        if not is_plain(norm, nn.LayerNorm) or norm.weight is None:
            return concat_linear([norm(x)], weight, bias, activation=activation)
        return concat_norm_linear([x], norm.weight, norm.bias, weight, bias, eps=norm.eps, activation=activation)

    @staticmethod
    def _add_gated(x: Tensor, branch: Tensor, linear: nn.Linear, gate: Tensor) -> Tensor:
        """x + tanh(gate) · linear(branch); under autocast by torch, which leaves x in its wider dtype."""
        if autocast_is_on(x.device) or not is_plain(linear, nn.Linear):
            return x + torch.tanh(gate) * linear(branch)
        return concat_linear([branch], linear.weight, linear.bias, residual=x, gate=gate)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, activation={self.activation!r}"
