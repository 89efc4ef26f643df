"""Run in a process without TRITON_INTERPRET: which kernels each op compiles at several batch sizes and lengths.

Prints JSON: op -> one sorted list of kernels (by hash) per size. The sizes differ in divisibility by 16.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.triton.launch import compiling_for
from mmkernels.triton.table import TARGETS, ops_with_kernels

SIZES = ((20, 1024), (22, 1040), (21, 1031))  # batch, length: all of one class in the tables of configurations


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def streams(batch: int, length: int) -> list[Tensor]:
    return [meta(batch, 8, n, 64) for n in (77 + length % 16, length)]


def packed(batch: int, length: int) -> tuple[Any, ...]:
    ends = torch.empty(batch + 1, dtype=torch.int32, device="meta")
    query, key, value = meta(batch * length, 8, 64), meta(batch * 77, 4, 64), meta(batch * 77, 4, 64)
    return query, key, value, ends, ends, length, 77


def merged(batch: int, length: int) -> Any:
    outputs = [meta(batch, 8, length, 64) for _ in range(2)]
    return mmk.merge_attention(outputs, [meta(batch, 8, length, dtype=torch.float32) for _ in range(2)])


def rotated(batch: int, length: int) -> Any:
    table = meta(length, 64, dtype=torch.float32)
    query, key = (meta(batch, heads, length, 128) for heads in (8, 2))
    return mmk.norm_rotary(query, key, table, table, query_weight=meta(128), key_weight=meta(128))


def rows(batch: int, length: int, *widths: int) -> list[Tensor]:
    return [meta(batch, length, k) for k in widths]


def vectors(batch: int, length: int, *widths: int) -> list[Tensor]:
    return [meta(batch * length, k) for k in widths]


CALLS: dict[str, Callable[[int, int], Any]] = {
    "additive_attention_pool": lambda b, n: mmk.additive_attention_pool(
        meta(b * n, 3, 256), meta(128, 256), meta(128), bias=meta(128)
    ),
    "bidirectional_cross_attention": lambda b, n: mmk.bidirectional_cross_attention(
        meta(b, 4, n, 64), meta(b, 4, 64, 64), meta(b, 4, n, 64), meta(b, 4, 64, 64)
    ),
    "bilinear_fusion": lambda b, n: mmk.bilinear_fusion(
        *vectors(b, n, 512, 256), meta(640, 512), meta(640, 256), rank=5
    ),
    "concat_linear": lambda b, n: mmk.concat_linear(
        rows(b, n, 512, 256, 74), meta(384, 842), meta(384), activation="gelu"
    ),
    "concat_norm_linear": lambda b, n: mmk.concat_norm_linear(
        rows(b, n, 512, 256), meta(768), meta(768), meta(384, 768), meta(384)
    ),
    "concat_tokens": lambda b, n: mmk.concat_tokens(
        [meta(b, n, 768), meta(b, 40 + n % 16, 768)], norm="layer", norm_weight=meta(768), norm_bias=meta(768)
    ),
    "contrastive_loss": lambda b, n: mmk.contrastive_loss(
        *vectors(b, n, 256, 256), meta(), labels=meta(b * n, dtype=torch.int64), label_smoothing=0.1
    ),
    "cross_attention": lambda b, n: mmk.cross_attention(meta(b, 8, n, 64), meta(b, 8, n, 64), meta(b, 8, n, 64)),
    "decision_fusion": lambda b, n: mmk.decision_fusion([meta(b * n, 100), meta(b * n, 100)], meta(2), method="log"),
    "deformable_attention": lambda b, n: mmk.deformable_attention(
        meta(b, n + 64, 8, 32), [(1, n), (8, 8)], meta(b, n, 8, 2, 4, 2), meta(b, n, 8, 2, 4)
    ),
    "distillation_loss": lambda b, n: mmk.distillation_loss(meta(b * n, 1000), meta(b * n, 1000), temperature=2.0),
    "gated_concat": lambda b, n: mmk.gated_concat(*rows(b, n, 256, 128), meta(256, 384), meta(256)),
    "gated_fusion": lambda b, n: mmk.gated_fusion(
        rows(b, n, 256, 128), [meta(192, 256), meta(192, 128)], [meta(192), meta(192)], meta(192, 384), meta(192)
    ),
    "joint_attention": lambda b, n: mmk.joint_attention(streams(b, n), streams(b, n), streams(b, n)),
    "low_rank_fusion": lambda b, n: mmk.low_rank_fusion(
        vectors(b, n, 256, 128), [meta(4, 257, 64), meta(4, 129, 64)], meta(4)
    ),
    "merge_attention": merged,
    "merge_embeddings": lambda b, n: mmk.merge_embeddings(
        meta(b, n, 1024), meta(b * 100, 1024), meta(b, n, dtype=torch.bool)
    ),
    "modulated_norm": lambda b, n: mmk.modulated_norm(meta(b, n, 1152), meta(b, 1152), meta(b, 1152)),
    "norm_rotary": rotated,
    "multimodal_cross_entropy": lambda b, n: mmk.multimodal_cross_entropy(
        [meta(b * n, 1000), meta(b * n, 32)], meta(b * n, dtype=torch.int64), presence=meta(b * n, 2, dtype=torch.bool)
    ),
    "multiplicative_attention_pool": lambda b, n: mmk.multiplicative_attention_pool(
        meta(b * n, 3, 256), meta(b * n, 256), weight=meta(256, 256)
    ),
    "sigmoid_contrastive_loss": lambda b, n: mmk.sigmoid_contrastive_loss(*vectors(b, n, 256, 256), meta(), meta()),
    "split_attention_pool": lambda b, n: mmk.split_attention_pool(
        meta(b * n, 3, 256), meta(64, 256), meta(64), meta(768, 64), meta(768)
    ),
    "tensor_fusion_linear": lambda b, n: mmk.tensor_fusion_linear(vectors(b, n, 32, 16, 16), meta(64, 33 * 17 * 17)),
    "varlen_cross_attention": lambda b, n: mmk.varlen_cross_attention(*packed(b, n)),
}


def compiled(call: Callable[[int, int], Any], batch: int, length: int) -> list[str]:
    """The kernels of a training step."""
    with compiling_for(TARGETS["sm_90"]) as done, mmk.use_backend("triton"):
        outputs = call(batch, length)
        outputs = [o for o in (outputs if isinstance(outputs, (list, tuple)) else [outputs]) if o.requires_grad]
        sum(o.float().sum() for o in outputs).backward()
        return sorted({f"{c.kernel} {c.binary.hash}" for c in done})


if __name__ == "__main__":
    found = {op: [compiled(CALLS[op], *size) for size in SIZES] for op in ops_with_kernels()}
    print(json.dumps(found))
