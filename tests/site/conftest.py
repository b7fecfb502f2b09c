"""The built site, once for all tests, and small sites for what must go wrong or differ."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from wellposed.book.project import find_papers
from wellposed.book.repository import ADDRESS, BRANCH
from wellposed.book.site import build

ROOT = Path(__file__).resolve().parents[2]
TOC = """\
format: jb-book
root: book/index
chapters:
  - file: book/gallery
  - file: book/ledger
  - file: book/chapters/{chapter}
    sections:
      - glob: notebooks/{chapter}/*
"""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The site, built from nothing; a warning fails the build and so every test here.

    Workers of one session share a build: the first to come builds, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "site"
    page = folder / "_build" / "html" / "index.html"
    with folder.with_suffix(".lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.delenv(ADDRESS, raising=False)
        done = folder / "done"
        if not done.exists():
            page = build(ROOT, quiet=True, out=folder)
            done.touch()
    return page.parent


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        say = pytest.fail if os.environ.get("WELLPOSED_REQUIRE_BROWSER") else pytest.skip
        say("no Chromium: install it (on Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found)
        yield chromium
        chromium.close()


@pytest.fixture
def small_book(tmp_path: Path) -> Path:
    """A project of one chapter with one paper, to be changed and built with ``build_book``."""
    paper = next(iter(find_papers(ROOT).values()))
    for name in ("_config.yml", "book/_ext", "book/_site", "book/catalog.yaml"):
        copy(name, tmp_path)
    copy(str(paper.card_path.relative_to(ROOT)), tmp_path)
    copy(str(paper.notebook_path.relative_to(ROOT)), tmp_path)
    copy(str(paper.record_path("quick").relative_to(ROOT)), tmp_path)
    (tmp_path / "_toc.yml").write_text(TOC.format(chapter=paper.chapter))
    (tmp_path / "book" / "references.bib").touch()
    (tmp_path / "book" / "index.md").write_text("# A book\n\n```{totals}\n```\n")
    (tmp_path / "book" / "gallery.md").write_text("# Gallery\n\n```{gallery}\n```\n")
    (tmp_path / "book" / "ledger.md").write_text("# Ledger\n\n```{ledger}\n```\n")
    (tmp_path / "book" / "chapters").mkdir()
    page = f"# Chapter\n\n```{{chapter-papers}} {paper.chapter}\n```\n"
    (tmp_path / "book" / "chapters" / f"{paper.chapter}.md").write_text(page)
    return tmp_path


def copy(name: str, to: Path) -> None:
    """Copy a file or folder of this project to the same place in another."""
    (to / name).parent.mkdir(parents=True, exist_ok=True)
    if (ROOT / name).is_dir():
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(ROOT / name, to / name)


@pytest.fixture
def build_book(small_book: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Build the small project by the command, with variables of the environment; no check."""

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if k not in (ADDRESS, BRANCH)}
        return subprocess.run(
            [Path(sys.executable).with_name("wellposed"), "build", "--quiet"],
            cwd=small_book,
            env={**kept, "WELLPOSED_ROOT": str(small_book), **variables},
            capture_output=True,
            text=True,
        )

    return run
