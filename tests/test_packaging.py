"""What is packaged: an sdist that can be built from, a wheel that runs in an environment of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import NATIVE_ABSENT
from environment import DEVICE

from mmkernels import __version__, _native

ROOT = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the checkout, without what was built in it."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a checkout")
    listed = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    folder = tmp_path_factory.mktemp("source")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(ROOT / name)
    return folder


def built(source: Path, kind: str, **environment: str) -> Path:
    """An sdist or a wheel of the folder, as ``python -m build --no-isolation`` makes it."""
    command = [sys.executable, "-c", BUILD, kind, str(source / "dist")]
    (source / "dist").mkdir(exist_ok=True)
    run = subprocess.run(command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return source / "dist" / run.stdout.splitlines()[-1]


def test_the_sdist_has_what_a_build_and_the_tests_read(source: Path) -> None:
    with tarfile.open(built(source, "sdist", MMKERNELS_BUILD_NATIVE="0")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    for folder in ("csrc", "mmkernels", "tests", "benchmarks", "tools"):
        missing = {name for name in listed if name.startswith(f"{folder}/")} - names
        assert not {name for name in missing if not name.endswith((".pyc", ".so"))}
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"):
        assert name in names
    assert "_mmkernels_pytest.py" in names and not any(name.endswith(".so") for name in names)


@pytest.mark.skipif(NATIVE_ABSENT is not None or DEVICE != "cpu", reason=str(NATIVE_ABSENT))
def test_a_wheel_runs_in_an_environment_of_its_own(source: Path) -> None:
    library = _native.library_path()
    assert library is not None
    wheel = built(source, "wheel", MMKERNELS_PREBUILT=str(Path(library).parent))
    check = [sys.executable, ROOT / "tools" / "check_wheel.py", wheel]
    run = subprocess.run(check, capture_output=True, text=True, timeout=600)
    isas = re.findall(r"cpu (\w+)", run.stdout)
    assert run.returncode == 0 and isas == _native.supported_isas(), run.stdout + run.stderr


def test_one_version_everywhere() -> None:
    declared = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    cited = re.findall(r"^version: (.*)", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert declared == cited == [__version__]
    assert f"all of it is {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_pre_commit_has_the_tools_of_the_requirements() -> None:
    pinned = set((ROOT / "requirements.txt").read_text().split())
    asked = re.findall(r"additional_dependencies: \[(.*)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert asked and set(asked) <= pinned
