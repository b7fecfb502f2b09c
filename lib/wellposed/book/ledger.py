"""Every claim of every paper in the book, with the paper's number, ours and the verdict."""

import csv
import json
from collections import Counter
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from wellposed.book.card import Card, read_card
from wellposed.book.claims import VERDICTS, Verdict
from wellposed.book.errors import UserError
from wellposed.book.notebook import read_notebook
from wellposed.book.project import Paper
from wellposed.book.record import ClaimRecord, RunRecord, claims_in, read_record
from wellposed.book.stability import Stability, read_stability


class Row(BaseModel):
    """One claim in the ledger."""

    model_config = ConfigDict(frozen=True)

    paper: str
    chapter: str
    title: str
    claim: str
    statement: str
    paper_number: str
    paper_source: str
    ours: str
    verdict: Verdict
    value: float
    low: float | None
    high: float | None
    relation: str
    threshold: float
    n: int
    why: str
    preset: str
    seconds: float | None
    device: str
    hardware: str
    other_seeds: int | None
    same_verdict: int | None


def results(paper: Paper) -> list[RunRecord]:
    """The committed results of a paper: the quick run's, then those of bigger presets.

    The claims of the quick run are those in the notebook's outputs; its time and place stand in
    results/quick/.
    """
    found = []
    claims = claims_in(read_notebook(paper.notebook_path))
    quick = read_record(paper.record_path("quick"))
    if claims and quick:
        found.append(quick.model_copy(update={"claims": claims.claims}))
    full = read_record(paper.record_path("full"))
    return [*found, full] if full else found


def rows(papers: Iterable[Paper]) -> list[Row]:
    """The ledger: a row a claim and result, in the order of the papers and their cards."""
    return [
        _row(paper, card, result, claim, stability if result.preset == "quick" else None)
        for paper in papers
        for card in [read_card(paper.card_path)]
        for stability in [read_stability(paper)]
        for result in results(paper)
        for claim in result.claims
    ]


def _row(
    paper: Paper, card: Card, result: RunRecord, claim: ClaimRecord, stability: Stability | None
) -> Row:
    try:
        said = card.claim(claim.id)
    except KeyError:
        raise UserError(
            f"{paper.slug}: its {result.preset} result holds a claim {claim.id!r} that its card "
            f"lacks: `wellposed refresh {paper.slug}` renews it"
        ) from None
    return Row(
        paper=paper.slug,
        chapter=paper.chapter,
        title=card.title,
        claim=claim.id,
        statement=said.statement,
        paper_number=said.paper.number,
        paper_source=said.paper.where,
        ours=claim.ours,
        verdict=claim.verdict,
        value=claim.value,
        low=claim.low,
        high=claim.high,
        relation=claim.relation,
        threshold=claim.threshold,
        n=claim.n,
        why=claim.text,
        preset=result.preset,
        seconds=result.seconds,
        device=result.device,
        hardware=result.hardware,
        other_seeds=len(stability.others) if stability else None,
        same_verdict=stability.same(claim.id) if stability else None,
    )


def stable_share(ledger: Iterable[Row]) -> tuple[int, int]:
    """How many verdicts at other root seeds are the same, of how many that were tried."""
    tried = [row for row in ledger if row.other_seeds]
    return sum(row.same_verdict or 0 for row in tried), sum(row.other_seeds or 0 for row in tried)


def totals(verdicts: Iterable[Verdict]) -> dict[Verdict, int]:
    """How often each verdict occurs, in the fixed order, those that do not occur left out."""
    counts = Counter(verdicts)
    return {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]}


def totals_text(verdicts: Iterable[Verdict]) -> str:
    """The totals in words.

    Example:
        >>> totals_text(["reproduced", "partly", "reproduced"])
        '2 reproduced, 1 partly'
    """
    return ", ".join(f"{count} {verdict}" for verdict, count in totals(verdicts).items())


def as_json(ledger: Iterable[Row]) -> str:
    """The ledger as one JSON document."""
    return json.dumps([row.model_dump() for row in ledger], indent=1, ensure_ascii=False) + "\n"


def as_csv(ledger: Iterable[Row]) -> str:
    """The ledger as one CSV document with a header."""
    buffer = StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(Row.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in ledger)
    return buffer.getvalue()


def export(ledger: list[Row], path: Path) -> str:
    """The ledger in the form that a file name asks for.

    Raises:
        ValueError: the name ends in neither .json nor .csv.
    """
    forms = {".json": as_json, ".csv": as_csv}
    if path.suffix not in forms:
        raise ValueError(f"{path}: the name must end in .json or .csv")
    return forms[path.suffix](ledger)
