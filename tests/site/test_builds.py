"""Builds that must fail, and builds that must differ: of a small copy of the book."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from wellposed.book.project import find_papers
from wellposed.book.repository import ADDRESS, BRANCH

Build = Callable[..., subprocess.CompletedProcess[str]]


def test_faults_in_pages_fail_the_build(small_book: Path, build_book: Build) -> None:
    """All faults at once: a build goes on after the first, so that one run shows them all."""
    paper = next(iter(find_papers(small_book).values()))
    notebook = json.loads(paper.notebook_path.read_text())
    pictured = next(
        cell
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    )
    del pictured["metadata"]["mystnb"]
    paper.notebook_path.write_text(json.dumps(notebook))
    (small_book / "book" / "index.md").write_text(
        "# A book\n\n"
        "{doc}`no-such-page`, [gone](no-such-file.md), {paper}`no-such-paper`, "
        "{term}`no such term`.\n\n"
        "```{chapter-papers} no-such-chapter\n```\n\n"
        "```{session}\nno-such-paper\n```\n"
    )
    assert build_book().returncode == 2
    done = build_book()
    assert done.returncode == 2, "a fault is found by every build, not only by the first"
    said = done.stderr
    assert "unknown document: 'no-such-page'" in said
    assert "no-such-file.md" in said
    assert "WARNING: no paper 'no-such-paper'" in said
    assert "session: no paper 'no-such-paper'" in said
    assert "term not in glossary: 'no such term'" in said
    assert "no chapter 'no-such-chapter'" in said
    assert "an image without alternative text" in said
    assert said.splitlines()[-1].startswith("wellposed: the site was not built")


def test_a_bad_card_fails_the_build_and_is_named(small_book: Path, build_book: Build) -> None:
    paper = next(iter(find_papers(small_book).values()))
    paper.card_path.write_text("title: 3\n")
    done = build_book()
    assert done.returncode == 2
    assert f"{paper.slug}.yaml: title" in done.stderr


def test_what_a_page_shows_follows_what_there_is(small_book: Path, build_book: Build) -> None:
    """No button leads nowhere, and a paper without results has a look.

    Two builds, the second over the first: pages change though no file of theirs did.
    """
    paper = next(iter(find_papers(small_book).values()))
    path = f"notebooks/{paper.chapter}/{paper.slug}"
    html = small_book / "_build" / "html"
    page, gallery = html / f"{path}.html", html / "book" / "gallery.html"
    places = ("colab.research.google.com", "mybinder.org", "github.com/ada/book")

    done = build_book()
    assert done.returncode == 0, done.stderr
    bare = page.read_text()
    assert [place for place in places if place in bare] == []
    assert f'href="../../_sources/{path}.ipynb" download' in bare
    assert (html / "_sources" / f"{path}.ipynb").is_file()
    assert "no figure yet" not in gallery.read_text()

    notebook = json.loads(paper.notebook_path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    paper.notebook_path.write_text(json.dumps(notebook))
    paper.record_path("quick").unlink()
    address = "https://github.com/ada/book"
    done = build_book(**{ADDRESS: address, BRANCH: "trunk"})
    assert done.returncode == 0, done.stderr
    full = page.read_text()
    blob = f"github/ada/book/blob/trunk/{path}.ipynb"
    assert f'href="https://colab.research.google.com/{blob}"' in full
    assert f'href="https://mybinder.org/v2/gh/ada/book/trunk?urlpath=lab/tree/{path}.ipynb"' in full
    assert f'href="{address}/blob/trunk/{path}.ipynb"' in full
    assert "no run yet" in full
    assert "wp-not-tested" in full
    assert "no figure yet" in gallery.read_text()
    assert 'data-verdict="not-tested" data-hardware=""' in gallery.read_text()
