"""The directive ``session`` of the course pages: the papers of a session, and what they take.

A session names papers by their slugs. A paper that is in the book gets a row with its level, the
times for reading and running, its exercises and its verdicts, all from card, notebook and record.
One that is only planned is named below the table, and gets its row when it enters the book. A slug
that the catalog does not know fails the build, and so does a session without a paper to read.
"""

from typing import Any

from booksite import Drawn, book
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx

from wellposed.book.assignment import exercises
from wellposed.book.notebook import read_notebook
from wellposed.book.project import nearest


class Session(Drawn):
    """A session's papers, one slug a line; ``:minutes:`` is the time in class."""

    has_content = True
    option_spec = {"minutes": directives.positive_int}  # noqa: RUF012 - docutils' interface

    def run(self) -> list[nodes.Node]:
        slugs = [line.strip() for line in self.content if line.strip()]
        known = {slug for chapter in book().chapters.values() for slug in chapter.papers}
        for slug in slugs:
            if slug not in book().entries and slug not in known:
                raise self.error(f"session: no paper {slug!r}{nearest(slug, known)}")
        entries = [book().entries[slug] for slug in slugs if slug in book().entries]
        if not entries:
            raise self.error("session: none of its papers is in the book")
        return self.draw(
            "session.html",
            minutes=self.options.get("minutes"),
            entries=entries,
            planned={slug: book().title(slug) for slug in slugs if slug not in book().entries},
            exercises={
                entry.slug: exercises(read_notebook(entry.paper.notebook_path)) for entry in entries
            },
        )


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.setup_extension("booksite")
    app.add_directive("session", Session)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
