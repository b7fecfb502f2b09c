"""A paper's exercises as an assignment: for students, and for whoever grades it.

The notebook up to its exercises stays, so that everything in it runs. A solution's prose becomes
an answer that is graded by hand. Of a solution's code, the assertions become a locked test, and
the rest becomes the answer; code without an assertion is graded by hand. The cells carry the
metadata of nbgrader, and the student's version is what nbgrader makes of the instructor's.
"""

import ast
import copy
import re
import symtable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wellposed.book.card import read_card
from wellposed.book.errors import UserError
from wellposed.book.files import write_new
from wellposed.book.notebook import Notebook, read_notebook, without_magics
from wellposed.book.project import Paper
from wellposed.book.record import read_record
from wellposed.book.refresh import normalized, notebook_text

Cell = dict[str, Any]

POINTS = 2
"""Points of an answer, be it in words or in code; nbgrader lets a teacher change them."""

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
CODE_STUB = "# YOUR CODE HERE\nraise NotImplementedError()"
TEXT_STUB = "YOUR ANSWER HERE"

_DIRECTIVE = re.compile(
    r"^(?P<fence>`{3,})\{(?P<kind>exercise|solution-start|solution-end)\}(?P<name>[^\n]*)\n"
    r"(?P<options>(?::[^\n]*\n)*)(?P<text>.*?)^(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_ASSERTION = re.compile(r"(\w+\.)*assert_\w+$")


def write_assignment(paper: Paper, out: Path, *, instructor: bool, force: bool) -> Path:
    """Write a paper's assignment where nbgrader looks for it in a course's folder.

    Args:
        paper: which one.
        out: the course's folder.
        instructor: with solutions, to source/; else without, to release/.
        force: write over a file that exists.

    Returns:
        The file written.

    Raises:
        UserError: the notebook has no exercises, the file exists, or cannot be written.
    """
    path = out / ("source" if instructor else "release") / paper.slug / f"{paper.slug}.ipynb"
    notebook = instructor_version(paper)
    if not instructor:
        notebook = student_version(notebook)
    return write_new(path, notebook_text(notebook), force=force)


def instructor_version(paper: Paper) -> Notebook:
    """The assignment with its solutions and the outputs of the committed run.

    Raises:
        UserError: the notebook has no exercises with solutions, or one that is not Python.
    """
    notebook = read_notebook(paper.notebook_path)
    try:
        cells = list(_cells(notebook))
    except SyntaxError as error:
        raise UserError(f"{paper.notebook_path}: a solution is not Python ({error.msg})") from None
    graded = [cell for cell in cells if cell["metadata"].get("nbgrader", {}).get("grade")]
    if not graded:
        raise UserError(f"{paper.notebook_path}: it has no exercises with solutions")
    points = sum(cell["metadata"]["nbgrader"]["points"] for cell in graded)
    return normalized({**notebook, "cells": [_introduction(paper, points), *cells]})


def student_version(instructor: Notebook) -> Notebook:
    """The assignment as students get it: stubs in place of solutions, and no outputs."""
    notebook = copy.deepcopy(instructor)
    for cell in notebook["cells"]:
        code = cell["cell_type"] == "code"
        if code:
            cell |= {"outputs": [], "execution_count": None}
        if not cell["metadata"].get("nbgrader", {}).get("solution"):
            continue
        if code:
            pattern = f"^{BEGIN}\n.*^{END}$"
            cell["source"] = re.sub(
                pattern, CODE_STUB, cell["source"], flags=re.MULTILINE | re.DOTALL
            )
        else:
            cell["source"] = TEXT_STUB
    return notebook


def _introduction(paper: Paper, points: int) -> Cell:
    record = read_record(paper.record_path("quick"))
    time = f" (about {max(5, round(record.seconds / 5) * 5)} seconds)" if record else ""
    text = (
        f"**Assignment: {read_card(paper.card_path).title}.** {points} points.\n\n"
        "This is the paper's notebook up to its exercises, which stand at the end. Run it from the "
        f"top{time}, then solve them. Replace *{TEXT_STUB}* by words and formulas, and the two "
        "lines at *YOUR CODE HERE* by code. The tests below an answer say nothing if they pass. "
        "Play with the parameters as you like, and hand in answers for the ones given here."
    )
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def _cells(notebook: Notebook) -> Iterator[Cell]:
    """The cells of the assignment, up to the end of the last exercise."""
    number, label, solving, code = 0, "", False, 0
    counts: dict[str, int] = {}
    waiting: list[Cell] = []

    def named(kind: str) -> str:
        name = f"{label}-{kind}"
        counts[name] = counts.get(name, 0) + 1
        return name if counts[name] == 1 else f"{name}-{counts[name]}"

    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            if solving:
                yield from _code_answer(cell, named)
            else:
                code += 1
                waiting.append(_marked(cell, f"setup-{code:02d}", locked=True))
            continue
        for kind, name, text in pieces(cell["source"]):
            if kind == "exercise":
                # What came before belongs to the assignment, since an exercise follows.
                yield from waiting
                waiting, number, label = [], number + 1, name
                yield {**cell, "source": f"### Exercise {number}\n\n{text}"}
            elif kind == "text" and solving:
                yield _marked({**cell, "source": text}, named("answer"), points=POINTS)
            elif kind == "text":
                waiting.append({**cell, "source": text})
            else:
                solving = kind == "solution-start"


def exercises(notebook: Notebook) -> int:
    """How many exercises a notebook has."""
    texts = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return sum(kind == "exercise" for text in texts for kind, _, _ in pieces(text))


def pieces(source: str) -> Iterator[tuple[str, str, str]]:
    """What a Markdown cell holds, in order: (kind, label, text); plain text has kind "text"."""
    end = 0
    for match in _DIRECTIVE.finditer(source):
        if before := source[end : match.start()].strip():
            yield "text", "", before
        label = re.search(r"^:label: (\S+)", match["options"], flags=re.MULTILINE)
        yield match["kind"], label[1] if label else match["name"].strip(), match["text"].strip()
        end = match.end()
    if after := source[end:].strip():
        yield "text", "", after


def _marked(cell: Cell, name: str, *, locked: bool = False, points: int = 0) -> Cell:
    """A cell with nbgrader's metadata: graded if it has points, a solution if not locked."""
    marks: dict[str, Any] = {"grade": points > 0, "solution": not locked, "locked": locked}
    marks |= {"task": False, "grade_id": name, "schema_version": 3, "cell_type": cell["cell_type"]}
    marks |= {"points": points} if points else {}
    return {**cell, "metadata": {**cell["metadata"], "nbgrader": marks}}


def _code_answer(cell: Cell, named: Any) -> Iterator[Cell]:
    """A solution's code as an answer and, where it asserts something, the test of it."""
    solution, tests = split_tests(cell["source"])
    answer = {**cell, "source": f"{_head(solution, tests)}{BEGIN}\n{solution}\n{END}"}
    if not tests:
        yield _marked(answer, named("code"), points=POINTS)
        return
    yield _marked(answer, named("code"))
    test = {**cell, "metadata": {}, "source": tests, "outputs": []}
    yield _marked(test, named("tests"), locked=True, points=POINTS)


def _head(solution: str, tests: str) -> str:
    """The line that tells which names the tests use.

    It also clears them: a value from above must not pass a test in place of an answer. A name
    whose value the solution needs cannot be cleared.
    """
    names, bound, needed = _binds(solution) & _reads(tests), set[str](), set[str]()
    for statement in ast.parse(without_magics(solution)).body:
        text = ast.unparse(statement)
        needed |= _reads(text) - bound
        bound |= _binds(text)
    lines = []
    if cleared := sorted(names - needed):
        them = "it" if len(cleared) == 1 else "them"
        clear = " = ".join([*cleared, "None"])
        lines.append(f"{clear}  # yours to compute: the tests below need {them}")
    if kept := sorted(names & needed):
        lines.append(f"# The tests below use: {', '.join(kept)}")
    return "".join(f"{line}\n" for line in lines)


def split_tests(source: str) -> tuple[str, str]:
    """Split a solution's code into what solves and what tests.

    A statement of the cell tests if it is an assertion (or an ``if`` around nothing else), if it
    reads a name that the cell computes, and if the names it reads still have their values at the
    end of the cell: then it can stand below.

    Args:
        source: the code of a cell.

    Returns:
        The solution and the tests, each without the other; no tests where there are none.

    Example:
        >>> split_tests("x = 2\\nassert x > 1\\nprint(x)")
        ('x = 2\\nprint(x)', 'assert x > 1')
    """
    statements = ast.parse(without_magics(source)).body
    computed = _binds(source)
    lines, bound, tests = source.splitlines(), set[str](), list[ast.stmt]()
    for statement in reversed(statements):
        text = ast.unparse(statement)
        if _asserts(statement) and _reads(text) & computed and not _reads(text) & bound:
            tests.insert(0, statement)
        else:
            bound |= _binds(text)
    taken = {n for test in tests for n in range(test.lineno - 1, test.end_lineno or test.lineno)}
    kept = "\n".join(line for n, line in enumerate(lines) if n not in taken).strip("\n")
    return kept, "\n".join(lines[n] for n in sorted(taken))


def _asserts(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.If):
        return not statement.orelse and all(_asserts(inner) for inner in statement.body)
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return bool(_ASSERTION.match(ast.unparse(statement.value.func)))
    return isinstance(statement, ast.Assert)


def _binds(source: str) -> set[str]:
    """The names that code gives a value to."""
    table = symtable.symtable(without_magics(source), "cell", "exec")
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}


def _reads(source: str) -> set[str]:
    """The names of the notebook that code reads, in functions and comprehensions too."""

    def walk(table: symtable.SymbolTable) -> Iterator[str]:
        top = table.get_type() == "module"
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (top or symbol.is_global()):
                yield symbol.get_name()
        for child in table.get_children():
            yield from walk(child)

    return set(walk(symtable.symtable(without_magics(source), "cell", "exec")))
