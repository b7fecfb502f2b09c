"""The report that a notebook makes of its claims."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import wellposed.book
from wellposed.book import Report, show_source
from wellposed.book.card import read_card
from wellposed.book.claims import VERDICTS, Evidence, agrees, holds, mean_at_least
from wellposed.book.errors import UserError
from wellposed.book.record import MIME, ClaimsRecord
from wellposed.book.report import BADGES, claims_table, verdict_badge

GOOD = holds(True, "it grows")


def report(preset: str = "quick") -> Report:
    return Report("alpha", preset=preset, seed=3, device="cpu")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was displayed, instead of displaying it."""
    found: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda data, **_: found.append(data))
    return found


def test_the_record_and_the_lines_tell_the_same(
    project: Path, shown: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    made = report()
    made.add("sum-grows", mean_at_least([1.0, 2.0, 3.0], -1 / 3), ours="2.0 <b>", timed=True)
    made.show()
    (data,) = shown
    record = ClaimsRecord.model_validate(json.loads(json.dumps(data[MIME])))
    (claim,) = record.claims
    assert (record.slug, record.preset, record.seed, record.device) == ("alpha", "quick", 3, "cpu")
    assert (claim.id, claim.verdict, claim.ours) == ("sum-grows", "inconclusive", "2.0 <b>")
    assert (claim.n, claim.relation, claim.timed) == (3, ">=", True)
    assert (claim.value, claim.threshold) == (2.0, -0.333333)
    assert claim.low == pytest.approx(-0.484138)
    assert "sum-grows: inconclusive (mean 2 " in data["text/plain"]
    assert "The sum grows with every summand." in data["text/html"]
    assert "2.0 &lt;b&gt;" in data["text/html"]
    assert "<b>" not in data["text/html"]
    capsys.readouterr()
    made.verdicts()
    assert capsys.readouterr().out == "sum-grows: judged by the clock\n"


def test_verdicts_are_printed_unless_the_clock_decides(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a busy machine, which turns a timed verdict, changes the compared lines."""
    held, failed = mean_at_least([1.0, 2.0, 3.0], -9), mean_at_least([1.0, 2.0, 3.0], 99)
    printed = {}
    for timed in (False, True):
        for evidence in (held, failed):
            made = report()
            made.add("sum-grows", evidence, ours="1", timed=timed)
            made.verdicts()
            printed[timed, evidence.verdict] = capsys.readouterr().out
    assert printed[False, "reproduced"] == "sum-grows: reproduced\n"
    assert printed[False, "not reproduced"] == "sum-grows: not reproduced\n"
    assert printed[True, "reproduced"] == printed[True, "not reproduced"]


def test_smoke_withholds_every_verdict(project: Path) -> None:
    """Fails if a run of one seed in the smoke preset claims to have reproduced anything."""
    made = report("smoke")
    made.add("sum-grows", GOOD, ours="1")
    assert [claim.verdict for claim in made.record().claims] == ["not tested"]


def test_an_interval_without_ends_is_none(project: Path) -> None:
    made = report()
    made.add("sum-grows", mean_at_least([1.0], 0), ours="1")
    (claim,) = made.record().claims
    assert (claim.low, claim.high) == (None, None)


def test_what_a_report_refuses(project: Path) -> None:
    made = report()
    with pytest.raises(ValueError, match="claims not settled yet: sum-grows"):
        made.show()
    with pytest.raises(ValueError, match="claims not settled yet: sum-grows"):
        made.verdicts()
    with pytest.raises(ValueError, match="no claim 'sum-grow': did you mean 'sum-grows'"):
        made.add("sum-grow", GOOD, ours="1")
    not_evidence: Any = True
    with pytest.raises(ValueError, match="evidence must be an Evidence, got bool"):
        made.add("sum-grows", not_evidence, ours="1")
    made.add("sum-grows", GOOD, ours="1")
    with pytest.raises(ValueError, match="claim 'sum-grows' is settled already"):
        made.add("sum-grows", GOOD, ours="1")
    with pytest.raises(UserError, match="no paper 'alphx'"):
        Report("alphx", preset="quick", seed=0, device="cpu")


def test_claims_stand_in_the_order_of_the_card(project: Path) -> None:
    path = project / "notebooks/noisy-labels/alpha.yaml"
    head, rest = path.read_text().split("claims:\n")
    claims, tail = rest.split("presets:")
    second = claims.replace("sum-grows", "also-this")
    path.write_text(f"{head}claims:\n{claims}{second}presets:{tail}")
    made = report()
    made.add("also-this", GOOD, ours="2")
    made.add("sum-grows", agrees([1.0], [1.0], atol=1), ours="1")
    record = made.record()
    assert [claim.id for claim in record.claims] == ["sum-grows", "also-this"]
    table = claims_table(read_card(path), record)
    assert table.count("<tr>") == 3
    assert table.index("sum-grows") < table.index("also-this")


def test_every_verdict_has_a_sign_and_its_word() -> None:
    assert set(BADGES) == set(VERDICTS)
    assert len(set(BADGES.values())) == len(VERDICTS)
    for verdict in VERDICTS:
        badge = verdict_badge(verdict)
        assert re.sub("<[^>]+>", "", badge) == f"{BADGES[verdict]} {verdict}"
        assert f"wp-{verdict.replace(' ', '-')}" in badge


def test_source_is_shown_as_it_stands_in_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr("IPython.display.display", found.append)
    show_source(holds, Evidence)
    text = found[0].data
    assert text.startswith("```python\ndef holds(condition: Any, text: str) -> Evidence:\n")
    assert "\n\n\n@dataclass(frozen=True)\nclass Evidence:\n" in text
    assert text.endswith("\n```")


def test_the_package_offers_two_names() -> None:
    assert wellposed.book.Report is Report
    with pytest.raises(AttributeError, match="has no attribute 'Reprot'"):
        wellposed.book.Reprot  # noqa: B018
