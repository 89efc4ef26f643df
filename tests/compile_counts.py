"""Run in a process without TRITON_INTERPRET: which kernels each op compiles at several batch sizes and lengths.

Prints JSON: op -> per size a sorted list of what each kernel is compiled from. The sizes differ in divisibility by 16.
"""

from __future__ import annotations

import json

import torch
from calls import FIRST, Call, leaves_of

import mmkernels as mmk
from mmkernels.triton.launch import sources_for
from mmkernels.triton.table import TARGETS, ops_with_kernels

SIZES = ((20, 1024), (22, 1040), (21, 1031))  # batch, length: all of one class in the tables of configurations


def sized(call: Call, batch: int, length: int) -> Call:
    """Widths of many tiles; of an op without tokens as many rows as another has tokens, of a packed batch as many
    tokens."""
    known = call.default_sizes()
    tokens = any(name.startswith("L") for name in known)
    sizes = {"B": batch if tokens else batch * length, "H": 8, "M": 3, "R": 4}
    sizes |= {name: length for name in known if name.startswith("L")}
    sizes |= {name: batch * length for name in known if name.startswith("T")}
    return call.at(**dict.fromkeys(known, 64) | sizes)


def compiled(call: Call, batch: int, length: int) -> list[str]:
    """The kernels of a training step."""
    with torch.device("meta"):
        inputs = sized(call, batch, length).inputs(torch.bfloat16)
    for leaf in leaves_of(inputs):
        leaf.requires_grad_()
    with sources_for(TARGETS["sm_90"]) as sources, mmk.use_backend("triton"):
        outputs = call.public(**inputs)
        outputs = [o for o in (outputs if isinstance(outputs, (list, tuple)) else [outputs]) if o.requires_grad]
        sum(o.float().sum() for o in outputs).backward()
        return sorted(set(sources))


if __name__ == "__main__":
    print(json.dumps({op: [compiled(FIRST[op], *size) for size in SIZES] for op in ops_with_kernels()}))
