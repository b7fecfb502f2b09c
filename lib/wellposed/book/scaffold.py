"""The skeleton of a new paper: four files, and its chapter's page if it is the first there."""

import json
from pathlib import Path
from string import Template
from typing import Any

from wellposed.book.catalog import Chapter, read_catalog
from wellposed.book.check import NBVAL, SECTIONS
from wellposed.book.errors import UserError
from wellposed.book.project import SLUG, find_papers, nearest
from wellposed.book.record import write_text
from wellposed.book.refresh import METADATA

CARD = """\
title: $quoted
authors: [First Last]
year: 2020
venue: Venue
arxiv: null
code: null
idea: One sentence, in our own words.
level: intermediate
tags: [$chapter]
prerequisites: []
module: wellposed.methods.$folder.$module
datasets: []
choices:
  - {open: What the paper leaves open., chosen: What we do.}
claims:
  - id: first-claim
    statement: What the paper says, in our words, and how it is tested.
    kind: difference
    paper: {number: "-", where: Fig. 1}
presets:
  smoke: {num_seeds: 1}
  full: {num_seeds: 5}
bibtex: |
  @misc{$key,
    title = {$title},
    author = {Last, First},
    year = {2020},
  }
"""

MODULE = '''\
"""Method of one paper.

First Last. $title. Venue 2020.

The claim in one sentence; the equation that matters.

Departures from the paper: none.
"""

__all__: list[str] = []
'''

TEST = '''\
"""Tests of wellposed.methods.$folder.$module."""

from contract import Case

CASES: dict[str, Case] = {}
'''

ON_SLIDES = {"The problem", "The idea", "The key figure", "What changes the result", "At scale"}
"""The sections whose beginning is shown on slides; so are the title, the claims and the exercises.

The author tags the figures too: the cell that draws one, as a fragment of the slide before it.
"""

CHAPTER = """\
# $chapter_title

```{chapter-papers} $chapter
```
"""


def scaffold(root: Path, slug: str, chapter: str, title: str, module: str = "") -> list[Path]:
    """Write a paper's skeleton.

    Args:
        root: the project's root.
        slug: the new paper.
        chapter: its chapter; "" to take the catalog's.
        title: its title; "" to take the catalog's.
        module: name of its module; "" to take the slug's words.

    Returns:
        The files written.

    Raises:
        UserError: a slug or module name that is none, a paper that exists, or one that the catalog
            does not list and whose chapter or title was not given.
    """
    if not SLUG.fullmatch(slug):
        raise UserError(f"a slug is lower-case words joined by '-', got {slug!r}")
    if slug[0].isdigit():
        raise UserError(f"a slug names a module too and must begin with a letter, got {slug!r}")
    if slug in find_papers(root):
        raise UserError(f"the paper {slug!r} exists already: nothing was written")
    if module and not (module.isidentifier() and module == module.lower()):
        raise UserError(f"a module's name is lower-case words joined by '_', got {module!r}")
    place, title = _place(read_catalog(root), slug, chapter, title)
    names = {
        "slug": slug,
        "chapter": place.slug,
        "chapter_title": place.title,
        "folder": place.slug.replace("-", "_"),
        "module": module or slug.replace("-", "_"),
        "key": slug.replace("-", ""),
        "title": title,
        "quoted": json.dumps(title, ensure_ascii=False),
    }
    package = root / "lib" / "wellposed" / "methods" / names["folder"]
    files = {
        root / "notebooks" / place.slug / f"{slug}.yaml": CARD,
        root / "notebooks" / place.slug / f"{slug}.ipynb": None,
        package / f"{names['module']}.py": MODULE,
        root / "tests" / "methods" / names["folder"] / f"test_{names['module']}.py": TEST,
    }
    shared = {
        package / "__init__.py": '"""Methods of the chapter: $chapter_title."""\n',
        root / "book" / "chapters" / f"{place.slug}.md": CHAPTER,
    }
    taken = [path for path in files if path.exists()]
    if taken:
        raise UserError(f"{taken[0]} exists already: nothing was written")
    files |= {path: text for path, text in shared.items() if not path.exists()}
    for path, text in files.items():
        content = _notebook(names) if text is None else Template(text).substitute(names)
        write_text(path, content)
    toc = _add_to_toc(root, place.slug)
    return [*files, *toc]


def _place(catalog: dict[str, Chapter], slug: str, chapter: str, title: str) -> tuple[Chapter, str]:
    planned = {p: c for c in catalog.values() for p in c.papers}
    if chapter and chapter not in catalog:
        raise UserError(f"no chapter {chapter!r}{nearest(chapter, catalog)}")
    if slug not in planned and not (chapter and title):
        hint = nearest(slug, planned) if nearest(slug, planned).startswith(": did") else ""
        raise UserError(f"the catalog lists no {slug!r}{hint} (or give --chapter and --title)")
    place = catalog[chapter] if chapter else planned[slug]
    return place, title or planned[slug].papers[slug]


def _notebook(names: dict[str, str]) -> str:
    from wellposed.book.refresh import notebook_text

    def markdown(text: str, slide: str = "") -> dict[str, Any]:
        metadata = {"slideshow": {"slide_type": slide}} if slide else {}
        return {"cell_type": "markdown", "metadata": metadata, "source": text}

    def code(text: str, *tags: str, slide: str = "") -> dict[str, Any]:
        cell = markdown(text, slide)
        cell["metadata"] |= {"tags": list(tags)} if tags else {}
        return cell | {"cell_type": "code", "outputs": [], "execution_count": None}

    slug = names["slug"]
    cells = [markdown(f"# {names['title']}", "slide")]
    for section in SECTIONS:
        cells.append(markdown(f"## {section}", "slide" if section in ON_SLIDES else ""))
        if section == "Parameters":
            lines = [
                'preset = "quick"  # smoke, quick or full',
                "seed = 0  # root of every random number",
                'device = "auto"  # auto, cpu or cuda',
                "num_seeds = 3  # runs of each method",
            ]
            cells.append(code("\n".join(lines), "parameters"))
        if section == "The claims":
            start = "from wellposed.book import Report\n\n"
            call = f'report = Report("{slug}", preset=preset, seed=seed, device=device)\n'
            cells.append(code(start + call + "report.show()", slide="slide"))
            cells.append(code(f"{NBVAL}\nreport.verdicts()"))
        if section == "Exercises":
            for number in (1, 2):
                label = f"{slug}-{number}"
                question = f"```{{exercise}}\n:label: {label}\nA question.\n```"
                cells.append(markdown(question, "slide" if number == 1 else "subslide"))
                start = f"````{{solution-start}} {label}\n:class: dropdown\n````"
                cells += [markdown(start), code("1 + 1"), markdown("```{solution-end}\n```")]
    for index, cell in enumerate(cells, start=1):
        cell["id"] = f"cell-{index:02d}"
    return notebook_text({"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5})


def _add_to_toc(root: Path, chapter: str) -> list[Path]:
    """Add the chapter to the table of contents, as text: comments and order stay."""
    path = root / "_toc.yml"
    text = path.read_text(encoding="utf-8")
    if f"book/chapters/{chapter}\n" in text:
        return []
    entry = (
        f"      - file: book/chapters/{chapter}\n"
        f"        sections:\n          - glob: notebooks/{chapter}/*\n"
    )
    write_text(path, text.rstrip("\n") + "\n" + entry)
    return [path]
