"""A paper's slides: the cells tagged for them, as one page that opens anywhere, offline too.

A cell is tagged the way Jupyter does it, by its slide type (in JupyterLab: property inspector,
"Slide Type"). ``slide`` begins a slide, ``subslide`` one below it, and ``fragment`` appears on the
current one at a key press. A cell of any other type, or of none, is not shown.
"""

import re
from html import escape
from pathlib import Path
from typing import Any

from wellposed.book.assignment import pieces
from wellposed.book.card import Card, read_card
from wellposed.book.errors import UserError
from wellposed.book.files import write_new
from wellposed.book.notebook import Notebook, read_notebook
from wellposed.book.project import Paper
from wellposed.book.record import MIME, write_text
from wellposed.book.refresh import normalized, notebook_text
from wellposed.book.site import mathjax

SLIDE_TYPES = ("slide", "subslide", "fragment")

PARTS = Path(__file__).parent / "deck"
"""The template of the page, its style, and reveal.js with its license."""

FULL = 150
"""Words that fit on a slide: a longer text goes on below."""

FEW = 30
"""A page of fewer words is none, unless it begins with a heading that begins a slide."""

Cell = dict[str, Any]

_ADMONITION = re.compile(
    r"^(?P<fence>`{3,}|:{3,})\{[a-z-]+\}[^\n]*\n(?::[^\n]*\n)*(?P<text>.*?)^(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_ROLE = re.compile(r"\{[a-z:-]+\}`([^`]*)`")


def slide_type(cell: Cell) -> str:
    """The slide type of a cell; "-" if it has none."""
    found: str = cell["metadata"].get("slideshow", {}).get("slide_type", "-")
    return found


def write_slides(paper: Paper, path: Path, *, force: bool) -> Path:
    """Write a paper's slides as one HTML file that loads nothing.

    Args:
        paper: which one.
        path: the file to write.
        force: write over a file that exists.

    Returns:
        The file written.

    Raises:
        UserError: no cell is tagged, the file exists, or cannot be written.
    """
    card = read_card(paper.card_path)
    cells = slides(read_notebook(paper.notebook_path), card)
    if not cells:
        raise UserError(
            f"{paper.notebook_path}: no cell has a slide type "
            f"(metadata slideshow.slide_type: {', '.join(SLIDE_TYPES)})"
        )
    return write_new(path, _page(cells, card.title), force=force)


def tag_slides(paper: Paper, *, force: bool) -> int:
    """Give the cells of an executed notebook the slide types that :func:`proposed` chooses.

    Args:
        paper: which one.
        force: also where cells have slide types already; they are replaced.

    Returns:
        How many cells are on the slides now.

    Raises:
        UserError: cells have slide types already, or a section is missing.
    """
    notebook = read_notebook(paper.notebook_path)
    cells = notebook["cells"]
    if any(slide_type(cell) in SLIDE_TYPES for cell in cells) and not force:
        raise UserError(f"{paper.notebook_path}: cells have slide types already (--force replaces)")
    types = proposed(cells)
    for number, cell in enumerate(cells):
        cell["metadata"].pop("slideshow", None)
        if number in types:
            cell["metadata"]["slideshow"] = {"slide_type": types[number]}
    write_text(paper.notebook_path, notebook_text(normalized(notebook)))
    return len(types)


def proposed(cells: list[Cell]) -> dict[int, str]:
    """Slide types by the number of the cell: title, problem, idea, key figure with the words before
    and after it, claims, ablation, exercises, scale.

    Raises:
        UserError: a section is missing.
    """
    begins = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            for heading in re.findall(r"^## (.+)$", cell["source"], re.MULTILINE):
                begins[heading] = number
    types = {0: "slide"}
    try:
        for heading in ("The problem", "The idea", "The claims", "At scale"):
            types[begins[heading]] = "slide"
        spans = {
            heading: (
                begins[heading],
                min((n for n in begins.values() if n > begins[heading]), default=len(cells)),
            )
            for heading in ("The key figure", "What changes the result", "The claims")
        }
    except KeyError as missing:
        raise UserError(f"the notebook has no section {missing}") from None
    first, end = spans.pop("The claims")
    for number in range(first, end):
        if _puts_out(cells[number], MIME):
            types[number] = "slide"
            types.pop(first, None)
    for first, end in spans.values():
        types |= _figure(cells, first, end)
    exercises = [
        number
        for number, cell in enumerate(cells)
        if cell["cell_type"] == "markdown" and "{exercise}" in cell["source"]
    ]
    return types | dict.fromkeys(exercises, "subslide") | dict.fromkeys(exercises[:1], "slide")


def _figure(cells: list[Cell], first: int, end: int) -> dict[int, str]:
    """The first figure of a section (or its first table), what leads to it, and what it means."""
    shown = [n for n in range(first, end) if _puts_out(cells[n], "image/png")]
    shown = shown or [n for n in range(first, end) if _puts_out(cells[n], "text/html")]
    if not shown:
        return {first: "slide"}
    figure = shown[0]
    texts = [n for n in range(first, figure) if cells[n]["cell_type"] == "markdown"]
    types = {figure: "fragment"}
    lead = texts[-1] if texts else first
    if lead == first or len(cells[lead]["source"].split()) > FEW // 2:
        types[lead] = "slide"
    else:
        types |= {first: "slide", lead: "subslide"}
    after = next((n for n in range(figure + 1, end) if cells[n]["cell_type"] == "markdown"), None)
    if after is not None and len(cells[after]["source"].split()) <= FULL:
        types[after] = "subslide"
    return types


def _puts_out(cell: Cell, kind: str) -> bool:
    return any(kind in output.get("data", {}) for output in cell.get("outputs", []))


def slides(notebook: Notebook, card: Card) -> list[Cell]:
    """The cells of the slides, in order, each with its slide type; empty if none is tagged.

    A text that is too long for one slide is cut between paragraphs and goes on below. A slide that
    has no heading says which section it belongs to. The first slide says who wrote the paper,
    where it appeared, and its idea.
    """
    found: list[Cell] = []
    section = ""
    for cell in normalized(notebook)["cells"]:
        kind, text = slide_type(cell), cell["source"]
        if cell["cell_type"] == "markdown":
            texts = [_text(text)] if kind == "fragment" else pages(_text(text))
            for number, page in enumerate(texts):
                heading = re.match(r"#{1,2} (.+)", page)
                section = heading[1] if heading else section
                if kind not in SLIDE_TYPES:
                    continue
                if not found:
                    page += f"\n\n{_about(card)}"
                elif not heading and kind != "fragment":
                    page = f'<p class="section">{escape(section)}</p>\n\n{page}'
                first = kind if number == 0 else "slide" if heading else "subslide"
                found.append(_cell("markdown", first, page))
        elif kind in SLIDE_TYPES:
            if kind != "fragment":
                found.append(_cell("markdown", kind, f"## {section}"))
            # What code put out joins the heading above it, or appears at a key press.
            shown = {**cell, **_cell("code", kind if kind == "fragment" else "-", "")}
            alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
            shown["metadata"]["alt"] = alt
            found.append(shown)
    return found


def _cell(cell_type: str, kind: str, source: str) -> Cell:
    return {
        "cell_type": cell_type,
        "metadata": {"slideshow": {"slide_type": kind}},
        "source": source,
    }


def _text(source: str) -> str:
    """A cell's text as slides say it: what MyST adds to Markdown becomes plain Markdown."""
    text = "\n\n".join(
        f"### Exercise {label.rpartition('-')[2]}\n\n{text}" if kind == "exercise" else text
        for kind, label, text in pieces(source)
    )
    text = _ADMONITION.sub(lambda match: re.sub("^", "> ", match["text"].strip(), flags=re.M), text)
    return _ROLE.sub(lambda match: match[1].partition("<")[0].strip(), text)


def _about(card: Card) -> str:
    names = ", ".join(card.authors)
    return (
        f'<p class="facts">{escape(names)}<br>{escape(card.venue)} {card.year}</p>\n\n{card.idea}'
    )


def pages(text: str) -> list[str]:
    """Cut Markdown into pages of about :data:`FULL` words, at headings and between paragraphs.

    A formula or a table stays with the text above it, and so do what follows a colon and a few last
    words.

    Example:
        >>> pages("# Title\\n\\n## Part\\n\\nA few words.")
        ['# Title', '## Part\\n\\nA few words.']
    """
    found: list[list[str]] = []
    blocks = _blocks(text)
    for number, block in enumerate(blocks):
        page, rest = found[-1] if found else [], blocks[number:]
        last = _words(rest) < FEW and not any(b.startswith("#") for b in rest)
        full = _words([*page, block]) > FULL and _words(page) >= FEW
        begins = not page or re.match(r"#{1,2} ", block)
        if begins or (full and not last and not _tied(page[-1], block)):
            found.append([block])
        else:
            page.append(block)
    return ["\n\n".join(page) for page in found]


def _tied(above: str, block: str) -> bool:
    """Whether a block must stay on the page of the one above it."""
    return above.startswith("#") or above.rstrip().endswith(":") or block.startswith(("$$", "|"))


def _blocks(text: str) -> list[str]:
    """Paragraphs, formulas, tables, items of lists and fenced code, each whole."""
    pattern = r"(^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[ ]*$|^\$\$.*?\$\$.*?$)"
    blocks, end = [], 0
    marks = [*re.finditer(pattern, text, flags=re.MULTILINE | re.DOTALL)]
    for match in marks:
        blocks += _paragraphs(text[end : match.start()])
        blocks.append(match[0])
        end = match.end()
    return blocks + _paragraphs(text[end:])


def _paragraphs(text: str) -> list[str]:
    parts = re.split(r"\n\s*\n|\n(?=(?:[-*]|\d+\.) )|(?<=\n)(?=#{1,6} )", text)
    return [part.strip("\n") for part in parts if part.strip()]


def _words(blocks: list[str]) -> int:
    """How much of a slide blocks take, in words."""
    return sum(map(_weight, blocks))


def _weight(block: str) -> int:
    if block.startswith("|"):
        return 9 * block.count("\n")
    formulas: list[str] = re.findall(r"\$\$.*?\$\$", block, flags=re.DOTALL)
    plain = re.sub(r"\$+[^$]*\$+", "x", block)
    heading = 12 if block.startswith("#") else 0
    return len(plain.split()) + heading + sum(18 + 9 * f.count("\\\\") for f in formulas)


def _page(cells: list[Cell], title: str) -> str:
    import nbformat
    from nbconvert.exporters import SlidesExporter

    def part(name: str) -> str:
        return (PARTS / name).read_text(encoding="utf-8")

    exporter = SlidesExporter(
        template_name=PARTS.name,
        extra_template_basedirs=[str(PARTS.parent)],
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    notebook = nbformat.from_dict(
        {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    )
    deck = {
        "title": title,
        "css": part("deck.css"),
        "reveal_css": part("reveal.css"),
        "reveal_js": part("reveal.js"),
        "start_js": part("start.js"),
        "mathjax_js": mathjax().read_text(encoding="utf-8"),
    }
    text: str = exporter.from_notebook_node(notebook, resources={"deck": deck})[0]
    return text
