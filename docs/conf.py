"""The site of the pages, by Sphinx: `make docs`.

The pages are plain Markdown that reads as well without it; what the site needs beside, its tree of pages, is here. Its
root is the repository's, so that README.md and CONTRIBUTING.md are pages too, and links between pages are those of the
files. A link to a file that is no page, as to a source, leads into MMKERNELS_REPOSITORY where that is set, the
address of a folder of files that ends in "/"; else its text stands alone.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs"]

project = "mmkernels"
html_title = project
extensions = ["myst_parser"]
root_doc = "README"
source_suffix = {".md": "markdown"}
exclude_patterns = [*(name for name in os.listdir(ROOT) if name not in PAGES), "docs/tools", "docs/**/*.py"]
myst_heading_anchors = 4
highlight_language = "none"  # indented blocks are formulas
html_theme = "furo"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = [str(ROOT / "docs" / "site")]
html_css_files = ["site.css"]

FEATURES = [
    "concat_linear",
    "concat_norm_linear",
    "gated_fusion",
    "gated_concat",
    "low_rank_fusion",
    "tensor_fusion_linear",
    "bilinear_fusion",
    "modulated_norm",
    "norm_rotary",
    "concat_tokens",
    "merge_embeddings",
]
ATTENTION = [
    "cross_attention",
    "bidirectional_cross_attention",
    "joint_attention",
    "varlen_cross_attention",
    "merge_attention",
    "deformable_attention",
    "additive_attention_pool",
    "multiplicative_attention_pool",
    "split_attention_pool",
]
DECISIONS = [
    "decision_fusion",
    "multimodal_cross_entropy",
    "contrastive_loss",
    "sigmoid_contrastive_loss",
    "distillation_loss",
]
LIBRARIES = ["torch", "transformers", "diffusers", "open_clip", "timm"]
INTERNALS = sorted(path.stem for path in (ROOT / "docs" / "internals").glob("*.md") if path.stem != "README")

# Page -> the pages below it, by heading; an entry is a path from the root, or "title <path>".
TREE = {
    "README": {
        "Begin": ["Quickstart <README>", "docs/choosing", "docs/padding", "docs/attention_weights", "docs/gallery"],
        "Features": [f"docs/{op}" for op in FEATURES],
        "Attention": [f"docs/{op}" for op in ATTENTION],
        "Decisions and losses": [f"docs/{op}" for op in DECISIONS],
        "Models": ["docs/whole_models", "docs/integrations", "docs/distributed", "docs/testing", "docs/benchmarking"],
        "About": [
            "docs/precision",
            "docs/limits",
            "docs/building",
            "docs/internals/README",
            "Writing an op, an ISA, a backend <CONTRIBUTING>",
            *(["CHANGELOG"] if (ROOT / "CHANGELOG.md").exists() else []),
            "All pages <docs/README>",
        ],
    },
    "docs/integrations": {"": [f"docs/integrations/{library}" for library in LIBRARIES]},
    "docs/internals/README": {"": [f"docs/internals/{page}" for page in INTERNALS]},
}
_NAMED = {re.sub(r".*<(.*)>$", r"\1", page) for below in TREE.values() for pages in below.values() for page in pages}
_FOUND = {path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
TREE["docs/README"] = {"": sorted(_FOUND - _NAMED)}  # generated tables and whatever has no place above
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")


def toctrees(page: str) -> str:
    """What MyST makes the tree below a page of."""

    def entry(path: str) -> str:
        return re.sub(r"<(.*)>$", r"</\1>", path) if "<" in path else f"/{path}"

    blocks = []
    for caption, pages in TREE.get(page, {}).items():
        options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
        entries = [entry(path).replace(f"</{page}>", "<self>") for path in pages]
        blocks.append("\n".join(["```{toctree}", *options, "", *entries, "```"]))
    return "\n\n".join(blocks)


def resolved(text: str, page: str) -> str:
    """A page's Markdown, with links to what is no page of the site taken out or led into the repository."""
    folder = (ROOT / page).parent
    repository = os.environ.get("MMKERNELS_REPOSITORY")

    def link(match: re.Match[str]) -> str:
        target = match[2].partition("#")[0]
        path = Path(os.path.normpath(folder / target)) if target else None
        if path is None or re.match(r"\w+:", match[2]):
            return match[0]
        inside = path.relative_to(ROOT).as_posix()
        if path.suffix == ".md" and inside.split("/")[0] in PAGES:
            return match[0]
        return f"[{match[1]}]({repository}{inside})" if repository else match[1]

    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def read(app: Any, page: str, source: list[str]) -> None:
    source[0] = f"{resolved(source[0], page)}\n\n{toctrees(page)}\n"


def outdated(app: Any, environment: Any, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """The pages that are read again in every build: those whose tree may have changed while they have not."""
    return list(TREE)


def add_index(app: Any, failure: Exception | None) -> None:
    """The first page under the name that servers look for."""
    if failure is None:
        shutil.copy(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app: Any) -> None:
    app.connect("source-read", read)
    app.connect("env-get-outdated", outdated)
    app.connect("build-finished", add_index)
