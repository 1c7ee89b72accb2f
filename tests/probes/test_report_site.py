"""The pages: complete without a network, every link resolves, and a browser shows them without complaint."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from browser import Browser, find_chromium
from small_notebook import write_small

from probes.report import pages
from probes.report.params import NotebookParams
from probes.report.runner import run_notebook
from probes.report.site import build_index
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of reports: one whole, one damaged, one failed, and a folder that is none."""
    root = tmp_path_factory.mktemp("site")
    sys.modules.pop("small_params", None)
    out = root / "reports"
    run_notebook(write_small(root / "source"), {"table": str(root / "source" / "table.csv")}, out)
    with folders.new_folder(out / "damaged", "report") as folder:
        (folder / "results.json").write_text("{}")
        folders.write_manifest(folder, "report", config={}, inputs={})
    (out / "damaged" / "results.json").write_text("{")
    (out / "benchmark_results.failed.ipynb").write_text("{}")
    (out / "drafts" / "small").mkdir(parents=True)
    build_index(out)
    return out


class Page(HTMLParser):
    """Collects what a page loads, what it links to, and what its pictures say."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str | None] = []
        self.text = ""
        self._skip = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self._skip = tag == "style"
        if tag == "a":
            self.links.append(values["href"])
        else:
            self.loads += [values[name] for name in ("src", "href", "srcset", "data", "poster") if values.get(name)]
        if tag == "img":
            self.alts.append(values.get("alt"))

    def handle_endtag(self, tag):
        self._skip = False

    def handle_data(self, data):
        if not self._skip:
            self.text += data


def test_nothing_is_loaded_from_the_network(site):
    for path in (site / "index.html", site / "small" / "small.html"):
        page, text = Page(path), path.read_text(encoding="utf-8")
        assert not {"script", "iframe", "object", "embed", "link", "base"} & set(page.tags)
        assert page.loads, "the page has a picture"
        for address in page.loads:
            parsed = urlparse(address)
            assert parsed.scheme in ("", "data"), address[:80]
            assert parsed.scheme == "data" or (site / unquote(parsed.path)).is_file()
        assert "@import" not in text
        assert "url(" not in text
        assert all(page.alts), "every picture has an alternative text"


def test_every_link_resolves(site):
    for path in (site / "index.html", site / "small" / "small.html"):
        for address in Page(path).links:
            parsed = urlparse(address)
            if parsed.scheme:
                assert address == "https://example.org", "only what the notebook's text links to"
            else:
                assert (path.parent / unquote(parsed.path)).resolve().is_file(), address


def test_the_page_answers_first_and_says_how_it_was_made(site):
    page = Page(site / "small" / "small.html")
    manifest = folders.read_manifest(site / "small", "report")
    assert page.text.index("The sum <of> y is 10.5.") < page.text.index("What is summed")
    for word in ("measured here", "published numbers: exact", "checked 5.25", "How this was made",
                 "multiplies the values", manifest["inputs"]["notebook"], manifest["made_by"]["versions"]["pandas"],
                 manifest["made_by"]["commit"][:12]):  # fmt: skip
        assert word in page.text
    assert page.tags.count("h1") == 1
    assert page.text.index("Code of this page") < page.text.index("import pandas as pd")  # only behind the toggle


def test_the_index_shows_what_is_whole_and_names_what_is_not(site):
    page = Page(site / "index.html")
    assert "How large is the sum?" in page.text
    assert "The sum <of> y is 10.5." in page.text
    assert "benchmark_results failed" in page.text
    assert "damaged/results.json" in page.text
    assert "drafts" not in page.text
    assert page.tags.count("section") == 2  # one report, one legend
    assert [address for address in page.loads if not address.startswith("data:")] == [
        "small/figure.svg",
        "small/figure.png",
    ]


def test_an_index_needs_a_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        build_index(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "No report has been written" in Page(build_index(tmp_path / "empty")).text


class Plain(NotebookParams):
    pass


def test_finish_refuses_what_a_reader_could_not_trust(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setenv("VLM4VLA_REPORT_FOLDER", str(tmp_path))
    good = {"answer": "Yes.", "badges": ["measured"], "numbers": {"n": 1}}
    pages.finish(Plain(), **good)
    assert (tmp_path / "results.json").is_file()
    for bad in (
        {"answer": " "},
        {"answer": "a\nb"},
        {"badges": []},
        {"figure": Figure()},
        {"numbers": {"n": float("nan")}},
    ):
        with pytest.raises(ValueError):
            pages.finish(Plain(), **{**good, **bad})
    with pytest.raises(InputError, match="did you mean 'measured'"):
        pages.finish(Plain(), **{**good, "badges": ["mesured"]})


def test_tables_escape_and_round():
    import pandas as pd

    frame = pd.DataFrame({"a_b": ["<x>", "y"], "v": [-0.12345, float("nan")], "n": [3, 4], "why": ["word " * 20, "no"]})
    html = pages.table(frame).html
    assert "&lt;x&gt;" in html
    assert "<x>" not in html
    assert "<th scope=col class=short>a b</th>" in html
    assert "<td class=long>no</td>" in html
    assert "<td class=number>−0.123</td>" in html
    assert "<td class=number>–</td>" in html
    assert "<td class=number>3</td>" in html


@pytest.mark.browser
def test_a_browser_shows_the_pages(site, tmp_path):
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on the PATH: the pages were not looked at in a browser")
    from PIL import Image

    with Browser(program, tmp_path / "profile") as browser:
        for path in (site / "index.html", site / "small" / "small.html"):
            for width in (390, 1280):
                browser.load(path, width)
                where = f"{path.name} at {width} pixels"
                assert browser.console == [], where
                assert {urlparse(address).scheme for address in browser.requests} <= {"file", "data"}, where
                assert browser.evaluate("window.innerWidth") == width
                assert browser.evaluate("document.documentElement.scrollWidth") <= width, f"{where} scrolls sideways"
                assert browser.evaluate("[...document.images].filter(i => !i.naturalWidth).length") == 0, where
                edges = "[...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect().right)"
                assert browser.evaluate(f"Math.max(0, ...{edges})") <= width, f"{where}: a figure leaves the page"
                browser.screenshot(tmp_path / "shot.png")
                shot = Image.open(tmp_path / "shot.png").convert("L")
                assert len(set(shot.resize((64, 64)).tobytes())) > 10, f"{where} is nearly empty"
