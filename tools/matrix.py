"""``make matrix``: other compilers and other Pythons than the one in use, each tried once.

Each builds in a copy of the checkout under ``build/matrix`` and runs a choice of the tests there; what is not on this
machine is said to be absent. The results are written into docs/building.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "building.md"
BEGIN, END = "<!-- matrix: written by `make matrix` -->\n", "<!-- end of matrix -->\n"
TESTS = ("concat_linear", "gated_fusion", "modulated_norm", "joint_attention", "testing_kit", "isa_isolation")


def copy_of_checkout(name: str) -> Path:
    """The checkout's files, in a folder that keeps what was built there before."""
    folder = ROOT / "build" / "matrix" / name.replace(" ", "_")
    listed = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for file in filter(None, listed.split("\0")):
        source, target = ROOT / file, folder / file
        if source.is_file() and not (target.exists() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return folder


def run(command: list[str], folder: Path, **environment: str) -> str:
    """The output of a command; raises with its last lines where it fails."""
    print("$", " ".join(command), flush=True)
    own = {k: v for k, v in os.environ.items() if not k.startswith("MMKERNELS_")}
    done = subprocess.run(
        command, cwd=folder, env={**own, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError("\n".join(done.stdout.splitlines()[-15:]))
    return done.stdout


def build_and_test(name: str, python: str, isas: str, **environment: str) -> str:
    """What the tests say of a build by a compiler or for a Python."""
    folder = copy_of_checkout(name)
    tested = {"PYTHONPATH": str(folder)}
    if isas == "none":
        tested["MMKERNELS_BACKEND"] = "reference"
    else:
        environment |= {"MMKERNELS_REQUIRE_NATIVE": "1", "MMKERNELS_BUILD_CUDA": "0", "MMKERNELS_ISAS": isas}
        run([python, "setup.py", "--quiet", "build_ext", "--inplace"], folder, **environment)
    tests = [f"tests/test_{test}.py" for test in TESTS]
    said = run([python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests], folder, **tested)
    return re.sub(r" in .*", "", said.splitlines()[-1].strip("= "))


def runs(tool: str) -> bool:
    """Whether it is there, and no stand-in that only says where it would be."""
    return shutil.which(tool) is not None and not subprocess.run([tool, "--version"], capture_output=True).returncode


def version(tool: str) -> str:
    return subprocess.check_output([tool, "--version"], text=True).splitlines()[0]


def compiler(cxx: str) -> Callable[[argparse.Namespace], tuple[str, str]]:
    def tried(args: argparse.Namespace) -> tuple[str, str]:
        return version(cxx), build_and_test(cxx, sys.executable, args.isas, CXX=cxx)

    return tried


def interpreter(python: str) -> Callable[[argparse.Namespace], tuple[str, str]]:
    """A Python with an environment of its own, which pip fills from requirements.txt."""

    def tried(args: argparse.Namespace) -> tuple[str, str]:
        folder = copy_of_checkout(python)
        own = str(folder / ".venv" / "bin" / "python")
        if not Path(own).exists():
            run([python, "-m", "venv", ".venv"], folder)
            run([own, "-m", "pip", "install", "--quiet", "-r", "requirements.txt"], folder)
        return version(python), build_and_test(python, own, args.isas)

    return tried


CROSS = "aarch64-linux-gnu-g++"
# The kernels that tests/aarch64/driver.cpp calls, and what those call.
CROSS_KERNELS = (
    *("attention/attention_backward_cpu", "attention/attention_forward_cpu", "attention/product_cpu"),
    *("concat/product_cpu", "concat_linear/concat_linear_backward_cpu", "concat_linear/concat_linear_forward_cpu"),
    *("cpu/pack_cpu", "cpu/products_cpu", "merge_attention/merge_attention_cpu"),
    *("modulated_norm/modulated_norm_cpu", "norm/row_norm_cpu"),
)
CROSS_FLAGS = (  # results are compared and nothing is timed, so that compiling may be quick
    *("-std=c++20", "-I.", "-Wall", "-Wextra", "-O0", "-DNDEBUG"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
CROSS_ISAS = {"baseline": [], "neon": [], "neon_bf16": ["-march=armv8.2-a+bf16"]}


def aarch64(args: argparse.Namespace) -> tuple[str, str]:
    """Kernels compiled for NEON, run against baseline's under qemu-user."""
    folder = copy_of_checkout("aarch64")
    units: dict[str, list[str]] = {
        name: [f"csrc/cpu/{name}.cpp"] if name != "driver" else ["tests/aarch64/driver.cpp"]
        for name in ("driver", "scratch", "huge_pages")
    }
    for isa, march in CROSS_ISAS.items():
        for kernel in CROSS_KERNELS:
            defined = [f"-DMMK_ISA={isa}", f"-DMMK_ISA_{isa}=1", *march]
            units[f"{isa}-{kernel.replace('/', '-')}"] = [f"csrc/{kernel}.isa.cpp", *defined]
    (folder / "objects").mkdir(exist_ok=True)
    newest = max(path.stat().st_mtime for path in (folder / "csrc").rglob("*") if path.is_file())

    def compile_unit(name: str) -> str:
        built = f"objects/{name}.o"
        if name == "driver" or not (folder / built).exists() or (folder / built).stat().st_mtime < newest:
            run([CROSS, *CROSS_FLAGS, "-c", *units[name], "-o", built], folder)
        return built

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compile_unit, units))
    run([CROSS, "-static", *objects, "-o", "driver"], folder)
    said = run(["qemu-aarch64", "-cpu", "max", "./driver"], folder)
    print(said)
    isas = ", ".join(isa for isa in CROSS_ISAS if isa != "baseline")
    named = f"{isas}, by {version(CROSS)} in {version('qemu-aarch64')}"
    return re.sub(r" Copyright.*", "", named), said.splitlines()[-1]


TRIED: dict[str, tuple[str, Callable[[argparse.Namespace], tuple[str, str]]]] = {
    "g++": ("g++", compiler("g++")),
    "clang++": ("clang++", compiler("clang++")),
    "Python 3.10": ("python3.10", interpreter("python3.10")),
    "Python 3.12": ("python3.12", interpreter("python3.12")),
    "aarch64": (CROSS, aarch64),
}


def rows_of_page() -> dict[str, str]:
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    return {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make matrix ARGS=", description=__doc__)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(TRIED)} (default: all)")
    isas = "instruction sets to compile, all if none are named; `none` tests the references without the library"
    parser.add_argument("--isas", default="", help=isas)
    args = parser.parse_args()
    if unknown := [what for what in args.what if what not in TRIED]:
        parser.error(f"expected {', '.join(TRIED)}; got {', '.join(unknown)}")
    rows, failed = rows_of_page(), False
    for what in args.what or TRIED:
        tool, tried = TRIED[what]
        if not runs(tool):
            named, result = f"no {tool} on this machine", "not tried"
        else:
            try:
                named, result = tried(args)
            except RuntimeError as error:
                print(f"{what}: {error}")
                named, result, failed = version(tool), "failed", True
        compiled = ", references alone" if args.isas == "none" else f", compiled for baseline and {args.isas}"
        compiled = "" if not args.isas or result == "not tried" or what == "aarch64" else compiled
        rows[what] = f"| {what} | {named}{compiled} | {result} | {date.today()} |"
        print(rows[what], flush=True)
    head = "| | | result | |\n|---|---|---|---|\n"
    table = head + "".join(f"{rows[what]}\n" for what in TRIED if what in rows)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
