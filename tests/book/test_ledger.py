"""The ledger: every claim once a result, as a table, JSON and CSV."""

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import sandbox
from wellposed.book.errors import UserError
from wellposed.book.ledger import as_csv, as_json, export, results, rows, totals, totals_text
from wellposed.book.project import Paper, find_paper, find_papers
from wellposed.book.record import MIME, write_json

CLAIM = {
    "id": "sum-grows",
    "verdict": "reproduced",
    "test": "every seed",
    "value": 1.0,
    "low": None,
    "high": 3.0,
    "relation": ">=",
    "threshold": 0.5,
    "n": 3,
    "ours": 'one, "quoted"',
    "text": "1 to 3",
    "timed": False,
}


def run_record(preset: str, **change: Any) -> dict[str, Any]:
    return {
        **{"slug": "alpha", "preset": preset, "seed": 0, "device": "cpu", "hardware": "a chip"},
        **{"digest": "0" * 16, "parameters": {}, "seconds": 12.5, "versions": {}, "commit": None},
        "claims": [CLAIM | change],
    }


def show_claims(paper: Paper, **change: Any) -> None:
    """Put a claims record into the outputs of a paper's notebook."""
    notebook = json.loads(paper.notebook_path.read_text())
    record = {"slug": paper.slug, "preset": "quick", "seed": 0, "device": "cpu"}
    output = {
        "output_type": "display_data",
        "metadata": {},
        "data": {MIME: record | {"claims": [CLAIM | change]}},
    }
    notebook["cells"][4]["outputs"] = [output]
    paper.notebook_path.write_text(json.dumps(notebook))


@pytest.fixture
def paper(project: Path) -> Paper:
    """A paper with a quick result, and a record of it that is older than its notebook."""
    paper = find_paper("alpha", project)
    show_claims(paper)
    write_json(paper.record_path("quick"), run_record("quick", verdict="partly"))
    return paper


def test_a_row_joins_card_notebook_and_record(paper: Paper) -> None:
    (row,) = rows([paper])
    assert row.model_dump() == {
        "paper": "alpha",
        "chapter": "noisy-labels",
        "title": "A tiny paper",
        "claim": "sum-grows",
        "statement": "The sum grows with every summand.",
        "paper_number": "1.0",
        "paper_source": "Table 1",
        "ours": 'one, "quoted"',
        "verdict": "reproduced",
        "value": 1.0,
        "low": None,
        "high": 3.0,
        "relation": ">=",
        "threshold": 0.5,
        "n": 3,
        "why": "1 to 3",
        "preset": "quick",
        "seconds": 12.5,
        "device": "cpu",
        "hardware": "a chip",
        "other_seeds": None,
        "same_verdict": None,
    }


def test_the_notebook_has_the_last_word_on_verdicts(paper: Paper) -> None:
    """The record says partly, the outputs say reproduced: readers see the outputs."""
    assert [claim.verdict for result in results(paper) for claim in result.claims] == ["reproduced"]


def test_results_at_scale_come_after_the_quick_one(paper: Paper) -> None:
    write_json(paper.record_path("full"), run_record("full", verdict="inconclusive"))
    assert [(row.preset, row.verdict) for row in rows([paper])] == [
        ("quick", "reproduced"),
        ("full", "inconclusive"),
    ]


def test_a_paper_without_results_has_no_rows(project: Path) -> None:
    assert rows([find_paper("alpha", project)]) == []


def test_papers_keep_their_order(paper: Paper) -> None:
    sandbox.write_paper(paper.root, "aardvark")
    other = find_paper("aardvark", paper.root)
    show_claims(other)
    write_json(other.record_path("quick"), run_record("quick"))
    assert [row.paper for row in rows(find_papers(paper.root).values())] == ["aardvark", "alpha"]
    assert [row.paper for row in rows([paper, other])] == ["alpha", "aardvark"]


def test_a_claim_that_the_card_does_not_have_is_one_line(paper: Paper) -> None:
    """Fails with a KeyError: outputs are older than the card."""
    show_claims(paper, id="renamed")
    with pytest.raises(UserError, match=r"alpha.*'renamed'.*refresh"):
        rows([paper])


def test_totals_come_in_the_fixed_order() -> None:
    verdicts = ["not reproduced", "reproduced", "partly", "reproduced", "inconclusive"]
    assert list(totals(verdicts).items()) == [
        ("reproduced", 2),
        ("partly", 1),
        ("not reproduced", 1),
        ("inconclusive", 1),
    ]
    assert totals_text(verdicts) == "2 reproduced, 1 partly, 1 not reproduced, 1 inconclusive"
    assert totals_text([]) == ""


def test_json_and_csv_hold_the_same(paper: Paper) -> None:
    ledger = rows([paper])
    (from_json,) = json.loads(as_json(ledger))
    (from_csv,) = csv.DictReader(StringIO(as_csv(ledger)))
    assert from_json == ledger[0].model_dump()
    assert from_csv == {k: "" if v is None else str(v) for k, v in from_json.items()}
    assert "\r" not in as_csv(ledger)


def test_the_name_of_the_file_decides(paper: Paper) -> None:
    ledger = rows([paper])
    assert export(ledger, Path("a.json")) == as_json(ledger)
    assert export(ledger, Path("a.csv")) == as_csv(ledger)
    with pytest.raises(ValueError, match=r"a.xlsx: the name must end in .json or .csv"):
        export(ledger, Path("a.xlsx"))
