"""Addresses in the public repository."""

from pathlib import Path

import pytest

from wellposed.book.errors import UserError
from wellposed.book.project import Paper
from wellposed.book.repository import ADDRESS, BRANCH, repository

PAPER = Paper("alpha", "transport", Path("/root"))


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADDRESS, raising=False)
    monkeypatch.delenv(BRANCH, raising=False)


def test_without_an_address_there_is_no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    assert repository() is None
    monkeypatch.setenv(ADDRESS, "")
    assert repository() is None


@pytest.mark.parametrize("end", ["", "/", ".git"])
def test_addresses(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setenv(ADDRESS, f"https://github.com/ada/the.book{end}")
    found = repository()
    assert found is not None
    assert found.address == "https://github.com/ada/the.book"
    notebook = "notebooks/transport/alpha.ipynb"
    assert found.notebook(PAPER) == f"{found.address}/blob/main/{notebook}"
    assert found.colab(PAPER) == (
        f"https://colab.research.google.com/github/ada/the.book/blob/main/{notebook}"
    )
    monkeypatch.setenv(BRANCH, "trunk")
    assert repository().binder(PAPER) == (
        f"https://mybinder.org/v2/gh/ada/the.book/trunk?urlpath=lab/tree/{notebook}"
    )


@pytest.mark.parametrize(
    "address",
    [
        "github.com/ada/book",
        "http://github.com/ada/book",
        "https://example.org/ada/book",
        "https://github.com/ada",
        "https://github.com/ada/book/tree/main",
        'https://github.com/ada/book"onload="',
    ],
)
def test_what_is_no_repository_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv(ADDRESS, address)
    with pytest.raises(UserError, match=r"WELLPOSED_REPOSITORY must be https://github.com/OWNER"):
        repository()
