"""Running a paper's notebook: plan it, execute it through papermill, keep its record.

A run's folder is named by the digest of everything it depends on, so a folder with a record in
it is a finished run of exactly that content, and no two different runs share a folder. The record
is written last and in one step: a run that was killed has none.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from wellposed.book import interrupt
from wellposed.book.card import Card, read_card
from wellposed.book.digest import digest
from wellposed.book.errors import RunError, UserError
from wellposed.book.notebook import (
    Notebook,
    check_value,
    convert,
    parameters,
    read_notebook,
    unknown_parameter,
)
from wellposed.book.project import Paper, nearest
from wellposed.book.record import RunRecord, claims_in, read_record, sweep, write_json

PRESETS = ("smoke", "quick", "full")
OnCell = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """A run that is fully determined: which paper, with which values, and where it goes."""

    paper: Paper
    card: Card
    preset: str
    parameters: dict[str, Any]
    digest: str
    folder: Path

    @property
    def record_path(self) -> Path:
        """Where the record of the finished run stands."""
        return self.folder / "record.json"

    def finished(self) -> RunRecord | None:
        """The record of this very run, if it was finished before."""
        record = read_record(self.record_path)
        return record if record and record.digest == self.digest else None


def plan(
    paper: Paper,
    *,
    preset: str = "quick",
    given: Mapping[str, str] | None = None,
    typed: Mapping[str, Any] | None = None,
    seed: int | None = None,
    device: str = "auto",
    out: Path | None = None,
) -> Job:
    """Check everything a run needs before anything runs.

    Args:
        paper: which one.
        preset: ``smoke``, ``quick`` or ``full``.
        given: parameters from the command line, as text.
        typed: parameters that already have their types; all of them, device and seed included,
            as another plan settled them.
        seed: root seed; the notebook's own if None.
        device: ``auto``, ``cpu`` or ``cuda``.
        out: folder of all runs; runs/ in the project if None.

    Returns:
        The job.

    Raises:
        UserError: unknown preset or parameter, a value of the wrong type, a bad card or
            notebook.
    """
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r}{nearest(preset, PRESETS)}")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, got {device!r}")
    card = read_card(paper.card_path)
    notebook = read_notebook(paper.notebook_path)
    known = parameters(notebook, paper.notebook_path)
    values: dict[str, Any] = {}
    if preset != "quick":
        for name, value in getattr(card.presets, preset).items():
            where = f"{paper.card_path}: presets.{preset}"
            if name not in known:
                raise unknown_parameter(name, known, where)
            check_value(known[name], value, where)
            values[name] = value
    values |= {"preset": preset, "device": device}
    if seed is not None:
        if seed < 0:
            raise UserError(f"--seed must be at least 0, got {seed}")
        values["seed"] = seed
    for name, text in (given or {}).items():
        if name not in known:
            raise unknown_parameter(name, known, paper.slug)
        if name in ("preset", "device", "seed"):
            raise UserError(f"set {name!r} with --{name}, not with -p")
        values[name] = convert(known[name], text)
    values |= typed or {}
    # Defaults count too, so that naming a default explicitly is the same run.
    effective = {name: parameter.default for name, parameter in known.items()} | values
    key = digest(notebook, card, effective)
    folder = (out or paper.root / "runs") / preset / paper.slug / key
    return Job(paper, card, preset, values, key, folder)


def execute(job: Job, *, on_cell: OnCell | None = None, timeout: int | None = None) -> RunRecord:
    """Run a job and keep its notebook and record in the job's folder.

    Args:
        job: what to run.
        on_cell: called with (cells done, cells in all) after every cell.
        timeout: seconds that one cell may take; no limit if None.

    Returns:
        The record, which is on disk.

    Raises:
        UserError: the folder cannot be written to.
        RunError: a cell failed, took too long, or the kernel died. The notebook up to there is
            kept beside as failed.ipynb.
    """
    require_device(str(job.parameters["device"]))
    with _folder(job.folder) as partial:
        executed = run_notebook(
            job.paper.notebook_path,
            partial,
            job.parameters,
            on_cell=on_cell,
            timeout=timeout,
            keep_failed=job.folder / "failed.ipynb",
        )
        record = make_record(job, executed)
        interrupt.heed()
        os.replace(partial, job.folder / "notebook.ipynb")
        write_json(job.record_path, record.model_dump(mode="json"))
        (job.folder / "failed.ipynb").unlink(missing_ok=True)
    return record


@contextmanager
def _folder(folder: Path) -> Iterator[Path]:
    partial = folder / f".partial-{os.getpid()}.ipynb"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder, ".*")
        partial.touch()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def run_notebook(
    source: Path,
    target: Path,
    values: Mapping[str, Any],
    *,
    on_cell: OnCell | None = None,
    timeout: int | None = None,
    keep_failed: Path | None = None,
) -> Notebook:
    """Execute a notebook with papermill in its own folder, as nbval and the site see it.

    Returns:
        The executed notebook as parsed JSON.

    Raises:
        RunError: see :func:`execute`.
    """
    import logging
    import tempfile

    # If jsonschema finds this module, it parses the grammar of international addresses, which takes
    # longer than all other imports together; no notebook's schema has such an address.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    import nbformat
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    # What papermill has to say of a failure is in its exception as well.
    logging.getLogger("papermill").setLevel(logging.CRITICAL + 1)
    _register_engine()
    name = source.stem
    try:
        with _quiet_kernel(), tempfile.TemporaryDirectory(prefix="wellposed-") as sockets:
            papermill.execute_notebook(
                _literal(source),
                _literal(target),
                parameters=dict(values),
                engine_name="wellposed",
                kernel_name="python3",
                language="python",
                progress_bar=False,
                cwd=str(source.parent),
                on_cell=on_cell,
                execution_timeout=timeout,
                start_timeout=180,
                # Sockets in a folder of their own: kernels that start together race for TCP ports,
                # and for the names of sockets in a folder that they share.
                config=Config(
                    {
                        "KernelManager": {
                            "transport": "ipc",
                            "connection_file": os.path.join(sockets, "kernel.json"),
                        }
                    }
                ),
                extra_arguments=["--IPKernelApp.log_level=50"],
            )
    except papermill.exceptions.PapermillExecutionError as error:
        if keep_failed:
            os.replace(target, keep_failed)
        place = f"; see {keep_failed}" if keep_failed else ""
        first = str(error.evalue).strip().splitlines()
        if error.ename == "DataError":
            raise UserError(f"{name}: {first[0]}") from None
        raise RunError(
            f"{name}: cell {error.cell_index + 1} failed: {error.ename}: "
            f"{first[0] if first else ''}{place}"
        ) from None
    except CellTimeoutError:
        raise RunError(f"{name}: a cell took longer than {timeout} s and was stopped") from None
    except DeadKernelError:
        raise RunError(f"{name}: its kernel died (out of memory, perhaps)") from None
    except RuntimeError as error:
        raise RunError(f"{name}: its kernel did not start ({error})") from None
    except NoSuchKernel:
        raise RunError("there is no Jupyter kernel 'python3' here: run `make setup`") from None
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    executed: Notebook = nbformat.read(target, as_version=4)
    return executed


def _literal(path: Path) -> str:
    """A path for papermill, which would fill braces in it with parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextmanager
def _quiet_kernel() -> Iterator[None]:
    """One thread a notebook unless the user chose otherwise: papers run side by side."""
    wanted = {"OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    added = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


@cache
def _register_engine() -> None:
    from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines

    class Engine(NBClientEngine):  # type: ignore[misc]
        """papermill's own engine, telling how far it is."""

        @classmethod
        def execute_managed_notebook(
            cls,
            nb_man: NotebookExecutionManager,
            kernel_name: str,
            on_cell: OnCell | None = None,
            **kwargs: Any,
        ) -> Any:
            total = sum(cell.cell_type == "code" for cell in nb_man.nb.cells)
            complete, done = nb_man.cell_complete, 0

            def cell_complete(cell: Any, *args: Any, **kw: Any) -> None:
                nonlocal done
                complete(cell, *args, **kw)
                interrupt.heed()
                if cell.cell_type == "code" and on_cell:
                    done += 1
                    on_cell(done, total)

            nb_man.cell_complete = cell_complete
            return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)

    papermill_engines.register("wellposed", Engine)


def make_record(job: Job, executed: Notebook) -> RunRecord:
    """The record of a run from its executed notebook.

    Raises:
        RunError: the notebook left no claims record.
    """
    claims = claims_in(executed)
    if claims is None:
        raise RunError(f"{job.paper.slug}: the notebook shows no claims (report.show() is missing)")
    return RunRecord(
        slug=job.paper.slug,
        preset=job.preset,
        seed=claims.seed,
        device=claims.device,
        hardware=hardware(claims.device),
        digest=job.digest,
        parameters=job.parameters,
        seconds=round(cell_seconds(executed), 1),
        versions=versions(),
        commit=commit(job.paper.root),
        claims=claims.claims,
    )


def cell_seconds(executed: Notebook) -> float:
    """Seconds that the cells of a run took together, by papermill's clock."""
    durations = (c["metadata"].get("papermill", {}).get("duration") for c in executed["cells"])
    return sum(duration or 0.0 for duration in durations)


def hardware(device: str) -> str:
    """The name of the processor, or of the GPU, that a run used."""
    if device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return _output(query).partition("\n")[0] or "GPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    packages = ("torch", "numpy", "scipy", "wellposed")
    return {"python": platform.python_version()} | {p: metadata.version(p) for p in packages}


def commit(root: Path) -> str | None:
    """The checked-out commit, or None outside git."""
    return _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]) or None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def require_device(device: str) -> None:
    """Check that a GPU is usable where one was asked for.

    Raises:
        UserError: ``device`` is ``cuda`` and torch finds none.
    """
    if device != "cuda":
        return
    # In a process of its own: this one stays free of torch.
    probe = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode:
        raise UserError("--device cuda: torch finds no usable GPU here; use --device cpu or auto")
