"""The build and what a user sees of it: `info`, absent libraries, ISAs chosen by environment, no compiler."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmkernels import _native
from mmkernels.__main__ import main

ROOT = Path(__file__).resolve().parent.parent

native_only = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.reason()}")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def import_native_again(monkeypatch: pytest.MonkeyPatch, **environment: str) -> ModuleType:
    """Executes mmkernels/_native.py as a fresh import in `environment` would."""
    for name in ("MMKERNELS_REQUIRE_NATIVE", "MMKERNELS_BACKEND", "MMKERNELS_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("native_again", _native.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def isa_restored() -> Iterator[None]:
    before = _native.isa()
    yield
    _native.set_isa(before)


def test_info_prints_versions_isas_threads_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    lines = {label.strip(): value.strip() for label, value in lines.items()}
    assert lines["torch"] == torch.__version__
    assert lines["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert lines["mmkernels"] and lines["CPU"] and lines["GPU"]
    assert int(lines["threads"]) >= 1
    assert lines["backend reference"] == "available"
    assert lines["backend cpu"] == "available" or lines["backend cpu"].startswith("absent: ")
    if _native.available():
        assert lines["compiled ISAs"].startswith("baseline")
        assert lines["ISA in use"] in lines["supported ISAs"].split(", ")


def test_info_as_json_from_the_command_line_agrees_with_the_loaded_library() -> None:
    printed = run("-m", "mmkernels", "info", "--json")
    assert printed.returncode == 0, printed.stderr
    info = json.loads(printed.stdout)
    assert info["native"]["compiled_isas"] == _native.compiled_isas()
    assert info["native"]["supported_isas"] == _native.supported_isas()
    assert info["backends"]["reference"] is None


def test_an_unknown_command_prints_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-command"]) == 2
    assert "{info,bench,kernels}" in capsys.readouterr().err


def test_importing_without_the_library_fails_when_it_is_required(tmp_path: Path) -> None:
    printed = run("-c", "import mmkernels", MMKERNELS_LIBRARY_DIR=str(tmp_path), MMKERNELS_REQUIRE_NATIVE="1")
    assert printed.returncode != 0
    assert "ImportError: the compiled library of mmkernels is not available" in printed.stderr
    assert "MMKERNELS_REQUIRE_NATIVE" in printed.stderr


def test_importing_without_the_library_warns_once_and_ops_still_run(tmp_path: Path) -> None:
    code = "import torch, mmkernels; q = torch.ones(1, 1, 2, 8); print(mmkernels.cross_attention(q, q, q).sum().item())"
    printed = run(
        "-c",
        code,
        MMKERNELS_LIBRARY_DIR=str(tmp_path),
        MMKERNELS_REQUIRE_NATIVE="0",
        MMKERNELS_BACKEND="",
        MMKERNELS_ISA="",
    )
    assert printed.returncode == 0, printed.stderr
    assert float(printed.stdout) == 16.0
    assert printed.stderr.count("RuntimeWarning") == 1


def test_an_absent_library_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(RuntimeWarning, match="every op runs on its PyTorch reference"):
        native = import_native_again(monkeypatch, MMKERNELS_LIBRARY_DIR=str(tmp_path))
    assert not native.available()
    assert str(tmp_path) in native.reason()
    assert (native.compiled_isas(), native.supported_isas(), native.isa()) == ([], [], "none")
    with pytest.raises(RuntimeError, match="not available"):
        native.set_isa("baseline")


def test_choosing_the_reference_silences_the_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_native_again(monkeypatch, MMKERNELS_LIBRARY_DIR=str(tmp_path), MMKERNELS_BACKEND="reference")


@native_only
def test_a_library_built_for_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    with pytest.warns(RuntimeWarning, match=r"built for torch .* and this is torch 1\.0"):
        native = import_native_again(monkeypatch)
    assert not native.available()


@native_only
@pytest.mark.parametrize("isa", _native.supported_isas())
def test_the_environment_chooses_the_isa(isa: str, isa_restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert import_native_again(monkeypatch, MMKERNELS_ISA=isa).isa() == isa


@native_only
def test_an_unknown_isa_is_an_error_that_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"MMKERNELS_ISA=sse9: .* not compiled for it; supported here: .*baseline"):
        import_native_again(monkeypatch, MMKERNELS_ISA="sse9")


@native_only
def test_an_isa_this_cpu_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = set(_native.compiled_isas()) - set(_native.supported_isas())
    if not lacking:
        pytest.skip("this CPU runs every compiled instruction set")
    with pytest.raises(ValueError, match="this CPU cannot run it"):
        import_native_again(monkeypatch, MMKERNELS_ISA=lacking.pop())


def compiled_for(target: str) -> set[str]:
    """What a target of the Makefile's build consists of: instruction sets, "host", "simt" and "cuda"."""
    builds = [x.parent for x in ROOT.glob("build/*-test/build.ninja")]
    if not builds:
        pytest.skip("the Makefile has built nothing here")
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    commands = subprocess.run(
        [str(ninja), "-C", str(builds[0]), "-t", "commands", target], check=True, capture_output=True, text=True
    ).stdout
    parts = {"host": "host.dir/csrc", "simt": "mmkernels_simt.dir", "cuda": "mmkernels_cuda.dir"}
    return {*re.findall(r"-DMMK_ISA=(\w+) ", commands), *(name for name, text in parts.items() if text in commands)}


@native_only
def test_make_bench_compiles_the_baseline_and_the_instruction_set_that_runs_and_nothing_else() -> None:
    best = _native.default_isa()
    assert compiled_for("_C_here") == {"host", "baseline", "avx512_bf16" if best == "amx" else best}


@native_only
def test_the_whole_library_has_every_instruction_set() -> None:
    on_tiles = {"amx", "amx_portable"}  # the kernels of avx512_bf16
    assert compiled_for("_C") == {"host", *_native.compiled_isas()} - on_tiles


def build_wheel_without_compiler(out: Path, require_native: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools")
    return run(
        *("setup.py", "--quiet", "egg_info", "--egg-base", str(out), "build", "--build-base", str(out / "build")),
        *("bdist_wheel", "--bdist-dir", str(out / "bdist"), "--dist-dir", str(out)),
        CXX="/nonexistent/c++",
        MMKERNELS_REQUIRE_NATIVE=require_native,
    )


def test_without_a_compiler_the_wheel_is_pure_python_and_one_warning_says_so(tmp_path: Path) -> None:
    built = build_wheel_without_compiler(tmp_path, require_native="0")
    assert built.returncode == 0, built.stderr
    assert built.stderr.count("WARNING: mmkernels: no native library will be built") == 1
    assert "a C++ compiler" in built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "mmkernels/_native.py" in names and "mmkernels/py.typed" in names
    assert not [name for name in names if name.endswith(".so")]


def test_without_a_compiler_the_build_fails_when_the_library_is_required(tmp_path: Path) -> None:
    built = build_wheel_without_compiler(tmp_path, require_native="1")
    assert built.returncode != 0
    assert "MMKERNELS_REQUIRE_NATIVE is set" in built.stderr
