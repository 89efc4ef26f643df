"""The pages: their links lead somewhere, their code runs, their tables say what the signatures say."""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import why_no_models
from docs_names import NAMES, OF_LIBRARIES

import mmkernels as mmk
from mmkernels import distributed, integrations
from mmkernels.integrations import torch as torch_integration
from mmkernels.integrations import transformers as transformers_integration

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACES = {str(page.relative_to(ROOT)): page for page in PAGES}


def tool(name: str) -> Any:
    """A module of docs/tools."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for names
    spec.loader.exec_module(module)
    return module


parameters, drawings = tool("parameters"), tool("drawings")


def prose(page):
    """A page without its code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def programs(page) -> list[str]:
    """The Python of a page, each block with as many lines before it as on the page."""
    text = page.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return ["\n" * (text.count("\n", 0, block.start()) + 1) + block[1] for block in blocks]


def examples() -> Iterator[tuple[str, Any]]:
    """Every public function and class whose docstring has an example."""
    for module in (mmk, mmk.nn, distributed, integrations, torch_integration, transformers_integration):
        for name in module.__all__:
            if ">>> " in (getattr(module, name).__doc__ or ""):
                yield f"{module.__name__}.{name}", getattr(module, name)


@pytest.mark.parametrize("page", PAGES, ids=PLACES)
def test_links_lead_to_files_and_headings_that_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))
    for link in (link for link in links if not re.match(r"\w+:", link)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


def test_every_page_is_reached_from_the_readme():
    seen, found = set(), [ROOT / "README.md"]
    while found:
        page = found.pop()
        seen.add(page)
        links = (page.parent / link.partition("#")[0] for link in re.findall(r"\]\(([^)\s:]+)\)", prose(page)))
        found += {p for link in links if (p := link.resolve()).suffix == ".md" and p.exists()} - seen
    assert {page for page in PAGES if page.parent.name != "gpu"} <= seen


def begin(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place to run code of the pages, with a seed, in an empty folder."""
    if place in OF_LIBRARIES and (reason := why_no_models()):
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    torch.manual_seed(0)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def native() -> Iterator[None]:
    """diffusers has one attention backend for all models that name none, which a page may set."""
    yield
    if dispatch := sys.modules.get("diffusers.models.attention_dispatch"):
        dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName.NATIVE)


@pytest.mark.parametrize("place", [place for place, page in PLACES.items() if programs(page)])
def test_the_code_of_a_page_runs(place, alone, native, tmp_path, monkeypatch):
    begin(place, tmp_path, monkeypatch)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where dataclasses look for names
    vars(module).update(NAMES.get(place, dict)())
    for program in programs(PLACES[place]):
        exec(compile(program, place, "exec"), vars(module))


@pytest.mark.parametrize(("name", "public"), [pytest.param(*example, id=example[0]) for example in examples()])
def test_the_example_of_a_docstring_prints_what_it_says(name, public, alone, tmp_path, monkeypatch):
    begin(name, tmp_path, monkeypatch)
    module = sys.modules[public.__module__]
    names = {"torch": torch, "F": F, "mmk": mmk, **vars(mmk), **vars(distributed), **vars(module)}
    names.update(NAMES.get(name, dict)())
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    test = doctest.DocTestParser().get_doctest(public.__doc__, names, name, None, None)
    said: list[str] = []
    assert test.examples and not runner.run(test, out=said.append).failed, "".join(said)


@pytest.mark.parametrize("place", [place for place, page in PLACES.items() if parameters.documented(page.read_text())])
def test_the_tables_of_a_page_are_those_of_the_signatures(place):
    page = PLACES[place].read_text(encoding="utf-8")
    assert page == parameters.rewritten(page), "`make pages` writes them"


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_drawing_is_that_of_its_code(name):
    drawn = (drawings.PICTURES / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == drawings.DRAWINGS[name](), "`make pages` draws them"


def test_every_public_function_and_module_has_a_table():
    documented = [name for page in PAGES for name in parameters.documented(page.read_text(encoding="utf-8"))]
    public = [name for name in mmk.__all__ if name in dir(mmk) and callable(getattr(mmk, name)) and name.islower()]
    public = [name for name in public if name not in ("explain", "use_backend")]
    assert sorted(documented) == sorted([*public, *(f"nn.{name}" for name in mmk.nn.__all__)])
