"""The course tracks: what they name exists, what they promise adds up, what they show is true."""

import re
import shlex
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from wellposed.book.assignment import exercises
from wellposed.book.card import read_card
from wellposed.book.catalog import read_catalog
from wellposed.book.ledger import results
from wellposed.book.notebook import convert, parameters, read_notebook
from wellposed.book.project import find_papers

ROOT = Path(__file__).resolve().parents[2]
PAPERS = find_papers(ROOT)
PLANNED = {slug for chapter in read_catalog(ROOT).values() for slug in chapter.papers}
COURSES = sorted(path.stem for path in (ROOT / "book" / "courses").glob("*.md"))
SESSION = re.compile(r"^```\{session\}\n((?::.*\n)*)((?:[a-z0-9-]+\n)+)```$", re.MULTILINE)


def text(course: str) -> str:
    return (ROOT / "book" / "courses" / f"{course}.md").read_text(encoding="utf-8")


def sessions(course: str) -> list[list[str]]:
    """The slugs of every session of a course."""
    return [match[1].split() for match in SESSION.findall(text(course))]


def test_there_are_three_courses_and_an_overview() -> None:
    assert COURSES == ["graduate-course", "index", "reading-group", "workshop"]
    toc = (ROOT / "_toc.yml").read_text()
    assert all(f"file: book/courses/{course}\n" in toc for course in COURSES)
    assert len(sessions("workshop")) == 4
    assert len(sessions("reading-group")) == 4
    # The last of the twelve weeks belongs to the students.
    assert len(sessions("graduate-course")) == 11 + 5  # and five to swap in
    assert len(re.findall(r"^## Week \d+", text("graduate-course"), re.MULTILINE)) == 12


@pytest.mark.parametrize("course", COURSES)
def test_every_paper_exists_and_every_session_can_be_held(course: str) -> None:
    """No session rests on a paper that is only planned; a planned one is in the catalog."""
    named = re.findall(r"\{paper\}`([^`]*)`", text(course))
    for session in sessions(course):
        assert set(session) & set(PAPERS), f"{session}: none is in the book"
        assert len(set(session)) == len(session)
        named += session
    assert set(named) <= PLANNED | set(PAPERS)
    assert text(course).count("{session}") == len(sessions(course)), "a session is malformed"


def test_every_command_runs_on_what_the_notebooks_declare() -> None:
    """Commands of a course name papers that are there and parameters of the right type."""
    checked = 0
    for course in COURSES:
        for command in re.findall(r"wellposed (?:run|assignment|slides) [^`\n]+", text(course)):
            words = shlex.split(command)
            if words[2].isupper():
                continue
            paper = PAPERS[words[2]]
            known = parameters(read_notebook(paper.notebook_path), paper.notebook_path)
            for flag, value in pairwise(words):
                if flag == "-p":
                    name, _, given = value.partition("=")
                    assert convert(known[name], given) != known[name].default, command
            checked += 1
    assert checked >= 10


def test_the_workshop_keeps_to_introductory_papers() -> None:
    chosen = [slug for session in sessions("workshop") for slug in session]
    assert {read_card(PAPERS[slug].card_path).level for slug in chosen} == {"introductory"}


def minutes(clock: str) -> int:
    hours, rest = clock.split(":")
    return 60 * int(hours) + int(rest)


def test_the_times_of_the_workshop_add_up() -> None:
    """Each session lasts from its place in the timetable to the next, and so do its parts."""
    table = re.findall(r"^\| (\d+:\d\d) \| (.*) \|$", text("workshop"), re.MULTILINE)
    lasts = {what: minutes(b) - minutes(a) for (a, what), (b, _) in pairwise(table)}
    parts = re.split(r"^## ", text("workshop"), flags=re.MULTILINE)
    for number in range(1, 5):
        (part,) = (p for p in parts if p.startswith(f"Session {number}. "))
        (planned,) = (m for what, m in lasts.items() if what.startswith(f"{number}. "))
        assert f":minutes: {planned}\n" in part
        assert sum(map(int, re.findall(r"\*\*(\d+) min\*\*", part))) == planned


def test_a_session_says_what_card_notebook_and_record_say(site: Path) -> None:
    page = (site / "book" / "courses" / "workshop.html").read_text(encoding="utf-8")
    for slug in (slug for session in sessions("workshop") for slug in session):
        paper = PAPERS[slug]
        card = read_card(paper.card_path)
        row = page[page.index(f"<code>{slug}</code>") :].split("</tr>")[0]
        assert f">{card.level}<" in row
        assert f">{exercises(read_notebook(paper.notebook_path))}</a>" in row
        assert f"notebooks/{paper.chapter}/{slug}.html" in page
        for quick in results(paper)[:1]:
            assert all(f"{claim.verdict}</span>" in row for claim in quick.claims)
        folded = page[page.index("<details", page.index(f"<code>{slug}</code>")) :]
        assert folded.split("</details>")[0].count("<li>") == len(card.claims)
        assert "wp-verdict" not in folded.split("</details>")[0]


def test_the_welcome_page_leads_to_teaching(site: Path) -> None:
    assert "courses/index.html" in (site / "book" / "index.html").read_text(encoding="utf-8")


Build = Callable[..., subprocess.CompletedProcess[str]]


def test_papers_in_sessions_are_drawn_planned_or_refused(
    small_book: Path, build_book: Build
) -> None:
    """In the book: a row. Only planned: named as such. Unknown, or nothing to read: no site."""
    slug = next(iter(find_papers(small_book)))
    planned = next(iter(sorted(PLANNED - {slug})))
    index = small_book / "book" / "index.md"
    index.write_text(
        "# A book\n\n"
        f"```{{session}}\n:minutes: 45\n{slug}\n{planned}\n```\n\n"
        f"See {{paper}}`{planned}`.\n"
    )
    good = build_book()
    assert good.returncode == 0, good.stderr
    page = (small_book / "_build" / "html" / "book" / "index.html").read_text(encoding="utf-8")
    assert page.count(f"<code>{slug}</code>") == 1
    assert "<strong>45 minutes</strong> in class" in page
    assert "Planned for this session, not in the book yet" in page
    assert f"<code>{planned}</code>" not in page
    assert "(planned)</em>" in page
    index.write_text(
        "# A book\n\n"
        f"```{{session}}\n{slug}\nno-such-paper\n```\n\n"
        f"```{{session}}\n{planned}\n```\n\n"
        f"```{{session}}\n:minutes: soon\n{slug}\n```\n"
    )
    bad = build_book()
    assert bad.returncode == 2
    assert "session: no paper 'no-such-paper'" in bad.stderr
    assert "session: none of its papers is in the book" in bad.stderr
    assert "'soon' [myst.directive_option]" in bad.stderr
