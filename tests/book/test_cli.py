"""The command: every bad input is one line and exit code 2, every command helps with an example."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import sandbox
from sandbox import Result
from wellposed.book import cli, runs
from wellposed.book.errors import RunError
from wellposed.book.project import find_paper
from wellposed.book.record import MIME, write_json
from wellposed.data import DataError

COMMANDS = [
    *("list", "show", "run", "new", "refresh", "check", "build", "serve", "ledger"),
    *("stability", "pilot", "assignment", "slides"),
    *("data list", "data info", "data fetch"),
]


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may start a kernel: bad input is found before anything runs."""

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a notebook was started")

    monkeypatch.setattr(runs, "run_notebook", started)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example(
    command: str, wellposed: Callable[..., Result]
) -> None:
    result = wellposed(*command.split(), "--help")
    assert (result.code, result.err) == (0, "")
    words = " ".join(result.out.split())
    assert f"Usage: wellposed {command} " in words
    assert f"Example: wellposed {command}" in words


def test_the_list_of_commands_above_is_whole() -> None:
    group: Any = typer.main.get_command(cli.app)
    found = set(group.commands) - {"data"}
    found |= {f"data {name}" for name in group.commands["data"].commands}
    assert found == set(COMMANDS)


def test_help_names_every_command(wellposed: Callable[..., Result]) -> None:
    out = wellposed("--help").out
    assert {c.split()[0] for c in COMMANDS} <= set(out.split())


# Bad input.

BAD: dict[str, tuple[list[str], str]] = {
    "unknown slug": (["run", "alphx"], "no paper or chapter 'alphx': did you mean 'alpha'?"),
    "unknown slug to show": (["show", "alphx"], "no paper 'alphx': did you mean 'alpha'?"),
    "one good, one bad": (["run", "alpha", "betta"], "no paper or chapter 'betta'"),
    "parent": (["run", ".."], "no paper or chapter '..'"),
    "path upward": (["show", "../../etc/passwd"], "no paper '../../etc/passwd'"),
    "absolute path": (["run", "/etc/passwd"], "no paper or chapter '/etc/passwd'"),
    "path of a card": (["run", "notebooks/noisy-labels/alpha.yaml"], "no paper or chapter"),
    "refresh a path": (["refresh", "../alpha"], "no paper or chapter '../alpha'"),
    "check a path": (["check", "/"], "no paper or chapter '/'"),
    "empty slug": (["show", ""], "no paper ''"),
    "line break in a slug": (["show", "a\nb"], "no paper 'a\\nb'"),
    "preset": (["run", "alpha", "--preset", "quikc"], "no preset 'quikc': did you mean 'quick'?"),
    "parameter": (["run", "alpha", "-p", "num_seds=3"], "did you mean 'num_seeds'?"),
    "no value": (["run", "alpha", "-p", "scale"], "-p takes NAME=VALUE, got 'scale'"),
    "no name": (["run", "alpha", "-p", "=3"], "-p takes NAME=VALUE, got '=3'"),
    "integer": (["run", "alpha", "-p", "num_seeds=x"], "'num_seeds' must be of type int, got 'x'"),
    "truth": (["run", "alpha", "-p", "fast=maybe"], "'fast' must be true or false, got 'maybe'"),
    "list": (["run", "alpha", "-p", "rates=1,b"], "'rates' must be of type list of float, got 'b'"),
    "code as a number": (
        ["run", "alpha", "-p", "scale=__import__('os').system('x')"],
        "'scale' must be of type float, got \"__import__('os').system('x')\"",
    ),
    "preset by -p": (["run", "alpha", "-p", "preset=full"], "set 'preset' with --preset"),
    "seed by -p": (["run", "alpha", "-p", "seed=1"], "set 'seed' with --seed, not with -p"),
    "device by -p": (["run", "alpha", "-p", "device=cpu"], "set 'device' with --device"),
    "seed": (["run", "alpha", "--seed", "x"], "Invalid value for '--seed'"),
    "negative seed": (["run", "alpha", "--seed", "-1"], "--seed must be at least 0, got -1"),
    "device": (
        ["run", "alpha", "--device", "tpu"],
        "--device must be auto, cpu or cuda, got 'tpu'",
    ),
    "jobs": (["run", "all", "--jobs", "0"], "Invalid value for '--jobs'"),
    "timeout": (["run", "all", "--timeout", "0"], "Invalid value for '--timeout'"),
    "gpus": (["run", "all", "--gpus", "-1"], "Invalid value for '--gpus'"),
    "option": (["run", "alpha", "--fast"], "No such option: --fast"),
    "command": (["rum", "alpha"], "No such command 'rum'"),
    "nothing to run": (["run"], "Missing argument"),
    "too much": (["show", "alpha", "beta"], "Got unexpected extra argument"),
    "chapter": (["list", "--chapter", "noisy-label"], "did you mean 'noisy-labels'?"),
    "level": (["list", "--level", "easy"], "no level 'easy'"),
    "ledger of": (["ledger", "nothing"], "no paper or chapter 'nothing'"),
    "ledger to": (["ledger", "--to", "claims.xlsx"], "the name must end in .json or .csv"),
    "new": (["new", "Not A Slug"], "a slug is lower-case words joined by '-', got 'Not A Slug'"),
    "port": (["serve", "--port", "0"], "Invalid value for '--port'"),
    "no site": (["serve"], "there is no site yet: run `wellposed build` first"),
    "dataset": (["data", "info", "mnits"], "mnits"),
    "dataset to fetch": (["data", "fetch", "../x"], "../x"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, project: Path, refused: Callable[..., str]) -> None:
    arguments, says = BAD[name]
    assert says in refused(*arguments)
    assert not (project / "runs").exists(), "something was prepared before all was checked"


BROKEN: dict[str, tuple[str, Callable[[str], str], str]] = {
    "card": (".yaml", lambda text: text.replace("introductory", "easy"), "level: "),
    "card field": (".yaml", lambda text: text + "color: red\n", "color: Extra inputs"),
    "card syntax": (".yaml", lambda text: text + "x: [1\n", "not valid YAML"),
    "card empty": (".yaml", lambda _: "", "a card is a mapping of fields"),
    "card tag": (
        ".yaml",
        lambda text: text.replace("title: A", "title: !!python/object/apply:os.getcwd []\nx: A"),
        "not valid YAML",
    ),
    "notebook": (".ipynb", lambda text: text[: len(text) // 2], "not a readable notebook"),
    "no parameters cell": (
        ".ipynb",
        lambda text: text.replace('"parameters"', '"other"'),
        "0 cells are tagged 'parameters', there must be exactly one",
    ),
    "parameters that are no values": (
        ".ipynb",
        lambda text: text.replace("scale = 1.0", "scale = num_seeds / 2"),
        "line 5 of the parameters cell must be `name = value`",
    ),
    "parameters that are no Python": (
        ".ipynb",
        lambda text: text.replace("rates = [0.2, 0.4]", "rates = [0.2, "),
        "the parameters cell is not Python",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("command", ["run", "refresh", "show"])
def test_a_broken_paper_is_one_line(
    name: str, command: str, project: Path, refused: Callable[..., str]
) -> None:
    suffix, change, says = BROKEN[name]
    path = project / "notebooks" / "noisy-labels" / f"alpha{suffix}"
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    message = refused(command, "alpha")
    assert message.startswith(str(path))
    assert says in message


def test_a_missing_notebook_is_one_line(project: Path, refused: Callable[..., str]) -> None:
    path = project / "notebooks/noisy-labels/alpha.ipynb"
    path.unlink()
    for command in ("run", "show", "ledger", "refresh"):
        assert refused(command, "alpha") == f"{path}: there is no such notebook"


def test_one_broken_paper_stops_all_before_any_runs(
    project: Path, refused: Callable[..., str]
) -> None:
    sandbox.write_paper(project, "zeta")
    edit(project / "notebooks/noisy-labels/zeta.yaml", "introductory", "easy")
    assert "zeta.yaml: level" in refused("run", "all", "--jobs", "2")


def test_a_folder_that_cannot_be_written_to(project: Path, refused: Callable[..., str]) -> None:
    """Below a regular file, where not even root can write."""
    (project / "file").write_text("")
    for out in (project / "file", project / "file" / "below"):
        assert refused("run", "alpha", "--out", str(out)).startswith(f"cannot write to {out}: ")
    to = project / "file" / "claims.csv"
    assert refused("ledger", "--to", str(to)).startswith(f"cannot write {to}: ")
    (project / "runs").write_text("")
    assert refused("refresh", "alpha").startswith(f"cannot write to {project / 'runs'}")


def test_a_library_that_does_not_parse_is_one_line(
    project: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import grimp

    from wellposed.book import digest

    def broken(*_: Any, **__: Any) -> None:
        raise grimp.exceptions.SourceSyntaxError("lib/wellposed/ops/x.py", 3, "def f(:")

    monkeypatch.setattr(grimp, "build_graph", broken)
    digest._graph.cache_clear()
    digest._closure.cache_clear()
    assert refused("run", "alpha") == "lib/wellposed/ops/x.py:3: not valid Python"


def test_no_project(tmp_path: Path, refused: Callable[..., str], monkeypatch: Any) -> None:
    monkeypatch.setenv("WELLPOSED_ROOT", str(tmp_path))
    assert refused("list") == f"WELLPOSED_ROOT={tmp_path} holds no notebooks/ folder"


# How the entry point ends.


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (RunError("alpha: cell 3 failed:\n  ValueError"), 1, "alpha: cell 3 failed: ValueError"),
        (KeyboardInterrupt(), 2, "interrupted: finished runs are kept, run the same command"),
        (DataError("no data"), 2, "no data"),
    ],
)
def test_errors_become_one_line(
    raised: BaseException,
    code: int,
    line: str,
    project: Path,
    wellposed: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    target = (
        "wellposed.data.card" if isinstance(raised, DataError) else "wellposed.book.cli._select"
    )
    monkeypatch.setattr(target, fail)
    words = ("data", "info", "x") if isinstance(raised, DataError) else ("run", "alpha")
    result = wellposed(*words)
    assert result.code == code
    assert result.err.startswith(f"wellposed: {line}")
    assert result.err.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error(project: Path) -> None:
    """`wellposed list | head`: the pipe is closed before anything is written to it."""
    process = sandbox.start(project, "list")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.wait()
    process.stderr.close()


# Fast and light.

LIGHT = """
import json, sys
from wellposed.book import cli
sys.argv = ["wellposed", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as end:
    assert not end.code, end.code
loaded = {name.partition(".")[0] for name in sys.modules}
print("LOADED", json.dumps(sorted(loaded)), file=sys.stderr)
"""
HEAVY = {
    *("torch", "numpy", "scipy", "pandas", "matplotlib", "sklearn", "papermill", "nbformat"),
    *("IPython", "snakemake", "grimp", "sphinx", "jupyter_client"),
}


@pytest.mark.parametrize("words", [["list"], ["--help"], ["run", "--help"], ["data", "--help"]])
def test_light_commands_load_nothing_heavy(project: Path, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *words],
        cwd=project,
        env=sandbox.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stderr.rpartition("LOADED ")[2]))
    assert "typer" in loaded
    assert loaded & HEAVY == set()


def test_the_book_at_its_full_size(
    tmp_path: Path, wellposed: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """161 cards over 23 chapters: list shows all, and filters."""
    monkeypatch.delenv("WELLPOSED_ROOT", raising=False)
    root = sandbox.make_project(tmp_path / "project", "alpha")
    text = (root / "notebooks/noisy-labels/alpha.yaml").read_text()
    (root / "notebooks/noisy-labels/alpha.yaml").unlink()
    for number in range(161):
        folder = root / "notebooks" / f"chapter-{number % 23:02d}"
        folder.mkdir(exist_ok=True)
        level = ("introductory", "intermediate", "advanced")[number % 3]
        card = text.replace("level: introductory", f"level: {level}")
        card = card.replace("tags: [testing]", "tags: [odd]" if number % 2 else "tags: [even, all]")
        (folder / f"paper-{number:03d}.yaml").write_text(card)
    monkeypatch.chdir(root)

    def listed(*options: str) -> list[str]:
        result = wellposed("list", *options)
        assert (result.code, result.err) == (0, "")
        return [w for w in result.out.split() if w.startswith("paper-")]

    everything = {f"paper-{number:03d}" for number in range(161)}
    assert len(listed()) == 161
    assert set(listed()) == everything
    assert listed() == sorted(everything, key=lambda slug: (int(slug[6:]) % 23, slug))
    assert listed("--chapter", "chapter-07") == [f"paper-{n:03d}" for n in range(7, 161, 23)]
    assert set(listed("--tag", "odd")) == {f"paper-{n:03d}" for n in range(1, 161, 2)}
    assert set(listed("--level", "advanced")) == {f"paper-{n:03d}" for n in range(2, 161, 3)}
    assert listed("--tag", "nothing") == []
    assert "no paper matches" in wellposed("list", "--tag", "nothing").out


def test_slugs_can_be_copied_from_a_narrow_terminal(project: Path) -> None:
    """Fails if a slug is folded over two lines."""
    slug = "a-slug-as-long-as-the-longest-ones-in-the-catalog"
    sandbox.write_paper(project, slug)
    done = subprocess.run(
        [sandbox.WELLPOSED, "list"],
        cwd=project,
        env=sandbox.environment() | {"COLUMNS": "60"},
        capture_output=True,
        text=True,
    )
    assert slug in done.stdout


# Showing.


def with_result(root: Path) -> None:
    paper = find_paper("alpha", root)
    claim = {
        **{"id": "sum-grows", "verdict": "partly", "test": "every seed", "value": 1.0},
        **{"low": None, "high": None, "relation": ">=", "threshold": 0.5, "n": 3},
        **{"ours": "0.93", "text": "1 to 3", "timed": False},
    }
    head = {"slug": "alpha", "preset": "quick", "seed": 0, "device": "cpu", "claims": [claim]}
    notebook = json.loads(paper.notebook_path.read_text())
    output = {"output_type": "display_data", "metadata": {}, "data": {MIME: head}}
    notebook["cells"][4]["outputs"] = [output]
    paper.notebook_path.write_text(json.dumps(notebook))
    more = {"hardware": "x", "digest": "0" * 16, "parameters": {}, "seconds": 1, "versions": {}}
    write_json(paper.record_path("quick"), head | more)


def test_show(project: Path, wellposed: Callable[..., Result]) -> None:
    out = wellposed("show", "alpha").out
    for part in (
        *("A tiny paper", "Ada Lovelace; Journal of Tests 2020", "Adding up numbers gives"),
        *("https://arxiv.org/abs/2001.00001", "notebooks/noisy-labels/alpha.ipynb"),
        *("size of the summands", "list of float", "no results yet: `wellposed refresh`"),
    ):
        assert part in out
    (line,) = [line for line in out.splitlines() if line.lstrip().startswith("num_seeds")]
    assert line.split()[:5] == ["num_seeds", "int", "3", "1", "9"]
    with_result(project)
    (line,) = [s for s in wellposed("show", "alpha").out.splitlines() if "sum-grows" in s]
    assert line.split() == ["sum-grows", "1.0", "0.93", "partly", "quick"]


def test_ledger(project: Path, wellposed: Callable[..., Result]) -> None:
    with_result(project)
    result = wellposed("ledger")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "1 claims: 1 partly"
    assert wellposed("ledger", "alpha", "--to", "out/claims.json").out == "out/claims.json\n"
    (row,) = json.loads((project / "out" / "claims.json").read_text())
    assert (row["paper"], row["verdict"]) == ("alpha", "partly")
    wellposed("ledger", "noisy-labels", "--to", "claims.csv")
    assert (project / "claims.csv").read_text().startswith("paper,chapter,title,")


def test_markup_in_a_card_is_text(project: Path, wellposed: Callable[..., Result]) -> None:
    """Square brackets are rich's markup; fails if they are taken for it."""
    path = project / "notebooks/noisy-labels/alpha.yaml"
    card = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(card | {"title": "[bold]Sums[/] [/oops]", "idea": "[red]x"}))
    for words in (["list"], ["show", "alpha"]):
        result = wellposed(*words)
        assert (result.code, result.err) == (0, "")
        assert "[bold]Sums[/] [/oops]" in result.out


def test_selecting_by_chapter_and_slug_runs_each_once(
    project: Path, wellposed: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.write_paper(project, "beta")
    chosen: list[str] = []

    def many(waiting: Any, *_: Any) -> dict[str, str]:
        chosen.extend(job.paper.slug for job in waiting)
        return {}

    monkeypatch.setattr(cli, "_run_many", many)
    wellposed("run", "alpha", "noisy-labels", "all")
    assert chosen == ["alpha", "beta"]


def test_a_parameter_of_one_paper_only_names_the_other(
    project: Path, refused: Callable[..., str]
) -> None:
    sandbox.write_paper(project, "beta", parameters=sandbox.PARAMETERS + "depth = 3\n")
    assert refused("run", "all", "-p", "depth=4").startswith("alpha has no parameter 'depth'")


def test_output_is_utf8_whatever_the_locale(project: Path) -> None:
    """Signs of verdicts are not ASCII; fails with a UnicodeEncodeError in a bare C locale."""
    with_result(project)
    edit(project / "notebooks/noisy-labels/alpha.yaml", "Ada Lovelace", "Émilie du Châtelet")
    kept = {k: v for k, v in sandbox.environment().items() if not k.startswith(("LC_", "LANG"))}
    done = subprocess.run(
        [sandbox.WELLPOSED, "show", "alpha"],
        cwd=project,
        env=kept | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert os.fsencode("sum-grows") in done.stdout
