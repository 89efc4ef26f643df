"""What an installed wheel has to do: ``tools/check_wheel.py dist/mmkernels-*.whl``.

The wheel is installed into a fresh virtual environment, without anything it depends on: torch and numpy are lent by the
Python that runs this, or fetched with ``--fetch``. There every op is held to its reference on every instruction set.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SMOKE = """
import sys
from importlib.metadata import entry_points
from pathlib import Path
import torch
import mmkernels as mmk
from mmkernels import _native
from mmkernels.testing import assert_matches_reference, example_inputs, implementations, op_names

assert Path(mmk.__file__).is_relative_to(sys.prefix), mmk.__file__
assert _native.available(), _native.reason()
assert set(sys.argv[1:]) <= set(_native.compiled_isas()), _native.compiled_isas()
assert entry_points(group="pytest11")["mmkernels"].load().__name__ == "_mmkernels_pytest"
for op in op_names():
    for each in implementations():
        with each.forced():
            for dtype in (torch.float32, torch.bfloat16):
                assert_matches_reference(getattr(mmk, op), **example_inputs(op, dtype))
print(f"{len(op_names())} ops on", ", ".join(map(str, implementations())))
"""


def instruction_sets() -> list[str]:
    """Those that a build for users has on this machine's architecture, by CMakeLists.txt."""
    text = (ROOT / "CMakeLists.txt").read_text()
    x86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
    return ["baseline", *(re.findall(r"list\(APPEND ISAS (avx2.*)\)", text)[0].split() if x86 else [])]


def contents(wheel: Path) -> list[str]:
    """What is wrong with the files of a wheel."""
    names = zipfile.ZipFile(wheel).namelist()
    needed = [r"mmkernels/_C\..*\.so", r"mmkernels/py\.typed", r"mmkernels/bench/page\.html", r"_mmkernels_pytest\.py"]
    needed += [r".*\.dist-info/licenses/LICENSE", r".*\.dist-info/entry_points\.txt"]
    problems = [f"no {pattern}" for pattern in needed if not any(re.fullmatch(pattern, name) for name in names)]
    own = re.compile(r"(mmkernels/|_mmkernels_pytest\.py|mmkernels-[^/]*\.dist-info/)")
    return problems + [f"{name} does not belong there" for name in names if not own.match(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--fetch", action="store_true", help="install what it depends on from the package index")
    args = parser.parse_args()
    if problems := contents(args.wheel):
        print("\n".join(problems))
        return 1
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=args.fetch)
        python = Path(folder) / "bin" / "python"
        site = next((Path(folder) / "lib").glob("python*/site-packages"))
        if args.fetch:
            subprocess.run([python, "-m", "pip", "install", "--quiet", args.wheel, "pytest"], check=True)
        else:
            install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
            subprocess.run([*install, "--disable-pip-version-check", args.wheel], check=True)
            # Its packages, and nothing that is installed for development there: .pth files of it are not read.
            (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "MMKERNELS_REQUIRE_NATIVE": "1"}
        command = [python, "-c", SMOKE, *instruction_sets()]
        return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
