"""What mmkernels adds to pytest: two options and the fixture ``mmkernels_backends`` (docs/testing.md).

pytest loads this wherever the package is installed, so that it imports neither mmkernels nor torch before a test asks
for them; options become the environment variables that the package reads when it is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mmkernels.testing import BackendReport

_OPTIONS = {"--mmkernels-backend": "MMKERNELS_BACKEND", "--mmkernels-isa": "MMKERNELS_ISA"}
_GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmkernels")
    group.addoption(
        "--mmkernels-backend",
        choices=("reference", "cpu", "triton", "cuda", "simt"),
        help="run every op of mmkernels on this backend; a call that it cannot serve fails",
    )
    group.addoption("--mmkernels-isa", metavar="NAME", help="the instruction set of its compiled kernels, such as avx2")
    parser.addini(
        "mmkernels_interpret",
        "run Triton's kernels in its interpreter where there is no GPU (as --mmkernels-backend=triton does)",
        type="bool",
        default=False,
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before the first conftest.py can import mmkernels or triton."""
    given = {option: getattr(early_config.known_args_namespace, option[2:].replace("-", "_")) for option in _OPTIONS}
    for option, value in given.items():
        if value is None:
            continue
        if "mmkernels" in sys.modules and os.environ.get(_OPTIONS[option]) != value:
            raise pytest.UsageError(f"{option}: mmkernels was imported before; set {_OPTIONS[option]}={value} instead")
        os.environ[_OPTIONS[option]] = value
    interpreted = given["--mmkernels-backend"] == "triton" or early_config.getini("mmkernels_interpret")
    if interpreted and "triton" not in sys.modules and not any(driver.exists() for driver in _GPU_DRIVERS):
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def mmkernels_backends(request: pytest.FixtureRequest) -> Callable[..., dict[str, BackendReport]]:
    """`mmkernels.testing.check_backends`, whose reports are also shown when pytest ends."""
    from mmkernels.testing import check_backends

    def check(model: Callable[..., Any], *inputs: Any, **options: Any) -> dict[str, BackendReport]:
        reports = check_backends(model, *inputs, **options)
        request.node.user_properties += [("mmkernels", str(report)) for report in reports.values()]
        return reports

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    tests = [test for outcome in ("passed", "failed") for test in terminalreporter.stats.get(outcome, [])]
    shown = {test.nodeid: [text for name, text in test.user_properties if name == "mmkernels"] for test in tests}
    if not any(shown.values()):
        return
    terminalreporter.section("mmkernels: which backend served what")
    for nodeid, texts in shown.items():
        if texts:
            terminalreporter.write_line("\n".join([nodeid, *texts]))
