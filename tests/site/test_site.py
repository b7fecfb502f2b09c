"""The site as a whole: it builds without a warning and needs no other origin."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from wellposed.book.card import read_card
from wellposed.book.ledger import rows
from wellposed.book.project import find_papers
from wellposed.book.reading import dependents, reading_order, related

ROOT = Path(__file__).resolve().parents[2]
PAPERS = find_papers(ROOT)
HEAVIEST_PAGE = 700_000


class Page(HTMLParser):
    """What a page asks a browser to load, links to, and shows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.bare_images: list[str] = []
        self.shapeless_images: list[str] = []
        self.ids: set[str] = set()
        self.views: set[str] = set()
        self._choice = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.ids |= {given["id"]} if "id" in given else set()
        # What a list can be filtered by, as its address says it.
        self._choice = given.get("name", "") if tag == "select" else self._choice
        if tag == "option":
            self.views.add(f"{self._choice}={given['value']}")
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon", "shortcut icon"):
            self.loads.append(given["href"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "img" and not given.get("alt", "").strip():
            self.bare_images.append(given.get("src", ""))
        if tag == "img" and not {"width", "height", "loading"} <= given.keys():
            self.shapeless_images.append(given.get("src", ""))


def pages(site: Path) -> dict[str, Page]:
    """All pages by their path."""
    return {
        str(path.relative_to(site)): Page(path)
        for path in sorted(site.rglob("*.html"))
        if "_static" not in path.parts
    }


def test_no_page_loads_from_another_origin(site: Path) -> None:
    foreign = {
        (name, address)
        for name, page in pages(site).items()
        for address in page.loads
        if re.match(r"(https?:)?//", address)
    }
    assert foreign == set()
    styles = "".join(p.read_text(errors="ignore") for p in site.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//", styles) == []


def test_formulas_use_the_script_that_comes_with_the_site(site: Path) -> None:
    paper = next(iter(PAPERS.values()))
    page = pages(site)[f"notebooks/{paper.chapter}/{paper.slug}.html"]
    scripts = [address for address in page.loads if "mathjax" in address]
    assert len(scripts) == 1
    assert (site / "notebooks" / paper.chapter / scripts[0].partition("?")[0]).is_file()


def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    found = pages(site)
    broken = []
    for name, page in found.items():
        for address in page.links:
            target, _, anchor = address.partition("#")
            if re.match(r"[a-z]+:", address):
                continue
            path = (site / name).parent / target if target else site / name
            if not path.resolve().is_file():
                broken.append((name, address))
            elif anchor and path.suffix == ".html":
                there = found[str(path.resolve().relative_to(site.resolve()))]
                if anchor not in there.ids | there.views:
                    broken.append((name, address))
    assert broken == []


def test_every_image_has_alternative_text(site: Path) -> None:
    bare = {name: page.bare_images for name, page in pages(site).items() if page.bare_images}
    assert bare == {}


def test_every_image_has_its_size_and_comes_late(site: Path) -> None:
    """The size keeps the text in its place when the image arrives."""
    found = pages(site)
    assert {n: p.shapeless_images for n, p in found.items() if p.shapeless_images} == {}
    size = re.search(r'_images/(\w+\.png)" [^>]*?width="(\d+)" height="(\d+)"', first_figure(site))
    assert size is not None
    with Image.open(site / "_images" / size[1]) as image:
        assert image.size == (int(size[2]), int(size[3]))


def first_figure(site: Path) -> str:
    """The tag of the first figure of the book, its address first."""
    for path in sorted((site / "notebooks").rglob("*.html")):
        if match := re.search(r"<img [^>]*_images/[^>]*>", path.read_text(encoding="utf-8")):
            tag = match[0]
            source = re.search(r'src="([^"]*)"', tag)[1]
            return f'{source}" {tag}'
    raise AssertionError("no figure in the book")


def test_figures_are_legible_in_dark_mode(site: Path) -> None:
    """A figure brings its own light ground: no pixel of it lets a dark page through."""
    clear = []
    for path in sorted((site / "_images").glob("*.png")):
        with Image.open(path) as image:
            if image.convert("RGBA").getextrema()[3][0] < 255:
                clear.append(path.name)
    assert clear == []


def test_no_page_is_heavy(site: Path) -> None:
    """Page and figures together, as a phone loads them that reads to the end.

    Thumbnails are left out: the gallery loads those that come into view (a test in the browser
    measures it).
    """
    heavy = {}
    for name, page in pages(site).items():
        folder = (site / name).parent
        files = {(folder / a).resolve() for a in page.loads if "_images" in a}
        weight = (site / name).stat().st_size + sum(f.stat().st_size for f in files)
        if weight > HEAVIEST_PAGE:
            heavy[name] = weight
    assert heavy == {}


def test_no_table_is_left_as_text(site: Path) -> None:
    """Fails if Markdown that cells display is parsed without tables, MyST-NB's default (tried)."""
    raw = [name for name in pages(site) if "<p>| " in (site / name).read_text(encoding="utf-8")]
    assert raw == []


@pytest.mark.parametrize("slug", PAPERS)
def test_a_papers_page_begins_with_its_card(site: Path, slug: str) -> None:
    paper = PAPERS[slug]
    card = read_card(paper.card_path)
    text = (site / "notebooks" / paper.chapter / f"{slug}.html").read_text(encoding="utf-8")
    assert text.count('class="wp-card"') == 1
    card_at, problem_at = text.index('class="wp-card"'), text.index('<section id="the-problem">')
    assert text.rindex("</h1>") < card_at < problem_at
    head = text[card_at:problem_at]
    for row in rows([paper]):
        assert f"wp-{row.verdict.replace(' ', '-')}" in head
    table = head[head.index("<tbody>") :]
    assert table.count("wp-verdict") == len(rows([paper]) or card.claims)
    assert f"arxiv.org/abs/{card.arxiv}" in head or card.arxiv is None


def test_the_ledger_can_be_downloaded(site: Path) -> None:
    expected = rows(PAPERS.values())
    found = json.loads((site / "claims.json").read_text())
    by_name = sorted(found, key=lambda row: (row["chapter"], row["paper"]))
    assert by_name == [row.model_dump() for row in expected]
    assert len((site / "claims.csv").read_text().splitlines()) >= len(expected) + 1
    page = (site / "book" / "ledger.html").read_text(encoding="utf-8")
    assert all(f"<code>{row.claim}</code>" in page for row in expected)


def test_the_gallery_holds_every_paper_of_the_catalog(site: Path) -> None:
    """A tile for those that are built, a line for those that are planned."""
    page = (site / "book" / "gallery.html").read_text(encoding="utf-8")
    catalog = yaml.safe_load((ROOT / "book" / "catalog.yaml").read_text())
    planned = {p["slug"]: p["title"] for chapter in catalog for p in chapter["papers"]}
    assert page.count("data-wp-item") == len(PAPERS)
    assert page.count("data-wp-planned") == len(set(planned) - set(PAPERS))
    for slug, paper in PAPERS.items():
        assert f'href="../notebooks/{paper.chapter}/{slug}.html"' in page
    for slug in set(planned) - set(PAPERS):
        assert html.escape(planned[slug], quote=False).replace("'", "&#39;") in page


@pytest.mark.parametrize("chapter", sorted({paper.chapter for paper in PAPERS.values()}))
def test_a_chapter_teaches(site: Path, chapter: str) -> None:
    """The question, the papers compared in reading order, and what is still open."""
    page = (site / "book" / "chapters" / f"{chapter}.html").read_text(encoding="utf-8")
    assert re.search(r"<strong>[^<]*question\s+of\s+this\s+chapter", page, re.IGNORECASE)
    assert '<section id="reading-order">' in page
    assert '<section id="what-is-still-open">' in page
    cards = {slug: read_card(p.card_path) for slug, p in PAPERS.items() if p.chapter == chapter}
    table = page[page.index('<table class="wp-table') :]
    linked = re.findall(rf'<td>\d+\. <a href="../../notebooks/{chapter}/([\w-]+)\.html">', table)
    assert linked == reading_order(cards)


@pytest.mark.parametrize("slug", PAPERS)
def test_a_papers_page_ends_with_what_to_read_and_how_to_cite(site: Path, slug: str) -> None:
    paper, cards = PAPERS[slug], {s: read_card(p.card_path) for s, p in PAPERS.items()}
    page = (site / "notebooks" / paper.chapter / f"{slug}.html").read_text(encoding="utf-8")
    end = page[page.index('<section id="read-on">') :]
    wanted = {*cards[slug].prerequisites, *dependents(slug, cards), *related(slug, cards)}
    linked = re.findall(r'<li><a href="[^"]*?([\w-]+)\.html">', end)
    assert set(linked) >= wanted & set(PAPERS)
    key = re.match(r"\s*@\w+\{([^,\s]+)", cards[slug].bibtex)[1]
    assert key in end[end.index('<section id="cite-the-paper">') :]


def test_the_ledger_shows_each_interval(site: Path) -> None:
    page = (site / "book" / "ledger.html").read_text(encoding="utf-8")
    for row in rows(PAPERS.values()):
        if row.low is not None and row.high is not None:
            assert f"{row.low:.3g} to {row.high:.3g}" in page
