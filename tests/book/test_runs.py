"""Single runs: what is planned, what is kept, and everything that goes wrong on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox import Result
from wellposed.book import interrupt, runs
from wellposed.book.errors import UserError
from wellposed.book.project import find_paper
from wellposed.book.record import RunRecord, read_record
from wellposed.book.runs import Job, cell_seconds, commit, hardware, plan, versions

PAUSE = ("-p", "pause=1")
HOSTILE = """__import__('os').system('touch victim')"""
INJECTION = """x"); import os; os.system("touch victim") #{0}${HOME}\\"""


def planned(root: Path, slug: str = "alpha", **options: Any) -> Job:
    return plan(find_paper(slug, root), **options)


def texts(path: Path) -> str:
    """All that a notebook printed."""
    cells = json.loads(path.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", "")) for output in outputs)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waited for yet has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# What is planned.


def test_a_job_knows_its_values_and_its_place(project: Path) -> None:
    job = planned(project, preset="full", given={"scale": "3", "rates": "1,2"}, seed=7)
    assert job.parameters == {
        "num_seeds": 9,
        "scale": 3.0,
        "rates": [1.0, 2.0],
        "seed": 7,
        "preset": "full",
        "device": "auto",
    }
    assert job.folder == project / "runs" / "full" / "alpha" / job.digest
    elsewhere = planned(project, out=project / "elsewhere")
    assert elsewhere.folder.is_relative_to(project / "elsewhere" / "quick" / "alpha")
    assert job.finished() is None


def test_a_default_that_is_named_is_the_same_run(project: Path) -> None:
    plain = planned(project)
    assert planned(project, given={"num_seeds": "3"}).digest == plain.digest
    assert planned(project, seed=0).digest == plain.digest
    others = [
        planned(project, given={"num_seeds": "4"}),
        planned(project, seed=1),
        planned(project, device="cpu"),
        planned(project, preset="smoke"),
    ]
    assert len({plain.digest, *(job.digest for job in others)}) == 5


def test_typed_values_are_taken_as_they_are(project: Path) -> None:
    job = planned(project, preset="full", given={"fast": "false"}, seed=3, device="cpu")
    again = planned(project, preset="full", typed=job.parameters)
    assert (again.digest, again.parameters) == (job.digest, job.parameters)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("smoke: {num_seeds: 1}", "smoke: {seeds: 1}", "has no parameter 'seeds': did you mean"),
        (
            "smoke: {num_seeds: 1}",
            "smoke: {num_seeds: 1.5}",
            "'num_seeds' must be of type int, got 1.5",
        ),
        ("smoke: {num_seeds: 1}", "smoke: {rates: 0.1}", "'rates' must be of type list of float"),
    ],
)
def test_a_preset_that_does_not_fit_the_notebook(
    project: Path, old: str, new: str, says: str
) -> None:
    path = project / "notebooks/noisy-labels/alpha.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError) as error:
        planned(project, preset="smoke")
    assert str(error.value).startswith(f"{path}: presets.smoke")
    assert says in str(error.value)
    assert planned(project).preset == "quick", "other presets still run"


# What is kept.


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose papers each fail in their own way, beside good ones."""
    root = sandbox.make_project(tmp_path_factory.mktemp("runs") / "project", "alpha")
    more = sandbox.PARAMETERS + 'name = "x"\nother = "y"\n'
    extras = {
        "talks": "print(repr(name))\nprint(repr(other))",
        "boom": "raise ValueError('no luck\\nsecond line')",
        "sleeper": "time.sleep(600)",
        "dies": "import os\nos._exit(1)",
        "empty": "from wellposed.data import DataError\nraise DataError('no data: fetch it\\nx')",
        "pid": "import os, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))",
        "mute": "Report.show = lambda self: None",
    }
    for slug, extra in extras.items():
        sandbox.write_paper(root, slug, extra=extra, parameters=more)
    return root


@pytest.fixture(scope="module")
def undisturbed(shared: Path) -> RunRecord:
    """The record of a run that nothing happened to."""
    return sandbox.undisturbed(shared, "pid")


@pytest.fixture
def here(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("WELLPOSED_ROOT", raising=False)
    monkeypatch.chdir(shared)
    return shared


def test_values_arrive_as_they_were_given(
    here: Path, wellposed: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that looks like code arrives as text; the record tells all about the run."""
    result = wellposed(
        *("run", "talks", "-p", f"name={HOSTILE}", "-p", f"other={INJECTION}"),
        *("--seed", "5", "--device", "cpu"),
    )
    assert result.code == 0, result.err
    assert result.err == ""
    assert "talks: running, 6 cells" in result.out
    assert "talks: cell 6 of 6" in result.out
    assert "1 run now, 0 up to date. Claims: 1 reproduced." in result.out
    (path,) = here.glob("runs/quick/talks/*/record.json")
    record = read_record(path)
    assert record is not None
    assert texts(path.with_name("notebook.ipynb")).splitlines() == [
        repr(HOSTILE),
        repr(INJECTION),
        "sum-grows: reproduced",
    ]
    assert not list(here.rglob("victim"))
    assert record.parameters == {
        "preset": "quick",
        "device": "cpu",
        "seed": 5,
        "name": HOSTILE,
        "other": INJECTION,
    }
    assert (record.slug, record.preset, record.seed, record.device) == ("talks", "quick", 5, "cpu")
    assert record.digest == path.parent.name
    assert record.seconds > 0
    assert record.versions.keys() == {"python", "torch", "numpy", "scipy", "wellposed"}
    assert [claim.id for claim in record.claims] == ["sum-grows"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["notebook.ipynb", "record.json"]
    # The same once more is read from disk; only --force would run it.
    monkeypatch.setattr(runs, "execute", lambda *_, **__: pytest.fail("it ran again"))
    again = wellposed(
        *("run", "talks", "-p", f"other={INJECTION}", "-p", f"name={HOSTILE}"),
        *("--seed", "5", "--device", "cpu"),
    )
    assert again.code == 0
    assert "0 run now, 1 up to date. Claims: 1 reproduced." in again.out


def test_force_runs_again(
    here: Path, wellposed: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = planned(here)
    job.folder.mkdir(parents=True)
    started = []
    monkeypatch.setattr(runs, "execute", lambda job, **_: started.append(job.paper.slug))
    job.record_path.write_text("{}")
    wellposed("run", "alpha", "--force")
    assert started == ["alpha"]
    assert not job.record_path.exists(), "an old record must not stand for the forced run"


def test_a_record_of_other_content_is_not_this_run(here: Path, undisturbed: RunRecord) -> None:
    """Fails if the folder's name alone is trusted."""
    job = planned(here, "pid")
    job.folder.mkdir(parents=True, exist_ok=True)
    fitting = undisturbed.model_copy(update={"digest": job.digest})
    job.record_path.write_text(fitting.model_dump_json())
    assert job.finished() == fitting
    job.record_path.write_text(
        undisturbed.model_copy(update={"digest": "0" * 16}).model_dump_json()
    )
    assert job.finished() is None
    shutil.rmtree(job.folder)


# What goes wrong.


def test_a_failing_cell_is_named_and_the_notebook_kept(
    here: Path, wellposed: Callable[..., Result]
) -> None:
    result = wellposed("run", "boom")
    job = planned(here, "boom")
    failed = job.folder / "failed.ipynb"
    assert result.code == 1
    assert result.err == f"wellposed: boom: cell 5 failed: ValueError: no luck; see {failed}\n"
    assert "no luck" in failed.read_text()
    assert [path.name for path in job.folder.iterdir()] == ["failed.ipynb"]
    # Mended, it runs, and the traces of the failure go.
    path = here / "notebooks/noisy-labels/boom.ipynb"
    path.write_text(path.read_text().replace("raise ValueError", "str"))
    assert wellposed("run", "boom").code == 0


def test_a_cell_that_takes_too_long(here: Path, wellposed: Callable[..., Result]) -> None:
    result = wellposed("run", "sleeper", "--timeout", "1")
    assert result.code == 1
    assert result.err == "wellposed: sleeper: a cell took longer than 1 s and was stopped\n"
    assert not list(planned(here, "sleeper").folder.iterdir())


def test_a_kernel_that_dies(here: Path, wellposed: Callable[..., Result]) -> None:
    result = wellposed("run", "dies")
    assert result.code == 1
    assert result.err == "wellposed: dies: its kernel died (out of memory, perhaps)\n"
    assert not list(planned(here, "dies").folder.iterdir())


def test_missing_data_is_the_users_to_mend(here: Path, refused: Callable[..., str]) -> None:
    assert refused("run", "empty") == "empty: no data: fetch it"
    assert planned(here, "empty").finished() is None


def test_a_notebook_without_claims(here: Path, wellposed: Callable[..., Result]) -> None:
    result = wellposed("run", "mute")
    assert result.code == 1
    assert result.err == (
        "wellposed: mute: the notebook shows no claims (report.show() is missing)\n"
    )
    assert planned(here, "mute").finished() is None


def test_a_kernel_that_does_not_start(
    here: Path, wellposed: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    import papermill

    def late(*_: Any, **__: Any) -> None:
        raise RuntimeError("Kernel didn't respond in 180 seconds")

    monkeypatch.setattr(papermill, "execute_notebook", late)
    result = wellposed("run", "alpha")
    assert result.code == 1
    assert result.err == (
        "wellposed: alpha: its kernel did not start (Kernel didn't respond in 180 seconds)\n"
    )


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU here")
def test_a_gpu_that_is_not_there(here: Path, refused: Callable[..., str]) -> None:
    assert refused("run", "alpha", "--device", "cuda") == (
        "--device cuda: torch finds no usable GPU here; use --device cpu or auto"
    )


# Kills and races, with the real command.


def started(root: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command, once it says that the notebook runs."""
    process = sandbox.start(root, "run", *arguments, *PAUSE)
    assert process.stdout is not None
    assert "running" in process.stdout.readline()
    return process


def leftovers(root: Path) -> list[str]:
    """Files of runs that are no run: partial notebooks, temporary records."""
    return [p.name for p in root.rglob(".*") if p.is_file() and ".snakemake" not in p.parts]


def claims(record: RunRecord | None) -> Any:
    assert record is not None
    return record.claims


@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_run_is_no_run_and_the_next_one_finishes(
    here: Path, undisturbed: RunRecord, seed: int
) -> None:
    """SIGKILL at a random moment. Fails if the record is written before the notebook is whole.

    The cells wait for three seconds, so the moment comes long before the end; should a crowded
    machine oversleep it, the finished run must be whole.
    """
    out = here / f"killed-{seed}"
    pid = here / "notebooks/noisy-labels/pid"
    pid.unlink(missing_ok=True)
    process = started(here, "pid", "--out", str(out))
    time.sleep(random.Random(seed).uniform(0.0, 2.0))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    job = planned(here, "pid", given={"pause": "1"}, out=out)
    before = job.finished()
    assert job.record_path.exists() == (before is not None), "half a record"
    if pid.exists():
        sandbox.until(lambda: gone(int(pid.read_text())), "the end of the orphaned kernel")
    done = sandbox.command(here, "run", "pid", *PAUSE, "--out", str(out))
    assert done.code == 0, done.err
    assert ("0 run now, 1" if before else "1 run now, 0") + " up to date" in done.out
    assert claims(job.finished()) == undisturbed.claims


def test_two_runs_of_one_paper_at_once(here: Path, undisturbed: RunRecord) -> None:
    out = here / "twice"
    both = [sandbox.start(here, "run", "pid", "--out", str(out)) for _ in range(2)]
    for process in both:
        _, err = process.communicate()
        assert process.returncode == 0, err
        assert err == ""
    job = planned(here, "pid", out=out)
    assert claims(job.finished()) == undisturbed.claims
    assert sorted(p.name for p in job.folder.iterdir()) == ["notebook.ipynb", "record.json"]
    json.loads((job.folder / "notebook.ipynb").read_text())


def test_ctrl_c_is_one_line(here: Path) -> None:
    """Fails if the exit code is 130 and nothing is said, as typer would have it."""
    out = here / "interrupted"
    process = started(here, "pid", "--out", str(out))
    time.sleep(random.Random(3).uniform(0.0, 1.5))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 2
    assert err == (
        "wellposed: interrupted: finished runs are kept, run the same command again to go on\n"
    )
    assert planned(here, "pid", given={"pause": "1"}, out=out).finished() is None
    assert leftovers(out) == []


def test_an_interruption_that_a_library_swallows_is_heeded(here: Path) -> None:
    """Fails if a run does not ask between cells: the last one drops Ctrl-C, and it is no run."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    reached = []

    def deaf(done: int, total: int) -> None:
        reached.append(done)
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    job = planned(here, out=here / "swallowed")
    interrupt.listen()
    try:
        with pytest.raises(KeyboardInterrupt):
            runs.execute(job, on_cell=deaf)
    finally:
        interrupt.listen()  # forgets
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)
    assert reached == [1]
    assert job.finished() is None
    assert leftovers(here / "swallowed") == []


# The pieces of a record.


def test_seconds_are_those_of_the_cells() -> None:
    cells = [
        {"metadata": {"papermill": {"duration": 1.5}}},
        {"metadata": {"papermill": {"duration": None}}},
        {"metadata": {}},
        {"metadata": {"papermill": {"duration": 0.25}}},
    ]
    assert cell_seconds({"cells": cells}) == 1.75


def test_place_and_versions(tmp_path: Path) -> None:
    assert hardware("cpu").endswith(f", {os.cpu_count()} cores")
    assert hardware("cuda:0")
    assert versions()["wellposed"] == "0.1.0"
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
    found = commit(tmp_path)
    assert found is not None
    assert len(found) == 12
