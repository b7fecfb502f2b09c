"""The anatomy that every paper keeps; each breach is one line that names file and fault."""

import ast
import re
from collections.abc import Iterator
from typing import Any

from wellposed.book.card import Card, read_card
from wellposed.book.digest import source_file
from wellposed.book.errors import UserError
from wellposed.book.notebook import Notebook, code_cells, read_notebook, tags, without_magics
from wellposed.book.project import Paper
from wellposed.book.record import MIME, claims_in
from wellposed.book.runs import PRESETS, plan
from wellposed.book.slides import SLIDE_TYPES, slide_type

SECTIONS = [
    "The problem",
    "The idea",
    "Parameters",
    "The method in code",
    "The experiment",
    "The key figure",
    "The claims",
    "What changes the result",
    "Exercises",
    "At scale",
    "References",
]
"""The second-level headings of every notebook, in order."""

LONGEST_CELL = 25
LONGEST_FUNCTION = 2
MOST_BYTES = 600_000
"""Outputs of a notebook: the page around them must stay under 700 kB."""

SHOWN = ["The problem", "The idea", "The key figure", "The claims"]
"""The sections that must be on the slides, at least in part."""

HIDDEN = ("-", "skip", "notes")
"""Jupyter's slide types of cells that are on no slide."""

NBVAL = "# NBVAL_CHECK_OUTPUT"


def check_paper(paper: Paper) -> list[str]:
    """Everything that is wrong with a paper's files, a line each; empty if all is well."""
    try:
        card = read_card(paper.card_path)
        notebook = read_notebook(paper.notebook_path)
        for preset in PRESETS:
            plan(paper, preset=preset)
    except UserError as error:
        return [str(error)]
    problems = [
        *_files(paper, card),
        *_headings(notebook, card),
        *_cells(notebook),
        *_outputs(notebook),
        *_claims(notebook, card),
        *_exercises(notebook, paper.slug),
        *_slides(notebook),
        *_datasets(notebook, card),
    ]
    return [f"{paper.notebook_path}: {problem}" for problem in problems]


def _files(paper: Paper, card: Card) -> Iterator[str]:
    module = source_file(card.module)
    chapter, name = card.module.split(".")[2:]
    test = paper.root / "tests" / "methods" / chapter / f"test_{name}.py"
    page = paper.root / "book" / "chapters" / f"{paper.chapter}.md"
    for path in (module, test, page):
        if not path.is_file():
            yield f"{path} is missing"
    if chapter != paper.chapter.replace("-", "_"):
        yield f"the card's module {card.module} lies outside the paper's chapter {paper.chapter}"


def _headings(notebook: Notebook, card: Card) -> Iterator[str]:
    text = "\n".join(c["source"] for c in notebook["cells"] if c["cell_type"] == "markdown")
    text = _unfenced(text)
    first = re.findall(r"^# (.+)$", text, flags=re.MULTILINE)
    if first != [card.title]:
        yield f"the one first-level heading must be the card's title, found {first}"
    second = _sections(text)
    if second != SECTIONS:
        yield f"the sections must be {', '.join(SECTIONS)}; found {', '.join(second)}"


def _unfenced(text: str) -> str:
    return re.sub(r"^(`{3,}|~{3,}).*?^\1`*$", "", text, flags=re.MULTILINE | re.DOTALL)


def _sections(text: str) -> list[str]:
    found = re.findall(r"^## (.+)$", _unfenced(text), flags=re.MULTILINE)
    return [heading.strip() for heading in found]


def _cells(notebook: Notebook) -> Iterator[str]:
    for number, cell in enumerate(notebook["cells"], start=1):
        if cell["cell_type"] != "code":
            continue
        length = len(cell["source"].splitlines())
        if length > LONGEST_CELL:
            yield f"cell {number} has {length} lines, at most {LONGEST_CELL} are allowed"
        try:
            tree = ast.parse(without_magics(cell["source"]))
        except SyntaxError as error:
            yield f"cell {number} is not Python ({error.msg})"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield f"cell {number} defines the class {node.name}: move it to the library"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    yield f"cell {number} defines {node.name}: move it to the library"


def _outputs(notebook: Notebook) -> Iterator[str]:
    size = 0
    for number, cell in enumerate(notebook["cells"], start=1):
        if "papermill" in cell["metadata"] or "execution" in cell["metadata"]:
            yield f"cell {number} carries metadata of a run: use `wellposed refresh`"
        for output in cell.get("outputs", []):
            size += len(str(output.get("data", output.get("text", ""))))
            yield from (f"cell {number} {problem}" for problem in _output(cell, output))
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield "not every cell was run in order: use `wellposed refresh`"
    if size > MOST_BYTES:
        yield f"its outputs weigh {size // 1000} kB, at most {MOST_BYTES // 1000} kB are allowed"


def _output(cell: dict[str, Any], output: dict[str, Any]) -> Iterator[str]:
    if output["output_type"] == "error":
        yield f"ended in an error: {output['ename']}"
    if output.get("name") == "stderr":
        yield "printed to stderr: silence the warning or mend its cause"
    data = output.get("data", {})
    if any(kind.startswith("image/") for kind in data):
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        if len(alt) < 20:
            yield "shows a figure without alternative text (metadata mystnb.image.alt)"
    if re.search(r"\b0x[0-9a-f]{8,}", str(data.get("text/plain", "")) + str(output.get("text"))):
        yield "shows a memory address, which differs in every run: end the line with ';'"


def _claims(notebook: Notebook, card: Card) -> Iterator[str]:
    try:
        record = claims_in(notebook)
    except UserError as error:
        yield str(error)
        return
    if record is None:
        yield "no claims record in its outputs: call report.show() and `wellposed refresh`"
        return
    if [claim.id for claim in record.claims] != [claim.id for claim in card.claims]:
        yield "its claims are not the card's: use `wellposed refresh`"
    if record.preset != "quick":
        yield f"its outputs are those of the preset {record.preset!r}, not of quick"
    checked = [cell for cell in code_cells(notebook) if NBVAL in cell["source"]]
    if len(checked) != 1 or not checked[0]["source"].startswith(NBVAL):
        yield f"exactly one cell must begin with {NBVAL}, found {len(checked)}"
        return
    printed = "".join("".join(output.get("text", "")) for output in checked[0]["outputs"])
    if printed.splitlines() != [claim.line() for claim in record.claims]:
        yield "the printed verdicts are not those of the claims record"
    if any(MIME in output.get("data", {}) for output in checked[0]["outputs"]):
        yield "the verdict cell must not hold the claims record: nbval would compare its digits"
    timed = [claim.id for claim in record.claims if claim.timed]
    if timed and not any("timing" in tags(cell) for cell in code_cells(notebook)):
        yield f"{timed[0]} is judged by the clock, and no cell that measures times is tagged timing"


def _exercises(notebook: Notebook, slug: str) -> Iterator[str]:
    text = "\n".join(c["source"] for c in notebook["cells"] if c["cell_type"] == "markdown")
    labels = re.findall(r"\{exercise\}[^\n]*\n:label: (\S+)", text)
    solved = re.findall(r"\{solution-start\} (\S+)", text)
    if not 2 <= len(labels) <= 4:
        yield f"2 to 4 exercises are expected, found {len(labels)}"
    if any(not label.startswith(f"{slug}-") for label in labels):
        yield f"labels of exercises must begin with {slug}-"
    if labels != solved or len(re.findall(r"\{solution-end\}", text)) != len(labels):
        yield "every exercise needs one solution, from solution-start to solution-end, in order"
    if len(re.findall(r"\{solution-start\} \S+\n:class: dropdown", text)) != len(solved):
        yield "solutions must be folded (:class: dropdown)"
    inside, executed = False, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            inside = "{solution-start}" in cell["source"] or (
                inside and "{solution-end}" not in cell["source"]
            )
        elif inside:
            executed += 1
    if executed < min(2, len(labels)):
        yield "at least two solutions must hold code that is executed"


def _slides(notebook: Notebook) -> Iterator[str]:
    there, shown, section = set[str](), set[str](), ""
    for number, cell in enumerate(notebook["cells"], start=1):
        kind = slide_type(cell)
        if kind not in (*SLIDE_TYPES, *HIDDEN):
            yield f"cell {number} has the slide type {kind!r}: known are {', '.join(SLIDE_TYPES)}"
        if cell["cell_type"] == "markdown" and (headings := _sections(cell["source"])):
            section = headings[-1]
            there.add(section)
        if kind in SLIDE_TYPES:
            shown.add(section)
    if not shown:
        yield "no cell has a slide type (metadata slideshow.slide_type)"
        return
    if slide_type(notebook["cells"][0]) != "slide":
        yield "the first cell, with the title, must have the slide type 'slide'"
    for name in SHOWN:
        if name in there - shown:
            yield f"no cell of the section {name} has a slide type: the slides need one"


def _datasets(notebook: Notebook, card: Card) -> Iterator[str]:
    source = "\n".join(cell["source"] for cell in code_cells(notebook))
    loaded = set(re.findall(r"\bload\(\s*[\"']([^\"']+)[\"']", source))
    for name in sorted(loaded - set(card.datasets)):
        yield f"it loads {name!r}, which the card's datasets do not list"
