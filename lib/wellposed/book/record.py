"""What a run leaves behind: its claims with verdicts, and where and how long it ran."""

import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wellposed.book.claims import Verdict
from wellposed.book.errors import UserError

MIME = "application/vnd.wellposed.claims+json"
"""The type of the output that carries a notebook's claims."""

LEFT_BEHIND_SECONDS = 86400.0
"""A temporary file older than this was left behind by a kill."""

# Digits beyond these differ between machines and mean nothing to a reader.
_DIGITS = 6


class ClaimRecord(BaseModel):
    """One claim as a run found it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    verdict: Verdict
    test: str
    value: float
    low: float | None
    high: float | None
    relation: str
    threshold: float
    n: int
    ours: str
    text: str
    timed: bool = False

    def line(self) -> str:
        """The claim on one line, the same in every run that finds the same.

        A busy machine can turn the verdict of a timed claim, so the line leaves it out.

        Example:
            >>> numbers = {"value": 1.0, "low": None, "high": None, "threshold": 0.0, "n": 1}
            >>> words = {"test": "mean", "relation": ">=", "ours": "1", "text": "mean 1"}
            >>> ClaimRecord(id="it-grows", verdict="partly", **numbers, **words).line()
            'it-grows: partly'
            >>> ClaimRecord(id="it-grows", verdict="partly", timed=True, **numbers, **words).line()
            'it-grows: judged by the clock'
        """
        return f"{self.id}: {'judged by the clock' if self.timed else self.verdict}"


class ClaimsRecord(BaseModel):
    """All claims of one run of a notebook, the content of the MIME record."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    slug: str
    preset: str
    seed: int
    device: str
    claims: list[ClaimRecord]


class RunRecord(BaseModel):
    """One run of a paper: claims, time, place and versions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    slug: str
    preset: str
    seed: int
    device: str
    hardware: str
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    parameters: dict[str, Any]
    seconds: float
    versions: dict[str, str]
    commit: str | None = None
    claims: list[ClaimRecord]


def round_number(value: float | None) -> float | None:
    """Round to six significant digits, so that a record does not depend on the last bits."""
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def claims_in(notebook: dict[str, Any]) -> ClaimsRecord | None:
    """The claims record among a notebook's outputs, or None if it has none.

    Args:
        notebook: the notebook as parsed JSON.

    Raises:
        UserError: there are two records, or one that breaks the schema.
    """
    found = [
        output["data"][MIME]
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if MIME in output.get("data", {})
    ]
    if len(found) > 1:
        raise UserError(f"the notebook holds {len(found)} claims records, one is expected")
    if not found:
        return None
    try:
        return ClaimsRecord.model_validate(found[0])
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"the notebook's claims record is damaged ({where})") from None


def read_record(path: Path) -> RunRecord | None:
    """Read a run's record; None if there is none or it is not whole."""
    try:
        return RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def sweep(folder: Path, pattern: str) -> None:
    """Delete files that a kill left behind; a younger one may be another's at work.

    Args:
        folder: where to look, not below it.
        pattern: which names, as for :meth:`pathlib.Path.glob`.
    """
    before = time.time() - LEFT_BEHIND_SECONDS
    for path in folder.glob(pattern):
        with suppress(OSError):  # another run may have swept it by now
            if path.stat().st_mtime < before:
                path.unlink()


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is either the old one or the whole new one.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
