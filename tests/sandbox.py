"""A small project with tiny papers, for tests that must not touch the real one."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import pytest

from wellposed.book.record import RunRecord, read_record
from wellposed.book.refresh import METADATA, notebook_text

REPOSITORY = Path(__file__).resolve().parents[1]
WELLPOSED = Path(sys.executable).with_name("wellposed")

CARD = """\
title: A tiny paper
authors: [Ada Lovelace]
year: 2020
venue: Journal of Tests
arxiv: "2001.00001"
code: null
idea: Adding up numbers gives their sum.
level: introductory
tags: [testing]
prerequisites: []
module: wellposed.methods.noisy_labels.early_learning
datasets: []
choices: []
claims:
  - id: sum-grows
    statement: The sum grows with every summand.
    kind: difference
    paper: {number: "1.0", where: Table 1}
presets:
  smoke: {num_seeds: 1}
  full: {num_seeds: 9, scale: 2.0}
bibtex: |
  @article{$key,
    title = {A tiny paper},
    author = {Lovelace, Ada},
    year = {2020},
    journal = {Journal of Tests},
  }
"""

PARAMETERS = """\
preset = "quick"  # smoke, quick or full
seed = 0  # root of every random number
device = "auto"  # auto, cpu or cuda
num_seeds = 3  # runs of each method
scale = 1.0  # size of the summands
fast = True  # skip the wait
rates = [0.2, 0.4]  # shares
pause = 0.0  # seconds to wait in every cell
"""

EXPERIMENT = """\
import time
from wellposed.book import Report
from wellposed.book.claims import each_at_least
time.sleep(pause)
sums = [scale * (seed + k + 1) for k in range(num_seeds)]
"""

CLAIM = """\
time.sleep(pause)
report = Report("$slug", preset=preset, seed=seed, device=device)
evidence = each_at_least(sums, 0.0)
report.add("sum-grows", evidence, ours=f"{sums[0]:.1f}")
report.show()
"""


def _cell(kind: str, source: str, *tags: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": source}
    if tags:
        cell["metadata"]["tags"] = list(tags)
    return cell | ({"outputs": [], "execution_count": None} if kind == "code" else {})


def write_paper(root: Path, slug: str, *, extra: str = "", parameters: str = PARAMETERS) -> None:
    """Write a tiny paper's card and notebook, without outputs."""
    folder = root / "notebooks" / "noisy-labels"
    folder.mkdir(parents=True, exist_ok=True)
    card = Template(CARD).substitute(key=slug.replace("-", ""))
    (folder / f"{slug}.yaml").write_text(card)
    cells = [
        _cell("markdown", "# A tiny paper"),
        _cell("code", parameters, "parameters"),
        _cell("code", EXPERIMENT),
        _cell("code", extra or "time.sleep(pause)"),
        _cell("code", Template(CLAIM).substitute(slug=slug)),
        _cell("code", "# NBVAL_CHECK_OUTPUT\nreport.verdicts()"),
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    notebook = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    (folder / f"{slug}.ipynb").write_text(notebook_text(notebook))


def make_project(root: Path, *slugs: str) -> Path:
    """Make a project with one tiny paper for every slug."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "_config.yml").write_text("title: Sandbox\n")
    (root / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    (root / "notebooks").mkdir(exist_ok=True)
    (root / "book").mkdir(exist_ok=True)
    shutil.copy(REPOSITORY / "book" / "catalog.yaml", root / "book")
    shutil.copytree(REPOSITORY / "workflow", root / "workflow")
    for slug in slugs:
        write_paper(root, slug)
    return root


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code and its output."""

    code: int
    out: str
    err: str


def environment() -> dict[str, str]:
    """This process's environment, without a project chosen in it, and with wide tables."""
    kept = {key: value for key, value in os.environ.items() if key != "WELLPOSED_ROOT"}
    return kept | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for something that must come to pass, for as long as a crowded machine may take."""
    for _ in range(3600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail(f"{what} did not come to pass in three minutes")


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the real command in a project, as the head of a process group of its own."""
    return subprocess.Popen(
        [WELLPOSED, *arguments],
        cwd=root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def command(root: Path, *arguments: str) -> Result:
    """Run the real command in a project to its end."""
    process = start(root, *arguments)
    out, err = process.communicate()
    return Result(process.returncode, out, err)


def undisturbed(root: Path, slug: str) -> RunRecord:
    """Run a paper with nothing happening to it, in a folder of runs of its own; its record."""
    out = root / "undisturbed"
    done = command(root, "run", slug, "--out", str(out))
    assert done.code == 0, done.err
    (path,) = out.glob(f"quick/{slug}/*/record.json")
    record = read_record(path)
    assert record is not None
    return record
