"""Many papers at once, through Snakemake: side by side, resumable, on one machine or a cluster.

Which runs are missing is settled before Snakemake starts, from the digests; each run's record is
a file that appears only when the run is whole. So there is nothing to clean up after a kill.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from wellposed.book.errors import RunError, UserError
from wellposed.book.project import Paper, nearest
from wellposed.book.record import sweep, write_json
from wellposed.book.runs import Job, execute, plan

POLL_SECONDS = 0.3
LOCAL = "local"
"""The profile that runs papers on this machine."""


def run_batch(
    jobs: Sequence[Job],
    *,
    root: Path,
    out: Path,
    cores: int,
    gpus: int,
    timeout: int | None,
    on_change: Callable[[dict[str, tuple[int, int]]], None],
    profile: Path | None = None,
) -> dict[str, str]:
    """Run jobs through Snakemake and wait for them.

    Args:
        jobs: what to run; finished ones are left out.
        root: the project's root.
        out: folder of all runs.
        cores: how many papers may run at once, here or on the cluster.
        gpus: how many of them may use a GPU at once.
        timeout: seconds that one cell may take; no limit if None.
        on_change: told every moment how far each started run is: (cells done, cells in all).
        profile: folder of the Snakemake profile that says where the papers run; this machine if
            None.

    Returns:
        For each run that failed, its slug and the reason.

    Raises:
        UserError: the folder cannot be written to.
    """
    waiting = [job for job in jobs if job.finished() is None]
    if not waiting:
        return {}
    sweep(out, ".plan-*")
    plan_path = out / f".plan-{os.getpid()}.json"
    write_json(plan_path, [_describe(job, out, timeout) for job in waiting])
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(root / "workflow" / "Snakefile")),
        *("--profile", str(profile or profile_folder(root, LOCAL))),
        # A cluster counts jobs, this machine counts cores: a paper is one of either.
        *("--directory", str(out), "--cores", str(cores), "--jobs", str(cores)),
        *("--resources", f"gpu={gpus}"),
        *("--config", f"plan={plan_path.name}"),
    ]
    log = out / ".snakemake.log"
    for job in waiting:
        with suppress(OSError):
            _progress_path(job).unlink()
    try:
        with log.open("w") as log_file:
            process = subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    time.sleep(POLL_SECONDS)
                    on_change(_progress(waiting))
            except KeyboardInterrupt:
                # A terminal tells Snakemake as well, `kill -INT` does not. Where it does not hear
                # the signal, what it still starts finds no plan and ends at once.
                plan_path.unlink(missing_ok=True)
                process.send_signal(signal.SIGINT)
                process.wait()
                raise
    finally:
        plan_path.unlink(missing_ok=True)
    on_change(_progress(waiting))
    return {job.paper.slug: _reason(job, log) for job in waiting if job.finished() is None}


def profile_folder(root: Path, name: str) -> Path:
    """The Snakemake profile that a word on the command line means.

    Args:
        root: the project's root.
        name: one of the profiles in ``workflow/profiles``, or the path of a folder with a profile.

    Returns:
        The folder that holds the profile's ``config.yaml``.

    Raises:
        UserError: there is no such profile.
    """
    home = root / "workflow" / "profiles"
    for folder in (home / name, Path(name).expanduser()):
        if (folder / "config.yaml").is_file():
            return folder.absolute()
    known = sorted(path.parent.name for path in home.glob("*/config.yaml"))
    raise UserError(
        f"no profile {name!r}{nearest(name, known)} (profiles: {', '.join(known)}, or a folder "
        "that holds a Snakemake config.yaml)"
    )


def _describe(job: Job, out: Path, timeout: int | None) -> dict[str, object]:
    return {
        "slug": job.paper.slug,
        "chapter": job.paper.chapter,
        "root": str(job.paper.root),
        "preset": job.preset,
        "parameters": job.parameters,
        "digest": job.digest,
        "record": str(job.record_path.relative_to(out)),
        "out": str(out),
        "timeout": timeout,
        "gpu": int(job.preset == "full" and job.parameters["device"] != "cpu"),
    }


def _progress_path(job: Job) -> Path:
    return job.folder / "progress"


def _progress(jobs: Sequence[Job]) -> dict[str, tuple[int, int]]:
    found = {}
    for job in jobs:
        with suppress(OSError, ValueError):
            done, total = _progress_path(job).read_text().split()
            found[job.paper.slug] = (int(done), int(total))
    return found


def _reason(job: Job, log: Path) -> str:
    for path in (job.folder / "run.log", log):
        with suppress(OSError):
            lines = [line for line in path.read_text().splitlines() if line.strip()]
            if lines:
                return lines[-1]
    return "it was never started"


def work(plan_path: Path, digest: str) -> None:
    """Execute one job of a plan; this is what Snakemake starts for every paper.

    Args:
        plan_path: the plan written by :func:`run_batch`.
        digest: which of its jobs.

    Raises:
        UserError: the paper changed since the plan was made, or the batch was stopped.
        RunError: the notebook did not run to its end.
    """
    try:
        entries = json.loads(plan_path.read_text())
    except FileNotFoundError:
        raise UserError("the batch that this run belongs to was stopped") from None
    entry = next(entry for entry in entries if entry["digest"] == digest)
    paper = Paper(entry["slug"], entry["chapter"], Path(entry["root"]))
    job = plan(
        paper,
        preset=entry["preset"],
        typed=entry["parameters"],
        out=Path(entry["out"]),
    )
    if job.digest != digest:
        raise UserError(f"{paper.slug}: changed since this run was planned; run again")
    progress = _progress_path(job)

    def on_cell(done: int, total: int) -> None:
        progress.write_text(f"{done} {total}")

    execute(job, on_cell=on_cell, timeout=entry["timeout"])


if __name__ == "__main__":
    try:
        work(Path(sys.argv[1]), sys.argv[2])
    except (UserError, RunError) as problem:
        sys.exit(str(problem))
