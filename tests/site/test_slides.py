"""Slides in a real browser, without a network: formulas, keys, and that everything fits."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from wellposed.book.card import read_card
from wellposed.book.ledger import rows
from wellposed.book.notebook import Notebook, read_notebook
from wellposed.book.project import Paper, find_papers
from wellposed.book.record import MIME
from wellposed.book.refresh import normalized, notebook_text
from wellposed.book.slides import slide_type, slides, write_slides

ROOT = Path(__file__).resolve().parents[2]
FINISHED = [paper for paper in find_papers(ROOT).values() if rows([paper])]
READY = "window.Reveal && Reveal.isReady()"
LEAVES = ".slides > section > section"


def tagged(paper: Paper) -> Notebook:
    """A finished notebook whose text up to the claims is all on slides, and its figures as well.

    Much more than anybody would show: what fits here fits.
    """
    notebook = normalized(read_notebook(paper.notebook_path))
    for cell in notebook["cells"]:
        cell["metadata"].pop("slideshow", None)
        kinds = {kind for output in cell.get("outputs", []) for kind in output.get("data", {})}
        if MIME in kinds:
            cell["metadata"]["slideshow"] = {"slide_type": "slide"}
            break
        if cell["cell_type"] == "markdown":
            cell["metadata"]["slideshow"] = {"slide_type": "slide"}
        elif "image/png" in kinds:
            cell["metadata"]["slideshow"] = {"slide_type": "fragment"}
    return notebook


class Deck:
    """Slides that are open in a window, and what they asked for and complained about."""

    def __init__(self, page: Page, paper: Paper, folder: Path) -> None:
        self.page, self.errors, self.requests = page, list[str](), list[str]()
        place = Paper(paper.slug, paper.chapter, folder)
        place.notebook_path.parent.mkdir(parents=True)
        place.card_path.write_bytes(paper.card_path.read_bytes())
        notebook = tagged(paper)
        place.notebook_path.write_text(notebook_text(notebook), encoding="utf-8")
        cells = slides(notebook, read_card(place.card_path))
        self.kinds = [slide_type(cell) for cell in cells]
        self.path = write_slides(place, folder / "deck.html", force=False)
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(self.path.as_uri())
        page.wait_for_function(READY)

    def place(self) -> dict[str, int]:
        """Where the deck stands: part, slide of the part, fragment."""
        found: dict[str, int] = self.page.evaluate("Reveal.getIndices()")
        return found


@pytest.fixture
def page(browser: Browser) -> Page:
    with browser.new_context(viewport={"width": 1280, "height": 720}, offline=True) as context:
        context.set_default_timeout(60_000)
        yield context.new_page()


@pytest.mark.parametrize("paper", FINISHED, ids=lambda paper: paper.slug)
def test_a_deck_opens_offline_and_everything_fits(page: Page, paper: Paper, tmp_path: Path) -> None:
    """Slide by slide: typeset, nothing cut off, nothing asked of a network, nothing in the log."""
    deck = Deck(page, paper, tmp_path)
    count = page.evaluate("Reveal.getTotalSlides()")
    assert count == sum(kind in ("slide", "subslide") for kind in deck.kinds)
    assert page.locator(f"{LEAVES} .fragment").count() == deck.kinds.count("fragment")
    assert page.locator("mjx-container").count() > 5
    assert page.locator("mjx-merror, merror").count() == 0
    bad = page.evaluate(
        """async (leaves) => {
            const bad = [];
            for (const [number, slide] of [...document.querySelectorAll(leaves)].entries()) {
                const {h, v} = Reveal.getIndices(slide);
                Reveal.slide(h, v, 99);
                const text = slide.innerText;
                const box = slide.getBoundingClientRect();
                const past = [...slide.querySelectorAll("p, li, table, img, mjx-container")]
                    .map((part) => part.getBoundingClientRect())
                    .some((part) => part.right > box.right + 2 || part.bottom > box.bottom + 2);
                if (past || slide.scrollHeight > 720) bad.push([number + 1, "is cut off"]);
                if (text.includes("$") || /\\{[a-z]+\\}/.test(text)) bad.push([number + 1, text]);
                if (!text.trim()) bad.push([number + 1, "is empty"]);
            }
            return bad;
        }""",
        LEAVES,
    )
    assert bad == []
    figures = page.locator(f"{LEAVES} img")
    assert all(len(text) >= 20 for text in figures.evaluate_all("all => all.map(i => i.alt)"))
    assert page.locator(".wp-verdict").count() == len(rows([paper]))
    assert deck.errors == []
    asked = {url for url in deck.requests if not url.startswith("data:")}
    assert asked == {deck.path.as_uri()}


def test_keys_move_through_parts_slides_and_fragments(page: Page, tmp_path: Path) -> None:
    """Right goes to the next part, down within one; a fragment is shown by a key of its own."""
    deck = Deck(page, FINISHED[0], tmp_path)
    assert deck.place()["h"] == 0
    page.keyboard.press("ArrowRight")
    assert deck.place()["h"] == 1
    page.keyboard.press("ArrowLeft")
    assert deck.place()["h"] == 0
    seen, hidden = [], page.locator(f"{LEAVES} .fragment:not(.visible)").count()
    assert hidden > 0
    for _ in deck.kinds:
        page.keyboard.press("Space")
        seen.append(tuple(deck.place().values()))
    assert len(set(seen)) == len(seen) - seen.count(seen[-1]) + 1, "every key press goes on"
    assert page.locator(f"{LEAVES} .fragment:not(.visible)").count() == 0
    assert page.evaluate("Reveal.isLastSlide()")
    assert deck.errors == []
