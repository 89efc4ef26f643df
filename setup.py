"""Drives CMake and Ninja to build mmkernels._C; every source and flag is in CMakeLists.txt.

MMKERNELS_REQUIRE_NATIVE=1  fail where the library cannot be built, instead of installing the pure Python package
MMKERNELS_BUILD_NATIVE=0    install the pure Python package without trying
MMKERNELS_BUILD_CUDA=0      leave out the CUDA kernels even where there is nvcc
MMKERNELS_TEST_ISA=1        add what only tests use: the widest ISA's code with emulated intrinsics, and the CUDA
                            kernels in the emulator
MMKERNELS_SANITIZE=1        build with ASan and UBSan into build/sanitize, and leave the package's own library alone
MMKERNELS_ISAS="a b"        compile these instruction sets only; baseline always is
MMKERNELS_PREBUILT=path     package the libraries in this directory instead of compiling
MMKERNELS_THIS_MACHINE=1    compile what this machine runs and no more: baseline, the best instruction set of its CPU,
                            CUDA kernels if it has a GPU; what a fuller build of before has is kept
CXX, CUDACXX, MAX_JOBS      the compilers; the number of parallel compile jobs
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "_C" + sysconfig.get_config_var("EXT_SUFFIX")


def flag(name: str, default: str = "0") -> bool:
    return os.environ.get(name, default).lower() not in ("", "0", "off", "false", "no")


SANITIZE = flag("MMKERNELS_SANITIZE")
TEST_ISA = flag("MMKERNELS_TEST_ISA")
THIS_MACHINE = flag("MMKERNELS_THIS_MACHINE")
PREBUILT = os.environ.get("MMKERNELS_PREBUILT")


def tool(*names: str) -> str | None:
    """The first of `names` found beside this Python (pip puts cmake and ninja there) or on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def torch_directory() -> Path | None:
    """Where torch is installed; found, not imported, so that a build that has nothing to do takes no time.

    In an isolated build torch is not importable, but the environment being installed into still has it.
    """
    spec = importlib.util.find_spec("torch")
    found = [Path(p) for p in spec.submodule_search_locations or []] if spec else []
    found += [Path(sysconfig.get_path(scheme)) / "torch" for scheme in ("platlib", "purelib")]
    return next((p for p in found if (p / "version.py").exists()), None)


CMAKE = tool("cmake")
NINJA = tool("ninja")
COMPILER = tool(os.environ["CXX"]) if "CXX" in os.environ else tool("g++", "c++", "clang++")
NVCC = tool(os.environ.get("CUDACXX", "nvcc")) if flag("MMKERNELS_BUILD_CUDA", "1") and not SANITIZE else None
TORCH = torch_directory()
SIMT = TEST_ISA and not SANITIZE and platform.machine() in ("x86_64", "AMD64")
LIBRARIES = [LIBRARY, *(["libmmkernels_cuda.so"] if NVCC else []), *(["libmmkernels_simt.so"] if SIMT else [])]


def why_not_native() -> str | None:
    if not flag("MMKERNELS_BUILD_NATIVE", "1"):
        return "MMKERNELS_BUILD_NATIVE=0"
    if PREBUILT:
        return None if (Path(PREBUILT) / LIBRARY).exists() else f"MMKERNELS_PREBUILT={PREBUILT} holds no {LIBRARY}"
    headers = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    needed = {
        "torch": TORCH,
        "a C++ compiler": COMPILER,
        "cmake": CMAKE,
        "ninja": NINJA,
        "Python.h (python3-dev in Debian)": headers,
    }
    missing = [name for name, found in needed.items() if not found]
    return f"not found: {', '.join(missing)}" if missing else None


WHY_NOT = why_not_native()


def announce_no_native() -> None:
    message = f"mmkernels: no native library will be built ({WHY_NOT})"
    if flag("MMKERNELS_REQUIRE_NATIVE"):
        raise SystemExit(f"{message}, and MMKERNELS_REQUIRE_NATIVE is set")
    print(f"WARNING: {message}; every op will run on its PyTorch reference", file=sys.stderr)


class Build(build):
    def run(self) -> None:
        if WHY_NOT:
            announce_no_native()
        super().run()


class BuildNative(build_ext):
    """Compiles in a directory that is kept, so that only what changed is compiled again, then copies the library."""

    def run(self) -> None:
        if WHY_NOT:
            return announce_no_native()
        libraries = build_native()
        if SANITIZE:
            return
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "mmkernels"
        package.mkdir(parents=True, exist_ok=True)
        for built in libraries:
            destination = package / built.name
            if not destination.exists() or destination.read_bytes() != built.read_bytes():
                # A running process may have the old file mapped: replace it, do not write into it.
                copy = destination.with_name(destination.name + ".tmp")
                shutil.copy2(built, copy)
                copy.replace(destination)

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "mmkernels" / name) for name in LIBRARIES]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in names them


def build_native() -> list[Path]:
    """Compiles; the libraries that it made."""
    if PREBUILT:
        return [library for name in LIBRARIES if (library := Path(PREBUILT) / name).exists()]
    assert TORCH and CMAKE and NINJA and COMPILER
    match = re.search(r"__version__ = '([^']+)'", (TORCH / "version.py").read_text())
    torch_version = match.group(1) if match else "unknown"
    tag = f"{sys.implementation.cache_tag}-torch{torch_version}-{platform.machine()}{'-test' if TEST_ISA else ''}"
    directory = ROOT / "build" / ("sanitize" if SANITIZE else tag)
    configure = [
        *(CMAKE, "-S", str(ROOT), "-B", str(directory), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={NINJA}",
        f"-DCMAKE_CXX_COMPILER={COMPILER}",
        f"-DTORCH_DIR={TORCH}",
        f"-DPYTHON_INCLUDE_DIR={sysconfig.get_path('include')}",
        f"-DLIBRARY_NAME={LIBRARY}",
        f"-DMMKERNELS_TEST_ISA={'ON' if TEST_ISA else 'OFF'}",
        f"-DMMKERNELS_SIMT={'ON' if SIMT else 'OFF'}",
        f"-DMMKERNELS_NVCC={NVCC or ''}",
        f"-DMMKERNELS_SANITIZE={'ON' if SANITIZE else 'OFF'}",
        f"-DMMKERNELS_ISAS={';'.join(os.environ.get('MMKERNELS_ISAS', '').split())}",
    ]
    stamp = directory / "configured.txt"
    arguments = "\n".join(configure)
    try:
        if not stamp.exists() or stamp.read_text() != arguments:
            (directory / "CMakeCache.txt").unlink(missing_ok=True)
            subprocess.run(configure, check=True)
            stamp.write_text(arguments)
        libraries, targets = LIBRARIES, []
        if THIS_MACHINE and not is_current(directory / LIBRARY):
            libraries, targets = [f"here/{LIBRARY}"], ["_C_here"]
            if NVCC and Path("/dev/nvidiactl").exists():
                libraries, targets = [*libraries, "libmmkernels_cuda.so"], [*targets, "mmkernels_cuda"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([NINJA, "-C", str(directory), "--quiet", *jobs, *targets], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"mmkernels: building the native library failed (exit code {error.returncode}; the messages are above, "
            "with pip under -v). MMKERNELS_BUILD_NATIVE=0 installs without it."
        ) from None
    return [directory / name for name in libraries]


def is_current(library: Path) -> bool:
    """Whether it was linked after the last change of a source for CPUs."""
    sources = [ROOT / "CMakeLists.txt", *(x for x in (ROOT / "csrc").rglob("*") if x.suffix not in (".cu", ".cuh"))]
    return library.exists() and library.stat().st_mtime > max(source.stat().st_mtime for source in sources)


setup(
    ext_modules=[] if WHY_NOT else [Extension("mmkernels._C", sources=[])],
    cmdclass={"build": Build, "build_ext": BuildNative},
)
