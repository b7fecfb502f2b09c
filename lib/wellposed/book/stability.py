"""Do the verdicts depend on the seeds? Each paper once more, at other root seeds.

The seeds are the next ones after the paper's own, so there is nothing to choose. The verdicts are
kept in results/stability/<slug>.json and drawn in the ledger.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from wellposed.book.claims import Verdict
from wellposed.book.errors import RunError, UserError
from wellposed.book.project import Paper
from wellposed.book.record import RunRecord, read_record, write_json
from wellposed.book.runs import Job, plan

NUM_SEEDS = 3

FIRST_PILOT = 1000
"""Root seeds from here on are for pilots: no committed verdict comes from them."""

Verdicts = dict[str, Verdict]


class Stability(BaseModel):
    """The verdicts of one paper at its own root seed and at others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    slug: str
    digest: str
    seed: int
    verdicts: Verdicts
    others: dict[int, Verdicts]

    def same(self, claim: str) -> int:
        """At how many of the other seeds a claim's verdict is the same."""
        return sum(other.get(claim) == self.verdicts[claim] for other in self.others.values())


def committed(paper: Paper) -> RunRecord:
    """The committed record of the quick run.

    Raises:
        UserError: there is none.
    """
    record = read_record(paper.record_path("quick"))
    if record is None:
        raise UserError(
            f"{paper.slug}: has no committed result: `wellposed refresh {paper.slug}` makes one"
        )
    return record


def read_stability(paper: Paper) -> Stability | None:
    """What is known of a paper's verdicts at other seeds, if it still speaks of today's verdicts.

    Raises:
        UserError: the file is damaged.
    """
    path = paper.record_path("stability")
    try:
        found = Stability.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path}: not a stability record ({first}); delete it") from None
    record = read_record(paper.record_path("quick"))
    if record is None or found.seed != record.seed or found.verdicts != verdicts(record):
        return None
    return found


def verdicts(record: RunRecord) -> Verdicts:
    """The verdict of each claim."""
    return {claim.id: claim.verdict for claim in record.claims}


def measure(
    papers: Sequence[Paper],
    run: Callable[[Sequence[Job]], Mapping[str, str]],
    *,
    num_seeds: int = NUM_SEEDS,
) -> list[Stability]:
    """Run papers at the next root seeds and keep the verdicts.

    Args:
        papers: which ones; each has a committed result.
        run: runs jobs, at most one of a paper, that are not finished; returns why any failed.
        num_seeds: how many other root seeds, at least 1.

    Returns:
        What was found, one a paper; it is written to results/stability/ too.

    Raises:
        UserError: a paper has no committed result.
        RunError: a run failed; nothing is written for any paper, finished runs are kept.
    """
    own = {paper.slug: committed(paper) for paper in papers}
    others: dict[str, dict[int, Verdicts]] = {slug: {} for slug in own}
    for step in range(1, num_seeds + 1):
        seeds = {slug: record.seed + step for slug, record in own.items()}
        jobs = [plan(paper, seed=seeds[paper.slug], device="cpu") for paper in papers]
        failed = run([job for job in jobs if job.finished() is None])
        for slug, reason in failed.items():
            raise RunError(f"{slug} at seed {seeds[slug]}: {reason}")
        for job in jobs:
            record = job.finished()
            assert record is not None
            others[job.paper.slug][seeds[job.paper.slug]] = verdicts(record)
    found = []
    for paper in papers:
        record = own[paper.slug]
        stability = Stability(
            slug=paper.slug,
            digest=record.digest,
            seed=record.seed,
            verdicts=verdicts(record),
            others=others[paper.slug],
        )
        write_json(paper.record_path("stability"), stability.model_dump(mode="json"))
        found.append(stability)
    return found


def pilot(
    paper: Paper,
    run: Callable[[Sequence[Job]], Mapping[str, str]],
    *,
    num_seeds: int = NUM_SEEDS,
    first: int = FIRST_PILOT,
) -> dict[int, RunRecord]:
    """Run a paper at root seeds that decide nothing, to fix its design before its own is looked at.

    Args:
        paper: which one; it needs no committed result.
        run: runs jobs that are not finished; returns why any failed.
        num_seeds: how many root seeds, at least 1.
        first: the first of them, at least `FIRST_PILOT`.

    Returns:
        The records by root seed; nothing is kept in results/.

    Raises:
        UserError: `first` is a seed that may decide.
        RunError: a run failed.
    """
    if first < FIRST_PILOT:
        raise UserError(f"--first {first}: pilots have root seeds from {FIRST_PILOT} on")
    found = {}
    for seed in range(first, first + num_seeds):
        job = plan(paper, seed=seed, device="cpu")
        failed = run([job]) if job.finished() is None else {}
        for slug, reason in failed.items():
            raise RunError(f"{slug} at seed {seed}: {reason}")
        record = job.finished()
        assert record is not None
        found[seed] = record
    return found


def share(found: Sequence[Stability]) -> tuple[int, int]:
    """How many verdicts at other seeds are the same, of how many."""
    same = sum(stability.same(claim) for stability in found for claim in stability.verdicts)
    return same, sum(len(s.verdicts) * len(s.others) for s in found)
