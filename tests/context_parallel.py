"""One rank of attention over keys that are spread over processes: makes every case's call on its tokens."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from processes import take_part
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmkernels as mmk
from mmkernels.distributed import context_parallel_attention, shard_positions

RANKS = (2, 4)


@dataclass(frozen=True)
class Case:
    """Streams of queries and of keys, by their lengths in the whole sequence."""

    queries: tuple[int, ...] = (21,)
    keys: tuple[int, ...] = (34,)
    dtype: torch.dtype = torch.float32
    heads: tuple[int, int] = (2, 2)
    lengths: tuple[tuple[int, ...] | None, ...] | None = None
    order: str = "contiguous"
    is_causal: bool = False
    softcap: float = 0.0
    method: str | None = "ring"
    uneven: bool = False
    frozen: str = ""  # "query" or "key": what needs no gradient
    window: tuple[int, int] | None = None
    mask: str = ""  # "bool", "float" or, of keys alone, "keys"
    bias: bool = False
    sinks: bool = False
    alignment: str = "top_left"

    def tensors(self, dtype: torch.dtype | None = None) -> list[list[Tensor]]:
        """Queries, keys, values, gradients of outputs and of LSEs, whole."""
        generator = torch.Generator().manual_seed(5)
        wide = torch.promote_types(self.dtype, torch.float32)

        def draw(lengths: tuple[int, ...], heads: int, *width: int, as_: torch.dtype = self.dtype) -> list[Tensor]:
            drawn = [torch.randn(2, heads, n, *width, generator=generator).to(as_) for n in lengths]
            return [x.to(dtype or x.dtype) for x in drawn]

        query_heads, key_heads = self.heads
        queries, keys = draw(self.queries, query_heads, 16), draw(self.keys, key_heads, 16)
        values = draw(self.keys, key_heads, 8)
        grads, of_lses = draw(self.queries, query_heads, 8), draw(self.queries, query_heads, as_=wide)
        return [queries, keys, values, grads, of_lses]

    @property
    def is_alone(self) -> bool:
        """Whether it is `cross_attention`'s, of one stream."""
        return bool(self.is_causal or self.window or self.mask or self.bias or self.sinks)

    def mask_and_sinks(self, rows: Tensor | slice, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(6)
        wide = dtype or torch.promote_types(self.dtype, torch.float32)
        keys = self.keys[0]
        allowed = torch.rand(2, 1, self.queries[0], keys, generator=generator) < 0.6
        allowed[0, 0, 2] = False  # a query of nothing
        added = torch.randn(1, self.heads[0], self.queries[0], keys, generator=generator).to(wide)
        masks = {"": None, "bool": allowed[:, :, rows], "keys": allowed[:, :, :1], "float": added[:, :, rows]}
        sinks = torch.randn(self.heads[0], generator=generator).to(wide) if self.sinks else None
        bias = torch.randn(2, 1, self.queries[0], keys, generator=generator).to(wide)[:, :, rows] if self.bias else None
        found = {"attn_mask": masks[self.mask], "attn_bias": bias, "sinks": sinks}
        return {k: x.clone().requires_grad_(x.is_floating_point()) if x is not None else None for k, x in found.items()}

    def key_lengths(self) -> list[Tensor | None] | None:
        return self.lengths and [None if n is None else torch.tensor(n) for n in self.lengths]

    def positions(self, length: int, rank: int, ranks: int, mesh: Any) -> Tensor:
        if not self.uneven:
            return shard_positions(length, mesh, order=self.order)
        first = [0, length - 3, length - 3, length - 2, length][: ranks + 1]  # all but three on rank 0, none on rank 1
        first[ranks] = length
        return torch.arange(first[rank], first[rank + 1])

    def pulled(self, leaves: list[list[Tensor]], outs: list[Tensor], lses: list[Tensor], grads: Any) -> list[Tensor]:
        """Outputs, LSEs, and the gradients of what has one."""
        needed = [x for group in leaves for x in group if x is not None and x.requires_grad]
        finite = [lse.masked_fill(lse == -torch.inf, 0) for lse in lses]
        gradients = torch.autograd.grad([*outs, *finite], needed, [*grads[0], *grads[1]])
        return [*(x.detach() for x in (*outs, *lses)), *gradients]

    def leaves(self, tensors: list[list[Tensor]]) -> list[list[Tensor]]:
        wants = (self.frozen != "query", self.frozen != "key", self.frozen != "key")
        return [[x.clone().requires_grad_(want) for x in group] for group, want in zip(tensors, wants, strict=True)]

    def alone(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Of one process with the whole sequences."""
        *inputs, grads, of_lses = self.tensors(dtype)
        leaves = self.leaves(inputs)
        options: dict[str, Any] = {"softcap": self.softcap, "enable_gqa": True, "return_lse": True}
        lengths = self.key_lengths()
        if self.is_alone:
            (query,), (key,), (value,) = leaves
            masks = self.mask_and_sinks(slice(None), dtype)
            options |= {
                "causal_alignment": self.alignment,
                "is_causal": self.is_causal,
                "window": self.window,
                "key_lengths": lengths and lengths[0],
            }
            outs, lses = ([x] for x in mmk.cross_attention(query, key, value, **masks, **options))
            leaves.append(list(masks.values()))
        else:
            outs, lses = mmk.joint_attention(*leaves, key_lengths=lengths, **options)
        return self.pulled(leaves, outs, lses, (grads, of_lses))

    def held(self, rank: int, ranks: int, mesh: Any) -> list[list[Tensor | None]]:
        """Positions of this rank, of each of the results; None for what every rank has."""
        of_queries = [self.positions(n, rank, ranks, mesh) for n in self.queries]
        of_keys = [self.positions(n, rank, ranks, mesh) for n in self.keys]
        queries, keys = of_queries * (self.frozen != "query"), of_keys * (self.frozen != "key")
        masks = of_queries * (self.mask == "float") + of_queries * self.bias + [None] * self.sinks
        return [of_queries, of_keys, [*of_queries, *of_queries, *queries, *keys, *keys, *masks]]

    def spread(self, rank: int, ranks: int, mesh: Any) -> list[Tensor]:
        of_queries, of_keys, _ = self.held(rank, ranks, mesh)
        groups = (of_queries, of_keys, of_keys, of_queries, of_queries)
        parts = [
            [x[:, :, at] for x, at in zip(group, positions, strict=True)]
            for group, positions in zip(self.tensors(), groups, strict=True)
        ]
        leaves = self.leaves(parts[:3])
        single = len(self.queries) == len(self.keys) == 1
        lengths = self.key_lengths()
        masks = self.mask_and_sinks(of_queries[0]) if single else {}
        outs, lses = context_parallel_attention(
            *((group[0] for group in leaves) if single else leaves),
            mesh,
            key_lengths=lengths and lengths[0] if single else lengths,
            is_causal=self.is_causal,
            causal_alignment=self.alignment,
            window=self.window,
            **masks,
            order=self.order,
            softcap=self.softcap,
            enable_gqa=True,
            method=self.method,
            return_lse=True,
        )
        if single:
            outs, lses = [outs], [lses]
            leaves.append(list(masks.values()))
        return self.pulled(leaves, outs, lses, parts[3:])


_LENGTHS = ((34, 9),)
CASES = {
    "ring": Case(),
    "gathered": Case(method="gather"),
    "chosen by size, grouped heads": Case(method=None, heads=(4, 2)),
    "ring, bfloat16": Case(dtype=torch.bfloat16),
    "ring, float64, softcap": Case(dtype=torch.float64, softcap=3.0),
    "ring, key lengths": Case(lengths=_LENGTHS),
    "ring, no key is valid for one example": Case(lengths=((34, 0),)),
    "gathered, key lengths, zig-zag": Case(lengths=_LENGTHS, method="gather", order="zigzag"),
    "ring, tokens on few ranks": Case(uneven=True),
    "gathered, tokens on few ranks": Case(uneven=True, method="gather"),
    "ring, causal, zig-zag": Case(is_causal=True, order="zigzag"),
    "ring, causal, zig-zag, more queries than keys": Case((37,), (18,), is_causal=True, order="zigzag"),
    "ring, causal, tokens on few ranks": Case((34,), is_causal=True, uneven=True),
    "gathered, causal, key lengths, zig-zag": Case(
        (34,), is_causal=True, order="zigzag", lengths=_LENGTHS, method="gather"
    ),
    "ring, fewer tokens than chunks, causal": Case((3,), (2,), is_causal=True, order="zigzag"),
    "ring, no tokens": Case((5,), (0,)),
    "ring, streams": Case((7, 21), (7, 34), lengths=(None, (34, 9))),
    "ring, streams, zig-zag": Case((5,), (7, 34, 1), order="zigzag", lengths=((7, 2), None, (0, 1))),
    "gathered, more streams than kernels take": Case((5, 9), (7, 3, 2, 11, 6), method="gather"),
    "ring, window": Case((34,), window=(5, 3)),
    "ring, window to the left, zig-zag, grouped heads": Case((34,), window=(9, -1), order="zigzag", heads=(4, 2)),
    "ring, window, more queries than keys": Case((41,), (18,), window=(2, 20), order="zigzag"),
    "ring, causal window, zig-zag, key lengths": Case(
        (34,), window=(7, 30), is_causal=True, order="zigzag", lengths=_LENGTHS
    ),
    "gathered, window, tokens on few ranks": Case((34,), window=(4, 0), uneven=True, method="gather"),
    "ring, mask": Case(mask="bool"),
    "ring, mask of keys, zig-zag": Case(mask="keys", order="zigzag"),
    "ring, mask that is added, zig-zag, bfloat16": Case(mask="float", order="zigzag", dtype=torch.bfloat16),
    "gathered, mask that is added, frozen inputs": Case(mask="float", method="gather", frozen="query"),
    "ring, mask and bias": Case(mask="bool", bias=True),
    "ring, bias, zig-zag, grouped heads": Case(bias=True, order="zigzag", heads=(4, 2)),
    "gathered, mask that is added and bias, sinks": Case(mask="float", bias=True, sinks=True, method="gather"),
    "ring, causal to the bottom right, zig-zag": Case(is_causal=True, order="zigzag", alignment="bottom_right"),
    "ring, causal to the bottom right, fewer keys": Case((34,), (21,), is_causal=True, alignment="bottom_right"),
    "gathered, window to the bottom right": Case(window=(4, 2), alignment="bottom_right", method="gather"),
    "ring, sinks": Case(sinks=True),
    "ring, sinks, no key is valid for one example": Case(sinks=True, lengths=((34, 0),)),
    "ring, causal, zig-zag, with all of it": Case(
        (34,),
        is_causal=True,
        order="zigzag",
        window=(12, 0),
        mask="float",
        sinks=True,
        softcap=3.0,
        lengths=((34, 20),),
        heads=(4, 2),
    ),
    "ring, frozen queries": Case(frozen="query"),
    "ring, frozen keys": Case(frozen="key"),
    "gathered, frozen keys, float16": Case(frozen="key", method="gather", dtype=torch.float16),
}


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes that tensors made in this block had at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage not in self.known and storage not in given:
                    self.known.add(storage)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.free, storage.nbytes())
        return result

    def free(self, size: int) -> None:
        self.live -= size


def peak_memory(mesh: Any, ranks: int) -> int:
    """Bytes that a training step around the ring makes on this rank."""
    query, key, value = (torch.randn(1, 2, 3072 // ranks, 32, requires_grad=True) for _ in range(3))
    with PeakMemory() as memory:
        context_parallel_attention(query, key, value, mesh, method="ring").sum().backward()
    return memory.peak


def messages(rank: int, ranks: int, mesh: Any) -> dict[str, str]:
    """What is said where the ranks do not ask for the same, or ask for what cannot be."""
    x, odd = torch.randn(1, 2, 6, 8), rank == 0
    ways: dict[str, Any] = {
        "features": lambda: context_parallel_attention(*[x[..., : 8 - odd]] * 3, mesh),
        "streams": lambda: context_parallel_attention(*[[x] * (1 + odd)] * 3, mesh),
        "scale": lambda: context_parallel_attention(x, x, x, mesh, scale=0.5 + odd),
        "gradients": lambda: context_parallel_attention(x.clone().requires_grad_(odd), x, x, mesh),
        "zigzag": lambda: context_parallel_attention(*[x[:, :, : 6 - 3 * odd]] * 3, mesh, order="zigzag"),
        "lengths": lambda: context_parallel_attention(x, x, x, mesh, key_lengths=torch.tensor([6 * ranks + 1])),
        "causal": lambda: context_parallel_attention([x], [x], [x], mesh, is_causal=True),
        "window": lambda: context_parallel_attention(x, x, x, mesh, window=(int(odd), 2)),
        "mask": lambda: context_parallel_attention(x, x, x, mesh, attn_mask=torch.ones(6, 6 * ranks - 2 * odd) > 0),
        "alignment": lambda: context_parallel_attention(
            x, x, x, mesh, is_causal=True, causal_alignment="bottom_right" if odd else "top_left"
        ),
        "lengths to the bottom right": lambda: context_parallel_attention(
            x, x, x, mesh, key_lengths=torch.tensor([6]), is_causal=True, causal_alignment="bottom_right"
        ),
        "bias": lambda: context_parallel_attention(
            x, x, x, mesh, attn_mask=torch.ones(6, 6 * ranks) > 0, attn_bias=torch.ones(6, 5)
        ),
        "streams to the bottom right": lambda: context_parallel_attention(
            [x], [x], [x], mesh, causal_alignment="bottom_right"
        ),
        "bias of streams": lambda: context_parallel_attention([x], [x], [x], mesh, attn_bias=torch.ones(6, 6)),
        "sinks": lambda: context_parallel_attention([x], [x], [x], mesh, sinks=torch.zeros(2)),
    }
    found = {}
    for way, call in ways.items():
        try:
            call()
        except ValueError as error:
            found[way] = str(error)
    return found


def work(rank: int, ranks: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("context",))
    found = {name: case.spread(rank, ranks, mesh) for name, case in CASES.items()}
    with mmk.use_backend("reference"):
        plain = CASES["ring"].spread(rank, ranks, dist.group.WORLD)
    held = {name: case.held(rank, ranks, mesh)[2] for name, case in CASES.items()}
    return {
        "results": found,
        "held": held,
        "reference": plain,
        "messages": messages(rank, ranks, mesh),
        "memory": peak_memory(mesh, ranks),
    }


if __name__ == "__main__":
    take_part(work)
