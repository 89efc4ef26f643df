"""The input layer of a single-stream multimodal transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmkernels._overrides import leaf_of_traces
from mmkernels.nn._arguments import check_sizes
from mmkernels.ops.concat_tokens import concat_tokens

_EMBEDDING_STD = 0.02  # as BERT and ViT initialise theirs


class TokenFusionEmbedding(nn.Module):
    """Tokens of several modalities as one sequence: project, add type and position embeddings, normalise.

    Args:
        num_modalities: M, how many token sequences a call takes.
        embed_dim: C, features of every token of the result.
        in_dims: features of each modality's tokens, which a linear layer takes to ``embed_dim``; None (the whole list
            or an entry): they have ``embed_dim`` already and are taken as they are.
        max_lengths: for each modality, how many positions have a learned embedding; None (the whole list or an entry):
            no position embedding.
        type_embedding: learn one vector per modality, added to its tokens.
        norm: of the tokens: "layer", "rms" or None.
        bias: of the projections and of the layer norm.
        eps: of the norm.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> embed = TokenFusionEmbedding(2, 768, in_dims=(None, 1024), max_lengths=(64, 196))
        >>> embed([torch.randn(8, 40, 768), torch.randn(8, 196, 1024)]).shape
        torch.Size([8, 236, 768])
    """

    def __init__(
        self,
        num_modalities: int,
        embed_dim: int,
        *,
        in_dims: Sequence[int | None] | None = None,
        max_lengths: Sequence[int | None] | None = None,
        type_embedding: bool = True,
        norm: Literal["layer", "rms"] | None = "layer",
        bias: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("TokenFusionEmbedding", num_modalities=num_modalities, embed_dim=embed_dim)
        if num_modalities < 1:
            raise ValueError(f"TokenFusionEmbedding: num_modalities: expected at least 1; got {num_modalities}")
        for name, given in (("in_dims", in_dims), ("max_lengths", max_lengths)):
            if given is not None and len(given) != num_modalities:
                raise ValueError(f"TokenFusionEmbedding: {name}: expected {num_modalities} entries; got {len(given)}")
        if norm not in (None, "layer", "rms"):
            raise ValueError(f"TokenFusionEmbedding: norm: expected None, 'layer' or 'rms'; got {norm!r}")
        self.num_modalities = num_modalities
        self.embed_dim = embed_dim
        self.norm = norm
        self.eps = eps

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.projections = nn.ModuleList(
            nn.Identity() if width is None else nn.Linear(width, embed_dim, bias=bias, device=device, dtype=dtype)
            for width in in_dims or (None,) * num_modalities
        )
        self.type_embedding = parameter(num_modalities, embed_dim) if type_embedding else None
        for i, length in enumerate(max_lengths or (None,) * num_modalities):
            table = None if length is None else parameter(length, embed_dim)
            self.register_parameter(f"position_embedding_{i}", table)
        self.norm_weight = parameter(embed_dim) if norm else None
        self.norm_bias = parameter(embed_dim) if norm == "layer" and bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in self.projections:
            if isinstance(projection, nn.Linear):
                projection.reset_parameters()
        for embedding in (self.type_embedding, *self._position_tables()):
            if embedding is not None:
                nn.init.normal_(embedding, std=_EMBEDDING_STD)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)
        if self.norm_bias is not None:
            nn.init.zeros_(self.norm_bias)

    def extra_repr(self) -> str:
        return f"{self.num_modalities}, {self.embed_dim}, norm={self.norm!r}, eps={self.eps}"

    @leaf_of_traces
    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        """The sequence of all tokens.

        Args:
            xs: one tensor (B, L_i, in_dims[i]) per modality; L_i at most max_lengths[i].

        Returns:
            (B, Σ L_i, embed_dim).
        """
        if len(xs) != self.num_modalities:
            raise ValueError(f"TokenFusionEmbedding: xs: expected {self.num_modalities} tensors; got {len(xs)}")
        tokens = [projection(x) for projection, x in zip(self.projections, xs, strict=True)]
        positions: list[Tensor | None] = []
        for i, (x, table) in enumerate(zip(tokens, self._position_tables(), strict=True)):
            if table is not None and x.shape[1] > table.shape[0]:
                raise ValueError(
                    f"TokenFusionEmbedding: xs[{i}]: expected at most {table.shape[0]} tokens; got {x.shape[1]}"
                )
            positions.append(None if table is None else table[: x.shape[1]])
        return concat_tokens(
            tokens,
            type_embedding=self.type_embedding,
            position_embeddings=positions,
            norm=self.norm,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            eps=self.eps,
        )

    def _position_tables(self) -> list[nn.Parameter | None]:
        return [getattr(self, f"position_embedding_{i}") for i in range(self.num_modalities)]
