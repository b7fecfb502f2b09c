"""Seconds, GPU utilization, and what running the seeds one after another would take.

    .venv/bin/python benchmarks/gpu.py                    # all papers, preset full, on the GPU
    .venv/bin/python benchmarks/gpu.py grokking transport --records results/full

Each paper runs twice: as its preset says, with all seeds side by side where the paper does so, and
with one seed. The naive loop over seeds takes as many times the second as there are seeds. While a
paper runs, `nvidia-smi` is asked once a second how busy the GPU is.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from wellposed.book.errors import RunError, UserError
from wellposed.book.project import find_papers
from wellposed.book.record import RunRecord

WELLPOSED = str(Path(sys.executable).with_name("wellposed"))
QUERY = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-l", "1"]


@contextmanager
def utilization() -> Iterator[list[float]]:
    """Percentages of the first GPU, once a second; none where there is no GPU."""
    seen: list[float] = []
    if shutil.which(QUERY[0]) is None:
        yield seen
        return
    with tempfile.TemporaryFile("w+") as log:
        watcher = subprocess.Popen(QUERY, stdout=log, stderr=subprocess.DEVNULL)
        try:
            yield seen
        finally:
            watcher.terminate()
            watcher.wait()
            log.seek(0)
            seen.extend(float(line) for line in log.read().split() if line.isdigit())


def run(slug: str, *options: str) -> RunRecord:
    """Run one paper afresh in a folder of its own and read its record."""
    with tempfile.TemporaryDirectory() as folder:
        command = [WELLPOSED, "run", slug, "--out", folder, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(done.stderr.strip() or f"{slug} ended with an error")
        (found,) = Path(folder).rglob("record.json")
        return RunRecord.model_validate_json(found.read_text(encoding="utf-8"))


def main(
    targets: Annotated[list[str] | None, typer.Argument(help="Slugs or chapters [all].")] = None,
    preset: Annotated[str, typer.Option(help="smoke, quick or full.")] = "full",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda",
    records: Annotated[Path | None, typer.Option(help="Folder to copy the records to.")] = None,
) -> None:
    """Print a table of all papers."""
    papers = find_papers()
    chosen = [
        slug
        for slug, paper in papers.items()
        if not targets or slug in targets or paper.chapter in targets
    ]
    if not chosen:
        raise UserError(f"no paper or chapter is called {', '.join(targets or [])}")
    options = ("--preset", preset, "--device", device)
    table = Table("paper", "seconds", "GPU busy", "seeds", "one seed, s", "naive loop / ours")
    for slug in chosen:
        with utilization() as busy:
            whole = run(slug, *options)
        single = run(slug, *options, "-p", "num_seeds=1")
        if records:
            records.mkdir(parents=True, exist_ok=True)
            text = whole.model_dump_json(indent=1) + "\n"
            (records / f"{slug}.json").write_text(text, encoding="utf-8")
        seeds = whole.parameters["num_seeds"]
        table.add_row(
            slug,
            f"{whole.seconds:.0f}",
            f"{statistics.mean(busy):.0f} %" if busy else "-",
            f"{seeds}",
            f"{single.seconds:.0f}",
            f"{seeds * single.seconds / whole.seconds:.1f}",
        )
        Console(stderr=True).print(f"{slug}: {whole.seconds:.0f} s")
    Console().print(table)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (RunError, UserError) as error:
        sys.exit(f"gpu.py: {error}")
