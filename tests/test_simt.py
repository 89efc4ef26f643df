"""The emulator of CUDA kernels: what it must catch, the kernels under sanitizers, the ordinary tests on the kernels."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SIMT_ABSENT
from environment import ALONE, DEVICE

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
SANITIZERS = {
    "none": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="its fibers switch in x86-64's assembly"),
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(DEVICE != "cpu" or ALONE is not None, reason="it has been tested with the ordinary tests"),
]


def built(name: str, sanitizer: str, folder: Path) -> list[str]:
    """The command that runs tests/simt/<name>.cpp."""
    program = folder / name
    flags = [
        "-std=c++20",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Werror",
        "-DMMK_SIMT",
        f"-I{ROOT}",
    ]
    source = ROOT / "tests" / "simt" / f"{name}.cpp"
    command = [str(COMPILER), *flags, *SANITIZERS[sanitizer], f"-I{ROOT}", str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    # ThreadSanitizer wants its addresses where they always are.
    setarch = shutil.which("setarch")
    return [setarch, "-R", str(program)] if sanitizer == "thread" and setarch else [str(program)]


def run(command: list[str]) -> str:
    # What a kernel that failed had allocated stays with its threads, which never end.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    return done.stdout + done.stderr


MUTANTS = {
    "none": r"^nothing\n$",
    "no barrier": r"wrong results",
    "late wait": r"4096 wrong results",
    "short shared memory": r"beyond the shared memory",
    "no swizzle": r"2400 bank conflicts",
    "divergent lanes": r"lanes of a warp meet at different collectives",
    "early return": r"__syncthreads with threads that have returned",
    "misaligned copy": r"an address that 16 does not divide, block \(0,0,0\) thread \(5,0,0\)",
}


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_mutants_are_caught_in_every_order(sanitizer: str, tmp_path: Path) -> None:
    program = built("mutants", sanitizer, tmp_path)
    for mutant, caught in MUTANTS.items():
        if sanitizer == "thread" and mutant == "no barrier":
            caught = "ThreadSanitizer: data race"
        for seed in (0, 1, 5):
            assert re.search(caught, printed := run([*program, mutant, str(seed)])), (mutant, seed, printed)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_kernels_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    program = built("sanitized", sanitizer, tmp_path)
    for seed in (3,) if sanitizer == "thread" else (0, 3):
        assert run([*program, str(seed)]) == "0 failures\n"


ORDINARY = {
    "token ops": ["test_modulated_norm.py", "test_concat_tokens.py", "test_merge_embeddings.py"],
    "cross_attention": ["test_cross_attention.py", "test_cross_attention_torch.py"],
    "joint_attention": ["test_joint_attention.py"],
    "concat_linear": ["test_concat_linear.py", "test_concat_norm_linear.py"],
}


@pytest.mark.skipif(SIMT_ABSENT is not None, reason=str(SIMT_ABSENT))
@pytest.mark.parametrize("op", ORDINARY)
def test_the_ordinary_tests_pass_on_the_kernels(op: str) -> None:
    files = [str(ROOT / "tests" / name) for name in ORDINARY[op]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    environment = {**os.environ, "MMKERNELS_BACKEND": "simt", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 20, done.stdout[-500:]
