"""Low-rank bilinear pooling of two modalities."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import _native
from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops._products import linear
from mmkernels.ops._rows import as_rows, from_rows
from mmkernels.ops.bilinear_fusion.op import bilinear_fusion_op

__all__ = ["bilinear_fusion"]

_LARGE = 2**18  # elements of x and y; on a Zen 4 core up to which the kernel is at par or better


def bilinear_fusion(
    x: Tensor,
    y: Tensor,
    x_weight: Tensor,
    y_weight: Tensor,
    *,
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    rank: int = 1,
    presence: Tensor | None = None,
) -> Tensor:
    """Two projections, their product, and a sum over windows of ``rank``, in one pass.

        z_n = Σ_{j < rank} (x Uᵀ)_{n·rank + j} · (y Vᵀ)_{n·rank + j},  then z ← z Oᵀ + o if ``out_weight``

    Each output n is a bilinear form of rank ``rank`` in x and y; its windows are ``rank`` adjacent rows of U and V and
    do not overlap. rank = 1 with an output layer is MLB (Kim et al., 2016, arXiv:1610.04325); rank > 1 is the sum
    pooling of MFB (Yu et al., 2017, arXiv:1708.01471) and the rank constraint of MUTAN (Ben-younes et al., 2017,
    arXiv:1705.06676), whose R terms are the rows of a window.

    Args:
        x: (*, Kx), float32, bfloat16, float16, or float64 (reference backend alone). Any strides; a last dim that is
            not contiguous costs a copy of that tensor.
        y: (*, Ky), the leading shape of x.
        x_weight: U (rank·N, Kx).
        y_weight: V (rank·N, Ky).
        out_weight: O (Nout, N), as in ``nn.Linear``.
        out_bias: o (Nout,); needs ``out_weight``.
        rank: rows of U and V to an output, at least 1.
        presence: (*, 2) or (2,) bool, x then y, True where it was observed. An absent one counts as zeros, whatever it
            holds, so that z is 0 there, and gets and gives no gradient.

    All floating tensors have one dtype and device. Under autocast they are cast to its dtype. For a gradient the two
    projections are kept, as plain code would keep them; their product is not.

    Returns:
        (*, N), or (*, Nout) with ``out_weight``.

    Example:
        >>> image, question = torch.randn(8, 2048), torch.randn(8, 1024)
        >>> U, V = torch.randn(5 * 256, 2048), torch.randn(5 * 256, 1024)
        >>> bilinear_fusion(image, question, U, V, rank=5).shape
        torch.Size([8, 256])
    """
    if out_weight is None and out_bias is None and may_use_door():
        out = bilinear_fusion_op.unchecked(x, y, x_weight, y_weight, rank, presence)
        if out is not None:
            return out
    if is_overridden(x, y, x_weight, y_weight, out_weight, out_bias, presence):
        return overridden_call(bilinear_fusion, locals())
    name = "bilinear_fusion"
    checks.check_tensor(name, "x", x)
    if checks.autocast_is_on(x.device):
        x, y, x_weight, y_weight, out_weight, out_bias = fusion.autocast(
            x.device, x, y, x_weight, y_weight, out_weight, out_bias
        )
    _check_inputs(name, x, y)
    if isinstance(rank, bool) or not isinstance(rank, (int, torch.SymInt)):
        raise checks.type_error(name, "rank", "an int", type(rank).__name__)
    if rank < 1:
        raise checks.value_error(name, "rank", "at least 1", rank)
    rows = _check_matrix(name, "x_weight", x_weight, ("rank·N", x.shape[-1]), x)
    if rows % rank != 0:
        raise checks.value_error(name, "x_weight", f"a multiple of rank, {rank}, rows", f"{rows} rows")
    _check_matrix(name, "y_weight", y_weight, (rows, y.shape[-1]), x)
    if out_weight is not None:
        outputs = _check_matrix(name, "out_weight", out_weight, ("Nout", rows // rank), x)
        if out_bias is not None:
            fusion.check_shaped(name, "out_bias", out_bias, (outputs,), x, "x")
    elif out_bias is not None:
        raise checks.value_error(name, "out_bias", "None without out_weight", "a tensor")
    if presence is not None:
        presence = fusion.row_presence(name, presence, x.shape[:-1], 2, x, "x")
    if out_weight is not None and rank == 1 and presence is None and not torch.compiler.is_compiling():
        reason = _torch_is_faster(x, y)
        if reason is not None and bilinear_fusion_op.forward.leaves_to_torch(reason):
            return linear(linear(x, x_weight) * linear(y, y_weight), out_weight, out_bias)
    z = from_rows(bilinear_fusion_op(as_rows(x), as_rows(y), x_weight, y_weight, rank, presence)[0], x.shape[:-1])
    return z if out_weight is None else linear(z, out_weight, out_bias)


def _torch_is_faster(x: Tensor, y: Tensor) -> str | None:
    """Why three products of torch are: with nothing to pool, products as large as these are all there is to do."""
    if x.dtype != torch.bfloat16 or not x.is_cpu or _native.isa() != "avx512_bf16":
        return None
    return "torch's bfloat16 products of this size are faster" if x.numel() + y.numel() > _LARGE else None


def _check_inputs(op: str, x: Tensor, y: Tensor) -> None:
    if x.dtype not in checks.FLOATING:
        raise checks.type_error(op, "x", "dtype float32, bfloat16, float16 or float64", x.dtype)
    if x.dim() == 0:
        raise checks.value_error(op, "x", "at least 1 dim (*, Kx)", "a scalar")
    if not isinstance(y, Tensor) or y.dtype != x.dtype or y.device != x.device:
        checks.check_tensor(op, "y", y)
        fusion.check_kind(op, "y", y, x, "x")
    if y.dim() == 0 or y.shape[:-1] != x.shape[:-1]:
        expected = f"shape {fusion.shape_text((*x.shape[:-1], 'Ky'))}, the leading dims of x"
        raise checks.value_error(op, "y", expected, tuple(y.shape))


def _check_matrix(op: str, argument: str, weight: Tensor, shape: tuple[int | str, int], x: Tensor) -> int:
    """The number of rows of a weight of that shape; a name stands for a size that is free."""
    if not isinstance(weight, Tensor) or weight.dtype != x.dtype or weight.device != x.device:
        checks.check_tensor(op, argument, weight)
        fusion.check_kind(op, argument, weight, x, "x")
    got = weight.shape
    if len(got) != 2 or got[1] != shape[1] or (not isinstance(shape[0], str) and got[0] != shape[0]):
        raise checks.value_error(op, argument, f"shape {fusion.shape_text(shape)}", tuple(got))
    return got[0]
