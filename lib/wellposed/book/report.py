"""What a notebook uses: collect the evidence for its paper's claims and show it."""

import ast
import html
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from wellposed.book.card import Card, read_card
from wellposed.book.claims import Evidence, Verdict
from wellposed.book.project import find_paper, nearest
from wellposed.book.record import MIME, ClaimRecord, ClaimsRecord, round_number

BADGES: dict[Verdict, str] = {
    "reproduced": "✓",
    "partly": "◐",
    "not reproduced": "✗",
    "inconclusive": "?",
    "not tested": "–",
}
"""A sign for each verdict, so that color is never the only difference."""


class Report:
    """The claims of one paper as one run finds them.

    Args:
        slug: the paper.
        preset: the run's preset; with ``"smoke"`` every verdict is ``not tested``.
        seed: the run's root seed.
        device: the run's device parameter.

    Raises:
        UserError: there is no such paper, or its card is bad.
    """

    def __init__(self, slug: str, *, preset: str, seed: int, device: str) -> None:
        self.card: Card = read_card(find_paper(slug).card_path)
        self._head = {"slug": slug, "preset": preset, "seed": seed, "device": str(device)}
        self._claims: dict[str, ClaimRecord] = {}

    def add(self, claim_id: str, evidence: Evidence, *, ours: str, timed: bool = False) -> None:
        """Settle a claim.

        Args:
            claim_id: its id on the card.
            evidence: what a test of :mod:`wellposed.book.claims` returned.
            ours: our number, short, to stand beside the paper's.
            timed: the numbers are times, which differ from run to run; :meth:`verdicts` then
                leaves the verdict out, so that no test depends on how busy a machine is.

        Raises:
            ValueError: the card has no such claim, it is settled already, or the evidence is
                not an Evidence.
        """
        ids = [claim.id for claim in self.card.claims]
        if claim_id not in ids:
            raise ValueError(f"the card has no claim {claim_id!r}{nearest(claim_id, ids)}")
        if claim_id in self._claims:
            raise ValueError(f"claim {claim_id!r} is settled already")
        if not isinstance(evidence, Evidence):
            raise ValueError(f"evidence must be an Evidence, got {type(evidence).__name__}")
        if self._head["preset"] == "smoke":
            evidence = evidence.untested()
        self._claims[claim_id] = ClaimRecord(
            id=claim_id,
            verdict=evidence.verdict,
            test=evidence.test,
            value=round_number(evidence.value) or 0.0,
            low=round_number(evidence.low),
            high=round_number(evidence.high),
            relation=evidence.relation,
            threshold=round_number(evidence.threshold) or 0.0,
            n=evidence.n,
            ours=ours,
            text=evidence.text,
            timed=timed,
        )

    def record(self) -> ClaimsRecord:
        """The whole report; ValueError if a claim of the card is not settled."""
        missing = [c.id for c in self.card.claims if c.id not in self._claims]
        if missing:
            raise ValueError(f"claims not settled yet: {', '.join(missing)}")
        claims = [self._claims[c.id] for c in self.card.claims]
        return ClaimsRecord.model_validate({**self._head, "claims": claims})

    def show(self) -> None:
        """Display the table of claims; the same output carries the record for other programs."""
        from IPython.display import display

        record = self.record()
        data = {
            MIME: record.model_dump(mode="json"),
            "text/html": claims_table(self.card, record),
            "text/plain": "\n".join(f"{c.id}: {c.verdict} ({c.text})" for c in record.claims),
        }
        display(data, raw=True)

    def verdicts(self) -> None:
        """Print one line a claim: its id and verdict, nothing that moves between machines.

        So the verdict of a timed claim is not among them; the table of :meth:`show` has it.
        """
        for claim in self.record().claims:
            print(claim.line())


def claims_table(card: Card, record: ClaimsRecord) -> str:
    """The claims as an HTML table: statement, the paper's number, ours, the verdict and why.

    Args:
        card: the paper's card.
        record: what a run found.

    Returns:
        HTML without styles of its own; the site's style sheet knows the classes.
    """
    rows = []
    for claim in record.claims:
        said = card.claim(claim.id)
        cells = [
            f'<td class="wp-claim">{html.escape(said.statement)}'
            f"<br><code>{html.escape(claim.id)}</code></td>",
            f"<td>{html.escape(said.paper.number)}<br><small>{html.escape(said.paper.where)}"
            "</small></td>",
            f"<td>{html.escape(claim.ours)}<br><small>{html.escape(claim.text)}</small></td>",
            f"<td>{verdict_badge(claim.verdict)}</td>",
        ]
        rows.append("<tr>" + "".join(cells) + "</tr>")
    # The theme recolors every HTML output in dark mode except tables of class dataframe.
    return (
        '<table class="dataframe wp-claims"><thead><tr><th scope="col">Claim</th>'
        '<th scope="col">Paper</th><th scope="col">Ours</th><th scope="col">Verdict</th></tr>'
        "</thead><tbody>" + "".join(rows) + "</tbody></table>"
    )


def verdict_badge(verdict: Verdict, count: int | None = None) -> str:
    """A verdict as a small HTML badge with a sign and the word, and how often it was reached.

    Example:
        >>> verdict_badge("partly", 2)
        '<span class="wp-verdict wp-partly"><span aria-hidden="true">◐</span> 2 partly</span>'
    """
    name = verdict.replace(" ", "-")
    words = verdict if count is None else f"{count} {verdict}"
    return (
        f'<span class="wp-verdict wp-{name}"><span aria-hidden="true">{BADGES[verdict]}</span> '
        f"{words}</span>"
    )


def show_source(*objects: Callable[..., Any] | type, docstrings: bool = False) -> None:
    """Show the library's own source of functions or classes in a notebook.

    Args:
        *objects: functions or classes; they appear in this order.
        docstrings: whether to keep the docstrings, which a page mostly says in its own words.
    """
    from IPython.display import Markdown, display

    sources = [textwrap.dedent(inspect.getsource(each)).rstrip() for each in objects]
    shown = [each if docstrings else without_docstrings(each) for each in sources]
    text = "\n\n\n".join(shown)
    display(Markdown(f"```python\n{text}\n```"))


def without_docstrings(source: str) -> str:
    r"""Python source without the docstrings of its functions and classes; all else is untouched.

    Example:
        >>> source = "def f(x):\n    'Twice x.'\n    return 2 * x"
        >>> print(without_docstrings(source))
        def f(x):
            return 2 * x
    """
    lines, dropped = source.splitlines(), set[int]()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or len(node.body) < 2:
            continue
        first = node.body[0]
        if ast.get_docstring(node) is not None:
            end = first.end_lineno or first.lineno
            # The blank line after a docstring belongs to it.
            end += end < len(lines) and not lines[end].strip()
            dropped |= set(range(first.lineno, end + 1))
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in dropped)
