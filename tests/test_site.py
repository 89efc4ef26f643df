"""The site that `make docs` leaves in build/docs: on a phone no page is wider than the screen."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SITE = Path(__file__).parents[1] / "build" / "docs"
BROWSER = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
WIDTH = 390  # of a phone, in CSS pixels
PAGES = ["index", "docs/choosing", "docs/padding", "docs/cross_attention", "docs/internals/concat_linear"]

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium"),
    pytest.mark.skipif(not (SITE / "index.html").exists(), reason="no site: `make docs` builds it"),
]
TELL = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll(".main *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest(".table-wrapper, pre, .highlight"));
  parent.postMessage([PAGE, document.documentElement.scrollWidth, wide.map(e => e.textContent.slice(0, 60))], "*");
})</script>"""


def test_no_page_is_wider_than_a_phone(tmp_path):
    """Each page stands in a frame of that width and says how wide it became, and what of it is too wide."""
    frames = []
    for i, page in enumerate(PAGES):
        path = SITE / f"{page}.html"
        text = path.read_text(encoding="utf-8").replace("<head>", f'<head><base href="{path.as_uri()}">', 1)
        (tmp_path / f"{i}.html").write_text(text + TELL.replace("PAGE", repr(page)), encoding="utf-8")
        frames.append(f'<iframe width="{WIDTH}" height="800" style="border:0" src="{i}.html"></iframe>')
    listen = (
        "<script>addEventListener('message', e => { document.body.append('[' + e.data.join(' | ') + ']') })</script>"
    )
    (tmp_path / "all.html").write_text(f"<!doctype html><body>{listen}{''.join(frames)}</body>", encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom"]
    dom = subprocess.run(
        [*command, (tmp_path / "all.html").as_uri()], capture_output=True, text=True, timeout=900, check=True
    ).stdout
    said = {page: (int(width), what) for page, width, what in re.findall(r"\[([\w/]+) \| (\d+) \| ([^\]]*)\]", dom)}
    assert set(said) == set(PAGES), dom[-2000:]
    assert {page: what for page, (width, what) in said.items() if width > WIDTH} == {}
