"""That a machine's description names AMX where torch multiplies on it."""

from __future__ import annotations

import pytest
import torch

from mmkernels import _amx, _info
from mmkernels.bench import machine

SAPPHIRE_RAPIDS = ["model name\t: Xeon", "flags\t\t: fpu avx512f amx_tile amx_bf16 amx_int8"]


@pytest.mark.parametrize(
    ("lines", "environment", "used"),
    [
        (SAPPHIRE_RAPIDS, {}, True),
        (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True),
        (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "avx512_core_bf16"}, False),
        (["flags\t\t: fpu avx512f avx512_bf16"], {}, False),
        ([], {}, False),
    ],
)
def test_amx_is_used_where_the_core_has_it_and_onednn_may(
    lines: list[str], environment: dict[str, str], used: bool
) -> None:
    assert _amx.torch_uses_amx(lines, environment) is used


@pytest.mark.parametrize("used", [False, True])
def test_amx_is_named(monkeypatch: pytest.MonkeyPatch, used: bool) -> None:
    monkeypatch.setattr(_info, "torch_uses_amx", lambda *_: used)
    info = _info.collect()
    capability = torch.backends.cpu.get_cpu_capability()
    assert machine.caption(info).endswith(f"on {capability}" + (" and AMX" if used else ""))
    (line,) = [x for x in _info.render(info).splitlines() if x.startswith("torch's AMX")]
    assert line.endswith("in use") is used
