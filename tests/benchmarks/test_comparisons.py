"""The comparisons with other libraries: they run, everybody agrees, and the book shows them all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
HELPERS = {"conftest", "contest", "gpu"}


def pytest_in_benchmarks(*options: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on the comparisons, as `make bench` does."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-o", "python_files=*.py", "-q"]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", *options, str(FOLDER)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow  # numba and torch compile
def test_every_solver_runs_and_ours_reaches_the_goal() -> None:
    """Toy problems, one call each; a wrong formula of ours or of the plain version fails."""
    done = pytest_in_benchmarks("--small", "--benchmark-disable")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_committed_results_are_of_these_comparisons() -> None:
    """Fails if a comparison was added, renamed or removed and `make bench` was not run again."""
    found = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    raced = {(row["comparison"], row["problem"]) for row in found["rows"]}
    written = set()
    for file in FOLDER.glob("*.py"):
        if file.stem not in HELPERS:
            for name in re.findall(r'^def test_\w+.*\n    """(.*?)\.?"""', file.read_text(), re.M):
                written.add((file.stem, name))
    assert raced == written
    assert all(row["reached"] for row in found["rows"] if row["solver"] == "ours")
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in found["rows"])


def test_the_page_shows_every_comparison() -> None:
    page = (ROOT / "book" / "speed.md").read_text(encoding="utf-8")
    shown = re.findall(r"```\{comparison\} (\w+)", page)
    assert sorted(shown) == sorted({f.stem for f in FOLDER.glob("*.py")} - HELPERS)
