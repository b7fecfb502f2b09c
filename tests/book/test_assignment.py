"""Assignments: what students get, what instructors get, and what nbgrader makes of them."""

import ast
import copy
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from nbgrader.nbgraderformat.v3 import MetadataValidatorV3
from nbgrader.preprocessors import ClearOutput, ClearSolutions
from traitlets.config import Config

import sandbox
from sandbox import Result
from wellposed.book.assignment import (
    CODE_STUB,
    TEXT_STUB,
    instructor_version,
    split_tests,
    student_version,
    write_assignment,
)
from wellposed.book.notebook import Notebook, read_notebook
from wellposed.book.project import find_paper, find_papers
from wellposed.book.refresh import notebook_text
from wellposed.book.runs import plan

PAPERS = find_papers(sandbox.REPOSITORY)
EXERCISES = [
    ("markdown", "The last words of the ablation.\n\n## Exercises"),
    ("markdown", "```{exercise}\n:label: alpha-1\n\nAdd $x$ and\n$y$.\n```"),
    ("markdown", "````{solution-start} alpha-1\n:class: dropdown\n````"),
    ("markdown", "It is their sum."),
    ("code", "x, y = sums[0], 2.0\nassert y == 2\ntotal = x + y\nprint(total)\nassert total > y"),
    ("markdown", "```{solution-end}\n```\n\n```{exercise}\n:label: alpha-2\nPrint it.\n```"),
    ("markdown", "````{solution-start} alpha-2\n:class: dropdown\n````\n\nWith `print`."),
    ("code", "for value in sums:\n    print(value)\n    assert value > 0"),
    ("markdown", "```{solution-end}\n```"),
    ("markdown", "## At scale\n\nMore."),
    ("code", "raise RuntimeError('at scale')"),
]


def add_exercises(project: Path) -> None:
    """Give the tiny paper exercises, in the ways in which notebooks write them."""
    path = find_paper("alpha", project).notebook_path
    notebook = json.loads(path.read_text())
    for kind, source in EXERCISES:
        cell: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": source}
        cell |= {"outputs": [], "execution_count": None} if kind == "code" else {}
        notebook["cells"].append(cell | {"id": f"more-{len(notebook['cells'])}"})
    path.write_text(notebook_text(notebook))


@pytest.fixture
def alpha(project: Path) -> Path:
    add_exercises(project)
    return project


def marks(cell: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = cell["metadata"].get("nbgrader", {})
    return found


def sources(notebook: Notebook) -> dict[str, str]:
    """The sources of the cells of exercises, by nbgrader's name of them."""
    return {
        marks(cell)["grade_id"]: cell["source"]
        for cell in notebook["cells"]
        if "setup" not in marks(cell).get("grade_id", "setup")
    }


def test_what_students_get(alpha: Path, wellposed: Callable[..., Result]) -> None:
    result = wellposed("assignment", "alpha", "--out", "course")
    path = Path("course/release/alpha/alpha.ipynb")
    assert (result.code, result.err) == (0, "")
    assert result.out.strip() == str(path)
    notebook = read_notebook(path)
    assert sources(notebook) == {
        "alpha-1-answer": TEXT_STUB,
        "alpha-1-code": (
            "total = y = None  # yours to compute: the tests below need them\n"
            "# YOUR CODE HERE\nraise NotImplementedError()"
        ),
        "alpha-1-tests": "assert y == 2\nassert total > y",
        "alpha-2-answer": TEXT_STUB,
        "alpha-2-code": CODE_STUB,
    }
    text = path.read_text()
    assert "their sum" not in text
    assert "At scale" not in text
    assert "{exercise}" not in text
    assert "{solution" not in text
    asked = [c["source"] for c in notebook["cells"] if c["source"].startswith("### Exercise")]
    assert asked == ["### Exercise 1\n\nAdd $x$ and\n$y$.", "### Exercise 2\n\nPrint it."]
    assert "**Assignment: A tiny paper.** 8 points." in notebook["cells"][0]["source"]
    assert any(c["source"].endswith("## Exercises") for c in notebook["cells"])
    before = read_notebook(find_paper("alpha").notebook_path)
    kept = [c["source"] for c in before["cells"][: 6 + 1]]
    assert [c["source"] for c in notebook["cells"][1 : 1 + len(kept)]] == kept
    assert all(not c.get("outputs") for c in notebook["cells"])


def test_what_instructors_get(alpha: Path, wellposed: Callable[..., Result]) -> None:
    result = wellposed("assignment", "alpha", "--instructor", "--out", "course")
    assert result.out.strip() == "course/source/alpha/alpha.ipynb"
    found = sources(read_notebook(Path(result.out.strip())))
    assert found["alpha-1-answer"] == "It is their sum."
    assert found["alpha-1-code"].splitlines() == [
        "total = y = None  # yours to compute: the tests below need them",
        "### BEGIN SOLUTION",
        "x, y = sums[0], 2.0",
        "total = x + y",
        "print(total)",
        "### END SOLUTION",
    ]
    assert found["alpha-1-tests"] == "assert y == 2\nassert total > y"


def test_who_grades_what(alpha: Path) -> None:
    """Words by hand, tested code by its tests, other code by hand; the rest is locked."""
    cells = instructor_version(find_paper("alpha"))["cells"]
    kinds = {
        marks(c)["grade_id"]: (marks(c)["grade"], marks(c)["solution"], marks(c)["locked"])
        for c in cells
        if marks(c)
    }
    by_hand, answer, test, locked = (
        (True, True, False),
        (False, True, False),
        (True, False, True),
        (False, False, True),
    )
    assert kinds == {
        **{f"setup-{number:02d}": locked for number in range(1, 6)},
        "alpha-1-answer": by_hand,
        "alpha-1-code": answer,
        "alpha-1-tests": test,
        "alpha-2-answer": by_hand,
        "alpha-2-code": by_hand,
    }
    assert all(("points" in marks(c)) == marks(c)["grade"] for c in cells if marks(c))


@pytest.mark.parametrize(
    ("source", "solution", "tests"),
    [
        ("x = 1\nassert x", "x = 1", "assert x"),
        ("x = 1\nassert x\nprint(x)", "x = 1\nprint(x)", "assert x"),
        ("x = 1\nassert x\nx = 2", "x = 1\nassert x\nx = 2", ""),
        ("x = 1\nassert x\nfor x in y: pass", "x = 1\nassert x\nfor x in y: pass", ""),
        ("x = 1\nassert x\nx += 1\nassert x > 1", "x = 1\nassert x\nx += 1", "assert x > 1"),
        ("x = 1\nif a:\n    assert x", "x = 1", "if a:\n    assert x"),
        ("x = 1\nif a:\n    assert x\nelse:\n    x = 2", None, ""),
        ("for x in y:\n    assert x", None, ""),
        ("x = 1\nassert y", None, ""),
        ("x = 1\ntorch.testing.assert_close(x, 1)", "x = 1", "torch.testing.assert_close(x, 1)"),
        ("x = 1\nassert all(x > a for a in y)", "x = 1", "assert all(x > a for a in y)"),
        ("x = [a for a in y]\nassert all(a for a in y)", None, ""),
        ("x = 1\nassert (\n    x > 0  # it is\n)", "x = 1", "assert (\n    x > 0  # it is\n)"),
        ("%time\nx = 1\nassert x", "%time\nx = 1", "assert x"),
        ("import a\nassert a.b", "import a", "assert a.b"),
    ],
)
def test_which_statements_are_tests(source: str, solution: str | None, tests: str) -> None:
    """An assertion that cannot stand below the answer stays in the solution."""
    assert split_tests(source) == (source if solution is None else solution, tests)


def test_a_value_that_the_solution_needs_is_not_cleared(alpha: Path) -> None:
    path = find_paper("alpha").notebook_path
    path.write_text(
        path.read_text().replace("x, y = sums[0], 2.0", "x, y, sums = 1, 2.0, sums[:1]")
    )
    path.write_text(path.read_text().replace("assert total > y", "assert total > y > len(sums)"))
    found = sources(student_version(instructor_version(find_paper("alpha"))))
    assert found["alpha-1-code"].splitlines()[:2] == [
        "total = y = None  # yours to compute: the tests below need them",
        "# The tests below use: sums",
    ]


def test_what_is_refused(
    project: Path, refused: Callable[..., str], wellposed: Callable[..., Result]
) -> None:
    assert refused("assignment", "alpa") == "no paper 'alpa': did you mean 'alpha'?"
    assert refused("assignment", "alpha").endswith("it has no exercises with solutions")
    assert not Path("course").exists()
    add_exercises(project)
    assert wellposed("assignment", "alpha").code == 0
    path = Path("course/release/alpha/alpha.ipynb")
    path.write_text("what a teacher changed")
    said = refused("assignment", "alpha")
    assert said == f"{path} exists already: --force writes over it"
    assert path.read_text() == "what a teacher changed"
    assert wellposed("assignment", "alpha", "--force").code == 0
    assert "NotImplementedError" in path.read_text()
    notebook_path = find_paper("alpha", project).notebook_path
    good = notebook_path.read_text()
    notebook_path.write_text(good.replace("total = x + y", "total = x +"))
    assert refused("assignment", "alpha").endswith("a solution is not Python (invalid syntax)")
    notebook_path.write_text(good)
    Path("taken").touch()
    assert refused("assignment", "alpha", "--out", "taken").startswith("cannot write taken/release")
    path.unlink()
    path.mkdir()
    assert (
        refused("assignment", "alpha", "--force") == f"{path} is a folder: give the name of a file"
    )


def test_nbgrader_makes_the_students_version_of_the_instructors(alpha: Path) -> None:
    """With its own preprocessors; fails if the stubs, the markers or the metadata differ."""
    instructor = instructor_version(find_paper("alpha"))
    made = nbformat.from_dict(copy.deepcopy(instructor))
    MetadataValidatorV3().validate_nb(made)
    for preprocessor in (ClearSolutions(), ClearOutput()):
        made, _ = preprocessor.preprocess(made, {})
    ours = student_version(instructor)
    assert [c.source for c in made.cells] == [c["source"] for c in ours["cells"]]
    assert [c.metadata for c in made.cells] == [c["metadata"] for c in ours["cells"]]


@pytest.mark.parametrize("slug", PAPERS)
def test_every_papers_assignment_is_sound(slug: str) -> None:
    """Valid for nbgrader, and no line of a solution is left in what students get."""
    instructor = instructor_version(PAPERS[slug])
    MetadataValidatorV3().validate_nb(nbformat.from_dict(instructor))
    students = student_version(instructor)
    for cell, given in zip(instructor["cells"], students["cells"]):
        if not marks(cell).get("solution"):
            assert given["source"] == cell["source"]
        elif cell["cell_type"] == "markdown":
            assert given["source"] == TEXT_STUB
        else:
            head, _, stub = given["source"].rpartition(CODE_STUB)
            assert stub == ""
            assert re.fullmatch(r"(\w+ = )*(None  # .*\n)?(# The tests .*\n)?", head), head
            ast.parse(cell["source"])
        assert not given.get("outputs")
    text = notebook_text(students)
    assert "BEGIN SOLUTION" not in text
    assert "{solution" not in text


def executed(notebook: Notebook, folder: Path, values: dict[str, Any]) -> list[dict[str, Any]]:
    """The code cells after a run that goes on after errors, with other parameters."""
    notebook = copy.deepcopy(notebook)
    cells = notebook["cells"]
    place = next(n for n, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
    cells[place]["source"] += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    result = nbformat.from_dict(notebook)
    client = NotebookClient(result, allow_errors=True, timeout=300, kernel_name="python3")
    logging.getLogger("traitlets").setLevel(logging.ERROR)
    client.execute(cwd=str(folder))
    return [cell for cell in result.cells if cell.cell_type == "code"]


def errors(cells: list[dict[str, Any]]) -> dict[str, str]:
    return {
        cell["metadata"]["nbgrader"]["grade_id"]: output["ename"]
        for cell in cells
        for output in cell["outputs"]
        if output["output_type"] == "error"
    }


@pytest.mark.slow
def test_a_real_assignment_runs_where_it_should() -> None:
    """The instructor's runs to its end; the student's fails at its stubs and its tests alone."""
    paper = PAPERS["weight-compander"]
    smoke = plan(paper, preset="smoke").parameters
    instructor = instructor_version(paper)
    folder = paper.notebook_path.parent
    assert errors(executed(instructor, folder, smoke)) == {}
    failed = errors(executed(student_version(instructor), folder, smoke))
    code = {name for name in sources(instructor) if name.endswith("-code")}
    tests = {name for name in sources(instructor) if name.endswith("-tests")}
    assert tests
    assert {name for name, error in failed.items() if error == "NotImplementedError"} == code
    assert failed.keys() - code == tests


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Object of type")
def test_nbgrader_grades_it(alpha: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A right, a wrong and an empty answer, through nbgrader's own pipeline."""
    monkeypatch.setenv("WELLPOSED_ROOT", str(alpha))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "jupyter"))
    # nbgrader calls alembic by its bare name, as it does in an activated environment.
    monkeypatch.setenv("PATH", str(sandbox.WELLPOSED.parent), prepend=os.pathsep)
    course = tmp_path / "course"
    write_assignment(find_paper("alpha"), course, instructor=True, force=False)
    config = Config()
    config.CourseDirectory.root = str(course)
    config.CourseDirectory.db_url = f"sqlite:///{course}/gradebook.db"
    api = NbGraderAPI(config=config)
    done = api.generate_assignment("alpha")
    assert done["success"], done["log"]
    released = json.loads((course / "release/alpha/alpha.ipynb").read_text())
    answers = {
        "right": "y = 2\ntotal = sums[0] + y",
        "wrong": "y = 2\ntotal = 0",
        "empty": None,
    }
    for student, answer in answers.items():
        handed_in = copy.deepcopy(released)
        for cell in handed_in["cells"]:
            if answer and marks(cell).get("grade_id") == "alpha-1-code":
                cell["source"] = answer
        path = course / "submitted" / student / "alpha" / "alpha.ipynb"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(handed_in))
        done = api.autograde("alpha", student)
        assert done["success"], done["log"]
    with Gradebook(f"sqlite:///{course}/gradebook.db") as grades:
        points = {
            student: grades.find_grade("alpha-1-tests", "alpha", "alpha", student).auto_score
            for student in answers
        }
        by_hand = grades.find_grade("alpha-1-answer", "alpha", "alpha", "right")
        assert by_hand.max_score == 2
    assert points == {"right": 2, "wrong": 0, "empty": 0}
