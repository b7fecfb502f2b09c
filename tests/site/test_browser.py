"""The site in a real browser: what a reader does, by mouse, by keyboard, on a phone, offline.

Chromium comes from the system. Where there is none these tests are skipped, and the last lines of
the run say so; with WELLPOSED_REQUIRE_BROWSER set they fail instead.
"""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from wellposed.book.card import read_card
from wellposed.book.ledger import rows
from wellposed.book.project import find_papers

ROOT = Path(__file__).resolve().parents[2]
PAPERS = find_papers(ROOT)
CARDS = {slug: read_card(paper.card_path) for slug, paper in PAPERS.items()}
# The first paper of the book whose notebook shows formulas and figures: a finished one.
PAPER = next(paper for paper in PAPERS.values() if rows([paper]))
PAGES = {
    "welcome": "book/index.html",
    "gallery": "book/gallery.html",
    "ledger": "book/ledger.html",
    "chapter": f"book/chapters/{PAPER.chapter}.html",
    "paper": f"notebooks/{PAPER.chapter}/{PAPER.slug}.html",
}
HEAVIEST_LOAD = 700_000
"""Bytes of a page with what it shows on arrival; the scripts that all pages share come on top."""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site on this machine's loopback."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Visit:
    """A page in a browser window, and what it asked for and complained about."""

    def __init__(self, page: Page, base: str) -> None:
        self.page, self.base = page, base
        self.errors: list[str] = []
        self.exceptions: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.exceptions.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def go(self, path: str) -> Page:
        """Open a page of the site and wait until everything on it has arrived."""
        self.page.goto(self.base + path, wait_until="load")
        return self.page

    def shown(self) -> list[str]:
        """The titles or claims that a list shows, in order."""
        found: list[str] = self.page.eval_on_selector_all(
            "[data-wp-item]",
            "items => items.filter(i => i.checkVisibility())"
            ".map(i => (i.querySelector('h2') || i.querySelector('code')).textContent.trim())",
        )
        return found


@pytest.fixture
def visit(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A fresh window, of the size and mode that a test's parameter asks for."""
    with browser.new_context(**getattr(request, "param", {})) as context:
        context.set_default_timeout(10_000)
        yield Visit(context.new_page(), address)


PHONE = {"viewport": {"width": 390, "height": 844}}
LIGHT, DARK = {"color_scheme": "light"}, {"color_scheme": "dark"}


@pytest.mark.parametrize("visit", [LIGHT, DARK], indirect=True, ids=["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_no_serious_finding_of_axe(visit: Visit, name: str) -> None:
    page = visit.go(PAGES[name])
    # Colors that are still moving toward the dark ones have a contrast of their own.
    page.wait_for_function("document.getAnimations().every(a => a.playState !== 'running')")
    # Strokes of formulas and the colors of code are thousands of elements: one block will do.
    strokes, code = ["mjx-container"], ["section section:not(#parameters) .highlight"]
    result = Axe().run(page, context={"exclude": [strokes, code]})
    found = {
        f"{finding['id']} ({finding['impact']}): {node['html'][:120]}"
        for finding in result.response["violations"]
        if finding["impact"] in ("serious", "critical")
        for node in finding["nodes"]
    }
    assert found == set()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_quiet_light_and_asks_no_other_origin(visit: Visit, name: str) -> None:
    page = visit.go(PAGES[name])
    page.wait_for_timeout(300)
    assert visit.errors + visit.exceptions == []
    assert [url for url in visit.requests if not url.startswith((visit.base, "data:"))] == []
    sizes = page.evaluate(
        "performance.getEntries().filter(e => e.entryType == 'navigation' ||"
        " e.initiatorType == 'img')"
        ".reduce((sum, e) => sum + e.decodedBodySize, 0)"
    )
    assert 0 < sizes < HEAVIEST_LOAD


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("visit", [PHONE], indirect=True, ids=["phone"])
def test_a_phone_scrolls_down_and_not_sideways(visit: Visit, name: str) -> None:
    page = visit.go(PAGES[name])
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= PHONE["viewport"]["width"]
    outside = page.eval_on_selector_all(
        ".bd-article p, .bd-article h1, .bd-article h2, .bd-article img, .wp-filters *",
        "all => all.filter(e => e.checkVisibility() && !e.closest("
        "'.wp-scroll, .pst-scrollable-table-container, .output, pre'))"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.outerHTML.slice(0, 80))",
    )
    assert outside == []


@pytest.mark.parametrize("name", ["gallery", "ledger", "paper"])
def test_nothing_moves_while_a_page_arrives(visit: Visit, name: str) -> None:
    page = visit.go(PAGES[name])
    page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
    page.wait_for_timeout(300)
    moved = page.evaluate(
        "new Promise(done => {let sum = 0; new PerformanceObserver(list => {"
        "for (const e of list.getEntries()) if (e.sources.some(s => s.node && s.node.closest"
        " && !s.node.closest('mjx-container, .math'))) sum += e.value; })"
        ".observe({type: 'layout-shift', buffered: true}); setTimeout(() => done(sum), 200)})"
    )
    assert moved < 0.1
    bare = page.eval_on_selector_all(
        "img", "all => all.filter(i => !i.width || !i.getAttribute('height')).map(i => i.src)"
    )
    assert bare == []


def test_filters_narrow_the_gallery_and_stand_in_the_address(visit: Visit) -> None:
    page = visit.go(PAGES["gallery"])
    assert len(visit.shown()) == len(PAPERS)
    page.get_by_label("Chapter", exact=True).select_option(PAPER.chapter)
    page.get_by_label("Level", exact=True).select_option(CARDS[PAPER.slug].level)
    expected = {
        card.title
        for slug, card in CARDS.items()
        if PAPERS[slug].chapter == PAPER.chapter and card.level == CARDS[PAPER.slug].level
    }
    assert set(visit.shown()) == expected
    assert len(expected) < len(PAPERS)
    assert page.url.endswith(f"#chapter={PAPER.chapter}&level={CARDS[PAPER.slug].level}")
    count = page.get_by_text(f"{len(expected)} of {len(PAPERS)} papers shown")
    expect(count).to_be_visible()
    assert count.get_attribute("role") == "status"

    # The address alone brings the view back.
    kept, other = page.url, visit.page.context.new_page()
    other.goto(kept)
    assert set(Visit(other, visit.base).shown()) == expected
    assert other.get_by_label("Level", exact=True).input_value() == CARDS[PAPER.slug].level

    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_text(f"{len(PAPERS)} of {len(PAPERS)} papers shown")).to_be_visible()
    assert "#" not in page.url


def test_every_filter_of_the_gallery_does_what_it_says(visit: Visit) -> None:
    page = visit.go(PAGES["gallery"])
    quick = {s: [r for r in rows([p]) if r.preset == "quick"] for s, p in PAPERS.items()}
    failed = [s for s, found in quick.items() if "not reproduced" in {r.verdict for r in found}]
    tag = CARDS[PAPER.slug].tags[0]
    author = CARDS[PAPER.slug].authors[-1].split()[-1]
    cases = {
        f"tag={tag}": {c.title for c in CARDS.values() if tag in c.tags},
        "verdict=not-reproduced": {CARDS[s].title for s in failed},
        "hardware=cpu": {CARDS[s].title for s, found in quick.items() if found},
        f"q={author.upper()}": {
            c.title for c in CARDS.values() if author in " ".join([*c.authors, c.idea, c.title])
        },
        "q=zzzz": set(),
        "level=no-such-level": {c.title for c in CARDS.values()},
    }
    for state, expected in cases.items():
        page.evaluate("state => { location.hash = state }", state)
        page.wait_for_timeout(50)
        assert set(visit.shown()) == expected, state
    page.evaluate("location.hash = 'q=zzzz'")
    expect(page.get_by_text("No paper of the book fits")).to_be_visible()


def test_a_tag_on_a_papers_page_leads_to_the_gallery_filtered(visit: Visit) -> None:
    page = visit.go(PAGES["paper"])
    tag = CARDS[PAPER.slug].tags[0]
    page.locator(".wp-facts").get_by_role("link", name=tag.replace("-", " "), exact=True).click()
    page.wait_for_url(f"**/book/gallery.html#tag={tag}")
    assert set(visit.shown()) == {c.title for c in CARDS.values() if tag in c.tags}


def test_planned_papers_are_found_too(visit: Visit) -> None:
    page = visit.go(PAGES["gallery"])
    planned = page.locator("[data-wp-planned]").first
    title = planned.text_content()
    assert not planned.is_visible(), "the list is folded until somebody asks"
    page.get_by_label("Words in the papers").fill(title)
    expect(planned).to_be_visible()
    page.get_by_label("Level", exact=True).select_option("advanced")
    expect(planned).to_be_hidden()


def test_the_ledger_filters_and_sorts(visit: Visit) -> None:
    page = visit.go(PAGES["ledger"])
    order = visit.shown()
    assert len(order) == len(rows(PAPERS.values()))
    head = page.get_by_role("columnheader", name="Seeds")
    seeds = "rows => rows.map(row => Number(row.cells[6].dataset.value))"
    head.get_by_role("button").click()
    up = page.eval_on_selector_all("[data-wp-item]", seeds)
    assert up == sorted(up)
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").click()
    assert page.eval_on_selector_all("[data-wp-item]", seeds) == sorted(up, reverse=True)
    assert page.url.endswith("#sort=-seeds")
    page.get_by_label("Verdict", exact=True).select_option("partly")
    partly = [row.claim for row in rows(PAPERS.values()) if row.verdict == "partly"]
    assert sorted(visit.shown()) == sorted(partly)
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_text(f"{len(order)} of {len(order)} claims shown")).to_be_visible()
    assert visit.shown() == order


def test_the_keyboard_alone_is_enough(visit: Visit) -> None:
    """From the top of the gallery to a filtered paper, and to its copied citation."""
    page = visit.go(PAGES["gallery"])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent.trim()") == "Skip to main content"
    press_until(page, "document.activeElement.name === 'q'")
    page.keyboard.type(CARDS[PAPER.slug].title)
    assert visit.shown() == [CARDS[PAPER.slug].title]
    press_until(page, "document.activeElement.name === 'level'")
    page.keyboard.press(CARDS[PAPER.slug].level[0])
    assert f"level={CARDS[PAPER.slug].level}" in page.url
    press_until(page, "document.activeElement.matches('.wp-tile a')")
    style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    shadow = page.evaluate("getComputedStyle(document.activeElement).boxShadow")
    assert (style, shadow) != ("none", "none"), "the focus can be seen"
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/{PAGES['paper']}")


def press_until(page: Page, condition: str) -> None:
    """Press Tab until the focus is where it is wanted."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate(condition):
            return
    raise AssertionError(f"the focus never came to: {condition}")


def test_dark_mode_follows_the_system_and_the_button(browser: Browser, address: str) -> None:
    brightness = (
        "(() => { const [r, g, b] = getComputedStyle(document.body).backgroundColor"
        ".match(/[0-9.]+/g).map(Number); return (r + g + b) / 3 })()"
    )
    with browser.new_context(**DARK) as context:
        page = Visit(context.new_page(), address).go(PAGES["paper"])
        assert page.evaluate(brightness) < 60
        button = page.locator("button.theme-switch-button:visible").first
        for _ in range(3):
            button.click()
            if page.evaluate("document.documentElement.dataset.mode") == "light":
                break
        assert page.evaluate(brightness) > 200
        page.goto(address + PAGES["gallery"])
        assert page.evaluate(brightness) > 200, "the choice is kept"


def test_formulas_are_set(visit: Visit) -> None:
    formulas = "mjx-container svg"
    page = visit.go(PAGES["paper"])
    page.wait_for_selector(formulas, state="attached")
    assert page.locator(formulas).count() >= 5
    left = page.eval_on_selector_all(
        ".math", "all => all.filter(e => !e.querySelector('mjx-container')).map(e => e.textContent)"
    )
    assert left == []
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0


def test_the_citation_can_be_copied(browser: Browser, address: str) -> None:
    with browser.new_context() as context:
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = Visit(context.new_page(), address).go(PAGES["paper"])
        block = page.locator("#cite-the-paper div.highlight")
        block.hover()
        block.get_by_role("button").click()
        page.wait_for_timeout(100)
        copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == CARDS[PAPER.slug].bibtex.strip()


def test_previous_and_next_follow_the_reading_order(visit: Visit, site: Path) -> None:
    """Following `next` from the chapter's page gives the order of the chapter's table."""
    page = visit.go(PAGES["chapter"])
    table = page.eval_on_selector_all(".wp-order td:first-child a", "all => all.map(a => a.href)")
    assert len(table) == len([p for p in PAPERS.values() if p.chapter == PAPER.chapter])
    for wanted in table:
        page.locator("a.right-next").click()
        page.wait_for_url(wanted)


@pytest.mark.parametrize("form", ["http", "file"])
def test_search_finds_papers_offline(visit: Visit, site: Path, form: str) -> None:
    page, word = visit.page, CARDS[PAPER.slug].title.split()[0]
    page.goto((visit.base if form == "http" else f"{site.as_uri()}/") + PAGES["welcome"])
    page.keyboard.press("Control+k")
    page.keyboard.type(word)
    page.keyboard.press("Enter")
    result = page.locator("#search-results ul.search li a", has_text=CARDS[PAPER.slug].title)
    expect(result.first).to_be_visible()
    result.first.click()
    page.wait_for_url(f"**/{PAGES['paper']}*")
    assert page.locator("h1").first.text_content().startswith(CARDS[PAPER.slug].title)


def test_pages_work_as_files(visit: Visit, site: Path) -> None:
    page = visit.page
    page.goto(f"{site.as_uri()}/{PAGES['gallery']}#chapter={PAPER.chapter}")
    expected = {CARDS[s].title for s, p in PAPERS.items() if p.chapter == PAPER.chapter}
    assert set(visit.shown()) == expected
    page.get_by_label("Words in the papers").fill("zzzz")
    assert page.evaluate("location.hash") == f"#q=zzzz&chapter={PAPER.chapter}"
    page.get_by_role("button", name="Clear").click()
    page.wait_for_timeout(100)
    assert len(visit.shown()) == len(PAPERS)
    page.locator(".wp-tile a").first.click()
    expect(page.locator(".wp-card")).to_be_visible()
    assert visit.exceptions == []


def test_without_scripts_everything_is_shown(browser: Browser, address: str) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        for name, count in (("gallery", len(PAPERS)), ("ledger", len(rows(PAPERS.values())))):
            page.goto(address + PAGES[name])
            items = page.locator("[data-wp-item]")
            assert items.count() == count
            expect(items.last).to_be_visible()
            expect(page.locator(".wp-filters")).to_be_hidden()


def test_downloads_arrive(visit: Visit, tmp_path: Path) -> None:
    page = visit.go(PAGES["paper"])
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Download notebook").click()
    waiting.value.save_as(tmp_path / "paper.ipynb")
    assert (tmp_path / "paper.ipynb").read_bytes() == PAPER.notebook_path.read_bytes()
    page = visit.go(PAGES["ledger"])
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Download claims.json").click()
    waiting.value.save_as(tmp_path / "claims.json")
    assert len(json.loads((tmp_path / "claims.json").read_text())) == len(rows(PAPERS.values()))
