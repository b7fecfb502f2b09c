"""The skeleton of a new paper."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import sandbox
from sandbox import Result
from wellposed.book.card import read_card
from wellposed.book.catalog import read_catalog
from wellposed.book.check import SECTIONS, check_paper
from wellposed.book.errors import UserError
from wellposed.book.notebook import parameters, read_notebook
from wellposed.book.project import find_paper
from wellposed.book.refresh import normalized, notebook_text
from wellposed.book.runs import plan
from wellposed.book.scaffold import scaffold

SLUG, CHAPTER = "train-longer", "large-batch"
CATALOG = """\
- chapter: large-batch
  title: "Large batches: how and when"
  papers:
  - slug: train-longer
    title: "Train longer, generalize better: closing the $gap"
    priority: 1
- chapter: noisy-labels
  title: Noisy labels
  papers: []
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("WELLPOSED_ROOT", raising=False)
    root = sandbox.make_project(tmp_path / "project")
    (root / "book" / "catalog.yaml").write_text(CATALOG)
    monkeypatch.chdir(root)
    return root


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


PAPER = {
    "notebooks/large-batch/train-longer.yaml",
    "notebooks/large-batch/train-longer.ipynb",
    "lib/wellposed/methods/large_batch/train_longer.py",
    "tests/methods/large_batch/test_train_longer.py",
}
SHARED = {"lib/wellposed/methods/large_batch/__init__.py", "book/chapters/large-batch.md"}


def test_a_paper_is_four_files_and_a_chapter_two(root: Path) -> None:
    before = files(root)
    written = scaffold(root, SLUG, "", "")
    after = files(root)
    assert after.keys() - before.keys() == PAPER | SHARED
    assert {str(path.relative_to(root)) for path in written} == PAPER | SHARED | {"_toc.yml"}
    assert {name for name in before if before[name] != after[name]} == {"_toc.yml"}


def test_the_second_paper_of_a_chapter_shares_its_page(root: Path) -> None:
    """Fails if the chapter is added to the contents twice, or its page written over."""
    scaffold(root, SLUG, "", "")
    page = root / "book/chapters/large-batch.md"
    page.write_text("# Words of its own\n")
    toc = (root / "_toc.yml").read_text()
    written = scaffold(root, "second-paper", CHAPTER, "A second paper")
    assert len(written) == 4
    assert page.read_text() == "# Words of its own\n"
    assert (root / "_toc.yml").read_text() == toc
    assert toc.count("file: book/chapters/large-batch\n") == 1


def test_the_table_of_contents_keeps_its_order_and_comments(root: Path) -> None:
    path = root / "_toc.yml"
    path.write_text((sandbox.REPOSITORY / "_toc.yml").read_text() + "# the end\n")
    before = yaml.safe_load(path.read_text())
    scaffold(root, SLUG, "", "")
    after = yaml.safe_load(path.read_text())
    assert "# the end" in path.read_text()
    last = after["parts"][-1]["chapters"]
    assert last.pop() == {
        "file": "book/chapters/large-batch",
        "sections": [{"glob": "notebooks/large-batch/*"}],
    }
    assert after == before


def test_what_is_written_is_sound(root: Path) -> None:
    scaffold(root, SLUG, "", "")
    paper = find_paper(SLUG, root)
    card = read_card(paper.card_path)
    assert card.title == "Train longer, generalize better: closing the $gap"
    assert card.module == "wellposed.methods.large_batch.train_longer"
    notebook = read_notebook(paper.notebook_path)
    assert list(parameters(notebook, paper.notebook_path)) == [
        *("preset", "seed", "device", "num_seeds")
    ]
    text = [c["source"] for c in notebook["cells"] if c["cell_type"] == "markdown"]
    assert text[0] == f"# {card.title}"
    assert [t.removeprefix("## ") for t in text if t.startswith("## ")] == SECTIONS
    counted = normalized(notebook)
    for cell in counted["cells"]:
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
    assert notebook_text(counted) == paper.notebook_path.read_text(encoding="utf-8")
    for preset in ("smoke", "quick", "full"):
        assert plan(paper, preset=preset).parameters["preset"] == preset
    for name in PAPER | SHARED:
        if name.endswith(".py"):
            assert ast.get_docstring(ast.parse((root / name).read_text()))
    page = (root / "book/chapters/large-batch.md").read_text()
    assert page.startswith("# Large batches: how and when\n")
    assert "```{chapter-papers} large-batch" in page


def test_what_is_missing_is_only_what_the_author_owes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh skeleton's problems: it was not run. Its layout already keeps every rule."""
    scaffold(root, SLUG, "", "")
    monkeypatch.setattr("wellposed.book.digest.PACKAGE", root / "lib" / "wellposed")
    problems = check_paper(find_paper(SLUG, root))
    assert [problem.partition(".ipynb: ")[2].split(":")[0] for problem in problems] == [
        "not every cell was run in order",
        "no claims record in its outputs",
    ]


@pytest.mark.parametrize(
    ("slug", "chapter", "title", "says"),
    [
        ("Bad_Slug", "", "", "a slug is lower-case words joined by '-', got 'Bad_Slug'"),
        ("../../evil", "", "", "a slug is lower-case words joined by '-'"),
        ("/etc/passwd", "", "", "a slug is lower-case words joined by '-'"),
        ("", "", "", "a slug is lower-case words joined by '-'"),
        ("train-long", "", "", "the catalog lists no 'train-long': did you mean 'train-longer'?"),
        ("something-else", "", "", "'something-else' (or give --chapter and --title)"),
        ("something-else", CHAPTER, "", "(or give --chapter and --title)"),
        ("something-else", "", "Title", "(or give --chapter and --title)"),
        ("something-else", "large-bath", "T", "no chapter 'large-bath': did you mean 'large-ba"),
        ("something-else", "../outside", "T", "no chapter '../outside'"),
    ],
)
def test_what_is_refused(root: Path, slug: str, chapter: str, title: str, says: str) -> None:
    before = files(root)
    with pytest.raises(UserError) as error:
        scaffold(root, slug, chapter, title)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert files(root) == before


def test_nothing_is_written_over(root: Path) -> None:
    scaffold(root, SLUG, "", "")
    before = files(root)
    with pytest.raises(UserError, match="the paper 'train-longer' exists already: nothing was"):
        scaffold(root, SLUG, "", "")
    (root / "notebooks/large-batch/train-longer.yaml").unlink()
    with pytest.raises(UserError, match=r"train-longer.ipynb exists already: nothing was written"):
        scaffold(root, SLUG, "", "")
    before.pop("notebooks/large-batch/train-longer.yaml")
    assert files(root) == before


@pytest.mark.parametrize(
    "title", ['Quotes "and" colons: yes', "Dollars $5 and ${title}", "# Hash", "Ünïcode"]
)
def test_titles_survive(root: Path, title: str) -> None:
    scaffold(root, "new-paper", CHAPTER, title)
    paper = find_paper("new-paper", root)
    assert read_card(paper.card_path).title == title
    assert json.loads(paper.notebook_path.read_text())["cells"][0]["source"] == [f"# {title}"]
    module = root / "lib/wellposed/methods/large_batch/new_paper.py"
    assert title in (ast.get_docstring(ast.parse(module.read_text())) or "")


def test_a_digit_first_slug_is_a_module_too(root: Path) -> None:
    """Python's names do not begin with digits; fails if the card is refused by its own schema."""
    with pytest.raises(UserError, match="must begin with a letter"):
        scaffold(root, "3d-shapes", CHAPTER, "Shapes")


@pytest.mark.parametrize("text", ["", "- 3\n", "chapter: x\n", "- {chapter: a}\n", "[", "- - a\n"])
def test_a_catalog_that_is_none(root: Path, text: str) -> None:
    path = root / "book" / "catalog.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_catalog(root)
    assert str(error.value).startswith(f"{path}: not a readable catalog (")
    assert "\n" not in str(error.value)


def test_the_command_tells_what_it_wrote(root: Path, wellposed: Callable[..., Result]) -> None:
    result = wellposed("new", SLUG)
    assert (result.code, result.err) == (0, "")
    assert {str(Path(p).relative_to(root)) for p in result.out.splitlines()} == (
        PAPER | SHARED | {"_toc.yml"}
    )


def test_the_module_can_have_another_name(root: Path) -> None:
    written = scaffold(root, SLUG, "", "", "short_name")
    assert {path.name for path in written} >= {"short_name.py", "test_short_name.py"}
    assert "short_name" in find_paper(SLUG, root).card_path.read_text()
    with pytest.raises(UserError, match="module's name"):
        scaffold(root, "second-paper", CHAPTER, "A second paper", "Not-a-name")
