"""Many papers at once: only what is stale runs, and a kill at any moment costs nothing but time."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox import Result
from wellposed.book import batch
from wellposed.book.errors import UserError
from wellposed.book.project import find_paper, find_papers
from wellposed.book.record import RunRecord, read_record, write_json
from wellposed.book.runs import Job, plan

BATCH = ("run", "all", "--jobs", "2", "-p", "pause=0.3")
SLUGS = ("alpha", "beta", "gamma")


def jobs(root: Path, **options: Any) -> dict[str, Job]:
    return {slug: plan(paper, **options) for slug, paper in find_papers(root).items()}


def stamps(root: Path) -> dict[str, int]:
    """When each finished run was written."""
    return {str(p): p.stat().st_mtime_ns for p in sorted(root.glob("runs/quick/*/*/record.json"))}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A project, whose path holds spaces and braces, in one batch after the other."""
    root = sandbox.make_project(tmp_path_factory.mktemp("batch") / "my {odd} project", *SLUGS)
    folder = root / "notebooks" / "noisy-labels"
    told: dict[str, Any] = {"root": root}

    process = sandbox.start(root, *BATCH)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(random.Random(7).uniform(0.0, 1.5))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    paths = [job.record_path for job in jobs(root, given={"pause": "0.3"}).values()]
    told["half"] = [p for p in paths if p.exists() and read_record(p) is None]
    told["all finished when killed"] = all(p.exists() for p in paths)

    told["resumed"] = sandbox.command(root, *BATCH)
    told["records"] = {slug: job.finished() for slug, job in planned(root).items()}

    told["stamps"] = stamps(root)
    told["unchanged"] = sandbox.command(root, *BATCH)
    told["stamps when unchanged"] = stamps(root)

    edit(folder / "alpha.ipynb", "import time", "import time  # a comment")
    edit(folder / "beta.yaml", "Adding up numbers", "Adding numbers")
    os.utime(folder / "gamma.ipynb")
    told["touched"] = sandbox.command(root, *BATCH)
    told["stamps when touched"] = stamps(root)

    sandbox.write_paper(root, "boom", extra="raise ValueError('no luck')")
    sandbox.write_paper(root, "delta")
    told["failed"] = sandbox.command(root, *BATCH)
    told["jobs"] = planned(root)
    return told


def planned(root: Path) -> dict[str, Job]:
    return jobs(root, given={"pause": "0.3"})


def test_a_killed_batch_leaves_no_half_record(story: dict[str, Any]) -> None:
    assert story["half"] == []
    assert not story["all finished when killed"], "the kill came too late to show anything"


def test_the_next_batch_finishes(story: dict[str, Any]) -> None:
    resumed: Result = story["resumed"]
    assert (resumed.code, resumed.err) == (0, "")
    assert "Claims: 3 reproduced." in resumed.out
    for slug, record in story["records"].items():
        assert isinstance(record, RunRecord), slug
        assert record.slug == slug
        assert [(c.id, c.value, c.verdict) for c in record.claims] == [
            ("sum-grows", 1.0, "reproduced")
        ]


def test_progress_is_told_without_a_terminal(story: dict[str, Any]) -> None:
    lines = story["touched"].out.splitlines()
    for slug in ("alpha", "beta"):
        assert f"{slug}: running, 6 cells" in lines
        assert f"{slug}: cell 6 of 6" in lines


def test_nothing_runs_when_nothing_changed(story: dict[str, Any]) -> None:
    unchanged: Result = story["unchanged"]
    assert (unchanged.code, unchanged.err) == (0, "")
    assert "0 run now, 3 up to date. Claims: 3 reproduced." in unchanged.out
    assert story["stamps when unchanged"] == story["stamps"]


def test_only_changed_papers_run_again(story: dict[str, Any]) -> None:
    """A notebook, a card; a new date alone does not count. Fails if runs go by dates."""
    touched: Result = story["touched"]
    assert (touched.code, touched.err) == (0, "")
    assert "2 run now, 1 up to date. Claims: 3 reproduced." in touched.out
    before, after = story["stamps"], story["stamps when touched"]
    assert before.items() <= after.items(), "runs of other content were rewritten"
    new = {Path(path).parents[1].name for path in after.keys() - before.keys()}
    assert new == {"alpha", "beta"}


def test_one_failure_does_not_stop_the_others(story: dict[str, Any]) -> None:
    failed: Result = story["failed"]
    boom: Job = story["jobs"]["boom"]
    path = boom.folder / "failed.ipynb"
    assert failed.code == 1
    assert failed.err == f"wellposed: boom: cell 5 failed: ValueError: no luck; see {path}\n"
    assert "1 run now, 3 up to date. Claims: 4 reproduced." in failed.out
    assert story["jobs"]["delta"].finished() is not None
    assert boom.finished() is None
    assert "no luck" in path.read_text()


def test_nothing_is_left_lying_about(story: dict[str, Any]) -> None:
    """No plan of a batch that ended, no socket or file of a kernel beside the notebooks."""
    root: Path = story["root"]
    plans = list(root.glob("runs/.plan-*"))
    assert len(plans) <= 1, "only the killed batch may leave its plan"
    kinds = {path.suffix for path in (root / "notebooks").rglob("*") if path.is_file()}
    assert kinds == {".yaml", ".ipynb"}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_finished_runs(tmp_path: Path, sent: signal.Signals) -> None:
    """Told to the command alone, as by ``kill``: fails if the batch then runs to its end."""
    root = sandbox.make_project(tmp_path / "project", *SLUGS)
    process = sandbox.start(root, "run", "all", "-p", "pause=1.0")
    sandbox.until(lambda: stamps(root), "the first finished run")
    process.send_signal(sent)
    _, err = process.communicate()
    assert process.returncode == 2
    assert err == (
        "wellposed: interrupted: finished runs are kept, run the same command again to go on\n"
    )
    records = [job.finished() for job in jobs(root, given={"pause": "1.0"}).values()]
    kept = [record for record in records if record]
    assert 1 <= len(kept) < 3
    assert list(root.glob("runs/.plan-*")) == []


# The same without kernels: a stand-in for Snakemake.


class Stand:
    """Snakemake that says what it was asked, and leaves what a test wants left."""

    asked: list[str]
    entries: list[dict[str, Any]]

    def __init__(self, command: list[str], **_: Any) -> None:
        type(self).asked = command
        config = next(word for word in command if word.startswith("plan="))
        self.out = Path(command[command.index("--directory") + 1])
        type(self).entries = json.loads((self.out / config.removeprefix("plan=")).read_text())
        self.polls: Iterator[int | None] = iter([None, 0])

    def poll(self) -> int | None:
        for entry in self.entries:
            folder = (self.out / entry["record"]).parent
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "progress").write_text("4 6")
        if self.entries[0]["slug"] == "alpha":
            log = (self.out / self.entries[0]["record"]).with_name("run.log")
            log.write_text("Traceback\nthe reason\n\n")
        return next(self.polls)


def run(root: Path, some: dict[str, Job], **options: Any) -> tuple[dict[str, str], list[Any]]:
    seen: list[Any] = []
    failed = batch.run_batch(
        list(some.values()),
        root=root,
        out=root / "runs",
        on_change=seen.append,
        **({"cores": 1, "gpus": 1, "timeout": None} | options),
    )
    return failed, seen


def test_what_snakemake_is_asked(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.write_paper(project, "beta")
    monkeypatch.setattr(batch.subprocess, "Popen", Stand)
    full = jobs(project, preset="full", given={"rates": "0.5,1"})
    failed, seen = run(project, full, cores=3, gpus=2, timeout=77)
    command = " ".join(Stand.asked)
    assert "--cores 3 --jobs 3 --resources gpu=2 --config plan=.plan-" in command
    assert f"--profile {project}/workflow/profiles/local " in command
    assert f"--directory {project}/runs " in command
    assert [entry["slug"] for entry in Stand.entries] == ["alpha", "beta"]
    entry = Stand.entries[0]
    assert (entry["timeout"], entry["gpu"], entry["preset"]) == (77, 1, "full")
    assert entry["parameters"]["rates"] == [0.5, 1.0]
    assert project / "runs" / entry["record"] == full["alpha"].record_path
    assert seen[-1] == {"alpha": (4, 6), "beta": (4, 6)}
    assert failed["alpha"] == "the reason"
    assert list((project / "runs").glob(".plan-*")) == []


def test_another_profile_is_handed_on(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch.subprocess, "Popen", Stand)
    slurm = batch.profile_folder(project, "slurm")
    run(project, jobs(project), profile=slurm)
    assert f"--profile {project}/workflow/profiles/slurm " in " ".join(Stand.asked)


def test_profiles_by_name_and_by_folder(project: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.yaml").write_text("executor: slurm\n")
    assert batch.profile_folder(project, str(own)) == own
    assert batch.profile_folder(project, "local").name == "local"
    with pytest.raises(UserError, match="no profile 'slrum': did you mean 'slurm'"):
        batch.profile_folder(project, "slrum")


def test_an_old_plan_is_swept_a_young_one_stays(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed batch leaves its plan; another batch may be at work on a young one."""
    monkeypatch.setattr(batch.subprocess, "Popen", Stand)
    out = project / "runs"
    out.mkdir(exist_ok=True)
    old, young = out / ".plan-1.json", out / ".plan-2.json"
    for path in (old, young):
        path.write_text("[]")
    os.utime(old, (0, 0))
    run(project, jobs(project))
    assert (old.exists(), young.exists()) == (False, True)


def test_a_gpu_is_taken_only_by_full_runs_that_may_use_one(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch.subprocess, "Popen", Stand)
    for options in ({"preset": "full", "device": "cpu"}, {"preset": "quick"}):
        run(project, jobs(project, **options))
        assert [entry["gpu"] for entry in Stand.entries] == [0]


def test_reasons_come_from_the_nearest_log(project: Path, tmp_path: Path) -> None:
    (job,) = jobs(project).values()
    log = tmp_path / "log"
    assert batch._reason(job, log) == "it was never started"
    log.write_text("Error: no cluster\n")
    assert batch._reason(job, log) == "Error: no cluster"
    write_json(job.folder / "progress", [])
    (job.folder / "run.log").write_text("first\nalpha: cell 2 failed\n")
    assert batch._reason(job, log) == "alpha: cell 2 failed"


def test_a_finished_run_is_not_asked_for(
    project: Path, story: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.write_paper(project, "beta")
    both = jobs(project)
    done = both["alpha"]
    record = story["records"]["alpha"].model_copy(update={"digest": done.digest})
    write_json(done.record_path, record.model_dump(mode="json"))
    monkeypatch.setattr(batch.subprocess, "Popen", Stand)
    failed, _ = run(project, both)
    assert [entry["slug"] for entry in Stand.entries] == ["beta"]
    assert list(failed) == ["beta"]
    monkeypatch.setattr(batch.subprocess, "Popen", lambda *_, **__: pytest.fail("it was started"))
    assert run(project, {"alpha": done}) == ({}, [])


def test_a_worker_runs_its_job_of_the_plan(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and folder arrive as planned; a paper that changed meanwhile is refused."""
    paper = find_paper("alpha", project)
    job = plan(paper, preset="full", given={"fast": "false"}, seed=4, out=tmp_path / "out")
    path = tmp_path / "plan.json"
    entry = batch._describe(job, tmp_path / "out", 9)
    write_json(path, [entry | {"digest": "0" * 16}, entry])
    ran: list[Any] = []

    def execute(job: Job, *, on_cell: Any, timeout: int | None) -> None:
        job.folder.mkdir(parents=True)
        on_cell(2, 6)
        ran.append((job, timeout))

    monkeypatch.setattr(batch, "execute", execute)
    batch.work(path, job.digest)
    assert ran == [(job, 9)]
    assert (job.folder / "progress").read_text() == "2 6"
    edit(paper.notebook_path, "import time", "import time  # changed")
    with pytest.raises(UserError, match="alpha: changed since this run was planned; run again"):
        batch.work(path, job.digest)
    path.unlink()
    with pytest.raises(UserError, match="the batch that this run belongs to was stopped"):
        batch.work(path, job.digest)
    assert len(ran) == 1
