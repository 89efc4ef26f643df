"""Other libraries that compete where they are installed. None is needed, and none is installed by this project.

The engine checks each against torch before it is timed: what serves a workload differently has a gap, with the reason.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .plugin import Provider
from .suite import Workload

_ATTENTION = frozenset({"cross_attention"})


@dataclass(frozen=True)
class Library:
    """A provider that needs packages: as they are imported, and as pip knows them."""

    provider: Provider
    imports: tuple[str, ...]
    package: str
    device: str | None = None  # where alone it runs

    def absent(self, device: str) -> str | None:
        """Why it cannot compete, or None."""
        if missing := [name for name in self.imports if importlib.util.find_spec(name) is None]:
            return f"{', '.join(missing)} not installed (pip install {self.package})"
        return f"runs on {self.device} alone" if self.device not in (None, device) else None


def _unmasked(query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, mask: Tensor | None) -> list[Tensor]:
    """Queries, keys and values as [B, L, H, D], of calls without a mask and with as many heads on both sides."""
    if attn_bias is not None or mask is not None or query.shape[1] != key.shape[1]:
        raise NotImplementedError("calls without mask and groups of heads alone")
    return [x.transpose(1, 2) for x in (query, key, value)]


def _flash_attn(
    workload: Workload,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(*_unmasked(query, key, value, attn_bias, mask))
    return out.transpose(1, 2)


def _xformers(
    workload: Workload,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(*_unmasked(query, key, value, attn_bias, mask))
    return out.transpose(1, 2)


def _liger_kernel(workload: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """Its divergences, of logarithms of probabilities; temperature as the workload's own formula has it."""
    from liger_kernel.transformers.functional import liger_jsd, liger_kl_div

    temperature = 2.0
    s, t = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    if workload.kind == "jsd":
        loss = liger_jsd(s, t)
    else:
        pair = (s, t) if workload.kind == "forward_kl" else (t, s)
        loss = liger_kl_div(*pair, reduction="batchmean", log_target=True)
    scaled: Tensor = temperature**2 * loss
    return scaled


class _Formula(nn.Module):
    """A workload's formula of the tensors among its arguments, by their names."""

    def __init__(self, workload: Workload, names: tuple[str, ...], fixed: dict[str, Any]) -> None:
        super().__init__()
        self.workload, self.names, self.fixed = workload, names, fixed

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.workload.plain(**dict(zip(self.names, tensors, strict=True)), **self.fixed)


# A session for each workload and the shapes and dtypes that it was exported with.
_sessions: WeakKeyDictionary[Workload, dict[Any, Any]] = WeakKeyDictionary()


def _onnxruntime(workload: Workload, **arguments: Any) -> Tensor:
    """The formula, exported to ONNX once; forward alone, of the arguments that are tensors of their own."""
    import onnxruntime

    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    fixed = {name: x for name, x in arguments.items() if name not in tensors}
    if any(isinstance(x, (list, tuple)) for x in fixed.values()) or any(x.requires_grad for x in tensors.values()):
        raise NotImplementedError("forward passes of tensors alone")
    key = tuple((name, x.shape, x.dtype) for name, x in tensors.items())
    known = _sessions.setdefault(workload, {})
    if key not in known:
        program = torch.onnx.export(
            _Formula(workload, tuple(tensors), fixed), tuple(tensors.values()), dynamo=True, verbose=False
        )
        assert program is not None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "formula.onnx")
            program.save(file)
            known[key] = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    session = known[key]
    names = [given.name for given in session.get_inputs()]
    (out,) = session.run(None, {n: x.numpy() for n, x in zip(names, tensors.values(), strict=True)})
    return torch.from_numpy(out)


_ALL = (
    Library(Provider("flash-attn", _flash_attn, _ATTENTION), ("flash_attn",), "flash-attn", "cuda"),
    Library(Provider("xformers", _xformers, _ATTENTION), ("xformers",), "xformers", "cuda"),
    Library(
        Provider("liger-kernel", _liger_kernel, frozenset({"distillation_loss"})),
        ("liger_kernel",),
        "liger-kernel",
        "cuda",
    ),
    Library(
        Provider("onnxruntime", _onnxruntime),
        ("onnxruntime", "onnx", "onnxscript"),
        "onnxruntime onnx onnxscript",
        "cpu",
    ),
)
LIBRARIES = {library.provider.name: library for library in _ALL}
