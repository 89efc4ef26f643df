"""No instruction of one ISA can run in the code of a lower one.

The kernels are compiled once per ISA from the same source, and the linker keeps one copy of each inline function that
several objects define. Two facts about the objects the library was linked from exclude every leak: what a kernel's
object defines for others carries its ISA in its name and is not mergeable, and no object holds an instruction above
its ISA.
"""

from __future__ import annotations

import filecmp
import os
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from mmkernels import _native

ROOT = Path(__file__).resolve().parent.parent
ISAS = ["baseline", "avx2", "avx512", "avx512_bf16", "emulated"]

# Instructions beyond an ISA, in objdump's AT&T syntax. Every AVX mnemonic begins with v; verr and verw are i286's.
AVX = r"\tv(?!err|erw)[a-z]|%[yz]mm|%k[0-7]\b"
AVX512 = r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b"
AVX512_BF16 = r"\tvdpbf16ps|\tvcvtne2?ps2?p?bf16"
TILES = r"\t(?:ld|st)tilecfg|\ttile(?:load|store|zero|release)|\ttdp|%tmm"
BEYOND = {"baseline": AVX, "avx2": AVX512, "emulated": AVX512, "avx512": AVX512_BF16}


def absent(reason: str) -> None:
    if os.environ.get("MMKERNELS_REQUIRE_NATIVE", "0") not in ("", "0"):
        pytest.fail(f"{reason}, and MMKERNELS_REQUIRE_NATIVE is set")
    pytest.skip(reason)


@cache
def build_directory() -> Path | None:
    """The directory in which the loaded library was linked."""
    library = _native.library_path()
    if library is None:
        return None
    built = ROOT.glob(f"build/*/{Path(library).name}")
    return next((p.parent for p in built if filecmp.cmp(p, library, shallow=False)), None)


def objects(target: str) -> list[Path]:
    if "sanitizers" in _native.build_info():
        pytest.skip("sanitizers add symbols of their own")
    for tool in ("nm", "objdump"):
        if shutil.which(tool) is None:
            absent(f"{tool} of binutils is not installed")
    if build_directory() is None:
        absent("the objects that the loaded library was linked from are not in build/")
    found = sorted((build_directory() / "CMakeFiles" / f"{target}.dir").rglob("*.o"))
    if not found:
        absent(f"{build_directory()} holds no objects of {target}")
    return found


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def require_compiled(isa: str) -> None:
    if _native.available() and isa not in _native.compiled_isas():
        pytest.skip(f"the library was built without {isa}")


@cache
def disassembly(path: Path) -> str:
    return output("objdump", "-d", "--no-show-raw-insn", path)


def first_match(pattern: str, path: Path) -> str | None:
    match = re.search(rf"^.*(?:{pattern}).*$", disassembly(path), re.MULTILINE)
    return match and f"{path.name}: {match.group().strip()}"


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_define_only_symbols_named_after_their_isa_and_none_the_linker_may_merge(isa: str) -> None:
    require_compiled(isa)
    own_namespace = re.compile(rf"_ZNK?3mmk{len(isa)}{isa}")
    for path in objects(f"isa_{isa}"):
        for line in output("nm", "--extern-only", "--defined-only", path).splitlines():
            _, kind, name = line.split()
            # The pointer to libstdc++'s exception routine, the same in every object: data, no code.
            if name == "DW.ref.__gxx_personality_v0":
                continue
            assert kind not in "WVu", f"{path.name} defines {name}, which the linker may replace by another ISA's"
            assert own_namespace.match(name), f"{path.name} defines {name} outside mmk::{isa}"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other machines have the baseline ISA only")
@pytest.mark.parametrize("isa", BEYOND)
def test_kernels_hold_no_instruction_beyond_their_isa(isa: str) -> None:
    require_compiled(isa)
    for path in objects(f"isa_{isa}"):
        assert first_match(BEYOND[isa], path) is None


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other machines have the baseline ISA only")
def test_code_outside_the_kernels_holds_baseline_instructions_only() -> None:
    for path in objects("host"):
        assert first_match(AVX, path) is None


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other machines have the baseline ISA only")
def test_tile_instructions_stand_in_one_file_of_avx512_bf16_alone() -> None:
    home = "tiles_cpu.isa.cpp.o"
    for isa in ["host", *(f"isa_{isa}" for isa in ISAS if isa in _native.compiled_isas())]:
        for path in objects(isa):
            if isa != "isa_avx512_bf16" or path.name != home:
                assert first_match(TILES, path) is None
    require_compiled("amx")
    (path,) = [x for x in objects("isa_avx512_bf16") if x.name == home]
    assert first_match(TILES, path)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other machines have the baseline ISA only")
def test_nothing_comes_between_the_tile_instructions_of_a_step() -> None:
    """Loads and products follow one another with only the addresses stepped: no vector, no spill, no call."""
    require_compiled("amx")
    (path,) = [x for x in objects("isa_avx512_bf16") if x.name == "tiles_cpu.isa.cpp.o"]
    functions = re.findall(
        r"^[0-9a-f]+ <(\S*multiply_block\S*Amx\S*)>:\n(.*?)\n\n", disassembly(path) + "\n\n", re.M | re.S
    )
    assert len(functions) == 4
    for name, body in functions:
        assert not re.search(r"%[xyz]mm|\(%rsp|\(%rbp|\tcall|\tpush", body), name


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other machines have the baseline ISA only")
@pytest.mark.parametrize(("lower", "isa"), [("baseline", "avx2"), ("avx2", "avx512"), ("avx512", "avx512_bf16")])
def test_the_search_finds_what_each_isa_adds(lower: str, isa: str) -> None:
    require_compiled(isa)
    assert any(first_match(BEYOND[lower], path) for path in objects(f"isa_{isa}"))
