"""Lint, types, the layers of the library, and tests that could not fail."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
COMMANDS = {
    "ruff check": ["ruff", "check", "."],
    # In notebooks only what is wrong, such as an unused import: their layout is for readers.
    "ruff check of notebooks": ["ruff", "check", "--isolated", "--select", "F", "notebooks"],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "import-linter": ["lint-imports", "--no-cache"],
}
DROPPED = {"allclose", "isclose", "equal", "array_equal", "is_close"}


@pytest.mark.parametrize("name", COMMANDS)
def test_tool_finds_nothing(name: str) -> None:
    program, *rest = COMMANDS[name]
    done = subprocess.run([BIN / program, *rest], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}:\n{done.stdout}\n{done.stderr}"


def faults(path: Path) -> list[str]:
    """Tests in a file that pass whatever the code does."""
    found = []
    tree = ast.parse(path.read_text())
    for scope in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]:
        names = Counter(n.name for n in scope.body if isinstance(n, ast.FunctionDef))
        found += [f"{name} is defined {count} times" for name, count in names.items() if count > 1]
    for node in ast.walk(tree):
        if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
            continue
        inner = list(ast.walk(node))
        calls = [
            c.func.attr if isinstance(c.func, ast.Attribute) else getattr(c.func, "id", "")
            for c in inner
            if isinstance(c, ast.Call)
        ]
        judged = any(isinstance(n, ast.Assert) for n in inner) or any(
            c in ("raises", "warns", "gradcheck", "fail") or c.startswith(("assert_", "check_"))
            for c in calls
        )
        if not judged:
            found.append(f"{node.name} asserts nothing")
        for statement in inner:
            if not isinstance(statement, ast.Expr):
                continue
            value = statement.value
            if isinstance(value, ast.Compare):
                found.append(f"{node.name} compares and drops the result")
            if isinstance(value, ast.Call) and getattr(value.func, "attr", "") in DROPPED:
                found.append(f"{node.name} calls {value.func.attr}() and drops the result")
    return [f"{path.name}: {fault}" for fault in found]


def test_every_test_can_fail() -> None:
    found = [fault for path in sorted(ROOT.glob("tests/**/*.py")) for fault in faults(path)]
    assert found == []


def test_the_lint_sees_what_it_is_for(tmp_path: Path) -> None:
    """The lint itself can fail: each fault it is for, in one file."""
    path = tmp_path / "test_bad.py"
    path.write_text(
        "def test_a():\n    1 == 2\n    assert True\n"
        "def test_b():\n    print(1)\n"
        "def test_b():\n    torch.allclose(1, 2)\n    assert True\n"
    )
    assert faults(path) == [
        "test_bad.py: test_b is defined 2 times",
        "test_bad.py: test_a compares and drops the result",
        "test_bad.py: test_b asserts nothing",
        "test_bad.py: test_b calls allclose() and drops the result",
    ]
