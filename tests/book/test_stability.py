"""Verdicts at other root seeds: which seeds, what is kept, and when it no longer speaks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sandbox import Result
from wellposed.book.errors import RunError, UserError
from wellposed.book.ledger import rows, stable_share
from wellposed.book.project import Paper, find_paper
from wellposed.book.record import read_record, write_json
from wellposed.book.runs import Job, plan
from wellposed.book.stability import Stability, measure, read_stability, share


@pytest.fixture
def paper(project: Path, wellposed: Callable[..., Result]) -> Paper:
    """A paper whose claim, that seed + 1 is positive, holds at every seed."""
    assert wellposed("refresh", "alpha").code == 0
    return find_paper("alpha", project)


def runner(verdicts: Sequence[str], asked: list[Job]) -> Callable[[Sequence[Job]], dict[str, str]]:
    """Finishes jobs without running them, with the verdicts given, one a seed."""
    left = iter(verdicts)

    def run(jobs: Sequence[Job]) -> dict[str, str]:
        for job in jobs:
            asked.append(job)
            record = read_record(job.paper.record_path("quick"))
            assert record is not None
            claims = [record.claims[0].model_copy(update={"verdict": next(left)})]
            fresh = {"seed": job.parameters["seed"], "digest": job.digest, "claims": claims}
            write_json(job.record_path, record.model_copy(update=fresh).model_dump(mode="json"))
        return {}

    return run


def test_the_next_seeds_are_run_and_kept(paper: Paper) -> None:
    """Fails if a seed is chosen in any other way, or its own seed counted (tried)."""
    asked: list[Job] = []
    found = measure([paper], runner(["reproduced", "partly", "reproduced"], asked))
    assert [job.parameters["seed"] for job in asked] == [1, 2, 3]
    assert all(job.preset == "quick" for job in asked)
    assert found == [read_stability(paper)]
    assert (found[0].same("sum-grows"), share(found)) == (2, (2, 3))
    (row,) = rows([paper])
    assert (row.same_verdict, row.other_seeds) == (2, 3)
    assert stable_share([row]) == (2, 3)


def test_what_is_finished_is_not_run_again(paper: Paper) -> None:
    asked: list[Job] = []
    measure([paper], runner(["reproduced"] * 3, asked))
    measure([paper], runner([], asked))
    assert len(asked) == 3


def test_a_verdict_that_changed_silences_it(paper: Paper) -> None:
    measure([paper], runner(["reproduced"] * 3, []))
    path = paper.record_path("quick")
    record = read_record(path)
    assert record is not None
    other = [record.claims[0].model_copy(update={"verdict": "partly"})]
    write_json(path, record.model_copy(update={"claims": other}).model_dump(mode="json"))
    assert read_stability(paper) is None
    assert rows([paper])[0].other_seeds is None


def test_a_failed_run_is_named_and_nothing_is_written(paper: Paper) -> None:
    with pytest.raises(RunError, match="alpha at seed 1: no luck"):
        measure([paper], lambda jobs: {"alpha": "no luck"})
    assert not paper.record_path("stability").exists()


def test_a_paper_without_a_result(project: Path) -> None:
    with pytest.raises(UserError, match="alpha: has no committed result"):
        measure([find_paper("alpha", project)], lambda jobs: {})


@pytest.mark.parametrize("text", ["", "{", '{"slug": "alpha"}', "[1]"])
def test_a_damaged_file_is_named(paper: Paper, text: str) -> None:
    path = paper.record_path("stability")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(UserError, match="not a stability record"):
        read_stability(paper)


def test_a_share_counts_claims_and_seeds() -> None:
    one: Any = {"a": "reproduced", "b": "partly"}
    other: Any = {"a": "reproduced", "b": "reproduced"}
    found = Stability(slug="x", digest="0", seed=0, verdicts=one, others={1: one, 2: other})
    assert share([found]) == (3, 4)


def test_the_command(paper: Paper, wellposed: Callable[..., Result]) -> None:
    """The real runs of a tiny paper: its claim holds at every seed."""
    result = wellposed("stability", "alpha", "--seeds", "2")
    assert result.code == 0, result.err
    assert result.out.endswith("2 of 2 verdicts (100%) are the same at 2 other seeds\n")
    assert plan(paper, seed=2, device="cpu").finished() is not None


def test_pilots_decide_nothing(paper: Paper, wellposed: Callable[..., Result]) -> None:
    """All claims at each pilot seed; fails if a record is kept in results/."""
    result = wellposed("pilot", "alpha", "--seeds", "2")
    assert result.code == 0, result.err
    assert "seed 1000" in result.out
    assert "seed 1001" in result.out
    assert not paper.record_path("stability").exists()
    assert plan(paper, seed=1001, device="cpu").finished() is not None


def test_a_pilot_has_no_seed_that_may_decide(
    paper: Paper, wellposed: Callable[..., Result]
) -> None:
    result = wellposed("pilot", "alpha", "--first", "3")
    assert result.code == 2
    assert "root seeds from 1000 on" in result.err
