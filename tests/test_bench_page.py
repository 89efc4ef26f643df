"""The page that a run leaves: whole in itself, and it sorts and filters in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_toys import run, toy_benchmarks

from mmkernels.bench import html, svg
from mmkernels.bench.compare import Change
from mmkernels.bench.engine import Row
from mmkernels.bench.machine import Ceilings

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta", "link", "input", "br"}
BROWSER = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)

MACHINE = {
    "machine": {"cpu": "A <CPU>", "threads": 1, "gpus": [], "amx": False},
    "native": {"reason": None, "isa": "avx2"},
    "versions": {"torch": "2.13", "triton": None},
}
CEILINGS = {1: Ceilings({"float32": 2e11}, {1 << 22: 1e11, 1 << 28: 1e10})}


class Outline(HTMLParser):
    """Which tags a page has, whether each is closed, and what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def measured(op: str, n: int, ours: float, torch: float | None, **changes: object) -> Row:
    seconds = {"ours": ours} | ({} if torch is None else {"torch": torch})
    settings = {"group": "forward", "note": f"note {n}", "dtype": "float32", "length": n, "series": op} | changes
    sizes = {"flops": 2.0 * n**3, "bytes": 12.0 * n * n, "peak": 2e11, "bound": 1e-6}
    return Row(op=op, shape=f"{n}x{n}", seconds=seconds, **sizes, **settings)


def some_rows() -> list[Row]:
    rows = [measured("alpha", 64, 3e-5, 6e-5), measured("alpha", 128, 1e-4, 4e-4), measured("beta", 64, 2e-5, 1e-5)]
    rows += [measured("beta", 9, 9e-6, None, training=True), measured("beta", 7, 1.0, 1.0, error="AssertionError: <b>")]
    rows[-1].seconds.clear()
    rows[0].memory = {"ours": {"peak": 1_000_000}, "torch": {"peak": 4_000_000}}
    rows[0].latency = {"ours": {"p50": 3e-5, "p90": 4e-5, "p99": None}}
    return rows


def some_page(rows: list[Row]) -> str:
    baselines, when = {"alpha": "torch & co", "beta": "torch"}, datetime(2030, 1, 2, 3, 4)
    change = Change("alpha", "forward 64x64 float32", 6e-5, 3e-5, 2.0, 1.0)
    return html.page(rows, baselines, MACHINE, CEILINGS, when, [change])


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    found.close()
    assert found.open == [], found.open
    return found


def test_the_page_is_whole_in_itself_and_well_formed() -> None:
    page = some_page(some_rows())
    found = outline(page)
    assert not re.findall(r"<!--\w+-->", page), "a place of the template was left empty"
    for tag, attributes in found.tags:
        assert tag not in ("img", "iframe", "object")
        assert attributes.get("src") is None and (attributes.get("href") or "data:,") == "data:,"
    assert not re.search(r"https?:|url\(|@import|fetch\(", page)
    assert "A &lt;CPU&gt;" in page and "<CPU>" not in page and "&lt;b&gt;" in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_says_what_is_faster_slower_and_wrong() -> None:
    page = some_page(some_rows())
    assert '<b class="good">1</b>ops ahead' in page and '<b class="bad">1</b>behind it' in page
    assert '<b class="bad">1</b>wrong results' in page
    assert "beta, forward, 64x64 (note 64), float32: 0.50x as fast as torch, which takes 50% less time" in page
    assert "2.00x as fast over 1 rows; torch itself 1.00x" in page
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    assert table.count("<tr ") == 5 and table.count('class="bad"') == 1 and "WRONG" in table
    columns = page[page.index("<thead>") : page.index("</thead>")].count("<th ")
    assert all(line.count("<td") == columns for line in table.split("</tr>")[:-1])
    assert 'data-v="1e+06">1<' in table and 'data-v="3e-05">0.030<' in table and 'data-v="">-<' in table
    assert "1 of 4 MB" in page


def test_every_measured_row_is_a_dot_and_growing_shapes_are_joined() -> None:
    page = some_page(some_rows())
    times = re.findall(r'<figure class="time">.*?</figure>', page)
    roofs = re.findall(r'<figure class="roofline">.*?</figure>', page)
    assert [figure.count("<circle") for figure in times] == [4, 3] == [figure.count("<circle") for figure in roofs]
    assert [figure.count("<polyline") for figure in times] == [2, 0]  # of alpha, ours and torch
    assert all('class="roof"' in figure and "200 GF/s" in figure for figure in roofs)
    for place in re.findall(r'(?:cx="([\d.-]+)" cy="([\d.-]+)"|points="([^"]+)")', page):
        pairs = [place[:2]] if place[0] else [pair.split(",") for pair in place[2].split()]
        for x, y in pairs:
            assert 0 <= float(x) <= svg.WIDTH and 0 <= float(y) <= svg.HEIGHT


def test_a_slope_of_the_roof_is_the_memorys_rate_and_its_ridge_the_products() -> None:
    assert html._roof(2e11, 1e10, (-1, 2)).points == [(0.1, 1.0), (20.0, 200.0), (100.0, 200.0)]
    page = some_page(some_rows())
    for figure in re.findall(r'<figure class="roofline">.*?</figure>', page):
        lines = re.findall(r'class="roof" points="([^"]+)"', figure)
        assert len(lines) == 2 and len({line.split(",")[0] for line in lines}) == 1  # both begin at the border


@pytest.mark.parametrize(
    ("value", "shown"), [(1e3, "1000"), (1e-2, "0.01"), (1e6, "1e6"), (1e-5, "1e-5"), (1e12, "1e+12")]
)
def test_a_tick_is_written_as_a_reader_has_it(value: float, shown: str) -> None:
    assert svg.number(value) == shown


def test_a_page_without_times_or_memory_is_still_a_page() -> None:
    wrong = measured("alpha", 8, 1.0, None, error="RuntimeError: no")
    wrong.seconds.clear()
    page = some_page([wrong])
    outline(page)
    assert "<svg" not in page and "Not measured" in page


def test_a_run_leaves_the_page_and_a_copy_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = toy_benchmarks(tmp_path, monkeypatch)
    copy = tmp_path / "copy.html"
    assert run(folder, "--quick", "--memory", "--latency", "--threads", "1,2", "--report", str(copy)) == 0
    page = (tmp_path / "results" / "report.html").read_text()
    outline(page)
    assert copy.read_text() == page and f"Report: {tmp_path / 'results' / 'report.html'}" in capsys.readouterr().out
    assert page.count("<tr ") == 8 and "float32, 2 threads" in page and "p99 ms" in page and "torch kept MB" in page


@pytest.fixture
def browser() -> str:
    if BROWSER is None:
        pytest.skip("Debian's chromium is not installed: the page is tested by parsing alone")
    return BROWSER


def in_browser(browser: str, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    profile = page.parent / "profile"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command = [browser, *flags, f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)


ACTIONS = """<script>
const note = (name, found) => { document.body.dataset[name] = found; };
const label = row => row.cells[0].textContent[0] + row.cells[2].textContent.split("x")[0];
const order = () => [...body.rows].filter(row => !row.hidden).map(label).join(" ");
const head = name => heads.find(one => one.textContent === name);
note("first", order());
head("ours ms").firstElementChild.click();
note("up", order() + " " + head("ours ms").getAttribute("aria-sort"));
head("ours ms").firstElementChild.click();
note("down", order());
head("op").firstElementChild.click();
head("op").firstElementChild.click();
note("names", order() + " " + (head("ours ms").getAttribute("aria-sort") ?? "unsorted"));
text.value = "NOTE 64"; text.dispatchEvent(new Event("input"));
note("filtered", order() + ", " + shown.textContent);
selects[0].value = "beta"; selects[0].dispatchEvent(new Event("input"));
note("selected", order() + ", " + shown.textContent);
note("fits", document.documentElement.scrollWidth <= innerWidth);
</script></body>"""


def test_a_click_sorts_and_words_filter_without_an_error(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    watch = "<script>addEventListener('error', e => { document.documentElement.dataset.error = e.message; });</script>"
    text = some_page(some_rows()).replace("<head>", f"<head>{watch}").replace("</body>", ACTIONS)
    page.write_text(text, encoding="utf-8")
    ran = in_browser(browser, page, "--window-size=520,900", "--dump-dom")
    assert "CONSOLE" not in ran.stderr and "data-error" not in ran.stdout.split("<head")[0]
    noted = dict(re.findall(r'data-(\w+)="([^"]*)"', ran.stdout[ran.stdout.index("<body") :].split(">")[0]))
    assert noted == {
        "first": "a64 a128 b64 b9 b7",
        "up": "b9 b64 a64 a128 b7 ascending",
        "down": "a128 a64 b64 b9 b7",
        "names": "b64 b9 b7 a128 a64 unsorted",
        "filtered": "b64 a64, 2 of 5 rows",
        "selected": "b64, 1 of 5 rows",
        "fits": "true",
    }


def test_light_and_dark_are_pictures_to_look_at(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(some_page(some_rows()).replace("<details>", "<details open>"), encoding="utf-8")
    pictures = ROOT / "bench_results" / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    brightness = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        picture = pictures / f"report_{scheme}.png"
        chosen = f"--blink-settings=preferredColorScheme={number}"
        in_browser(browser, page, chosen, "--window-size=1200,1800", f"--screenshot={picture}")
        image = pytest.importorskip("PIL.Image").open(picture).convert("L")
        brightness[scheme] = image.getpixel((2, 2))
        assert image.size == (1200, 1800) and len(image.getcolors(256)) > 20
    assert brightness["dark"] < 60 and brightness["light"] > 200
