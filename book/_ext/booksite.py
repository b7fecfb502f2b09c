"""The site's own Sphinx extension: what the pages draw from cards, records and outputs.

Every paper's page gets its card at the top, and related papers and the citation at its end. The
directives ``gallery``, ``chapter-papers``, ``ledger``, ``chapters``, ``totals``, ``comparison`` and
``racetrack`` draw the other pages, and the role ``paper`` links to a paper by its slug. Papers
stand in reading order everywhere. The extension knows the book's machinery (``wellposed.book``) and
nothing of the methods.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from docutils import nodes
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from sphinx.addnodes import pending_xref, toctree
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.images import get_image_size
from sphinx.writers.html5 import HTML5Translator

from wellposed.book import figure, ledger
from wellposed.book.card import Card, read_card
from wellposed.book.catalog import Chapter, read_catalog
from wellposed.book.claims import VERDICTS
from wellposed.book.errors import UserError
from wellposed.book.notebook import read_notebook
from wellposed.book.project import Paper, find_papers, nearest
from wellposed.book.reading import LEVELS, dependents, reading_minutes, reading_order, related
from wellposed.book.record import RunRecord
from wellposed.book.report import verdict_badge
from wellposed.book.repository import repository
from wellposed.book.site import mathjax

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GENERATED = ROOT / "_build" / "generated"
DOWNLOADS = {"claims.json": ledger.as_json, "claims.csv": ledger.as_csv}
RACES = ROOT / "benchmarks" / "results.json"
GALLERY = "book/gallery"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
"""What a reader calls the devices of records."""
SORTS = {
    "paper": ("Paper, A to Z", "Paper, Z to A"),
    "verdict": ("Verdict, best first", "Verdict, worst first"),
    "seeds": ("Seeds, fewest first", "Seeds, most first"),
    "seconds": ("Time, shortest first", "Time, longest first"),
}
"""Columns that the ledger sorts by, upward and downward."""

log = logging.getLogger(__name__)


class Entry:
    """One paper in the book: its files, read once, and what pages say of it."""

    def __init__(self, paper: Paper) -> None:
        self.paper, self.slug = paper, paper.slug
        self.card: Card = read_card(paper.card_path)
        self.page = f"notebooks/{paper.chapter}/{paper.slug}"
        notebook = read_notebook(paper.notebook_path)
        self.results: list[RunRecord] = ledger.results(paper)
        self.minutes = reading_minutes(notebook)
        self.figure = figure.key_figure(notebook)

    @property
    def seconds(self) -> float | None:
        """How long the committed run took."""
        return self.results[0].seconds if self.results else None

    @property
    def verdicts(self) -> list[str]:
        """The verdicts that the page's own run found; all ``not tested`` before there is one."""
        if not self.results:
            return ["not tested" for _ in self.card.claims]
        return [claim.verdict for claim in self.results[0].claims]

    @property
    def devices(self) -> list[str]:
        """The kinds of hardware there are results on."""
        used = [result.device.partition(":")[0] for result in self.results]
        return [device for device in DEVICES if device in used]

    @property
    def thumbnail(self) -> str | None:
        """Where the small figure lies in the site; None if there is no figure."""
        return f"_static/thumbnails/{self.slug}.webp" if self.figure else None


class Book:
    """All papers by slug, chapters in the catalog's order and papers in reading order."""

    def __init__(self, root: Path) -> None:
        self.chapters: dict[str, Chapter] = read_catalog(root)
        found = {slug: Entry(paper) for slug, paper in find_papers(root).items()}
        self.entries: dict[str, Entry] = {}
        for chapter in self.chapters:
            cards = {s: e.card for s, e in found.items() if e.paper.chapter == chapter}
            self.entries |= {slug: found[slug] for slug in reading_order(cards)}
        if lost := set(found) - set(self.entries):
            raise UserError(f"{min(lost)}: its chapter is not one of book/catalog.yaml")
        self.cards = {slug: entry.card for slug, entry in self.entries.items()}

    def of_chapter(self, chapter: str) -> list[Entry]:
        """A chapter's papers in reading order."""
        return [e for e in self.entries.values() if e.paper.chapter == chapter]

    def planned(self, chapter: str) -> dict[str, str]:
        """The titles of a chapter's papers that have no page yet, by slug."""
        titles = self.chapters[chapter].papers
        return {slug: title for slug, title in titles.items() if slug not in self.entries}

    @property
    def pending(self) -> int:
        """How many papers are planned and have no page yet."""
        return sum(len(self.planned(chapter)) for chapter in self.chapters)

    def title(self, slug: str) -> str:
        """A paper's title, whether it has a page or is only planned."""
        if slug in self.entries:
            return self.cards[slug].title
        return next((c.papers[slug] for c in self.chapters.values() if slug in c.papers), slug)

    @cached_property
    def rows(self) -> list[ledger.Row]:
        """The ledger, in the book's order."""
        return ledger.rows(entry.paper for entry in self.entries.values())


@cache
def book() -> Book:
    """The book, read once a build."""
    return Book(ROOT)


def link(from_page: str, to: str) -> str:
    """The address of a page (no ending) or file of the site as seen from a page."""
    path, _, anchor = to.partition("#")
    path = path if "." in path.rpartition("/")[2] else f"{path}.html"
    relative = os.path.relpath(path, os.path.dirname(from_page) or ".")
    return f"{relative}#{anchor}" if anchor else relative


def duration(seconds: float) -> str:
    """Seconds as a reader says them.

    Example:
        >>> duration(34.9), duration(200.0)
        ('35 s', '3 min')
    """
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def number(value: float | None) -> str:
    """A number in three digits, short enough for a table."""
    return "" if value is None else f"{value:.3g}"


def dashed(verdict: str) -> str:
    """A verdict as one word, for classes and addresses."""
    return verdict.replace(" ", "-")


def plain(text: str) -> str:
    """A word of cards (a tag, a level) as it is shown."""
    return text.replace("-", " ")


TEMPLATES = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def span(seconds: float) -> str:
    """A measured time, from microseconds up, in three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            break
    return f"{digits(seconds / size)} {unit}"


def digits(value: float) -> str:
    """Three digits, and all of them before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


TEMPLATES.filters |= {"span": span, "digits": digits}
TEMPLATES.filters |= {"duration": duration, "number": number, "dashed": dashed, "plain": plain}
TEMPLATES.globals |= {
    "badge": lambda *verdict_and_count: Markup(verdict_badge(*verdict_and_count)),
    "totals": ledger.totals,
    "DEVICES": DEVICES,
    "GALLERY": GALLERY,
    "THUMBNAIL": (figure.WIDTH, figure.HEIGHT),
}


def render(template: str, page: str, **values: Any) -> str:
    """A template as HTML for a page; in it, ``to`` makes addresses as seen from that page."""
    to = lambda target: link(page, target)  # noqa: E731 - a name for use in templates
    return TEMPLATES.get_template(template).render(book=book(), page=page, to=to, **values)


class Drawn(SphinxDirective):
    """A directive that is replaced by a template."""

    def draw(self, template: str, **values: Any) -> list[nodes.Node]:
        """The template as a node of this page, drawn anew when anything in the book changes."""
        self.env.note_dependency(str(GENERATED / "digest"))
        html = render(template, self.env.docname, **values)
        return [nodes.raw("", html, format="html")]


class Gallery(Drawn):
    """A tile for every paper, filters, and the papers that are planned."""

    def run(self) -> list[nodes.Node]:
        entries = list(book().entries.values())
        tags = sorted({tag for entry in entries for tag in entry.card.tags})
        facets = {
            "chapter": {slug: chapter.title for slug, chapter in book().chapters.items()},
            "level": {level: level for level in LEVELS},
            "tag": {tag: plain(tag) for tag in tags},
            "verdict": {dashed(verdict): verdict for verdict in VERDICTS},
            "hardware": DEVICES,
        }
        return self.draw("gallery.html", entries=entries, facets=facets)


class ChapterPapers(Drawn):
    """The papers of a chapter in reading order, compared, and those that are planned."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        chapter = self.arguments[0]
        if chapter not in book().chapters:
            raise self.error(f"no chapter {chapter!r}{nearest(chapter, book().chapters)}")
        entries = book().of_chapter(chapter)
        return self.draw("chapter.html", entries=entries, planned=book().planned(chapter))


class Chapters(Drawn):
    """The chapters, and how far each of them is."""

    def run(self) -> list[nodes.Node]:
        written = [
            slug for slug in book().chapters if f"book/chapters/{slug}" in self.env.found_docs
        ]
        return self.draw("chapters.html", written=written)


class Totals(Drawn):
    """How many papers and claims the book holds, and their verdicts."""

    def run(self) -> list[nodes.Node]:
        return self.draw("totals.html", rows=book().rows)


class Ledger(Drawn):
    """Every claim of every paper, with totals and the files to download."""

    def run(self) -> list[nodes.Node]:
        chapters = {s: c.title for s, c in book().chapters.items() if book().of_chapter(s)}
        facets = {
            "chapter": chapters,
            "verdict": {dashed(verdict): verdict for verdict in VERDICTS},
            "hardware": DEVICES,
        }
        values = {"facets": facets, "sorts": SORTS, "downloads": list(DOWNLOADS)}
        rows = book().rows
        values |= {"rows": rows, "stable": ledger.stable_share(rows), "verdicts": VERDICTS}
        return self.draw("ledger.html", **values)


class Comparison(Drawn):
    """What `make bench` measured for one file of ``benchmarks/``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        self.env.note_dependency(str(RACES))
        races = json.loads(RACES.read_text(encoding="utf-8"))
        names = sorted({row["comparison"] for row in races["rows"]})
        if name not in names:
            raise self.error(f"no comparison {name!r} in {RACES.name}{nearest(name, names)}")
        problems: dict[str, list[dict[str, Any]]] = {}
        for row in races["rows"]:
            if row["comparison"] == name:
                problems.setdefault(row["problem"], []).append(row)
        return self.draw("comparison.html", problems=problems)


class Racetrack(Drawn):
    """Where the comparisons ran, and how often ours was ahead."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(RACES))
        races = json.loads(RACES.read_text(encoding="utf-8"))
        peers = [row for row in races["rows"] if row["solver"] != "ours"]
        return self.draw("racetrack.html", races=races, peers=peers)


class PaperRole(SphinxRole):
    """A link to a paper by its slug; one that is planned is its title, and says so."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        slug = self.text
        if slug not in book().entries:
            known = {slug for chapter in book().chapters.values() for slug in chapter.papers}
            if slug not in known:
                log.warning(
                    "no paper %r%s", slug, nearest(slug, known), location=self.get_location()
                )
            return [nodes.emphasis("", f"{book().title(slug)} (planned)")], []
        title = book().title(slug)
        node = pending_xref(
            "",
            nodes.inline("", title),
            refdomain="std",
            reftype="doc",
            reftarget=f"/{book().entries[slug].page}",
            refexplicit=True,
            refwarn=True,
        )
        return [node], []


def complete_paper(app: Sphinx, doctree: nodes.document) -> None:
    """Put the paper's card under the title of its page, and what comes after it at the end."""
    entries = {entry.page: entry for entry in book().entries.values()}
    page = app.env.docname
    if page not in entries:
        return
    entry = entries[page]
    for part in ("card", "next"):
        app.env.note_dependency(str(drawn_path(entry, part)))
    title = next(iter(doctree.findall(nodes.title)))
    top = title.parent
    top.insert(top.index(title) + 1, drawn(entry, "card"))
    bibtex = entry.card.bibtex.strip()
    cite = nodes.literal_block(bibtex, bibtex, language="bibtex")
    for heading, content in (("Read on", drawn(entry, "next")), ("Cite the paper", cite)):
        name = heading.lower().replace(" ", "-")
        section = nodes.section("", nodes.title("", heading), content, ids=[name], names=[name])
        top.append(section)


def drawn_path(entry: Entry, part: str) -> Path:
    """Where a part of a paper's page lies once it is drawn."""
    return GENERATED / "parts" / f"{entry.slug}.{part}.html"


def drawn(entry: Entry, part: str) -> nodes.raw:
    """A part of a paper's page as a node."""
    return nodes.raw("", drawn_path(entry, part).read_text(encoding="utf-8"), format="html")


def card_html(entry: Entry) -> str:
    """The top of a paper's page."""
    return render("card.html", entry.page, entry=entry, card=entry.card, repository=repository())


def next_html(entry: Entry) -> str:
    """What to read after a paper: what it builds on, what builds on it, what is close to it."""
    groups = {
        "It builds on": [s for s in entry.card.prerequisites if s in book().entries],
        "Papers that build on it": dependents(entry.slug, book().cards),
        "Related papers": related(entry.slug, book().cards),
    }
    return render("next.html", entry.page, entry=entry, groups=groups)


def order_papers(app: Sphinx, doctree: nodes.document) -> None:
    """Put tables of contents in the book's order: chapters by the catalog, papers to be read so.

    The sidebar and the links to the previous and the next page follow from it.
    """
    pages = [f"book/chapters/{chapter}" for chapter in book().chapters]
    pages += [entry.page for entry in book().entries.values()]
    place = {page: index for index, page in enumerate(pages)}
    for tree in doctree.findall(toctree):
        if tree["includefiles"] and all(page in place for page in tree["includefiles"]):
            tree["includefiles"].sort(key=place.__getitem__)
            tree["entries"].sort(key=lambda entry: place[entry[1]])


def require_alt(app: Sphinx, doctree: nodes.document) -> None:
    """Warn of every image without alternative text; a warning fails the build."""
    for image in doctree.findall(nodes.image):
        if not image.get("alt", "").strip() or image["alt"] == image["uri"]:
            log.warning("an image without alternative text: %s", image["uri"], location=image)


def visit_image(self: HTML5Translator, node: nodes.image) -> None:
    """Write an image with its size, so that nothing moves when it arrives, and load it late."""
    size = get_image_size(str(Path(self.builder.srcdir) / node["uri"]))
    HTML5Translator.visit_image(self, node)
    known = 'loading="lazy" decoding="async" '
    if size and "width" not in node:
        known += f'width="{size[0]}" height="{size[1]}" '
    self.body[-1] = self.body[-1].replace("<img ", f"<img {known}", 1)


def depart_image(self: HTML5Translator, node: nodes.image) -> None:
    """End an image."""
    HTML5Translator.depart_image(self, node)


def mend_theme(app: Sphinx, page: str, template: str, context: dict[str, Any], _: Any) -> None:
    """Leave out a script that breaks on every page, and name what the theme leaves nameless."""
    # Thebe (code that runs in the page) is off, and its settings, written twice, are an error.
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename}{script.attributes.get('body')}"
    ]
    draw = context["generate_toctree_html"]

    def generate_toctree_html(*args: Any, **options: Any) -> Any:
        tree = draw(*args, **options)
        for summary in tree.select("summary"):
            name = summary.find_previous("a").get_text(strip=True)
            summary["aria-label"] = f"Show the papers of: {name}"
        return tree

    context["generate_toctree_html"] = generate_toctree_html


def write_changed(path: Path, content: bytes) -> None:
    """Write a file unless it holds that already: what depends on it is then up to date."""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def keep_only(folder: Path, names: Iterable[str]) -> None:
    """Delete what a folder holds of papers that are gone."""
    for path in set(folder.glob("*")) - {folder / name for name in names}:
        path.unlink()


def generate(app: Sphinx, config: Config) -> None:
    """Write what Sphinx must find as files: parts of pages, thumbnails, references, MathJax."""
    entries = list(book().entries.values())
    for entry in entries:
        write_changed(drawn_path(entry, "card"), card_html(entry).encode())
        write_changed(drawn_path(entry, "next"), next_html(entry).encode())
    parts = [drawn_path(entry, part) for entry in entries for part in ("card", "next")]
    keep_only(GENERATED / "parts", (path.name for path in parts))
    digest = hashlib.sha256()
    for path in [*parts, *HERE.rglob("*.html"), Path(__file__)]:
        digest.update(path.read_bytes())
    digest.update((ROOT / "book" / "catalog.yaml").read_bytes())
    digest.update(ledger.as_csv(book().rows).encode())
    write_changed(GENERATED / "digest", digest.hexdigest().encode())

    static = GENERATED / "static"
    pictured = [entry for entry in entries if entry.figure]
    for entry in pictured:
        path = static / "thumbnails" / f"{entry.slug}.webp"
        # Scaling takes most of a build's time, and a notebook changes rarely.
        if not path.is_file() or path.stat().st_mtime < entry.paper.notebook_path.stat().st_mtime:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(figure.thumbnail(entry.figure.png))
    keep_only(static / "thumbnails", (f"{entry.slug}.webp" for entry in pictured))

    bibliography = [(ROOT / "book" / "references.bib").read_text(encoding="utf-8")]
    bibliography += [entry.card.bibtex for entry in entries]
    write_changed(GENERATED / "references.bib", "\n".join(bibliography).encode())

    (static / "mathjax").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(mathjax(), static / "mathjax" / "tex-svg-full.js")
    config.html_static_path += [str(static), str(HERE.parent / "_site")]


def write_downloads(app: Sphinx, error: Exception | None) -> None:
    """Write the ledger's files beside the pages."""
    if error is None and app.builder.format == "html":
        for name, form in DOWNLOADS.items():
            (Path(app.outdir) / name).write_text(form(book().rows), encoding="utf-8")


def lighten_figures(app: Sphinx, error: Exception | None) -> None:
    """Take colors that nobody sees out of the figures: they are most of a page's weight."""
    if error is None and app.builder.format == "html":
        for path in (Path(app.outdir) / "_images").glob("*.png"):
            write_changed(path, figure.lighter(path.read_bytes()))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.add_directive("gallery", Gallery)
    app.add_directive("chapter-papers", ChapterPapers)
    app.add_directive("chapters", Chapters)
    app.add_directive("totals", Totals)
    app.add_directive("ledger", Ledger)
    app.add_directive("comparison", Comparison)
    app.add_directive("racetrack", Racetrack)
    app.add_role("paper", PaperRole())
    app.add_node(nodes.image, override=True, html=(visit_image, depart_image))
    app.connect("config-inited", generate, priority=100)
    # Before Sphinx collects titles, images and the order of pages, which it does at 500.
    app.connect("doctree-read", complete_paper, priority=300)
    app.connect("doctree-read", order_papers, priority=300)
    app.connect("doctree-read", require_alt, priority=300)
    # After the theme, which adds what is mended here.
    app.connect("html-page-context", mend_theme, priority=900)
    app.connect("build-finished", write_downloads)
    app.connect("build-finished", lighten_figures)
    app.add_css_file("wellposed.css")
    app.add_js_file("wellposed.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
