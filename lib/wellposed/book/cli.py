"""The ``wellposed`` command."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from wellposed.book import interrupt
from wellposed.book.errors import RunError, UserError
from wellposed.book.project import Paper, find_paper, find_papers, find_root, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from wellposed.book.record import RunRecord
    from wellposed.book.runs import Job

app = typer.Typer(
    help="Wellposed: an executable book of regularization and generalization.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Datasets: which there are, and fetching them.", no_args_is_help=True)
app.add_typer(data_app, name="data")

INTERRUPTED = 130
"""What typer turns Ctrl-C into."""

Target = Annotated[str, typer.Argument(help="A paper's slug, a chapter, or all.")]
Slug = Annotated[str, typer.Argument(help="A paper's slug; `wellposed list` shows all.")]


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, a failed run exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a letter gets "?" for it, not an error.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    interrupt.listen()
    try:
        code = app(prog_name="wellposed", standalone_mode=False)
    except (UserError, typer.TyperException) as error:
        _fail(error.format_message() if isinstance(error, typer.TyperException) else str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away, as in `wellposed list | head`.
        sys.stderr.close()
        sys.exit(0)
    if code == INTERRUPTED:
        _fail("interrupted: finished runs are kept, run the same command again to go on", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    line = " ".join(message.split())
    print(f"wellposed: {line}" if line else "", file=sys.stderr)
    sys.exit(code)


def _console() -> "Console":
    from rich.console import Console

    # Text of cards is text: square brackets in it are no markup.
    return Console(highlight=False, markup=False)


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "slug")
    return table


def _select(targets: list[str]) -> list[Paper]:
    """The papers that words on the command line name: slugs, chapters or ``all``."""
    papers = find_papers()
    chapters = {paper.chapter for paper in papers.values()}
    chosen: dict[str, Paper] = {}
    for target in targets:
        if target == "all":
            chosen |= papers
        elif target in chapters:
            chosen |= {slug: p for slug, p in papers.items() if p.chapter == target}
        elif target in papers:
            chosen[target] = papers[target]
        else:
            known = [*papers, *chapters, "all"]
            raise UserError(f"no paper or chapter {target!r}{nearest(target, known)}")
    return list(chosen.values())


@app.command("list")
def list_papers(
    chapter: Annotated[str, typer.Option(help="Only this chapter.")] = "",
    tag: Annotated[str, typer.Option(help="Only papers with this tag.")] = "",
    level: Annotated[str, typer.Option(help="Only this level.")] = "",
) -> None:
    """List the papers in the book.

    Example: wellposed list --chapter noisy-labels
    """
    from wellposed.book.card import Level, read_card

    papers = find_papers()
    chapters = sorted({paper.chapter for paper in papers.values()})
    if chapter and chapter not in chapters:
        raise UserError(f"no chapter {chapter!r}{nearest(chapter, chapters)}")
    if level and level not in get_args(Level):
        raise UserError(f"no level {level!r}{nearest(level, get_args(Level))}")
    table = _table("chapter", "slug", "level", "claims", "title")
    for paper in papers.values():
        if chapter and paper.chapter != chapter:
            continue
        card = read_card(paper.card_path)
        if (tag and tag not in card.tags) or (level and level != card.level):
            continue
        count = str(len(card.claims))
        table.add_row(paper.chapter, paper.slug, card.level, count, card.title)
    _console().print(table if table.row_count else "no paper matches")


@app.command()
def show(slug: Slug) -> None:
    """Show a paper: its idea, parameters, presets, and its claims with verdicts.

    Example: wellposed show early-learning-regularization
    """
    from wellposed.book.card import read_card
    from wellposed.book.ledger import rows
    from wellposed.book.notebook import parameters, read_notebook

    paper, console = find_paper(slug), _console()
    card = read_card(paper.card_path)
    console.print(f"{card.title}", style="bold")
    console.print(f"{', '.join(card.authors)}; {card.venue} {card.year}")
    console.print(f"{card.idea}\n")
    links = {"arXiv": card.arxiv and f"https://arxiv.org/abs/{card.arxiv}", "code": card.code}
    for name, link in links.items():
        if link:
            console.print(f"{name}: {link}", soft_wrap=True)
    console.print(f"notebook: {paper.notebook_path.relative_to(paper.root)}", soft_wrap=True)
    table = _table("parameter", "type", "quick", "smoke", "full", "meaning")
    known = parameters(read_notebook(paper.notebook_path), paper.notebook_path)
    for each in known.values():
        presets = (card.presets.smoke, card.presets.full)
        others = [str(p[each.name]) if each.name in p else "" for p in presets]
        table.add_row(each.name, each.type_name, str(each.default), *others, each.help)
    console.print(table)
    table = _table("claim", "paper", "ours", "verdict", "preset")
    for row in rows([paper]):
        table.add_row(row.claim, row.paper_number, row.ours, row.verdict, row.preset)
    console.print(table if table.row_count else "no results yet: `wellposed refresh` makes them")


@app.command()
def run(
    targets: Annotated[list[str], typer.Argument(help="Slugs, chapters, or all.")],
    preset: Annotated[str, typer.Option(help="smoke, quick or full.")] = "quick",
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", metavar="NAME=VALUE", help="Override a parameter."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Root seed of the run.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Papers to run side by side.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="Papers that may use a GPU at once.")] = 1,
    profile: Annotated[
        str, typer.Option(help="Where: local, slurm, kubernetes, or a Snakemake profile's folder.")
    ] = "local",
    out: Annotated[Path | None, typer.Option(help="Folder of all runs [runs/].")] = None,
    timeout: Annotated[
        int | None, typer.Option(min=1, help="Seconds one cell may take [no limit].")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run even what is up to date.")] = False,
) -> None:
    """Run papers and show their verdicts; what is finished and unchanged is not run again.

    Example: wellposed run all --preset smoke --jobs 2

    Example: wellposed run early-learning-regularization -p epochs=10 --seed 3

    Example: wellposed run all --preset full --profile slurm --jobs 40 --gpus 8
    """
    from wellposed.book.batch import LOCAL, profile_folder
    from wellposed.book.runs import plan, require_device

    papers = _select(targets)
    given = dict(_assignment(text) for text in parameter or [])
    root = find_root()
    folder = (out or root / "runs").absolute()
    where = profile_folder(root, profile)
    if profile == LOCAL:  # the machine that submits to a cluster need not have its devices
        require_device(device)
    planned = [
        plan(paper, preset=preset, given=given, seed=seed, device=device, out=folder)
        for paper in papers
    ]
    _writable(folder)
    if force:
        for job in planned:
            job.record_path.unlink(missing_ok=True)
    waiting = [job for job in planned if job.finished() is None]
    begin = time.monotonic()
    if len(waiting) == 1 and profile == LOCAL:
        failed = _run_one(waiting[0], timeout)
    elif waiting:
        failed = _run_many(waiting, root, folder, jobs, gpus, timeout, where)
    else:
        failed = {}
    ran = {job.paper.slug for job in waiting}
    done = [(job, record) for job in planned if (record := job.finished())]
    _summary(done, ran)
    if len(ran) > 1:
        _timing([record for job, record in done if job.paper.slug in ran], begin, jobs)
    for slug, reason in failed.items():
        prefix = "" if reason.startswith(slug) else f"{slug}: "
        print(f"wellposed: {prefix}{reason}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def _assignment(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise UserError(f"-p takes NAME=VALUE, got {text!r}")
    return name, value


def _writable(folder: Path) -> None:
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None


def _run_one(job: "Job", timeout: int | None) -> dict[str, str]:
    from wellposed.book.runs import execute

    with _progress([job.paper.slug]) as on_change:
        execute(job, on_cell=_teller(job.paper.slug, on_change), timeout=timeout)
    return {}


def _teller(
    slug: str, on_change: "Callable[[dict[str, tuple[int, int]]], None]"
) -> "Callable[[int, int], None]":
    def tell(done: int, total: int) -> None:
        on_change({slug: (done, total)})

    return tell


def _run_many(
    waiting: "list[Job]",
    root: Path,
    folder: Path,
    jobs: int,
    gpus: int,
    timeout: int | None,
    profile: Path,
) -> dict[str, str]:
    from wellposed.book.batch import run_batch

    with _progress([job.paper.slug for job in waiting]) as on_change:
        return run_batch(
            waiting,
            root=root,
            out=folder,
            cores=jobs,
            gpus=gpus,
            timeout=timeout,
            on_change=on_change,
            profile=profile,
        )


@contextmanager
def _progress(slugs: list[str]) -> "Iterator[Callable[[dict[str, tuple[int, int]]], None]]":
    """Cells done of cells in all, and elapsed time, for every paper that runs.

    Without a terminal: one line when a paper starts and one when its last cell is done.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console, seen = _console(), dict.fromkeys(slugs, (-1, 0))

    if not console.is_terminal:

        def tell(state: dict[str, tuple[int, int]]) -> None:
            for slug, (done, total) in state.items():
                if seen[slug][0] < 0:
                    print(f"{slug}: running, {total} cells", flush=True)
                if done == total and seen[slug] != (done, total):
                    print(f"{slug}: cell {done} of {total}", flush=True)
                seen[slug] = (done, total)

        yield tell
        return

    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("cell {task.completed:.0f} of {task.total:.0f}"),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}
        if len(slugs) == 1:
            tasks[slugs[0]] = progress.add_task(slugs[0], total=1)

        def draw(state: dict[str, tuple[int, int]]) -> None:
            for slug, (done, total) in state.items():
                if slug not in tasks:
                    tasks[slug] = progress.add_task(slug, total=total)
                progress.update(tasks[slug], completed=done, total=total)

        yield draw


def _summary(done: "list[tuple[Job, RunRecord]]", ran: set[str]) -> None:
    from wellposed.book.ledger import totals_text
    from wellposed.book.report import BADGES

    if not done:
        return
    console = _console()
    if len(done) <= 12:
        table = _table("paper", "claim", "verdict", "ours")
        for job, record in done:
            for index, claim in enumerate(record.claims):
                name = job.paper.slug if index == 0 else ""
                badge = f"{BADGES[claim.verdict]} {claim.verdict}"
                table.add_row(name, claim.id, badge, claim.ours)
            table.add_section()
        console.print(table)
    table = _table("paper", "preset", "device", "seconds", "verdicts")
    for job, record in done:
        state = f"{record.seconds:.1f}" + ("" if job.paper.slug in ran else " (before)")
        verdicts = totals_text(claim.verdict for claim in record.claims)
        table.add_row(job.paper.slug, record.preset, record.device, state, verdicts)
    console.print(table)
    for job, _ in done[:1] if len(done) == 1 else []:
        console.print(f"notebook: {job.folder / 'notebook.ipynb'}", soft_wrap=True)
    total = totals_text(claim.verdict for _, record in done for claim in record.claims)
    fresh = sum(job.paper.slug in ran for job, _ in done)
    console.print(f"{fresh} run now, {len(done) - fresh} up to date. Claims: {total}.")


def _timing(records: "Sequence[RunRecord]", begin: float, jobs: int) -> None:
    """How long a collection took, what took longest, and what that means for the whole book."""
    from wellposed.book.catalog import read_catalog

    planned = sum(len(chapter.papers) for chapter in read_catalog(find_root()).values())
    slowest = sorted(records, key=lambda record: -record.seconds)[:10]
    longest = ", ".join(f"{record.slug} {record.seconds:.0f} s" for record in slowest)
    elapsed = time.monotonic() - begin
    print(f"Slowest: {longest}.")
    if records:
        print(
            f"{elapsed:.0f} s with {jobs} at a time; "
            f"all {planned} papers would take {elapsed / len(records) * planned / 60:.0f} min."
        )


@app.command()
def new(
    slug: Slug,
    chapter: Annotated[str, typer.Option(help="Chapter, if the catalog does not list it.")] = "",
    title: Annotated[str, typer.Option(help="Title, if the catalog does not list it.")] = "",
    module: Annotated[str, typer.Option(help="Name of its module [after the slug].")] = "",
) -> None:
    """Write the skeleton of a paper: card, notebook, module and test.

    Example: wellposed new train-longer

    Example: wellposed new colide --module dag_noise
    """
    from wellposed.book.scaffold import scaffold

    for path in scaffold(find_root(), slug, chapter, title, module):
        print(path)


@app.command()
def refresh(
    target: Target,
    stale: Annotated[
        bool, typer.Option("--stale", help="Only papers whose outputs are out of date.")
    ] = False,
) -> None:
    """Re-execute notebooks and write their outputs back; an unchanged result changes no byte.

    Example: wellposed refresh early-learning-regularization
    """
    from wellposed.book.refresh import is_stale
    from wellposed.book.refresh import refresh as refresh_paper
    from wellposed.book.runs import plan

    for paper in _select([target]):
        if stale and not is_stale(plan(paper, device="cpu")):
            continue
        with _progress([paper.slug]) as on_change:
            changed = refresh_paper(paper, on_cell=_teller(paper.slug, on_change))
        print(f"{paper.slug}: {'changed' if changed else 'unchanged'}")


@app.command()
def check(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Slugs, chapters, or all [all].")
    ] = None,
) -> None:
    """Check cards and notebooks against the book's rules, without running anything.

    Example: wellposed check early-learning-regularization
    """
    from wellposed.book.check import check_paper
    from wellposed.book.refresh import is_stale
    from wellposed.book.runs import plan

    papers, problems = _select(targets or ["all"]), 0
    for paper in papers:
        found = check_paper(paper)
        for problem in found:
            print(problem)
        if not found and is_stale(plan(paper, device="cpu")):
            print(f"note: {paper.slug}: outputs are older than what they come from: `refresh` it")
        problems += len(found)
    print(f"papers checked: {len(papers)}, problems: {problems}")
    if problems:
        raise typer.Exit(1)


@app.command()
def build(
    fresh: Annotated[bool, typer.Option("--fresh", help="Build every page anew.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and errors.")] = False,
) -> None:
    """Build the site from the committed notebooks.

    Example: wellposed build
    """
    from wellposed.book.site import build as build_site

    page = build_site(find_root(), quiet=quiet, fresh=fresh)
    print(f"The book is ready: open {page.as_uri()}, or run `wellposed serve`.")


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 8000,
) -> None:
    """Serve the built site on this machine.

    Example: wellposed serve --port 8080
    """
    from wellposed.book.site import serve as serve_site

    print(f"Serving the book on http://127.0.0.1:{port} (Ctrl-C ends it).", flush=True)
    try:
        serve_site(find_root(), port)
    except KeyboardInterrupt:
        print()


@app.command()
def ledger(
    target: Target = "all",
    to: Annotated[
        Path | None, typer.Option("--to", help="Write a .json or .csv file instead.")
    ] = None,
) -> None:
    """Show every claim with the paper's number, ours and the verdict.

    Example: wellposed ledger --to claims.csv
    """
    from wellposed.book.ledger import export, rows, totals_text
    from wellposed.book.record import write_text

    found = rows(_select([target]))
    if to:
        try:
            write_text(to.absolute(), export(found, to))
        except ValueError as error:
            raise UserError(str(error)) from None
        print(to)
        return
    table = _table("paper", "claim", "paper's number", "ours", "verdict", "preset")
    for row in found:
        numbers = (row.paper_number, row.ours)
        table.add_row(row.paper, row.claim, *numbers, row.verdict, row.preset)
    _console().print(table)
    print(f"{len(found)} claims: {totals_text(row.verdict for row in found)}")


@app.command()
def stability(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Slugs, chapters, or all [all].")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many other root seeds.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Papers to run side by side.")] = 1,
) -> None:
    """Run papers at the next root seeds and show which verdicts stay; the ledger shows it too.

    Example: wellposed stability all --jobs 2
    """
    from wellposed.book.batch import LOCAL, profile_folder
    from wellposed.book.stability import measure, share

    root = find_root()
    folder, profile = root / "runs", profile_folder(root, LOCAL)
    _writable(folder)

    def run(waiting: "Sequence[Job]") -> dict[str, str]:
        return _run_many(list(waiting), root, folder, jobs, 1, None, profile)

    found = measure(_select(targets or ["all"]), run, num_seeds=seeds)
    table = _table("paper", "claim", "verdict", "at other seeds")
    for one in found:
        for claim, verdict in one.verdicts.items():
            if one.same(claim) < len(one.others):
                rest = ", ".join(f"{seed}: {other[claim]}" for seed, other in one.others.items())
                table.add_row(one.slug, claim, f"{verdict} ({one.seed})", rest)
    if table.row_count:
        _console().print(table)
    same, total = share(found)
    print(f"{same} of {total} verdicts ({same / total:.0%}) are the same at {seeds} other seeds")


@app.command()
def pilot(
    slug: Slug,
    seeds: Annotated[int, typer.Option(min=1, help="How many root seeds.")] = 3,
    first: Annotated[int, typer.Option(help="The first root seed, 1000 or more.")] = 1000,
) -> None:
    """Run a paper at root seeds that decide nothing, and show every claim at each of them.

    For fixing a design before the paper's own root seed is looked at. Nothing is committed.

    Example: wellposed pilot weight-compander --seeds 2
    """
    from wellposed.book.report import BADGES
    from wellposed.book.stability import pilot as run_pilot

    folder = find_root() / "runs"
    _writable(folder)

    def run(waiting: "Sequence[Job]") -> "dict[str, str]":
        return _run_one(waiting[0], None)

    found = run_pilot(find_paper(slug), run, num_seeds=seeds, first=first)
    table = _table("claim", *(f"seed {seed}" for seed in found))
    for claims in zip(*(record.claims for record in found.values())):
        cells = (f"{BADGES[one.verdict]} {one.verdict}\n{one.ours}" for one in claims)
        table.add_row(claims[0].id, *cells)
    _console().print(table)
    print(", ".join(f"seed {seed}: {record.seconds:.1f} s" for seed, record in found.items()))


Force = Annotated[bool, typer.Option("--force", help="Write over a file that exists.")]


@app.command()
def assignment(
    slug: Slug,
    instructor: Annotated[
        bool, typer.Option("--instructor", help="With solutions: nbgrader's source version.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The course's folder.")] = Path("course"),
    force: Force = False,
) -> None:
    """Write a paper's exercises as a notebook to hand out, or to grade with.

    Students get OUT/release/SLUG/SLUG.ipynb, with stubs for answers and the tests kept.
    Instructors get OUT/source/SLUG/SLUG.ipynb, with solutions. Both carry nbgrader's metadata, and
    OUT can be its course folder.

    Example: wellposed assignment weight-compander --out course

    Example: wellposed assignment weight-compander --instructor --out course
    """
    from wellposed.book.assignment import write_assignment

    print(write_assignment(find_paper(slug), out, instructor=instructor, force=force))


@app.command()
def slides(
    slug: Slug,
    out: Annotated[Path | None, typer.Option(help="The file [SLUG-slides.html].")] = None,
    force: Force = False,
    tag: Annotated[
        bool, typer.Option("--tag", help="Choose slide types for the notebook's cells instead.")
    ] = False,
) -> None:
    """Write a paper's slides: one HTML page that opens in any browser, offline too.

    It shows the notebook's cells that have a slide type. Arrow keys move, Esc shows all slides,
    and `?print-pdf` behind the address prints them.

    Example: wellposed slides sinkhorn-newton-sparse --out talk.html

    Example: wellposed slides sinkhorn-newton-sparse --tag
    """
    from wellposed.book.slides import tag_slides, write_slides

    if tag:
        print(f"{tag_slides(find_paper(slug), force=force)} cells have a slide type now")
        return
    print(write_slides(find_paper(slug), out or Path(f"{slug}-slides.html"), force=force))


@contextmanager
def _data_errors() -> Iterator[None]:
    from wellposed.data import DataError

    try:
        yield
    except DataError as error:
        raise UserError(str(error)) from None


@data_app.command("list")
def data_list() -> None:
    """List the datasets.

    Example: wellposed data list
    """
    from wellposed import data

    table = _table("name", "content", "comes", "license")
    for name in data.names():
        card = data.card(name)
        comes = "with the installation" if card.bundled else f"wellposed data fetch {name}"
        table.add_row(name, card.shapes, comes, card.license)
    _console().print(table)


@data_app.command("info")
def data_info(name: Annotated[str, typer.Argument(help="A dataset's name.")]) -> None:
    """Show a dataset's card: license, citation, size, checksums, sources.

    Example: wellposed data info mnist
    """
    from wellposed import data

    with _data_errors():
        card = data.card(name)
    console = _console()
    console.print(f"{card.title} ({card.name})", style="bold")
    console.print(f"{card.shapes}\nlicense: {card.license}, {card.license_url}", soft_wrap=True)
    console.print(f"cite: {card.citation}\nhome: {card.homepage}", soft_wrap=True)
    console.print(f"read it: {card.reader}", soft_wrap=True)
    for file in card.files:
        console.print(f"file: {file.name}, sha256 {file.sha256}", soft_wrap=True)
    for source in card.sources:
        console.print(f"source: {source.name}, {source.origin}", soft_wrap=True)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="A dataset's name.")],
    source: Annotated[
        str | None, typer.Option(help="Use this source alone [the first that answers].")
    ] = None,
) -> None:
    """Fetch a dataset from the first source that answers, and verify it.

    Example: wellposed data fetch fashion-mnist
    """
    from wellposed import data

    with _data_errors():
        print(data.fetch(name, source=source, report=print))
