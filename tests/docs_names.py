"""What the code of the pages finds: names that a reader has, such as a model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures_beyond_transformers  # noqa: F401  which adds its own
import torch
from architectures import build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import mmkernels as mmk


def _layers() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 128, batch_first=True), num_layers=1).eval()


def _torch_model() -> dict[str, Any]:
    return {"model": _layers(), "inputs": {"tgt": torch.randn(1, 4, 64), "memory": torch.randn(1, 6, 64)}}


class _Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def _attention() -> dict[str, Any]:
    return {"model": _Attention(), "inputs": {"x": torch.randn(1, 4, 64, 32)}}


def _saved_clip() -> dict[str, Any]:
    """The path of a small model, in the place of a name on the hub."""
    model, _, _ = build("clip")
    name = str(Path(tempfile.mkdtemp(dir=".")).resolve())
    model.save_pretrained(name)
    return {"name": name, "CLIPModel": type(model)}


def _diffusers_pipeline() -> dict[str, Any]:
    model, _, _ = build("flux")
    return {"pipeline": SimpleNamespace(transformer=model), "model": model}


def _spread_model() -> dict[str, Any]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = mmk.nn.MultiheadCrossAttention(32, 4, batch_first=True)
            self.fuse = mmk.nn.ConcatFusion([16, 16], 8)

    mesh = init_device_mesh("cpu", (1,))
    return {"model": Model(), "mesh": mesh, "parallelize_module": parallelize_module}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/integrations.md": _torch_model,
    "docs/integrations/torch.md": _attention,
    "docs/integrations/transformers.md": _saved_clip,
    "docs/integrations/diffusers.md": _diffusers_pipeline,
    "docs/distributed.md": _spread_model,
    "mmkernels.integrations.transformers.register": _saved_clip,
    "mmkernels.distributed.ModuleParallel": _spread_model,
    "mmkernels.distributed.parallel_plan": _spread_model,
}
OF_LIBRARIES = {
    "docs/integrations/transformers.md",
    "docs/integrations/diffusers.md",
    "docs/integrations/open_clip.md",
    "docs/integrations/timm.md",
    "mmkernels.integrations.transformers.register",
}
