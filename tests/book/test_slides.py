"""Slides: which cells are on them, where they are cut, and that they change no result."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox import Result
from wellposed.book.card import Card, read_card
from wellposed.book.digest import digest
from wellposed.book.errors import UserError
from wellposed.book.notebook import Notebook, read_notebook
from wellposed.book.project import find_paper, find_papers
from wellposed.book.refresh import normalized, notebook_text
from wellposed.book.slides import FULL, SLIDE_TYPES, pages, proposed, slide_type, slides

PAPERS = find_papers(sandbox.REPOSITORY)
PARAGRAPH = " ".join(["word"] * (FULL // 2))
PIXEL = "iVBORw0KGgo="


def tagged(*cells: tuple[str, str, str]) -> Notebook:
    """A notebook of cells (type, slide type, source)."""
    return {
        "cells": [
            {
                "cell_type": kind,
                "metadata": {"slideshow": {"slide_type": slide}} if slide else {},
                "source": source,
            }
            | ({"outputs": [], "execution_count": 1} if kind == "code" else {})
            for kind, slide, source in cells
        ]
    }


@pytest.fixture
def card(project: Path) -> Card:
    return read_card(find_paper("alpha", project).card_path)


def shown(notebook: Notebook, card: Card) -> list[tuple[str, str]]:
    return [(slide_type(cell), cell["source"]) for cell in slides(notebook, card)]


def test_only_tagged_cells_are_shown(card: Card) -> None:
    """Fails if a cell without a slide type joins the slide before it, as it does in nbconvert."""
    notebook = tagged(
        ("markdown", "slide", "# Title"),
        ("markdown", "", "hidden"),
        ("markdown", "slide", "## Part"),
        ("markdown", "skip", "hidden"),
        ("markdown", "notes", "hidden"),
        ("code", "", "print('hidden')"),
        ("markdown", "fragment", "later"),
        ("markdown", "subslide", "below"),
        ("code", "fragment", "plot()"),
    )
    found = shown(notebook, card)
    assert [kind for kind, _ in found] == ["slide", "slide", "fragment", "subslide", "fragment"]
    assert "hidden" not in str(found)
    assert found[0][1].startswith("# Title\n\n<p")
    assert "Ada Lovelace<br>Journal of Tests 2020" in found[0][1]
    assert found[0][1].endswith("Adding up numbers gives their sum.")
    assert found[3][1] == '<p class="section">Part</p>\n\nbelow'
    assert found[4][1] == "", "the code itself is not shown"


def test_what_code_put_out_gets_the_heading_of_its_section(card: Card) -> None:
    notebook = tagged(
        ("markdown", "slide", "# Title"),
        ("markdown", "", "## The claims"),
        ("code", "slide", "report.show()"),
    )
    notebook["cells"][2]["metadata"]["mystnb"] = {"image": {"alt": "A line."}}
    picture = {"output_type": "display_data", "metadata": {}, "data": {"image/png": PIXEL}}
    notebook["cells"][2]["outputs"] = [picture]
    _, heading, output = slides(notebook, card)
    assert (slide_type(heading), heading["source"]) == ("slide", "## The claims")
    assert slide_type(output) == "-", "it joins the heading"
    assert output["outputs"] == [picture]
    assert output["metadata"]["alt"] == "A line."


def test_an_exercise_is_shown_as_a_question(card: Card) -> None:
    text = "```{exercise}\n:label: alpha-2\n\nWhy?\n```"
    notebook = tagged(("markdown", "slide", "# Title"), ("markdown", "slide", text))
    assert shown(notebook, card)[1][1].endswith("### Exercise 2\n\nWhy?")


def test_what_myst_adds_becomes_plain_markdown(card: Card) -> None:
    text = "Before {doc}`reading`.\n\n```{important}\n:class: x\nMind\nthis.\n```\n\nAfter."
    notebook = tagged(("markdown", "slide", "# Title"), ("markdown", "slide", text))
    assert shown(notebook, card)[1][1].endswith("Before reading.\n\n> Mind\n> this.\n\nAfter.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# A\n\n## B\n\nText.", ["# A", "## B\n\nText."]),
        (f"{PARAGRAPH}\n\nfew", [f"{PARAGRAPH}\n\nfew"]),
        (f"{PARAGRAPH}\n\n{PARAGRAPH} more", [PARAGRAPH, f"{PARAGRAPH} more"]),
        # What belongs together stays together, even if it is too much.
        (f"{PARAGRAPH} x:\n\n{PARAGRAPH}", [f"{PARAGRAPH} x:\n\n{PARAGRAPH}"]),
        (
            f"{PARAGRAPH} x\n\n$$a = b\\\\\n\n{PARAGRAPH}$$\n\n{PARAGRAPH}",
            [f"{PARAGRAPH} x\n\n$$a = b\\\\\n\n{PARAGRAPH}$$", PARAGRAPH],
        ),
        (f"## H\n\n{PARAGRAPH} {PARAGRAPH}", [f"## H\n\n{PARAGRAPH} {PARAGRAPH}"]),
        (f"- {PARAGRAPH}\n- {PARAGRAPH}", [f"- {PARAGRAPH}", f"- {PARAGRAPH}"]),
        # A few last words are no page of their own.
        (f"{PARAGRAPH} {PARAGRAPH}\n\nThe end.", [f"{PARAGRAPH} {PARAGRAPH}\n\nThe end."]),
        (
            "```python\n# no heading\n\n## nor this\n```",
            ["```python\n# no heading\n\n## nor this\n```"],
        ),
        ("", []),
    ],
)
def test_where_pages_end(text: str, expected: list[str]) -> None:
    assert pages(text) == expected


@pytest.mark.parametrize("slug", PAPERS)
def test_no_word_of_a_real_notebook_is_lost_or_torn(slug: str) -> None:
    for cell in read_notebook(PAPERS[slug].notebook_path)["cells"]:
        if cell["cell_type"] == "markdown":
            cut = pages(cell["source"])
            assert re.sub(r"\s", "", "".join(cut)) == re.sub(r"\s", "", cell["source"])
            assert all(page.count("$$") % 2 == 0 for page in cut)


def test_slide_types_change_no_digest(project: Path) -> None:
    """They say where a cell is shown, not what comes out: fails if they made a record stale."""
    paper = find_paper("alpha", project)
    notebook, card = read_notebook(paper.notebook_path), read_card(paper.card_path)
    with_slides, with_tags = copy.deepcopy(notebook), copy.deepcopy(notebook)
    for cell in with_slides["cells"]:
        cell["metadata"]["slideshow"] = {"slide_type": "slide"}
    with_tags["cells"][0]["metadata"]["tags"] = ["parameters-of-another-kind"]
    assert digest(with_slides, card, {}) == digest(notebook, card, {})
    assert digest(with_tags, card, {}) != digest(notebook, card, {})
    kept = normalized(with_slides)
    assert all(slide_type(cell) == "slide" for cell in kept["cells"]), "a refresh keeps them"


def tag(paper_path: Path, *kinds: str) -> None:
    """Give the first cells of a notebook their slide types."""
    notebook: dict[str, Any] = json.loads(paper_path.read_text())
    for cell, kind in zip(notebook["cells"], kinds):
        cell["metadata"]["slideshow"] = {"slide_type": kind}
    paper_path.write_text(notebook_text(notebook))


def test_the_command(project: Path, wellposed: Callable[..., Result]) -> None:
    tag(find_paper("alpha", project).notebook_path, "slide")
    result = wellposed("slides", "alpha")
    assert (result.code, result.err) == (0, "")
    assert result.out == "alpha-slides.html\n"
    text = Path("alpha-slides.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>A tiny paper</title>" in text
    assert text.count("<section>") == 2
    bare = re.sub(r"(?s)(<script>).*?</script>", r"\1", text)
    assert bare.count("<script>") == 3
    foreign = r"<(?:script|img|link|iframe)[^>]*\b(?:src|href)=|@import|url\((?!['\"]?data:)"
    assert re.findall(foreign, bare) == []
    assert "MIT licensed" in text, "reveal.js says whose it is"
    assert wellposed("slides", "alpha", "--out", "talks/one.html").code == 0
    assert Path("talks/one.html").read_text(encoding="utf-8") == text


def test_what_is_refused(
    project: Path, refused: Callable[..., str], wellposed: Callable[..., Result]
) -> None:
    assert refused("slides", "alpa") == "no paper 'alpa': did you mean 'alpha'?"
    said = refused("slides", "alpha")
    assert "alpha.ipynb: no cell has a slide type (metadata slideshow.slide_type: slide," in said
    assert not Path("alpha-slides.html").exists()
    tag(find_paper("alpha", project).notebook_path, "slide")
    Path("mine.html").write_text("mine")
    assert refused("slides", "alpha", "--out", "mine.html") == (
        "mine.html exists already: --force writes over it"
    )
    assert Path("mine.html").read_text() == "mine"
    assert wellposed("slides", "alpha", "--out", "mine.html", "--force").code == 0
    assert Path("mine.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert refused("slides", "alpha", "--out", ".") == ". is a folder: give the name of a file"
    said = refused("slides", "alpha", "--out", "mine.html/talk.html")
    assert said.startswith("cannot write mine.html/talk.html: ")


@pytest.mark.parametrize("slug", ["aggregate-responses", "sinkhorn-newton-sparse"])
def test_proposed_types_are_what_a_page_needs(slug: str) -> None:
    """Title, problem, idea, figure with its words, claims; fails if the figure opens a slide."""
    cells = read_notebook(PAPERS[slug].notebook_path)["cells"]
    types = proposed(cells)
    assert types[0] == "slide"
    assert set(types.values()) <= set(SLIDE_TYPES)
    for number, kind in types.items():
        pictures = any("image/png" in o.get("data", {}) for o in cells[number].get("outputs", []))
        assert (kind == "fragment") == pictures
    bare = [cell for cell in cells if "## The idea" not in cell["source"]]
    with pytest.raises(UserError, match="no section 'The idea'"):
        proposed(bare)


def test_tagging_touches_no_result(project: Path, wellposed: Callable[..., Result]) -> None:
    """Fails if an output or a source changes, or types are replaced without being asked."""
    path = find_paper("alpha", project).notebook_path
    path.write_bytes(PAPERS["aggregate-responses"].notebook_path.read_bytes())
    before = read_notebook(path)
    result = wellposed("slides", "alpha", "--tag", "--force")
    assert result.code == 0, result.err
    after = normalized(read_notebook(path))
    for old, new in zip(normalized(before)["cells"], after["cells"]):
        assert old["source"] == new["source"]
        assert old.get("outputs") == new.get("outputs")
    again = wellposed("slides", "alpha", "--tag")
    assert again.code == 2
    assert "--force" in again.err
