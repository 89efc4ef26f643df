"""What the swapped forwards of several libraries share: projections, masks in their compact form, dropout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels import _native
from mmkernels.integrations._swaps import SwappedForward
from mmkernels.nn._children import _GLOBAL_HOOKS, is_plain
from mmkernels.ops._checks import autocast_is_on
from mmkernels.ops.concat_linear import concat_linear

SERVED = (torch.float32, torch.bfloat16, torch.float16)

_PRODUCT_DTYPES = (torch.float32, torch.bfloat16)
_FEWEST_PRODUCTS = 1 << 24  # below, a call is too short for what a product gains
_MOST_BFLOAT16_WEIGHTS = 1 << 22  # above, torch's products are 1.05 times faster
_MOST_WIDENING_IN_TRAINING = 3 << 19  # above, weights that widen have gradients that torch's products give sooner
_FEWEST_ROWS, _FEWEST_FEATURES, _FEWEST_IN_LOOPS = 4, 32, 1 << 15  # of what torch multiplies in plain loops
_LENGTHS = "_mmkernels_key_lengths"


@functools.lru_cache(maxsize=1)
def products_pay() -> bool:
    """Whether this library's products beat torch's on the CPU at hand, as plain linears and not only by what is fused.

    Measured on one core, float32 and bfloat16, 160 … 2308 rows of transformers' widths, forward and training: AMD Zen 4
    1.00 … 1.14; on Intel torch has MKL and AMX, and loses nothing that counts.
    """
    if not _native.available() or _native.isa() != "avx512_bf16":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


@functools.cache
def torch_lacks_kernel(dtype: torch.dtype) -> bool:
    """Whether torch multiplies a half-precision dtype in plain loops, oneDNN having nothing for the CPU at hand.

    concat_linear of 8 … 788 rows is then 2 … 9 times faster, and 4 … 38 times in training (one Zen 3 core, which has
    neither AVX-512 nor AMX).
    """
    if not _native.available() or _native.isa() == "baseline":
        return False
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def multiplies(module: nn.Module) -> bool:
    """Whether a linear or convolution may gain by being a product of this library, or is one already."""
    return "forward" in module.__dict__ or products_pay() or torch_lacks_kernel(module.weight.dtype)  # type: ignore[arg-type]


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether a product takes long enough for a choice between ways of doing it."""
    return x.numel() * len(weight) >= _FEWEST_PRODUCTS


def takes_products(x: Tensor, weight: Tensor) -> bool:
    """Whether concat_linear is the better way to multiply these."""
    return (
        x.device.type == "cpu"
        and weight.dtype == x.dtype
        and not torch.compiler.is_compiling()
        and (_is_faster_than_loops(x, weight) if torch_lacks_kernel(x.dtype) else _is_faster(x, weight))
        and not autocast_is_on(x.device)
    )


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    return (
        is_large(x, weight)
        and x.dtype in _PRODUCT_DTYPES
        and (x.dtype != torch.bfloat16 or weight.numel() <= _most_bfloat16_weights(weight))
        and products_pay()
    )


def _is_faster_than_loops(x: Tensor, weight: Tensor) -> bool:
    rows = x.numel() // max(1, x.shape[-1])
    return rows >= _FEWEST_ROWS and len(weight) >= _FEWEST_FEATURES and x.numel() * len(weight) >= _FEWEST_IN_LOOPS


def _most_bfloat16_weights(weight: Tensor) -> int:
    widens = weight.shape[0] > weight.shape[1]
    trains = widens and weight.requires_grad and torch.is_grad_enabled()
    return _MOST_WIDENING_IN_TRAINING if trains else _MOST_BFLOAT16_WEIGHTS


def linear(
    child: nn.Module,
    x: Tensor,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``residual + act(child(x))``, by one product where the child is a plain linear and that is faster."""
    adds = residual is None or (residual.dtype == x.dtype and residual.shape[:-1] == x.shape[:-1])
    plain = is_plain_linear(child)
    if plain and adds and takes_products(x, child.weight):  # type: ignore[arg-type]
        return concat_linear([x], child.weight, child.bias, activation=activation, residual=residual)  # type: ignore[arg-type]
    out = F.linear(x, child.weight, child.bias) if plain else child(x)  # type: ignore[arg-type]
    if activation is not None:
        out = _ACTIVATIONS[activation](out)
    return out if residual is None else residual + out


_ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def activated(child: nn.Module, activation: Any, x: Tensor) -> Tensor:
    """activation(child(x)), of a function or module."""
    name = activation_name(activation)
    return activation(linear(child, x)) if name is None else linear(child, x, activation=name)


def is_plain_linear(child: nn.Module) -> bool:
    """A linear that does what its weight and bias say; one whose forward `accelerate` has swapped is."""
    if "forward" not in child.__dict__:
        return is_plain(child, nn.Linear)
    swapped = type(child) is nn.Linear and isinstance(child.__dict__["forward"], SwappedForward)
    return swapped and not is_hooked(child) and type(child.weight) is nn.Parameter


def is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any((*hooks, *_GLOBAL_HOOKS))


def activation_name(activation: Any) -> str | None:
    """What concat_linear calls a function or module; None if it has none such."""
    if activation in (F.relu, torch.relu):
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if activation in (F.silu, F.sigmoid, torch.sigmoid, torch.tanh, F.tanh):
        return {"silu": "silu", "sigmoid": "sigmoid", "tanh": "tanh"}[activation.__name__]
    if not isinstance(activation, nn.Module) or not is_plain(activation, type(activation)):
        return None
    name = type(activation).__name__
    if type(activation).__module__.partition(".")[0] not in ("torch", "transformers", "open_clip", "timm"):
        return None
    if isinstance(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    known = {
        "ReLU": "relu",
        "SiLU": "silu",
        "SiLUActivation": "silu",
        "Tanh": "tanh",
        "Sigmoid": "sigmoid",
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "QuickGELUActivation": "quick_gelu",
        "QuickGELU": "quick_gelu",
    }
    if getattr(activation, "act", F.gelu) is not F.gelu and name == "GELUActivation":
        return None
    return known.get(name)


def dropout_p(child: nn.Module) -> float | None:
    """The probability with which a dropout drops now; None for what is not a plain one."""
    if isinstance(child, nn.Identity):
        return 0.0
    if not is_plain(child, nn.Dropout):
        return None
    return child.p if child.training else 0.0  # type: ignore[return-value]


def masking(mask: Tensor | None, batch: int) -> dict[str, Any]:
    """The options of cross_attention that say an additive or bool mask [1|B, 1|H, 1|Lq, Lk].

    One over keys alone, padded on the right, becomes ``key_lengths``, and one that forbids nothing no option at all:
    padded keys are then not computed. What was found is kept with the tensor, since a model gives one mask to all its
    layers.
    """
    if mask is None:
        return {}
    if mask.requires_grad or mask.device.type != "cpu" or torch.compiler.is_compiling() or type(mask) is not Tensor:
        return {"attn_mask": mask}
    if mask.dim() != 4 or not _is_broadcast(mask, 1) or not _is_broadcast(mask, 2):
        return {"attn_mask": mask}
    version = -1 if mask.is_inference() else mask._version
    known = mask.__dict__.get(_LENGTHS)
    if known is None or known[0] != version or version < 0:
        known = (version, *_lengths(mask[:, 0, 0]))
        mask.__dict__[_LENGTHS] = known
    _, is_prefix, lengths = known
    if not is_prefix:
        return {"attn_mask": mask}
    return {} if lengths is None else {"key_lengths": lengths.expand(batch)}


def _is_broadcast(x: Tensor, dim: int) -> bool:
    return x.shape[dim] == 1 or x.stride(dim) == 0


def _lengths(rows: Tensor) -> tuple[bool, Tensor | None]:
    """Of masks over keys [B, Lk]: whether each keeps a beginning of them, not empty, and how long; None = all."""
    if rows.shape[1] == 0:
        return False, None
    if rows.dtype == torch.bool:
        keep = rows
    else:
        keep = rows == 0
        if not (keep | (rows <= torch.finfo(rows.dtype).min / 2)).all():
            return False, None
    lengths = prefix_lengths(keep)
    if lengths is None:
        return False, None
    return True, None if bool((lengths == rows.shape[1]).all()) else lengths


def prefix_lengths(keep: Tensor) -> Tensor | None:
    """The lengths (B,) of the beginnings that ``keep`` (B, L) keeps; None where it keeps anything else, or nothing."""
    lengths = keep.sum(-1)
    positions = torch.arange(keep.shape[1], device=keep.device)
    is_prefix = (keep == (positions < lengths[:, None])).all() & (lengths > 0).all()
    return lengths if bool(is_prefix) else None
