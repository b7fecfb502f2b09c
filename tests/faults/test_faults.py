"""What may go wrong around a run, and what must be true after it.

Faults inside a single run (a kernel that dies, a cell that hangs, hostile values) are in
tests/book/test_runs.py, damaged and missing data in tests/data.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import sandbox
from wellposed.book.project import find_paper
from wellposed.book.record import RunRecord, read_record
from wellposed.book.runs import plan

KILLS = 50
SIDE_BY_SIDE = 2
LONGEST = 5.0
"""Seconds; an undisturbed run of the tiny paper takes about as long."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sandbox.make_project(tmp_path_factory.mktemp("faults") / "project", "alpha")


@pytest.fixture(scope="module")
def undisturbed(project: Path) -> RunRecord:
    """The record of a run that nothing happened to."""
    return sandbox.undisturbed(project, "alpha")


def found(out: Path) -> list[RunRecord]:
    """All records in a folder of runs; each must be whole."""
    records = []
    for path in out.glob("quick/alpha/*/record.json"):
        record = read_record(path)
        assert record is not None, f"half a record: {path.read_text()[:200]}"
        json.loads(path.with_name("notebook.ipynb").read_text())
        records.append(record)
    return records


@pytest.mark.slow
def test_fifty_kills_leave_no_half_run(project: Path, undisturbed: RunRecord) -> None:
    """SIGKILL at a random moment, fifty times, the command with its kernel or without.

    Fails if the record is written before the notebook, or not in one step (tried).
    """
    draw = random.Random(0)
    outs = [project / f"killed-{i}" for i in range(SIDE_BY_SIDE)]
    survived = 0
    for _ in range(KILLS // SIDE_BY_SIDE):
        running = [sandbox.start(project, "run", "alpha", "--out", str(out)) for out in outs]
        began = time.monotonic()
        # Everything at once, or the command alone: its kernel is then an orphan.
        moments = sorted((draw.uniform(0.2, LONGEST), draw.random() < 0.5, p) for p in running)
        for moment, whole, process in moments:
            time.sleep(max(0.0, began + moment - time.monotonic()))
            (os.killpg if whole else os.kill)(process.pid, signal.SIGKILL)
        for process, out in zip(running, outs):
            process.communicate()
            records = found(out)
            survived += len(records)
            assert all(record.claims == undisturbed.claims for record in records)
            for path in out.glob("quick/alpha/*/record.json"):
                path.unlink()  # a finished run would not start again; its other leftovers stay
    assert survived < KILLS, "no kill came before the end: the moments are too late"
    for out in outs:
        done = sandbox.command(project, "run", "alpha", "--out", str(out))
        assert done.code == 0, done.err
        (record,) = found(out)
        assert record.claims == undisturbed.claims


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB; mounting one takes root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_no_record(
    project: Path, undisturbed: RunRecord, tiny_disk: Path
) -> None:
    (tiny_disk / "filler").write_bytes(bytes(56 * 1024))
    full = sandbox.command(project, "run", "alpha", "--out", str(tiny_disk / "runs"))
    assert full.code == 2, full
    assert full.err.startswith("wellposed: cannot write ")
    assert full.err.endswith("No space left on device\n")
    assert full.err.count("\n") == 1
    assert found(tiny_disk / "runs") == []
    (tiny_disk / "filler").unlink()
    again = sandbox.command(project, "run", "alpha", "--out", str(tiny_disk / "runs"))
    assert again.code == 0, again.err
    assert [record.claims for record in found(tiny_disk / "runs")] == [undisturbed.claims]


def test_a_limit_on_file_sizes_is_one_line_and_no_record(project: Path) -> None:
    """As on a file system with quotas. Fails if the error of the write is not caught."""
    out = project / "limited"
    limited = subprocess.run(
        ["bash", "-c", f'ulimit -f 1; exec "$0" run alpha --out "{out}"', sandbox.WELLPOSED],
        cwd=project,
        env=sandbox.environment(),
        capture_output=True,
        text=True,
    )
    assert limited.returncode in (1, 2), limited
    assert "Traceback" not in limited.stderr
    assert limited.stderr.count("\n") == 1
    assert limited.stderr.startswith("wellposed: ")
    assert found(out) == []


@pytest.mark.parametrize(
    "text",
    [
        "title: !!python/object/apply:os.system ['touch victim']\n",
        "title: !!python/name:os.system\n",
        "a: &a [x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a]\ntitle: *b\n",
    ],
    ids=["a call", "a name", "aliases"],
)
def test_a_hostile_card_is_refused(project: Path, text: str) -> None:
    sandbox.write_paper(project, "hostile")
    path = project / "notebooks/noisy-labels/hostile.yaml"
    try:
        path.write_text(text)
        result = sandbox.command(project, "show", "hostile")
    finally:
        for left in project.glob("notebooks/*/hostile.*"):
            left.unlink()
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "hostile.yaml" in result.err
    assert "Traceback" not in result.err
    assert not list(project.rglob("victim"))


@pytest.mark.parametrize(
    "slug", ["../alpha", "/etc/passwd", "alpha/../alpha", "alpha\n", "{0}", ""]
)
def test_a_slug_is_no_path(project: Path, slug: str) -> None:
    result = sandbox.command(project, "run", slug)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "no paper or chapter" in result.err
    assert not (project.parent / "alpha").exists()


def test_the_undisturbed_run_is_found_again(project: Path, undisturbed: RunRecord) -> None:
    """The plan that the faults are judged by: the digest in the record is this paper's."""
    job = plan(find_paper("alpha", project), out=project / "undisturbed")
    assert job.finished() == undisturbed
