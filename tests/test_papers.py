"""Every paper keeps the book's anatomy, and a changed verdict does not pass unseen."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from wellposed.book.card import read_card
from wellposed.book.check import check_paper
from wellposed.book.claims import VERDICTS
from wellposed.book.notebook import read_notebook
from wellposed.book.project import find_papers
from wellposed.book.record import MIME, claims_in, read_record
from wellposed.book.refresh import METADATA, normalized, notebook_text, redrawn

ROOT = Path(__file__).resolve().parents[1]
PAPERS = find_papers(ROOT)


@pytest.mark.parametrize("slug", PAPERS)
def test_anatomy(slug: str) -> None:
    assert check_paper(PAPERS[slug]) == []


@pytest.mark.parametrize("slug", PAPERS)
def test_the_notebook_is_in_its_committed_form(slug: str) -> None:
    """No times, no papermill metadata, stable ids: what `wellposed refresh` writes."""
    path = PAPERS[slug].notebook_path
    assert notebook_text(normalized(read_notebook(path))) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("slug", PAPERS)
def test_the_record_belongs_to_the_notebook(slug: str) -> None:
    record = read_record(PAPERS[slug].record_path("quick"))
    claims = claims_in(read_notebook(PAPERS[slug].notebook_path))
    assert record is not None, "results/quick has no record: use `wellposed refresh`"
    assert claims is not None
    verdicts = {claim.id: claim.verdict for claim in claims.claims}
    assert {claim.id: claim.verdict for claim in record.claims} == verdicts


@pytest.mark.parametrize("slug", PAPERS)
def test_the_claims_table_says_what_the_card_says(slug: str) -> None:
    """Fails if a refresh keeps an old table because no number changed."""
    notebook = normalized(read_notebook(PAPERS[slug].notebook_path))
    assert redrawn(notebook, read_card(PAPERS[slug].card_path)) == notebook


def test_prerequisites_and_references_are_sound() -> None:
    cards = {slug: read_card(paper.card_path) for slug, paper in PAPERS.items()}
    catalog = yaml.safe_load((ROOT / "book" / "catalog.yaml").read_text())
    planned = {paper["slug"] for chapter in catalog for paper in chapter["papers"]}
    keys = [re.match(r"\s*@\w+\{([^,\s]+)", card.bibtex)[1] for card in cards.values()]
    assert len(set(keys)) == len(keys), "two cards share a BibTeX key"
    wanted = {slug for card in cards.values() for slug in card.prerequisites}
    assert wanted <= planned | set(cards)
    toc = (ROOT / "_toc.yml").read_text()
    missing = {p.chapter for p in PAPERS.values() if f"glob: notebooks/{p.chapter}/*" not in toc}
    assert missing == set()


def flipped_copies(slug: str) -> list[dict[str, Any]]:
    """Code cells that show a paper's committed verdicts again, one verdict changed in each."""
    notebook = read_notebook(PAPERS[slug].notebook_path)
    record = claims_in(notebook)
    assert record is not None
    checked = next(c for c in notebook["cells"] if c["source"].startswith("# NBVAL_CHECK_OUTPUT"))
    head = f'report = Report("{slug}", preset="quick", seed={record.seed}, device="cpu")\n'
    load = (
        f"claims = json.loads({json.dumps(json.dumps([c.model_dump() for c in record.claims]))})\n"
    )
    fill = "report._claims = {c['id']: ClaimRecord.model_validate(c) for c in claims}"
    restore = {
        "cell_type": "code",
        "source": head + load + fill,
        "metadata": {},
        "outputs": [],
        "execution_count": 1,
    }
    cells = [restore, checked]
    text = checked["outputs"][0]["text"]
    lines = "".join(text).splitlines()
    for index, claim in enumerate(record.claims):
        for verdict in VERDICTS:
            if verdict == claim.verdict:
                continue
            changed = [*lines]
            changed[index] = f"{claim.id}: {verdict}"
            assert claim.timed == lines[index].endswith(": judged by the clock")
            cell = copy.deepcopy(checked)
            cell["outputs"][0]["text"] = "\n".join(changed) + "\n"
            cells.append(cell)
    return cells


def test_nbval_catches_every_flipped_verdict(tmp_path: Path) -> None:
    """The committed verdict cell passes; with any one verdict changed to any other it fails."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    imports = "import json\nfrom wellposed.book import Report\n"
    imports += "from wellposed.book.record import ClaimRecord"
    cells = [{"cell_type": "code", "source": imports, "metadata": {}, "outputs": []}]
    expected = ["passed"]
    for slug in PAPERS:
        copies = flipped_copies(slug)
        expected += ["passed", "passed"] + ["failed"] * (len(copies) - 2)
        cells += copies
    for index, cell in enumerate(cells):
        cell |= {"id": f"cell-{index}", "execution_count": index + 1}
    path = folder / "flipped.ipynb"
    nbformat.write(
        nbformat.from_dict(
            {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
        ),
        path,
    )
    # A session of its own, that knows neither this project's settings nor its conftest.
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-rA"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-c", "/dev/null"]
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "WELLPOSED_ROOT": str(ROOT)},
    )
    lines = re.findall(r"^(PASSED|FAILED) .*::Cell (\d+)", done.stdout, re.MULTILINE)
    outcome = {int(number): word.lower() for word, number in lines}
    assert [outcome.get(index) for index in range(len(cells))] == expected, done.stdout[-2000:]


def test_there_is_a_record_in_every_notebook_and_no_other_mime() -> None:
    for paper in PAPERS.values():
        kinds = {
            kind
            for cell in read_notebook(paper.notebook_path)["cells"]
            for output in cell.get("outputs", [])
            for kind in output.get("data", {})
            if kind.startswith("application/vnd.wellposed")
        }
        assert kinds == {MIME}
