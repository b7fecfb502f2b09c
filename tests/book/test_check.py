"""Each rule of the anatomy, held to a good paper that breaks it in one place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox import Result
from wellposed.book import digest
from wellposed.book.check import LONGEST_CELL, MOST_BYTES, check_paper
from wellposed.book.project import Paper, find_paper
from wellposed.book.record import MIME
from wellposed.book.refresh import normalized
from wellposed.book.scaffold import scaffold

SLUG = "good-paper"
CLAIM = {
    "id": "first-claim",
    "verdict": "partly",
    "test": "every seed",
    "value": 1.0,
    "low": None,
    "high": None,
    "relation": ">=",
    "threshold": 0.5,
    "n": 3,
    "ours": "1",
    "text": "1 to 3",
    "timed": False,
}
RECORD = {"slug": SLUG, "preset": "quick", "seed": 0, "device": "cpu", "claims": [CLAIM]}
Notebook = dict[str, Any]


def stream(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text}


def shown(kind: str, data: Any) -> dict[str, Any]:
    return {"output_type": "display_data", "metadata": {}, "data": {kind: data}}


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paper:
    """A paper that keeps every rule: what `wellposed new` writes, with outputs."""
    monkeypatch.delenv("WELLPOSED_ROOT", raising=False)
    root = sandbox.make_project(tmp_path / "project")
    scaffold(root, SLUG, "noisy-labels", "A good paper")
    monkeypatch.setattr(digest, "PACKAGE", root / "lib" / "wellposed")
    monkeypatch.chdir(root)
    paper = find_paper(SLUG, root)
    notebook = normalized(json.loads(paper.notebook_path.read_text()))
    cell(notebook, "report.show")["outputs"] = [shown(MIME, RECORD)]
    cell(notebook, "NBVAL")["outputs"] = [stream("first-claim: partly\n")]
    paper.notebook_path.write_text(json.dumps(notebook))
    return paper


def cell(notebook: Notebook, text: str) -> dict[str, Any]:
    """The first cell that holds a text."""
    return next(c for c in notebook["cells"] if text in "".join(c["source"]))


def after(paper: Paper, change: Callable[[Notebook], Any]) -> list[str]:
    """The problems found after a change to the notebook, without the file's name."""
    notebook = json.loads(paper.notebook_path.read_text())
    change(notebook)
    paper.notebook_path.write_text(json.dumps(notebook))
    found = check_paper(paper)
    assert all(problem.startswith(f"{paper.notebook_path}: ") for problem in found)
    assert all("\n" not in problem for problem in found)
    return [problem.removeprefix(f"{paper.notebook_path}: ") for problem in found]


def replaced(old: str, new: str) -> Callable[[Notebook], None]:
    """A change of one cell's source."""

    def change(notebook: Notebook) -> None:
        found = cell(notebook, old)
        found["source"] = "".join(found["source"]).replace(old, new, 1)

    return change


def put(output: dict[str, Any], text: str = "1 + 1", **metadata: Any) -> Callable[[Notebook], None]:
    """A change that adds an output to a cell, and metadata."""

    def change(notebook: Notebook) -> None:
        cell(notebook, text)["outputs"].append(output)
        cell(notebook, text)["metadata"] |= metadata

    return change


def on_slide(kind: str, text: str = "1 + 1") -> Callable[[Notebook], None]:
    """A change of one cell's slide type; "" takes it away."""

    def change(notebook: Notebook) -> None:
        cell(notebook, text)["metadata"]["slideshow"] = {"slide_type": kind} if kind else {}

    return change


def off_slides(notebook: Notebook) -> None:
    for each in notebook["cells"]:
        each["metadata"].pop("slideshow", None)


def test_the_good_paper_is_good(paper: Paper) -> None:
    assert check_paper(paper) == []


FIGURE = shown("image/png", "iVBORw0KGgo=")
ALT = {"mystnb": {"image": {"alt": "A line that rises and then stays flat."}}}


@pytest.mark.parametrize(
    "change",
    [
        put(FIGURE, **ALT),
        put(stream("12 objects at 0x12\n")),
        put(shown("text/html", "x" * (MOST_BYTES - 5000))),
        replaced("1 + 1", "def double(x):\n    return 2 * x"),
        replaced("1 + 1", "x = 1\n" * LONGEST_CELL),
        replaced("## The idea", "## The idea\n\n```python\n# not a heading\n## nor this\n```"),
        replaced("## The idea", "## The idea\n\n### A third level"),
        replaced("A question.", "A question with `{exercise}` in it."),
        on_slide("fragment"),
        on_slide("notes"),
        on_slide("", "## At scale"),
    ],
)
def test_what_is_allowed(paper: Paper, change: Callable[[Notebook], None]) -> None:
    assert after(paper, change) == []


def drop(text: str) -> Callable[[Notebook], None]:
    return lambda notebook: notebook["cells"].remove(cell(notebook, text))


def renumber(notebook: Notebook) -> None:
    count = 0
    for each in notebook["cells"]:
        if each["cell_type"] == "code":
            count += 1
            each["execution_count"] = count


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (replaced("# A good", "# Another"), "the one first-level heading must be the card's title"),
        (replaced("## The idea", "# The idea"), "the one first-level heading must be the card's"),
        (replaced("## The idea", "## Idea"), "the sections must be The problem, The idea,"),
        (drop("## At scale"), "the sections must be"),
        (replaced("1 + 1", "x = 1\n" * (LONGEST_CELL + 1)), "has 26 lines, at most 25 are allowed"),
        (replaced("1 + 1", "class A:\n    pass"), "defines the class A: move it to the library"),
        (replaced("1 + 1", "def f(x):\n    y = x\n    return y"), "defines f: move it to the"),
        (
            replaced("1 + 1", "if True:\n    async def g():\n        x = 1\n        return x"),
            "defines g: move it to the library",
        ),
        (put(stream("x"), papermill={"duration": 1}), "carries metadata of a run"),
        (put(stream("x"), execution={"iopub": 1}), "carries metadata of a run"),
        (put({"output_type": "error", "ename": "KeyError"}), "ended in an error: KeyError"),
        (put(stream("UserWarning", "stderr")), "printed to stderr"),
        (put(FIGURE), "shows a figure without alternative text"),
        (put(shown("image/svg+xml", "<svg/>")), "shows a figure without alternative text"),
        (put(FIGURE, mystnb={"image": {"alt": "short"}}), "without alternative text"),
        (put(stream("<object at 0x7fa3249bb910>")), "shows a memory address"),
        (put(shown("text/plain", "<X at 0x7fa3249bb910>")), "shows a memory address"),
        (put(shown("text/html", "x" * MOST_BYTES)), "at most 600 kB are allowed"),
        (
            lambda notebook: cell(notebook, "1 + 1").update(execution_count=None),
            "not every cell was run in order",
        ),
        (
            lambda notebook: cell(notebook, "report.show").update(outputs=[]),
            "no claims record in its outputs",
        ),
        (put(shown(MIME, RECORD)), "the notebook holds 2 claims records"),
        (
            lambda notebook: cell(notebook, "report.show").update(
                outputs=[shown(MIME, RECORD | {"claims": [CLAIM | {"id": "other"}]})]
            ),
            "its claims are not the card's",
        ),
        (
            lambda notebook: cell(notebook, "report.show").update(
                outputs=[shown(MIME, RECORD | {"preset": "smoke"})]
            ),
            "its outputs are those of the preset 'smoke', not of quick",
        ),
        (
            lambda notebook: cell(notebook, "report.show").update(
                outputs=[shown(MIME, RECORD | {"claims": 3})]
            ),
            "the notebook's claims record is damaged (claims)",
        ),
        (replaced("# NBVAL_CHECK_OUTPUT\n", ""), "exactly one cell must begin with"),
        (replaced("# NBVAL", "x = 1\n# NBVAL"), "exactly one cell must begin with"),
        (
            replaced("1 + 1", "# NBVAL_CHECK_OUTPUT"),
            "must begin with # NBVAL_CHECK_OUTPUT, found 2",
        ),
        (
            lambda notebook: cell(notebook, "NBVAL").update(
                outputs=[stream("first-claim: reproduced\n")]
            ),
            "the printed verdicts are not those of the claims record",
        ),
        (
            lambda notebook: cell(notebook, "NBVAL").update(outputs=[]),
            "the printed verdicts are not those of the claims record",
        ),
        (replaced("{exercise}", "{note}"), "2 to 4 exercises are expected, found 1"),
        (replaced(f":label: {SLUG}-1", ":label: other-1"), f"must begin with {SLUG}-"),
        (replaced(f"start}} {SLUG}-1", f"start}} {SLUG}-2"), "every exercise needs one solution"),
        (replaced("{solution-end}", "{end}"), "every exercise needs one solution"),
        (replaced(":class: dropdown\n", ""), "solutions must be folded (:class: dropdown)"),
        (drop("1 + 1"), "at least two solutions must hold code that is executed"),
        (off_slides, "no cell has a slide type (metadata slideshow.slide_type)"),
        (on_slide("", "# A good"), "the first cell, with the title, must have the slide type"),
        (on_slide("sldie"), "has the slide type 'sldie': known are slide, subslide, fragment"),
        (on_slide("", "report.show"), "no cell of the section The claims has a slide type"),
        (on_slide("skip", "## The idea"), "no cell of the section The idea has a slide type"),
        (replaced("1 + 1", "load('mnist-5k')"), "it loads 'mnist-5k', which the card's datasets"),
        (replaced("1 + 1", 'd.load( "digits")'), "it loads 'digits', which the card's datasets"),
    ],
)
def test_each_rule_is_held(paper: Paper, change: Callable[[Notebook], None], says: str) -> None:
    found = after(paper, change)
    assert any(says in problem for problem in found), found


def test_the_verdict_cell_must_not_hold_the_record(paper: Paper) -> None:
    def change(notebook: Notebook) -> None:
        cell(notebook, "report.show")["outputs"] = []
        cell(notebook, "NBVAL")["outputs"].append(shown(MIME, RECORD))

    assert after(paper, change) == [
        "the verdict cell must not hold the claims record: nbval would compare its digits"
    ]


def by_the_clock(notebook: Notebook) -> None:
    """Make the claim a timed one, as a run would show it."""
    record = RECORD | {"claims": [CLAIM | {"timed": True}]}
    cell(notebook, "report.show")["outputs"] = [shown(MIME, record)]
    cell(notebook, "NBVAL")["outputs"] = [stream("first-claim: judged by the clock\n")]


def test_a_timed_claim_needs_a_cell_that_measures_times(paper: Paper) -> None:
    """Fails if `timed` can take any claim out of the comparison."""
    assert after(paper, by_the_clock) == [
        "first-claim is judged by the clock, and no cell that measures times is tagged timing"
    ]
    assert after(paper, put(stream("1.0"), tags=["timing"])) == []


def test_a_timed_verdict_must_not_be_printed(paper: Paper) -> None:
    """Fails if a committed notebook still asserts a verdict that a busy machine can turn."""

    def change(notebook: Notebook) -> None:
        by_the_clock(notebook)
        cell(notebook, "1 + 1")["metadata"]["tags"] = ["timing"]
        cell(notebook, "NBVAL")["outputs"] = [stream("first-claim: partly\n")]

    assert after(paper, change) == ["the printed verdicts are not those of the claims record"]


def test_missing_files_are_named(paper: Paper) -> None:
    root = paper.root
    module = root / "lib/wellposed/methods/noisy_labels/good_paper.py"
    test = root / "tests/methods/noisy_labels/test_good_paper.py"
    page = root / "book/chapters/noisy-labels.md"
    for path in (module, test, page):
        path.unlink()
    assert after(paper, lambda _: None) == [f"{p} is missing" for p in (module, test, page)]


def test_the_module_belongs_to_the_chapter(paper: Paper) -> None:
    card = paper.card_path
    card.write_text(card.read_text().replace("methods.noisy_labels.", "methods.grokking."))
    found = after(paper, lambda _: None)
    assert any("lies outside the paper's chapter noisy-labels" in problem for problem in found)


def test_cells_with_magics_can_be_checked(paper: Paper) -> None:
    """Fails with a traceback if a magic is taken for Python that does not parse."""
    assert after(paper, replaced("1 + 1", "%matplotlib inline\n1 + 1")) == []


def test_a_cell_that_is_no_python_is_a_problem(paper: Paper) -> None:
    found = after(paper, replaced("1 + 1", "1 +"))
    assert len(found) == 1
    assert "is not Python" in found[0]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("level: intermediate", "level: easy", "level: "),
        ("smoke: {num_seeds: 1}", "smoke: {seeds: 1}", "has no parameter 'seeds'"),
    ],
)
def test_a_broken_card_is_the_one_problem(paper: Paper, old: str, new: str, says: str) -> None:
    paper.card_path.write_text(paper.card_path.read_text().replace(old, new))
    (problem,) = check_paper(paper)
    assert problem.startswith(f"{paper.card_path}: ")
    assert says in problem


def test_the_command_counts_problems(paper: Paper, wellposed: Callable[..., Result]) -> None:
    good = wellposed("check")
    assert (good.code, good.err) == (0, "")
    assert good.out.splitlines() == [
        f"note: {SLUG}: outputs are older than what they come from: `refresh` it",
        "papers checked: 1, problems: 0",
    ]
    after(paper, replaced("## The idea", "## Idea"))
    bad = wellposed("check", "noisy-labels")
    assert bad.code == 1
    assert bad.out.splitlines()[-1] == "papers checked: 1, problems: 1"
    assert bad.out.startswith(f"{paper.notebook_path}: the sections must be")
